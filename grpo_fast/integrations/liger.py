"""Liger-Kernel 0.8: its two GRPO losses with the same names, arguments and results, so that only the import changes.

    from grpo_fast.integrations.liger import LigerFusedLinearGRPOLoss   # was: from liger_kernel.chunked_loss import ...
    from grpo_fast.integrations.liger import triton_grpo_loss           # was: from liger_kernel.transformers.grpo_loss import ...

Where Liger departs from the formula, this module follows the formula:
    loss_type="luspo"         the mean over sequences of the sum over a sequence's tokens. Liger's Triton path multiplies each token by its
                              sequence's length and averages over the padded length, and so does its chunked loss where a ratio, weight or
                              KL is per token.
    masked tokens             have no effect. In Liger's chunked loss a log-ratio above 88 of a masked token makes the gradient NaN.
    a ratio above exp(20)     is clamped, and has no gradient there.
As in Liger, the logits of LigerFusedLinearGRPOLoss are rounded to the dtype of the hidden states; gf.linear_grpo_loss does not round them.
Unlike Liger, it accepts sequences of any length, advantages per token, and a temperature per sequence or token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from grpo_fast.head.api import linear_grpo_loss, linear_token_logprobs
from grpo_fast.integrations.logprobs import logprob_loss_inputs
from grpo_fast.loss.api import GRPOOutput, grpo_loss, token_logprobs
from grpo_fast.loss.config import LossConfig
from grpo_fast.loss.logprob_loss import kl_penalty, token_losses
from grpo_fast.loss.token_inputs import checked_scoring

__all__ = ["LigerFusedLinearGRPOLoss", "triton_grpo_loss"]

_LOGITS_DTYPE = "input"  # Liger's loss rounds its logits to the dtype of the hidden states


def triton_grpo_loss(
    logits: Tensor,  # [B, T + 1, V]; the last position is ignored
    old_logp: Tensor | None,  # [B, T]; None = on-policy
    ref_logp: Tensor | None,  # [B, T]; needed with beta
    completion_ids: Tensor,  # int64 [B, T]
    advantages: Tensor,  # [B]
    completion_mask: Tensor | None = None,  # [B, T]
    temperature: float | Tensor = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,  # [B, T], [B, 1] or [B]
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: int | float | Tensor | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple[Tensor, list[Tensor]] | tuple[Tensor, Tensor | None, Tensor]:
    """Liger's ``triton_grpo_loss``, on every device.

    Args:
        inplace: allow the gradient to overwrite the logits. Ignored for logits that are a leaf.
        num_items_in_batch: tokens of the whole batch, over all processes; None = those of this call, averaged over the processes.

    Returns:
        ``reduce=True``: (loss, [kl, clip ratio]), without kl where beta is 0. ``reduce=False``: (loss [B, T], kl [B, T] or None, clipped
        [B, T]) of each token, 0 where masked.

    Raises:
        TypeError, ValueError: names the argument, what it was, what was expected and the fix.
    """
    mask = torch.ones_like(completion_ids) if completion_mask is None else completion_mask
    config = LossConfig.like(
        "liger",
        loss_type=loss_type,
        beta=beta,
        epsilon_low=eps_low,
        epsilon_high=eps_high,
        delta=delta,
        use_bias_correction_kl=use_bias_correction_kl,
        importance_sampling_level=importance_sampling_level,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        vespo_k_pos=vespo_k_pos,
        vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg,
        vespo_lambda_neg=vespo_lambda_neg,
        max_completion_length=completion_ids.shape[1] if max_completion_length is None else max_completion_length,
    )
    weights = _per_token_or_column(vllm_is_ratio)
    if not reduce:
        logprobs = token_logprobs(logits, completion_ids, mask=mask, temperature=temperature).logprobs
        inputs = logprob_loss_inputs(
            logprobs, advantages, config=config, mask=mask, old_logprobs=old_logp, ref_logprobs=ref_logp, rollout_weights=weights
        )
        loss, ratio, kl = token_losses(logprobs, inputs, inputs.mask)
        kl = (kl * ratio if config.bias_corrected_kl else kl).detach() * inputs.mask
        return loss, kl if beta != 0 else None, _clipped(ratio, inputs.advantages, inputs.mask, config).float()
    out = grpo_loss(
        logits,
        completion_ids,
        advantages,
        config=config,
        old_logprobs=old_logp,
        ref_logprobs=ref_logp if beta != 0 else None,
        mask=mask,
        rollout_weights=weights,
        temperature=temperature,
        num_items=_num_items(mask, num_items_in_batch),
        inplace=inplace and not (logits.is_leaf or (logits._base is not None and logits._base.is_leaf)),
    )
    return out.loss, _metrics(out, beta, config, old_logp, ref_logp, mask)


class LigerFusedLinearGRPOLoss(nn.Module):
    """Liger's loss from hidden states and the weight of the LM head; constructor, arguments and results are those of Liger's class.

    ``compiled`` and ``chunk_size`` are accepted and have no effect: nothing is compiled, and the free memory determines the chunk size.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float | Tensor = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ):
        super().__init__()
        self.config = LossConfig.like(
            "liger",
            loss_type=loss_type,
            beta=beta,
            use_ref_model=use_ref_model,
            epsilon_low=epsilon_low,
            epsilon_high=epsilon_high,
            delta=delta,
            use_bias_correction_kl=use_bias_correction_kl,
            importance_sampling_level=importance_sampling_level,
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
            vespo_k_pos=vespo_k_pos,
            vespo_lambda_pos=vespo_lambda_pos,
            vespo_k_neg=vespo_k_neg,
            vespo_lambda_neg=vespo_lambda_neg,
            max_completion_length=max_completion_length,
        )
        checked_scoring(temperature, softcap=None, logit_scale=1.0)
        self.beta, self.use_ref_model, self.temperature = beta, use_ref_model, temperature

    def forward(
        self,
        _input: Tensor,  # [B, T, D]
        lin_weight: Tensor,  # [V, D]
        selected_token_ids: Tensor,  # int64 [B, T]
        attention_mask: Tensor,  # [B, T]
        advantages: Tensor,  # [B]
        bias: Tensor | None = None,  # [V]
        ref_per_token_logps: Tensor | None = None,  # [B, T]
        old_per_token_logps: Tensor | None = None,  # [B, T]
        ref_input: Tensor | None = None,  # [B, T, D]
        ref_weight: Tensor | None = None,  # [V, D]
        ref_bias: Tensor | None = None,  # [V]
        vllm_is_ratio: Tensor | None = None,  # [B, T], [B, 1] or [B]
        num_items_in_batch: int | float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the loss and its metrics: kl (if beta is not 0) and the clip ratio.

        Raises:
            TypeError, ValueError: names the argument, what it was, what was expected and the fix.
        """
        reference = ref_per_token_logps if self.use_ref_model else None
        if self.config.beta != 0 and reference is None:
            if ref_input is None or ref_weight is None:
                raise ValueError(
                    "ref_per_token_logps is None; expected [B, T], or ref_input and ref_weight, with a beta and use_ref_model=True."
                )
            with torch.no_grad():
                reference = linear_token_logprobs(
                    ref_input,
                    ref_weight,
                    selected_token_ids,
                    bias=ref_bias,
                    mask=attention_mask,
                    temperature=self.temperature,
                    logits_dtype=_LOGITS_DTYPE,
                ).logprobs
        out = linear_grpo_loss(
            _input,
            lin_weight,
            selected_token_ids,
            advantages,
            bias=bias,
            config=self.config,
            old_logprobs=old_per_token_logps,
            ref_logprobs=reference if self.config.beta != 0 else None,
            mask=attention_mask,
            rollout_weights=_per_token_or_column(vllm_is_ratio),
            temperature=self.temperature,
            num_items=_num_items(attention_mask, num_items_in_batch),
            metrics_on="all",
            logits_dtype=_LOGITS_DTYPE,
        )
        return out.loss, tuple(_metrics(out, self.beta, self.config, old_per_token_logps, reference, attention_mask))


def _per_token_or_column(weights: Tensor | None) -> Tensor | None:
    return weights.unsqueeze(1) if weights is not None and weights.dim() == 1 else weights


def _num_items(mask: Tensor, num_items_in_batch: int | float | Tensor | None) -> int | float | Tensor | None:
    """Return the tokens of the whole batch divided by the number of processes, as Liger counts them."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    processes = torch.distributed.get_world_size() if distributed else 1
    if num_items_in_batch is not None:
        return num_items_in_batch / processes
    if not distributed:
        return None
    tokens = (mask != 0).sum().float()
    torch.distributed.all_reduce(tokens)
    return tokens / processes


@torch.no_grad()
def _metrics(out: GRPOOutput, beta: float, config: LossConfig, old: Tensor | None, reference: Tensor | None, mask: Tensor) -> list[Tensor]:
    clipped = out.metrics["clip_region"]
    if beta == 0:
        return [clipped]
    if reference is None:  # Liger then uses the policy itself as the reference
        return [torch.zeros_like(clipped), clipped]
    if not config.bias_corrected_kl:
        return [out.metrics["kl"], clipped]
    counts = mask != 0
    kl = kl_penalty(out.logprobs, reference, config.kl_estimator, config.log_ratio_clamp)
    log_ratio = torch.zeros_like(kl) if old is None else torch.where(counts, out.logprobs - old, 0)
    if config.level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp(min=1)
    kl = torch.where(counts, kl * log_ratio.clamp(-config.log_ratio_clamp, config.log_ratio_clamp).exp(), 0)
    return [kl.sum() / counts.sum().clamp(min=1), clipped]


def _clipped(ratio: Tensor, advantages: Tensor, mask: Tensor, config: LossConfig) -> Tensor:
    if config.surrogate == "cispo":
        return mask & (ratio > config.epsilon_high) & (advantages > 0)
    if config.surrogate != "clip":
        return torch.zeros_like(mask)
    return mask & (((ratio < 1 - config.epsilon_low) & (advantages < 0)) | ((ratio > 1 + config.epsilon_high) & (advantages > 0)))
