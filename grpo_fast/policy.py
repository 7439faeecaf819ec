"""What a loss needs to know of the tokens beside their logits, checked: from the caller's arguments to a Policy."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast import checks
from grpo_fast.config import LossConfig
from grpo_fast.inputs import TokenInputs
from grpo_fast.reference import Policy, Sequences, aggregation_weights

__all__ = ["checked_policy"]


def checked_policy(
    inputs: TokenInputs,
    advantages: Tensor,  # [B], [B, T] or [N]
    *,
    config: LossConfig,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    num_items: int | float | Tensor | None,
    loss_scale: float,
    metrics_on: str,
) -> Policy:
    """The arguments of grpo_loss as its docstring has them, as tensors broadcastable to [B, T].

    Raises:
        TypeError, ValueError: names the argument, what it was, what was expected and the cure.
    """
    _check_settings(config, ref_logprobs, metrics_on, loss_scale)
    sequences = Sequences(inputs.token_ids, _checked_cu_seqlens(cu_seqlens, inputs, config))
    weights, entropy_weights = _weights(inputs, sequences, config, num_items)
    return Policy(
        config=config,
        mask=inputs.mask,
        sequences=sequences,
        advantages=inputs.per_token("advantages", advantages, like_sequences=True),
        weights=weights,
        entropy_weights=entropy_weights,
        old_logprobs=inputs.optional("old_logprobs", old_logprobs),
        ref_logprobs=inputs.optional("ref_logprobs", ref_logprobs),
        rollout_weights=inputs.optional("rollout_weights", rollout_weights, one_column=True),
        rollout_per_sequence=rollout_weights is not None and not inputs.packed and rollout_weights.shape != inputs.shape,
        loss_scale=loss_scale,
    )


def _check_settings(config: LossConfig, ref_logprobs: Tensor | None, metrics_on: str, loss_scale: float) -> None:
    if not isinstance(config, LossConfig):
        raise TypeError(f"config is a {type(config).__name__}; expected a LossConfig, for example LossConfig(loss_type='dapo').")
    if config.beta != 0 and ref_logprobs is None:
        raise ValueError(
            f"ref_logprobs is None; expected a tensor like token_ids, since config.beta = {config.beta:g}. Pass them, or set beta=0."
        )
    if metrics_on not in ("all", "active"):
        raise ValueError(f"metrics_on is {metrics_on!r}; expected 'all' or 'active'.")
    if isinstance(loss_scale, bool) or not isinstance(loss_scale, (int, float, torch.SymFloat)):
        raise TypeError(
            f"loss_scale is {loss_scale!r} ({type(loss_scale).__name__}); expected a number. Multiply the loss by a tensor afterwards."
        )
    if not abs(loss_scale) <= checks.LARGEST:
        raise ValueError(f"loss_scale is {loss_scale!r}; expected a finite number.")


def _checked_cu_seqlens(cu_seqlens: Tensor | None, inputs: TokenInputs, config: LossConfig) -> Tensor | None:
    if cu_seqlens is None:
        by_sequence = (
            config.level != "token" or config.surrogate == "vespo" or config.resolved_aggregation not in ("token_mean", "global_token_mean")
        )
        if inputs.packed and by_sequence:
            raise ValueError(
                f"cu_seqlens is None; expected int32 [S + 1], since loss_type={config.loss_type!r} speaks of sequences and the input is "
                "packed. Pass where the sequences begin, 0 ... N, or give a padded batch."
            )
        return None
    if not inputs.packed:
        raise ValueError(
            f"cu_seqlens was given with token_ids of shape {list(inputs.shape)}; expected packed input [N]. Drop it for a padded batch."
        )
    checks.tensor("cu_seqlens", cu_seqlens, like=inputs.scored, like_name=inputs.name, floating=False)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}; expected torch.int32. Convert it: cu_seqlens.int().")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}; expected [S + 1]: the first position of each sequence, then N.")
    if checks.value_checks_wanted(cu_seqlens):
        total = inputs.shape[0]
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != total or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(f"cu_seqlens is {cu_seqlens.tolist()}; expected to begin with 0, never to fall, and to end with N = {total}.")
    return cu_seqlens


def _check_num_items(num_items: int | float | Tensor, inputs: TokenInputs) -> None:
    meaning = "It is the number of tokens that count in the whole optimiser step."
    if isinstance(num_items, bool) or not isinstance(num_items, (int, float, Tensor)):
        raise TypeError(f"num_items is {num_items!r} ({type(num_items).__name__}); expected a number or a 0-d tensor. {meaning}")
    if not isinstance(num_items, Tensor):
        checks.positive("num_items", num_items, meaning)
        return
    if num_items.dim() != 0:
        raise ValueError(f"num_items has shape {list(num_items.shape)}; expected one number. Sum it over the batches first.")
    if num_items.is_complex() or num_items.dtype == torch.bool:
        raise TypeError(f"num_items has dtype {num_items.dtype}; expected an integer or floating-point type. {meaning}")
    if num_items.device.type != "cpu":  # a number on the CPU goes anywhere without a synchronisation
        checks.tensor("num_items", num_items, like=inputs.scored, like_name=inputs.name, floating=False)
    if checks.value_checks_wanted(num_items) and not 0 <= num_items.item() < float("inf"):  # 0: nothing counts, and the loss is 0
        raise ValueError(f"num_items is {num_items.item()}; expected a finite number >= 0. {meaning}")


def _weights(
    inputs: TokenInputs, sequences: Sequences, config: LossConfig, num_items: int | float | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of every token in the loss and in the entropy bonus, broadcastable to [B, T]."""
    if num_items is not None:
        _check_num_items(num_items, inputs)
    dtype = torch.float64 if inputs.scored.dtype == torch.float64 else torch.float32
    weights = aggregation_weights(config.resolved_aggregation, inputs.mask, sequences, num_items, config.max_completion_length, dtype)
    if config.entropy_coef == 0 or config.entropy_aggregation == "same":
        return weights, weights
    return weights, aggregation_weights(config.entropy_aggregation, inputs.mask, sequences, dtype=dtype)
