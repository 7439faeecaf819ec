"""prime-rl: a custom loss with every loss type of this package. Written for commit 6deea6385bf07cd86017a34ae1729e49902ddef1 (2026)::

[trainer.loss]
type = "custom"
import_path = "grpo_fast.integrations.prime_rl.policy_loss"
kwargs = { loss_type = "cispo", epsilon_high = 5.0 }
"""

from __future__ import annotations

import dataclasses
from typing import Any

from grpo_fast.integrations.logprobs import logprob_loss
from grpo_fast.loss.config import LossConfig

__all__ = ["policy_loss"]

_USED = {"trainer_logprobs", "inference_logprobs", "advantages", "loss_mask", "ref_logprobs", "loss_weights"}


def policy_loss(inputs: Any, **options: Any) -> Any:
    """Compute the loss of one sequence for prime-rl: the sum over its tokens. prime-rl sums over sequences and divides by its own scale.

    The ratio is taken against the sampler's log-probabilities, the only ones that prime-rl has.

    Args:
        inputs: prime-rl's LossInputs, all [T]; ``loss_weights`` of later versions multiplies each token.
        options: settings of LossConfig. ``aggregation="sequence_mean"`` divides each sequence's sum by its length.

    Returns:
        prime-rl's LossOutputs, with metrics that are 0-d tensors.

    Raises:
        ValueError: names the option, what it was and what was expected.
        ImportError: inputs have an unknown field, of a teacher or of another version.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    given = {field.name for field in dataclasses.fields(inputs) if getattr(inputs, field.name) is not None}
    if not given <= _USED:
        raise ImportError(
            f"grpo_fast.integrations.prime_rl: LossInputs has {', '.join(sorted(given - _USED))}; expected nothing but "
            f"{', '.join(sorted(_USED))}, as at the commit this was written for: it would have no effect."
        )
    config = LossConfig(**{"aggregation": "global_token_mean", **options})
    weights = getattr(inputs, "loss_weights", None)
    reference = getattr(inputs, "ref_logprobs", None)
    if config.entropy_coef != 0:
        raise ValueError(f"entropy_coef is {config.entropy_coef:g}; expected 0: prime-rl passes no entropies with a gradient.")
    penalty = config.beta != 0 or config.squared_log_ratio_coef != 0
    if weights is not None and (penalty or config.surrogate == "vespo"):
        raise ValueError(
            f"beta is {config.beta:g}, squared_log_ratio_coef {config.squared_log_ratio_coef:g} and loss_type {config.loss_type!r} with "
            "loss_weights; expected 0, 0 and another than 'vespo': the weights multiply the policy's term alone here, and are the "
            "sampler's in VESPO's."
        )
    loss, metrics = logprob_loss(
        inputs.trainer_logprobs[None],
        inputs.advantages[None],
        config=config,
        mask=inputs.loss_mask[None],
        old_logprobs=inputs.inference_logprobs[None],
        ref_logprobs=None if reference is None or config.beta == 0 else reference[None],
        rollout_weights=None if weights is None else weights[None],
        num_items=1,
    )
    names = ("ratio_mean", "ratio_max", "clip_low", "clip_high", "clip_region")
    return LossOutputs(loss=loss, metrics={name: metrics[name] for name in names})
