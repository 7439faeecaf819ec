"""The check of lengths before training: the longest prompt and its completion must fit into the positions that the model knows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from grpo_fast.data.prompts import encode_prompt
from grpo_fast.data.row_checks import Rows, column_of
from grpo_fast.models.unwrap import inner_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from grpo_fast.data.row_checks import Prompt

__all__ = ["check_lengths", "position_limit"]

logger = logging.getLogger("grpo_fast")
TEMPLATE_TOKENS = 1024  # more than a chat template, or a normalizer that writes a character as several, adds to a prompt
SPECIAL_TOKENS = 16  # more than a tokenizer adds to a text of ASCII characters, which no normalizer lengthens


def check_lengths(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows | None,
    max_completion_length: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    *,
    as_chat: bool = False,
) -> None:
    """Check that ``max_completion_length``, and each prompt with it, fit into the model's positions.

    A model with learned positions cannot run beyond them, which is an error. One with rotary positions can, but was not trained to: a
    warning.

    Args:
        model: the causal language model, wrapped or not.
        tokenizer: its tokenizer.
        rows: with a ``prompt`` each, a list or a Dataset; None: only ``max_completion_length`` is checked.
        max_completion_length: tokens of a completion.
        chat_template_kwargs: arguments of ``apply_chat_template``.
        as_chat: whether prompts that are texts are sent as chats.

    Raises:
        ValueError: names the first row that is too long, its length, the limit and the fix.
    """
    limit, is_hard = position_limit(model)
    if limit is None:
        return
    room = limit - max_completion_length
    problem = f"max_completion_length is {max_completion_length}" if room < 1 else None
    for position, prompt in enumerate(() if rows is None or problem else column_of(rows, "prompt")):
        plain = isinstance(prompt, str) and not as_chat and prompt.isascii()
        # A token has at least one byte: most prompts need not be encoded.
        if _bytes_of(prompt) + (SPECIAL_TOKENS if plain else TEMPLATE_TOKENS) <= room:
            continue
        length = len(encode_prompt(prompt, tokenizer, chat_template_kwargs, as_chat=as_chat))
        if length > room:
            problem = (
                f"train_dataset: the prompt of row {position} has {length} tokens, and max_completion_length is {max_completion_length}"
            )
            break
    if problem is None:
        return
    message = (
        f"{problem}; the model has {limit} positions (max_position_embeddings). Fix: a smaller max_completion_length, or leave longer "
        "prompts out (grpo_fast.data.load_prompts(..., max_prompt_length=...))"
    )
    if is_hard:
        raise ValueError(f"{message}.")
    logger.warning("%s, or rope_scaling. Beyond its positions the model has not been trained.", message)


def position_limit(model: nn.Module) -> tuple[int | None, bool]:
    """The number of positions that a model knows, RoPE scaling included, and whether it cannot run beyond them; None: without a limit.

    A sliding window limits what a token attends to, not the positions.
    """
    inner = inner_model(model)
    config = inner.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None, False
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Some models have parameters for each type of layer: the widest counts.
    for each in [part for part in scaling.values() if isinstance(part, Mapping)] or [scaling]:
        factor = each.get("factor")
        if isinstance(factor, (int, float)) and factor > 1:
            limit = max(limit, int(factor * (each.get("original_max_position_embeddings") or limit)))
    tokens = inner.get_input_embeddings()
    learned = [m for m in inner.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    return limit, any(m.num_embeddings - limit in (0, 2) for m in learned)  # OPT's table has two rows more


def _bytes_of(prompt: Prompt) -> int:
    if isinstance(prompt, str):
        return len(prompt.encode("utf-8", "replace"))
    return sum(len(str(value).encode("utf-8", "replace")) for message in prompt for value in message.values())
