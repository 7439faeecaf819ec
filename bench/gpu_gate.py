"""The correctness gate: sampled rows of a result against float64, before its time is reported."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

GATE_ROWS = 16
FLOAT32_TERMS = 2.0**-18
LENIENT = 16  # other libraries may compute in bfloat16: up to 16 times the allowed error they are timed, and marked as less precise


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of the type at |x|."""
    return torch.finfo(dtype).eps * 2.0 ** x.abs().clamp_min(torch.finfo(dtype).tiny).log2().floor()


def check_gradient(found: Tensor, truth: Tensor, ids: Tensor) -> float:
    """The largest error in units of what is allowed.

    The target's column and the others are held each to their own size, which differ by orders of magnitude: a gradient without the
    others' part would pass otherwise. Allowed: an ulp of the gradient's type, at the largest of the row, and float32's terms.

    Args:
        found: [n, V], of the gradient's type. truth: [n, V], float64. ids: [n].
    """
    columns = ids.unsqueeze(-1)
    error = (found.double() - truth).abs()
    worst = 0.0
    for part, size in (
        (error.gather(-1, columns), truth.gather(-1, columns)),
        (error.scatter(-1, columns, 0.0), truth.scatter(-1, columns, 0.0)),
    ):
        largest = size.abs().amax(-1, keepdim=True)
        ratio = (part / (ulp(largest, found.dtype) + FLOAT32_TERMS * largest)).amax().item()
        worst = max(worst, ratio if ratio == ratio else math.inf)
    return worst


def check_values(found: Tensor, truth: Tensor) -> float:
    """The same for log-probabilities or entropies, by their own type."""
    allowed = (torch.finfo(found.dtype).eps + FLOAT32_TERMS) * truth.abs().clamp_min(1.0)
    worst = ((found.double() - truth).abs() / allowed).amax().item()
    return worst if worst == worst else math.inf


def gate_fields(worst: float, name: str) -> dict[str, Any]:
    """The error for the entry of the result file; raises a ValueError where the result is wrong and no time may be reported."""
    if not worst <= (1 if name.startswith("ours") else LENIENT):
        raise ValueError(f"wrong: off by {worst:.1f} times what is allowed")
    return {"error_of_allowed": worst, **({"less_precise": True} if worst > 1 else {})}


def head_truth(x: Tensor, w: Tensor, ids: Tensor, dx: Tensor, dw: Tensor) -> float:
    """The gradients' largest error in units of what is allowed, for sampled rows of each.

    Logits and their gradients pass through the head in the inputs' type, so p is known to an eps of the largest logit besides its own:
    each product's allowance is that share of the same product with absolute values.

    Args:
        x: [N, D], w: [V, D], ids: [N], of a loss that is the mean of -log p. dx, dw: its gradients.
    """
    rows = torch.linspace(0, len(x) - 1, min(GATE_ROWS, len(x)), device=x.device).round().long()
    wanted = ids[rows]
    lse, largest, some = [], 0.0, []
    for part in x.split(512):
        logits = part.double() @ w.double().t()
        lse.append(logits.logsumexp(-1))
        largest = max(largest, logits.abs().amax().item())
        some.append(logits[:, wanted])
    all_lse, n = torch.cat(lse), len(x)
    eps = torch.finfo(x.dtype).eps

    g_rows = (x[rows].double() @ w.double().t() - all_lse[rows, None]).exp() / n
    g_rows[torch.arange(len(rows)), ids[rows]] -= 1 / n
    g_columns = (torch.cat(some) - all_lse[:, None]).exp() / n  # [N, n]
    g_columns -= (ids[:, None] == wanted) / n
    worst = 0.0
    for found, g, other in ((dx[rows], g_rows, w.double()), (dw[wanted], g_columns.t(), x.double())):
        truth, whole = g @ other, g.abs() @ other.abs()
        ratio = ((found.double() - truth).abs() / (eps * (1 + largest) * whole + eps * truth.abs())).amax().item()
        worst = max(worst, ratio if ratio == ratio else math.inf)
    return worst
