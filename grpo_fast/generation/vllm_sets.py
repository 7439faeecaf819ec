"""How a vLLM server reports the sets of tokens that truncation keeps: as sampling masks, or by log-probabilities after truncation."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from grpo_fast.generation.protocol import SamplerError, SamplingParams
from grpo_fast.generation.vllm_http import RefusedError, ServerClient
from grpo_fast.generation.vllm_requests import COMPLETIONS, GENERATE, completion_body, generate_body, sampling_settings

__all__ = ["IncompleteSupportError", "KeptSetSource"]

logger = logging.getLogger("grpo_fast")
DEFAULT_MAX_LOGPROBS = 20  # vLLM's
MOST_LOGPROBS = 1024  # that are requested of a token without top_k; a reply has about 40 bytes for each
TIES = 16  # more log-probabilities than top_k, because tokens that are equal to the last one are kept too
_LIMIT = re.compile(r"greater than max allowed: (\d{1,9})\b")


class IncompleteSupportError(SamplerError):
    """The server has not proved that it reported the whole set of kept tokens. The message says how to change the server or the request."""


class KeptSetSource:
    """What one server offers, asked once before the first completions.

    Args:
        server: the server.
        model: the name under which it serves the model.
        vocab_size: number of tokens; None = unknown.
    """

    def __init__(self, server: ServerClient, model: str, vocab_size: int | None) -> None:
        self.server, self.model, self.vocab_size = server, model, vocab_size
        self._masks: bool | None = None
        self._max_logprobs: int | None = None
        self._warned = False

    @property
    def masks(self) -> bool:
        """Whether the server lists each token's set (`GENERATE`); it then requires top_k > 0 and a temperature above 0 of all requests."""
        return bool(self._masks)

    def ask(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Ask the server for whatever these params need to know and is not known yet, by requests for one token after this prompt.

        Raises:
            SamplerError: the server does not answer.
        """
        if self._masks is None:
            self._masks = self._has_masks(prompt)
        if params.return_support and params.truncates and not self._masks and self._max_logprobs is None:
            self._max_logprobs = self._find_max_logprobs(prompt)
        if self._masks and not params.truncates and not self._warned and any(temperature > 0 for temperature in params.temperatures):
            self._warned = True
            logger.warning(
                "%s was started with --return-sampling-mask and lists the whole vocabulary for each token of sampling without top_k, top_p "
                "and min_p, which is slow. Fix: start it without, or truncate.",
                self.server.url,
            )

    def logprobs(self, params: SamplingParams) -> int:
        """The number of log-probabilities to request of each token, so that they show its whole set.

        Raises:
            IncompleteSupportError: the server reports too few of them for ``top_k``.
        """
        assert self._max_logprobs is not None
        if params.top_k == 0:
            return self._max_logprobs
        if self._max_logprobs < min(params.top_k + 1, self._most):
            raise IncompleteSupportError(
                f"{self.server.url}: top_k is {params.top_k}, and the server reports at most {self._max_logprobs} log-probabilities of a "
                f"token (--max-logprobs); expected more than top_k, which show whole sets of kept tokens. {self.fix(params)}"
            )
        return min(params.top_k + TIES, self._max_logprobs)

    def fix(self, params: SamplingParams) -> str:
        """How to get whole sets."""
        most, ways = self._max_logprobs or 0, []
        if most < self._most:
            ways.append(f"vllm serve --max-logprobs {min(max(params.top_k + TIES, 2 * most, 128), self._most)}")
        if not 0 < params.top_k < most:
            ways.append(f"a top_k of less than {most}")
        ways += ["on a GPU a server with --return-sampling-mask and --enable-scale-out", "replay_support=False, whose gradient is biased"]
        return f"Fix: {'; or '.join(ways)}."

    @property
    def _most(self) -> int:
        """More log-probabilities are not requested."""
        return MOST_LOGPROBS if self.vocab_size is None else min(MOST_LOGPROBS, self.vocab_size)

    def _has_masks(self, prompt: Sequence[int]) -> bool:
        settings = sampling_settings(_ONE_TOKEN, 0.0, None, masks=True)
        try:
            answer = self.server.post(GENERATE, generate_body(self.model, prompt, settings))
        except RefusedError:  # an older server, or one without --enable-scale-out
            return False
        choices = answer.get("choices") if isinstance(answer, dict) else None
        first = choices[0] if isinstance(choices, list) and choices else None
        return isinstance(first, dict) and isinstance(first.get("sampling_mask"), list)

    def _find_max_logprobs(self, prompt: Sequence[int]) -> int:
        """The server's ``--max-logprobs``: only its development mode has a route that tells it, but its error for too many does."""
        try:
            self.server.post(COMPLETIONS, completion_body(self.model, prompt, sampling_settings(_ONE_TOKEN, 1.0, None), self._most))
        except RefusedError as refusal:
            found = _LIMIT.search(str(refusal))
            return min(int(found[1]), self._most) if found else DEFAULT_MAX_LOGPROBS
        return self._most


_ONE_TOKEN = SamplingParams(1, [1.0], eos_token_id=0, pad_token_id=0)
