"""Importance ratios at their level, GMPO's clipped log-ratios, and the weight that VESPO makes from a sequence's log-ratios."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo_fast.loss.config import LossConfig
from grpo_fast.loss.sequences import Sequences

__all__ = ["gmpo_log_ratio", "importance_log_ratio", "vespo_phi"]


def importance_log_ratio(log_ratio: Tensor, mask: Tensor, sequences: Sequences, level: str) -> Tensor:
    """Return the log of the importance ratio of each token at the given level of ``LossConfig.importance_sampling_level``.

    Args:
        log_ratio: log p - log p_old of each token; 0 where the mask is False.
        level: ``"token"``; ``"sequence"``, the mean over the sequence (GSPO, arXiv:2507.18071); or ``"sequence_token"``, the value of that
            mean with the gradient of the token's own log-probability (GSPO-token, section 4.3 there).
    """
    if level == "token":
        return log_ratio
    # In float64, as is what backward adds over a sequence: the order of a sum depends on padding and packing, and float32 would show it.
    exact = log_ratio.double() if log_ratio.device.type == "cpu" else log_ratio
    mean = sequences.mean(exact, mask).expand_as(log_ratio).to(log_ratio.dtype)
    if level == "sequence":
        return mean
    own_gradient = (log_ratio - log_ratio.detach()).nan_to_num(nan=0.0)  # value 0; inf - inf where old_logprobs is -inf
    return mean.detach() + own_gradient


def gmpo_log_ratio(log_ratio: Tensor, advantages: Tensor, config: LossConfig) -> Tensor:
    """Return the log-ratios of GMPO (arXiv:2507.20673), clipped where they have moved too far in the direction of the advantage: at most
    ``epsilon_high`` for a positive advantage, at least ``-epsilon_low`` for a negative one.
    """
    too_high = (advantages > 0) & (log_ratio > config.epsilon_high)
    too_low = (advantages < 0) & (log_ratio < -config.epsilon_low)
    return log_ratio.masked_fill(too_high, config.epsilon_high).masked_fill(too_low, -config.epsilon_low)


def vespo_phi(log_ratio: Tensor, advantages: Tensor, log_rollout: Tensor | None, sequences: Sequences, config: LossConfig) -> Tensor:
    """Return VESPO's weight of each token's sequence (arXiv:2602.10693), without gradient.

    ``phi = W^k exp(lambda (1 - W))``, where W is the product of the sequence's ratios and rollout weights, and (k, lambda) are chosen by
    the sign of the advantage. Phi contains the rollout weights, so the loss must not multiply by them again.

    Args:
        log_ratio: log p - log p_old of each token; 0 where the token is masked.
        log_rollout: the log of the sequence's rollout weight, see ``LossInputs.log_rollout``; None without rollout weights.
    """
    lowest, clamp = math.log(1e-8), config.log_ratio_clamp
    log_w = sequences.total(log_ratio.detach().clamp(-clamp, clamp))
    log_w = (log_w if log_rollout is None else log_w + log_rollout).clamp(lowest, clamp)
    positive = advantages >= 0
    k = torch.full_like(positive, config.vespo_k_neg, dtype=log_w.dtype).masked_fill(positive, config.vespo_k_pos)
    lam = torch.full_like(positive, config.vespo_lambda_neg, dtype=log_w.dtype).masked_fill(positive, config.vespo_lambda_pos)
    lam = lam.clamp(min=1e-4)
    return (lam + k * log_w - lam * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
