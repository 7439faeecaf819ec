"""Launch the kernels over many batches with a driver that only compiles, and print how many compilations each kernel has kept.

The launchers, the keys and the caches are the real ones: Triton's own warm-up stops before the launch. Run by test_triton_compile.py.
"""

from __future__ import annotations

import itertools
import json
import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import grpo_fast as gf
from grpo_fast.kernels import grpo_loss, scale, token_logprobs
from grpo_fast.kernels.grpo_loss import PolicyTensors
from grpo_fast.kernels.token_logprobs import LogitRows, Scoring
from grpo_fast.loss.config import KL_ESTIMATORS
from grpo_fast.loss.kernel_settings import loss_settings

KERNELS = [
    token_logprobs._token_sums_kernel,
    token_logprobs._token_logprobs_kernel,
    token_logprobs._token_gradient_kernel,
    grpo_loss._grpo_loss_terms_kernel,
    grpo_loss._grpo_loss_total_kernel,
    scale._scale_kernel,
]


class CompilingDriver:
    """As much of a driver as Triton needs to choose a target and fill a cache."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    triton.runtime.driver.set_active(CompilingDriver())
    launch = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *arguments, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only
    launches = 0
    shapes = [(1, 1, 2), (2, 3, 16), (1, 16, 17), (3, 5, 1000), (16, 16, 1024), (4, 7, 50257), (1, 2, 2**18)]
    for (batch, length, vocabulary), (temperature, loss_scale, epsilon), extra in itertools.product(
        shapes, [(1.0, 1.0, 0.2), (0.6, 0.5, 0.28)], [0, 1]
    ):
        memory = torch.empty(1 + batch * (length + extra) * vocabulary, dtype=torch.bfloat16)
        logits = memory[launches % 2 :][: batch * (length + extra) * vocabulary].view(batch, length + extra, vocabulary)
        rows = LogitRows(logits, torch.zeros(batch, length, dtype=torch.long), torch.ones(batch, length, dtype=torch.bool))
        scoring, per_token = Scoring(None, temperature, 0.0, 1.0), torch.ones(batch, length)
        config = gf.LossConfig(
            epsilon_low=epsilon,
            epsilon_high=epsilon,
            delta=3.0,
            dual_clip=4.0,
            beta=0.1,
            kl_estimator=KL_ESTIMATORS[launches % 3],
            entropy_coef=0.01,
        )
        settings = loss_settings(config)
        policy = PolicyTensors(torch.ones(batch, 1), torch.tensor(1.0), per_token, per_token, per_token, None)
        parts = 1 + launches % 3
        grpo_loss.grpo_loss_fwd(rows, scoring, policy, loss_scale, settings, launches % 2 == 0, logits, parts=parts)
        out = token_logprobs.token_logprobs_fwd(rows, scoring, parts=parts)
        token_logprobs.token_logprobs_bwd(per_token, per_token, rows, scoring, *out, inplace=True, parts=parts)
        scale.scale_(logits[:, :length], torch.tensor(0.5, dtype=torch.bfloat16))
        launches += 1

    # Strides and counts that no longer fit in 32 bits, for which there is no memory here.
    numbers = [2**33] * 8
    token_logprobs._token_sums_kernel[(1,)](
        logits, rows.token_ids, rows.mask, None, per_token, 2**33, 7, 2**18, 1, 3, *numbers, 1.0, 0.0,
        BLOCK_V=token_logprobs.BLOCK, WANT_ENTROPY=True, HAS_SOFTCAP=False, num_warps=token_logprobs.WARPS,
    )  # fmt: skip
    print(json.dumps({"launches": launches, "kept": {kernel.fn.__name__: len(kernel.device_caches[0][0]) for kernel in KERNELS}}))


if __name__ == "__main__":
    main()
