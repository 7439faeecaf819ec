"""The loss from hidden states as an ``nn.Module`` that holds its settings."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from grpo_fast.head.api import linear_grpo_loss
from grpo_fast.head.validation import check_logits_dtype
from grpo_fast.loss.api import GRPOOutput
from grpo_fast.loss.config import LossConfig
from grpo_fast.loss.modules import LossModule

__all__ = ["LinearGRPOLoss"]


class LinearGRPOLoss(LossModule):
    """gf.linear_grpo_loss as a module: the loss from hidden states and the weight of the LM head, which remains a parameter of the model.

    Args:
        config: the loss type and its settings; None = LossConfig().
        logits_dtype, temperature, softcap, logit_scale, metrics_on: as in gf.linear_grpo_loss, which has the defaults.

    Raises:
        TypeError, ValueError: names the argument, what it was, what was expected and the fix.

    Example:
        >>> head, loss = torch.nn.Linear(4, 8, bias=False), LinearGRPOLoss(temperature=0.7)
        >>> out = loss(torch.randn(2, 3, 4), head.weight, torch.randint(8, (2, 3)), torch.tensor([1.0, -1.0]))
    """

    def __init__(self, config: LossConfig | None = None, *, logits_dtype: str = "float32", **settings: Any):
        super().__init__(config, **settings)
        check_logits_dtype(logits_dtype)
        self.logits_dtype = logits_dtype

    def forward(
        self,
        hidden: Tensor,  # [B, T, D], [B, T + 1, D] or packed [N, D]
        weight: Tensor,  # [V, D]
        token_ids: Tensor,  # int64 [B, T] or [N]
        advantages: Tensor,  # [B], [B, T] or [N]
        **options: Any,
    ) -> GRPOOutput:
        """Compute gf.linear_grpo_loss with the module's settings. Its other keyword arguments may be given as options."""
        return linear_grpo_loss(hidden, weight, token_ids, advantages, **{"logits_dtype": self.logits_dtype, **self.with_settings(options)})
