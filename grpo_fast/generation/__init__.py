"""Samplers: they draw the completions of a rollout, behind one small protocol.

    sampler = make_sampler("transformers", model, tokenizer)
    completions = sampler.generate(prompts, SamplingParams(64, [1.0] * len(prompts), eos_token_id=2, pad_token_id=0))

Every sampler draws from softmax(z/T), with a T per prompt, and reports the log-probability of each token under that distribution, so that
the trainer can compare it with the log-probability that the loss computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from grpo_fast.generation.protocol import Completion, Sampler, SamplerError, SamplingParams, WeightsLostError
from grpo_fast.generation.sglang_reply import completion_from_sglang

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "SAMPLERS",
    "Completion",
    "Sampler",
    "SamplerError",
    "SamplingParams",
    "WeightsLostError",
    "check_options",
    "completion_from_sglang",
    "make_sampler",
    "sampler_class",
]

SAMPLERS = ("transformers", "continuous_batching", "vllm")


def make_sampler(
    name_or_sampler: str | Sampler, model: PreTrainedModel | nn.Module, tokenizer: PreTrainedTokenizerBase | None, **options: Any
) -> Sampler:
    """Make a sampler by its name, or return the given one.

    Args:
        name_or_sampler: "transformers" (the trainer's default: `generate` of the model that is trained, in this process),
            "continuous_batching" (transformers' paged scheduler over the same model), "vllm" (a server, ``vllm serve``), or an object
            with the methods of `Sampler`.
        model: the causal language model that is trained, wrapped (DDP, PEFT, torch.compile) or not.
        tokenizer: its tokenizer; the samplers take and return token ids and do not need it.
        options: arguments of the sampler's constructor: `TransformersSampler`, `ContinuousBatchingSampler`, `VLLMSampler`.

    Raises:
        ValueError: an unknown name, or an option the sampler does not have.
        TypeError: an object without the methods of a sampler.
    """
    if not isinstance(name_or_sampler, str):
        missing = [name for name in ("generate", "update_weights", "close") if not callable(getattr(name_or_sampler, name, None))]
        if missing:
            raise TypeError(
                f"sampler is a {type(name_or_sampler).__name__} without {', '.join(missing)}; expected one of {', '.join(SAMPLERS)}, "
                "or an object with the methods generate, update_weights and close (grpo_fast.generation.Sampler)."
            )
        if options:
            raise ValueError(
                f"sampler options {sorted(options)} were given beside a ready sampler; expected none. Fix: set them on that object."
            )
        return name_or_sampler
    check_options(name_or_sampler, options)
    return sampler_class(name_or_sampler)(model, tokenizer, **options)


def check_options(name: str, options: Collection[str]) -> None:
    """Check that a sampler of this name exists and has these options; the trainer does so before it loads a model.

    Raises:
        ValueError: the sampler or an option is unknown; the message lists the known ones.
    """
    known = set(inspect.signature(sampler_class(name)).parameters) - {"model", "tokenizer"}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"sampler {name!r} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}.")


def sampler_class(name: str) -> type[Any]:
    """The class of a sampler, imported on demand.

    Raises:
        ValueError: there is no sampler of this name.
    """
    if name == "transformers":
        from grpo_fast.generation.transformers_sampler import TransformersSampler

        return TransformersSampler
    if name == "continuous_batching":
        from grpo_fast.generation.continuous_batching import ContinuousBatchingSampler

        return ContinuousBatchingSampler
    if name == "vllm":
        from grpo_fast.generation.vllm import VLLMSampler

        return VLLMSampler
    raise ValueError(f"sampler is {name!r}; expected one of {', '.join(SAMPLERS)}, or an object of your own.")
