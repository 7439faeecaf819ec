"""loss_type="custom": the functions that it takes, the messages about those that it refuses, which tokens are computed, torch.compile."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_surrogate_cases import *  # noqa: F403
from custom_surrogate_cases import (
    SEEDS,
    check_equal,
    clipped,
    everything,
    test_a_repeated_formula_in_the_head,
    test_a_repeated_formula_over_logits,
)
from torch import Tensor, nn

import grpo_fast as gf
from grpo_fast.loss.config import LossConfig
from grpo_fast.loss.custom_surrogate import _known
from grpo_fast.loss.kernel_settings import config_from_numbers, config_numbers

BACKENDS = ["reference", "cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with gf.use_backend(request.param):
        yield request.param


def of(surrogate: Any, **settings: Any) -> LossConfig:
    return LossConfig(loss_type="custom", surrogate=surrogate, **settings)


def batch(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 11, generator=generator, dtype=dtype)
    token_ids = torch.randint(11, (3, 4), generator=generator)
    old = torch.log_softmax(logits.double() * 1.2, -1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1).to(dtype)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    given = {"advantages": torch.tensor([1.0, -0.5, 0.0], dtype=dtype), "old_logprobs": old, "mask": mask}
    return {"logits": logits.requires_grad_(), "token_ids": token_ids, **given}


def minimal(ratio: Tensor, advantages: Tensor) -> Tensor:
    return -ratio * advantages


def regularised(ratio: Tensor, advantages: Tensor) -> Tensor:  # as Kimi K2.5, arXiv:2602.02276
    return -ratio * advantages + 0.5 * ratio.log() ** 2


# ---- the formula


@pytest.mark.parametrize("seed", SEEDS[::2])
def test_a_repeated_formula_in_the_reference(seed: int) -> None:
    with gf.use_backend("reference"):
        test_a_repeated_formula_over_logits(seed)
        test_a_repeated_formula_in_the_head(seed)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradcheck(level: str) -> None:
    """The reference in float64, through every input."""
    config = of(everything, importance_sampling_level=level, entropy_coef=0.1, beta=0.1)
    given = batch(torch.float64)
    given |= {"ref_logprobs": given["old_logprobs"] - 0.1, "rollout_weights": torch.rand(3, 4, dtype=torch.float64)}
    given["surrogate_inputs"] = {"mine": torch.rand(3, 4), "sequence": torch.rand(3)}
    logits = given.pop("logits")
    assert torch.autograd.gradcheck(lambda x: gf.grpo_loss(x, config=config, **given).loss, logits)


@pytest.mark.usefixtures("backend")
def test_one_token_by_hand() -> None:
    """p = 3/5 against 1/2: ratio 1.2, A = 2, a column of 3 and a weight of 0.5, in a mean over 2 tokens, of which one is masked."""

    def by_hand(ratio: Tensor, advantages: Tensor, mine: Tensor) -> Tensor:
        return -(ratio**2) * advantages / mine

    logits = torch.tensor([[[3.0, 2.0], [1.0, 1.0]]]).log().requires_grad_()
    out = gf.grpo_loss(
        logits,
        torch.zeros(1, 2, dtype=torch.int64),
        torch.tensor([2.0]),
        config=of(by_hand, aggregation="fixed_length", max_completion_length=2),
        old_logprobs=torch.full((1, 2), 0.5).log(),
        mask=torch.tensor([[1, 0]]),
        rollout_weights=torch.tensor([[0.5]]),
        surrogate_inputs={"mine": torch.tensor([[3.0, float("nan")]])},
    )
    out.loss.backward()
    loss = -1.44 * 2 / 3 * 0.5 / 2
    assert out.loss.item() == pytest.approx(loss, rel=1e-5)
    g = 2 * loss  # d(ratio^2) / d log p = 2 ratio^2
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[[g * 0.4, -g * 0.4], [0.0, 0.0]]]), rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("backend")
def test_it_applies_the_rollout_weights_that_it_takes() -> None:
    weights = torch.tensor([[0.5], [2.0], [1.0]])
    root = of(lambda ratio, advantages, rollout_weights: -ratio * advantages * rollout_weights.sqrt())
    taken = gf.grpo_loss(**batch(), config=root, rollout_weights=weights)
    given = gf.grpo_loss(**batch(), config=of(minimal), rollout_weights=weights.sqrt())
    torch.testing.assert_close(taken.loss, given.loss)


# ---- which tokens are computed


@pytest.mark.usefixtures("backend")
def test_tokens_without_an_advantage_are_left_out_where_they_cannot_matter() -> None:
    mask = batch()["mask"].bool()
    skipped, needed = (gf.grpo_loss(**batch(), config=of(f), metrics_on="active") for f in (minimal, regularised))
    assert torch.equal(skipped.active, mask & torch.tensor([[True], [True], [False]]))
    assert torch.equal(needed.active, mask) and needed.metrics["active_fraction"] == 1
    told = gf.grpo_loss(**batch(), config=of(minimal, zero_advantage_loss=True), metrics_on="active")
    assert torch.equal(told.active, mask)
    torch.testing.assert_close(told.loss, skipped.loss)


@pytest.mark.usefixtures("backend")
def test_a_wrong_statement_about_them_is_reported() -> None:
    with pytest.raises(ValueError, match=r"surrogate .*:regularised has a loss or derivative of .* for advantages of 0.*Fix: .*=True"):
        gf.grpo_loss(**batch(), config=of(regularised, zero_advantage_loss=False))
    factor = [0.0]
    config = of(lambda ratio, advantages: -ratio * advantages + factor[0] * ratio.log() ** 2)
    assert config.skips_zero_advantages
    factor[0] = 1.0  # what the evaluation of the function could not see
    with pytest.raises(ValueError, match=r"zero_advantage_loss=True"):
        gf.grpo_loss(**batch(), config=config)


@pytest.mark.parametrize("value", [1, "yes"])
def test_the_statement_is_a_bool(value: Any) -> None:
    with pytest.raises(TypeError, match=r"zero_advantage_loss is .* expected True, False or None"):
        of(minimal, zero_advantage_loss=value)


# ---- the functions that are taken


class Learned(nn.Module):
    def forward(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        return -ratio * advantages


class Stateful:
    def __call__(self, ratio: Tensor, advantages: Tensor, logprobs: Tensor) -> Tensor:
        return -ratio * advantages

    def method(self, advantages: Tensor, ratio: Tensor) -> Tensor:
        return -ratio * advantages


def positional(r: Tensor, a: Tensor, lp: Tensor, /, *, factor: float = 1.0) -> Tensor:
    return -r * a * factor


def with_any(*given: Tensor, **others: Tensor) -> Tensor:
    assert list(others) in ([], ["mine"])
    return -given[0] * given[1]


@pytest.mark.parametrize(
    "function",
    [minimal, Learned(), Stateful(), Stateful().method, positional, with_any, functools.partial(positional, factor=1.0)],
    ids=["function", "module", "object", "method", "positional", "any", "partial"],
)
def test_what_can_be_called(function: Any) -> None:
    config = of(function)
    others: dict[str, Any] = {"surrogate_inputs": {"mine": torch.ones(3)}} if function is with_any else {}
    truth = gf.grpo_loss(**batch(), config=of(minimal))
    torch.testing.assert_close(gf.grpo_loss(**batch(), config=config, **others).loss, truth.loss)
    assert hash(config) == hash(of(function)) and config == of(function)
    assert copy.deepcopy(of(minimal)) == of(minimal)


def test_the_settings_hold_the_function_and_can_be_stored() -> None:
    config = of(minimal, beta=0.1)
    assert config.surrogate is minimal and LossConfig().surrogate == "clip"
    assert pickle.loads(pickle.dumps(config)) == config == LossConfig(**dataclasses.asdict(config))
    assert dataclasses.replace(config, loss_type="gspo", surrogate=None).surrogate == "clip"
    assert dataclasses.replace(LossConfig(), loss_type="cispo", epsilon_high=5.0).surrogate == "cispo"
    assert config_from_numbers(config_numbers(config)) == config
    assert LossConfig(loss_type="custom", surrogate=f"{__name__}:minimal").surrogate is minimal


def test_a_function_by_the_name_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "a_loss_of_mine.py").write_text("def loss(ratio, advantages):\n    return -ratio * advantages\n")
    config = of(f"{tmp_path}/a_loss_of_mine.py:loss")
    assert getattr(config.surrogate, "__name__", "") == "loss"
    for name, message in (
        (f"{tmp_path}/none.py:loss", "there is no file"),
        (f"{tmp_path}/a_loss_of_mine.py:l", "has no 'l'"),
        ("l", "no name"),
    ):
        with pytest.raises(ValueError, match=f"^LossConfig: surrogate: .*{message}"):
            of(name)


def test_a_function_is_forgotten_with_the_settings_that_hold_it() -> None:
    gc.collect()
    before = len(_known)
    config = of(lambda ratio, advantages: -ratio * advantages)
    config_from_numbers(config_numbers(config))
    assert len(_known) == before + 1
    del config
    gc.collect()
    assert len(_known) == before


# ---- what is refused


@pytest.mark.usefixtures("backend")
def test_messages_about_the_function() -> None:
    def fails(ratio: Tensor, advantages: Tensor) -> Tensor:
        raise KeyError("tau")

    cases: dict[str, tuple[Any, type[Exception], str]] = {
        "exception": (fails, RuntimeError, r"fails raised KeyError: 'tau'\. It was called with ratio, advantages, each float32 \[12\]"),
        "none": (lambda ratio: None, TypeError, r"<lambda> returned None \(NoneType\) for ratio, .*expected the loss of each token"),
        "dtype": (lambda ratio: -ratio.double(), TypeError, r"returned a tensor of torch\.float64 .*Fix: return loss\.to\(ratio\.dtype\)"),
        "shape": (lambda ratio: -ratio.sum(), ValueError, r"returned float32 \[\] on cpu .*Fix: no sum or mean"),
        "detached": (lambda ratio: -ratio.detach(), ValueError, r"returned a loss without a gradient"),
        "nan": (lambda ratio: (ratio - 1e9).log(), ValueError, r"the loss of the surrogate .*<lambda> is nan for ratio = \d"),
        "inf": (lambda ratio: 1 / (ratio - ratio.detach()), ValueError, r"the loss of the surrogate .* is inf for ratio"),
        "unknown": (
            lambda ratio, mine: -ratio * mine,
            ValueError,
            r"has no 'mine', a parameter of the surrogate .*ratio, advantages, logp",
        ),
        "reference": (lambda ratio, ref_logprobs: -ratio, ValueError, r"ref_logprobs is None; expected a tensor like the mask: the surr"),
    }
    for name, (function, error, message) in cases.items():
        with pytest.raises(error, match=message):
            gf.grpo_loss(**batch(), config=of(function))
        hidden, weight = torch.randn(3, 4, 5, requires_grad=True), torch.randn(11, 5)
        with pytest.raises(error, match=message.replace("[12]", "[9]").replace("12", r"\d+")):
            gf.linear_grpo_loss(hidden, weight, **{k: v for k, v in batch().items() if k != "logits"}, config=of(function))
        assert name


@pytest.mark.usefixtures("backend")
def test_a_derivative_that_is_not_finite_is_reported_in_backward() -> None:
    out = gf.grpo_loss(**batch(), config=of(lambda ratio, advantages: (ratio - ratio.detach()).sqrt() - ratio * advantages))
    with pytest.raises(
        ValueError, match=r"derivative with respect to ratio of the surrogate .* is (inf|nan) for ratio = .*, advantages = "
    ):
        out.loss.backward()


@pytest.mark.parametrize(
    "function",
    [
        lambda ratio, advantages: -ratio * (advantages - advantages.mean()),
        lambda ratio, advantages: -ratio * advantages / ratio.amax(),
        lambda ratio, advantages: -(ratio * advantages).cumsum(0),
        lambda ratio, advantages: -ratio * advantages * torch.rand_like(ratio),
        lambda ratio, advantages: -torch.nn.functional.dropout(ratio * advantages, 0.1),
    ],
)
def test_tokens_may_not_be_mixed(function: Any) -> None:
    with pytest.raises(ValueError, match=r"returned other losses for a part of the tokens.*expected a function of each token by itself"):
        of(function)


def test_mixing_that_only_real_inputs_show() -> None:
    def mixes(ratio: Tensor, mine: Tensor) -> Tensor:
        return -ratio * (mine / mine.sum() if bool((mine > 99).any()) else mine)

    with gf.debug_checks(), pytest.raises(ValueError, match="expected a function of each token by itself"):
        gf.grpo_loss(**batch(), config=of(mixes), surrogate_inputs={"mine": torch.tensor([100.0, 101.0, 102.0])})


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"theirs": torch.ones(3)},
            ValueError,
            "has 'theirs', which the surrogate .* does not take; expected names among its parameters, rat",
        ),
        ({"mine": torch.ones(3), "ratio": torch.ones(3)}, ValueError, "has 'ratio'; expected other names"),
        ({"mine": torch.ones(2)}, ValueError, r"surrogate_inputs\['mine'\] has shape \[2\]; expected \[B, T\] = \[3, 4\]"),
        ({"mine": [1.0]}, TypeError, r"surrogate_inputs\['mine'\] is a list; expected a torch.Tensor"),
        ({"mine": torch.ones(3, dtype=torch.complex64)}, TypeError, r"surrogate_inputs\['mine'\] has dtype torch.complex64"),
        ([1], TypeError, "surrogate_inputs is a list; expected a dictionary"),
    ],
)
def test_messages_about_its_inputs(given: Any, error: type[Exception], message: str) -> None:
    def takes(ratio: Tensor, mine: Tensor) -> Tensor:
        return -ratio * mine

    with pytest.raises(error, match=message):
        gf.grpo_loss(**batch(), config=of(takes), surrogate_inputs=given)
    with pytest.raises(ValueError, match=r"surrogate_inputs has .* with loss_type='dapo'; expected None"):
        gf.grpo_loss(**batch(), surrogate_inputs={"mine": torch.ones(3)})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"loss_type": "custom"}, TypeError, r"surrogate is None \(NoneType\); expected a function with loss_type='custom'"),
        ({"loss_type": "custom", "surrogate": 3}, TypeError, r"surrogate is 3 \(int\); expected a function"),
        (
            {"surrogate": minimal},
            ValueError,
            r"surrogate is <function minimal .* with loss_type='dapo'; expected None. Fix: loss_type='custom'",
        ),
        ({"loss_type": "gspo", "surrogate": "cispo"}, ValueError, "surrogate is 'cispo' with loss_type='gspo'; expected None"),
        ({"loss_type": "custom", "surrogate": minimal, "dual_clip": 3.0}, ValueError, "dual_clip is 3.0; expected None"),
        ({"loss_type": "custom", "surrogate": minimal, "epsilon_low": 2.0}, ValueError, "epsilon_low is 2.0; expected at most 1"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"LossConfig: {message}"):
        LossConfig(**settings)


# ---- torch.compile, without a gradient, without tokens


def test_torch_compile() -> None:
    """In the head two functions one after the other: the compiled call follows the settings."""
    given, generator = batch(), torch.Generator().manual_seed(1)
    logits, hidden, weight = given.pop("logits"), torch.randn(3, 4, 5, generator=generator), torch.randn(11, 5, generator=generator)
    with_columns = (of(everything), {"surrogate_inputs": {"mine": torch.rand(3, 4), "sequence": torch.ones(3)}})
    call: Any
    for call, tensors, configs in (
        (gf.grpo_loss, (logits,), [with_columns]),
        (gf.linear_grpo_loss, (hidden, weight), [with_columns, (of(clipped(0.2, 0.2)), {})]),
    ):
        compiled = torch.compile(call, fullgraph=True, backend="eager")
        for config, others in configs:
            results = []
            for run in (call, compiled):
                leaves = [x.detach().clone().requires_grad_() for x in tensors]
                out = run(*leaves, **given, config=config, **others)
                out.loss.backward()
                results.append((out, {str(i): x.grad for i, x in enumerate(leaves) if x.grad is not None}))
            check_equal(results[1], results[0])
    torch._dynamo.reset()


@pytest.mark.usefixtures("backend")
def test_no_gradient_and_no_tokens() -> None:
    config = of(everything)
    columns = {"mine": torch.ones(3), "sequence": torch.ones(3)}
    with torch.no_grad():
        assert gf.grpo_loss(**batch(), config=config, surrogate_inputs=columns).loss.isfinite()
    given = batch()
    given["mask"] = torch.zeros_like(given["mask"])
    out = gf.grpo_loss(**given, config=config, surrogate_inputs=columns)
    out.loss.backward()
    assert out.loss == 0 and not given["logits"].grad.any()
    none = {name: x[:0].detach().requires_grad_(name == "logits") for name, x in batch().items()}
    gf.grpo_loss(**none, config=config, surrogate_inputs={name: x[:0] for name, x in columns.items()}).loss.backward()


# ---- what it costs


@pytest.mark.sweep
@pytest.mark.parametrize(("call", "most"), [("head", 1.05), ("logits", 1.6)])
def test_the_time_of_a_repeated_formula(call: str, most: float) -> None:
    """CPU time of forward and backward on one thread, the medians of interleaved runs, against the built-in loss."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    tokens, vocabulary, width = (512, 32_000, 512) if call == "head" else (512, 64_000, 1)
    hidden, weight = (torch.randn(n, width, generator=generator).requires_grad_() for n in (tokens, vocabulary))
    logits = torch.randn(tokens, vocabulary, generator=generator).requires_grad_() if call == "logits" else None
    ids, advantages = torch.randint(vocabulary, (tokens,), generator=generator), torch.randn(tokens, generator=generator)
    old = torch.full((tokens,), -11.0)
    seconds: dict[str, list[float]] = {}
    for repeat in range(9):
        for name, config in (("dapo", LossConfig()), ("custom", of(clipped(0.2, 0.2)))):
            for x in (hidden, weight, logits):
                if x is not None:
                    x.grad = None
            start = time.process_time()
            if logits is None:
                out = gf.linear_grpo_loss(hidden, weight, ids, advantages, config=config, old_logprobs=old)
            else:
                out = gf.grpo_loss(logits, ids, advantages, config=config, old_logprobs=old)
            out.loss.backward()
            if repeat:
                seconds.setdefault(name, []).append(time.process_time() - start)
    torch.set_num_threads(threads)
    ratio = sorted(seconds["custom"])[4] / sorted(seconds["dapo"])[4]
    print(f"{call}: {ratio:.3f}", {name: min(each) for name, each in seconds.items()})
    assert ratio <= most


# ---- in the trainer


def test_the_trainer_and_its_settings_file(tmp_path: Path) -> None:
    """A function from a file gives the step of the built-in loss; stored settings hold its name."""
    from test_trainer import assert_same, one_step

    from grpo_fast.trainer import GRPOConfig

    (tmp_path / "a_trainers_loss.py").write_text(
        "import torch\n\n\ndef loss(ratio, advantages):\n"
        "    return torch.maximum(-ratio * advantages, -ratio.clamp(0.8, 1.2) * advantages)\n"
    )
    name = f"{tmp_path}/a_trainers_loss.py:loss"
    expected, log = one_step(tmp_path / "built_in")
    found, log_found = one_step(tmp_path / "custom", loss_type="custom", surrogate=name)
    assert_same(found, expected)
    for each in ("loss", "entropy", "clip_ratio/region_mean", "clip_ratio/low_min", "active_fraction"):
        assert log_found[each] == pytest.approx(log[each], abs=1e-6), each

    function: Any = minimal
    args = GRPOConfig(str(tmp_path), use_cpu=True, loss_type="custom", surrogate=function)
    assert args.loss_config().surrogate is minimal and args.to_dict()["surrogate"] == f"{__name__}:minimal"
    assert pickle.loads(pickle.dumps(args)).surrogate == f"{__name__}:minimal"
    with pytest.raises(ValueError, match="ref_logprobs is None"):
        function = lambda ratio, ref_logprobs: -ratio  # noqa: E731
        GRPOConfig(str(tmp_path), use_cpu=True, loss_type="custom", surrogate=function)
