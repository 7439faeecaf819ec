"""linear_grpo_loss at its edges: upstream gradients, chunks, types, frozen heads, repetition, and what it costs in operations."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from linear_cases import random_linear_case
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import grpo_fast as gf

B, T, D, V = 4, 6, 8, 23
ROW = V * 4  # bytes of a token's float32 logits
CONFIGS = {
    "token": gf.LossConfig(beta=0.1, entropy_coef=0.05),
    "sequence": gf.LossConfig(loss_type="gspo", beta=0.1, bias_corrected_kl=True, epsilon_low=0.3, epsilon_high=0.3),
    "sequence_token": gf.LossConfig(loss_type="grpo", importance_sampling_level="sequence_token"),
    "vespo": gf.LossConfig(loss_type="vespo"),
}


def arguments(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Off-policy, with masked stretches, sequences of different lengths and one without an advantage."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, generator=generator).to(dtype)
    weight = (torch.randn(V, D, generator=generator) * 0.5).to(dtype)
    ids = torch.randint(V, (B, T), generator=generator)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 3:], mask[2, 0] = False, False
    logprobs = gf.linear_token_logprobs(hidden, weight, ids).logprobs
    return {
        "hidden": hidden,
        "weight": weight,
        "token_ids": ids,
        "advantages": torch.tensor([1.0, -0.7, 0.0, 0.4]),
        "mask": mask,
        "old_logprobs": logprobs + 0.3 * torch.randn(B, T, generator=generator),
        "ref_logprobs": logprobs + 0.3 * torch.randn(B, T, generator=generator),
    }


def run(
    a: dict[str, Any], *, frozen: tuple[str, ...] = (), upstream: float = 1.0, **options: Any
) -> tuple[gf.GRPOOutput, dict[str, Tensor]]:
    a = {**a, **options}
    leaves = {
        name: a[name].detach().clone().requires_grad_(name not in frozen) for name in ("hidden", "weight") if isinstance(a[name], Tensor)
    }
    out = gf.linear_grpo_loss(**{**a, **leaves})
    (out.loss * upstream).backward()
    return out, {name: x.grad for name, x in leaves.items() if x.grad is not None}


def logits_loss(a: dict[str, Any], **options: Any) -> tuple[gf.GRPOOutput, dict[str, Tensor]]:
    """The same by the logits, in float64."""
    a = {**a, **options}
    for name in ("chunk_bytes", "adapter"):
        a.pop(name, None)
    leaves = {name: a.pop(name).detach().double().requires_grad_() for name in ("hidden", "weight")}
    out = gf.grpo_loss(leaves["hidden"] @ leaves["weight"].T, **{"metrics_on": "active", **a})
    out.loss.backward()
    return out, {name: x.grad for name, x in leaves.items()}


def close(actual: dict[str, Tensor], expected: dict[str, Tensor], factor: float = 1.0) -> None:
    for name, x in actual.items():
        assert expected[name].abs().max() > 0
        torch.testing.assert_close(x.double(), factor * expected[name].double(), rtol=2e-5, atol=2e-7 * abs(factor))


# ---- backward


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_upstream_gradients_and_retained_graphs(config: gf.LossConfig) -> None:
    a = arguments()
    expected, true_gradients = logits_loss(a, config=config)
    out, gradients = run(a, config=config)
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-5, atol=1e-7)
    close(gradients, true_gradients)
    close(run(a, config=config, upstream=-3.0)[1], true_gradients, -3.0)
    close(run(a, config=config, loss_scale=0.125)[1], true_gradients, 0.125)

    hidden, weight = a["hidden"].clone().requires_grad_(), a["weight"].clone().requires_grad_()
    out = gf.linear_grpo_loss(**{**a, "hidden": hidden, "weight": weight}, config=config)
    for times in (1, 2, 3):  # accumulates in .grad, which must not be the memory that is kept
        (out.loss * (2 if times == 2 else 1)).backward(retain_graph=times < 3)
    close({"hidden": hidden.grad, "weight": weight.grad}, true_gradients, 4.0)
    with pytest.raises(RuntimeError, match="second time"):
        out.loss.backward()


def test_outputs_that_are_not_the_loss_are_constants() -> None:
    out, _ = run(arguments())
    assert out.loss.requires_grad and not out.logprobs.requires_grad and not out.entropy.requires_grad
    assert not any(x.requires_grad for x in out.metrics.values())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_all_masked_is_a_differentiable_zero(config: gf.LossConfig) -> None:
    a = arguments()
    a["hidden"] = torch.full_like(a["hidden"], float("nan"))
    out, gradients = run(a, config=config, mask=torch.zeros(B, T, dtype=torch.bool), token_ids=torch.full((B, T), -100))
    assert out.loss == 0 and not out.active.any() and all(x.isfinite() for x in out.metrics.values())
    assert gradients.keys() == {"hidden", "weight"} and all((x == 0).all() for x in gradients.values())


@pytest.mark.parametrize("metrics_on", ["active", "all"])
@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "vespo", "grpo"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_no_advantage_anywhere_is_a_gradient_of_zero(loss_type: str, on_policy: bool, metrics_on: str) -> None:
    a = arguments()
    if on_policy:
        a["old_logprobs"] = None
    out, gradients = run(a, config=gf.LossConfig(loss_type=loss_type), advantages=torch.zeros(B), metrics_on=metrics_on)
    assert out.loss == 0 and all((x == 0).all() for x in gradients.values()) and len(gradients) == 2
    assert out.active.sum() == (a["mask"].sum() if metrics_on == "all" else 0)
    assert all(x.isfinite() for x in out.metrics.values()) and out.metrics["active_fraction"] == 0


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "vespo"])
@pytest.mark.parametrize("extra", [0, 1])
def test_no_token_at_all(shape: tuple[int, int], loss_type: str, extra: int) -> None:
    hidden = torch.randn(shape[0], shape[1] + extra, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    ids, old = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    out = gf.linear_grpo_loss(hidden, weight, ids, torch.ones(shape[0]), old_logprobs=old, config=gf.LossConfig(loss_type=loss_type))
    out.loss.backward()
    assert weight.grad is not None and hidden.grad is not None
    assert out.loss == 0 and (weight.grad == 0).all() and hidden.grad.shape == hidden.shape and (hidden.grad == 0).all()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("frozen", [("weight",), ("hidden",), ("hidden", "weight")])
def test_frozen_tensors_get_no_gradient_and_change_no_other(config: gf.LossConfig, frozen: tuple[str, ...]) -> None:
    a = arguments()
    out, gradients = run(a, config=config)
    if len(frozen) == 2:
        with torch.no_grad():
            other = gf.linear_grpo_loss(**a, config=config)
        assert not other.loss.requires_grad
        rest: dict[str, Tensor] = {}
    else:
        other, rest = run(a, config=config, frozen=frozen)
    assert set(rest) == {"hidden", "weight"} - set(frozen)
    assert torch.equal(other.logprobs, out.logprobs) and all(torch.equal(x, gradients[name]) for name, x in rest.items())
    torch.testing.assert_close(other.loss, out.loss.detach() if not other.loss.requires_grad else out.loss, rtol=1e-6, atol=0)


# ---- which tokens are computed, and in what pieces


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_metrics_on_changes_neither_loss_nor_gradient(config: gf.LossConfig) -> None:
    a = arguments()
    of_active, gradients = run(a, config=config, metrics_on="active")
    of_all, others = run(a, config=config, metrics_on="all")
    assert torch.equal(of_active.loss, of_all.loss) and all(torch.equal(x, others[name]) for name, x in gradients.items())
    assert torch.equal(of_all.active, a["mask"]) and (of_active.active <= of_all.active).all()
    assert torch.equal(of_active.logprobs, torch.where(of_active.active, of_all.logprobs, 0))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("on_policy", [True, False])
def test_any_size_of_chunk(config: gf.LossConfig, on_policy: bool) -> None:
    """From one token to everything; sequences longer than a chunk are computed twice but for their last piece, and only off-policy."""
    a = arguments()
    if on_policy:
        a["old_logprobs"] = None
    _, true_gradients = logits_loss(a, config=config)
    whole, _ = run(a, config=config, chunk_bytes=1 << 20)
    by_sequence = config.level != "token" or config.surrogate == "vespo"
    corrected = config.level == "sequence" and config.bias_corrected_kl  # the KL's weight is the sequence's ratio, which is to be derived
    for rows in (1, 2, 3, 4, 7, 11, 13):
        out, gradients = run(a, config=config, chunk_bytes=rows * ROW)
        torch.testing.assert_close(out.loss, whole.loss, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(out.logprobs, whole.logprobs, rtol=1e-5, atol=1e-6)
        close(gradients, true_gradients)
        lengths = out.active.sum(1).tolist()
        recomputed = 0
        if by_sequence and (not on_policy or corrected):
            for length in lengths:
                recomputed += length - (length % rows or rows) if length > rows else 0  # all but the last piece
        assert out.metrics["recomputed_fraction"].item() == pytest.approx(recomputed / max(sum(lengths), 1), abs=1e-7), rows


def test_chunks_of_whole_sequences_give_what_one_chunk_gives() -> None:
    a = arguments()
    for name in ("sequence", "vespo"):
        one, gradients = run(a, config=CONFIGS[name])
        cut, others = run(a, config=CONFIGS[name], chunk_bytes=9 * ROW)
        assert cut.metrics["recomputed_fraction"] == 0 and torch.allclose(one.loss, cut.loss, rtol=1e-6)
        close(others, gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_call_gives_the_same_bits(dtype: torch.dtype) -> None:
    for seed in (3, 8, 12, 19):
        case = random_linear_case(seed, dtype)
        (first, gradients), (second, others) = case.run(), case.run()
        for a, b in zip(first[:4], second[:4], strict=True):
            assert torch.equal(a, b)
        assert all(torch.equal(x, second.metrics[name]) for name, x in first.metrics.items())
        assert all(torch.equal(x, others[name]) for name, x in gradients.items())


def test_the_rows_do_not_depend_on_the_number_of_threads() -> None:
    """Of what is not a product of the vendor's library: hidden states and weights of whole numbers make those products exact."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-2, 3, (2, 40, 4), generator=generator).float()
    weight = torch.randint(-2, 3, (701, 4), generator=generator).float()
    ids, old = torch.randint(701, (2, 40), generator=generator), torch.randn(2, 40, generator=generator) * 0.1 - 6
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            out = gf.linear_grpo_loss(hidden, weight, ids, torch.tensor([1.0, -1.0]), old_logprobs=old, chunk_bytes=17 * 701 * 4)
        finally:
            torch.set_num_threads(1)
        results.append((out.loss, out.logprobs, out.entropy, *out.metrics.values()))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


# ---- types, and heads that are no matrix


@pytest.mark.parametrize(
    "types", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)], ids=str
)
def test_two_types_are_computed_in_the_one_that_holds_both(types: tuple[torch.dtype, torch.dtype]) -> None:
    a = arguments()
    a["hidden"], a["weight"] = a["hidden"].to(types[0]), a["weight"].to(types[1])
    _, true_gradients = logits_loss(a)
    out, gradients = run(a)
    assert out.loss.dtype == torch.float32
    for name, x in gradients.items():
        assert x.dtype == a[name].dtype
        scale = true_gradients[name].abs().max().item()
        torch.testing.assert_close(x.double(), true_gradients[name], rtol=0, atol=scale * max(torch.finfo(x.dtype).eps, 1e-5))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_is_that_of_torch(config: gf.LossConfig, trainable: bool, of: torch.dtype) -> None:
    a = arguments()
    a["hidden"] = a["hidden"].to(of)
    frozen = () if trainable else ("weight",)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, gradients = run(a, config=config, frozen=frozen, logits_dtype="input")
        hidden, weight = a["hidden"].clone().requires_grad_(), a["weight"].clone().requires_grad_(trainable)
        logits = nn.functional.linear(hidden, weight)
        assert logits.dtype == torch.bfloat16
        rest = {name: x for name, x in a.items() if name not in ("hidden", "weight")}
        expected = gf.grpo_loss(logits, config=config, **rest, metrics_on="active")
    expected.loss.backward()
    assert torch.equal(out.logprobs, expected.logprobs)  # the logits are bitwise the same
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-7)
    for name, leaf in (("hidden", hidden), ("weight", weight)):
        if leaf.requires_grad:
            scale = leaf.grad.float().abs().max().item()
            assert gradients[name].dtype == leaf.dtype
            torch.testing.assert_close(gradients[name], leaf.grad, rtol=0, atol=2.0**-7 * scale)
        else:
            assert name not in gradients


class Frozen(nn.Module):
    """What a quantised head offers: no weight, a forward."""

    matrix: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("matrix", weight)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.matrix)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", ["module", "linear", "lambda"])
@pytest.mark.parametrize("metrics_on", ["active", "all"])
def test_a_callable_head_is_its_matrix(config: gf.LossConfig, kind: str, metrics_on: str) -> None:
    a = arguments()
    linear = nn.Linear(D, V, bias=False).requires_grad_(False)
    linear.weight.data = a["weight"]
    heads: dict[str, Any] = {"module": Frozen(a["weight"]), "linear": linear, "lambda": lambda x: nn.functional.linear(x, a["weight"])}
    settings: dict[str, Any] = {"config": config, "metrics_on": metrics_on, "softcap": 3.0, "temperature": 0.7, "chunk_bytes": 5 * ROW}
    expected, true_gradients = run(a, frozen=("weight",), **settings)
    out, gradients = run(a, **{**settings, "weight": heads[kind]})
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(out.logprobs, expected.logprobs)
    close(gradients, true_gradients)
    for reduce in (lambda o: o.logprobs.sum(), lambda o: o.entropy.sum(), lambda o: o.logprobs.sum() + o.entropy.sum()):
        found = []
        for weight in (heads[kind], a["weight"]):
            hidden = a["hidden"].clone().requires_grad_()
            lp = gf.linear_token_logprobs(hidden, weight, a["token_ids"], mask=a["mask"], temperature=0.7, chunk_bytes=5 * ROW)
            found.append(torch.autograd.grad(reduce(lp), hidden)[0])
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("function", ["loss", "logprobs"])
def test_a_callable_head_under_autocast(function: str) -> None:
    """A model under autocast hands hidden states of bfloat16 to a head of float32: so does the fused one."""
    a = arguments()
    hidden = a["hidden"].bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if function == "loss":
            loss = gf.linear_grpo_loss(hidden, Frozen(a["weight"]), a["token_ids"], a["advantages"]).loss
            expected = gf.grpo_loss(Frozen(a["weight"])(hidden), a["token_ids"], a["advantages"], metrics_on="active").loss
        else:
            out = gf.linear_token_logprobs(hidden, Frozen(a["weight"]), a["token_ids"])
            loss = out.logprobs.sum() + out.entropy.sum()
            other = gf.token_logprobs(Frozen(a["weight"])(hidden), a["token_ids"])
            expected = other.logprobs.sum() + other.entropy.sum()
    torch.testing.assert_close(loss, expected)
    found, true = (torch.autograd.grad(x, hidden)[0].float() for x in (loss, expected))
    torch.testing.assert_close(found, true, rtol=0, atol=2.0**-7 * true.abs().max().item())


# ---- what it costs


def addmm_flops(out: Any, a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def product_flops(out: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:  # flop_counter does not know this package's operator
    return 2 * a[0] * a[1] * b[1]


def products(function: Any) -> float:
    """Multiply-adds of matrix products, in units of D V: 2 for each token and product."""
    formulas = {torch.ops.aten.addmm_: addmm_flops, torch.ops.grpo_fast.product_: product_flops}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        function()
    return counter.get_total_flops() / (D * V)


@pytest.mark.parametrize("chunk", [None, 5 * ROW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_the_loss(chunk: int | None, dtype: torch.dtype) -> None:
    a = {**arguments(dtype=dtype), "chunk_bytes": chunk}
    tokens, inactive = int(a["mask"].sum()), int(a["mask"][2].sum())
    active = tokens - inactive
    assert products(lambda: run(a)) == 6 * active
    assert products(lambda: run(a, frozen=("weight",))) == 4 * active
    assert products(lambda: run(a, frozen=("hidden",))) == 4 * active
    assert products(lambda: run(a, metrics_on="all")) == 6 * active + 2 * inactive
    assert products(lambda: run(a, config=CONFIGS["token"])) == 6 * tokens  # a KL and an entropy term make every token count
    with torch.no_grad():
        assert products(lambda: gf.linear_grpo_loss(**a)) == 2 * active
        assert products(lambda: gf.linear_grpo_loss(**a, metrics_on="all")) == 2 * tokens


@pytest.mark.parametrize("name", ["gspo", "vespo"])
def test_products_of_a_ratio_of_whole_sequences(name: str) -> None:
    a, config = arguments(), gf.LossConfig(loss_type=name)
    lengths = [6, 3, 6]  # without the third, which has no advantage
    active = sum(lengths)
    for rows in (6, 7, 9, 15, 100):
        assert products(functools.partial(run, a, config=config, chunk_bytes=rows * ROW)) == 6 * active, rows
    assert products(lambda: run(a, config=config, chunk_bytes=4 * ROW)) == 6 * active + 2 * 2 * 4  # pieces of 4 and 2 tokens
    assert products(lambda: run(a, config=config, chunk_bytes=4 * ROW, frozen=("weight",))) == 4 * active + 2 * 2 * 4
    a["old_logprobs"] = None
    assert products(lambda: run(a, config=config, chunk_bytes=ROW)) == 6 * active


def test_products_of_log_probabilities() -> None:
    a = arguments()
    tokens = int(a["mask"].sum())

    def logprobs(trainable: bool, of: str, keep_rows: int) -> Any:
        def step() -> None:
            hidden, weight = a["hidden"].clone().requires_grad_(), a["weight"].clone().requires_grad_(trainable)
            out = gf.linear_token_logprobs(hidden, weight, a["token_ids"], mask=a["mask"], chunk_bytes=5 * ROW, keep_bytes=keep_rows * ROW)
            (out.logprobs if of == "logprobs" else out.logprobs + out.entropy).sum().backward()

        return step

    with torch.no_grad():
        call = (a["hidden"], a["weight"], a["token_ids"])
        assert products(lambda: gf.linear_token_logprobs(*call, mask=a["mask"])) == 2 * tokens
    assert products(logprobs(False, "logprobs", 0)) == 4 * tokens
    assert products(logprobs(False, "both", 0)) == 8 * tokens
    for of in ("logprobs", "both"):
        assert products(logprobs(True, of, 1000)) == 6 * tokens
        assert products(logprobs(True, of, 0)) == 8 * tokens
        assert products(logprobs(True, of, 11)) == 8 * tokens - 2 * 10  # two chunks of five are kept
