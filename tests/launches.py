"""How the tests launch the Triton kernels: with small blocks, so that small vocabularies have plain blocks, and with rows in parts."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def small_blocks(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """With and without a soft cap; and totals that need more than one block."""
    from grpo_fast.kernels import grpo_loss, token_logprobs  # here: triton need not be installed

    for name in ("BLOCK", "SOFTCAP_BLOCK"):
        monkeypatch.setattr(token_logprobs, name, columns)
    monkeypatch.setattr(grpo_loss, "TOTAL_BLOCK", 2)


def splitter(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that forces the number of programs per row."""
    from grpo_fast.kernels import token_logprobs

    def force(parts: int) -> None:
        monkeypatch.setattr(token_logprobs, "parts_of", lambda *_: parts)

    return force


def parts_for(seed: int) -> int:
    """One to three, drawn for a random case."""
    return 1 + seed // 3 % 3
