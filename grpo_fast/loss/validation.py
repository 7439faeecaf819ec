"""Validation of a loss call: from the caller's arguments to LossInputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from grpo_fast.loss import checks
from grpo_fast.loss.aggregation import aggregation_weights
from grpo_fast.loss.config import LossConfig
from grpo_fast.loss.inputs import LossInputs
from grpo_fast.loss.sequences import Sequences
from grpo_fast.loss.token_inputs import TokenBatch, check_cu_seqlens

__all__ = ["check_config", "check_metrics_on", "validated_loss_inputs"]

MEANING_OF_NUM_ITEMS = "It is the number of unmasked tokens in the whole optimiser step."


def validated_loss_inputs(
    tokens: TokenBatch,
    advantages: Tensor,  # [B], [B, T] or [N]
    *,
    config: LossConfig,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_weights: Tensor | None,
    surrogate_inputs: Mapping[str, Tensor] | None = None,
    cu_seqlens: Tensor | None,
    num_items: int | float | Tensor | None,
    loss_scale: float,
    metrics_on: str,
) -> LossInputs:
    """Validate the arguments of a loss other than its ``tokens``, and return them as LossInputs.

    Raises:
        TypeError, ValueError: names the argument, what it was, what was expected and the fix.
    """
    check_config(config)
    if config.beta != 0 and ref_logprobs is None:
        raise ValueError(
            f"ref_logprobs is None; expected a tensor like the mask, since config.beta = {config.beta:g}. Pass them, or set beta=0."
        )
    check_metrics_on(metrics_on)
    columns = _checked_surrogate_inputs(surrogate_inputs, tokens, config, has_reference=ref_logprobs is not None)
    loss_scale = checks.finite("loss_scale", loss_scale, "Multiply the loss by a tensor afterwards.", most=checks.LARGEST_FLOAT32)
    _check_cu_seqlens(cu_seqlens, tokens, config)
    sequences = Sequences(tokens.mask, cu_seqlens)
    weights, entropy_weights = _weights(tokens, sequences, config, num_items)
    inputs = LossInputs(
        config=config,
        mask=tokens.mask,
        sequences=sequences,
        advantages=tokens.per_token("advantages", advantages, like_sequences=True),
        weights=weights,
        entropy_weights=entropy_weights,
        old_logprobs=tokens.optional("old_logprobs", old_logprobs),
        ref_logprobs=tokens.optional("ref_logprobs", ref_logprobs),
        rollout_weights=tokens.optional("rollout_weights", rollout_weights, one_column=True),
        surrogate_inputs=columns,
        rollout_per_sequence=rollout_weights is not None and not tokens.packed and rollout_weights.shape != tokens.shape,
        loss_scale=loss_scale,
    )
    if checks.value_checks_wanted(tokens.scored):
        _check_values(tokens, inputs)
    return inputs


def _checked_surrogate_inputs(
    given: Mapping[str, Tensor] | None, tokens: TokenBatch, config: LossConfig, *, has_reference: bool
) -> dict[str, Tensor]:
    if config.custom is None:
        if given:
            raise ValueError(
                f"surrogate_inputs has {', '.join(map(repr, given))} with loss_type={config.loss_type!r}; expected None: only a custom "
                "surrogate takes any. Fix: LossConfig(loss_type='custom', surrogate=...)."
            )
        return {}
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"surrogate_inputs is a {type(given).__name__}; expected a dictionary from names to tensors.")
    config.custom.check_inputs(given or {}, has_reference=has_reference)
    return {name: _checked_column(f"surrogate_inputs[{name!r}]", x, tokens) for name, x in (given or {}).items()}


def _checked_column(name: str, x: Tensor, tokens: TokenBatch) -> Tensor:
    if isinstance(x, Tensor) and not x.is_floating_point() and not x.is_complex():  # bool or whole numbers
        x = x.float()
    return tokens.per_token(name, x, like_sequences=True, one_column=True)


def check_config(config: LossConfig) -> None:
    """Raise TypeError unless config is a LossConfig, whose settings were checked when it was constructed."""
    if not isinstance(config, LossConfig):
        raise TypeError(f"config is a {type(config).__name__}; expected a LossConfig, for example LossConfig(loss_type='dapo').")


def check_metrics_on(metrics_on: str) -> None:
    """Raise ValueError unless metrics_on names the tokens to compute: all unmasked ones, or the active ones."""
    if metrics_on not in ("all", "active"):
        raise ValueError(f"metrics_on is {metrics_on!r}; expected 'all' or 'active'.")


def _check_values(tokens: TokenBatch, inputs: LossInputs) -> None:
    """Raise ValueError if an unmasked token has an advantage, weight or log-probability that would make the loss NaN.

    A log-probability of -inf is allowed, since a sampler or a reference model may return it: the log-ratio is clamped.
    """
    for name, finite, x in (
        ("advantages", True, inputs.advantages),
        ("old_logprobs", False, inputs.old_logprobs),
        ("ref_logprobs", False, inputs.ref_logprobs),
        ("rollout_weights", True, inputs.rollout_weights),
    ):
        if x is None:
            continue
        total = x.sum().item()  # one fast pass; not finite if an element is not
        if total - total == 0 or (not finite and total == total):
            continue
        bad = tokens.mask & ~(x.isfinite() if finite else ~x.isnan())
        if bool(bad.any()):
            where = checks.first_index(bad)
            value, expected = x.expand_as(bad)[tuple(where)].item(), "a finite number" if finite else "a log-probability"
            raise ValueError(
                f"{name} of token {tokens.given_index(where)} is {value}; expected {expected} on every unmasked token. Correct where they "
                "are computed, or set the mask to 0 there."
            )


def _check_cu_seqlens(cu_seqlens: Tensor | None, tokens: TokenBatch, config: LossConfig) -> None:
    if cu_seqlens is None:
        by_sequence = (
            config.level != "token" or config.surrogate == "vespo" or config.resolved_aggregation not in ("token_mean", "global_token_mean")
        )
        if tokens.packed and by_sequence:
            raise ValueError(
                f"cu_seqlens is None; expected int32 [S + 1], since loss_type={config.loss_type!r} needs the sequences and the input is "
                "packed. Pass where the sequences begin, 0 ... N, or give a padded batch."
            )
        return
    mask = tokens.mask.squeeze(0) if tokens.packed else tokens.mask
    check_cu_seqlens(cu_seqlens, mask, "token_ids", scored=tokens.name)


def _checked_num_items(num_items: int | float | Tensor, tokens: TokenBatch) -> float | Tensor:
    """Return num_items as a number or a 0-d tensor. It is 0 if every token of the optimiser step is masked; the loss is then 0."""
    if not isinstance(num_items, Tensor):
        return checks.not_negative("num_items", num_items, MEANING_OF_NUM_ITEMS, expected="a number or a 0-d tensor")
    if num_items.dim() != 0:
        raise ValueError(f"num_items has shape {list(num_items.shape)}; expected one number. Sum it over the batches first.")
    if num_items.is_complex() or num_items.dtype == torch.bool:
        raise TypeError(f"num_items has dtype {num_items.dtype}; expected an integer or floating-point type. {MEANING_OF_NUM_ITEMS}")
    if num_items.device.type != "cpu":  # a 0-d CPU tensor is copied to any device without a synchronisation
        checks.tensor("num_items", num_items, like=tokens.scored, like_name=tokens.name, floating=False)
    if checks.value_checks_wanted(num_items) and not 0 <= num_items.item() < float("inf"):
        raise ValueError(f"num_items is {num_items.item()}; expected a finite number >= 0. {MEANING_OF_NUM_ITEMS}")
    return num_items


def _weights(tokens: TokenBatch, sequences: Sequences, config: LossConfig, num_items: int | float | Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the weights of the tokens in the loss and in the entropy bonus, broadcastable to ``[B, T]``."""
    if num_items is not None:
        num_items = _checked_num_items(num_items, tokens)
    dtype = torch.float64 if tokens.scored.dtype == torch.float64 else torch.float32
    weights = aggregation_weights(config.resolved_aggregation, tokens.mask, sequences, num_items, config.max_completion_length, dtype)
    if config.entropy_coef == 0 or config.entropy_aggregation == "same":
        return weights, weights
    return weights, aggregation_weights(config.entropy_aggregation, tokens.mask, sequences, dtype=dtype)
