"""MaxRL, REINFORCE++, pass@k and exclude_degenerate: tables made by hand, libraries' own functions, and every backend against the truth."""

from __future__ import annotations

import itertools
import math
import types
from fractions import Fraction
from typing import Any

import pytest
import torch
from advantage_cases import NAN, Backend, assert_close, needs_compiler, needs_extension, truth
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peers import peer_module
from torch import Tensor

from grpo_fast.integrations.conventions import advantage_settings
from grpo_fast.loss.advantages import group_advantages

pytest_plugins = ["advantage_cases"]

OFFSETS = torch.tensor([0, 0, 1, 3, 40, 40, 94, 96, 96])  # empty groups, one of one, and large ones


def estimators(rows: int) -> dict[str, dict[str, Any]]:
    lengths = torch.arange(rows) % 7  # some completions have no token in the loss
    return {
        "maxrl": {"scale": "mean"},
        "maxrl-leave-one-out": {"scale": "mean", "baseline": "leave_one_out"},
        "reinforce++": {"scale": "tokens", "lengths": lengths},
        "reinforce++-leave-one-out": {"scale": "tokens", "lengths": lengths.float(), "baseline": "leave_one_out"},
        "reinforce++-excluded": {"scale": "tokens", "lengths": lengths, "exclude_degenerate": True},
        "batch-excluded": {"scale": "batch", "exclude_degenerate": True},
        "group-excluded": {"scale": "group", "exclude_degenerate": True},
        "gdpo-excluded": {"normalize": "normalize_then_sum", "exclude_degenerate": True},
        "pass@1": {"pass_at_k": 1},
        "pass@2": {"pass_at_k": 2, "scale": "none"},
        "pass@5": {"pass_at_k": 5},
    }


NAMES = list(estimators(0))


# ---- tables to be checked with a pencil: eps = 0


def test_table_of_maxrl(backend: Backend) -> None:
    """One of four is right: mean 1/4, so it gets 3/4 / (1/4) = 3. Two of four: mean 1/2. None, and all: exactly 0."""
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    result = backend(rewards, group_size=4, scale="mean", eps=0)
    assert result.advantages.tolist() == [3, -1, -1, -1, 1, -1, 1, -1, *[0] * 8]
    assert result.degenerate.tolist() == [False, False, True, True]
    loo = backend(rewards[:4], group_size=4, scale="mean", eps=0, baseline="leave_one_out")
    assert loo.advantages.tolist() == [4, *[pytest.approx(-4 / 3)] * 3]
    assert backend(rewards[:4], group_size=4, scale="mean", eps=0.25).advantages.tolist() == [1.5, -0.5, -0.5, -0.5]


def test_table_of_reinforce_plus_plus(backend: Backend) -> None:
    """Centred: 1, -1 | 0, 0. Over the tokens 1 1 1, -1, 0 0: mean 1/3, centred squares 12/9 + 16/9 + 2/9 = 10/3, of 6 - 1 tokens: 2/3."""
    arguments: dict[str, Any] = {"group_size": 2, "scale": "tokens", "eps": 0}
    rewards, lengths = torch.tensor([3.0, 1, 5, 5]), torch.tensor([3, 1, 1, 1])
    result = backend(rewards, lengths=lengths, **arguments)
    expected = torch.tensor([2 / 3, -4 / 3, -1 / 3, -1 / 3]).double() / math.sqrt(2 / 3)
    assert_close(result, (expected, torch.tensor([2.0, 5]).double(), torch.tensor([math.sqrt(2), 0]).double(), torch.tensor([False, True])))
    # Without the second group: tokens 1 1 1, -1: mean 1/2, centred squares 3/4 + 9/4 = 3 of 4 - 1 tokens: 1
    excluded = backend(rewards, lengths=lengths, exclude_degenerate=True, **arguments)
    assert excluded.advantages.tolist() == [0.5, -1.5, 0, 0]
    # The whole batch as one group is REINFORCE++ without a baseline: whitened rewards. Tokens 3 3 3, 1, 5, 5: mean 10/3
    plain = backend(rewards, lengths=lengths, **arguments | {"group_size": 4}).advantages.double()
    tokens = torch.tensor([3.0, 3, 3, 1, 5, 5]).double()
    torch.testing.assert_close(plain, ((rewards - tokens.mean()) / tokens.std()).double(), rtol=3e-7, atol=0)


def test_table_of_excluded_groups(backend: Backend) -> None:
    """Of 1, 3 | 7, 7, 7 | 5 only the first group counts: mean 2, centred squares 2 of 2 - 1, so the batch's std is sqrt(2)."""
    rewards, offsets = torch.tensor([1.0, 3, 7, 7, 7, 5]), torch.tensor([0, 2, 5, 6])
    result = backend(rewards, group_offsets=offsets, scale="batch", eps=0, exclude_degenerate=True)
    assert result.advantages.tolist() == [pytest.approx(-math.sqrt(0.5)), pytest.approx(math.sqrt(0.5)), 0, 0, 0, 0]
    assert result.degenerate.tolist() == [False, True, True]
    # GDPO: y = -sqrt(1/2), sqrt(1/2) and zeros: squares 1 of 2 - 1; with the others of 6 - 1
    two = torch.stack([rewards, torch.zeros(6)], 1)
    arguments: dict[str, Any] = {"group_offsets": offsets, "normalize": "normalize_then_sum", "eps": 0}
    assert backend(two, exclude_degenerate=True, **arguments).advantages[:2].tolist() == [
        pytest.approx(-(0.5**0.5)),
        pytest.approx(0.5**0.5),
    ]
    assert backend(two, **arguments).advantages[:2].tolist() == [pytest.approx(-(2.5**0.5)), pytest.approx(2.5**0.5)]


def by_all_sets(rewards: list[float], k: int, eps: float, divide: bool = True) -> list[float]:
    """pass@k from all sets of k completions, in rational numbers."""
    exact = [Fraction(r) for r in rewards]
    sets = [(s, max(exact[i] for i in s)) for s in itertools.combinations(range(len(rewards)), k)]
    mean = sum((best for _, best in sets), Fraction(0)) / len(sets)
    std = math.sqrt(sum((best - mean) ** 2 for _, best in sets) / len(sets)) + eps if divide else 1
    of_i = [[best for s, best in sets if i in s] for i in range(len(rewards))]
    return [0.0 if std == 0 else float(sum(bests, Fraction(0)) / len(bests) - mean) / std for bests in of_i]


@pytest.mark.parametrize(
    "rewards", [[0, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0, 0], [0.3, 0.1, 0.7, 0.7, 0.2, 0.001], [1000.0, 1000.1, 999, 999, -3]]
)
def test_pass_at_k_is_the_mean_over_all_sets(backend: Backend, rewards: list[float]) -> None:
    x = torch.tensor(rewards, dtype=torch.float64)
    for k, eps, scale in itertools.product((1, 2, 3, 4), (0, 0.1), ("group", "none")):
        result = backend(x, group_size=len(rewards), pass_at_k=k, eps=eps, scale=scale)
        expected = by_all_sets(x.tolist(), k, eps, scale == "group")
        torch.testing.assert_close(result.advantages.double(), torch.tensor(expected).double(), rtol=2e-7, atol=1e-12)
        assert result.mean.item() == pytest.approx(x.mean().item()) and result.std.item() == pytest.approx(x.std().item())


def authors_pass_at_k(rewards: Tensor, k: int) -> Tensor:
    """The formulas of the authors' code (github.com/RUCAIBox/Passk_Training, code/passk_adv.py) for rewards of 0 and 1, with their eps."""
    n, right = len(rewards), int(rewards.sum())
    rho = 1 - math.comb(n - right, k) / math.comb(n, k)
    sigma = math.sqrt(rho * (1 - rho)) + 1e-6
    wrong = 1 - rho - math.comb(max(n - right - 1, 0), k - 1) / math.comb(n - 1, k - 1)
    return torch.where(rewards == 1, rewards.new_tensor((1 - rho) / sigma), wrong / sigma)


def test_parity_with_the_authors_of_pass_at_k(backend: Backend, generator: torch.Generator) -> None:
    right = torch.rand(6, 16, generator=generator) < torch.tensor([0.05, 0.1, 0.3, 0.5, 0.8, 0.9])[:, None]
    for k in (1, 2, 4, 8):
        expected = torch.cat([authors_pass_at_k(group.double(), k) for group in right])
        result = backend(right.flatten().double(), group_size=16, pass_at_k=k, eps=1e-6)
        torch.testing.assert_close(result.advantages.double(), expected, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("rewards", [[0.7] * 5, [0, 1, 1, 1, 1], [0.1, 0.2, 0.7, 0.7, 0.7], [NAN, NAN, 0, 1, NAN]])
def test_a_group_in_which_every_set_has_a_best_is_degenerate(backend: Backend, rewards: list[float]) -> None:
    result = backend(torch.tensor([*rewards, 0, 0, 0, 1, 0]), group_size=5, pass_at_k=3, eps=0)
    assert (result.advantages[:5] == 0).all() and (result.advantages[5:] != 0).all()
    assert result.degenerate.tolist() == [True, False]


def test_equal_rewards_of_pass_at_k_have_the_same_bits(backend: Backend, generator: torch.Generator) -> None:
    rewards = torch.randint(0, 4, (40,), generator=generator) / 7
    advantages = backend(rewards, group_size=40, pass_at_k=3).advantages
    for value in rewards.unique():
        assert len(advantages[rewards == value].unique()) == 1


# ---- verl's own functions


@pytest.fixture(scope="module")
def verl() -> types.ModuleType:
    return peer_module("verl", "0.9.1", "trainer.ppo.core_algos", ("omegaconf", "tensordict", "verl.trainer.config", "verl.workers.config"))


def test_parity_with_verls_reinforce_plus_plus_baseline(verl: types.ModuleType, backend: Backend, generator: torch.Generator) -> None:
    lengths = torch.randint(1, 9, (24,), generator=generator)
    mask = (torch.arange(8) < lengths[:, None]).double()
    rewards = torch.randint(0, 3, (24,), generator=generator).double() / 2
    rewards[:8] = 0.7  # a degenerate group: its tokens get minus the mean
    scores = torch.zeros(24, 8).double().scatter(1, lengths[:, None] - 1, rewards[:, None])
    expected, _ = verl.compute_reinforce_plus_plus_baseline_outcome_advantage(scores, mask, torch.arange(24).numpy() // 8)
    options: dict[str, Any] = advantage_settings("verl", "reinforce_plus_plus_baseline")
    result = backend(rewards, group_size=8, lengths=lengths, **options).advantages
    torch.testing.assert_close(result.double()[:, None] * mask, expected, rtol=5e-7, atol=1e-9)
    plain, _ = verl.compute_reinforce_plus_plus_outcome_advantage(scores, mask, types.SimpleNamespace(gamma=1.0))
    options = advantage_settings("verl", "reinforce_plus_plus")
    result = backend(rewards, group_size=24, lengths=lengths, **options).advantages
    torch.testing.assert_close(result.double()[:, None] * mask, plain, rtol=5e-7, atol=1e-9)


def test_parity_with_skyrls_maxrl(backend: Backend, generator: torch.Generator) -> None:
    """By the formula of its compute_maxrl_advantage: (score - mean) / (mean + 1e-6) over the group."""
    rewards = torch.rand(24, generator=generator).double()
    mean = rewards.view(3, 8).mean(1).repeat_interleave(8)
    options: dict[str, Any] = advantage_settings("skyrl", "maxrl")
    found = backend(rewards, group_size=8, **options).advantages
    torch.testing.assert_close(found.double(), (rewards - mean) / (mean + 1e-6), rtol=2e-7, atol=1e-7)


# ---- every implementation against the float64 reference


def rewards_of(rows: int, generator: torch.Generator) -> Tensor:
    """Rewards of at least 0 with ties and with values that do not apply; the last group of eight is degenerate."""
    rewards = torch.randint(0, 5, (rows,), generator=generator) / 3
    rewards[torch.rand(rows, generator=generator) < 0.1] = NAN
    rewards[-8:] = 0.7
    return rewards


@pytest.mark.parametrize("groups", ["equal", "offsets"])
@pytest.mark.parametrize("name", NAMES)
def test_random_batches(backend: Backend, name: str, groups: str, generator: torch.Generator) -> None:
    arguments = estimators(96)[name] | ({"group_size": 8} if groups == "equal" else {"group_offsets": OFFSETS})
    rewards = rewards_of(96, generator)
    result = backend(rewards, **arguments)
    assert_close(result, truth(rewards, **renamed(arguments)))
    assert (result.advantages[rewards.isnan()] == 0).all()
    if groups == "equal" and name != "reinforce++" and "leave-one-out" not in name:
        assert result.degenerate[-1] and (result.advantages[-8:] == 0).all()


def renamed(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments by the reference's names."""
    return {{"pass_at_k": "k"}.get(name, name): value for name, value in arguments.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.7, 100.1, 1 / 3, NAN])
def test_equal_rewards_give_exactly_zero(backend: Backend, name: str, value: float) -> None:
    rewards = torch.full((56,), value)
    result = backend(rewards, group_size=7, eps=1e-9, **estimators(56)[name])
    assert (result.advantages == 0).all() and result.degenerate.all()


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("reinforce++")] + ["reinforce++-excluded"])
def test_an_equal_group_beside_others_gives_exactly_zero(backend: Backend, name: str) -> None:
    rewards = torch.tensor([[0.1] * 8, [0, 1, 0.3, 0.7, 0.1, 0.2, 1, 0], [100.1] * 8]).flatten()
    result = backend(rewards, group_size=8, **estimators(24)[name])
    assert (result.advantages[:8] == 0).all() and (result.advantages[16:] == 0).all()
    assert (result.advantages[8:16] != 0).sum() >= 7
    assert result.degenerate.tolist() == [True, False, True]


@pytest.mark.parametrize("name", [name for name in NAMES if "excluded" in name])
def test_excluded_groups_do_not_change_the_others(backend: Backend, name: str, generator: torch.Generator) -> None:
    """The advantages of a group are the same, whatever degenerate groups are in the batch."""
    arguments = estimators(32)[name]
    rewards = torch.rand(32, generator=generator)
    rewards[8:24] = torch.tensor([0.7, 3.0]).repeat_interleave(8)
    kept = torch.cat([torch.arange(8), torch.arange(24, 32)])
    alone = {key: value[kept] if isinstance(value, Tensor) else value for key, value in arguments.items()}
    torch.testing.assert_close(
        backend(rewards, group_size=8, **arguments).advantages[kept], backend(rewards[kept], group_size=8, **alone).advantages
    )


@pytest.mark.parametrize("sizes", [[700], [1, 399, 0, 1], [3] * 150], ids=["one", "mixed", "many"])
@pytest.mark.parametrize("name", ["maxrl", "reinforce++-excluded", "pass@2", "pass@5"])
def test_group_sizes(backend: Backend, sizes: list[int], name: str, generator: torch.Generator) -> None:
    """On the GPU: a block per group, a block for each of groups of which most are short, a warp per group."""
    rewards = torch.rand(sum(sizes), generator=generator) + 1
    arguments = {"group_offsets": torch.tensor([0, *itertools.accumulate(sizes)]), **estimators(sum(sizes))[name]}
    assert_close(backend(rewards, **arguments), truth(rewards, **renamed(arguments)))


@needs_extension
@needs_compiler
@pytest.mark.parametrize("name", ["reinforce++-excluded", "pass@5"])
@pytest.mark.parametrize("group_size", [8, 600], ids=["warp per group", "block per group"])
def test_the_cuda_kernel_does_not_race(cuda_on_host: Any, monkeypatch: pytest.MonkeyPatch, group_size: int, name: str) -> None:
    rewards = torch.randint(0, 9, (group_size * 2,)).double()
    lengths = estimators(len(rewards))["reinforce++"]["lengths"].double()
    numbers: tuple[Any, ...] = (4, False, False, 1e-4, lengths, True, 0) if name != "pass@5" else (1, False, False, 1e-4, None, False, 5)
    arguments = (rewards, None, group_size, None, *numbers)
    before = cuda_on_host.launches()
    forward = cuda_on_host.group_advantages(*arguments)
    assert cuda_on_host.launches() == before + 1
    monkeypatch.setenv("CUDA_ON_HOST_REVERSED", "1")  # the threads take turns in the opposite order
    assert all(torch.equal(a, b) for a, b in zip(forward, cuda_on_host.group_advantages(*arguments), strict=True))


@needs_extension
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_extension_equals_reference(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 9), max_size=5))
    numbers = st.sampled_from([0.0, 1.0, 0.7, 100.1, 1000.0, 1000.1, NAN]) | st.floats(0, 1e4, width=32)
    rewards = torch.tensor(data.draw(st.lists(numbers, min_size=sum(sizes), max_size=sum(sizes))), dtype=torch.float32)
    arguments = estimators(sum(sizes))[data.draw(st.sampled_from(NAMES))]
    arguments |= {"group_offsets": torch.tensor([0, *itertools.accumulate(sizes)]), "eps": data.draw(st.sampled_from([1e-4, 1e-2, 1.0]))}
    result = Backend("cpu")(rewards, **arguments)
    assert all(x.isfinite().all() for x in result[:3])  # finite in, finite out
    assert_close(result, truth(rewards, **renamed(arguments)))


# ---- other inputs


def test_a_mean_below_zero_is_not_hidden(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where values are not checked: no advantages with the wrong sign."""
    monkeypatch.setattr("grpo_fast.loss.advantages.value_checks_wanted", lambda tensor: False)
    result = backend(torch.tensor([-1.0, 0, 1, 2]), group_size=2, scale="mean")
    assert result.advantages[:2].isnan().all() and result.advantages[2:].isfinite().all()


def test_weighted_rewards_count_in_the_check_of_the_mean() -> None:
    rewards = torch.tensor([[1.0, -1.0], [2.0, 0.0]])
    assert group_advantages(rewards, group_size=2, scale="mean").advantages[0] < 0  # sums of 0 and 2
    with pytest.raises(ValueError, match=r"the weighted sum of rewards\[0\] is -2.0; expected at least 0"):
        group_advantages(rewards, group_size=2, scale="mean", reward_weights=[0.0, 2.0])


@pytest.mark.parametrize("lengths", [[0, 0, 5, 5], [0, 0, 1, 0]])
def test_too_few_tokens(backend: Backend, lengths: list[int]) -> None:
    """Only the tokens of a degenerate group count, or one token: no division by 0, and nothing but finite numbers."""
    for eps, excluded in itertools.product((0, 1e-4), (True, False)):
        result = backend(
            torch.tensor([0.0, 1, 2, 2]), group_size=2, scale="tokens", eps=eps, lengths=torch.tensor(lengths), exclude_degenerate=excluded
        )
        assert result.advantages.isfinite().all() and (result.advantages[2:] == 0).all()


@needs_extension
def test_compiles_into_one_graph(generator: torch.Generator) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(group_advantages, fullgraph=True, backend="aot_eager")
    rewards, arguments = rewards_of(24, generator), estimators(24)["reinforce++-excluded"]
    assert_close(compiled(rewards, group_size=8, **arguments), truth(rewards, group_size=8, **arguments))
