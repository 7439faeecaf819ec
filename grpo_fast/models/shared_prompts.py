"""Prompts that are computed once for a group: G completions of one prompt take P + G * C tokens of a forward pass instead of G * (P + C).

All tokens are in one row, without padding: a prompt, its completions, the next prompt, ... Each completion continues at the position after
the prompt. Everything in a transformer but attention computes tokens one by one; group_attention.py has the attention. In a model for which
that does not hold, a completion would see another one without an error; `sharing_error` therefore measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from grpo_fast.models.batch import ForwardBatch
from grpo_fast.models.group_attention import ARGUMENT, SUPPORTED, register_attention
from grpo_fast.models.packing import PackedBatch, attention_of, pack, takes_positions
from grpo_fast.models.unwrap import inner_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["PromptSharing", "group_by_prompt", "pack_groups", "shared_tokens", "sharing_error"]

LARGEST_ERROR = {torch.float64: 1e-9, torch.float32: 1e-3}  # of the logits, relative; else 16 bits
LARGEST_ERROR_16_BITS = 5e-2  # a completion that does not see its prompt changes the logits of such a test by their own size
WORTHWHILE = 0.8  # of the tokens, that are left: with "auto", prompts are shared below


class PromptSharing:
    """Decides which batches are computed with shared prompts.

    Args:
        setting: True: all, and an error if the model cannot; False: none; ``"auto"``: those of which a fifth of the tokens is saved, if
            the model can.
        refused: why it cannot be had, whatever the model is; None = nothing.

    Raises:
        ValueError: ``setting`` is True, and something refuses it.
    """

    def __init__(self, setting: bool | Literal["auto"], *, refused: str | None = None) -> None:
        self.setting = setting
        self._attention: str | None = None  # of the model, if prompts are shared
        self._decided = False
        if refused is not None:
            self._refuse(refused)

    def decide(self, model: nn.Module, pad_token_id: int, device: torch.device) -> None:
        """Test once whether the model can share prompts. All processes must call it together: a sharded model runs forward passes.

        Raises:
            ValueError: the setting is True, and the model cannot; says why.
        """
        if self._decided or self.setting is False:
            return
        self._decided = True
        inner = inner_model(model)
        name = attention_of(inner)
        if not takes_positions(inner) or name not in SUPPORTED:
            self._refuse(f"the attention of {type(inner).__name__} is {name!r}, and prompts are shared with {', '.join(SUPPORTED)} only")
            return
        register_attention(name)
        error, largest = sharing_error(model, pad_token_id, device)
        if not error <= largest:
            change = f"logits of {type(inner).__name__} change by {error:.2g} relative if prompts are shared"
            self._refuse(f"{change}; expected {largest:g} at most")
            return
        self._attention = name

    def pack(self, model: nn.Module, batch: ForwardBatch, device: torch.device) -> PackedBatch | None:
        """Return the batch with shared prompts, or None if its sequences shall be computed one by one."""
        if self._attention is None or len(batch) < 2 or not all(batch.completion_ids):
            return None
        inner = inner_model(model)
        # The reference model may have another attention, which would ignore the groups without an error.
        if attention_of(inner) != self._attention or _longest(batch) > _window(inner.config):
            return None
        before = sum(map(len, batch.prompt_ids)) + sum(batch.lengths)
        limit = before - 1 if self.setting is True else WORTHWHILE * before
        return pack_groups(batch, device=device) if shared_tokens(batch) <= limit else None

    def _refuse(self, reason: str) -> None:
        if self.setting is True:
            raise ValueError(f"share_prompts is True, but {reason}. Fix: share_prompts='auto', or False.")
        self.setting = False


def group_by_prompt(prompt_ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the indices of the sequences that have the same prompt, for each prompt in the order of its first sequence.

    Example:
        >>> group_by_prompt([[1, 2], [3], [1, 2]])
        [[0, 2], [1]]
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, ids in enumerate(prompt_ids):
        groups.setdefault(tuple(ids), []).append(index)
    return list(groups.values())


def shared_tokens(batch: ForwardBatch) -> int:
    """Return the number of tokens of a forward pass in which each prompt is computed once."""
    return sum(len(ids) for ids in set(map(tuple, batch.prompt_ids))) + sum(batch.lengths)


def pack_groups(batch: ForwardBatch, *, device: torch.device) -> PackedBatch:
    """Arrange the sequences of a batch in one row in which each prompt is followed by all of its completions.

    Args:
        batch: S sequences with N completion tokens.
        device: of the model.

    Returns:
        A batch with R = 1 row. Its values per token have the order of ``batch``, whatever the order in the row.
    """
    ids: list[int] = []
    positions, groups = [], []
    scored_at = [torch.zeros(0, dtype=torch.long)] * len(batch)
    counted: list[bool] = []
    for rows in group_by_prompt(batch.prompt_ids):
        prompt, lengths = batch.prompt_ids[rows[0]], tuple(len(batch.completion_ids[row]) for row in rows)
        groups.append((len(prompt), lengths))
        last = len(ids) + len(prompt) - 1  # the prompt's last token scores the first token of every completion
        ids += prompt
        positions.append(torch.arange(len(prompt)))
        counted += [True] * len(prompt)
        for row, length in zip(rows, lengths, strict=True):
            scored_at[row] = torch.cat([torch.tensor([last]), torch.arange(len(ids), len(ids) + length - 1)])[:length]
            ids += batch.completion_ids[row]
            positions.append(torch.arange(len(prompt), len(prompt) + length))
            counted += [bool(batch.loss_mask[row])] * length
    inputs = {
        "input_ids": torch.tensor([ids], device=device),
        "position_ids": torch.cat(positions)[None].to(device),
        # transformers passes a mask of four dimensions on to attention as it is; without one it would make a mask of the whole row.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        "use_cache": False,
        ARGUMENT: tuple(groups),
    }
    return PackedBatch.of(batch, inputs, scored_at, torch.tensor([counted]), device=device)


@torch.no_grad()
def sharing_error(model: nn.Module, pad_token_id: int, device: torch.device) -> tuple[float, float]:
    """Compare the logits of a small batch with shared prompts to those of its sequences, each alone.

    Returns:
        The largest relative error of a sequence's logits in the Euclidean norm, infinite if the model's forward refuses the arguments; and
        the error that rounding may cause.
    """
    vocabulary = inner_model(model).get_input_embeddings().weight.shape[0]
    tokens = [(7 + 13 * step) % vocabulary for step in range(20)]
    prompts, completions = [tokens[:6], tokens[:6], tokens[6:9]], [tokens[9:14], tokens[14:17], tokens[17:19]]
    batch = ForwardBatch(prompts, completions, torch.ones(3), torch.zeros(3), torch.ones(3, dtype=torch.bool))
    found = []
    for packed in (pack(batch, layout="padded", pad_token_id=pad_token_id, device=device), pack_groups(batch, device=device)):
        try:
            logits = model(**packed.inputs).logits
        except (TypeError, ValueError, RuntimeError, IndexError):  # all processes of a sharded model fail alike
            return float("inf"), 0.0
        found.append(logits.flatten(0, 1)[packed.scored_at])
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else next(model.parameters()).dtype
    one_by_one, shared = (logits.double().split(batch.lengths) for logits in found)
    errors = [torch.linalg.norm(a - b) / torch.linalg.norm(a - a.mean(-1, keepdim=True)) for a, b in zip(one_by_one, shared, strict=True)]
    return float(torch.stack(errors).nan_to_num(torch.inf).max()), LARGEST_ERROR.get(dtype, LARGEST_ERROR_16_BITS)


def _longest(batch: ForwardBatch) -> int:
    return max(len(prompt) + length for prompt, length in zip(batch.prompt_ids, batch.lengths, strict=True))


def _window(config: PretrainedConfig) -> float:
    """The tokens to which the layers with the shortest attention attend."""
    text = config.get_text_config()
    windows = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((window for window in windows if isinstance(window, int) and window > 0), default=float("inf"))
