"""OpenRLHF 0.11.2: its ``PolicyLoss``, with its constructor, arguments and results.

    from grpo_fast.integrations.openrlhf import PolicyLoss        # was: from openrlhf.models import PolicyLoss

Differences: with policy_loss_type="gspo" the log-ratio is clamped as in all losses of this package, and a masked token cannot make the
gradient NaN. OpenRLHF's actor adds KL and entropy, as it does to its own loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from grpo_fast.integrations.logprobs import logprob_loss, mean_over_tokens
from grpo_fast.loss.config import LossConfig

__all__ = ["PolicyLoss"]


class PolicyLoss(nn.Module):
    """The clipped policy loss over log-probabilities; arguments are those of OpenRLHF's class.

    Raises:
        ValueError: names the option, its value and what was expected.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Sequence[float] = (0.5, 5.0),
    ):
        super().__init__()
        self.config = LossConfig.like(
            "openrlhf",
            clip_eps_low=clip_eps_low,
            clip_eps_high=clip_eps_high,
            dual_clip=dual_clip,
            token_level_loss=token_level_loss,
            policy_loss_type=policy_loss_type,
        )
        self.token_level_loss = token_level_loss and policy_loss_type == "ppo"
        for name, value, allowed in (
            ("is_correction_level", is_correction_level, ("off", "token", "seq")),
            ("is_correction_mode", is_correction_mode, ("mask", "clip")),
            ("is_correction_gating", is_correction_gating, ("ratio", "binary_kl", "tv")),
        ):
            if value not in allowed:
                raise ValueError(f"PolicyLoss: {name} is {value!r}; expected one of {', '.join(allowed)}.")
        if is_correction_mode == "clip" and (is_correction_level == "seq" or is_correction_gating != "ratio"):
            raise ValueError(
                "PolicyLoss: is_correction_mode is 'clip'; expected 'mask' with a sequence's level or a divergence, which is no weight to "
                "be clamped."
            )
        if is_correction_level != "off" and is_correction_gating != "ratio" and is_correction_threshold[0] > 0:
            raise ValueError(
                f"PolicyLoss: is_correction_threshold is {tuple(is_correction_threshold)}; expected a lower bound of 0 with "
                f"is_correction_gating={is_correction_gating!r}: a divergence is bounded from above."
            )
        self.is_correction_level = is_correction_level
        self.is_correction_mode = is_correction_mode
        self.is_correction_gating = is_correction_gating
        self.is_correction_threshold = tuple(is_correction_threshold)

    def forward(
        self,
        log_probs: Tensor,  # [B, T]
        old_log_probs: Tensor,  # [B, T]
        advantages: Tensor,  # [B, T]
        action_mask: Tensor | None = None,  # [B, T]
        rollout_log_probs: Tensor | None = None,  # [B, T]
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return the loss and the four values that OpenRLHF logs: clip ratio, KL to the old policy, KL to the sampler's policy, and the
        filtered share (None if the correction is off)."""
        mask = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask != 0
        config, old, weights = self.config, old_log_probs, None
        vllm_kl = filtered = None
        if self.is_correction_level != "off":
            if rollout_log_probs is None:
                raise ValueError(
                    f"rollout_log_probs is None; expected [B, T], since is_correction_level is {self.is_correction_level!r}. Pass what the "
                    "sampler gave its tokens."
                )
            if config.level == "token":
                weights, filtered = self._correction(old_log_probs, rollout_log_probs, mask)
                vllm_kl = mean_over_tokens(rollout_log_probs - old_log_probs, mask)
            else:
                old = rollout_log_probs  # OpenRLHF's GSPO then takes its ratio to the sampler
        loss_scale, num_items, aggregation = 1.0, None, config.aggregation
        if self.token_level_loss:
            num_items = None if batch_num_tokens is None else batch_num_tokens / dp_size
        elif global_batch_size is not None:
            aggregation, loss_scale = "sequence_mean", log_probs.shape[0] * dp_size / float(global_batch_size)
        if aggregation != config.aggregation:
            config = dataclasses.replace(config, aggregation=aggregation)
        loss, metrics = logprob_loss(
            log_probs,
            advantages,
            config=config,
            mask=mask,
            old_logprobs=old,
            rollout_weights=weights,
            num_items=num_items,
            loss_scale=loss_scale,
        )
        ppo_kl = mean_over_tokens((old_log_probs - log_probs).detach(), mask)
        return loss, metrics["clip_region"], ppo_kl, vllm_kl, filtered

    @torch.no_grad()
    def _correction(self, old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight that corrects each token for the mismatch of sampler and trainer, and the share of filtered tokens or
        sequences."""
        low, high = self.is_correction_threshold
        by_sequence = self.is_correction_level == "seq"
        log_weight = torch.where(mask, old - rollout, 0)
        if self.is_correction_gating == "ratio":
            statistic = _row_mean(log_weight, mask) if by_sequence else log_weight
            statistic = statistic.exp()
        else:
            p = torch.where(mask, rollout, 0).exp().clamp(1e-6, 1 - 1e-6)
            q = torch.where(mask, old, 0).exp().clamp(1e-6, 1 - 1e-6)
            statistic = (p - q).abs()
            if self.is_correction_gating == "binary_kl":
                statistic = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
            if by_sequence:
                statistic = _row_mean(statistic, mask)
        outside = (statistic < low) | (statistic > high)
        share = outside.float().mean() if by_sequence else mean_over_tokens(outside, mask)
        if self.is_correction_mode == "clip":
            return statistic.clamp(low, high), share
        return log_weight.exp().masked_fill(outside, 0.0), share


def _row_mean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
