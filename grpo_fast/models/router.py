"""The load-balancing loss of a mixture of experts (Switch Transformer, arXiv:2101.03961, equations 4 to 6), computed by the function of
transformers that the model itself uses, from the router logits of the forward pass that the loss of the policy makes anyway.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers.utils import logging

from grpo_fast.models.packing import PackedBatch
from grpo_fast.models.unwrap import unwrap

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

__all__ = ["RouterLoss", "make_router_loss"]

_FUNCTION = "load_balancing_loss_func"
_PARAMETERS = ("gate_logits", "num_experts", "top_k", "attention_mask")

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class RouterLoss:
    """The auxiliary loss of a model's routers: ``num_experts_per_tok`` if all experts get the same share of the tokens, more if not.

    Args:
        coef: weight of the auxiliary loss in the loss of a step.
        top_k: experts per token.
        function: transformers' ``load_balancing_loss_func`` of the model's architecture.
    """

    coef: float
    top_k: int
    function: Callable[[tuple[Tensor, ...], int, int, Tensor], Tensor]

    def of(self, output: ModelOutput, packed: PackedBatch) -> Tensor:  # no dimensions
        """Compute the auxiliary loss, without its coefficient, over the tokens of a micro-batch.

        Prompts and the completions in the loss count. Padding does not, nor do completions outside of the loss
        (``mask_truncated_completions``), as in TRL.

        Args:
            output: of the model, called with ``output_router_logits=True``.
            packed: the micro-batch.

        Raises:
            ValueError: the output has no router logits.
        """
        logits: tuple[Tensor, ...] | None = output.get("router_logits")
        if not logits:
            raise ValueError(
                "the model returned no router logits; expected those of every router, for router_aux_loss_coef. "
                "Fix: router_aux_loss_coef=0."
            )
        mask = packed.router_mask.to(logits[0].device)
        return self.function(logits, logits[0].shape[-1], self.top_k, mask)


def make_router_loss(model: nn.Module, coef: float | None = None) -> RouterLoss | None:
    """Return the auxiliary loss of a mixture of experts, or None: for any other model, or with a coefficient of 0.

    Args:
        model: a causal language model of transformers, wrapped or not.
        coef: weight of the auxiliary loss; None = the model's own, ``router_aux_loss_coef`` of its config.

    Raises:
        ValueError: ``coef`` is set, and the model has no auxiliary loss.
    """
    base = unwrap(model)
    text = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    function = getattr(sys.modules.get(type(base).__module__), _FUNCTION, None)
    has_loss = hasattr(text, "output_router_logits") and function is not None
    supported = function is not None and has_loss and tuple(inspect.signature(function).parameters)[:4] == _PARAMETERS
    name = type(base).__name__
    if coef and not supported:
        what = "computes its auxiliary loss in another way than Mixtral" if has_loss else "has no auxiliary loss of routers in transformers"
        raise ValueError(f"router_aux_loss_coef is {coef}, and {name} {what}; expected a mixture of experts. Fix: leave it out.")
    own = next((value for of, key in _coefficients(text, base) if (value := getattr(of, key, None)) is not None), 0.0)
    coef = float(own) if coef is None else coef
    if coef == 0 or not has_loss:
        return None
    if not supported:
        logger.warning(f"The auxiliary loss of the routers of {name} is left out: it is computed in another way than Mixtral's.")
        return None
    top_k = getattr(base, "num_experts_per_tok", None) or text.num_experts_per_tok
    assert function is not None
    return RouterLoss(coef, int(top_k), function)


def _coefficients(text: object, base: object) -> tuple[tuple[object, str], ...]:
    """Where models keep their coefficient: JetMoE has another name, DBRX nests it and copies it to the model."""
    return (text, "router_aux_loss_coef"), (text, "aux_loss_coef"), (base, "router_aux_loss_coef")
