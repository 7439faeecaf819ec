"""This package's LM head in TRL's models: for all trainers (`fused_lm_head`), and for a loss of GRPOTrainer (`install_head_forward`).

Logits are rounded where TRL rounds them: to the dtype of the hidden states, which is float32 with cast_lm_head_to_fp32.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import trl.trainer.utils as trl_utils
from torch import Tensor, nn

from grpo_fast.head.api import linear_grpo_loss, linear_token_logprobs
from grpo_fast.loss.api import GRPOOutput, TokenLogprobs
from grpo_fast.models.lm_head import ModelHead, hidden_states_of

__all__ = ["FusedLogProbFunction", "HeadCall", "fused_lm_head", "install_head_forward"]

_STATISTICS_ROWS = 2**26  # logits that _other_statistics holds at a time


class HeadCall(NamedTuple):
    """The hidden states of one call of a model, and the head that turns them into logits."""

    hidden: Tensor  # [B, L, D]
    head: ModelHead
    temperature: float
    in_float32: bool  # cast_lm_head_to_fp32

    def loss(self, token_ids: Tensor, advantages: Tensor, **options: Any) -> GRPOOutput:
        """Compute linear_grpo_loss of the last T tokens, token_ids [B, T]; ``options`` are those of linear_grpo_loss."""
        hidden = self._hidden_of(token_ids)
        with self._autocast():
            return linear_grpo_loss(
                hidden,
                token_ids=token_ids,
                advantages=advantages,
                temperature=self.temperature,
                logits_dtype="input",  # what TRL rounds to
                **self.head.arguments(hidden),
                **options,
            )

    def logprobs(self, token_ids: Tensor, mask: Tensor) -> TokenLogprobs:
        """Compute linear_token_logprobs of the last T tokens; token_ids and mask [B, T]."""
        hidden = self._hidden_of(token_ids)
        with self._autocast():
            return linear_token_logprobs(
                hidden,
                token_ids=token_ids,
                mask=mask,
                temperature=self.temperature,
                logits_dtype="input",
                **self.head.arguments(hidden),
            )

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.hidden.device.type, enabled=False) if self.in_float32 else nullcontext()

    def _hidden_of(self, token_ids: Tensor) -> Tensor:
        return self.hidden[:, -token_ids.shape[1] - 1 :]


# torch.compile compiles the model's own frames below this call and not the call itself, which replaces the head's forward for its duration.
_hidden_states_of = torch.compiler.disable(hidden_states_of, recursive=False)


def install_head_forward(model: nn.Module, temperature: Callable[[], float], in_float32: bool) -> None:
    """Let ``model(..., fused_lm_head=f)`` run the model and then f on its HeadCall, both within the forward pass that the model's wrappers
    (data parallelism, mixed precision) see. TRL's own ``fused_lm_head=True`` computes TRL's output from the same HeadCall.

    Args:
        temperature: called in each forward pass.
        in_float32: compute the head in float32.
    """
    model_forward = model.forward

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(self: nn.Module, *args: Any, fused_lm_head: Any = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if fused_lm_head is False:
            return model_forward(*args, **kwargs) if labels is None else model_forward(*args, labels=labels, **kwargs)
        run = functools.partial(model_forward, *args)
        hidden, head, output = _hidden_states_of(self, {**kwargs, "use_cache": False}, forward=run)
        call = HeadCall(hidden.float() if in_float32 else hidden, head, temperature(), in_float32)
        aux_loss = output.aux_loss if kwargs.get("output_router_logits") else None
        if callable(fused_lm_head):
            out = fused_lm_head(call)
            return (
                out.loss,
                out,
                aux_loss,
            )  # the loss also as a separate tensor, because some wrappers do not search dataclasses for tensors
        assert labels is not None  # TRL's own call
        targets = labels[:, 1:].to(hidden.device)
        scored = call.logprobs(targets, targets != -100)
        return trl_utils.FusedCausalLMOutput(
            log_probs=scored.logprobs, entropy=scored.entropy, label_mask=targets != -100, aux_loss=aux_loss
        )

    model.forward = types.MethodType(forward, model)


@contextmanager
def fused_lm_head() -> Iterator[None]:
    """Inside, every trainer of TRL that calls its model with ``fused_lm_head=True`` (GRPO, RLOO, DPO, SFT, KTO) computes log-probabilities
    with this package's head, on every device. It replaces two private names of trl.trainer.utils, and restores them at the end.

    Example:
        >>> with fused_lm_head():  # doctest: +SKIP
        ...     SFTTrainer(model, args, train_dataset=dataset).train()
    """
    ours = {"_ChunkedLogProbFunction": FusedLogProbFunction, "_use_triton": _skip_unlabelled}
    originals = {name: getattr(trl_utils, name) for name in ours if hasattr(trl_utils, name)}  # TRL 1.15 has only the first
    for name in originals:
        setattr(trl_utils, name, ours[name])
    try:
        yield
    finally:
        for name, value in originals.items():
            setattr(trl_utils, name, value)


def _skip_unlabelled(device: torch.device) -> bool:
    """Replaces TRL's ``_use_triton``, which decides whether positions without a label are skipped, or scored and discarded."""
    return True


class FusedLogProbFunction:
    """Replaces TRL's ``_ChunkedLogProbFunction``, with the same arguments and results."""

    @staticmethod
    def apply(
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # int64 [N]
        temperature: float,
        chunk_size: int,  # of the vocabulary in TRL; unused, because chunks are of tokens here
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return log-probabilities [N], and the statistics that ``outputs`` names; None for the others.

        Raises:
            ValueError: DeepSpeed has partitioned the weight.
        """
        if hasattr(weight, "ds_id"):
            raise ValueError("fused_lm_head: the head's weight is split by DeepSpeed's ZeRO-3; expected it whole. Fix: stage 2, or FSDP2.")
        scored = linear_token_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            logits_dtype="input",  # what TRL rounds to
        )
        others = dict.fromkeys(("log_sum_sq_probs", "mean_logits", "is_top1"))
        wanted = [name for name in others if name in outputs]
        if wanted:
            found = _other_statistics(hidden, weight, bias, targets, temperature, final_logit_softcapping, logit_scale)
            others.update({name: found[name] for name in wanted})
        entropy = scored.entropy if "entropy" in outputs else None
        return scored.logprobs, entropy, others["log_sum_sq_probs"], others["mean_logits"], others["is_top1"]


@torch.no_grad()
def _other_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
) -> dict[str, Tensor]:
    """Compute the statistics that SFT and DPO log, in a separate pass over chunks; logits have the dtype of the hidden states."""
    rows = max(1, _STATISTICS_ROWS // weight.shape[0])
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    log_sum_sq_probs = hidden.new_empty(targets.shape, dtype=torch.float32)
    mean_logits, is_top1 = torch.empty_like(log_sum_sq_probs), torch.empty_like(targets, dtype=torch.bool)
    for start in range(0, targets.shape[0], rows):
        part = slice(start, start + rows)
        logits = nn.functional.linear(hidden[part], weight, bias).float() * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits / temperature
        log_sum_sq_probs[part] = (2 * logits.log_softmax(-1)).logsumexp(-1)
        mean_logits[part] = logits.mean(-1)
        is_top1[part] = logits.argmax(-1) == targets[part]
    return {"log_sum_sq_probs": log_sum_sq_probs, "mean_logits": mean_logits, "is_top1": is_top1}
