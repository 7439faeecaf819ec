"""Settings of rollouts that another policy than the trainer's has sampled: rejection, and the sampler as the old policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_fast.loss.rejection import Rejection, parse_rejections
from grpo_fast.models.off_policy import rejected_shares, rejection_factor
from grpo_fast.trainer.metrics import MetricAccumulator
from grpo_fast.trainer.rollout import Rollout
from grpo_fast.trainer.setting_errors import bad_setting

if TYPE_CHECKING:
    from grpo_fast.trainer.config import GRPOConfig

__all__ = ["check_off_policy", "reject", "rejections_of", "require_sampler"]


def check_off_policy(config: GRPOConfig) -> None:
    """Check the settings of rejection, and of the sampler as the old policy.

    Raises:
        ValueError: names the setting, its value, what was expected and how to fix it.
    """
    if config.rollout_rs is None and config.rollout_rs_threshold is not None:
        raise bad_setting("rollout_rs_threshold", config.rollout_rs_threshold, "None without rollout_rs. Fix: rollout_rs='seq_mean_k1'")
    try:
        rejections_of(config)
    except ValueError as error:
        raise ValueError(f"GRPOConfig: {error}") from error
    if not config.bypass_mode:
        if config.squared_log_ratio_coef != 0 and config.updates_per_rollout == 1:
            expected = (
                "0 without bypass_mode, where the old policy is the current one in the only update of a rollout. Fix: bypass_mode=True"
            )
            raise bad_setting("squared_log_ratio_coef", config.squared_log_ratio_coef, f"{expected}, which compares with the sampler")
        return
    if config.vllm_importance_sampling_correction:
        expected = "None or False with bypass_mode, whose ratio to the sampler is the correction: it would be applied twice"
        raise bad_setting("vllm_importance_sampling_correction", True, expected)
    if config.loss_type == "reinforce":
        expected = "a loss with a ratio with bypass_mode. Fix: 'cispo', whose epsilon_high bounds the weight that 'reinforce' lacks"
        raise bad_setting("loss_type", config.loss_type, expected)


def rejections_of(config: GRPOConfig) -> tuple[Rejection, ...]:
    """Return the criteria of ``rollout_rs``."""
    return () if config.rollout_rs is None else parse_rejections(config.rollout_rs, config.rollout_rs_threshold)


def require_sampler(config: GRPOConfig, rollout: Rollout, sampler: object) -> None:
    """Check that the sampler returned the log-probabilities that the settings need.

    Raises:
        ValueError: it did not; the message names the setting and the fix.
    """
    wanted = [name for name, value in (("rollout_rs", config.rollout_rs), ("bypass_mode", config.bypass_mode or None)) if value is not None]
    if wanted and "sampler" not in rollout.tokens:
        expected = f"{type(sampler).__name__} to return the log-probabilities of its tokens (Completion.logprobs), and it returned none"
        raise bad_setting(wanted[0], getattr(config, wanted[0]), f"{expected}. Fix: None or False, or a sampler that does")


def reject(config: GRPOConfig, rows: Rollout, old_logprobs: Tensor, mask: Tensor, metrics: MetricAccumulator) -> Tensor | None:
    """Return the factor of each token's surrogate by ``rollout_rs``, float32 [n], and add the shares that are rejected to the metrics.

    Args:
        config: the settings.
        rows: of a rollout.
        old_logprobs: float32 [n], of the trainer's policy.
        mask: bool [n], the tokens in the loss.
        metrics: where to add the shares.

    Returns:
        None if nothing can be rejected.
    """
    rejections = rejections_of(config)
    if not rejections or config.bypass_mode:  # then the current policy is compared in each step, by `ModelForward`
        return None
    lengths = torch.tensor(rows.lengths)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int().to(mask.device)
    kept = rejection_factor(rejections, old_logprobs, rows.tokens["sampler"], mask, cu_seqlens)
    shares = rejected_shares(kept, mask, cu_seqlens)
    metrics.add_mean("sampling/rejected_tokens", shares["rejected_tokens"], mask.sum())
    metrics.add_mean("sampling/rejected_sequences", shares["rejected_sequences"], float(rows.loss_mask.sum()))
    return kept
