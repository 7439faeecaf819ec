"""Forward passes of a micro-batch, packed or padded, that compute its loss or its log-probabilities: from hidden states with the fused head
if the model's head allows it, else from the model's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.utils import logging

from grpo_fast.head.api import linear_grpo_loss, linear_token_logprobs
from grpo_fast.loss.api import GRPOOutput, TokenLogprobs, grpo_loss, token_logprobs
from grpo_fast.loss.config import LossConfig
from grpo_fast.loss.rejection import Rejection
from grpo_fast.models.batch import ForwardBatch, ModelInputs
from grpo_fast.models.lm_head import HeadArguments, HiddenStates, head_of, hidden_states_of
from grpo_fast.models.off_policy import masked_weights
from grpo_fast.models.packing import FLASH, Layout, PackedBatch, attention_of, pack, packing_leak, takes_argument, takes_positions
from grpo_fast.models.router import RouterLoss
from grpo_fast.models.shared_prompts import PromptSharing
from grpo_fast.models.unwrap import eval_mode, inner_model, is_fsdp2, is_sharded
from grpo_fast.ops.invariance import batch_invariant

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

__all__ = ["ModelForward"]

LARGEST_LEAK = 1e-2  # rounding changes logits by less than this; attention to a neighbouring sequence changes them by more than 0.1

logger = logging.get_logger(__name__)
T = TypeVar("T")


class ModelForward:
    """Scores sequences, in the same way for the policy, the old policy and the reference policy.

    Args:
        accelerator: for its device and its autocast.
        pad_token_id: fills the rest of the rows.
        share_prompts: compute the prompt of several sequences of a batch once: True, False, or ``"auto"``: if that saves a fifth of the
            tokens and the model supports it. It takes precedence over ``packing``.
        packing: put several sequences into one row: True, False, or ``"auto"``: if the model runs flash attention.
        fused_head: compute from hidden states where the model's head allows it; False: from logits.
        off_policy_mask_threshold: leave off-policy sequences with a negative advantage out of the surrogate, see
            `off_policy_sequence_mask`; None = none.
        rejections: criteria by which tokens are left out of the surrogate whose current policy is too far from the sampler's.
        router_loss: the auxiliary loss of a mixture of experts, which `loss` adds; None = none.
        logits_dtype: of the fused head, see linear_grpo_loss.
        invariant: compute the fused head with `batch_invariant`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        pad_token_id: int,
        *,
        share_prompts: bool | Literal["auto"] = "auto",
        packing: bool | Literal["auto"] = "auto",
        fused_head: bool = True,
        off_policy_mask_threshold: float | None = None,
        rejections: Sequence[Rejection] = (),
        router_loss: RouterLoss | None = None,
        logits_dtype: str = "float32",
        invariant: bool = False,
    ) -> None:
        self.accelerator, self.pad_token_id, self.packing = accelerator, pad_token_id, packing
        self._layout: Layout | None = None  # decided with the first batch
        refused = None if router_loss is None else "the load balance of routers counts a prompt for each of its completions"
        self._sharing = PromptSharing(share_prompts, refused=refused)
        self._use_fused_head = fused_head
        self.off_policy_mask_threshold, self.rejections = off_policy_mask_threshold, tuple(rejections)
        self.router_loss = router_loss
        self.logits_dtype, self.invariant = logits_dtype, invariant

    def loss(
        self,
        model: nn.Module,
        batch: ForwardBatch,
        *,
        config: LossConfig,
        num_items: float | Tensor | None = None,
        loss_scale: float = 1.0,
        metrics_on: str = "active",
        router_scale: float = 1.0,
    ) -> GRPOOutput:
        """Compute the differentiable loss of the batch; arguments and result are those of grpo_loss, with N tokens.

        With a ``router_loss``, coefficient * ``router_scale`` * auxiliary loss is added to the loss, and the metrics have ``aux_loss``.
        """
        packed = self.pack(model, batch)
        advantages = packed.per_token(batch.advantages)
        options: dict[str, Any] = {
            "config": config,
            "old_logprobs": batch.tokens.get("old"),
            "ref_logprobs": batch.tokens.get("ref"),
            "mask": packed.per_token(batch.loss_mask),
            "temperature": packed.per_token(batch.temperature),
            "support": batch.support,
            "surrogate_inputs": batch.surrogate_inputs,
            "cu_seqlens": packed.cu_seqlens,
            "num_items": num_items,
            "loss_scale": loss_scale,
            "metrics_on": metrics_on,
        }
        token_ids, threshold = packed.token_ids, self.off_policy_mask_threshold
        policy: dict[str, Any] = {"temperature": options["temperature"], "support": batch.support}
        metrics: dict[str, Tensor] = {}

        def weights(logprobs: Callable[[], TokenLogprobs]) -> Tensor | None:
            if threshold is None and not self.rejections:
                return batch.tokens.get("weights")
            with torch.no_grad():  # the head's product is repeated, but not the model's forward pass
                found, measured = masked_weights(batch, packed, logprobs().logprobs, threshold, self.rejections)
            metrics.update(measured)
            return found

        def from_hidden(hidden: Tensor, head: HeadArguments) -> GRPOOutput:
            precision: dict[str, Any] = {"logits_dtype": self.logits_dtype}
            found = weights(lambda: linear_token_logprobs(hidden, **head, token_ids=token_ids, **policy, **precision))
            return linear_grpo_loss(
                hidden, **head, token_ids=token_ids, advantages=advantages, rollout_weights=found, **options, **precision
            )

        def from_logits(logits: Tensor) -> GRPOOutput:
            found = weights(lambda: token_logprobs(logits, token_ids, **policy))
            return grpo_loss(logits, token_ids, advantages, rollout_weights=found, **options)

        out, output = self._score(model, packed, from_hidden, from_logits, router_logits=self.router_loss is not None)
        total = out.loss
        if self.router_loss is not None:
            aux_loss = self.router_loss.of(output, packed)
            total, metrics["aux_loss"] = total + self.router_loss.coef * router_scale * aux_loss.to(total.device), aux_loss.detach()
        return out._replace(loss=total, metrics={**out.metrics, **metrics}) if metrics else out

    @torch.no_grad()
    def logprobs(self, model: nn.Module, batch: ForwardBatch, *, batch_size: int) -> TokenLogprobs:
        """Compute log-probabilities and entropies of all tokens, [N], each at its sequence's temperature, without gradient or dropout.

        Args:
            batch_size: sequences per forward pass.
        """
        found = []
        starts = range(0, len(batch), batch_size)
        # All processes of a sharded model must run the same number of forward passes: those with fewer sequences score a dummy sequence.
        dummies = max(gather_object([len(starts)])) - len(starts) if is_sharded(model) else 0
        with eval_mode(model):
            for start in starts:
                part = batch.select(range(start, min(start + batch_size, len(batch))))
                found.append(self._logprobs(model, part, part.temperature))
            for _ in range(dummies):
                token = [[self.pad_token_id]]
                dummy = ForwardBatch(token, token, torch.ones(1), torch.zeros(1), torch.zeros(1).bool())
                self._logprobs(model, dummy, dummy.temperature)
        empty = torch.zeros(0, device=self.accelerator.device)
        return TokenLogprobs(torch.cat([f.logprobs for f in found] or [empty]), torch.cat([f.entropy for f in found] or [empty]))

    @torch.no_grad()
    def logprobs_at(self, model: nn.Module, batch: ForwardBatch, temperature: Tensor) -> Tensor:  # [B]; [N]
        """Compute the tokens' log-probabilities at temperatures other than those of the batch."""
        with eval_mode(model):
            return self._logprobs(model, batch, temperature).logprobs

    def logits(self, model: nn.Module, packed: PackedBatch) -> Tensor:  # [N, V]
        """Compute the model's logits of the scored tokens."""
        inputs, scored_at = _scored_positions(model, packed)
        with self.accelerator.autocast():
            return model(**inputs).logits.flatten(0, 1)[scored_at]

    def pack(self, model: nn.Module, batch: ForwardBatch) -> PackedBatch:
        """Pack or pad the batch as this model needs it."""
        device = self.accelerator.device
        if self._layout is None:
            self._layout = self._choose_layout(model, device)
            with eval_mode(model), self.accelerator.autocast():
                self._sharing.decide(model, self.pad_token_id, device)
        shared = self._sharing.pack(model, batch, device)
        if shared is not None:
            return shared
        return pack(batch, layout=self._layout, pad_token_id=self.pad_token_id, device=device)

    @contextmanager
    def unsharded(self, model: nn.Module) -> Iterator[None]:
        """Gather the parameters of the outermost FSDP2 module around a PEFT model, for code that calls the inner model, as `generate` does.
        (The layers gather theirs themselves.)
        """
        if not is_fsdp2(model) or inner_model(model) is model:
            yield
            return
        with torch.no_grad():
            token = torch.full((1, 1), self.pad_token_id, device=self.accelerator.device)
            model(input_ids=token, use_cache=False)  # in its first forward pass FSDP2 learns which module is the outermost
        model.unshard()  # type: ignore[operator]
        try:
            yield
        finally:
            model.reshard()  # type: ignore[operator]

    def _logprobs(self, model: nn.Module, batch: ForwardBatch, temperature: Tensor) -> TokenLogprobs:
        packed = self.pack(model, batch)
        options: dict[str, Any] = {"temperature": packed.per_token(temperature), "support": batch.support}
        return self._score(
            model,
            packed,
            lambda hidden, head: linear_token_logprobs(
                hidden, **head, token_ids=packed.token_ids, logits_dtype=self.logits_dtype, **options
            ),
            lambda logits: token_logprobs(logits, packed.token_ids, **options),
        )[0]

    def _score(
        self,
        model: nn.Module,
        packed: PackedBatch,
        from_hidden: Callable[[Tensor, HeadArguments], T],
        from_logits: Callable[[Tensor], T],
        *,
        router_logits: bool = False,
    ) -> tuple[T, ModelOutput]:
        """Run the model, and call one of the two functions on the hidden states or on the logits of the scored tokens. Return its result,
        and the model's output, with router logits if they are wanted."""
        with self.accelerator.autocast():
            inputs, scored_at = _scored_positions(model, packed)
            if router_logits:
                inputs = {**inputs, "output_router_logits": True}
            found = self._hidden_states(model, inputs)
            if found is None:
                output = model(**inputs)
                return from_logits(output.logits.flatten(0, 1)[scored_at]), output
            hidden = found.hidden.flatten(0, 1)[scored_at]
            with batch_invariant() if self.invariant else nullcontext():
                return from_hidden(hidden, found.head.arguments(hidden)), found.output

    def _hidden_states(self, model: nn.Module, inputs: ModelInputs) -> HiddenStates | None:
        """Run the model up to its head. Return None, with one warning per ModelForward, if the fused head does not support its head."""
        if not self._use_fused_head:
            return None
        try:
            if hasattr(head_of(model).weight, "ds_id"):
                raise ValueError("DeepSpeed ZeRO-3 partitions the head's weight.")
            return hidden_states_of(model, inputs)
        except ValueError as error:
            self._use_fused_head = False
            logger.warning(f"The loss is computed from logits, which takes more memory: {error}")
            return None

    def _choose_layout(self, model: nn.Module, device: torch.device) -> Layout:
        inner = inner_model(model)
        if not takes_positions(inner):
            return "padded_without_positions"
        flash = attention_of(inner) in FLASH
        if self.packing is False or (self.packing == "auto" and not flash):
            return "padded"
        with eval_mode(model), self.accelerator.autocast():
            leak = packing_leak(model, self.pad_token_id, device)
        if leak > LARGEST_LEAK:
            message = f"packed sequences attend to each other with {type(inner).__name__}: logits change by {leak:.2g} with the neighbour"
            if self.packing is True:
                raise ValueError(f"packing is True, but {message}; expected no change. Fix: packing=False, or packing='auto'.")
            logger.warning(f"{message}. They are padded instead.")
            return "padded"
        return "one_row" if flash else "rows"


def _scored_positions(model: nn.Module, packed: PackedBatch) -> tuple[ModelInputs, Tensor]:
    """Return the model's inputs, and the positions of the scored tokens in its flattened output. If the model supports ``logits_to_keep``,
    columns in which no position scores a token are left out of the output."""
    if not takes_argument(inner_model(model), "logits_to_keep"):
        return packed.inputs, packed.scored_at
    width = packed.inputs["input_ids"].shape[1]
    columns, index = torch.unique(packed.scored_at % width, return_inverse=True)
    return {**packed.inputs, "logits_to_keep": columns}, packed.scored_at // width * columns.shape[0] + index
