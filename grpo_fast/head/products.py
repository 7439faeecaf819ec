"""The matrix products of a head, by the vendor's library: logits of some tokens, and from their gradient those of hidden states and
weights.

Tokens are numbered through: token n of [B, T] stands in row n of the hidden states or, where these have a position more than there are
tokens ([B, T + 1, D], as a model returns them), n // T rows further on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from grpo_fast.head.chunking import Plan

__all__ = ["DenseHead", "Head", "HeadTensors", "ModuleHead", "Wants", "per_row"]

# Only NVIDIA's library gives the sum of a bfloat16 product in float32. For the others this part of the logits' columns at a time is
# converted, or this many where that is less.
CONVERTED_PART, LEAST_CONVERTED = 32, 256
_LOGITS = (torch.float32, torch.bfloat16, torch.float16)


class HeadTensors(NamedTuple):
    """``logits = hidden @ weight.T + bias + adapted @ adapter_weight.T``; or the gradients of these."""

    hidden: Tensor | None  # [B, T or T + 1, D]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None = None  # [V]
    adapted: Tensor | None = None  # [B, T or T + 1, R]
    adapter_weight: Tensor | None = None  # [V, R]


class Wants(NamedTuple):
    """Whose gradients are wanted."""

    hidden: bool
    weight: bool = False
    bias: bool = False
    adapted: bool = False
    adapter_weight: bool = False

    @property
    def states_alone(self) -> bool:
        """Of what differs from token to token, and not of the head."""
        return (self.hidden or self.adapted) and not (self.weight or self.bias or self.adapter_weight)


class Head(Protocol):
    """What the loss over chunks knows of a head."""

    vocabulary: int
    wants: Wants

    def reserve(self, rows: int) -> None:
        """Make room for the logits of so many tokens, once for all chunks."""

    def logits(self, tokens: Tensor | slice, *, keep: bool = False) -> Tensor:
        """[n, V] in memory that may be written over: its own if it is to be kept, else that of the last ones."""

    def add_gradient(self, gradient: Tensor, tokens: Tensor | slice) -> None:
        """From the gradient [n, V] of the logits made last, or kept, the gradients of what made them."""

    def gradients(self) -> HeadTensors:
        """Of everything that wants one, in its own type; 0 where no token reached it."""


class DenseHead:
    """A head whose weight is a matrix. The gradients of weights are accumulated in float32, chunk after chunk; where one chunk is all,
    its product is rounded once, as it comes."""

    def __init__(
        self, tensors: HeadTensors, wants: Wants, dtype: torch.dtype, length: int, plan: Plan, *, group: ProcessGroup | None = None
    ):
        hidden, weight = tensors.hidden, tensors.weight
        assert hidden is not None and weight is not None
        self.tensors, self.wants, self.plan, self.group = tensors, wants, plan, group
        self.length, self.positions = length, hidden.shape[1]
        self.dtype = dtype
        self.weight = weight.to(dtype)
        self.vocabulary = weight.shape[0]
        self.bias = None if tensors.bias is None else tensors.bias.to(dtype)
        self.adapter_weight = None if tensors.adapter_weight is None else tensors.adapter_weight.to(dtype)
        self._buffer = self.weight.new_empty(0)
        self._grads: dict[str, Tensor] = {}

    def reserve(self, rows: int) -> None:
        self._buffer = self.weight.new_empty(rows, self.vocabulary)

    def logits(self, tokens: Tensor | slice, *, keep: bool = False) -> Tensor:
        hidden = self._rows("hidden", tokens)
        out = hidden.new_empty(hidden.shape[0], self.vocabulary) if keep else self._buffer[: hidden.shape[0]]
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=out)
        if self.adapter_weight is not None:
            out.addmm_(self._rows("adapted", tokens), self.adapter_weight.t())
        return out

    def add_gradient(self, gradient: Tensor, tokens: Tensor | slice) -> None:
        if self.wants.hidden:
            self._set_rows("hidden", gradient, self.weight, tokens)
        if self.wants.weight:
            self._accumulate("weight", gradient, self._rows("hidden", tokens))
        if self.wants.bias:
            total = gradient.sum(0, dtype=torch.float32)
            self._grads["bias"] = self._grads["bias"].add_(total) if "bias" in self._grads else total
        if self.adapter_weight is not None:
            if self.wants.adapted:
                self._set_rows("adapted", gradient, self.adapter_weight, tokens)
            if self.wants.adapter_weight:
                self._accumulate("adapter_weight", gradient, self._rows("adapted", tokens))

    def gradients(self) -> HeadTensors:
        self._buffer = self._buffer.new_empty(0)
        out: list[Tensor | None] = []
        for name, x, wanted in zip(HeadTensors._fields, self.tensors, self.wants, strict=True):
            if not wanted or x is None:
                out.append(None)
                continue
            gradient = self._grads.pop(name, None)
            if gradient is None:
                gradient = torch.zeros_like(x, memory_format=torch.contiguous_format)
            elif self.group is not None and name in ("hidden", "adapted"):  # each process has summed over its part of the vocabulary
                torch.distributed.all_reduce(gradient, group=self.group)
            out.append(gradient.to(x.dtype))
        return HeadTensors(*out)

    def _rows(self, name: str, tokens: Tensor | slice) -> Tensor:
        rows = rows_of(getattr(self.tensors, name), tokens, self.length).to(self.dtype)
        if self.plan.only is not None:  # what is under the mask may be NaN, and 0 * NaN would be the weight's gradient
            rows = torch.where(self.plan.only[tokens].unsqueeze(-1), rows, 0)
        return rows

    def _set_rows(self, name: str, gradient: Tensor, weight: Tensor, tokens: Tensor | slice) -> None:
        x: Tensor = getattr(self.tensors, name)
        source = source_rows(tokens, self.length, x)
        if name not in self._grads:
            make = torch.empty if isinstance(source, slice) else torch.zeros  # a slice: all tokens are computed
            self._grads[name] = make(x.shape, dtype=x.dtype if self.group is None else torch.float32, device=x.device)
        rows = self._grads[name].view(-1, x.shape[-1])
        if isinstance(source, slice) and rows.dtype == self.dtype:
            torch.mm(gradient, weight, out=rows[source])
        else:
            rows[source] = torch.mm(gradient, weight).to(rows.dtype)

    def _accumulate(self, name: str, gradient: Tensor, rows: Tensor) -> None:
        """Adds gradient.T @ rows."""
        x: Tensor = getattr(self.tensors, name)
        if self.plan.one_piece and x.dtype == self.dtype:
            self._grads[name] = torch.mm(gradient.t(), rows)
            return
        beta = 1
        if name not in self._grads:
            self._grads[name], beta = torch.empty(x.shape, dtype=torch.float32, device=x.device), 0
        total = self._grads[name]
        if gradient.dtype == torch.float32:
            total.addmm_(gradient.t(), rows, beta=beta)
        elif gradient.device.type == "cuda" and torch.version.hip is None:
            torch.addmm(total, gradient.t(), rows, beta=beta, out_dtype=torch.float32, out=total)
        else:
            rows, width = rows.float(), max(gradient.shape[1] // CONVERTED_PART, LEAST_CONVERTED)
            for part, into in zip(gradient.split(width, 1), total.split(width), strict=True):
                into.addmm_(part.t().float(), rows, beta=beta)


class ModuleHead:
    """A frozen head that offers nothing but its forward (a quantised one): autograd goes through it, chunk by chunk."""

    def __init__(
        self,
        module: Callable[[Tensor], Tensor],
        hidden: Tensor,
        wants: Wants,
        vocabulary: int,
        length: int,
        autocast: torch.dtype | None,  # the caller's: the chunks around it run without
    ):
        self.module, self.hidden, self.wants, self.vocabulary, self.length = module, hidden, wants, vocabulary, length
        self.autocast = autocast
        self._made: tuple[Tensor, Tensor] | None = None
        self._gradient: Tensor | None = None

    def reserve(self, rows: int) -> None:
        """The module makes its own memory."""

    def logits(self, tokens: Tensor | slice, *, keep: bool = False) -> Tensor:
        with torch.enable_grad():
            rows = rows_of(self.hidden, tokens, self.length).detach()
            rows.requires_grad_(self.wants.hidden)
            with torch.autocast(rows.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                logits = self.module(rows)
        if logits.shape != (rows.shape[0], self.vocabulary) or logits.dtype not in _LOGITS:
            raise ValueError(
                f"weight is a callable that made {logits.dtype} {list(logits.shape)} of hidden states {list(rows.shape)}; expected "
                f"float32, bfloat16 or float16 logits [n, V] = {[rows.shape[0], self.vocabulary]}. Pass the forward of the model's head."
            )
        self._made = (rows, logits)
        return logits.detach().clone()  # the module's backward may need its own

    def add_gradient(self, gradient: Tensor, tokens: Tensor | slice) -> None:
        if not self.wants.hidden:
            return
        assert self._made is not None
        rows, logits = self._made
        if self._gradient is None:
            self._gradient = torch.zeros_like(self.hidden, memory_format=torch.contiguous_format)
        source = source_rows(tokens, self.length, self.hidden)
        (self._gradient.view(-1, self.hidden.shape[-1])[source],) = torch.autograd.grad(logits, rows, gradient.to(logits.dtype))

    def gradients(self) -> HeadTensors:
        self._made = None
        gradient = self._gradient
        if self.wants.hidden and gradient is None:
            gradient = torch.zeros_like(self.hidden, memory_format=torch.contiguous_format)
        return HeadTensors(gradient, None)


def source_rows(tokens: Tensor | slice, length: int, hidden: Tensor) -> Tensor | slice:
    """Where the hidden states [B, T or T + 1, D] of these tokens stand in their first two dimensions flattened."""
    if hidden.shape[1] == length:
        return tokens
    if isinstance(tokens, slice):
        tokens = torch.arange(tokens.start, tokens.stop, device=hidden.device)
    return tokens + tokens // max(length, 1)


def rows_of(x: Tensor, tokens: Tensor | slice, length: int) -> Tensor:  # [B, T or T + 1, D] -> [n, D]
    """The hidden states of these tokens. Of a view into longer sequences, as models slice theirs, no other row is copied."""
    source = source_rows(tokens, length, x)
    if x.shape[0] <= 1 or x.stride(0) == x.shape[1] * x.stride(1):
        return x.flatten(0, 1)[source]
    if isinstance(source, slice):
        source = torch.arange(source.start, source.stop, device=x.device)
    positions = max(x.shape[1], 1)
    return x[source // positions, source % positions]


def per_row(g: Tensor, hidden: Tensor) -> Tensor:  # [1, B * T] for [B, T or T + 1, D] -> [B, T or T + 1, 1]
    """A number of each token where its hidden states stand; 0 where there is no token."""
    g = g.reshape(hidden.shape[0], g.numel() // max(hidden.shape[0], 1), 1)
    return torch.nn.functional.pad(g, (0, 0, 0, hidden.shape[1] - g.shape[1]))
