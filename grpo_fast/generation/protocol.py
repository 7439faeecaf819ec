"""The protocol of samplers: their parameters, their results and their methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from grpo_fast.generation.generation_options import truncations_of
from grpo_fast.loss.support import Support
from grpo_fast.utils.redaction import redact_text

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["Completion", "Sampler", "SamplerError", "SamplingParams", "WeightsLostError", "check_prompts", "end_tokens"]


class SamplerError(RuntimeError):
    """A sampler could not draw completions. The message says what was called, what came back, and how to fix it.

    Secrets in the message are redacted: it may have the address of a server, with a password, and what the server has answered.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redact_text(message))


class WeightsLostError(SamplerError):
    """Completions may have been drawn under other weights than the last that were sent. Fix: `update_weights`, then `generate` again."""


@dataclass(frozen=True)
class SamplingParams:
    """The settings of sampling: completions are drawn from softmax(z/T), truncated by top-k, top-p and min-p in this order.

    Args:
        max_new_tokens: length limit of a completion, in tokens, the end token included.
        temperatures: one per prompt, above 0 to sample; 0 is greedy decoding, for evaluation only.
        top_p: keep the smallest set of most likely tokens whose probabilities sum to at least this; 1 = all tokens.
        top_k: keep this many most likely tokens; 0 = all tokens.
        min_p: keep tokens that are at least this fraction as likely as the most likely one; 0 = all tokens.
        seed: the same seed, prompts and weights give the same tokens; None = a seed from torch's global generator.
        eos_token_id: the token or tokens that end a completion.
        pad_token_id: fills shorter rows; it is never part of a completion.
        return_support: return the sets of tokens that truncation has kept, where the sampler can (see `Completion`).
        repetition_penalty: divide the positive logits of tokens that are in the prompt or in the completion so far by this, and multiply
            their negative ones (CTRL, arXiv:1909.05858), before the temperature; 1 = no penalty.
        generation_kwargs: more options, by the sampler's own names: of transformers' GenerationConfig, or of vLLM's SamplingParams. They
            are checked by `check_generation_options`.

    Raises:
        ValueError: a value is out of range.
    """

    max_new_tokens: int
    temperatures: Sequence[float]
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    eos_token_id: int | list[int] = field(kw_only=True)
    pad_token_id: int = field(kw_only=True)
    return_support: bool = False
    repetition_penalty: float = 1.0
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens!r}; expected a whole number of at least 1.")
        for index, temperature in enumerate(self.temperatures):
            if not 0 <= temperature < math.inf:
                raise ValueError(
                    f"temperatures[{index}] is {temperature!r}; expected a finite number: above 0 to sample, 0 for greedy decoding."
                )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p!r}; expected a number in (0, 1]. 1 keeps all tokens.")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k!r}; expected a whole number >= 0. 0 keeps all tokens.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p!r}; expected a number in [0, 1]. 0 keeps all tokens.")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty!r}; expected a finite number above 0. 1 is no penalty.")
        if not end_tokens(self):
            raise ValueError("eos_token_id is an empty list; expected at least one token that ends a completion.")

    @property
    def truncates(self) -> bool:
        """Whether top-k, top-p, min-p or an option of ``generation_kwargs`` leave tokens out by their probability; the sampler's
        log-probabilities are then normalised over the kept tokens.
        """
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0 or bool(truncations_of("transformers", self.generation_kwargs))


@dataclass(frozen=True)
class Completion:
    """A completion that a sampler drew.

    Args:
        token_ids: its tokens, up to and including the end token if one was drawn.
        finished: whether an end token was drawn; False if the completion was cut at the length limit.
        logprobs: log-probabilities of the tokens under the distribution they were drawn from (softmax(z/T), with penalties, after
            truncation); None if the sampler does not know them, or decoded greedily.
        support: for each token the set of tokens that truncation (top-k, top-p, min-p) had kept, on the CPU; an empty set if it had kept
            all of them. None if it was not asked for (``SamplingParams.return_support``), or if the sampler does not know it.
        kept_mass: for each token the probability that its set had before truncation; None if the sampler does not know it.

    Raises:
        ValueError: the numbers of tokens and of log-probabilities, sets or masses differ.
    """

    token_ids: list[int]
    finished: bool
    logprobs: list[float] | None = None
    support: Support | None = None
    kept_mass: list[float] | None = None

    def __post_init__(self) -> None:
        for name in ("logprobs", "support", "kept_mass"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.token_ids):
                raise ValueError(f"{name} has {len(values)} entries; expected {len(self.token_ids)}, one for each token.")


@runtime_checkable
class Sampler(Protocol):
    """Draws completions. A sampler of your own needs these three methods and nothing else.

    It draws as ``SamplingParams`` say, and raises an error if it cannot (because it has no repetition penalty, say).
    A sampler that returns the sets of truncated sampling (``Completion.support``) also has an attribute ``returns_support`` that is True.
    """

    def generate(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[Completion]:
        """Draw one completion per prompt, in the order of the prompts. The trainer calls it under the autocast of its loss."""

    def update_weights(self, model: PreTrainedModel | nn.Module, step: int) -> None:
        """Use the weights of this model from now on. The trainer calls it before it draws with weights that have changed since.

        Args:
            model: the model that is trained, wrapped or not.
            step: the number of optimizer steps that it has taken.
        """

    def close(self) -> None:
        """Release resources. It may be called twice, and `update_weights` and `generate` after it open what they need."""


def end_tokens(params: SamplingParams) -> list[int]:
    """The tokens that end a completion, as a list."""
    return [params.eos_token_id] if isinstance(params.eos_token_id, int) else list(params.eos_token_id)


def check_prompts(prompts: Sequence[list[int]], params: SamplingParams) -> None:
    """Check that there is a temperature per prompt, and that no prompt is empty, since the first token needs a context.

    Raises:
        ValueError: otherwise.
    """
    if len(params.temperatures) != len(prompts):
        raise ValueError(
            f"temperatures has {len(params.temperatures)} entries for {len(prompts)} prompts; expected one for each prompt. "
            "Fix for a single value: [1.0] * len(prompts)."
        )
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts[{index}] is empty; expected at least one token. Fix: start it with the tokenizer's bos token.")
