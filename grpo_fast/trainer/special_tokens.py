"""Special tokens in completions: removed from what rewards read by default, and a problem if a reward reads them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from grpo_fast.rewards import RewardRunner
from grpo_fast.rewards.inspection import texts_used

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_tags", "decode_completions"]

logger = logging.getLogger("grpo_fast")


def decode_completions(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[Sequence[int]], *, end_tokens: Collection[int], skip_special_tokens: bool
) -> list[str]:
    """The texts of completions, as rewards read them.

    Args:
        tokenizer: of the model.
        token_ids: B lists of token ids.
        end_tokens: the tokens that end a completion; one at the end is never part of the text.
        skip_special_tokens: remove the other special tokens too.
    """
    if not token_ids:
        return []
    parts = [list(ids[:-1] if ids and ids[-1] in end_tokens else ids) for ids in token_ids]
    return tokenizer.batch_decode(token_ids if skip_special_tokens else parts, skip_special_tokens=skip_special_tokens)


def check_tags(rewards: RewardRunner, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool) -> None:
    """Check before training that the tags which rewards read are in the texts that they get.

    A reward of ours that cannot give points without its tags is refused. If the code of another names a special token, the log says so.

    Raises:
        ValueError: names the reward and its tags.
    """
    if not skip_special_tokens:
        return
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {str(each) for each in added if getattr(each, "special", False)} | set(tokenizer.all_special_tokens)
    usual = {getattr(tokenizer, f"{name}_token", None) for name in ("bos", "eos", "pad", "unk")}
    for name, reward in zip(rewards.names, rewards.reward_funcs, strict=True):
        lost = [tag for tag in getattr(reward, "tags", ()) if tag in special]
        if lost:
            raise ValueError(
                f"reward {name!r} reads {', '.join(lost)}, special tokens of the tokenizer, which are removed from the completions' texts; "
                "expected them in the texts. Fix: skip_special_tokens=False."
            )
        texts = texts_used(reward)
        named = sorted(token for token in special - usual if any(token in text for text in texts))
        if named:
            logger.warning(
                "The code of reward %r names %s, special tokens of the tokenizer, which are removed from the texts of completions. "
                "skip_special_tokens=False keeps them.",
                name,
                ", ".join(named),
            )
