"""The arguments of the head's operators as named structures. PyTorch's dispatcher takes flat lists of arguments: the schema, the flat list,
and the conversion back to the structure are derived from the fields that are declared here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from grpo_fast.head.chunking import ChunkPlan, ChunkSize
from grpo_fast.head.matrix_products import DenseHead, HeadTensors, NeedsGrad
from grpo_fast.head.precision import Precision
from grpo_fast.loss.inputs import LossInputs
from grpo_fast.loss.kernel_settings import config_from_numbers, config_numbers
from grpo_fast.loss.sequences import Sequences
from grpo_fast.loss.token_rows import RowStatistics, TokenRows
from grpo_fast.ops.kept_logprobs import KeptSets

__all__ = ["BackwardArguments", "Flat", "HeadOptions", "LogprobsArguments", "LossArguments", "LossTensors", "RowArguments"]

Argument = Tensor | float | int | bool | list[float] | list[bool] | list[str] | torch.dtype | None  # of an operator
Flat = Sequence[Argument]
Part = TypeVar("Part", bound=tuple[object, ...])

_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "float": "float",
    "int": "SymInt",
    "bool": "bool",
    "list[float]": "float[]",
    "list[bool]": "bool[]",
    "list[str]": "str[]",
    "torch.dtype": "ScalarType",
}


class RowArguments(NamedTuple):
    """The fields of TokenRows except the shard; tensors ``[1, N]``."""

    token_ids: Tensor
    mask: Tensor
    set_ids: Tensor | None
    set_offsets: Tensor | None
    temperatures: Tensor | None
    temperature: float
    softcap: float
    logit_scale: float
    largest_kept_set: int

    @classmethod
    def of(cls, rows: TokenRows) -> RowArguments:
        set_ids, set_offsets = (None, None) if rows.sets is None else rows.sets
        return cls(rows.token_ids, rows.mask, set_ids, set_offsets, *rows.scoring, rows.largest_kept_set)

    def rows(self) -> TokenRows:
        sets = None if self.set_ids is None or self.set_offsets is None else KeptSets(self.set_ids, self.set_offsets)
        scoring = (self.temperatures, self.temperature, self.softcap, self.logit_scale)
        return TokenRows(self.token_ids, self.mask, *scoring, sets=sets, largest_kept_set=self.largest_kept_set)


class LossTensors(NamedTuple):
    """The fields of LossInputs except the mask, which is that of the rows; tensors ``[1, N]``."""

    advantages: Tensor
    weights: Tensor
    entropy_weights: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    rollout_weights: Tensor | None
    columns: Tensor | None  # the surrogate_inputs, [K, N]
    column_names: list[str]
    segment: Tensor  # int64 [N]
    num_sequences: int
    rollout_per_sequence: bool
    loss_scale: float
    config: list[float]
    only_active: bool

    @classmethod
    def of(cls, inputs: LossInputs, only_active: bool) -> LossTensors:
        assert inputs.sequences.segment is not None
        return cls(
            inputs.advantages,
            inputs.weights.expand(inputs.mask.shape),
            inputs.entropy_weights.expand(inputs.mask.shape),
            inputs.old_logprobs,
            inputs.ref_logprobs,
            inputs.rollout_weights,
            torch.cat(list(inputs.surrogate_inputs.values())) if inputs.surrogate_inputs else None,
            list(inputs.surrogate_inputs),
            inputs.sequences.segment,
            inputs.sequences.count,
            inputs.rollout_per_sequence,
            inputs.loss_scale,
            config_numbers(inputs.config),
            only_active,
        )

    def inputs(self, mask: Tensor) -> LossInputs:
        return LossInputs(
            config=config_from_numbers(self.config),
            mask=mask,
            sequences=Sequences.from_segments(self.segment, self.num_sequences),
            advantages=self.advantages,
            weights=self.weights,
            entropy_weights=self.entropy_weights,
            old_logprobs=self.old_logprobs,
            ref_logprobs=self.ref_logprobs,
            rollout_weights=self.rollout_weights,
            surrogate_inputs={} if self.columns is None else dict(zip(self.column_names, self.columns.split(1), strict=True)),
            rollout_per_sequence=self.rollout_per_sequence,
            loss_scale=self.loss_scale,
        )


class HeadOptions(NamedTuple):
    """Options of the computation over chunks."""

    dtype: torch.dtype  # of the products' operands
    logits_dtype: torch.dtype
    batch_invariant: bool
    length: int  # T: tokens per row of the hidden states
    chunk_bytes: int  # 0: chosen from the free memory
    needs_grad: list[bool]  # of the HeadTensors, in their order

    @property
    def precision(self) -> Precision:
        return Precision(self.dtype, self.logits_dtype, self.batch_invariant)

    def chunks(self, tensors: HeadTensors) -> ChunkSize:
        assert tensors.hidden is not None and tensors.weight is not None
        device = tensors.hidden.device
        rows = self.precision.rows_per_chunk(self.chunk_bytes or None, tensors.weight.shape[0], device)
        return ChunkSize(rows, self.precision.tile(device))

    def head(self, tensors: HeadTensors, plan: ChunkPlan, needs_grad: NeedsGrad | None = None) -> DenseHead:
        return DenseHead(tensors, NeedsGrad(*self.needs_grad) if needs_grad is None else needs_grad, self.precision, self.length, plan)


class LossArguments(NamedTuple):
    """The arguments of the operator linear_grpo_loss."""

    tensors: HeadTensors
    rows: RowArguments
    loss: LossTensors
    options: HeadOptions

    @classmethod
    def from_flat(cls, flat: Flat) -> LossArguments:
        values = iter(flat)
        return cls(_take(HeadTensors, values), _take(RowArguments, values), _take(LossTensors, values), _take(HeadOptions, values))

    def flat(self) -> tuple[Argument, ...]:
        return *self.tensors, *self.rows, *self.loss, *self.options

    @classmethod
    def schema(cls) -> str:
        return ", ".join(map(_schema_of, (HeadTensors, RowArguments, LossTensors, HeadOptions)))

    @staticmethod
    def gradients(tensors: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
        """What autograd expects of the operator's backward: the tensors' gradients, and None for every other argument."""
        return *tensors, *_no_gradients(RowArguments, LossTensors, HeadOptions)


class LogprobsArguments(NamedTuple):
    """The arguments of the operator linear_token_logprobs."""

    tensors: HeadTensors
    rows: RowArguments
    options: HeadOptions

    @classmethod
    def from_flat(cls, flat: Flat) -> LogprobsArguments:
        values = iter(flat)
        return cls(_take(HeadTensors, values), _take(RowArguments, values), _take(HeadOptions, values))

    def flat(self) -> tuple[Argument, ...]:
        return *self.tensors, *self.rows, *self.options

    @classmethod
    def schema(cls) -> str:
        return ", ".join(map(_schema_of, (HeadTensors, RowArguments, HeadOptions)))

    @staticmethod
    def gradients(tensors: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
        """What autograd expects of the operator's backward: the tensors' gradients, and None for every other argument."""
        return *tensors, *_no_gradients(RowArguments, HeadOptions)


class BackwardArguments(NamedTuple):
    """The arguments of linear_token_logprobs_backward after the gradients of log-probabilities and entropies."""

    forward: LogprobsArguments
    statistics: RowStatistics

    @classmethod
    def from_flat(cls, flat: Flat) -> BackwardArguments:
        statistics = len(RowStatistics._fields)
        return cls(LogprobsArguments.from_flat(flat[:-statistics]), _take(RowStatistics, iter(flat[-statistics:])))

    def flat(self) -> tuple[Argument, ...]:
        return *self.forward.flat(), *self.statistics

    @classmethod
    def schema(cls) -> str:
        return f"{LogprobsArguments.schema()}, {_schema_of(RowStatistics)}"


def _take(part: type[Part], values: Iterable[Argument]) -> Part:
    """Build a structure from the next values."""
    return part(*islice(values, len(_fields(part))))  # type: ignore[arg-type]  # mypy takes it for tuple(iterable)


def _fields(part: type[tuple[object, ...]]) -> tuple[str, ...]:
    return part._fields  # type: ignore[attr-defined]  # every part is a NamedTuple


def _no_gradients(*parts: type[tuple[object, ...]]) -> tuple[None, ...]:
    return (None,) * sum(len(_fields(part)) for part in parts)


def _schema_of(part: type[tuple[object, ...]]) -> str:
    """The fields as arguments of an operator's schema."""
    annotations = {name: str(getattr(kind, "__forward_arg__", kind)) for name, kind in part.__annotations__.items()}
    return ", ".join(f"{_SCHEMA_TYPES[annotations[name]]} {name}" for name in _fields(part))
