"""The products of a head in one precision: by PyTorch, by this package's C++ product, or in tiles of one shape.

Operands are float32, bfloat16 or float16, and logits may be float32 while the operands have 16 bits. The gradient of float32 logits is
rounded to bfloat16 before its products if the operands are bfloat16, because processors multiply bfloat16 several times as fast as
float32, and the rounding is no larger than that of the operands. On a GPU this also holds for float16. On a CPU a product with float16
operands is computed in float32 anyway, so that the gradient keeps its 32 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

import grpo_fast.ops.product  # noqa: F401  defines the operator
from grpo_fast.head.precision import GPU_TILE, Precision
from grpo_fast.ops import extension
from grpo_fast.ops.rounding import converted_width, rounded_

__all__ = ["CppProducts", "FixedShapeProducts", "Products", "products_for"]


class Products:
    """The products by PyTorch.

    Only NVIDIA's library can return a 16-bit product in float32. For other libraries the operands are converted to float32 first, a part of
    the columns of the logits at a time.
    """

    one_result = True  # whether the whole product is computed at once, so that it may be rounded to the dtype of its result

    def logits(self, out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Compute out = hidden @ weight.T + bias: [n, V] from [n, D], [V, D] and, in the dtype of out, [V]."""
        if out.dtype == hidden.dtype:
            if bias is None:
                torch.mm(hidden, weight.t(), out=out)
            else:
                torch.addmm(bias, hidden, weight.t(), out=out)
            return
        if _returns_float32(out):
            torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
        else:
            rows = hidden.float()
            for part, into in zip(weight.split(converted_width(out)), out.split(converted_width(out), 1), strict=True):
                torch.mm(rows, part.float().t(), out=into)
        if bias is not None:
            out += bias

    def add_logits(self, out: Tensor, adapted: Tensor, weight: Tensor) -> None:
        """Compute out += adapted @ weight.T."""
        if out.dtype == adapted.dtype:
            out.addmm_(adapted, weight.t())
        elif _returns_float32(out):
            torch.addmm(out, adapted, weight.t(), out_dtype=torch.float32, out=out)
        else:
            rows = adapted.float()
            for part, into in zip(weight.split(converted_width(out)), out.split(converted_width(out), 1), strict=True):
                into.addmm_(rows, part.float().t())

    def rounded(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the gradient of float32 logits in the dtype of its products, a 16-bit one or float32; its memory may be reused."""
        if gradient.device.type == "cpu":  # PyTorch's products of bfloat16 also read what stands behind a row
            return gradient.to(dtype)
        return rounded_(gradient, dtype)

    def hidden_gradient(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """Compute gradient @ weight, [n, D], in the dtype of either operand or in float32."""
        return torch.mm(gradient, weight)

    def hidden_gradient_into(self, out: Tensor, gradient: Tensor, weight: Tensor) -> None:
        """Compute out = gradient @ weight, [n, D]."""
        if type(self) is Products and out.dtype == gradient.dtype:
            torch.mm(gradient, weight, out=out)
        else:
            out.copy_(self.hidden_gradient(gradient, weight))

    def weight_gradient(self, total: Tensor, gradient: Tensor, rows: Tensor, *, add: bool) -> None:
        """Compute total = gradient.T @ rows, or with ``add`` total += gradient.T @ rows, float32 [V, D]; with ``one_result`` and without
        ``add`` also in another dtype."""
        beta = int(add)
        if total.dtype == gradient.dtype == rows.dtype:
            total.addmm_(gradient.t(), rows, beta=beta)
        elif _returns_float32(total):
            torch.addmm(total, gradient.t(), rows, beta=beta, out_dtype=torch.float32, out=total)
        else:
            width = converted_width(gradient)
            rows = rows.float()
            for part, into in zip(gradient.split(width, 1), total.split(width), strict=True):
                into.addmm_(part.t().float(), rows, beta=beta)

    def bias_gradient(self, total: Tensor, gradient: Tensor, *, add: bool) -> None:
        """Compute total = gradient.sum(0), or with ``add`` total += gradient.sum(0), float32 [V]."""
        found = gradient.sum(0, dtype=torch.float32)
        total.copy_(total + found if add else found)


class CppProducts(Products):
    """The products by the C++ extension, each element a fixed sequence of operations in float32, whatever is computed beside it."""

    def logits(self, out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        _product(out, hidden, weight.t(), None if bias is None else bias.float())

    def add_logits(self, out: Tensor, adapted: Tensor, weight: Tensor) -> None:
        _product(out, adapted, weight.t(), add=True)

    def rounded(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        return rounded_(gradient, dtype) if dtype == torch.bfloat16 else gradient

    def hidden_gradient(self, gradient: Tensor, weight: Tensor) -> Tensor:
        out = gradient.new_empty(gradient.shape[0], weight.shape[1], dtype=torch.float32)
        _product(out, gradient, weight)
        return out

    def hidden_gradient_into(self, out: Tensor, gradient: Tensor, weight: Tensor) -> None:
        _product(out, gradient, weight)

    def weight_gradient(self, total: Tensor, gradient: Tensor, rows: Tensor, *, add: bool) -> None:
        _product(total, gradient.t(), rows, add=add)

    def bias_gradient(self, total: Tensor, gradient: Tensor, *, add: bool) -> None:
        ones = gradient.new_ones(1, gradient.shape[0])
        _product(total.unsqueeze(0), ones, gradient, add=add)


class FixedShapeProducts(Products):
    """The products by PyTorch, each of ``tile`` tokens: the last tokens are padded with zeros to that number."""

    one_result = False

    def __init__(self, tile: int = GPU_TILE):
        self.tile = tile

    def logits(self, out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        for into, rows in zip(out.split(self.tile), hidden.split(self.tile), strict=True):
            padded = self._room(into)
            super().logits(padded, self._padded(rows), weight, bias)
            self._take(into, padded)

    def add_logits(self, out: Tensor, adapted: Tensor, weight: Tensor) -> None:
        for into, rows in zip(out.split(self.tile), adapted.split(self.tile), strict=True):
            padded = self._padded(into)
            super().add_logits(padded, self._padded(rows), weight)
            self._take(into, padded)

    def hidden_gradient(self, gradient: Tensor, weight: Tensor) -> Tensor:
        found = (super(FixedShapeProducts, self).hidden_gradient(self._padded(x), weight) for x in gradient.split(self.tile))
        return torch.cat([x[: gradient.shape[0] - i * self.tile] for i, x in enumerate(found)])

    def weight_gradient(self, total: Tensor, gradient: Tensor, rows: Tensor, *, add: bool) -> None:
        if not add:
            total.zero_()
        for part, of_part in zip(gradient.split(self.tile), rows.split(self.tile), strict=True):
            super().weight_gradient(total, self._padded(part), self._padded(of_part), add=True)

    def bias_gradient(self, total: Tensor, gradient: Tensor, *, add: bool) -> None:
        if not add:
            total.zero_()
        for part in gradient.split(self.tile):
            super().bias_gradient(total, self._padded(part), add=True)

    def _padded(self, x: Tensor) -> Tensor:
        return x if x.shape[0] == self.tile else torch.nn.functional.pad(x, (0, 0, 0, self.tile - x.shape[0]))

    def _room(self, x: Tensor) -> Tensor:
        return x if x.shape[0] == self.tile else x.new_empty(self.tile, x.stride(0))[:, : x.shape[1]]

    def _take(self, into: Tensor, found: Tensor) -> None:
        if found is not into:
            into.copy_(found[: into.shape[0]])


def products_for(precision: Precision, device: torch.device) -> Products:
    """Return the products of this precision on this device.

    Raises:
        RuntimeError: batch invariance on a CPU without the C++ extension.
    """
    if device.type != "cpu":
        return FixedShapeProducts() if precision.batch_invariant else Products()
    if precision.batch_invariant and not extension.load():
        status = extension.status()
        raise RuntimeError(f"batch_invariant() is in force, but the C++ extension is not usable: {status.why}. {status.fix}")
    if precision.batch_invariant or (precision.widened and extension.load()):
        return CppProducts()
    return Products()


def _product(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, *, add: bool = False) -> None:
    torch.ops.grpo_fast.product_.default(out, a, b, bias, add)


def _returns_float32(out: Tensor) -> bool:
    return out.device.type == "cuda" and torch.version.hip is None
