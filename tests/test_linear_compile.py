"""The head's operators as PyTorch sees them: opcheck, and torch.compile without graph breaks or endless compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import labelled
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import grpo_fast as gf
from grpo_fast.head.matrix_products import DenseHead
from grpo_fast.loss.kernel_settings import config_from_numbers, config_numbers

OPERATORS = torch.ops.grpo_fast
B, T, D, V, R = 2, 3, 4, 19, 2
CONFIGS = [
    gf.LossConfig(entropy_coef=0.1, beta=0.1),
    gf.LossConfig(loss_type="gspo", beta=0.1, bias_corrected_kl=True),
    gf.LossConfig(loss_type="vespo"),
    gf.LossConfig(loss_type="grpo", delta=1.5, dual_clip=3.0, aggregation="fixed_length", max_completion_length=8),
]
CUSTOM = gf.LossConfig(loss_type="custom", surrogate=lambda ratio, advantages, one, other: -ratio * advantages * one - other)
ids_of = lambda config: config.loss_type  # noqa: E731


def head(dtype: torch.dtype, everything: bool, extra: int) -> list[Tensor | None]:
    tensors = [torch.randn(B, T + extra, D), torch.randn(V, D), torch.randn(V), torch.randn(B, T + extra, R), torch.randn(V, R)]
    return [x.to(dtype).requires_grad_() if i < 2 or everything else None for i, x in enumerate(tensors)]


def rows(kept: bool = False) -> tuple[Any, ...]:
    """Token ids, mask, kept sets (of one id, of two, of none) and scoring."""
    mask, ids = torch.tensor([[True, True, False, True, True, True]]), torch.randint(V, (1, B * T))
    sets = [[int(y), (int(y) + 1) % V][: n % 3] for n, y in enumerate(ids[0])]
    support = gf.Support.from_lists(sets)
    return ids, mask, *((support.token_ids, support.offsets) if kept else (None, None)), torch.full((1, B * T), 0.8), 1.0, 5.0, 0.5, V


@pytest.mark.parametrize("config", [*CONFIGS, CUSTOM], ids=ids_of)
@pytest.mark.parametrize(("dtype", "everything", "extra"), [(torch.float32, True, 1), (torch.bfloat16, False, 0)], ids=["all", "plain"])
def test_opcheck_loss(config: gf.LossConfig, dtype: torch.dtype, everything: bool, extra: int) -> None:
    tensors = head(dtype, everything, extra)
    per_token = [torch.rand(1, B * T) for _ in range(6)]
    segment = torch.arange(B).repeat_interleave(T)
    how = (dtype, torch.float32, False, T, 4 * V * dtype.itemsize, [x is not None for x in tensors])
    arguments = (*tensors, *rows(everything), *per_token[:3], per_token[3] - 3, per_token[4] - 3, per_token[5])
    columns = (torch.rand(2, B * T), ["one", "other"]) if config.custom is not None else (None, [])
    arguments = (*arguments, *columns, segment, B, False, 0.5)
    torch.library.opcheck(OPERATORS.linear_grpo_loss.default, (*arguments, config_numbers(config), True, *how))


@pytest.mark.parametrize(("dtype", "everything", "extra"), [(torch.float32, True, 1), (torch.bfloat16, False, 0)], ids=["all", "plain"])
def test_opcheck_log_probabilities(dtype: torch.dtype, everything: bool, extra: int) -> None:
    tensors = head(dtype, everything, extra)
    how = (dtype, torch.float32, False, T, 4 * V * dtype.itemsize, [x is not None for x in tensors])
    arguments = (*tensors, *rows(everything), *how)
    torch.library.opcheck(OPERATORS.linear_token_logprobs.default, arguments)
    detached = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    statistics = OPERATORS.linear_token_logprobs(*detached)[:3]
    upstream = torch.ones(1, 1).expand(1, B * T)  # stride 0
    torch.library.opcheck(OPERATORS.linear_token_logprobs_backward.default, (upstream, torch.randn(1, B * T), *detached, *statistics))


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("adapted", [True, False])
def test_opcheck_log_probabilities_of_a_frozen_head(adapted: bool, extra: int) -> None:
    tensors = head(torch.float32, adapted, extra)
    states = [x is not None and i in (0, 3) for i, x in enumerate(tensors)]
    given = [x if wanted or x is None else x.detach() for x, wanted in zip(tensors, states, strict=True)]
    torch.library.opcheck(
        OPERATORS.linear_token_logprobs.default, (*given, *rows(adapted), torch.float32, torch.float32, False, T, 4 * V * 4, states)
    )


@pytest.mark.parametrize("of", ["logprobs", "entropy", "both"])
def test_compiled_log_probabilities_of_a_frozen_head(of: str) -> None:
    """By d logprob / d hidden, which NaN under the mask does not reach, or by the logits computed again for a gradient of the entropy."""

    def total(hidden: Tensor, adapted: Tensor, weight: Tensor, adapter_weight: Tensor, ids: Tensor, mask: Tensor, g: Tensor) -> Tensor:
        lp = gf.linear_token_logprobs(hidden, weight, ids, mask=mask, temperature=0.7, adapter=(adapted, adapter_weight))
        parts = {"logprobs": lp.logprobs * g, "entropy": lp.entropy * g, "both": lp.logprobs * g + lp.entropy}
        return parts[of].sum()

    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    mask = torch.rand(B, T) > 0.3
    states = [torch.randn(B, T + 1, D), torch.randn(B, T + 1, R)]
    for x in states:
        x[:, :T][~mask] = float("nan")
    rest: tuple[Tensor, ...] = (
        torch.randn(V, D),
        torch.randn(V, R),
        torch.randint(V, (B, T)),
        mask,
        torch.where(mask, torch.randn(B, T), float("nan")),
    )
    found = []
    for function in (compiled, total):
        leaves = [x.clone().requires_grad_() for x in states]
        result = function(*leaves, *rest)
        found.append(torch.autograd.grad(result, leaves, torch.ones(())))
        assert all(x.isfinite().all() and x.abs().max() > 0 for x in found[-1])
    for ours, eager in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("of", ["logprobs", "entropy"])
@pytest.mark.parametrize("trainable", [True, False])
def test_products_of_compiled_log_probabilities(trainable: bool, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 N D V with a frozen head as outside of graphs, 8 with a trainable one or where the entropy has a gradient."""
    products = []
    for name in ("logits", "add_gradient"):
        original = getattr(DenseHead, name)

        def counted(self: Any, first: Tensor, *rest: Any, original: Any = original, name: str = name, **options: Any) -> Any:
            out = original(self, first, *rest, **options)
            products.append(1 if name == "logits" else sum(self.needs_grad))
            return out

        monkeypatch.setattr(DenseHead, name, counted)

    def step(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return getattr(gf.linear_token_logprobs(hidden, weight, ids), of).sum()

    torch._dynamo.reset()
    hidden, weight = torch.randn(B, T, D, requires_grad=True), torch.randn(V, D, requires_grad=trainable)
    torch.compile(step, fullgraph=True, backend="aot_eager")(hidden, weight, torch.randint(V, (B, T))).backward()
    assert 2 * sum(products) == (4 if of == "logprobs" and not trainable else 8)


@pytest.mark.parametrize(
    "config", [*CONFIGS, gf.LossConfig(loss_type="cispo", epsilon_high=2.0), gf.LossConfig(loss_type="sapo")], ids=ids_of
)
def test_a_config_comes_back_from_its_numbers(config: gf.LossConfig) -> None:
    assert config_from_numbers(config_numbers(config)) == config


def step(x: dict[str, Any], config: gf.LossConfig, temperature: float | Tensor, chunk_bytes: int | None) -> dict[str, Tensor]:
    out = gf.linear_grpo_loss(
        x["hidden"] * 1.0,
        x["weight"],
        x["ids"],
        x["advantages"],
        bias=x["bias"],
        old_logprobs=x["old"],
        ref_logprobs=x["old"],
        mask=x["mask"],
        temperature=temperature,
        config=config,
        chunk_bytes=chunk_bytes,
    )
    lp = gf.linear_token_logprobs(
        x["hidden"] * 2.0, x["weight"], x["ids"], mask=x["mask"], temperature=temperature, chunk_bytes=chunk_bytes
    )
    return {"loss": out.loss + 0.1 * (lp.logprobs.sum() + lp.entropy.mean()), "logprobs": out.logprobs, "other": lp.logprobs, **out.metrics}


def inputs(batch: int, length: int, vocabulary: int, extra: int = 0) -> dict[str, Any]:
    return {
        "hidden": torch.randn(batch, length + extra, D, requires_grad=True),
        "weight": torch.randn(vocabulary, D, requires_grad=True),
        "bias": torch.randn(vocabulary, requires_grad=True),
        "ids": torch.randint(vocabulary, (batch, length)),
        "advantages": torch.randn(batch),
        "old": torch.randn(batch, length) - 3,
        "mask": torch.rand(batch, length) > 0.2,
    }


@pytest.mark.parametrize("config", CONFIGS[:3], ids=ids_of)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compiled_is_eager_without_recompilation(backend: str, config: gf.LossConfig) -> None:
    """Batch, length, vocabulary and temperature change: after the first change they are symbols. One loss; the others have one batch."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    batches = [(2, 5, 50, 1.0), (3, 6, 60, 0.7), (4, 9, 61, 0.6)] if config.loss_type == "gspo" else [(3, 6, 60, 0.7)]
    with gf.use_backend(backend):
        for batch, length, vocabulary, temperature in batches:
            x = inputs(batch, length, vocabulary)
            results = []
            for function in (compiled, step):
                out = function(x, config, temperature, None)
                out["loss"].backward()
                leaves = [x[name] for name in ("hidden", "weight", "bias")]
                results.append([*out.values(), *(leaf.grad for leaf in leaves)])
                for leaf in leaves:
                    leaf.grad = None
            for ours, eager in zip(*results, strict=True):
                torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= min(len(batches), 2)


def test_compiled_by_chunks_with_an_extra_position_and_tensor_temperatures() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    x, config = inputs(4, 6, 30, extra=1), CONFIGS[1]
    for temperature in (torch.full((4,), 0.7), torch.rand(4) + 0.5):
        expected = step(x, config, temperature, 9 * 30 * 4)
        found = compiled(x, config, temperature, 9 * 30 * 4)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=labelled(name))
        true = torch.autograd.grad(expected["loss"], [x["hidden"], x["weight"]])
        torch.testing.assert_close(torch.autograd.grad(found["loss"], [x["hidden"], x["weight"]]), true, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


def test_compiled_without_gradient_and_under_autocast() -> None:
    x, config = inputs(3, 5, 40), CONFIGS[0]
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for name, value in step(x, config, 0.8, None).items():
            again = compiled(x, config, 0.8, None)[name]
            assert not again.requires_grad
            torch.testing.assert_close(again, value, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = step(x, config, 0.8, 7 * 40 * 2), compiled(x, config, 0.8, 7 * 40 * 2)
    torch.testing.assert_close(found["logprobs"], expected["logprobs"])
    true = torch.autograd.grad(expected["loss"], [x["hidden"], x["weight"], x["bias"]])
    for ours, eager in zip(torch.autograd.grad(found["loss"], [x["hidden"], x["weight"], x["bias"]]), true, strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=2.0**-7 * eager.abs().max().item())


@pytest.mark.slow
def test_a_compiled_training_step_with_inductor() -> None:
    """A small model and its head in one graph; after three steps of Adam the parameters are those of the eager one."""

    def trained(compile_it: bool) -> list[Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        body, out = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, D), nn.Tanh()), nn.Linear(D, V, bias=False)
        parameters = [*body.parameters(), *out.parameters()]
        optimiser = torch.optim.SGD(parameters, lr=0.5)
        prompts, ids = torch.randint(V, (3, 7)), torch.randint(V, (3, 6))

        def loss(temperature: float, factor: float) -> Tensor:
            hidden = body(prompts)
            return factor * gf.linear_grpo_loss(hidden, out.weight, ids, torch.tensor([1.0, -1.0, 0.5]), temperature=temperature).loss

        function = torch.compile(loss, fullgraph=True) if compile_it else loss
        for temperature in (1.0, 0.7, 0.6):
            optimiser.zero_grad()
            function(temperature, 3.0).backward()
            optimiser.step()
        return [p.detach() for p in parameters]

    for ours, eager in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)
