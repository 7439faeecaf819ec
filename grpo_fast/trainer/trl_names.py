"""TRL's settings and constructor arguments that do not exist here: each is refused with the reason, and what to use instead.

The tables are compared with the installed TRL in tests/test_trl_names.py, so that none is forgotten. A setting that gets a field of its own
in GRPOConfig is refused no longer, whether the table still has it or not.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

from grpo_fast.utils.dataclass_options import suggest
from grpo_fast.utils.redaction import redact

__all__ = ["REFUSED_ARGUMENTS", "REFUSED_SETTINGS", "check_arguments", "explain_wrong_settings"]

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")

_COLOCATED = "vLLM runs as a separate server here, not inside the trainer. Fix: leave it out, and start the server with `vllm serve"
_NO_TOOLS = "there are no tools and no environments here. Fix: leave it out, or train with TRL and grpo_fast.integrations.trl"
_NO_IMAGES = "completions are texts here, without images. Fix: leave it out"

REFUSED_SETTINGS: dict[str, str] = {
    "cast_lm_head_to_fp32": "the head is not cast: a copy of its weight in float32 would take memory. Fix: leave it out; a model that is "
    "given by name has its weights in float32 anyway",
    "ds3_gather_for_generation": "the trainer does not gather the weights of DeepSpeed ZeRO-3. Fix: leave it out, and use FSDP2, or vLLM",
    "pad_to_multiple_of": "sequences are packed or padded to the longest only, since no kernel is compiled for a shape. Fix: leave it out; "
    "see packing",
    "cache_implementation": "the sampler decides on its cache. Fix: leave it out, or sampler='continuous_batching'",
    "vllm_model_impl": f"{_COLOCATED} --model-impl`",
    "vllm_enable_sleep_mode": "vLLM runs as a separate server here, on other GPUs. Fix: leave it out",
    "vllm_structured_outputs_regex": "the loss is that of the whole softmax(z/T), and a regular expression would leave out tokens that it "
    "counts. Fix: a reward for the format, such as 'format', or generation_kwargs={'structured_outputs': {'regex': ...}}",
    "vllm_server_timeout": "it is an option of the sampler. Fix: sampler_options={'retry_seconds': 240}",
    "vllm_group_port": "it is an option of the sampler. Fix: sampler_options={'nccl_port': 51216}",
    "vllm_gpu_memory_utilization": f"{_COLOCATED} --gpu-memory-utilization`",
    "vllm_max_model_length": f"{_COLOCATED} --max-model-len`",
    "vllm_tensor_parallel_size": f"{_COLOCATED} --tensor-parallel-size`",
    "max_tool_calling_iterations": _NO_TOOLS,
    "log_multimodal": _NO_IMAGES,
    "log_unique_prompts": "every completion is written, with its prompt. Fix: num_completions_to_print, to write fewer",
    "log_completions_hub_repo": "completions are written to output_dir/completions only. Fix: log_completions, and upload that folder with "
    "huggingface_hub",
    "transformers_continuous_batching_config": "it is an option of the sampler. Fix: sampler='continuous_batching' with sampler_options",
    "use_transformers_paged": "TRL has renamed it. Fix: use_transformers_continuous_batching",
    "vllm_importance_sampling_cap": "TRL has renamed it. Fix: vllm_importance_sampling_clip_max",
    # Of earlier versions of TRL.
    "max_prompt_length": "prompts are not cut. Fix: grpo_fast.data.load_prompts(..., max_prompt_length=...), which leaves out longer ones",
    "use_liger_loss": "the loss is fused without Liger. Fix: leave it out",
    "vllm_guided_decoding_regex": "the loss is that of the whole softmax(z/T). Fix: a reward for the format, such as 'format'",
    "wandb_log_unique_prompts": "every completion is written, with its prompt. Fix: num_completions_to_print, to write fewer",
    "generation_batch_size_eval": "evaluations draw per_device_eval_batch_size completions at a time. Fix: per_device_eval_batch_size",
}

REFUSED_ARGUMENTS: dict[str, str] = {
    "reward_processing_classes": "rewards are functions, not models. Fix: a reward function that calls the model and its tokenizer",
    "tools": _NO_TOOLS,
    "environment_factory": _NO_TOOLS,
    "rollout_func": "a sampler draws the completions. Fix: sampler=, an object with the methods of grpo_fast.generation.Sampler",
}


def check_arguments(owner: str, refused: Mapping[str, str]) -> Callable[[Callable[Concatenate[S, P], R]], Callable[Concatenate[S, P], R]]:
    """Make a decorator for ``__init__`` that names every argument that does not exist, why, and what to use instead.

    Args:
        owner: name of the class, for the message.
        refused: reasons by the arguments' names.

    Raises:
        TypeError: in ``__init__``: there is no such argument.
    """

    def decorate(init: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
        known = list(inspect.signature(init).parameters)[1:]

        @functools.wraps(init)
        def checked(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
            for name, value in kwargs.items():
                if name not in known:
                    raise TypeError(f"{owner}: {_describe(name, value, refused, known)}")
            return init(self, *args, **kwargs)

        return checked

    return decorate


def explain_wrong_settings(cls: type[T]) -> type[T]:
    """Class decorator, above ``@dataclass``: `check_arguments` for the settings of GRPOConfig."""
    cls.__init__ = check_arguments(cls.__name__, REFUSED_SETTINGS)(cls.__init__)  # type: ignore[method-assign, assignment]
    return cls


def _describe(name: str, value: Any, refused: Mapping[str, str], known: list[str]) -> str:
    shown = f"{name} is {redact(value, name=name)!r}"
    if name in refused:
        return f"{shown}, which does not exist here: {refused[name]}."
    return f"{shown}, and there is no such argument.{suggest(name, known).removesuffix(' See --help.')}"
