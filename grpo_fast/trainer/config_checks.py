"""The checks of GRPOConfig. Each error names the setting, its value, what was expected and how to fix it."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from grpo_fast.data.chats import CHAT
from grpo_fast.generation import check_options, sampler_class
from grpo_fast.trainer.sampling_settings import check_importance_weights, check_rejection, corrects_sampler
from grpo_fast.trainer.setting_errors import bad_setting

if TYPE_CHECKING:
    from grpo_fast.trainer.config import GRPOConfig

__all__ = [
    "TYPES",
    "check_batches",
    "check_count",
    "check_entropy",
    "check_rewards",
    "check_sampler",
    "check_sampling",
    "check_training",
    "convert_types",
    "one_of",
    "parse_bool",
    "resolve_checkpointing",
]

T = TypeVar("T")
IMPORTANCE_SAMPLING_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


# Types -------------------------------------------------------------------------------------------------------------------------


def convert_types(config: GRPOConfig, annotations: Mapping[str, str]) -> None:
    """Check that each field has a value of its annotated type, and convert NumPy's numbers to Python's.

    Raises:
        ValueError: a value of another type.
    """
    for name, annotation in annotations.items():
        setattr(config, name, _converted(name, getattr(config, name), annotation))


def parse_bool(value: T) -> T | bool:
    """Convert "true" and "false", as a command line gives them, to bool; return any other value unchanged.

    A field of the type ``str | bool`` would be parsed as a bool by transformers' command line, so such fields are annotated as str.
    """
    return {"true": True, "false": False}.get(str(value).lower(), value)


def _converted(name: str, value: object, annotation: str) -> object:
    kind = annotation.removesuffix(" | None")
    if (value is None and kind != annotation) or (name in _WIDER_THAN_ANNOTATED and not isinstance(value, str)):
        return value
    has_type, expected = TYPES[kind]
    if not has_type(value):
        raise bad_setting(name, value, expected if kind == annotation else f"{expected}, or None")
    if kind == "float" and not isinstance(value, int) and isinstance(value, numbers.Real):
        return float(value)
    return int(value) if kind == "int" and isinstance(value, numbers.Integral) else value


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and not math.isnan(value)


def _are_finite(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(_is_number(each) and math.isfinite(each) for each in value)


def _is_mapping(value: object) -> bool:
    """Return whether the value is a dictionary, or JSON for one as a command line gives it."""
    if not isinstance(value, str):
        return isinstance(value, Mapping)
    try:
        return value.startswith("{") and isinstance(json.loads(value), dict)
    except ValueError:
        return False


TYPES: dict[str, tuple[Callable[[object], bool], str]] = {  # annotation -> (whether a value has this type, its description)
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "int": (lambda value: _is_number(value) and isinstance(value, numbers.Integral), "a whole number"),
    "float": (_is_number, "a number"),
    "str": (lambda value: isinstance(value, str), "a text"),
    "list[float]": (_are_finite, "a list of finite numbers"),
    "dict[str, Any] | str": (_is_mapping, "a dictionary, or JSON for one"),
}
# The command line needs the narrower annotation.
_WIDER_THAN_ANNOTATED = (
    *("surrogate", "rollout_rs_threshold", "share_prompts", "packing", "chat", "replay_support", "scale_rewards"),
    "temperature_schedule",
)


def resolve_checkpointing(config: GRPOConfig) -> None:
    """Set transformers' newer names of ``gradient_checkpointing`` and its arguments, where it has them and they are not set.

    transformers 5.23 warns of the older names, which are TRL's, and the only ones of 5.17.
    """
    for name in ("checkpointing", "checkpointing_kwargs"):
        if getattr(config, f"activation_{name}", 0) is None:
            setattr(config, f"activation_{name}", getattr(config, f"gradient_{name}"))


# Values ------------------------------------------------------------------------------------------------------------------------


def check_sampler(config: GRPOConfig) -> None:
    """Resolve TRL's switches for the sampler into ``sampler`` and ``sampler_options``, and check those."""
    switches = {"vllm": config.use_vllm, "continuous_batching": config.use_transformers_continuous_batching}
    for name, is_on in switches.items():
        if is_on and config.sampler not in ("transformers", name):
            raise bad_setting("sampler", config.sampler, f"{name!r}, since TRL's switch for it is set. Fix: remove one of the two")
        if is_on:
            config.sampler = name
    if config.use_vllm and config.vllm_mode != "server":
        raise bad_setting("vllm_mode", config.vllm_mode, "'server': vLLM runs as a separate process, see grpo_fast.generation.vllm")
    if config.use_vllm:
        url = config.vllm_server_base_url or f"http://{config.vllm_server_host}:{config.vllm_server_port}"
        config.sampler_options = {"url": url, **config.sampler_arguments}
    check_options(config.sampler, config.sampler_arguments)


def check_batches(config: GRPOConfig) -> None:
    """Check the sizes of batches and groups, and set whichever of ``steps_per_generation`` and ``generation_batch_size`` is None."""
    if config.num_generations_eval is not None:
        if config.eval_rounds not in (type(config).eval_rounds, config.num_generations_eval):
            expected = f"eval_rounds = {config.eval_rounds}, which it is TRL's name for. Fix: remove one of the two"
            raise bad_setting("num_generations_eval", config.num_generations_eval, expected)
        check_count("num_generations_eval", config.num_generations_eval, 1)
        config.eval_rounds = config.num_generations_eval
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        check_count(name, getattr(config, name), 1)
    for name in ("num_generations", "max_completion_length", "num_iterations", "eval_rounds", "shuffle_buffer_size"):
        check_count(name, getattr(config, name), 1)
    if config.num_generations < 2:
        raise bad_setting("num_generations", config.num_generations, "at least 2: an advantage compares the members of a group")
    if config.auto_find_batch_size:
        raise bad_setting("auto_find_batch_size", True, "False: a smaller batch would split groups. Fix: lower per_device_train_batch_size")
    _resolve_generation_batch(config)
    assert config.steps_per_generation is not None and config.generation_batch_size is not None
    if config.steps_per_generation % config.gradient_accumulation_steps:
        expected = (
            f"a multiple of gradient_accumulation_steps = {config.gradient_accumulation_steps}: a rollout is used for whole optimizer steps"
        )
        raise bad_setting("steps_per_generation", config.steps_per_generation, expected)
    if config.generation_batch_size % config.num_generations:
        product = f"{config.per_device_train_batch_size} per device * {config.world_size} processes * {config.steps_per_generation} steps"
        expected = f"a multiple of num_generations = {config.num_generations}: a rollout holds whole groups. It is {product}"
        raise bad_setting("generation_batch_size", config.generation_batch_size, expected)


def _resolve_generation_batch(config: GRPOConfig) -> None:
    per_micro_batch = config.per_device_train_batch_size * config.world_size
    if config.steps_per_generation is not None and config.generation_batch_size is not None:
        implied = per_micro_batch * config.steps_per_generation
        if implied != config.generation_batch_size:  # both are set and agree in a config that was saved and loaded
            raise bad_setting(
                "generation_batch_size", config.generation_batch_size, f"{implied}, or None, with steps_per_generation set too"
            )
    elif config.generation_batch_size is not None:
        if config.generation_batch_size % per_micro_batch:
            expected = f"a multiple of {per_micro_batch} = per_device_train_batch_size * number of processes"
            raise bad_setting("generation_batch_size", config.generation_batch_size, expected)
        config.steps_per_generation = config.generation_batch_size // per_micro_batch
    elif config.steps_per_generation is None:
        config.steps_per_generation = config.gradient_accumulation_steps
    check_count("steps_per_generation", config.steps_per_generation, 1)
    assert config.steps_per_generation is not None
    config.generation_batch_size = per_micro_batch * config.steps_per_generation


def check_sampling(config: GRPOConfig) -> None:
    """Check temperatures and truncation."""
    if not 0 < config.temperature < math.inf:
        expected = "a finite number above 0: with greedy decoding all completions of a group are the same, and all advantages 0"
        raise bad_setting("temperature", config.temperature, f"{expected}. Fix: 1.0; keep 0 for eval_temperature")
    if config.temperature_schedule is not None and config.temperature != 1.0:
        raise bad_setting("temperature", config.temperature, "1.0, its default, with a temperature_schedule, which sets the temperature")
    if not 0 <= config.eval_temperature < math.inf:
        raise bad_setting("eval_temperature", config.eval_temperature, "a finite number of at least 0; DeepSeek-R1's is 0.6")
    for name in ("top_p", "eval_top_p"):
        if not 0 < getattr(config, name) <= 1:
            raise bad_setting(name, getattr(config, name), "a number in (0, 1]; 1 keeps all tokens")
    check_count("top_k", config.top_k, 0)
    one_of("replay_support", config.replay_support, ("auto", True, False))
    if config.min_p is not None and not 0 <= config.min_p <= 1:
        raise bad_setting("min_p", config.min_p, "a number in [0, 1], or None")
    check_count("dynamic_sampling_attempts", config.dynamic_sampling_attempts, 0)
    if config.sampler_tolerance is not None and not config.sampler_tolerance > 0:
        raise bad_setting("sampler_tolerance", config.sampler_tolerance, "a number of nats above 0, or None")
    check_count("sampler_tolerance_patience", config.sampler_tolerance_patience, 1)


def check_rewards(config: GRPOConfig) -> None:
    """Check the settings of rewards and token weights."""
    one_of("reward_on_error", config.reward_on_error, ("raise", "not_applicable"))
    one_of("reward_isolation", config.reward_isolation, ("thread", "process"))
    if config.reward_timeout is not None and not 0 < config.reward_timeout < math.inf:
        raise bad_setting("reward_timeout", config.reward_timeout, "a number of seconds above 0, or None for no limit")
    if config.soft_punish_cache is not None and not 0 < config.soft_punish_cache <= config.max_completion_length:
        expected = f"between 1 and max_completion_length = {config.max_completion_length}"
        raise bad_setting("soft_punish_cache", config.soft_punish_cache, expected)
    if config.vllm_importance_sampling_mode is None:
        config.vllm_importance_sampling_mode = "token_mask" if config.truncates or config.penalises else "sequence_mask"
    one_of("vllm_importance_sampling_mode", config.vllm_importance_sampling_mode, IMPORTANCE_SAMPLING_MODES)
    setting: object = config.replay_support
    returns = getattr(sampler_class(config.sampler), "returns_support", False)  # a sampler object is checked when the trainer has it
    may_replay = setting is True or (setting == "auto" and returns)
    check_rejection(config, replays=may_replay)
    check_importance_weights(config, corrects_sampler(config, own_model=config.sampler == "transformers"), replays=may_replay)
    low, high = config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max
    if low is not None and not 0 <= low < math.inf:
        raise bad_setting("vllm_importance_sampling_clip_min", low, "a finite number of at least 0, or None: a weight is never below 0")
    if high is not None and not 0 < high < math.inf:
        raise bad_setting("vllm_importance_sampling_clip_max", high, "a finite number above 0, or None for no bound")
    if low is not None and high is not None and low >= high:
        raise bad_setting("vllm_importance_sampling_clip_min", low, f"less than vllm_importance_sampling_clip_max = {high}")
    threshold = config.off_policy_mask_threshold
    if threshold is not None and not 0 < threshold < math.inf:
        raise bad_setting("off_policy_mask_threshold", threshold, "a number of nats per token above 0, or None; 0.5 is usual")
    if not 0 < config.top_entropy_quantile <= 1:
        raise bad_setting("top_entropy_quantile", config.top_entropy_quantile, "a share in (0, 1]; 1 trains on all tokens")


def check_entropy(config: GRPOConfig) -> None:
    """Check the settings of the adaptive entropy bonus."""
    low, high = config.entropy_coef_min, config.entropy_coef_max
    if not 0 <= low <= high < math.inf:
        raise bad_setting("entropy_coef_min", low, f"between 0 and entropy_coef_max = {high}, which must be finite")
    for name in ("entropy_coef_delta", "entropy_target"):
        if not 0 < getattr(config, name) < math.inf:
            raise bad_setting(name, getattr(config, name), "a finite number above 0")
    if config.use_adaptive_entropy and not low <= config.entropy_coef <= high:
        expected = f"between entropy_coef_min = {low} and entropy_coef_max = {high} with use_adaptive_entropy, which begins there"
        raise bad_setting("entropy_coef", config.entropy_coef, expected)


def check_training(config: GRPOConfig) -> None:
    """Check the settings of the forward passes, the reference policy, the processes and the logs."""
    one_of("packing", config.packing, ("auto", True, False))
    one_of("share_prompts", config.share_prompts, ("auto", True, False))
    one_of("chat", config.chat, CHAT)
    one_of("metrics_on", config.metrics_on, ("active", "all"))
    one_of("logits_dtype", config.logits_dtype, ("float32", "input"))
    if config.batch_invariant and not config.fused_head:
        raise bad_setting("batch_invariant", True, "False with fused_head=False: over logits the model's own head computes the product")
    if config.router_aux_loss_coef is not None and not 0 <= config.router_aux_loss_coef < math.inf:
        expected = "a finite number of at least 0, or None for that of the model's config"
        raise bad_setting("router_aux_loss_coef", config.router_aux_loss_coef, expected)
    if config.num_completions_to_print is not None:
        check_count("num_completions_to_print", config.num_completions_to_print, 1)
    if config.use_liger_kernel:
        reason = "it replaces the model's layers and forward, which has not been tested with this trainer. The loss is fused without it"
        raise bad_setting("use_liger_kernel", True, f"False: {reason}, see fused_head")
    if config.sync_ref_model:
        check_count("ref_model_sync_steps", config.ref_model_sync_steps, 1)
        if config.beta == 0:
            raise bad_setting("sync_ref_model", True, "False with beta=0, which has no reference to synchronise")
        if not 0 < config.ref_model_mixup_alpha <= 1:
            raise bad_setting("ref_model_mixup_alpha", config.ref_model_mixup_alpha, "a share in (0, 1]")
    if config.n_gpu > 1:
        fix = "Fix: start with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES"
        raise bad_setting("n_gpu", config.n_gpu, f"one GPU per process. {fix}")
    parallel = getattr(config, "parallelism_config", None)
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
        raise bad_setting("parallelism_config", "context or sequence parallel", "neither: rollouts are made inside the trainer")


def one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Check that a setting has one of the allowed values."""
    if value not in allowed:
        raise bad_setting(name, value, f"one of {', '.join(map(repr, allowed))}")


def check_count(name: str, value: object, least: int) -> None:
    """Check that a setting is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise bad_setting(name, value, f"a whole number of at least {least}")
