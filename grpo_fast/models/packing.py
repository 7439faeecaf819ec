"""Conversion of sequences of different lengths to the inputs of a model, with little or no padding, and back to N completion tokens.

Sequences are placed one after the other in rows, each with positions that begin at 0. From these positions transformers derives an
attention mask that separates the sequences, provided that it is given neither an attention mask nor a cache. In a model that ignores the
positions, sequences would attend to each other without an error; `packing_leak` therefore measures it. Such a model gets one row per
sequence, padded on the right, where causal attention does not look.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from grpo_fast.models.batch import ForwardBatch, ModelInputs
from grpo_fast.models.unwrap import inner_model

__all__ = [
    "Layout",
    "PackedBatch",
    "attention_of",
    "boundaries",
    "choose_attention",
    "pack",
    "packing_leak",
    "takes_argument",
    "takes_positions",
]

FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")

Layout = Literal["one_row", "rows", "padded", "padded_without_positions"]


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch as tensors: R rows of L tokens for the model, S sequences with N completion tokens for the loss."""

    inputs: ModelInputs  # input_ids, position_ids [R, L], ...
    token_ids: Tensor  # int64 [N]
    scored_at: Tensor  # int64 [N]: in the flattened [R * L], the position whose output scores the token
    cu_seqlens: Tensor  # int32 [S + 1]: where sequences begin in N
    lengths: Tensor  # int64 [S], on the CPU: tokens of each completion
    router_mask: Tensor  # bool [R, L], on the CPU: prompts and completions in the loss, for the load balance of routers

    @classmethod
    def of(
        cls, batch: ForwardBatch, inputs: ModelInputs, scored_at: Sequence[Tensor], router_mask: Tensor, *, device: torch.device
    ) -> PackedBatch:
        """Add to the arranged inputs what the loss needs, in the order of ``batch``; ``scored_at``: of each sequence."""
        token_ids = torch.tensor([token for ids in batch.completion_ids for token in ids], dtype=torch.long, device=device)
        cu_seqlens, lengths = boundaries(batch.lengths, device), torch.tensor(batch.lengths)
        return cls(inputs, token_ids, torch.cat(list(scored_at)).to(device), cu_seqlens, lengths, router_mask)

    def per_token(self, x: Tensor) -> Tensor:  # [S] -> [N]
        """Repeat each sequence's value, given on the CPU, for each of its tokens."""
        return x.repeat_interleave(self.lengths).to(self.token_ids.device)


def pack(batch: ForwardBatch, *, layout: Layout, pad_token_id: int, device: torch.device) -> PackedBatch:
    """Arrange the sequences of a batch in rows.

    Args:
        layout: ``"one_row"`` (R = 1, no padding, for flash attention), ``"rows"`` (the width is that of the longest sequence, and a row
            takes as many sequences as fit), ``"padded"`` (a row per sequence), or ``"padded_without_positions"`` for a model whose
            forward has no ``position_ids``.
    """
    sequences = [prompt + completion for prompt, completion in zip(batch.prompt_ids, batch.completion_ids, strict=True)]
    sizes = [len(sequence) for sequence in sequences]
    places, width = _places(sizes, layout)
    height = 1 + max((row for row, _ in places), default=0)
    input_ids = torch.full((height, width), pad_token_id)
    position_ids = torch.arange(width).repeat(height, 1)
    router_mask = torch.zeros(height, width, dtype=torch.bool)
    filled = [0] * height
    scored_at = []
    in_loss = batch.loss_mask.tolist()
    for sequence, prompt, counts, (row, start) in zip(sequences, batch.prompt_ids, in_loss, places, strict=True):
        end = start + len(sequence)
        input_ids[row, start:end] = torch.tensor(sequence)
        position_ids[row, start:end] = torch.arange(len(sequence))
        router_mask[row, start : end if counts else start + len(prompt)] = True
        filled[row] = max(filled[row], end)
        first = row * width + start + len(prompt) - 1  # the prompt's last token scores the completion's first
        scored_at.append(torch.arange(first, first + len(sequence) - len(prompt)))
    if not layout.startswith("padded"):
        for row, end in enumerate(filled):
            position_ids[row, end:] = torch.arange(width - end)  # the padding is treated as a separate sequence
    inputs: dict[str, Tensor | int | bool] = {"input_ids": input_ids.to(device), "use_cache": False}
    if layout != "padded_without_positions":
        inputs["position_ids"] = position_ids.to(device)
    if layout == "one_row":  # without these, flash attention reads them from the positions, with a synchronisation in every layer
        bounds = boundaries(sizes, device)
        inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": max(sizes), "max_length_k": max(sizes)}
    return PackedBatch.of(batch, inputs, scored_at, router_mask, device=device)


def _places(sizes: Sequence[int], layout: Layout) -> tuple[list[tuple[int, int]], int]:
    """Return (row, first column) of each sequence, and the width of the rows."""
    if layout == "one_row":
        starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
        return [(0, start) for start in starts[:-1]], starts[-1]
    width = max(sizes)
    if layout != "rows":
        return [(row, 0) for row in range(len(sizes))], width
    places: list[tuple[int, int]] = [(0, 0)] * len(sizes)
    filled: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):  # the longest first, each into the first row with enough space
        row = next((r for r, used in enumerate(filled) if used + sizes[index] <= width), len(filled))
        if row == len(filled):
            filled.append(0)
        places[index] = (row, filled[row])
        filled[row] += sizes[index]
    return places, width


def attention_of(model: object) -> str:
    """Return the name of the attention implementation of a model."""
    return str(getattr(getattr(model, "config", None), "_attn_implementation", None) or "eager")


def choose_attention(*, half: bool) -> str:
    """Return flash attention if it can be imported, the GPU supports it, and the model computes in 16 bits, as it requires; else sdpa."""
    if half and torch.cuda.is_available():
        from transformers.utils import import_utils

        for version in (3, 2):
            available = getattr(import_utils, f"is_flash_attn_{version}_available", None)
            if available is not None and available():
                return f"flash_attention_{version}"
    return "sdpa"


def takes_positions(model: nn.Module) -> bool:
    """Return whether the model's forward has an argument for positions."""
    return takes_argument(model, "position_ids")


def takes_argument(model: nn.Module, name: str) -> bool:
    """Return whether the model's forward has an argument of this name."""
    return name in inspect.signature(model.forward).parameters


def boundaries(sizes: Sequence[int], device: torch.device) -> Tensor:  # int32 [S + 1]
    """Return where parts of these sizes begin and end that lie one after the other."""
    return torch.tensor([0, *sizes]).cumsum(0).int().to(device)


@torch.no_grad()
def packing_leak(model: nn.Module, pad_token_id: int, device: torch.device) -> float:
    """Return the largest change of a sequence's logits if another sequence is packed before it: 0 up to rounding if they are separated."""
    vocabulary = inner_model(model).get_input_embeddings().weight.shape[0]
    watched = [token % vocabulary for token in (7, 11, 13, 17, 19)]
    found = []
    for first in (3, 23):
        neighbour = [(first + token) % vocabulary for token in range(6)]
        constant = torch.ones(2)
        batch = ForwardBatch([neighbour[:1], watched[:1]], [neighbour[1:], watched[1:]], constant, constant, constant.bool())
        packed = pack(batch, layout="one_row", pad_token_id=pad_token_id, device=device)
        logits = model(**packed.inputs).logits.flatten(0, 1)[packed.scored_at]
        found.append(logits[-len(watched) + 1 :].float())
    return float((found[0] - found[1]).abs().max())
