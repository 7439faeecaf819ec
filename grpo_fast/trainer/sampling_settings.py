"""What the settings of sampling do to the distribution that completions are drawn from, and whether the loss knows it.

The loss is that of softmax(z/T), over the kept sets of truncated sampling if those are replayed (`SupportReplay`). A penalty makes the
sampler draw from another distribution, which no setting of the loss describes. Importance weights per token correct for it.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from grpo_fast.generation.generation_options import check_generation_options, penalties_of, truncations_of
from grpo_fast.trainer.setting_errors import bad_setting

if TYPE_CHECKING:
    from grpo_fast.trainer.config import GRPOConfig

__all__ = [
    "SamplingSettings",
    "check_generation_kwargs",
    "check_importance_weights",
    "check_rejection",
    "corrects_sampler",
    "warn_of_penalties",
]

logger = logging.getLogger("grpo_fast")


class SamplingSettings:
    """The properties of GRPOConfig that describe the sampler's distribution."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float | None
    repetition_penalty: float
    generation_kwargs: dict[str, Any] | str | None
    sampler: str

    @property
    def generation_arguments(self) -> dict[str, Any]:
        """``generation_kwargs`` as a dictionary: TrainingArguments has parsed JSON from a command line, and None is no argument."""
        assert not isinstance(self.generation_kwargs, str)
        return dict(self.generation_kwargs or {})

    @property
    def truncates(self) -> bool:
        """Whether the sampler draws from a part of the vocabulary, of the most likely tokens (top-p, top-k, min-p, typical-p, ...)."""
        return self.top_p < 1 or self.top_k > 0 or bool(self.min_p) or bool(self._truncations)

    @property
    def truncation(self) -> str:
        """The settings of truncated sampling, for messages."""
        others = "".join(f", {name} = {self.generation_arguments[name]!r}" for name in self._truncations)
        return f"top_p = {self.top_p}, top_k = {self.top_k}, min_p = {self.min_p}{others}"

    @property
    def max_truncation_gain(self) -> float:
        """By how many nats truncation can raise the log-probability of a kept token: minus the logarithm of the least kept probability."""
        return math.inf if self.top_k > 0 or self.min_p or self._truncations else -math.log(self.top_p)

    @property
    def penalises(self) -> bool:
        """Whether the sampler draws from a distribution that neither temperature nor truncation describe."""
        return bool(self._penalties)

    @property
    def penalties(self) -> str:
        """The settings that change the distribution otherwise than by temperature and truncation, for messages."""
        return ", ".join(f"{name} = {value!r:.60}" for name, value in self._penalties.items())

    @property
    def _truncations(self) -> list[str]:
        return truncations_of(self.sampler, self.generation_arguments)

    @property
    def _penalties(self) -> dict[str, object]:
        options = self.generation_arguments
        repetition: dict[str, object] = {} if self.repetition_penalty == 1 else {"repetition_penalty": self.repetition_penalty}
        return repetition | {name: options[name] for name in penalties_of(self.sampler, options)}


def check_generation_kwargs(config: GRPOConfig) -> None:
    """Check ``generation_kwargs`` and ``repetition_penalty``.

    Raises:
        ValueError: names the setting or option, what it was, what was expected and how to fix it.
    """
    if not 0 < config.repetition_penalty < math.inf:
        expected = "a finite number above 0; 1 is no penalty, and more than 1 makes tokens less likely that have occurred"
        raise bad_setting("repetition_penalty", config.repetition_penalty, expected)
    try:
        check_generation_options(config.sampler, config.generation_arguments)
    except ValueError as error:
        raise ValueError(f"GRPOConfig: {error}") from error


def corrects_sampler(config: GRPOConfig, *, own_model: bool) -> bool:
    """Whether importance weights correct for the sampler's distribution: as set, else if it is not that of the loss.

    Args:
        config: the settings.
        own_model: whether the sampler runs the trainer's own model, so that only penalties make a difference.
    """
    if config.bypass_mode:
        return False  # the ratio of the loss is that to the sampler
    corrects = config.vllm_importance_sampling_correction
    return (config.penalises or not own_model) if corrects is None else corrects


def check_importance_weights(config: GRPOConfig, corrects: bool, *, replays: bool) -> None:
    """Check that penalties, and truncated sampling whose sets are not replayed, are not corrected by a weight per sequence.

    Args:
        config: the settings.
        corrects: whether the sampler's distribution is corrected.
        replays: whether the loss is that of the sets of kept tokens, see replay_support.
    """
    mode = str(config.vllm_importance_sampling_mode)
    if corrects and config.truncates and not replays and mode.startswith("sequence"):
        expected = (
            f"a mode per token with truncated sampling ({config.truncation}). Each token's weight is the probability of the kept tokens, "
            "and their product over a sequence vanishes: 0.97 over 512 tokens is 1.7e-7, so that nothing is learned. Fix: 'token_mask', a "
            "sampler whose sets are replayed (replay_support), or no truncation"
        )
        raise bad_setting("vllm_importance_sampling_mode", mode, expected)
    if corrects and config.penalises and mode.startswith("sequence"):
        expected = (
            f"a mode per token with a penalised distribution ({config.penalties}). Each token's weight is its probability in the loss "
            "divided by that under the penalty, and their product over a sequence vanishes or exceeds any bound: nothing is learned. Fix: "
            "'token_mask', or no penalty"
        )
        raise bad_setting("vllm_importance_sampling_mode", mode, expected)


def check_rejection(config: GRPOConfig, *, replays: bool) -> None:
    """Check that a sum over a sequence does not reject every sequence: of what penalties and truncation without its sets differ by.

    Args:
        config: the settings.
        replays: whether the loss is that of the sets of kept tokens, see replay_support.
    """
    sums = [name.strip() for name in (config.rollout_rs or "").split(",") if name.strip().startswith("seq_sum")]
    if not sums or not (config.penalises or (config.truncates and not replays)):
        return
    what = f"penalties ({config.penalties})" if config.penalises else f"truncated sampling ({config.truncation})"
    expected = (
        f"no sum over a sequence with {what}: each token differs by it, so that the sum grows with the length and rejects every long "
        f"sequence. Fix: {sums[0].replace('seq_sum', 'seq_mean')!r}, or a sampler whose sets are replayed (replay_support)"
    )
    raise bad_setting("rollout_rs", config.rollout_rs, expected)


def warn_of_penalties(config: GRPOConfig, corrects: bool) -> None:
    """Log once what penalties do to the ratio and to the gradient; nothing without penalties.

    Args:
        config: the settings.
        corrects: whether the sampler's distribution is corrected.
    """
    if not config.penalises or config.bypass_mode:  # then the ratio is that to the penalised distribution
        return
    what = (
        f"The sampler draws from a penalised distribution ({config.penalties}), and the loss is that of softmax(z/T) without it: the "
        "ratio that is clipped is that of the current to the old policy, without the penalty."
    )
    if corrects:
        bound = config.vllm_importance_sampling_clip_max
        effect = "a weight above it is 0" if str(config.vllm_importance_sampling_mode).endswith("mask") else "larger ones are cut to it"
        limit = "" if bound is None else f" (at most {bound:g}: {effect})"
        logger.warning(
            "%s So each token is weighted by its probability in the loss divided by that under the penalty%s: tokens that the penalty made "
            "rarer count more, and others less.",
            what,
            limit,
        )
    else:
        logger.warning(
            "%s vllm_importance_sampling_correction is False, so the gradient is biased: it trains a policy that has not sampled. Fix: "
            "vllm_importance_sampling_correction=True, or the reward 'repetition' in place of a penalty.",
            what,
        )
