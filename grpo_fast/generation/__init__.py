"""Rollouts: who draws the completions, behind one small protocol.

    sampler = make_sampler("transformers", model, tokenizer)
    completions = sampler.generate(prompts, SamplingParams(64, [1.0] * len(prompts), eos_token_id=2, pad_token_id=0))

Every sampler draws from softmax(z/T), T given for each prompt, and reports the log-probability of each token under just that distribution,
so that the loss can be held against what was drawn from.
"""

from __future__ import annotations

from typing import Any

from grpo_fast.generation.protocol import Completion, Sampler, SamplerError, SamplingParams

__all__ = ["SAMPLERS", "Completion", "Sampler", "SamplerError", "SamplingParams", "make_sampler"]

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
    if name_or_sampler not in SAMPLERS:
        raise ValueError(f"sampler is {name_or_sampler!r}; expected one of {', '.join(SAMPLERS)}, or an object of your own.")
    factory: Any
    if name_or_sampler == "transformers":
        from grpo_fast.generation.transformers_sampler import TransformersSampler as factory  # noqa: N813
    elif name_or_sampler == "continuous_batching":
        from grpo_fast.generation.continuous_batching import ContinuousBatchingSampler as factory  # noqa: N813
    else:
        from grpo_fast.generation.vllm import VLLMSampler as factory  # noqa: N813
    import inspect

    known = set(inspect.signature(factory).parameters) - {"model", "tokenizer"}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"sampler {name_or_sampler!r} has no option {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'none'}.")
    return factory(model, tokenizer, **options)
