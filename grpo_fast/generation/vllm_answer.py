"""Reads the answers of a vLLM server. Nothing in an answer is taken on trust: a wrong value is an error that says what was wrong."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

from grpo_fast.generation.protocol import Completion, SamplerError, SamplingParams, end_tokens
from grpo_fast.generation.vllm_http import START_COMMAND
from grpo_fast.generation.vllm_sets import IncompleteSupportError
from grpo_fast.loss.reported_sets import LOWEST_LOGPROB, IncompleteSetError
from grpo_fast.loss.support import Support

__all__ = ["AnswerReader", "is_count"]

TOKEN = "token_id:"  # begins the name of a token, with return_tokens_as_token_ids
_IS_VLLM = "Is this a vLLM server, and does nothing between here and the server change answers?"


class AnswerReader(NamedTuple):
    """Checks the answers to requests for completions.

    Args:
        source: the address, for messages.
        vocab_size: number of tokens of the model; None = unknown, and ids have no upper bound.
    """

    source: str
    vocab_size: int | None

    def completion(
        self,
        answer: Any,
        prompt: Sequence[int],
        params: SamplingParams,
        temperature: float,
        where: str,
        *,
        requested: int | None = None,
        fix: str = "",
    ) -> Completion:
        """The completion that an answer of ``/v1/completions`` holds.

        Args:
            answer: decoded JSON.
            prompt: the tokens that were sent.
            params: how the completion was to be drawn.
            temperature: at which; 0 is greedy decoding, whose log-probabilities are not kept.
            where: names the request in messages.
            requested: the number of log-probabilities that were requested of each token to get its set; None: no sets.
            fix: how to get whole sets, for messages.

        Raises:
            SamplerError: the answer is not that of a vLLM server to this request.
            IncompleteSupportError: it may have only a part of a set.
        """
        choice = self._choice(answer, where)
        logprobs = choice.get("logprobs")
        logprobs = logprobs if isinstance(logprobs, dict) else {}
        tokens = self._tokens(choice, choice.get("prompt_token_ids"), logprobs.get("token_logprobs"), prompt, params, where)
        if requested is None:
            return Completion(tokens.ids, tokens.ended, tokens.logprobs if temperature > 0 else None)
        tops, count, size = logprobs.get("top_logprobs"), requested, self.vocab_size
        support = self._sets(where, fix, lambda: Support.from_top_logprobs(_by_id(tops), tokens.ids, requested=count, vocab_size=size))
        return Completion(tokens.ids, tokens.ended, tokens.logprobs, support)

    def generated(self, answer: Any, prompt: Sequence[int], params: SamplingParams, where: str) -> Completion:
        """The completion that an answer of ``/inference/v1/generate`` holds, with its sets; see `completion`.

        Raises:
            SamplerError: the answer is not that of a vLLM server to this request.
        """
        choice = self._choice(answer, where)
        logprobs, mask = choice.get("logprobs"), choice.get("sampling_mask")
        content = logprobs.get("content") if isinstance(logprobs, dict) else None
        entries = [each if isinstance(each, dict) else {} for each in content] if isinstance(content, list) else []
        values = [each.get("logprob") for each in entries]
        tokens = self._tokens(choice, answer.get("prompt_token_ids"), values, prompt, params, where)
        if [each.get("token_id") for each in entries] != tokens.ids:
            raise self.wrong(where, "the log-probabilities belong to other tokens than token_ids", _IS_VLLM)
        if mask is None:
            raise self.wrong(where, "the answer has no sampling_mask, but the server had it before", "Fix: --return-sampling-mask.")
        support = self._sets(where, "", lambda: Support.from_sampling_mask(mask, tokens.ids, vocab_size=self.vocab_size))
        return Completion(tokens.ids, tokens.ended, tokens.logprobs, support)

    def top_logprobs(self, answer: Any, where: str) -> dict[str, float]:
        """Token -> log-probability of the most likely tokens at the first position of an answer.

        Raises:
            SamplerError: there are none, or they are no numbers.
        """
        logprobs = self._choice(answer, where).get("logprobs")
        tops = logprobs.get("top_logprobs") if isinstance(logprobs, dict) else None
        first = tops[0] if isinstance(tops, list) and tops else None
        if not isinstance(first, dict) or not first:
            raise self.wrong(where, "no log-probabilities in the answer", f"Fix: {START_COMMAND}")
        for token, value in first.items():
            if not _is_number(value):
                raise self.wrong(where, f"the log-probability of {token!r} is {reprlib.repr(value)}; expected a number", _IS_VLLM)
        return {token: float(value) for token, value in first.items()}

    def wrong(self, where: str, what: str, fix: str) -> SamplerError:
        """The error for an answer."""
        return SamplerError(f"{self.source}{where}: {what}. {fix}")

    def _choice(self, answer: Any, where: str) -> dict[str, Any]:
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list):
            raise self.wrong(where, f"the answer's choices are {reprlib.repr(choices)}; expected a list of one", "Is this a vLLM server?")
        if len(choices) != 1:
            raise self.wrong(where, f"the answer has {len(choices)} choices; expected one", "Is this a vLLM server?")
        choice = choices[0]
        if not isinstance(choice, dict):
            raise self.wrong(where, f"the answer's choice is {reprlib.repr(choice)}; expected an object with token_ids", _IS_VLLM)
        return choice

    def _tokens(
        self, choice: dict[str, Any], echoed: Any, logprobs: Any, prompt: Sequence[int], params: SamplingParams, where: str
    ) -> _Tokens:
        """The tokens of a choice, checked against the request; ``echoed``: the prompt in the answer."""
        ids, reason = choice.get("token_ids"), choice.get("finish_reason")
        if not isinstance(ids, list) or not isinstance(echoed, list):
            raise self.wrong(where, "the answer has no token_ids", "Fix: a newer vLLM, which knows return_token_ids.")
        if len(ids) > params.max_new_tokens:
            raise self.wrong(where, f"the answer has {len(ids)} tokens; expected at most max_tokens = {params.max_new_tokens}", _IS_VLLM)
        self._check_ids("token_ids", ids, where)
        if not all(is_count(token) for token in echoed) or echoed != list(prompt):
            raise self.wrong(
                where,
                f"the answer belongs to another prompt ({len(echoed)} tokens, {len(prompt)} were sent)",
                "Fix: connect to the server directly; a proxy may have mixed up answers.",
            )
        values = self._logprobs(logprobs, len(ids), where)
        ends = set(end_tokens(params))
        if (early := next((position for position, token in enumerate(ids[:-1]) if token in ends), None)) is not None:
            raise self.wrong(
                where, f"the completion goes on after the end token {ids[early]}, which is token {early + 1} of {len(ids)}", _IS_VLLM
            )
        ended = bool(ids) and ids[-1] in ends
        if reason not in ("stop", "length") or ended != (reason == "stop") or (not ended and len(ids) != params.max_new_tokens):
            raise self.wrong(
                where,
                f"a completion of {len(ids)} tokens ended with finish_reason {reprlib.repr(reason)}; expected an end token, or "
                f"{params.max_new_tokens} tokens",
                "The completion was cut by the server's --max-model-len, or because the server was paused. Fix: raise the limit, or wait.",
            )
        return _Tokens(ids, ended, values)

    def _sets(self, where: str, fix: str, build: Callable[[], Support]) -> Support:
        try:
            return build()
        except IncompleteSetError as error:
            raise IncompleteSupportError(f"{self.source}{where}: {error} {fix}") from error
        except (TypeError, ValueError) as error:
            raise self.wrong(where, str(error).rstrip("."), _IS_VLLM) from error

    def _check_ids(self, name: str, ids: list[Any], where: str) -> None:
        for position, token in enumerate(ids):
            if not is_count(token):
                raise self.wrong(where, f"{name}[{position}] is {reprlib.repr(token)}; expected a whole number of at least 0", _IS_VLLM)
            if self.vocab_size is not None and token >= self.vocab_size:
                raise self.wrong(
                    where,
                    f"{name}[{position}] is {token}; expected less than {self.vocab_size}, the size of the model's vocabulary",
                    "Fix: serve the model that is trained.",
                )

    def _logprobs(self, values: Any, count: int, where: str) -> list[float]:
        """One finite log-probability for each of ``count`` tokens."""
        fix = f"Fix: {START_COMMAND}"
        if not isinstance(values, list) or len(values) != count:
            raise self.wrong(where, f"there is not one log-probability for each of the {count} tokens", fix)
        for position, value in enumerate(values):
            if not _is_number(value) or not LOWEST_LOGPROB < value < 1e-3:
                expected = "a finite number of at most 0, since the token was drawn"
                raise self.wrong(where, f"the log-probability of token {position} is {reprlib.repr(value)}; expected {expected}", fix)
        return [float(value) for value in values]


class _Tokens(NamedTuple):
    """The sampled tokens of an answer."""

    ids: list[int]
    ended: bool  # with an end token
    logprobs: list[float]


def _by_id(tops: Any) -> list[dict[int, float]]:
    """Log-probabilities by token id, from those by name that the answer has for each token.

    Raises:
        TypeError, ValueError: they are none, or a name is not that of a token.
    """
    if not isinstance(tops, list):
        raise TypeError(f"top_logprobs are {reprlib.repr(tops)}; expected a list.")
    found = []
    for position, entries in enumerate(tops):
        if not isinstance(entries, dict):
            raise TypeError(f"top_logprobs[{position}] is {reprlib.repr(entries)}; expected log-probabilities by token.")
        digits = [name[len(TOKEN) :] if name.startswith(TOKEN) else "" for name in entries]
        if not all(each.isascii() and each.isdigit() and len(each) <= 10 for each in digits):
            bad = next(name for name in entries if not re.fullmatch(rf"{TOKEN}[0-9]{{1,10}}", name))
            raise ValueError(f"top_logprobs[{position}] has the token {reprlib.repr(bad)}; expected names such as '{TOKEN}5'.")
        by_id = dict(zip(map(int, digits), entries.values(), strict=True))
        if len(by_id) != len(entries):
            raise ValueError(f"top_logprobs[{position}] has a token twice; expected each once.")
        found.append(by_id)
    return found


def is_count(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number of at least 0; True and 1.0 are not."""
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    """Whether it is a finite number; NaN, infinity, True and integers beyond the range of floats are not."""
    return type(value) in (int, float) and abs(value) <= 1e300
