"""Replay of kept sets: completions of truncated sampling are scored over the sets of tokens that they were drawn from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from grpo_fast.generation import Completion, Sampler, SamplerError
from grpo_fast.loss.support import Support

if TYPE_CHECKING:
    from grpo_fast.trainer.config import GRPOConfig
    from grpo_fast.trainer.metrics import MetricAccumulator

__all__ = ["SupportReplay"]

logger = logging.getLogger("grpo_fast")


class SupportReplay:
    """Decides whether kept sets are replayed, and collects those of a rollout.

    With them the policy of the loss is exactly the policy that sampled, also with top-p, top-k and min-p (as in DeepSeek-V3.2,
    arXiv:2512.02556). Without them the loss is that of the whole softmax, and its gradient is biased.

    Args:
        config: the trainer's settings.
        sampler: the trainer's sampler.

    Raises:
        SamplerError: ``replay_support`` is True, sampling is truncated, and the sampler does not return sets.
    """

    def __init__(self, config: GRPOConfig, sampler: Sampler) -> None:
        self.config = config
        setting: object = config.replay_support  # "auto", True or False
        returns = bool(getattr(sampler, "returns_support", False))
        self.wanted = config.truncates and setting is not False and returns
        self._warned = False
        if config.truncates and setting is True and not returns:
            fix = "Fix: a sampler that returns them (each built-in one does), no truncation, or replay_support='auto'."
            raise SamplerError(f"replay_support is True. {self._reason(type(sampler).__name__)} {fix}")
        if config.truncates and not self.wanted:
            self._warn(self._reason(type(sampler).__name__) if setting is not False else "replay_support is False.")

    @property
    def max_truncation_gain(self) -> float:
        """By how much truncation can raise the sampler's log-probability of a token above the loss's, in nats."""
        return 0.0 if self.wanted else self.config.max_truncation_gain

    def of(self, completions: Sequence[Completion], device: torch.device) -> Support | None:
        """Return the sets of all tokens of these completions, one after the other; None if they are not replayed.

        Raises:
            SamplerError: a completion has no sets, although the sampler says that it returns them.
        """
        if not self.wanted:
            return None
        missing = sum(each.support is None for each in completions)
        if missing:
            raise SamplerError(
                f"the sampler returned {missing} of {len(completions)} completions without the sets of kept tokens; expected sets, since "
                "it has returns_support = True and was asked for them. Fix: replay_support=False."
            )
        supports = [each.support for each in completions if each.support is not None]
        return Support.concatenate(supports).to(device) if supports else Support.unrestricted(0, device=device)

    def measure(self, completions: Sequence[Completion], metrics: MetricAccumulator) -> None:
        """Add the mean size of the sets, and the mean probability that they had before truncation."""
        if not self.wanted:
            return
        sizes = torch.cat([each.support.sizes for each in completions if each.support is not None] or [torch.zeros(0, dtype=torch.int64)])
        restricted = sizes[sizes > 0]
        metrics.add_sum("sampling/set_size", restricted.sum(), restricted.numel())
        masses = [mass for each in completions for mass in each.kept_mass or ()]
        if masses:
            metrics.add_sum("sampling/kept_mass", sum(masses), len(masses))

    def _reason(self, sampler: str) -> str:
        return f"Sampling is truncated ({self.config.truncation}), and {sampler} does not return the sets of kept tokens."

    def _warn(self, reason: str) -> None:
        logger.warning(
            "%s The loss is that of the whole softmax, so its gradient is biased, the more the further sampling/kept_mass is below 1. "
            "Fix: a sampler that returns the sets, or top_p=1, top_k=0 and min_p=None.",
            reason,
        )
