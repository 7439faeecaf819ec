"""The settings of GRPOTrainer: transformers' TrainingArguments, and those of GRPO in TRL's words. Checked before a model is loaded."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from grpo_fast.generation import check_options
from grpo_fast.loss.config import LossConfig
from grpo_fast.trainer.temperature import TemperatureSchedule

__all__ = ["GRPOConfig"]

CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass
class GRPOConfig(TrainingArguments):
    r"""Settings of a GRPO run. A name that TRL has means what it means there; docs/training.md lists the few defaults that differ.

    Args:
        model_init_kwargs: of ``from_pretrained``, where the model is given by name. Unless said, ``attn_implementation`` is ``"auto"``,
            flash attention 3 or 2 where a GPU has it, else ``"sdpa"``; and ``dtype`` is ``"float32"``: weights in bfloat16 lose most of the
            updates of a usual learning rate (``bf16`` computes in it, and keeps the weights).
        trust_remote_code: run the code that comes with such a model.
        disable_dropout: switch dropout off: the policy that is trained must be the one that sampled.

        num_generations: completions per prompt, the group that advantages compare.
        max_completion_length: length limit of a completion, in tokens.
        steps_per_generation: micro-batches made from one rollout: a multiple of ``gradient_accumulation_steps``, whose ratio is the number
            of optimiser steps ("minibatches") it feeds. None = one.
        generation_batch_size: the same said as completions per rollout, over all processes. At most one of the two is set.
        num_iterations: passes over each rollout (mu).
        shuffle_dataset: a new order of the prompts each epoch.
        chat_template_kwargs: of ``apply_chat_template``, for prompts that are lists of messages.
        dynamic_sampling_attempts: draw anew, this many times at most, for groups whose rewards are all equal and hold no signal, with
            other prompts (DAPO, arXiv:2503.14476). 0 = off.

        temperature: of sampling, of the loss, of old and reference log-probabilities and of the entropy: there is only one.
        temperature_schedule: how it changes, see `grpo_fast.trainer.temperature.TemperatureSchedule.from_config`; None: it does not.
        top_p, top_k, min_p: truncate the sampler's distribution. The loss is that of the whole one: the mass left out is logged
            as ``sampling/kept_mass``, and ``importance sampling`` below corrects for it.
        sampler: ``"transformers"``, ``"continuous_batching"`` or ``"vllm"``; or give the trainer an object.
        sampler_options: of its constructor.
        use_vllm, vllm_mode, vllm_server_base_url, vllm_server_host, vllm_server_port, use_transformers_continuous_batching: TRL's way to
            choose it; the one mode is ``"server"``, and that is vLLM's own (``vllm serve``).

        eval_temperature, eval_top_p: of evaluation; 0.6 and 0.95 are DeepSeek-R1's.
        eval_rounds: samples per prompt in an evaluation; their mean is reported, with its standard error over the rounds.

        beta: weight of the KL penalty; 0 needs no reference model.
        use_bias_correction_kl: LossConfig's ``bias_corrected_kl``.
        sync_ref_model, ref_model_sync_steps, ref_model_mixup_alpha: every so many steps, reference = alpha policy + (1 - alpha) reference.

        loss_type, epsilon, epsilon_high, delta, dual_clip, importance_sampling_level, kl_estimator, entropy_coef, sapo_\*, vespo_\*:
            see `LossConfig`, of which `loss_config` makes one. epsilon_high: None = epsilon.
        scale_rewards: ``"group"``, ``"batch"`` or ``"none"`` (True and False mean the first and the last).
        reward_weights: one per reward; None = all 1.
        multi_objective_aggregation: ``"sum_then_normalize"``, or ``"normalize_then_sum"`` (GDPO, arXiv:2601.05242).
        reward_timeout: seconds for one call of a reward, None = no limit.
        reward_on_error: what a reward that raises, is late, or returns something else than it should does: ``"raise"`` ends the run with an
            error that names it, ``"not_applicable"`` counts as None for these completions.
        reward_isolation: ``"thread"``, or ``"process"``: rewards run in processes of their own, which are killed when they are late.
        mask_truncated_completions: leave completions that were cut at the length limit out of the loss.
        soft_punish_cache: DAPO's soft overlong punishment: a reward that falls from 0 to -1 over the last so many tokens below
            ``max_completion_length``. None = off.
        top_entropy_quantile: train on this share of the tokens only, those with the highest entropy (arXiv:2506.01939).
        vllm_importance_sampling_correction: weigh tokens by what the trainer's policy gives them against what the sampler gave them,
            whichever the sampler is; None: for all but ``"transformers"``, which runs the trainer's own model.
        vllm_importance_sampling_mode: ``"token_truncate"``, ``"token_mask"``, ``"sequence_truncate"`` or ``"sequence_mask"``.
        vllm_importance_sampling_clip_min, vllm_importance_sampling_clip_max: bounds of that weight.
        sampler_tolerance: largest mean difference of a token's log-probability between sampler and trainer, in nats, on the first step;
            beyond it the run stops. None = 0.02 in float32, 0.1 otherwise.

        packing: remove padding by laying sequences one after the other: ``"true"`` (or True), ``"false"``, or ``"auto"``: with flash
            attention.
        fused_head: compute the loss from hidden states wherever the model's head allows it; False: from logits.
        metrics_on: ``"active"``: sequences with an advantage of 0 are not even run through the model, where that cannot change the
            gradient; ``"all"``: they are, and count in entropy and clip ratios.
        log_completions: keep the completions of the step that is logged in ``output_dir/completions``.
        num_completions_to_print: of them, how many; None = all.

    Raises:
        ValueError: names the setting, its value, what was expected and the cure.

    Example:
        >>> GRPOConfig("out", per_device_train_batch_size=8, gradient_accumulation_steps=4, use_cpu=True).generation_batch_size
        32
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 may be JSON on the command line
        *TrainingArguments._VALID_DICT_FIELDS,
        *("model_init_kwargs", "chat_template_kwargs", "sampler_options", "temperature_schedule"),
    ]

    # What TRL sets otherwise than TrainingArguments.
    learning_rate: float = 1e-6
    logging_steps: float = 10
    gradient_checkpointing: bool = True
    bf16: bool | None = None  # None: where the GPU has it
    remove_unused_columns: bool | None = False  # rewards read the columns
    logging_nan_inf_filter: bool = False  # a loss that is not finite ends the run; so there is nothing to filter, and to wait for

    model_init_kwargs: dict[str, Any] | str | None = None
    trust_remote_code: bool = False
    disable_dropout: bool = True

    num_generations: int = 8
    max_completion_length: int = 512
    steps_per_generation: int | None = None
    generation_batch_size: int | None = None
    num_iterations: int = 1
    shuffle_dataset: bool = True
    chat_template_kwargs: dict[str, Any] | str | None = None
    dynamic_sampling_attempts: int = 0

    temperature: float = 1.0
    temperature_schedule: dict[str, Any] | str | None = None
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    sampler: str = "transformers"
    sampler_options: dict[str, Any] | str | None = None
    use_vllm: bool = False
    vllm_mode: str = "server"
    vllm_server_base_url: str | None = None
    vllm_server_host: str = "0.0.0.0"
    vllm_server_port: int = 8000
    use_transformers_continuous_batching: bool = False

    eval_temperature: float = 0.6
    eval_top_p: float = 0.95
    eval_rounds: int = 4

    beta: float = 0.0
    use_bias_correction_kl: bool = True
    sync_ref_model: bool = False
    ref_model_sync_steps: int = 512
    ref_model_mixup_alpha: float = 0.6

    loss_type: str = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    dual_clip: float | None = None
    importance_sampling_level: str | None = None
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    scale_rewards: str = "group"
    reward_weights: list[float] | None = None
    multi_objective_aggregation: str = "sum_then_normalize"
    reward_timeout: float | None = None
    reward_on_error: str = "raise"
    reward_isolation: str = "thread"
    mask_truncated_completions: bool = False
    soft_punish_cache: int | None = None
    top_entropy_quantile: float = 1.0
    vllm_importance_sampling_correction: bool | None = None
    vllm_importance_sampling_mode: str = "sequence_mask"
    vllm_importance_sampling_clip_min: float | None = None
    vllm_importance_sampling_clip_max: float | None = 3.0
    sampler_tolerance: float | None = None

    packing: str = "auto"
    fused_head: bool = True
    metrics_on: str = "active"
    log_completions: bool = False
    num_completions_to_print: int | None = None

    def __post_init__(self) -> None:
        for name, annotation in GRPOConfig.__annotations__.items():
            setattr(self, name, _typed(name, getattr(self, name), annotation))
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__post_init__()
        self._choose_sampler()
        self.packing = _true_or_false(self.packing)
        scale = _true_or_false(self.scale_rewards)
        self.scale_rewards = ("group" if scale else "none") if isinstance(scale, bool) else scale
        self._check_batches()
        self._check_sampling()
        self._check_rewards()
        self._check_training()
        self.loss_config()

    @property
    def device(self) -> torch.device:
        """Of this process. Without the number that accelerate gives to a CPU, for which torch.load has no such place."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def loss_config(self) -> LossConfig:
        """Which member of the family is trained.

        Denominators are those of the whole optimiser step. So a mean over the batch's tokens (``bnpo``) is one over all its tokens.
        """
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise _bad("epsilon_high", None, "a number with loss_type='cispo', the bound of the ratio itself: 5.0 (ScaleRL)")
        return LossConfig(
            loss_type=self.loss_type,
            epsilon_low=self.epsilon,
            epsilon_high=self.epsilon if self.epsilon_high is None else self.epsilon_high,
            delta=self.delta,
            dual_clip=self.dual_clip,
            beta=self.beta,
            kl_estimator=self.kl_estimator,
            bias_corrected_kl=self.use_bias_correction_kl,
            entropy_coef=self.entropy_coef,
            importance_sampling_level=self.importance_sampling_level,
            aggregation="global_token_mean" if self.loss_type == "bnpo" else None,
            sapo_temperature_pos=self.sapo_temperature_pos,
            sapo_temperature_neg=self.sapo_temperature_neg,
            vespo_k_pos=self.vespo_k_pos,
            vespo_lambda_pos=self.vespo_lambda_pos,
            vespo_k_neg=self.vespo_k_neg,
            vespo_lambda_neg=self.vespo_lambda_neg,
            max_completion_length=self.max_completion_length,
        )

    def loading_options(self) -> dict[str, Any]:
        """The settings that `load_policy` takes."""
        return {
            "model_init_kwargs": self.model_init_kwargs,
            "trust_remote_code": self.trust_remote_code,
            "half_precision": bool(self.bf16 or self.fp16),
            "gradient_checkpointing": self.gradient_checkpointing,
            "disable_dropout": self.disable_dropout,
        }

    def forward_options(self) -> dict[str, Any]:
        """The settings that `ModelForward` takes."""
        return {"packing": self.packing, "fused_head": self.fused_head}

    def schedule(self) -> TemperatureSchedule:
        """The one temperature, from step to step; a new one each time, since it has a state."""
        return TemperatureSchedule(self._schedule.spec)

    @property
    def prompt_seed(self) -> int:
        """Of the order in which prompts come."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def prompts_per_rollout(self) -> int:
        """Over all processes."""
        assert self.generation_batch_size is not None
        return self.generation_batch_size // self.num_generations

    @property
    def minibatches(self) -> int:
        """Optimiser steps that one pass over a rollout makes."""
        assert self.steps_per_generation is not None
        return self.steps_per_generation // self.gradient_accumulation_steps

    @property
    def updates_per_rollout(self) -> int:
        """Optimiser steps that all passes over a rollout make together."""
        return self.minibatches * self.num_iterations

    @property
    def truncates(self) -> bool:
        """Whether the sampler draws from a part of the vocabulary."""
        return self.top_p < 1 or self.top_k > 0 or bool(self.min_p)

    @property
    def most_left_out(self) -> float:
        """By how many nats truncation can raise a token's log-probability: minus the logarithm of the least mass that is kept."""
        return math.inf if self.top_k > 0 or self.min_p else -math.log(self.top_p)

    def _choose_sampler(self) -> None:
        chosen = {"vllm": self.use_vllm, "continuous_batching": self.use_transformers_continuous_batching}
        for name, wanted in chosen.items():
            if wanted and self.sampler not in ("transformers", name):
                raise _bad("sampler", self.sampler, f"{name!r}, since TRL's switch for it is set. Drop one of the two")
            if wanted:
                self.sampler = name
        if self.use_vllm and self.vllm_mode != "server":
            raise _bad("vllm_mode", self.vllm_mode, "'server': vLLM runs as a process of its own, see grpo_fast.generation.vllm")
        if self.use_vllm:
            given: Any = self.sampler_options or {}
            url = self.vllm_server_base_url or f"http://{self.vllm_server_host}:{self.vllm_server_port}"
            self.sampler_options = {"url": url, **given}
        options: Any = self.sampler_options or {}
        check_options(self.sampler, options)

    def _check_batches(self) -> None:
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            _check_count(name, getattr(self, name), 1)
        for name in ("num_generations", "max_completion_length", "num_iterations", "eval_rounds"):
            _check_count(name, getattr(self, name), 1)
        if self.num_generations < 2:
            raise _bad("num_generations", self.num_generations, "at least 2: an advantage compares the members of a group")
        if self.auto_find_batch_size:
            raise _bad("auto_find_batch_size", True, "False: a smaller batch would cut groups apart. Lower per_device_train_batch_size")
        in_parallel = self.per_device_train_batch_size * self.world_size
        if self.steps_per_generation is not None and self.generation_batch_size is not None:
            implied = in_parallel * self.steps_per_generation
            if implied != self.generation_batch_size:  # equal: this config was written to a file and read again
                raise _bad("generation_batch_size", self.generation_batch_size, f"{implied}, or None, with steps_per_generation set too")
        elif self.generation_batch_size is not None:
            if self.generation_batch_size % in_parallel:
                cure = "per_device_train_batch_size * number of processes"
                raise _bad("generation_batch_size", self.generation_batch_size, f"a multiple of {in_parallel} = {cure}")
            self.steps_per_generation = self.generation_batch_size // in_parallel
        elif self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        _check_count("steps_per_generation", self.steps_per_generation, 1)
        assert self.steps_per_generation is not None
        self.generation_batch_size = in_parallel * self.steps_per_generation
        if self.steps_per_generation % self.gradient_accumulation_steps:
            cure = f"a multiple of gradient_accumulation_steps = {self.gradient_accumulation_steps}: a rollout feeds whole optimiser steps"
            raise _bad("steps_per_generation", self.steps_per_generation, cure)
        if self.generation_batch_size % self.num_generations:
            made = f"{self.per_device_train_batch_size} per device * {self.world_size} processes * {self.steps_per_generation} steps"
            cure = f"a multiple of num_generations = {self.num_generations}: a rollout holds whole groups. It is {made}"
            raise _bad("generation_batch_size", self.generation_batch_size, cure)

    def _check_sampling(self) -> None:
        if not 0 < self.temperature < math.inf:
            cure = "greedy decoding gives a group one completion, and nothing to learn from. Cure: 1.0; keep 0 for eval_temperature"
            raise _bad("temperature", self.temperature, f"a finite number above 0: {cure}")
        if self.temperature_schedule is not None and self.temperature != 1.0:
            raise _bad("temperature", self.temperature, "1.0, its default, with a temperature_schedule, which says what it is")
        schedule: Any = self.temperature if self.temperature_schedule is None else self.temperature_schedule
        self._schedule = TemperatureSchedule.from_config(schedule)  # warns of one below 0.7
        if not 0 <= self.eval_temperature < math.inf:
            raise _bad("eval_temperature", self.eval_temperature, "a finite number of at least 0; DeepSeek-R1's is 0.6")
        for name in ("top_p", "eval_top_p"):
            if not 0 < getattr(self, name) <= 1:
                raise _bad(name, getattr(self, name), "a number in (0, 1]; 1 keeps all tokens")
        _check_count("top_k", self.top_k, 0)
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise _bad("min_p", self.min_p, "a number in [0, 1], or None")
        _check_count("dynamic_sampling_attempts", self.dynamic_sampling_attempts, 0)
        if self.sampler_tolerance is not None and not self.sampler_tolerance > 0:
            raise _bad("sampler_tolerance", self.sampler_tolerance, "a number of nats above 0, or None")

    def _check_rewards(self) -> None:
        _one_of("scale_rewards", self.scale_rewards, ("group", "batch", "none"))
        _one_of("reward_on_error", self.reward_on_error, ("raise", "not_applicable"))
        _one_of("reward_isolation", self.reward_isolation, ("thread", "process"))
        if self.reward_timeout is not None and not 0 < self.reward_timeout < math.inf:
            raise _bad("reward_timeout", self.reward_timeout, "a number of seconds above 0, or None for no limit")
        _one_of("multi_objective_aggregation", self.multi_objective_aggregation, ("sum_then_normalize", "normalize_then_sum"))
        if self.multi_objective_aggregation == "normalize_then_sum" and self.scale_rewards != "group":
            raise _bad("scale_rewards", self.scale_rewards, "'group' with normalize_then_sum, which divides by the stds itself")
        if self.soft_punish_cache is not None and not 0 < self.soft_punish_cache <= self.max_completion_length:
            expected = f"between 1 and max_completion_length = {self.max_completion_length}"
            raise _bad("soft_punish_cache", self.soft_punish_cache, expected)
        _one_of("vllm_importance_sampling_mode", self.vllm_importance_sampling_mode, CORRECTIONS)
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and not 0 <= low < math.inf:
            raise _bad("vllm_importance_sampling_clip_min", low, "a finite number of at least 0, or None: a weight is never below 0")
        if high is not None and not 0 < high < math.inf:
            raise _bad("vllm_importance_sampling_clip_max", high, "a finite number above 0, or None for no bound")
        if low is not None and high is not None and low >= high:
            raise _bad("vllm_importance_sampling_clip_min", low, f"less than vllm_importance_sampling_clip_max = {high}")
        if not 0 < self.top_entropy_quantile <= 1:
            raise _bad("top_entropy_quantile", self.top_entropy_quantile, "a share in (0, 1]; 1 trains on all tokens")

    def _check_training(self) -> None:
        _one_of("packing", self.packing, ("auto", True, False))
        _one_of("metrics_on", self.metrics_on, ("active", "all"))
        if self.num_completions_to_print is not None:
            _check_count("num_completions_to_print", self.num_completions_to_print, 1)
        if self.use_liger_kernel:
            cure = "it replaces the model's layers and forward, which has not been run with this trainer. The loss is fused without it"
            raise _bad("use_liger_kernel", True, f"False: {cure}, see fused_head")
        if self.sync_ref_model:
            _check_count("ref_model_sync_steps", self.ref_model_sync_steps, 1)
            if self.beta == 0:
                raise _bad("sync_ref_model", True, "False with beta=0, which has no reference to synchronise")
            if not 0 < self.ref_model_mixup_alpha <= 1:
                raise _bad("ref_model_mixup_alpha", self.ref_model_mixup_alpha, "a share in (0, 1]")
        if self.n_gpu > 1:
            raise _bad(
                "n_gpu", self.n_gpu, "one GPU per process. Start with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES"
            )
        parallel = getattr(self, "parallelism_config", None)
        if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
            raise _bad("parallelism_config", "context or sequence parallel", "neither: rollouts are made inside the trainer")


def _bad(name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"GRPOConfig: {name} is {value!r}; expected {expected}.")


def _typed(name: str, value: Any, annotation: str) -> Any:
    """The value, if it is what the field's annotation says, a number of NumPy as Python's own."""
    kind = annotation.removesuffix(" | None")
    if (value is None and kind != annotation) or (name in _OR_MORE and not isinstance(value, str)):
        return value
    is_right, expected = _TYPES[kind]
    if not is_right(value):
        raise _bad(name, value, expected if kind == annotation else f"{expected}, or None")
    if kind == "float" and not isinstance(value, int):
        return float(value)
    return int(value) if kind == "int" else value


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and not math.isnan(value)


def _are_finite(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(_is_number(each) and math.isfinite(each) for each in value)


def _is_mapping(value: Any) -> bool:
    """A dictionary, or the text of one as a command line gives it."""
    if not isinstance(value, str):
        return isinstance(value, Mapping)
    try:
        return value.startswith("{") and isinstance(json.loads(value), dict)
    except ValueError:
        return False


_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {  # annotation -> what has it, in words
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "int": (lambda value: _is_number(value) and isinstance(value, numbers.Integral), "a whole number"),
    "float": (_is_number, "a number"),
    "str": (lambda value: isinstance(value, str), "a text"),
    "list[float]": (_are_finite, "a list of finite numbers"),
    "dict[str, Any] | str": (_is_mapping, "a dictionary, or JSON for one"),
}
_OR_MORE = ("packing", "scale_rewards", "temperature_schedule")  # take more than their annotations say, which are for the command line


def _true_or_false(value: Any) -> Any:
    """What a command line means by these words; anything else as it is. (A field of the type str or bool would be read as a bool there.)"""
    return {"true": True, "false": False}.get(str(value).lower(), value)


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise _bad(name, value, f"one of {', '.join(map(repr, allowed))}")


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _bad(name, value, f"a whole number of at least {least}")
