"""A call whose logits would be 40 GB: the memory stays that of a chunk and the gradients."""

from __future__ import annotations

import pytest
import torch

import grpo_fast as gf
from grpo_fast.benchmark.harness.measure import reset_peak, resident_peak

TOKENS, WIDTH, VOCABULARY = 65_536, 64, 152_064


@pytest.mark.sweep
def test_64k_tokens_of_a_large_vocabulary(generator: torch.Generator) -> None:
    torch.set_num_threads(2)
    hidden = torch.randn(8, TOKENS // 8, WIDTH, generator=generator).requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.2).requires_grad_()
    token_ids = torch.randint(VOCABULARY, (8, TOKENS // 8), generator=generator)
    advantages = torch.randn(8, generator=generator)
    chunk = 512 * VOCABULARY * 4
    before = reset_peak()
    if before is None:
        pytest.skip("this system does not tell the peak of the resident memory")
    out = gf.linear_grpo_loss(hidden, weight, token_ids, advantages, chunk_bytes=chunk, temperature=0.7)
    out.loss.backward()
    expected = chunk + 4 * (hidden.numel() + weight.numel())
    assert resident_peak() - before < 1.1 * expected + (64 << 20)  # what libraries touch for the first time
    assert hidden.grad is not None and weight.grad is not None

    some = slice(100, 108)  # of one sequence, from full logits
    logits = hidden[3, some].detach().double() @ weight.detach().double().T / 0.7
    logprobs = logits.log_softmax(-1).gather(-1, token_ids[3, some, None]).squeeze(-1)
    torch.testing.assert_close(out.logprobs[3, some].double(), logprobs, rtol=1e-5, atol=1e-5)
    slope = torch.nn.functional.one_hot(token_ids[3, some], VOCABULARY).double() - logits.softmax(-1)
    true = -advantages[3].double() / TOKENS / 0.7 * slope @ weight.detach().double()
    torch.testing.assert_close(hidden.grad[3, some].double(), true, rtol=1e-4, atol=1e-4 * true.abs().max().item())
