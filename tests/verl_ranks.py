"""One of two processes that divide a vocabulary between them; test_integrations_verl.py starts both. It ends with an error if what
linear_cross_entropy gives here is not what it gives for the whole.

By hand: python tests/verl_ranks.py RANK FILE
"""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

import torch
from hang import HANG
from torch import Tensor, distributed

from grpo_fast.integrations.verl import linear_cross_entropy

VOCABULARY, CUT = 37, 11


def main(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=timedelta(seconds=HANG))
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 5, 12, generator=generator), torch.randn(VOCABULARY, 12, generator=generator)
    labels = torch.randint(VOCABULARY, (2, 5), generator=generator)
    temperature = torch.tensor([0.6, 1.3])
    mine = slice(CUT) if rank == 0 else slice(CUT, None)

    def results(of: Tensor, group: Any = None) -> tuple[Tensor, ...]:
        leaves = [hidden.clone().requires_grad_(), of.clone().requires_grad_()]
        logprobs, entropy = linear_cross_entropy(leaves[0], leaves[1], labels, temperature, "none", group)
        return logprobs, entropy, *torch.autograd.grad(logprobs.sum() + entropy.square().sum(), leaves)

    whole = results(weight)
    part = results(weight[mine], distributed.group.WORLD)
    for ours, expected in zip(part, (*whole[:3], whole[3][mine]), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        assert expected.abs().max() > 1e-2
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
