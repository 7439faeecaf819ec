"""The arguments of a loss other than the logits, validated and in one form, and what the kernels derive from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from grpo_fast.loss.config import LossConfig
from grpo_fast.loss.importance import vespo_phi
from grpo_fast.loss.sequences import Sequences

__all__ = ["LossInputs"]


@dataclass(frozen=True)
class LossInputs:
    """The inputs of the loss other than the logits; tensors are ``[B, T]`` (packed: ``[1, N]``) or broadcastable to that."""

    config: LossConfig
    mask: Tensor  # bool, exactly [B, T]: the unmasked tokens
    sequences: Sequences
    advantages: Tensor
    weights: Tensor  # weight of each token in the loss, see aggregation_weights
    entropy_weights: Tensor  # weight of each token in the entropy bonus
    old_logprobs: Tensor | None = None  # None: on-policy
    ref_logprobs: Tensor | None = None
    rollout_weights: Tensor | None = None
    surrogate_inputs: dict[str, Tensor] = field(default_factory=dict)  # of a custom surrogate; float32, float64 in the reference
    rollout_per_sequence: bool = False  # the rollout weights are one number per sequence, shared by its tokens
    loss_scale: float = 1.0

    def active(self) -> Tensor:
        """Return the tokens that can change the gradient, bool ``[B, T]``.

        With a KL penalty, a squared log-ratio, an entropy bonus or a custom surrogate that needs no advantage these are all unmasked
        tokens, else those with an advantage other than 0. Where a ratio or a weight is made from a whole sequence, all unmasked tokens of a
        sequence are active if one of them has an advantage other than 0.
        """
        if self.config.needs_all_tokens:
            return self.mask
        active = self.mask & (self.advantages != 0)
        if self.config.level != "token" or self.config.surrogate == "vespo":
            active = self.mask & (self.sequences.total(active.float()) > 0)
        return active

    def active_fraction(self) -> Tensor:
        """Return the share of the unmasked tokens that are active, 0-d float32."""
        return self.active().sum() / self.mask.sum().clamp(min=1)

    def packed(self) -> LossInputs:
        """Return the same inputs with every tensor ``[1, N]``, the sequences of a padded batch one after the other."""
        shape = self.mask.shape
        sequences = self.sequences
        if sequences.segment is None:
            ends = torch.arange(shape[0] + 1, device=self.mask.device) * shape[1]
            sequences = Sequences(self.mask.reshape(1, -1), ends)
        return self._map(lambda x: x.expand(shape).reshape(1, -1), sequences)

    def take(self, tokens: Tensor | slice) -> LossInputs:
        """Select some tokens of packed inputs, in the given order. The weights stay those of the whole batch."""
        return self._map(lambda x: x[:, tokens], self.sequences.take(tokens))

    def _map(self, change: Callable[[Tensor], Tensor], sequences: Sequences) -> LossInputs:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        changed: dict[str, Any] = {name: change(x) for name, x in values.items() if isinstance(x, Tensor)}
        changed["surrogate_inputs"] = {name: change(x) for name, x in self.surrogate_inputs.items()}
        return replace(self, sequences=sequences, **changed)

    @property
    def needs_two_passes(self) -> bool:
        """Whether no kernel knows the surrogate, so that the statistics of the tokens come first and the gradient of the logits after."""
        return self.config.custom is not None

    def token_level(self) -> LossInputs | None:
        """Return inputs with token-level ratios that have the same loss and gradient; None if there are none.

        There are none where a token's gradient depends on the log-probabilities of other tokens. On-policy every ratio is 1 at every level,
        and only its derivative differs: with a sequence-level ratio each token receives the mean of the sequence's advantages, and VESPO's
        weight is a constant.
        """
        config = self.config
        if config.level == "token" and config.surrogate != "vespo":
            return self
        on_policy = self.old_logprobs is None
        if not on_policy or (config.level == "sequence" and config.beta != 0 and config.bias_corrected_kl):
            return None
        if config.surrogate == "vespo":
            zero = torch.zeros_like(self.weights.expand(self.mask.shape))
            phi = torch.where(self.mask, vespo_phi(zero, self.advantages, self.log_rollout(self.mask), self.sequences, config), 0)
            return replace(self, config=replace(config, loss_type="reinforce"), advantages=phi * self.advantages, rollout_weights=None)
        if config.level == "sequence_token" or config.surrogate == "cispo":  # the derivative is that of the token's own ratio
            return replace(self, config=replace(config, importance_sampling_level="token"))
        if config.surrogate == "sapo" or config.custom is not None:  # SAPO's value depends on the sign of each token's advantage, a custom
            return None  # one on anything: the mean does not keep it
        advantages = self.advantages if self.rollout_weights is None else self.advantages * self.rollout_weights
        mean = self.sequences.mean(torch.where(self.mask, advantages, 0), self.mask)
        if config.surrogate == "gmpo":  # a ratio of 1 is not clipped
            settings: dict[str, Any] = {"loss_type": "grpo", "epsilon_low": 0.2, "epsilon_high": 0.2}
            settings["aggregation"] = config.resolved_aggregation
        else:
            settings = {}
        config = replace(config, importance_sampling_level="token", **settings)
        return replace(self, config=config, advantages=mean, rollout_weights=None)

    def log_rollout(self, computed: Tensor) -> Tensor | None:
        """Return the log of each sequence's rollout weight for ``vespo_phi``: of the product over its tokens, or of its single weight."""
        if self.rollout_weights is None:
            return None
        logs = torch.where(computed, self.rollout_weights, 1).log().clamp(math.log(1e-8), self.config.log_ratio_clamp)
        return self.sequences.mean(logs, computed) if self.rollout_per_sequence else self.sequences.total(logs)
