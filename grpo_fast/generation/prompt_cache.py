"""A key-value cache in which equal prompts of a batch are computed once: the completions of a group start from copies of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_fast.models.packing import takes_argument, takes_positions
from grpo_fast.models.shared_prompts import group_by_prompt

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

__all__ = ["shared_prompt_cache"]

LEAST_SAVED = 4  # prompt tokens for each row, that are saved; below, the forward pass that this takes costs more


def shared_prompt_cache(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], input_ids: Tensor, attention_mask: Tensor
) -> DynamicCache | None:
    """Compute the keys and values of all prompt tokens but the last, once for each distinct prompt.

    Args:
        model: a causal language model, in eval mode.
        prompts: token ids of each row.
        input_ids: int64 [B, P], the prompts, padded on the left.
        attention_mask: int64 [B, P], 0 for padding.

    Returns:
        A cache of B rows and P - 1 positions, from which `generate` continues when it is called with the same ids and mask. None if
        hardly anything is saved, if the model's layers keep something else than keys and values of tokens, or if its rotary embedding
        depends on the length of the sequence.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    groups = group_by_prompt(prompts)
    before = input_ids.shape[1] - 1
    if (len(prompts) - len(groups)) * before < LEAST_SAVED * len(prompts) or not takes_positions(model):
        return None
    if _rotates_by_length(model):  # the prompt without its last token would then have other keys than the whole prompt
        return None
    cache = DynamicCache(config=model.config)
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    rows = torch.tensor([group[0] for group in groups], device=input_ids.device)
    mask = attention_mask[rows, :before]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    few_logits = {"logits_to_keep": 1} if takes_argument(model, "logits_to_keep") else {}
    with torch.no_grad():
        model(
            input_ids=input_ids[rows, :before],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **few_logits,
        )
    copied_from = torch.empty(len(prompts), dtype=torch.long)
    for place, group in enumerate(groups):
        copied_from[group] = place
    cache.batch_select_indices(copied_from.to(input_ids.device))
    return cache


def _rotates_by_length(model: PreTrainedModel) -> bool:
    """Return whether the frequencies of the model's rotary embedding change with the length of the sequence that it is computed for."""
    parameters = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]  # some models have them by kind of layer
    kinds = [str(one.get("rope_type")) for one in each]
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)
