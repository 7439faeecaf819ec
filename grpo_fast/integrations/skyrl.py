"""SkyRL: policy losses for its registry, from its own options. Written for commit 03d74caf396591a62a53528ca9d23a51baffae3c (2026).

Register them in your entry point, before SkyRL checks its configuration, and name one in it::

    from grpo_fast.integrations.skyrl import register

    register()

    trainer.algorithm.policy_loss_type=grpo_fast_regular

    grpo_fast_regular, grpo_fast_dual_clip, grpo_fast_gspo, grpo_fast_cispo, grpo_fast_sapo     as SkyRL's own

SkyRL adds KL and entropy, as it does to its own losses; its loss reductions are part of the advantages that it passes.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from grpo_fast.integrations.logprobs import importance_ratio, logprob_loss, mean_over_tokens
from grpo_fast.loss.config import LossConfig

__all__ = ["POLICY_LOSSES", "policy_loss", "register"]

POLICY_LOSSES = ("regular", "dual_clip", "gspo", "cispo", "sapo")


def register() -> None:
    """Register the losses with SkyRL as ``grpo_fast_<name>``.

    Raises:
        ImportError: skyrl is not installed, or reduces its losses in another way than the version this was written for.
    """
    from skyrl.backends.skyrl_train.utils import ppo_utils

    found = list(inspect.signature(ppo_utils.reduce_loss).parameters)
    if found != ["loss", "loss_mask"]:  # earlier versions expect the loss to be divided: it would have the wrong scale without an error
        raise ImportError(
            f"grpo_fast.integrations.skyrl: SkyRL's reduce_loss takes {', '.join(found)}; expected loss, loss_mask, that is a SkyRL that "
            "scales advantages and sums losses. Fix: a newer SkyRL, or logprob_loss in a policy loss of your own."
        )
    for name in POLICY_LOSSES:
        ppo_utils.PolicyLossRegistry.register(f"grpo_fast_{name}", functools.partial(policy_loss, policy_loss_type=name))


def policy_loss(
    log_probs: Tensor,  # [B, T]
    old_log_probs: Tensor,  # [B, T]
    advantages: Tensor,  # [B, T], scaled so that the sum over tokens is the loss
    config: Any,
    loss_mask: Tensor | None = None,  # [B, T], 0 or 1
    rollout_logprobs: Tensor | None = None,  # [B, T]
    *,
    policy_loss_type: str = "regular",
) -> tuple[Tensor, dict[str, float]]:
    """The function in SkyRL's registry: return the sum over the tokens of a micro-batch, and ``clip_ratio`` with the metrics of SkyRL's own
    off-policy correction.

    Args:
        config: SkyRL's AlgorithmConfig; its options of the loss are read.
        policy_loss_type: one of POLICY_LOSSES.

    Raises:
        ValueError: names the option, what it was and what was expected.
    """
    settings = _settings(policy_loss_type, config)
    mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
    old, weights, more = old_log_probs, None, {}
    if rollout_logprobs is not None:
        from skyrl.backends.skyrl_train.utils.off_policy_correction_utils import apply_off_policy_correction

        ones = torch.ones_like(log_probs)  # in place of a loss, so that the factors of the loss are returned
        weights, kept, more = apply_off_policy_correction(ones, old, rollout_logprobs, mask, config.off_policy_correction)
        weights = (weights * kept).detach()
    if policy_loss_type == "cispo" and config.cispo.cispo_anchor == "rollout":
        old = _rollout_anchor(rollout_logprobs, config)
    loss, metrics = logprob_loss(log_probs, advantages, config=settings, mask=mask, old_logprobs=old, rollout_weights=weights, num_items=1)
    clip_ratio = metrics["clip_region"]
    if policy_loss_type == "cispo":
        ratio = importance_ratio(log_probs, old, mask)
        clip_ratio = mean_over_tokens((ratio < settings.cispo_ratio_low) | (ratio > settings.epsilon_high), mask)
    return loss, {"clip_ratio": 0.0 if policy_loss_type == "sapo" else clip_ratio.item(), **more}


def _settings(policy_loss_type: str, config: Any) -> LossConfig:
    if policy_loss_type not in POLICY_LOSSES:
        raise ValueError(f"policy_loss_type is {policy_loss_type!r}; expected one of {', '.join(POLICY_LOSSES)}.")
    settings = functools.partial(LossConfig, aggregation="global_token_mean")  # with num_items=1 the sum
    if policy_loss_type == "sapo":
        return settings(loss_type="sapo", sapo_temperature_pos=config.sapo.tau_pos, sapo_temperature_neg=config.sapo.tau_neg)
    if policy_loss_type == "cispo":
        low = max(1 - config.cispo.cispo_eps_clip_low, 0.0)
        return settings(loss_type="cispo", epsilon_high=1 + config.cispo.cispo_eps_clip_high, cispo_ratio_low=low)
    settings = functools.partial(settings, epsilon_low=config.eps_clip_low, epsilon_high=config.eps_clip_high)
    if policy_loss_type == "gspo":
        return settings(loss_type="gspo", importance_sampling_level="sequence_token", log_ratio_clamp=10.0)
    return settings(loss_type="dapo", dual_clip=config.clip_ratio_c if policy_loss_type == "dual_clip" else None)


def _rollout_anchor(rollout_logprobs: Tensor | None, config: Any) -> Tensor:
    if rollout_logprobs is None:
        raise ValueError("rollout_logprobs is None; expected [B, T], since cispo_anchor is 'rollout'. Let the sampler return them.")
    if config.off_policy_correction.tis_ratio_type is not None:
        raise ValueError(
            f"tis_ratio_type is {config.off_policy_correction.tis_ratio_type!r}; expected None with cispo_anchor='rollout', whose ratio "
            "is that correction already."
        )
    return rollout_logprobs
