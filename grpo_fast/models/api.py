"""linear_loss_from and linear_logprobs_from: the fused head of a transformers model, called with the inputs of the model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from grpo_fast.head.api import linear_grpo_loss, linear_token_logprobs
from grpo_fast.loss import checks
from grpo_fast.loss.api import GRPOOutput, TokenLogprobs
from grpo_fast.models.batch import ModelInputs
from grpo_fast.models.lm_head import HeadArguments, check_model, hidden_states_of
from grpo_fast.models.unwrap import unwrap

__all__ = ["linear_logprobs_from", "linear_loss_from"]

_READ_FROM_MODEL = ("softcap", "logit_scale", "bias", "adapter")


def linear_loss_from(
    model: nn.Module,
    model_inputs: ModelInputs,
    token_ids: Tensor,  # int64 [B, T] or [L]
    advantages: Tensor,  # [B], [B, T] or [L]
    **options: Any,
) -> GRPOOutput:
    """Compute linear_grpo_loss of a transformers causal language model: run the model up to its head, and the head in chunks.

    Args:
        model: bare or wrapped (PEFT, DistributedDataParallel, FSDP2, DeepSpeed, whose ``engine.backward(out.loss)`` then takes the loss).
        model_inputs: the arguments of the model's forward: ``input_ids`` [B, P + T], ``attention_mask`` and any others that it takes.
            Without ``position_ids``, positions are derived from the attention mask, so that padding on the left does not shift them.
        token_ids: [B, T]: the last T tokens of ``input_ids``, each scored by the position before it. [L], with packed ``input_ids`` [1, L]:
            ``token_ids[i]`` is scored by position i, so the caller must shift them and mask the tokens that are not to be scored.
        advantages: one per sequence or per token.
        options: those of linear_grpo_loss, except softcap, logit_scale, bias and adapter, which are read from the model.

    Returns:
        GRPOOutput(loss, logprobs, entropy, active, metrics), as in grpo_loss.

    Raises:
        TypeError, ValueError: names the argument, what it was, what was expected and the fix; or the model's head is not supported.

    Example:
        >>> out = linear_loss_from(model, {"input_ids": ids, "attention_mask": mask}, ids[:, -8:], advantages)  # doctest: +SKIP
        >>> out.loss.backward()  # doctest: +SKIP
    """
    hidden, head = _head_call(model, model_inputs, token_ids, options)
    return linear_grpo_loss(hidden, token_ids=token_ids, advantages=advantages, **head, **options)


def linear_logprobs_from(
    model: nn.Module,
    model_inputs: ModelInputs,
    token_ids: Tensor,  # int64 [B, T] or [L]
    **options: Any,
) -> TokenLogprobs:
    """Compute linear_token_logprobs of a transformers causal language model.

    Args:
        model, model_inputs, token_ids: as in linear_loss_from.
        options: those of linear_token_logprobs, except softcap, logit_scale, bias and adapter, which are read from the model.

    Returns:
        TokenLogprobs(logprobs, entropy), as in token_logprobs.

    Raises:
        TypeError, ValueError: as in linear_loss_from.

    Example:
        >>> out = linear_logprobs_from(model, {"input_ids": ids, "attention_mask": mask}, ids[:, -8:])  # doctest: +SKIP
    """
    hidden, head = _head_call(model, model_inputs, token_ids, options)
    return linear_token_logprobs(hidden, token_ids=token_ids, **head, **options)


def _head_call(model: nn.Module, model_inputs: ModelInputs, token_ids: Tensor, options: dict[str, Any]) -> tuple[Tensor, HeadArguments]:
    """Return the hidden states of the scored tokens, [B, T + 1, D] or [L, D], and the head's arguments."""
    check_model(model)
    checks.tensor("token_ids", token_ids, like=None, floating=False)
    if token_ids.dim() not in (1, 2):
        raise ValueError(f"token_ids has shape {list(token_ids.shape)}; expected [B, T], or [L] with packed input_ids [1, L].")
    if not isinstance(model_inputs, Mapping):
        raise TypeError(
            f"model_inputs is a {type(model_inputs).__name__}; expected a dict of what the model is called with: "
            "{'input_ids': input_ids, 'attention_mask': attention_mask}."
        )
    if "labels" in model_inputs:
        raise ValueError("model_inputs has labels; expected none: the model's own loss would need all logits. Leave them out.")
    for name in _READ_FROM_MODEL:
        if name in options:
            raise ValueError(f"{name} was given; expected it to be left out: it is read from the model. Or call linear_grpo_loss yourself.")
    packed = token_ids.dim() == 1
    inputs = _with_defaults(model, model_inputs, None if packed else token_ids.shape[1] + 1)
    hidden, head, _ = hidden_states_of(model, inputs)
    length = hidden.shape[1]
    if packed:
        if hidden.shape[0] != 1 or length != token_ids.shape[0]:
            raise ValueError(
                f"token_ids has shape {list(token_ids.shape)} and the model gave hidden states {list(hidden.shape)}; expected packed "
                "input_ids [1, L] with token_ids [L]."
            )
        hidden = hidden.squeeze(0)
    elif length < token_ids.shape[1] + 1:
        raise ValueError(
            f"token_ids has {token_ids.shape[1]} tokens a row and input_ids {length}; expected at least one more in input_ids, since the "
            "first token is scored by the position before it. Put the prompt, or a begin token, in front."
        )
    else:
        hidden = hidden[:, length - token_ids.shape[1] - 1 :]
    return hidden, head.arguments(hidden)


def _with_defaults(model: nn.Module, model_inputs: ModelInputs, logits_to_keep: int | None) -> ModelInputs:
    """Add defaults to the model's inputs: no cache, positions from the attention mask, and no more positions than are scored."""
    base = unwrap(model)
    parameters = inspect.signature(base.forward).parameters
    embeddings = getattr(getattr(base, "base_model", None), "embeddings", None)
    own_positions = hasattr(embeddings, "create_position_ids_from_input_ids")  # RoBERTa's, which begin after the padding token's id
    inputs = {"use_cache": False, **model_inputs} if "use_cache" in parameters else dict(model_inputs)
    mask = inputs.get("attention_mask")
    if "position_ids" in parameters and "position_ids" not in inputs and isinstance(mask, Tensor) and mask.dim() == 2 and not own_positions:
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    if logits_to_keep is not None and "logits_to_keep" in parameters:
        inputs.setdefault("logits_to_keep", logits_to_keep)
    return inputs
