"""docs/papers.md: its settings are valid, and one number of each objective is that of the paper's formula, worked by hand."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import grpo_fast as gf
from grpo_fast.temperature import TemperatureSchedule
from grpo_fast.trainer import GRPOConfig

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "papers.md").read_text()
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
P = 0.75  # probability of every sampled token under the current policy
LOG_P = math.log(P)


def settings(paper: str) -> dict[str, Any]:
    """What the code of a paper's section defines."""
    (code,) = re.findall(r"```python\n(.*?)```", SECTIONS[paper], re.S)
    names: dict[str, Any] = {"GRPOConfig": functools.partial(GRPOConfig, use_cpu=True, report_to="none")}
    exec(compile(code, paper, "exec"), names)
    return names


def loss(
    config: GRPOConfig, ratios: Sequence[Sequence[float]], advantages: Sequence[float], ref: float | None = None, **call: Any
) -> float:
    """Of sequences of tokens with these importance ratios; shorter ones are padded."""
    length = max(map(len, ratios))
    padded = torch.tensor([[*row, *[1.0] * (length - len(row))] for row in ratios], dtype=torch.float64)
    mask = torch.arange(length) < torch.tensor([len(row) for row in ratios]).unsqueeze(1)
    logits = torch.tensor([math.log(3.0), 0.0], dtype=torch.float64).expand(*padded.shape, 2)
    out = gf.grpo_loss(
        logits,
        torch.zeros(padded.shape, dtype=torch.int64),
        torch.tensor(advantages, dtype=torch.float64),
        config=config.loss_config(),
        old_logprobs=LOG_P - padded.log(),
        ref_logprobs=None if ref is None else torch.full_like(padded, math.log(ref)),
        mask=mask,
        **call,
    )
    return out.loss.item()


def advantages(config: GRPOConfig, rewards: list[float]) -> list[float]:
    found: list[float] = gf.group_advantages(torch.tensor(rewards), group_size=len(rewards), scale=config.scale_rewards).advantages.tolist()
    return found


def deepseek_r1(args: GRPOConfig, **_: Any) -> tuple[float, float]:
    d = math.log(0.5) - LOG_P
    return loss(args, [[8.0, 0.1]], [1.0], ref=0.5), -(8.0 + 0.1) / 2 + 0.001 * (math.exp(d) - 1 - d)  # neither ratio is clipped


def dapo(args: GRPOConfig, **_: Any) -> tuple[float, float]:
    assert (args.soft_punish_cache, args.max_completion_length) == (4096, 20480)
    return loss(args, [[1.5], [1.0, 0.5, 1.1]], [1.0, -2.0]), (-1.28 + 2 * (1.0 + 0.8 + 1.1)) / 4  # each of the four tokens counts the same


def dr_grpo(args: GRPOConfig, **_: Any) -> tuple[float, float]:
    assert advantages(args, [1.0, 0.0, 0.0, 0.0]) == [0.75, -0.25, -0.25, -0.25]
    return loss(args, [[1.1, 1.0], [1.0]], [1.0, -1.0]), (-1.1 - 1.0 + 1.0) / (2 * 3000)


def gspo(args: GRPOConfig, **_: Any) -> tuple[float, float]:
    assert args.updates_per_rollout == 4
    return loss(args, [[1.1, 1.0002 / 1.1], [2.0, 2.0]], [1.0, 1.0]), -(math.sqrt(1.0002) + 1.0004) / 2


def cispo(args: GRPOConfig, **_: Any) -> tuple[float, float]:
    return loss(args, [[6.0, 0.1]], [2.0]), -(5.0 + 0.1) * 2.0 * LOG_P / 2


def sapo(args: GRPOConfig, **_: Any) -> tuple[float, float]:
    def gate(tau: float, ratio: float) -> float:
        return 4 / tau / (1 + math.exp(-tau * (ratio - 1)))

    return loss(args, [[1.5], [1.5]], [1.0, -1.0]), (-gate(1.0, 1.5) + gate(1.05, 1.5)) / 2


def vespo(args: GRPOConfig, **_: Any) -> tuple[float, float]:
    weight = 1.2 * 0.9  # of the sequence of two tokens
    return loss(args, [[1.2, 0.9]], [1.0]), -(weight**2) * math.exp(3 * (1 - weight)) * LOG_P


def luspo(args: GRPOConfig, **_: Any) -> tuple[float, float]:
    return loss(args, [[1.1, 1.1, 1.1], [1.0]], [1.0, -1.0]), (
        -1.1 * 3 + 1.0
    ) / 2  # the sequence of three tokens has three times the weight


def gmpo(args: GRPOConfig, **_: Any) -> tuple[float, float]:
    return loss(args, [[2.0, 1.1, 0.5]], [1.0]), -((math.exp(0.4) * 1.1 * 0.5) ** (1 / 3))  # ln 2 is clipped to 0.4, ln 0.5 is not


def dppo(args: GRPOConfig, kl: GRPOConfig, **_: Any) -> tuple[float, float]:
    # The old probabilities are 0.75 / r: 0.625 and 0.5. Total variations 0.125 and 0.25; KL divergences 0.0366 and 0.1438.
    for config in (args, kl):
        assert loss(config, [[1.2, 1.5]], [1.0]) == pytest.approx(-1.2 / 2, rel=1e-6)
    return loss(args, [[1.2, 1.5]], [-1.0]), (1.2 + 1.5) / 2  # they have risen against the advantage


def maxrl(args: GRPOConfig, **_: Any) -> tuple[float, float]:
    return advantages(args, [1.0, 0.0, 0.0, 0.0])[0], 0.75 / (0.25 + 1e-4)


def deepseek_v32(args: GRPOConfig, **_: Any) -> tuple[float, float]:
    assert args.replay_support is True  # type: ignore[comparison-overlap]  # parsed
    masks = gf.off_policy_sequence_mask(
        torch.tensor([[-2.0], [-2.0], [-1.6]]),
        torch.full((3, 1), -1.4),
        torch.tensor([-1.0, 1.0, -1.0]),
        torch.ones(3, 1),
        threshold=args.off_policy_mask_threshold,
    )
    assert masks.flatten().tolist() == [0.0, 1.0, 1.0]
    d = math.log(0.5) - LOG_P
    return loss(args, [[1.1]], [1.0], ref=0.5), -1.1 + 0.001 * 1.1 * (math.exp(d) - 1 - d)


def kimi_k25(args: GRPOConfig, **_: Any) -> tuple[float, float]:
    assert advantages(args, [1.0, 0.0]) == [0.5, -0.5]
    squares = math.log(3.0) ** 2 + math.log(1.2) ** 2
    return loss(args, [[3.0, 1.2]], [-1.0]), (2.0 + 1.2 + 0.01 * squares) / 2  # clipped also where the advantage is negative


def icepop(args: GRPOConfig, **_: Any) -> tuple[float, float]:
    assert args.vllm_importance_sampling_mode == "token_mask"
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    ratios = torch.tensor([[0.4, 0.6, 4.0, 6.0]])
    weights = gf.rollout_weights(ratios.log(), torch.zeros(1, 4), torch.ones(1, 4), mode="mask", low=low, high=high)
    return weights.sum().item(), 0.6 + 4.0


def scalerl(args: GRPOConfig, **_: Any) -> tuple[float, float]:
    assert args.logits_dtype == "float32" and args.exclude_degenerate and args.scale_rewards == "batch"
    return loss(args, [[6.0], [1.0, 1.0]], [1.0, -1.0]), (-5.0 + 2.0) * LOG_P / 3


def polaris(args: GRPOConfig, **_: Any) -> tuple[float, float]:
    schedule = TemperatureSchedule.from_config(args.temperature_schedule)  # type: ignore[arg-type]
    temperatures = [schedule.temperatures(step, 1, 8) for step in (0, 999, 1000, 2500)]
    assert [each[0] for each in temperatures] == [1.4, 1.4, 1.45, 1.5]
    return loss(args, [[1.5]], [1.0]), -1.28


def acereason(args: GRPOConfig, **_: Any) -> tuple[float, float]:
    schedule = TemperatureSchedule.from_config(args.temperature_schedule)  # type: ignore[arg-type]
    assert schedule.spec.target == 0.3 and args.beta == 0 and args.updates_per_rollout == 1
    for _step in range(20):
        schedule.observe({"entropy": 0.1})
    assert schedule.temperatures(0, 1, 8)[0] > 1.1, "too little entropy: hotter"
    return loss(args, [[1.0]], [1.0]), -1.0


VALUES: dict[str, Callable[..., tuple[float, float]]] = {
    "DeepSeekMath and DeepSeek-R1": deepseek_r1,
    "DAPO": dapo,
    "Dr. GRPO": dr_grpo,
    "GSPO": gspo,
    "CISPO (MiniMax-M1)": cispo,
    "SAPO": sapo,
    "VESPO": vespo,
    "LUSPO": luspo,
    "GMPO": gmpo,
    "DPPO": dppo,
    "MaxRL": maxrl,
    "DeepSeek-V3.2": deepseek_v32,
    "Kimi-K2.5": kimi_k25,
    "IcePop (Ring-1T)": icepop,
    "ScaleRL": scalerl,
    "POLARIS": polaris,
    "AceReason-Nemotron 1.1": acereason,
}


def test_every_paper_of_the_page_has_a_value() -> None:
    assert list(VALUES) == list(SECTIONS)


@pytest.mark.parametrize("paper", VALUES)
@pytest.mark.filterwarnings("ignore:temperature")
def test_the_settings_give_the_value_of_the_paper(paper: str) -> None:
    found, expected = VALUES[paper](**settings(paper))
    assert found == pytest.approx(expected, rel=1e-6)


def test_each_section_names_its_source() -> None:
    for paper, text in SECTIONS.items():
        assert re.search(r"arXiv:\d{4}\.\d{5}|hkunlp", text), paper
