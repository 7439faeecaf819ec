"""Which prompts that are texts reach a model as chats: as the user's message in the chat template of its tokenizer.

A chat model answers a plain text as a base model would: it may continue the question, and it seldom ends. So the prompts of our own tasks
become chats wherever the tokenizer has a template. A user's own texts are sent as they are, since they may be written for a base model, or
hold the template's tokens already.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from grpo_fast.data.tasks.common import is_generated

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CHAT", "sends_as_chat"]

logger = logging.getLogger("grpo_fast")
CHAT = ("auto", True, False)  # the values of the setting ``chat``


def sends_as_chat(chat: str | bool, rows: Any, tokenizer: PreTrainedTokenizerBase, name: str, *, tell: bool = True) -> bool:
    """Whether the prompts of a dataset that are texts are sent as chats of one message of the user.

    Args:
        chat: ``"auto"``: the prompts of our own tasks, if the tokenizer has a chat template; True or False: all prompts, or none.
        rows: the dataset; prompts that are lists of messages are chats anyway.
        tokenizer: of the model.
        name: of the dataset, for messages.
        tell: say in the log what is decided, where it is not set and may surprise.

    Raises:
        ValueError: ``chat`` is True, and the tokenizer has no chat template.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if chat is True and not has_template:
        raise ValueError(
            "chat is True, and the tokenizer has no chat template; expected the tokenizer of a chat model. Fix: set "
            "tokenizer.chat_template, or chat=False."
        )
    first = _first_prompt(rows)
    if isinstance(chat, bool) or not has_template or not isinstance(first, str):
        return bool(chat is True)
    if is_generated(rows):
        if tell:
            logger.warning("%s: the task's prompts are sent as chats, in the tokenizer's chat template (chat=False: as plain texts).", name)
        return True
    if tell and not any(token in first for token in tokenizer.all_special_tokens):  # otherwise it is in the template already
        logger.warning(
            "%s: the prompts are plain texts and are sent as they are, although the tokenizer has a chat template. For a chat model: "
            "chat=True makes each a chat. chat=False confirms plain texts.",
            name,
        )
    return False


def _first_prompt(rows: Any) -> Any:
    """The prompt of the first row; None of a stream, whose rows cannot be read twice."""
    if not hasattr(rows, "__getitem__") or not hasattr(rows, "__len__") or len(rows) == 0:
        return None
    return rows[0].get("prompt")
