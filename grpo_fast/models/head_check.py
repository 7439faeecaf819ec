"""Check that a model's head is a matrix product with a bias, a scale and a soft cap. Two comparisons are made: of the product at one
position of each row, and of the model's output if known numbers take the place of the head's output. (The logits of an untrained model are
too small to show a soft cap.)
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_head", "probe_values"]

# Largest allowed differences: of the product, relative to the largest logit; of scale and soft cap, relative to each logit.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}
_LARGEST_PROBE = 1000.0


def probe_values(like: Tensor) -> Tensor:  # [B, 1, V] -> [V]
    """Return numbers from -1000 to 1000, denser near 0."""
    return torch.linspace(-1, 1, like.shape[-1], device=like.device).pow(3).mul(_LARGEST_PROBE).to(like.dtype)


@torch.no_grad()
def check_head(
    model_name: str,
    product: Tensor,  # [B, 1, V], hidden @ weight.T + bias
    head_output: Tensor,  # [B, 1, V], of the model's own head
    probe_output: Tensor,  # [B, 1, V], the model's logits with probe_values in place of the head's output
    *,
    softcap: float | None,
    logit_scale: float,
) -> None:
    """Check that a model computes its logits from the hidden states as its weight, bias, scale and soft cap say.

    Raises:
        ValueError: the model computes something else.
    """
    difference = _product_difference(product, head_output) or _function_difference(head_output, probe_output, softcap, logit_scale)
    if difference:
        raise ValueError(
            f"the logits of {model_name} are not f(hidden @ weight.T + bias) with f a scale and a soft cap: {difference}. "
            "Its head computes something else, which is not supported: pass its logits to grpo_loss, or hidden states, weight, softcap "
            "and logit_scale to linear_grpo_loss."
        )


def _product_difference(product: Tensor, head_output: Tensor) -> str | None:
    tolerance = _TOLERANCE.get(head_output.dtype, 1e-3)
    difference, size = (product.float() - head_output).abs().max().item(), head_output.abs().max().item()
    if difference <= tolerance * size < float("inf"):
        return None
    return f"its head differs from hidden @ weight.T + bias by up to {difference:.3g} of {size:.3g}"


def _function_difference(head_output: Tensor, probe_output: Tensor, softcap: float | None, logit_scale: float) -> str | None:
    if probe_output.shape != head_output.shape:
        return f"from {list(head_output.shape)} of its head it made {list(probe_output.shape)}"
    probe, found, tolerance = probe_values(head_output).float(), probe_output.float(), _TOLERANCE.get(head_output.dtype, 1e-3)
    expected = probe * logit_scale
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    excess = ((found - expected).abs() - tolerance * expected.abs()).nan_to_num(float("inf")).flatten()
    worst = int(excess.argmax())
    if excess[worst] <= 0:
        return None
    entry = worst % probe.shape[0]
    return (
        f"with softcap={softcap} and logit_scale={logit_scale:g} its head's {probe[entry]:.4g} should become "
        f"{expected[entry]:.4g}, and became {found.flatten()[worst]:.4g}"
    )
