"""Penalties, more truncations and kept sets in transformers' continuous batching, where the rows of a batch change from step to step.

Logits processors are added to transformers' own: penalties before the temperature; after it one that sees the whole distribution; then
more truncations; and one at the end that sees what truncation has left. The number of its request is an argument of each row, as its
temperature is. transformers itself leaves penalties out of continuous batching, with a warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingTemperatureLogitsWarper,
)

from grpo_fast.generation.kept_sets import KeptSetRecorder
from grpo_fast.generation.logits_processing import RowPenalties, has_penalties, truncation_warpers
from grpo_fast.generation.protocol import SamplerError, SamplingParams

if TYPE_CHECKING:
    from transformers.generation.continuous_batching import ContinuousBatchingManager

__all__ = ["ROW", "add_processors"]

ROW = "row"  # the argument of a request: its number


class _WholeDistribution:
    """Remembers the scores before truncation."""

    supports_continuous_batching = True

    def __init__(self) -> None:
        self.scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores = scores
        return scores


class _ByRequest(ContinuousBatchingLogitsProcessor):
    """A processor that needs the number of each row's request."""

    supported_kwargs: dict[str, type] = {ROW: int}  # noqa: RUF012  as in transformers' base class
    ignored_kwargs: tuple[str, ...] = ()

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.fill_(-1)  # rows that only fill the batch

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        return torch.tensor([request.state.logit_processor_kwargs[ROW] for request in requests_with_new_token], dtype=torch.int32)


class _Penalties(_ByRequest):
    """Applies the penalties. It reads the tokens of a request when its batch is made, which without asynchronous batching are all."""

    def __init__(self, penalties: RowPenalties, prompts: Sequence[Sequence[int]]) -> None:
        self.penalties, self.prompts = penalties, prompts
        self._tokens: dict[int, list[int]] = {}

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        for request in requests_with_new_token:
            state = request.state
            self._tokens[state.logit_processor_kwargs[ROW]] = [*state.initial_tokens, *state.generated_tokens]
        return super().prepare_tensor_args(requests_with_new_token)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        found = scores.clone()
        for index, row in enumerate(tensor_arg[: scores.shape[0]].tolist()):
            if row >= 0:
                ids = torch.tensor([self._tokens[row]], device=scores.device)
                found[index] = self.penalties(ids, scores[index : index + 1], len(self.prompts[row]))[0]
        return found


class _KeptTokens(_ByRequest):
    """Records the scores after truncation."""

    def __init__(self, whole: _WholeDistribution, recorder: KeptSetRecorder) -> None:
        self.whole, self.recorder = whole, recorder

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        rows = tensor_arg[: scores.shape[0]].tolist()
        real = [index for index, row in enumerate(rows) if row >= 0]
        assert self.whole.scores is not None
        self.recorder.record(self.whole.scores[real], scores[real], [rows[index] for index in real])
        return scores


def add_processors(
    manager: ContinuousBatchingManager,
    params: SamplingParams,
    prompts: Sequence[Sequence[int]],
    device: torch.device,
    recorder: KeptSetRecorder | None,
) -> bool:
    """Add what transformers does not have to a manager that has not been started.

    Args:
        manager: of a batch of requests.
        params: how they are drawn.
        prompts: of the requests, by their number.
        device: of the logits.
        recorder: of the kept sets, if they are wanted.

    Returns:
        Whether the requests must be added with their number, ``row=...``.

    Raises:
        SamplerError: this version of transformers processes logits in another way.
    """
    warpers = truncation_warpers(params.generation_kwargs, device)
    if recorder is None and not warpers and not has_penalties(params):
        return False
    found = manager.logit_processor
    processors = getattr(found, "logits_processor", None)
    place = next((i for i, x in enumerate(processors or ()) if isinstance(x, ContinuousBatchingTemperatureLogitsWarper)), None)
    if processors is None or place is None or not hasattr(found, "tensors_required") or not hasattr(found, "supported_keys"):
        raise SamplerError(
            "continuous batching: this version of transformers does not process logits as expected, so that penalties and kept sets "
            "are not possible. Fix: sampler 'transformers', or no penalties and replay_support=False."
        )
    added: list[_ByRequest] = []
    processors.extend(warpers)
    if recorder is not None:
        whole = _WholeDistribution()
        processors.insert(place + 1, whole)
        added.append(_KeptTokens(whole, recorder))
        processors.append(added[-1])
    if has_penalties(params):
        added.append(_Penalties(RowPenalties(params, device), prompts))
        processors.insert(0, added[-1])
    found.tensors_required += len(added)
    if added:
        found.supported_keys[ROW] = int
    return bool(added)
