"""Regressions of speed, for pytest-benchmark: `make bench`, or `pytest bench`. Small logits and one thread: half a minute.

To hold a change against what was there before:

    pytest bench --benchmark-save=before        # then the change
    pytest bench --benchmark-compare --benchmark-compare-fail=median:10%

These are times to be compared with each other on one machine. What the package is worth against others is measured by `grpo-fast bench`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import grpo_fast as gf

SHAPES = {
    "small": (8, 100),  # the price of a call
    "8x16x32000": (8, 16, 32000),  # 16 MB as float32: more than an L2 cache
}
# CPU time of the thread: others on the machine do not count.
pytestmark = pytest.mark.benchmark(timer=time.thread_time, max_time=0.5, min_rounds=5)

DTYPES = (torch.float32, torch.bfloat16)


class Batch(NamedTuple):
    logits: Tensor
    token_ids: Tensor
    advantages: Tensor
    old_logprobs: Tensor

    def loss(self) -> Tensor:
        return gf.grpo_loss(self.logits, self.token_ids, self.advantages, old_logprobs=self.old_logprobs, temperature=0.9).loss


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[(name, dtype) for name in SHAPES for dtype in DTYPES], ids=lambda param: f"{param[0]}-{str(param[1])[6:]}")
def batch(request: pytest.FixtureRequest) -> Batch:
    name, dtype = request.param
    *tokens, vocabulary = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(*tokens, vocabulary, generator=generator) * 2.5).to(dtype)
    token_ids = torch.randint(vocabulary, tokens, generator=generator)
    logprobs = gf.token_logprobs(logits, token_ids, temperature=0.9).logprobs
    old_logprobs = logprobs + 0.3 * torch.randn(*tokens, generator=generator)  # ratios on both sides of the clip band
    return Batch(logits, token_ids, torch.randn(*tokens, generator=generator), old_logprobs)


def test_token_logprobs(benchmark, batch):
    with torch.no_grad():
        out = benchmark(gf.token_logprobs, batch.logits, batch.token_ids, temperature=0.9)
    assert torch.isfinite(out.logprobs).all()


def test_grpo_loss_without_gradient(benchmark, batch):
    with torch.no_grad():
        assert torch.isfinite(benchmark(batch.loss))


def test_grpo_loss_and_gradient(benchmark, batch):
    leaf = batch.logits.requires_grad_()
    (gradient,) = benchmark(lambda: torch.autograd.grad(batch.loss(), leaf))
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("group_size", [8, 64])
@pytest.mark.parametrize("completions", [512, 65536])
def test_group_advantages(benchmark, completions, group_size):
    rewards = torch.rand(completions, generator=torch.Generator().manual_seed(0))
    out = benchmark(gf.group_advantages, rewards, group_size=group_size)
    assert torch.isfinite(out.advantages).all()
