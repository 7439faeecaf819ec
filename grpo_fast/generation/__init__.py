"""Rollouts: who draws the completions, behind one small protocol.

    sampler = make_sampler("transformers", model, tokenizer)
    completions = sampler.generate(prompts, SamplingParams(64, [1.0] * len(prompts), eos_token_id=2, pad_token_id=0))

Every sampler draws from softmax(z/T), T given for each prompt, and reports the log-probability of each token under just that distribution,
so that the loss can be held against what was drawn from.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

from grpo_fast.generation.protocol import Completion, Sampler, SamplerError, SamplingParams

__all__ = ["SAMPLERS", "Completion", "Sampler", "SamplerError", "SamplingParams", "check_options", "make_sampler", "sampler_class"]

SAMPLERS = ("transformers", "continuous_batching", "vllm")


def make_sampler(name_or_sampler: str | Sampler, model: Any, tokenizer: Any, **options: Any) -> Sampler:
    """A sampler by its name, or the one given, as it is.

    Args:
        name_or_sampler: "transformers" (default of the trainer: `generate` of the model that is trained, no other process),
            "continuous_batching" (transformers' paged scheduler over the same model), "vllm" (a server, ``vllm serve``), or an object
            with the methods of `Sampler`.
        model: the causal language model that is trained, wrapped (DDP, PEFT, torch.compile) or not.
        tokenizer: its tokenizer; the samplers take and return ids, and ask it for nothing but its name.
        options: of the sampler's constructor: `TransformersSampler`, `ContinuousBatchingSampler`, `VLLMSampler`.

    Raises:
        ValueError: an unknown name, or an option the sampler does not have.
        TypeError: an object that is no sampler.
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
                f"sampler options {sorted(options)} were given beside a ready sampler; expected none. Set them on that object."
            )
        return name_or_sampler
    check_options(name_or_sampler, options)
    return sampler_class(name_or_sampler)(model, tokenizer, **options)


def check_options(name: str, options: Collection[str]) -> None:
    """Whether there is a sampler of that name with these options, before a model is loaded for it.

    Raises:
        ValueError: names what there is not, and what there is.
    """
    known = set(inspect.signature(sampler_class(name)).parameters) - {"model", "tokenizer"}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"sampler {name!r} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}.")


def sampler_class(name: str) -> Any:
    """The class of that name, imported when it is asked for.

    Raises:
        ValueError: there is none.
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
