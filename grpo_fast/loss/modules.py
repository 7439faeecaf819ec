"""The loss over logits as an ``nn.Module`` that holds its settings, and the base class of such modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from grpo_fast.loss.api import GRPOOutput, grpo_loss
from grpo_fast.loss.config import LossConfig
from grpo_fast.loss.token_inputs import checked_scoring
from grpo_fast.loss.validation import check_config, check_metrics_on

__all__ = ["GRPOLoss", "LossModule"]


class LossModule(nn.Module):
    """Base class: holds the settings that do not change from batch to batch. ``temperature`` may be set between two calls."""

    def __init__(
        self,
        config: LossConfig | None = None,
        *,
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        metrics_on: str | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no argument {', '.join(unknown)}; expected config, temperature, softcap, logit_scale and "
                f"metrics_on. Settings of the loss belong in the config: config=LossConfig({next(iter(unknown))}=...)."
            )
        self.config = LossConfig() if config is None else config
        check_config(self.config)
        checked_scoring(temperature, softcap, logit_scale)
        if metrics_on is not None:
            check_metrics_on(metrics_on)
        self.temperature, self.softcap, self.logit_scale, self.metrics_on = temperature, softcap, logit_scale, metrics_on

    def with_settings(self, options: dict[str, Any]) -> dict[str, Any]:
        """Merge the module's settings with the options of a call; the options take precedence."""
        held = {name: getattr(self, name) for name in ("config", "temperature", "softcap", "logit_scale")}
        if self.metrics_on is not None:
            held["metrics_on"] = self.metrics_on
        return {**held, **options}

    def extra_repr(self) -> str:
        return f"loss_type={self.config.loss_type!r}, temperature={self.temperature}"


class GRPOLoss(LossModule):
    """``grpo_fast.grpo_loss`` as a module (GRPO, arXiv:2402.03300).

    Args:
        config: the loss type and its settings; None = LossConfig().
        temperature, softcap, logit_scale, metrics_on: as in grpo_loss; the default of metrics_on is that of grpo_loss.

    Raises:
        TypeError: an argument has the wrong type or is unknown.
        ValueError: a value is out of range; the message names the argument, its value, what was expected and the fix.

    Example:
        >>> loss = GRPOLoss(LossConfig(loss_type="grpo"), temperature=0.7)
        >>> out = loss(torch.randn(2, 3, 8), torch.randint(8, (2, 3)), torch.tensor([1.0, -1.0]))
    """

    def forward(
        self,
        logits: Tensor,  # [B, T, V], [B, T + 1, V] or packed [N, V]
        token_ids: Tensor,  # int64 [B, T] or [N]
        advantages: Tensor,  # [B], [B, T] or [N]
        **options: Any,
    ) -> GRPOOutput:
        """Compute ``grpo_fast.grpo_loss`` with the module's settings.

        Args:
            options: the other keyword arguments of grpo_loss; they take precedence over the module's settings.
        """
        return grpo_loss(logits, token_ids, advantages, **self.with_settings(options))
