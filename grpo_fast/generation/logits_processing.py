"""Penalties and bans of tokens, with transformers' own logits processors, for the samplers that run the model themselves.

They are applied to each row without its padding. `generate` applies them to padded rows, where a repetition penalty also counts the padding
as text: with the end token as padding, a shorter prompt would then make its completions longer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_fast.generation.generation_options import penalties_of
from grpo_fast.generation.protocol import SamplingParams, end_tokens

if TYPE_CHECKING:
    from transformers import LogitsProcessorList

__all__ = ["PaddedPenalties", "RowPenalties", "check_values", "has_penalties", "truncation_warpers"]


def has_penalties(params: SamplingParams) -> bool:
    """Whether something else than temperature and truncation changes the distribution of a transformers sampler."""
    return params.repetition_penalty != 1 or bool(penalties_of("transformers", params.generation_kwargs))


class RowPenalties:
    """The processors that come before the temperature, in the order of `generate`.

    Args:
        params: ``repetition_penalty`` and ``generation_kwargs``.
        device: of the logits.
    """

    def __init__(self, params: SamplingParams, device: torch.device) -> None:
        self.params, self.device = params, device
        self._processors: dict[int, LogitsProcessorList] = {}  # by the length of the prompt

    def __call__(self, ids: Tensor, logits: Tensor, prompt_length: int) -> Tensor:
        """Return the processed logits of a row's next token, float32 [1, V].

        Args:
            ids: int64 [1, T], the prompt and what was drawn after it.
            logits: float [1, V].
            prompt_length: in tokens.
        """
        if prompt_length not in self._processors:
            self._processors[prompt_length] = _processors(self.params, prompt_length, self.device)
        processed: Tensor = self._processors[prompt_length](ids, logits.float())
        return processed


class PaddedPenalties:
    """A logits processor for `generate` with prompts that are padded on the left.

    Args:
        params: see `RowPenalties`.
        lengths: of the prompts, in tokens.
        device: of the logits.
    """

    def __init__(self, params: SamplingParams, lengths: Sequence[int], device: torch.device) -> None:
        self.rows, self.lengths = RowPenalties(params, device), lengths

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """Return the processed logits, float32 [B, V], of int64 [B, T] ids and float [B, V] logits."""
        width = max(self.lengths)
        return torch.cat([self.rows(input_ids[b : b + 1, width - n :], logits[b : b + 1], n) for b, n in enumerate(self.lengths)])


def truncation_warpers(options: Mapping[str, Any], device: torch.device | str = "cpu") -> LogitsProcessorList:
    """The warpers of ``generation_kwargs`` that leave tokens out by their probability. They follow top-k, top-p and min-p."""
    from transformers import EpsilonLogitsWarper, EtaLogitsWarper, LogitsProcessorList, TopHLogitsWarper, TypicalLogitsWarper

    found = LogitsProcessorList()
    if options.get("top_h") is not None:
        found.append(TopHLogitsWarper(options["top_h"]))
    if options.get("typical_p") is not None and options["typical_p"] != 1:
        found.append(TypicalLogitsWarper(options["typical_p"]))
    if options.get("epsilon_cutoff"):
        found.append(EpsilonLogitsWarper(options["epsilon_cutoff"]))
    if options.get("eta_cutoff"):
        found.append(EtaLogitsWarper(options["eta_cutoff"], device=str(device)))
    return found


def check_values(options: Mapping[str, Any]) -> None:
    """Check the values of transformers' options.

    Raises:
        ValueError: transformers refuses one; the message is transformers' own.
    """
    from transformers import GenerationConfig

    params = SamplingParams(1, [], generation_kwargs=options, eos_token_id=0, pad_token_id=0)
    try:
        GenerationConfig(**{**options, "do_sample": True})
        _processors(params, 1, torch.device("cpu"))
        truncation_warpers(options)
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"generation_kwargs is {dict(options)!r}, which transformers does not take: {error}. Fix: see transformers' GenerationConfig."
        ) from error


def _processors(params: SamplingParams, prompt_length: int, device: torch.device) -> LogitsProcessorList:
    import transformers as hf

    options, ends = params.generation_kwargs, torch.tensor(end_tokens(params), device=device)
    builders: dict[str, Callable[[Any], Any]] = {  # in the order of `generate`
        "sequence_bias": hf.SequenceBiasLogitsProcessor,
        "repetition_penalty": lambda value: hf.RepetitionPenaltyLogitsProcessor(float(value)),
        "no_repeat_ngram_size": hf.NoRepeatNGramLogitsProcessor,
        "bad_words_ids": lambda value: hf.NoBadWordsLogitsProcessor(value, ends),
        "min_new_tokens": lambda value: hf.MinNewTokensLengthLogitsProcessor(prompt_length, value, ends, device=str(device)),
        "exponential_decay_length_penalty": lambda value: hf.ExponentialDecayLengthPenalty(tuple(value), ends, prompt_length),
        "suppress_tokens": lambda value: hf.SuppressTokensLogitsProcessor(value, device=str(device)),
        "begin_suppress_tokens": lambda value: hf.SuppressTokensAtBeginLogitsProcessor(value, prompt_length, device=str(device)),
    }
    given: dict[str, Any] = {**options, "repetition_penalty": None if params.repetition_penalty == 1 else params.repetition_penalty}
    return hf.LogitsProcessorList([build(given[name]) for name, build in builders.items() if given.get(name)])
