"""verl 0.9.1: policy losses for its registry, and its fused ``linear_cross_entropy`` with a temperature per sample.

Name one of them in verl's configuration. An installed grpo_fast is in verl's plugin group (``verl.plugins``), so verl finds them; else set
``VERL_USE_EXTERNAL_MODULES=grpo_fast.integrations.verl_plugin``::

    actor_rollout_ref.actor.policy_loss.loss_mode=grpo_fast_vanilla

    grpo_fast_vanilla, grpo_fast_gspo, grpo_fast_sapo, grpo_fast_cispo, grpo_fast_gpg     as verl's own, from the same options
    grpo_fast_vespo                                                                       which verl does not have

verl adds KL and entropy, as it does to its own losses. ``algorithm.adv_estimator=grpo_fast`` is verl's ``grpo`` by gf.group_advantages.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from grpo_fast.head.api import linear_token_logprobs
from grpo_fast.integrations.logprobs import importance_ratio, logprob_loss, mean_over_tokens
from grpo_fast.integrations.versions import refuse_other_versions
from grpo_fast.loss.advantages import group_advantages
from grpo_fast.loss.config import LossConfig

__all__ = ["LOSS_MODES", "group_relative_advantages", "linear_cross_entropy", "policy_loss", "register"]

LOSS_MODES = ("vanilla", "gspo", "sapo", "cispo", "gpg", "vespo")
_OPTIONS = ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "tau_pos", "tau_neg")


def register() -> None:
    """Register the losses and the advantages with verl as ``grpo_fast_<mode>`` and ``grpo_fast``.

    With another version of verl they are registered too, and raise an error when they are called: verl ignores a plugin that cannot be
    imported, and would only report an unknown name.

    Raises:
        ImportError: verl is not installed, or has no such registries.
    """
    from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss

    register_adv_est("grpo_fast")(group_relative_advantages)
    for mode in LOSS_MODES:
        register_policy_loss(f"grpo_fast_{mode}")(functools.partial(policy_loss, loss_mode=mode))


def policy_loss(
    old_log_prob: Tensor,  # [B, T]
    log_prob: Tensor,  # [B, T]
    advantages: Tensor,  # [B, T]
    response_mask: Tensor,  # [B, T]
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,  # [B, T]
    *,
    loss_mode: str = "vanilla",
) -> tuple[Tensor, dict[str, float]]:
    """The function in verl's registry: return the loss of a micro-batch, scaled as verl's ``agg_loss`` scales it, and verl's metrics.

    Args:
        config: verl's ActorConfig; its options of the loss and ``global_batch_info`` are read.
        loss_mode: one of LOSS_MODES.

    Raises:
        ValueError: an option has no counterpart; the message names it and the fix.
        ImportError: the installed version of verl is not one that this package was compared with.
    """
    _refuse_other_versions()
    options = {name: getattr(config, name) for name in _OPTIONS if getattr(config, name, None) is not None}
    weights = rollout_is_weights
    if loss_mode == "vespo":
        settings = LossConfig(loss_type="vespo")
    else:
        settings = LossConfig.like("verl", loss_mode=loss_mode, **options)
    aggregation, call = _scaling("seq-mean-token-mean" if loss_mode == "sapo" else loss_agg_mode, response_mask, config.global_batch_info)
    settings = dataclasses.replace(settings, aggregation=aggregation)
    loss, metrics = logprob_loss(
        log_prob, advantages, config=settings, mask=response_mask, old_logprobs=old_log_prob, rollout_weights=weights, **call
    )
    if loss_mode == "gpg":
        return loss, {}
    return loss, _metrics(loss_mode, metrics["clip_region"], log_prob, old_log_prob, advantages, response_mask, options)


def _refuse_other_versions() -> None:
    refuse_other_versions("verl", "grpo_fast.integrations.verl", "With another version, take verl's own loss_mode and adv_estimator.")


def _scaling(mode: str, mask: Tensor, info: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return verl's aggregation as a name of AGGREGATIONS and arguments of the call, from the counts of the whole batch if verl passes
    them."""
    dp_size, tokens, sequences = info.get("dp_size") or 1, info.get("batch_num_tokens"), info.get("global_batch_size")
    if mode == "token-mean":
        _known("batch_num_tokens", tokens, dp_size)
        return "global_token_mean", {"num_items": None if tokens is None else tokens / dp_size}
    if mode == "token-sum":
        return "global_token_mean", {"num_items": 1, "loss_scale": float(dp_size)}
    _known("global_batch_size", sequences, dp_size)
    if mode == "seq-mean-token-mean":
        if sequences is None:
            return "nonempty_sequence_mean", {}
        return "sequence_mean", {"loss_scale": mask.shape[0] * dp_size / float(sequences)}
    if mode not in ("seq-mean-token-sum", "seq-mean-token-sum-norm"):
        raise ValueError(
            f"loss_agg_mode is {mode!r}; expected token-mean, token-sum, seq-mean-token-mean, seq-mean-token-sum or "
            "seq-mean-token-sum-norm."
        )
    norm = float(info.get("loss_scale_factor") or mask.shape[-1]) if mode.endswith("norm") else 1.0
    if sequences is None:
        return "nonempty_sequence_sum", {"loss_scale": 1 / norm}
    return "global_token_mean", {"num_items": 1, "loss_scale": dp_size / (float(sequences) * norm)}


def _known(name: str, value: float | None, dp_size: int) -> None:
    if value is None and dp_size > 1:
        raise ValueError(f"global_batch_info[{name!r}] is None; expected a number with dp_size = {dp_size}.")


def _low(options: dict[str, float]) -> float:
    return float(options.get("clip_ratio_low", options.get("clip_ratio", 0.2)))


@torch.no_grad()
def _metrics(
    loss_mode: str,
    clip_region: Tensor,
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    options: dict[str, float],
) -> dict[str, float]:
    ratio = importance_ratio(log_prob, old_log_prob, mask)
    lower = torch.zeros_like(clip_region)
    if loss_mode == "vanilla":
        lower = mean_over_tokens((ratio > options.get("clip_ratio_c", 3.0)) & (advantages < 0), mask)
    elif loss_mode == "cispo":
        high = float(options.get("clip_ratio_high", options.get("clip_ratio", 0.2)))
        clip_region = mean_over_tokens((ratio < 1 - _low(options)) | (ratio > 1 + high), mask)
    values = torch.stack([clip_region, mean_over_tokens(-ratio.log(), mask), lower]).tolist()  # one synchronisation where verl has three
    return dict(zip(("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"), values, strict=True))


@torch.no_grad()
def group_relative_advantages(
    token_level_rewards: Tensor,  # [B, T]
    response_mask: Tensor,  # [B, T]
    index: Sequence[Hashable],  # [B], the same for the responses to one prompt
    epsilon: float = 1e-6,
    config: Any = None,
    **_: object,
) -> tuple[Tensor, Tensor]:  # [B, T], [B, T]
    """The function in verl's registry of advantages: verl's ``grpo``, and Dr. GRPO with ``norm_adv_by_std_in_grpo=False``.

    Equal rewards give exactly 0, and in verl a rounding error divided by epsilon. A prompt with one response gives 0, and in verl the
    reward.

    Raises:
        ImportError: the installed version of verl is not one that this package was compared with.
    """
    _refuse_other_versions()
    groups: dict[Hashable, int] = {}
    group = torch.tensor([groups.setdefault(name, len(groups)) for name in index], device=token_level_rewards.device)
    order = group.argsort(stable=True)  # the responses of a group need not be adjacent
    offsets = torch.nn.functional.pad(group.bincount(minlength=len(groups)).cumsum(0), (1, 0))
    scale = "group" if config is None or getattr(config, "norm_adv_by_std_in_grpo", True) else "none"
    sorted_rewards = token_level_rewards.sum(-1)[order]
    found = group_advantages(sorted_rewards, group_offsets=offsets, scale=scale, eps=epsilon).advantages
    advantages = torch.empty_like(found).index_copy(0, order, found).unsqueeze(-1) * response_mask
    return advantages, advantages


def linear_cross_entropy(
    hidden: Tensor,  # [B, T, D] or [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # int64 [B, T] or [N]
    temperature: float | Tensor = 1.0,  # number, [B], [B, T] or [N]
    reduction: str = "none",
    dist_process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """verl's ``verl.utils.kernel.linear_cross_entropy.linear_cross_entropy``: log-probability of each label, and the entropy, flattened.

    Logits are float32 and are not rounded to the dtype of the hidden states, as in this kernel of verl's (its head in PyTorch rounds them).
    The temperature may differ from sample to sample or token to token, and hidden may have any width and be on any device.

    Args:
        reduction: ``"none"``; verl's own callers use no other.
        dist_process_group: the processes that share the vocabulary, each with its shard of the weight; None = not split.

    Returns:
        logprobs and entropy, float32 [N], differentiable.

    Raises:
        ValueError: reduction is not "none".
    """
    if reduction.lower() != "none":
        raise ValueError(f"reduction is {reduction!r}; expected 'none'. Sum or average the result.")
    out = linear_token_logprobs(hidden, weight, labels, temperature=temperature, process_group=dist_process_group)
    return out.logprobs.flatten(), out.entropy.flatten()
