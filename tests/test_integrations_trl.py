"""Two training runs of TRL's, its own trainer and ours: losses, gradient norms and metrics are the same; and its LM head in our stead."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hang import HANG
from peers import PEERS, needs_trl
from tiny_model import VOCABULARY, save_tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_fast.loss import checks

pytestmark = needs_trl

STEPS = 4  # each from the weights of the run that it is compared with: later steps are like these
TIMES = ("runtime", "per_second", "step_time", "total_flos")  # how the names of what is no result end


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Of tokens by no rule that could be learnt in a few steps; a group of a prompt's completions in five gets equal rewards."""
    values = [sum(token * 7 % 13 for token in ids) / (12 * len(ids)) for ids in completion_ids]
    return [0.5 if int(prompt.split()[0][1:]) % 5 == 0 else value for prompt, value in zip(prompts, values, strict=True)]


def build(trainer_class: Any, model_path: Path, out: Path, *, peft_config: Any = None, **options: Any) -> Any:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig

    random.seed(0)
    torch.manual_seed(0)
    settings = {
        "optim": "sgd",  # Adam would blow up the last bit of a gradient that is almost 0
        "learning_rate": 0.03,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 7,
        "max_steps": STEPS,
        "logging_steps": 1,
        "temperature": 0.7,
        "bf16": False,
        "gradient_checkpointing": False,
        **options,
    }
    args = GRPOConfig(
        output_dir=str(out),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        seed=3,
        disable_tqdm=True,
        log_level="error",
        **settings,
    )
    prompts = [{"prompt": f"w{i % 30} w{i * 7 % 30}"} for i in range(64)]
    return trainer_class(
        str(model_path),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list(prompts),
        eval_dataset=Dataset.from_list(prompts[:4]),
        processing_class=PreTrainedTokenizerFast.from_pretrained(model_path),
        peft_config=peft_config,
    )


class Weights:
    """What the trainable weights are when an optimiser step begins, and after the last one: of one run, for the steps of another.

    Roundings of the first step are in the weights of the second, and grow from step to step: by how much depends on the processor's
    instructions. So a run that is compared begins every step with the weights of the other run at that step, and what its own step has
    made of them is compared before. Whatever else a trainer carries from step to step stays its own.
    """

    def __init__(self) -> None:
        self.steps: list[list[Tensor]] = []

    def recorder(self) -> Any:
        from transformers import TrainerCallback

        steps = self.steps

        class Record(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
                steps.append([p.detach().clone() for p in trainable(model)])

            on_train_end = on_step_begin

        return Record()

    def follower(self, tolerance: float) -> Any:
        from transformers import TrainerCallback

        steps = self.steps

        class Follow(TrainerCallback):
            @torch.no_grad()
            def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
                now = state.global_step
                for i, (mine, theirs) in enumerate(zip(trainable(model), steps[now], strict=True)):
                    if now > 0:
                        # SGD: a gradient's error times the learning rate, and the rounding of the sum with the weight, of either run.
                        moved = max((after - before).abs().max().item() for before, after in zip(steps[now - 1], steps[now], strict=True))
                        bound = tolerance * moved + torch.finfo(mine.dtype).eps * theirs.abs().max().item()
                        gap = (mine - theirs).abs().max().item()
                        assert gap <= bound, f"weight {i} after step {now}: {gap} from TRL's; allowed {bound}"
                    mine.copy_(theirs)

            on_train_end = on_step_begin

        return Follow()


def trainable(model: torch.nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def train(trainer_class: Any, model_path: Path, out: Path, *, callback: Any = None, **options: Any) -> list[dict[str, float]]:
    trainer = build(trainer_class, model_path, out, **options)
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train()
    return trainer.state.log_history


def same_runs(ours: list[dict[str, float]], theirs: list[dict[str, float]], tolerance: float = 1e-5) -> None:
    """Every number that was logged. Relative; to a tenth of the largest of its kind where it is less than that, for then its terms cancel;
    losses and the KL, whose terms cancel always, to the largest. A sum of terms of about 1 that cancel is rounded as they are: by half of
    ``eps`` in either run, and once more where it is divided."""
    assert len(ours) == len(theirs)
    keys = {key for entry in theirs for key in entry if not key.endswith(TIMES)}
    assert {key for entry in ours for key in entry if not key.endswith(TIMES)} == keys
    for key in sorted(keys):
        mine, stock = [entry.get(key) for entry in ours], [entry.get(key) for entry in theirs]
        kind = "loss" if key == "train_loss" else key  # the mean of all steps'
        largest = max([1e-2, *(abs(entry[kind]) for entry in theirs if entry.get(kind) is not None)])  # None: it was no number
        cancels = key in ("loss", "policy_loss", "eval_loss", "train_loss", "kl")
        scale, rounding = (largest, 2 * torch.finfo(torch.float32).eps) if cancels else (0.1 * largest, 0.0)
        for step, (x, y) in enumerate(zip(mine, stock, strict=True)):
            assert (x is None) == (y is None), f"{key} at {step}: {x} and {y}"
            assert x is None or y is None or abs(x - y) <= tolerance * max(abs(y), scale) + rounding, f"{key} at step {step}: {x}, TRL {y}"


def compare(model_path: Path, tmp_path: Path, tolerance: float = 1e-5, **options: Any) -> list[dict[str, float]]:
    import trl

    from grpo_fast.integrations.trl import GRPOTrainer

    weights = Weights()
    theirs = train(trl.GRPOTrainer, model_path, tmp_path, callback=weights.recorder(), **options)
    assert len(weights.steps) == options.get("max_steps", STEPS) + 1
    ours = train(GRPOTrainer, model_path, tmp_path, callback=weights.follower(tolerance), **options)
    same_runs(ours, theirs, tolerance)
    assert sum(entry.get("grad_norm", 0) > 1e-2 for entry in ours) >= options.get("max_steps", STEPS) // 4, "steps must train"
    return ours


SMALL = {"per_device_train_batch_size": 2}
REUSED = {**SMALL, "gradient_accumulation_steps": 2, "num_iterations": 2}  # so that the ratio leaves 1
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
OF_LOSS: dict[str, dict[str, Any]] = {  # options that one loss type alone reads
    "cispo": {"epsilon_high": 1.1},
    "sapo": {"sapo_temperature_pos": 1.5, "sapo_temperature_neg": 2.0},
    "vespo": {"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5, "vespo_k_neg": 2.5, "vespo_lambda_neg": 1.5},
    "dr_grpo": {"max_completion_length": 5},
}
CASES: dict[str, dict[str, Any]] = {
    "accumulation": {**SMALL, "gradient_accumulation_steps": 4},
    "stale": {**SMALL, "gradient_accumulation_steps": 2, "steps_per_generation": 4},
    "beta": {**REUSED, "beta": 0.1, "loss_type": "grpo"},
    "beta-uncorrected": {**REUSED, "beta": 0.1, "use_bias_correction_kl": False},
    "sequence": {**REUSED, "loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1, "epsilon": 0.02},
    "luspo-sequence": {**REUSED, "loss_type": "luspo", "importance_sampling_level": "sequence"},
    # The first tokens of a group's completions have the same entropy: at a quantile that falls on it, roundings decide.
    "sequence-top-entropy": {**REUSED, "importance_sampling_level": "sequence", "top_entropy_quantile": 0.45},
    "top-entropy": {**REUSED, "top_entropy_quantile": 0.3, "beta": 0.1},
    "off-policy-mask": {**REUSED, "off_policy_mask_threshold": 0.001, "beta": 0.1},
    "off-policy-mask-vespo": {**REUSED, "off_policy_mask_threshold": 0.001, "loss_type": "vespo"},
    "delta": {**REUSED, "delta": 1.3, "loss_type": "bnpo"},
    "entropy": {**REUSED, "entropy_coef": 0.05, "loss_type": "dapo"},
    "entropy-grpo": {**SMALL, "entropy_coef": 0.05, "loss_type": "grpo", "gradient_accumulation_steps": 4},
    "entropy-adaptive": {
        **REUSED, "use_adaptive_entropy": True, "entropy_target": 1.9, "entropy_coef": 0.05, "entropy_coef_delta": 0.03,
        "entropy_coef_min": 0.01, "entropy_coef_max": 0.2, "max_steps": 8,  # it carries a coefficient from step to step
    },
    "truncated-masked": {**REUSED, "mask_truncated_completions": True, "loss_type": "grpo", "max_steps": 8},  # the first four mask all
    "fp32-head": {**REUSED, "cast_lm_head_to_fp32": True},
    "checkpointing": {**REUSED, "gradient_checkpointing": True, "beta": 0.1},
    "compiled": {**REUSED, "torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2},
    "padded": {**REUSED, "pad_to_multiple_of": 4, "beta": 0.1},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4, "loss_type": "dapo"},
    **{f"{loss}-reused": {**REUSED, "loss_type": loss, **OF_LOSS.get(loss, {})} for loss in LOSSES},
    **{f"{loss}-beta": {**SMALL, "loss_type": loss, "beta": 0.1, "gradient_accumulation_steps": 4} for loss in LOSSES},
}  # fmt: skip
CORE = ("accumulation", "beta", "top-entropy", "entropy-adaptive")


@pytest.mark.parametrize("name", [name if name in CORE else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_the_same_run(name: str, model_path: Path, tmp_path: Path) -> None:
    compare(model_path, tmp_path, **CASES[name])


def test_the_same_step_in_bfloat16(model_path: Path, tmp_path: Path) -> None:
    """Of which TRL rounds the logits on the way."""
    compare(model_path, tmp_path, tolerance=0.02, bf16=True, max_steps=1, beta=0.1)


def lora(*modules: str) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(modules), init_lora_weights=False, lora_dropout=0.0)


@pytest.mark.parametrize("beta", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
def test_the_same_run_with_lora(beta: float, model_path: Path, tmp_path: Path) -> None:
    compare(model_path, tmp_path, peft_config=lora("q_proj", "v_proj"), beta=beta, **REUSED)


@pytest.mark.slow
def test_the_same_run_of_a_mixture_of_experts(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """Whose load-balancing loss is added."""
    runs = compare(save_tiny_model(tmp_path_factory.mktemp("mixture"), mixture=True), tmp_path, router_aux_loss_coef=0.3, **REUSED)
    assert all(entry["aux_loss"] > 0.1 for entry in runs if "aux_loss" in entry)
    assert any("aux_loss" in entry for entry in runs)


def in_its_own(
    which: str, model_path: Path, out: Path, options: dict[str, Any], *, processes: int = 1, path: tuple[Path, ...] = ()
) -> None:
    """tests/trl_two_processes.py; path: where packages are looked for first."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"] if processes > 1 else []
    script = Path(__file__).with_name("trl_two_processes.py")
    searched = os.pathsep.join([*map(str, (*path, script.parent)), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *launcher, str(script), which, str(model_path), str(out), json.dumps(options)],
        env={**os.environ, "PYTHONPATH": searched, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.sweep
def test_the_same_run_in_two_processes(model_path: Path, tmp_path: Path) -> None:
    """Data-parallel: the metrics of both processes, token counts over both, thresholds over both."""
    options = {**REUSED, "beta": 0.1, "loss_type": "dapo", "max_steps": 4, "top_entropy_quantile": 0.6}
    for which in ("trl", "ours"):
        in_its_own(which, model_path, tmp_path / f"{which}.json", options, processes=2)
    theirs, ours = (json.loads((tmp_path / f"{which}.json").read_text()) for which in ("trl", "ours"))
    assert ours["processes"] == 2
    same_runs(ours["logs"], theirs["logs"])


@pytest.mark.sweep
def test_a_step_of_a_sharded_model(model_path: Path, tmp_path: Path) -> None:
    from grpo_fast.integrations.trl import GRPOTrainer

    options = {"loss_type": "grpo", "beta": 0.1}
    in_its_own("sharded", model_path, tmp_path / "sharded.pt", options, processes=2)
    sharded = torch.load(tmp_path / "sharded.pt")
    assert sharded["processes"] == 2
    loss, gradients, metrics = loss_of(build(GRPOTrainer, model_path, tmp_path, **options), batch(model_path))
    same_step((sharded["loss"], sharded["gradients"], metrics), (loss, gradients, metrics))


@pytest.mark.slow
def test_the_same_run_under_an_older_trl(model_path: Path, tmp_path: Path) -> None:
    """1.15, whose own head has no path on a CPU: so ours under it, against the newer TRL's."""
    import trl

    older = PEERS / "trl-1.15.0"
    if not older.exists():
        pytest.skip(f"there is no TRL 1.15.0: pip install --no-deps --target {older} trl==1.15.0")
    options = {**REUSED, "beta": 0.1, "loss_type": "grpo"}
    in_its_own("ours", model_path, tmp_path / "older.json", options, path=(older,))
    same_runs(json.loads((tmp_path / "older.json").read_text())["logs"], train(trl.GRPOTrainer, model_path, tmp_path, **options))


# One batch ------------------------------------------------------------------------------------------------------------------------------


def batch(model_path: Path, **more: Tensor) -> dict[str, Tensor]:
    """What TRL hands to _compute_loss, with a row that is masked as a whole, and ratios on both sides of the band."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(7)
    completion_mask = (torch.arange(6) < torch.tensor([6, 4, 5, 0]).unsqueeze(1)).long()
    prompt_mask = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 1, 1]])
    prompt_ids = torch.randint(3, VOCABULARY, (4, 3), generator=generator) * prompt_mask
    completion_ids = torch.randint(3, VOCABULARY, (4, 6), generator=generator) * completion_mask
    model = AutoModelForCausalLM.from_pretrained(model_path)
    with torch.no_grad():
        logits = model(torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, completion_mask], 1)).logits[:, -7:-1] / 0.7
    logprobs = logits.log_softmax(-1).gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)
    old = logprobs + 0.3 * torch.randn(4, 6, generator=generator)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.tensor([1.2, -0.7, 0.0, 0.4]),
        "num_items_in_batch": torch.tensor(31),
        "old_per_token_logps": old * completion_mask,
        "ref_per_token_logps": (old - 0.1) * completion_mask,
        **more,
    }


def loss_of(trainer: Any, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """Loss, gradients by parameter, and metrics."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 2
    loss = trainer._compute_loss(trainer.model, dict(inputs))
    loss.backward()
    logged: dict[str, float] = {}
    trainer.log(logged)
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, {key: value for key, value in logged.items() if key not in ("epoch", "step")}


def same_step(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance, abs=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    scale = max(x.abs().max().item() for x in theirs[1].values())
    assert scale > 1e-2
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).abs().max().item() <= tolerance * scale, name
    assert ours[2].keys() == theirs[2].keys()
    for name, value in theirs[2].items():
        assert ours[2][name] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), name


def both(model_path: Path, tmp_path: Path, inputs: dict[str, Tensor], change: dict[str, Any] | None = None, **options: Any) -> Any:
    import trl

    from grpo_fast.integrations.trl import GRPOTrainer

    trainers = [build(trainer_class, model_path, tmp_path, **options) for trainer_class in (GRPOTrainer, trl.GRPOTrainer)]
    for trainer in trainers:
        for name, value in (change or {}).items():
            setattr(trainer, name, value)
    ours, theirs = (loss_of(trainer, inputs) for trainer in trainers)
    same_step(ours, theirs)
    return trainers[0], ours


VLLM = {"use_vllm": True}  # after the construction, which would look for a server


@pytest.mark.parametrize(
    ("weights", "options"),
    [
        ("token", {"loss_type": "grpo", "beta": 0.1}),
        ("sequence", {"loss_type": "dapo"}),
        ("token", {"loss_type": "vespo"}),
        ("sequence", {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    ],
)
def test_a_sampler_that_is_not_the_trainer(weights: str, options: dict[str, Any], model_path: Path, tmp_path: Path) -> None:
    inputs = batch(model_path)
    ratio = 1 + 0.3 * torch.randn(4, 6 if weights == "token" else 1, generator=torch.Generator().manual_seed(1)).clamp(-2, 2)
    if weights == "token":
        ratio = torch.where(inputs["completion_mask"] != 0, ratio, 1.0)  # as TRL makes them
    both(model_path, tmp_path, {**inputs, "importance_sampling_ratio": ratio}, change=VLLM, **options)


def test_off_policy_mask_by_the_samplers_logprobs(model_path: Path, tmp_path: Path) -> None:
    """Some of which vLLM could not give."""
    inputs = batch(model_path)
    sampled = inputs["old_per_token_logps"] + 0.2
    sampled[0, 1] = float("nan")
    inputs["sampling_per_token_logps"] = sampled
    trainer, (_, gradients, _) = both(model_path, tmp_path, inputs, off_policy_mask_threshold=0.05)
    trainer.off_policy_mask_threshold = 10.0
    other = loss_of(trainer, inputs)[1]
    assert any((gradients[name] - other[name]).abs().max() > 1e-3 for name in gradients), "the mask must drop a sequence"


def test_a_model_that_sees(tmp_path: Path) -> None:
    """Images are passed to the model together with their placeholder tokens."""
    from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    model_path, image_token = save_tiny_model(tmp_path / "model"), 3
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 4, "patch_size": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=AutoConfig.from_pretrained(model_path),
        image_token_id=image_token,
        vision_feature_layer=-1,
    )
    torch.manual_seed(5)
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(model_path)

    generator = torch.Generator().manual_seed(7)
    completion_mask = (torch.arange(6) < torch.tensor([6, 4, 5, 0]).unsqueeze(1)).long()
    ids = torch.randint(4, VOCABULARY, (4, 13), generator=generator)
    ids[:, :4] = image_token  # a patch each
    images = torch.randn(4, 3, 4, 4, generator=generator)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.cat([torch.ones(4, 7).long(), completion_mask], 1), pixel_values=images).logits
    logprobs = (logits[:, 6:-1] / 0.7).log_softmax(-1).gather(-1, ids[:, 7:, None]).squeeze(-1)
    inputs = {
        "prompt_ids": ids[:, :7],
        "prompt_mask": torch.ones(4, 7, dtype=torch.int64),
        "completion_ids": ids[:, 7:] * completion_mask,
        "completion_mask": completion_mask,
        "advantages": torch.tensor([1.2, -0.7, 0.3, 0.4]),
        "num_items_in_batch": torch.tensor(31),
        "old_per_token_logps": logprobs + 0.3 * torch.randn(4, 6, generator=generator),
        "ref_per_token_logps": logprobs + 0.1,
        "pixel_values": images,
        "num_images": [1, 1, 1, 1],
    }
    _, (_, gradients, _) = both(model_path, tmp_path, inputs, beta=0.1)
    assert gradients["model.vision_tower.embeddings.patch_embedding.weight"].abs().max() > 1e-3


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_tool_mask_and_advantages_per_token(loss_type: str, model_path: Path, tmp_path: Path) -> None:
    tool_mask = torch.ones(4, 6, dtype=torch.int64)
    tool_mask[0, 2:4] = 0
    advantages = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    both(model_path, tmp_path, batch(model_path, tool_mask=tool_mask, advantages=advantages), loss_type=loss_type)


def test_the_loss_follows_the_temperature(model_path: Path, tmp_path: Path) -> None:
    """TRL's own is that of the construction."""
    import trl

    from grpo_fast.integrations.trl import GRPOTrainer

    ours = build(GRPOTrainer, model_path, tmp_path, temperature=1.0)
    first = loss_of(ours, batch(model_path))
    ours.temperature = 0.6
    theirs = build(trl.GRPOTrainer, model_path, tmp_path, temperature=0.6)
    second = loss_of(ours, batch(model_path))
    same_step(second, loss_of(theirs, batch(model_path)))
    assert max((first[1][name] - second[1][name]).abs().max() for name in second[1]) > 1e-2


def test_the_temperature_may_change_while_it_trains(model_path: Path, tmp_path: Path) -> None:
    """The sampler goes with it, and completions that are used again keep the temperature they were sampled at."""
    from transformers import TrainerCallback

    from grpo_fast.integrations.trl import GRPOTrainer

    class Cooler(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.temperature = 0.7 - 0.1 * state.global_step

    trainer = build(GRPOTrainer, model_path, tmp_path, max_steps=4, num_iterations=2, per_device_train_batch_size=4)
    trainer.add_callback(Cooler())
    sampled, scored = [], []
    generate, score = trainer.model.generate, trainer._compute_loss

    def watched_generate(*args: Any, generation_config: Any, **kwargs: Any) -> Any:
        sampled.append((generation_config.temperature, trainer.generation_kwargs["temperature"]))
        return generate(*args, generation_config=generation_config, **kwargs)

    def watched_score(model: Any, inputs: dict[str, Any]) -> Tensor:
        loss: Tensor = score(model, inputs)
        packed = trainer._unlogged["train"][-1]
        names = [metric.name for metric in packed[0] for _ in range(metric.size)]
        entropy_sum, count = (packed[1][i].item() for i, name in enumerate(names) if name == "entropy")
        scored.append((inputs["temperature"].item(), entropy_sum / count, entropy_at(trainer.model, inputs, inputs["temperature"].item())))
        return loss

    with mock.patch.object(trainer.model, "generate", watched_generate), mock.patch.object(trainer, "_compute_loss", watched_score):
        trainer.train()
    assert sampled == [(pytest.approx(t), pytest.approx(t)) for t in (0.7, 0.5)]
    assert [t for t, _, _ in scored] == pytest.approx([0.7, 0.7, 0.5, 0.5])
    for _, ours, expected in scored:
        assert ours == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def entropy_at(model: Any, inputs: dict[str, Tensor], temperature: float) -> float:
    """Mean over the completions' tokens, from the model's own logits."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    length = inputs["completion_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1]
    entropies = torch.distributions.Categorical(logits=logits / temperature).entropy()
    return entropies[inputs["completion_mask"] != 0].mean().item()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf"), "hot", None])
def test_a_temperature_at_which_nothing_can_be_sampled(temperature: Any, model_path: Path, tmp_path: Path) -> None:
    from grpo_fast.integrations.trl import GRPOTrainer

    trainer = build(GRPOTrainer, model_path, tmp_path)
    with pytest.raises(ValueError, match=r"temperature is .*; expected a finite number above 0"):
        trainer.temperature = temperature
    assert trainer.temperature == trainer.generation_config.temperature == 0.7


@pytest.mark.parametrize("num_items", [0, 3, 31])
@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.1}, {"loss_type": "cispo", "epsilon_high": 1.1}], ids=str)
def test_fewer_tokens_than_micro_batches(options: dict[str, Any], num_items: int, model_path: Path, tmp_path: Path) -> None:
    """As where most completions were cut off and are masked; with 0 TRL divides by 1."""
    given = batch(model_path, num_items_in_batch=torch.tensor(num_items))
    both(model_path, tmp_path, given, steps_per_generation=8, gradient_accumulation_steps=4, **options)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_micro_batch_that_is_masked_as_a_whole(loss_type: str, model_path: Path, tmp_path: Path) -> None:
    from grpo_fast.integrations.trl import GRPOTrainer

    trainer = build(GRPOTrainer, model_path, tmp_path, loss_type=loss_type, beta=0.1, entropy_coef=0.1)
    nothing = {"completion_mask": torch.zeros(4, 6, dtype=torch.int64), "num_items_in_batch": torch.tensor(0)}
    loss, gradients, metrics = loss_of(trainer, batch(model_path, **nothing))
    assert loss == 0.0
    assert all((gradient == 0).all() for gradient in gradients.values())
    assert metrics["entropy"] == 0.0


def test_only_active_tokens(model_path: Path, tmp_path: Path) -> None:
    from grpo_fast.integrations.trl import GRPOTrainer

    trainer = build(GRPOTrainer, model_path, tmp_path)
    everything = loss_of(trainer, batch(model_path))
    trainer.metrics_on = "active"
    active = loss_of(trainer, batch(model_path))
    same_step((*active[:2], {**active[2], "entropy": everything[2]["entropy"]}), everything)
    assert active[2]["entropy"] != pytest.approx(everything[2]["entropy"], rel=1e-3), "a row without an advantage is left out"


def test_the_entropy_controller_sees_all_tokens(model_path: Path, tmp_path: Path) -> None:
    """Also while its coefficient is 0, when a row without an advantage could be left out."""
    from grpo_fast.integrations.trl import GRPOTrainer

    entropies = {}
    for metrics_on in ("all", "active"):
        trainer = build(GRPOTrainer, model_path, tmp_path, use_adaptive_entropy=True)
        trainer.metrics_on = metrics_on
        loss_of(trainer, batch(model_path))
        entropies[metrics_on] = trainer._last_world_entropy
    assert entropies["active"] == entropies["all"] < 10.0


class _HostReads(TorchDispatchMode):
    """Counts what would stall a GPU: reading a value, and shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.name().split(".")[0] in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")
        return function(*args, **(kwargs or {}))


def test_fewer_host_synchronisations(model_path: Path, tmp_path: Path) -> None:
    import trl

    from grpo_fast.integrations.trl import GRPOTrainer

    counts = {}
    for trainer_class in (GRPOTrainer, trl.GRPOTrainer):
        trainer = build(trainer_class, model_path, tmp_path, beta=0.1, loss_type="grpo")
        inputs = batch(model_path)
        with _HostReads() as reads, mock.patch.object(checks, "value_checks_wanted", lambda tensor: False):  # as on a GPU
            trainer._compute_loss(trainer.model, inputs)
        counts[trainer_class.__module__.split(".")[0]] = reads.count
    in_the_model = 2  # transformers looks whether the attention mask is needed
    assert counts["grpo_fast"] <= in_the_model + 1
    assert counts["trl"] >= in_the_model + 7, counts


# LoRA on the head -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_lora_on_the_head(beta: float, model_path: Path, tmp_path: Path) -> None:
    """Which TRL refuses. The adapter's gradient is that of autograd through the model's own logits."""
    import trl

    from grpo_fast.integrations.trl import GRPOTrainer

    with pytest.raises(ValueError, match="lm_head"):
        build(trl.GRPOTrainer, model_path, tmp_path, peft_config=lora("q_proj", "lm_head"))
    trainer = build(GRPOTrainer, model_path, tmp_path, peft_config=lora("q_proj", "lm_head"), loss_type="bnpo", beta=beta)
    inputs = batch(model_path)
    loss, gradients, _ = loss_of(trainer, inputs)
    assert any("lm_head.lora_B" in name for name in gradients)

    trainer.model.zero_grad()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = trainer.model(input_ids=ids, attention_mask=attention).logits[:, -7:-1] / 0.7
    logprobs = logits.log_softmax(-1).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
    mask, a = inputs["completion_mask"], inputs["advantages"].unsqueeze(1)
    ratio = (logprobs - inputs["old_per_token_logps"]).exp()
    token = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
    d = inputs["ref_per_token_logps"] - logprobs
    token = token + beta * (d.exp() - d - 1) * ratio
    expected = (token * mask).sum() / mask.sum() / 2
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, p in trainer.model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_run_with_lora_on_the_head_moves_it(model_path: Path, tmp_path: Path) -> None:
    from grpo_fast.integrations.trl import GRPOTrainer

    trainer = build(GRPOTrainer, model_path, tmp_path, peft_config=lora("lm_head"), beta=0.1, max_steps=5, **REUSED)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert all("lm_head.lora_" in name for name in before)
    assert any((p != before[name]).any() for name, p in trainer.model.named_parameters() if p.requires_grad)
    assert max(abs(entry["kl"]) for entry in trainer.state.log_history if "kl" in entry) > 1e-4, "the reference is the model without it"


# What is refused ------------------------------------------------------------------------------------------------------------------------


def test_every_option_is_known() -> None:
    """To TRL or to us, and those that we read occur in a case above with a value that is not their default."""
    from transformers import TrainingArguments
    from trl import GRPOConfig

    from grpo_fast.integrations.trl import options as adapter

    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name: field.default for field in dataclasses.fields(GRPOConfig) if field.name not in inherited}
    assert adapter._READ_HERE.isdisjoint(adapter._READ_BY_TRL)
    assert own.keys() == adapter._READ_HERE | adapter._READ_BY_TRL
    elsewhere = {"temperature", "router_aux_loss_coef", "vllm_importance_sampling_correction"}  # build, the mixture, VLLM
    tried = {name for case in CASES.values() for name, value in case.items() if name in own and value != own[name]}
    assert adapter._READ_HERE - elsewhere <= tried


def test_an_unknown_option_is_refused(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_fast.integrations.trl import GRPOTrainer
    from grpo_fast.integrations.trl import options as adapter

    monkeypatch.setattr(adapter, "_READ_BY_TRL", adapter._READ_BY_TRL - {"mask_truncated_completions"})
    build(GRPOTrainer, model_path, tmp_path)
    with pytest.raises(ValueError, match=r"mask_truncated_completions is True; expected its default, False: .* not known here"):
        build(GRPOTrainer, model_path, tmp_path, mask_truncated_completions=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_entropy_quantile": 0.5, "entropy_coef": 0.1}, "top_entropy_quantile is 0.5 with an entropy bonus"),
        ({"delta": 1.1}, "delta is 1.1"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "importance_sampling_level"),
    ],
)
def test_refused_by_name(options: dict[str, Any], message: str, model_path: Path, tmp_path: Path) -> None:
    from grpo_fast.integrations.trl import GRPOTrainer

    with pytest.raises(ValueError, match=message):
        build(GRPOTrainer, model_path, tmp_path, **options)


def test_adapters_other_than_plain_lora_are_rejected(model_path: Path, tmp_path: Path) -> None:
    from grpo_fast.integrations.trl import GRPOTrainer

    adapter = lora("lm_head")
    adapter.use_dora = True
    with pytest.raises(ValueError, match="DoRA"):
        build(GRPOTrainer, model_path, tmp_path, peft_config=adapter)
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32 is True with LoRA"):
        build(GRPOTrainer, model_path, tmp_path, peft_config=lora("lm_head"), cast_lm_head_to_fp32=True)
