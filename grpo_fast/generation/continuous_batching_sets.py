"""The sets of tokens that truncation keeps in transformers' continuous batching, where the rows of a batch change from step to step.

Two logits processors are added to transformers' own: one after the temperature, which sees the whole distribution, and one at the end,
which sees what truncation has left. The number of its request is an argument of each row, as its temperature is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingTemperatureLogitsWarper,
)

from grpo_fast.generation.kept_sets import KeptSetRecorder
from grpo_fast.generation.protocol import SamplerError

if TYPE_CHECKING:
    from transformers.generation.continuous_batching import ContinuousBatchingManager

__all__ = ["ROW", "record_sets"]

ROW = "row"  # the argument of a request: its number


class _WholeDistribution:
    """Remembers the scores before truncation."""

    supports_continuous_batching = True

    def __init__(self) -> None:
        self.scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores = scores
        return scores


class _KeptTokens(ContinuousBatchingLogitsProcessor):
    """Records the scores after truncation."""

    supported_kwargs: dict[str, type] = {ROW: int}  # noqa: RUF012  as in transformers' base class
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, whole: _WholeDistribution, recorder: KeptSetRecorder) -> None:
        self.whole, self.recorder = whole, recorder

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.fill_(-1)  # rows that only fill the batch

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        return torch.tensor([request.state.logit_processor_kwargs[ROW] for request in requests_with_new_token], dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        rows = tensor_arg[: scores.shape[0]].tolist()
        real = [index for index, row in enumerate(rows) if row >= 0]
        assert self.whole.scores is not None
        self.recorder.record(self.whole.scores[real], scores[real], [rows[index] for index in real])
        return scores


def record_sets(manager: ContinuousBatchingManager, recorder: KeptSetRecorder) -> None:
    """Let a manager that has not been started record the kept sets. Its requests must be added with their number, ``row=...``.

    Raises:
        SamplerError: this version of transformers processes logits in another way.
    """
    found = manager.logit_processor
    processors = getattr(found, "logits_processor", None)
    place = next((i for i, x in enumerate(processors or ()) if isinstance(x, ContinuousBatchingTemperatureLogitsWarper)), None)
    if processors is None or place is None or not hasattr(found, "tensors_required") or not hasattr(found, "supported_keys"):
        raise SamplerError(
            "continuous batching: this version of transformers does not process logits as expected, so the kept sets of truncated sampling "
            "cannot be recorded. Fix: replay_support=False, or sampler 'transformers'."
        )
    whole = _WholeDistribution()
    processors.insert(place + 1, whole)
    processors.append(_KeptTokens(whole, recorder))
    found.tensors_required += 1
    found.supported_keys[ROW] = int
