"""The heads: the logits of some tokens, and from the gradient of the logits those of hidden states and weights.

Tokens are indexed over the whole batch: token n of [B, T] is scored by row n of the flattened hidden states [B, T, D], or by row n + n // T
of [B, T + 1, D], which have one more position per sequence, as a model returns them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

import grpo_fast.ops.kept_products  # noqa: F401  defines the operators
from grpo_fast.head.chunking import ChunkPlan
from grpo_fast.head.precision import Precision
from grpo_fast.head.products import CppProducts, products_for
from grpo_fast.loss.vocab_parallel import sum_in_rank_order_
from grpo_fast.ops import huge_pages
from grpo_fast.ops.rounding import first_half

__all__ = ["DenseHead", "Head", "HeadTensors", "ModuleHead", "NeedsGrad", "per_row"]

_LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class HeadTensors(NamedTuple):
    """``logits = hidden @ weight.T + bias + adapted @ adapter_weight.T``; or the gradients of these tensors."""

    hidden: Tensor | None = None  # [B, T or T + 1, D]
    weight: Tensor | None = None  # [V, D]
    bias: Tensor | None = None  # [V]
    adapted: Tensor | None = None  # [B, T or T + 1, R]
    adapter_weight: Tensor | None = None  # [V, R]


class NeedsGrad(NamedTuple):
    """Which of the HeadTensors need a gradient."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    adapted: bool = False
    adapter_weight: bool = False

    @property
    def frozen_head(self) -> bool:
        """Whether only the tensors per token (hidden, adapted) need a gradient, and none of the head's parameters."""
        return (self.hidden or self.adapted) and not (self.weight or self.bias or self.adapter_weight)


class Head(Protocol):
    """The interface of a head in the computation over chunks."""

    vocabulary: int
    needs_grad: NeedsGrad
    bfloat16_gradient: bool  # whether add_gradient() takes the first half of each row of float32 logits as their gradient in bfloat16

    def reserve(self, rows: int) -> None:
        """Allocate memory for the logits of this number of tokens, once for all chunks."""

    def logits(self, tokens: Tensor | slice, *, keep: bool = False) -> Tensor:
        """Compute logits [n, V] that the caller may overwrite: in new memory if ``keep``, else in that of the previous logits."""

    def add_gradient(self, gradient: Tensor, tokens: Tensor | slice) -> None:
        """Add the contribution of the gradient [n, V] of the latest logits, or of kept logits, to the gradients of the tensors."""

    def gradients(self) -> HeadTensors:
        """Return the gradients of the tensors that need one, in their dtypes; 0 where no token contributed."""


class DenseHead:
    """A head whose weight is a matrix. The gradients of weights are accumulated in float32 over the chunks. With a single chunk the product
    is written in the weight's own dtype."""

    def __init__(
        self,
        tensors: HeadTensors,
        needs_grad: NeedsGrad,
        precision: Precision,
        length: int,
        plan: ChunkPlan,
        *,
        group: ProcessGroup | None = None,
    ):
        hidden, weight = tensors.hidden, tensors.weight
        assert hidden is not None and weight is not None
        self.tensors, self.needs_grad, self.plan, self.group = tensors, needs_grad, plan, group
        self.length, self.positions = length, hidden.shape[1]
        self.precision, self.dtype = precision, precision.dtype
        self.products = products_for(precision, hidden.device)
        # The products round the gradient to bfloat16 anyway; the sum of the bias's gradient does not.
        self.bfloat16_gradient = (
            isinstance(self.products, CppProducts) and precision.widened and self.dtype == torch.bfloat16 and not needs_grad.bias
        )
        self.weight = weight.to(self.dtype)
        self.vocabulary = weight.shape[0]
        self.bias = None if tensors.bias is None else tensors.bias.to(precision.logits_dtype)
        self.adapter_weight = None if tensors.adapter_weight is None else tensors.adapter_weight.to(self.dtype)
        self._buffer = self.weight.new_empty(0)
        self._grads: dict[str, Tensor] = {}

    def reserve(self, rows: int) -> None:
        self._buffer = self.precision.new_logits(rows, self.vocabulary, self.weight.device)

    def logits(self, tokens: Tensor | slice, *, keep: bool = False) -> Tensor:
        hidden = self._rows("hidden", tokens)
        rows, device = hidden.shape[0], hidden.device
        out = self.precision.new_logits(rows, self.vocabulary, device) if keep else self._buffer[:rows]
        self.products.logits(out, hidden, self.weight, self.bias)
        if self.adapter_weight is not None:
            self.products.add_logits(out, self._rows("adapted", tokens), self.adapter_weight)
        return out

    def add_gradient(self, gradient: Tensor, tokens: Tensor | slice) -> None:
        if self.needs_grad.bias:
            first = "bias" not in self._grads
            if first:
                self._grads["bias"] = gradient.new_empty(self.vocabulary, dtype=torch.float32)
            self.products.bias_gradient(self._grads["bias"], gradient, add=not first)
        if self.bfloat16_gradient:
            gradient = first_half(gradient, torch.bfloat16)
        elif self.precision.widened:
            gradient = self.products.rounded(gradient, self.dtype)
        if self.needs_grad.hidden:
            self._set_rows("hidden", gradient, self.weight, tokens)
        if self.needs_grad.weight:
            self._accumulate("weight", gradient, self._rows("hidden", tokens))
        if self.adapter_weight is not None:
            if self.needs_grad.adapted:
                self._set_rows("adapted", gradient, self.adapter_weight, tokens)
            if self.needs_grad.adapter_weight:
                self._accumulate("adapter_weight", gradient, self._rows("adapted", tokens))

    def kept_logits(self, tokens: Tensor, columns: Tensor) -> Tensor:
        """Compute float32 logits [n, K] at ``columns`` int64 [n, K] of these tokens; 0 where a column is negative."""
        kept_logits = torch.ops.grpo_fast.kept_logits.default
        logits = kept_logits(self._rows("hidden", tokens), by_rows(self.weight), columns)
        if self.adapter_weight is not None:
            logits += kept_logits(self._rows("adapted", tokens), by_rows(self.adapter_weight), columns)
        if self.bias is not None:
            logits += torch.where(columns >= 0, self.bias[columns.clamp(min=0)].float(), 0)
        return logits

    def add_kept_gradient(self, gradient: Tensor, tokens: Tensor, columns: Tensor) -> None:
        """Add the contribution of the gradient, float32 [n, K], of kept logits to the gradients of the tensors."""
        pairs = [("hidden", "weight", self.weight)]
        if self.adapter_weight is not None:
            pairs.append(("adapted", "adapter_weight", self.adapter_weight))
        for per_token, of_head, weight in pairs:
            if getattr(self.needs_grad, per_token):
                rows, source = self._gradient_rows(per_token, tokens)
                found = torch.ops.grpo_fast.kept_hidden_gradient.default(gradient, by_rows(weight), columns)
                rows[source] = found.to(rows.dtype)
            if getattr(self.needs_grad, of_head):
                self._add_kept(of_head, gradient, self._rows(per_token, tokens), columns)
        if self.needs_grad.bias:  # a weight of one column
            self._add_kept("bias", gradient, torch.ones_like(gradient[:, :1]), columns)

    def _add_kept(self, name: str, gradient: Tensor, rows: Tensor, columns: Tensor) -> None:
        x: Tensor = getattr(self.tensors, name)
        if name not in self._grads:
            self._grads[name] = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        into = self._grads[name].view(x.shape[0], -1)
        torch.ops.grpo_fast.add_kept_weight_gradient_.default(into, gradient, rows, columns)

    def gradients(self) -> HeadTensors:
        self._buffer = self._buffer.new_empty(0)
        out: list[Tensor | None] = []
        for name, x, needed in zip(HeadTensors._fields, self.tensors, self.needs_grad, strict=True):
            if not needed or x is None:
                out.append(None)
                continue
            gradient = self._grads.pop(name, None)
            if gradient is None:
                gradient = torch.zeros_like(x, memory_format=torch.contiguous_format)
            elif self.group is not None and name in ("hidden", "adapted"):  # each process has the sum over its shard of the vocabulary
                sum_in_rank_order_(gradient, self.group)
            out.append(gradient.to(x.dtype))
        return HeadTensors(*out)

    def _rows(self, name: str, tokens: Tensor | slice) -> Tensor:
        rows = rows_of(getattr(self.tensors, name), tokens, self.length).to(self.dtype)
        if self.plan.valid_mask is not None:  # masked hidden states may be NaN, and 0 * NaN would reach the weight's gradient
            rows = torch.where(self.plan.valid_mask[tokens].unsqueeze(-1), rows, 0)
        return rows

    def _gradient_rows(self, name: str, tokens: Tensor | slice) -> tuple[Tensor, Tensor | slice]:
        """Return the gradient of a tensor per token, flattened to rows, and the index of these tokens' rows."""
        x: Tensor = getattr(self.tensors, name)
        source = source_rows(tokens, self.length, x)
        if name not in self._grads:
            make = torch.empty if isinstance(source, slice) else torch.zeros  # with a slice every row is written
            self._grads[name] = make(x.shape, dtype=x.dtype if self.group is None else torch.float32, device=x.device)
        return self._grads[name].view(-1, x.shape[-1]), source

    def _set_rows(self, name: str, gradient: Tensor, weight: Tensor, tokens: Tensor | slice) -> None:
        rows, source = self._gradient_rows(name, tokens)
        if isinstance(source, slice):
            self.products.hidden_gradient_into(rows[source], gradient, weight)
        else:
            rows[source] = self.products.hidden_gradient(gradient, weight).to(rows.dtype)

    def _accumulate(self, name: str, gradient: Tensor, rows: Tensor) -> None:
        """Add gradient.T @ rows to the gradient of a weight."""
        x: Tensor = getattr(self.tensors, name)
        if self.plan.is_single_piece and x.dtype == self.dtype and self.products.one_result:  # no other contribution follows
            self._grads[name] = huge_pages.empty(x.shape, x.dtype, x.device)
            self.products.weight_gradient(self._grads[name], gradient, rows, add=False)
            return
        first = name not in self._grads
        if first:
            self._grads[name] = huge_pages.empty(x.shape, torch.float32, x.device)
        self.products.weight_gradient(self._grads[name], gradient, rows, add=not first)


class ModuleHead:
    """A frozen head without a weight matrix (a quantised one): its forward is called, and autograd runs through it, chunk by chunk."""

    def __init__(
        self,
        module: Callable[[Tensor], Tensor],
        hidden: Tensor,
        needs_grad: NeedsGrad,
        vocabulary: int,
        length: int,
        autocast: torch.dtype | None,  # autocast's dtype at the call; the computation over chunks itself runs without autocast
        logits_dtype: torch.dtype | None = None,  # that the module's logits are converted to; None: they keep theirs
    ):
        self.module, self.hidden, self.needs_grad, self.vocabulary, self.length = module, hidden, needs_grad, vocabulary, length
        self.autocast, self.logits_dtype = autocast, logits_dtype
        self.bfloat16_gradient = False
        self._latest: tuple[Tensor, Tensor] | None = None
        self._gradient: Tensor | None = None

    def reserve(self, rows: int) -> None:
        """Do nothing: the module allocates its logits itself."""

    def logits(self, tokens: Tensor | slice, *, keep: bool = False) -> Tensor:
        with torch.enable_grad():
            rows = rows_of(self.hidden, tokens, self.length).detach()
            rows.requires_grad_(self.needs_grad.hidden)
            with torch.autocast(rows.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                logits = self.module(rows)
        if logits.shape != (rows.shape[0], self.vocabulary) or logits.dtype not in _LOGITS_DTYPES:
            raise ValueError(
                f"weight is a callable that returned {logits.dtype} {list(logits.shape)} for hidden states {list(rows.shape)}; expected "
                f"float32, bfloat16 or float16 logits [n, V] = {[rows.shape[0], self.vocabulary]}. Pass the forward of the model's head."
            )
        self._latest = (rows, logits)
        return logits.detach().to(
            self.logits_dtype or logits.dtype, copy=True
        )  # a copy: the caller overwrites it, and the module's backward may need the original

    def add_gradient(self, gradient: Tensor, tokens: Tensor | slice) -> None:
        if not self.needs_grad.hidden:
            return
        assert self._latest is not None
        rows, logits = self._latest
        if self._gradient is None:
            self._gradient = torch.zeros_like(self.hidden, memory_format=torch.contiguous_format)
        source = source_rows(tokens, self.length, self.hidden)
        (self._gradient.view(-1, self.hidden.shape[-1])[source],) = torch.autograd.grad(logits, rows, gradient.to(logits.dtype))

    def gradients(self) -> HeadTensors:
        self._latest = None
        gradient = self._gradient
        if self.needs_grad.hidden and gradient is None:
            gradient = torch.zeros_like(self.hidden, memory_format=torch.contiguous_format)
        return HeadTensors(gradient)


def source_rows(tokens: Tensor | slice, length: int, hidden: Tensor) -> Tensor | slice:
    """Return the rows of the flattened hidden states [B, T or T + 1, D] that score these tokens."""
    if hidden.shape[1] == length:
        return tokens
    if isinstance(tokens, slice):
        tokens = torch.arange(tokens.start, tokens.stop, device=hidden.device)
    return tokens + tokens // max(length, 1)


def rows_of(x: Tensor, tokens: Tensor | slice, length: int) -> Tensor:  # [B, T or T + 1, D] -> [n, D]
    """Return the hidden states of these tokens. If x is a view into longer sequences, only the rows of the tokens are copied."""
    source = source_rows(tokens, length, x)
    if x.shape[0] <= 1 or x.stride(0) == x.shape[1] * x.stride(1):
        return x.flatten(0, 1)[source]
    if isinstance(source, slice):
        source = torch.arange(source.start, source.stop, device=x.device)
    positions = max(x.shape[1], 1)
    return x[source // positions, source % positions]


def by_rows(weight: Tensor) -> Tensor:
    """Return the weight with contiguous rows, which the operators at single columns need: itself, unless it is a transposed view."""
    return weight if weight.stride(1) == 1 else weight.contiguous()


def per_row(g: Tensor, hidden: Tensor) -> Tensor:  # [1, B * T] for [B, T or T + 1, D] -> [B, T or T + 1, 1]
    """Return one number per token in the layout of the hidden states, and 0 at positions without a token."""
    g = g.reshape(hidden.shape[0], g.numel() // max(hidden.shape[0], 1), 1)
    return torch.nn.functional.pad(g, (0, 0, 0, hidden.shape[1] - g.shape[1]))
