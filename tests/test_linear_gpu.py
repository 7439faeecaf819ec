"""The fused head on a GPU: truth, memory, synchronisations, captured graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import KEPT
from compare import assert_close, of_two_ulps
from linear_cases import LinearCase, random_linear_case
from torch import Tensor

import grpo_fast as gf

pytestmark = pytest.mark.gpu


def on_gpu(x: Any) -> Any:
    return x.to("cuda") if isinstance(x, (Tensor, gf.Support)) else x


def gpu_case(seed: int, dtype: torch.dtype) -> LinearCase:
    case = random_linear_case(seed, dtype)
    tensors = {name: x.cuda() for name, x in case.tensors.items()}
    return LinearCase(tensors, case.token_ids.cuda(), case.advantages.cuda(), {name: on_gpu(x) for name, x in case.options.items()})


@pytest.fixture
def exact_products() -> Any:
    """float32 products in float32, and not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("seed", [*range(24), *range(KEPT, KEPT + 24)])
@pytest.mark.usefixtures("exact_products")
def test_random_options(seed: int) -> None:
    case = gpu_case(seed, torch.float32)
    out, gradients = case.run()
    with gf.use_backend("reference"):
        truth, true_gradients = case.run(torch.float64)
        naive, naive_gradients = case.run()
    steep = 4 if case.options["config"].surrogate == "vespo" else 1
    assert_close(out.logprobs, truth.logprobs, naive.logprobs, "logprobs")
    for name, gradient in gradients.items():
        kl = case.options["config"].beta * case.options["loss_scale"] * truth.logprobs.abs().max().item()
        others = case.tensors["hidden" if name != "hidden" else "weight"].nan_to_num(0, 0, 0).abs().max().item()
        scale = steep * true_gradients[name].abs().max().item() + kl * others
        slack = of_two_ulps(truth.logprobs) * scale
        assert_close(gradient, true_gradients[name].double(), naive_gradients[name], f"gradient of {name}", scale=scale, slack=slack)


def large(trainable: bool) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(8, 512, 512, device="cuda", generator=generator, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(32_000, 512, device="cuda", generator=generator, dtype=torch.bfloat16).mul_(0.05).requires_grad_(trainable)
    ids = torch.randint(32_000, (8, 512), device="cuda", generator=generator)
    return {"hidden": hidden, "weight": weight, "token_ids": ids, "advantages": torch.randn(8, device="cuda", generator=generator)}


@pytest.mark.parametrize("trainable", [True, False])
def test_memory_is_a_chunk_and_the_gradients(trainable: bool) -> None:
    call = large(trainable)
    chunk = 1024 * 32_000 * 2
    gf.linear_grpo_loss(**call, chunk_bytes=chunk).loss.backward()  # whatever libraries keep, they have now
    call["hidden"].grad = call["weight"].grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gf.linear_grpo_loss(**call, chunk_bytes=chunk).loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    of_weight = call["weight"].numel() * (4 + 2) if trainable else 0
    assert chunk < peak < 1.1 * (chunk + of_weight + call["hidden"].numel() * 2)


def test_gradients_are_the_same_bits_each_time() -> None:
    call, found = large(True), []
    for _ in range(2):
        call["hidden"].grad = call["weight"].grad = None
        gf.linear_grpo_loss(**call, chunk_bytes=1024 * 32_000 * 2).loss.backward()
        found.append((call["hidden"].grad, call["weight"].grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def synchronisations(run: Callable[[], Any]) -> list[str]:
    """PyTorch's warnings of what waits for the GPU; not all that speak of synchronizing: the debug mode begins with one about itself."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [str(w.message) for w in seen if "called a synchronizing CUDA operation" in str(w.message)]


def test_one_synchronisation() -> None:
    call = large(True)

    def step() -> None:
        gf.linear_grpo_loss(**call).loss.backward()

    step()
    assert len(synchronisations(lambda: call["advantages"].sum().item())) == 1  # one is seen
    found = synchronisations(step)
    assert len(found) <= 1, found


def test_a_captured_graph_replays_with_new_data() -> None:
    call = large(True)
    mask = torch.ones_like(call["token_ids"], dtype=torch.bool)
    mask[:, 400:] = False
    chunk = 1024 * 32_000 * 2
    items = torch.full((), 3200.0, device="cuda")  # not while the graph is captured: a number that is copied there is refused

    def step() -> Tensor:
        call["hidden"].grad = call["weight"].grad = None
        out = gf.linear_grpo_loss(**call, mask=mask, num_items=items, chunk_bytes=chunk)
        out.loss.backward()
        return out.loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        call["hidden"].copy_(torch.randn_like(call["hidden"]))
        call["hidden"][:, 400:] = float("nan")  # under the mask
    graph.replay()
    replayed = captured.clone(), call["hidden"].grad.clone(), call["weight"].grad.clone()
    loss = step()
    torch.testing.assert_close(replayed[0], loss, rtol=1e-4, atol=1e-5)
    size = call["hidden"].grad.abs().max().item()
    torch.testing.assert_close(replayed[1], call["hidden"].grad, rtol=2e-2, atol=1e-2 * size)
    torch.testing.assert_close(replayed[2], call["weight"].grad, rtol=2e-2, atol=1e-5)
    assert replayed[1].isfinite().all() and replayed[2].isfinite().all()
