"""Causal attention of a row in which each prompt is followed by all of its completions: a completion attends to its prompt and to itself.

The functions that transformers calls for attention are wrapped in its registry. They learn of the groups by a keyword argument of the
model's forward, which transformers passes on to attention, also when gradient checkpointing computes a layer again in the backward pass.
Without the argument they compute what they computed before.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.models.packing import FLASH, boundaries

__all__ = ["ARGUMENT", "SUPPORTED", "Groups", "register_attention"]

ARGUMENT = "shared_prompts"  # the keyword argument of the model's forward
SUPPORTED = ("sdpa", *FLASH)  # attention implementations of transformers
# For each group: the tokens of the prompt, and those of each of its completions. Tuples of integers pass unchanged through wrappers (DDP,
# FSDP) that move or cast what a model is called with.
Groups = tuple[tuple[int, tuple[int, ...]], ...]
Attention = Callable[..., tuple[Tensor, Tensor | None]]


def register_attention(name: str) -> None:
    """Wrap transformers' attention function of this name, once per process, so that it takes groups.

    Raises:
        ValueError: the name is not one of SUPPORTED.
    """
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name not in SUPPORTED:
        raise ValueError(f"the attention implementation is {name!r}; expected one of {', '.join(SUPPORTED)}")
    attention: Attention = ALL_ATTENTION_FUNCTIONS[name]
    if hasattr(attention, "takes_groups"):
        return
    attend = _attend_by_segments if name in FLASH else _attend_by_masks

    @functools.wraps(attention)
    def with_groups(*args: Any, shared_prompts: Groups | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if shared_prompts is None:
            return attention(*args, **kwargs)
        return attend(attention, shared_prompts, *args, **kwargs)

    with_groups.takes_groups = True  # type: ignore[attr-defined]
    AttentionInterface.register(name, with_groups)


def _attend_by_masks(
    attention: Attention,
    groups: Groups,
    module: nn.Module,
    query: Tensor,  # [1, H, L, D], with rotary embeddings
    key: Tensor,  # [1, K, L, D]
    value: Tensor,  # [1, K, L, D]
    _: Tensor | None,  # the mask, which is made here
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # [1, L, H, D]
    """Compute two calls for each group, as in Prefix Grouper (arXiv:2506.05433): the prompt, and its completions as a batch.

    No mask of the whole row is made. The largest is that of a completion, C * (P + C).
    """
    parts = _split(groups, query, key, value)
    outputs = []
    for prompt, completions in groups:
        of_prompt = next(parts)
        outputs.append(attention(module, *of_prompt, None, *args, **kwargs)[0])
        width = max(completions)
        queries, keys, values = (_stack(x, width) for x in zip(*itertools.islice(parts, len(completions)), strict=True))
        before = (x.expand(len(completions), -1, -1, -1) for x in of_prompt[1:])
        keys, values = (torch.cat(both, 2) for both in zip(before, (keys, values), strict=True))
        allowed = torch.ones(width, prompt + width, dtype=torch.bool, device=query.device).tril(prompt)
        found = attention(module, queries, keys, values, allowed[None, None], *args, **kwargs)[0]
        outputs += [row[None, :length] for row, length in zip(found.unbind(), completions, strict=True)]
    return torch.cat(outputs, 1), None


def _attend_by_segments(
    attention: Attention,
    groups: Groups,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute one call of flash attention over segments of different lengths: the queries of a completion have the prompt's keys before
    their own. Flash attention aligns the last query with the last key.
    """
    queries: list[int] = []
    keys: list[int] = []
    parts = _split(groups, query, key, value)
    all_keys, all_values = [], []
    for prompt, completions in groups:
        _, prompt_key, prompt_value = next(parts)
        queries += [prompt, *completions]
        keys += [prompt, *(prompt + length for length in completions)]
        all_keys.append(prompt_key)
        all_values.append(prompt_value)
        for _, own_key, own_value in itertools.islice(parts, len(completions)):
            all_keys += [prompt_key, own_key]
            all_values += [prompt_value, own_value]
    segments = {"cu_seq_lens_q": boundaries(queries, query.device), "max_length_q": max(queries)}
    segments |= {"cu_seq_lens_k": boundaries(keys, query.device), "max_length_k": max(keys)}
    return attention(module, query, torch.cat(all_keys, 2), torch.cat(all_values, 2), None, *args, **{**kwargs, **segments})


def _split(groups: Groups, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:  # [1, H, L, D] each
    """Split tensors along the row: the prompt of the first group, each of its completions, the prompt of the second group, ..."""
    sizes = [size for prompt, completions in groups for size in (prompt, *completions)]
    return zip(*(x.split(sizes, dim=2) for x in tensors), strict=True)


def _stack(parts: Sequence[Tensor], width: int) -> Tensor:
    """Stack tensors [1, H, C, D] to [G, H, width, D], padded with zeros at their ends, where causal attention does not look."""
    return torch.cat([x if x.shape[2] == width else nn.functional.pad(x, (0, 0, 0, width - x.shape[2])) for x in parts])
