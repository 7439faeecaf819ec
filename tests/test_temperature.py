"""Temperature schedules, adaptive temperatures, resuming them, and the diagnosis of a temperature mismatch."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import pytest
import torch

from grpo_fast.temperature import KINDS, TemperatureSchedule, explain_mismatch

make = TemperatureSchedule.from_config


def test_a_number_is_a_constant() -> None:
    schedule = make(0.9)
    assert schedule.temperatures(0, 2, 3) == schedule.temperatures(10**6, 2, 3) == [0.9] * 6
    assert make(1).base(5) == 1.0
    assert make(schedule) is schedule
    assert schedule.temperatures(0, 0, 4) == []


def test_linear_goes_from_start_to_end_and_stays() -> None:
    schedule = make({"kind": "linear", "start": 0.8, "end": 1.4, "steps": 10})
    assert [schedule.base(step) for step in (0, 5, 10, 11, 1000)] == pytest.approx([0.8, 1.1, 1.4, 1.4, 1.4])
    assert make({"kind": "linear", "start": 1.4, "end": 0.8, "steps": 2}).base(1) == pytest.approx(1.1)


def test_stages_begin_at_their_step() -> None:
    schedule = make({"kind": "staged", "stages": [[0, 1.4], [1000, 1.45], [2000, 1.5]]})
    assert [schedule.base(step) for step in (0, 999, 1000, 1999, 2000, 9999)] == [1.4, 1.4, 1.45, 1.45, 1.5, 1.5]


def test_spread_makes_the_last_of_each_group_hotter() -> None:
    schedule = make({"kind": "constant", "value": 1.0, "spread": 0.5, "spread_share": 0.25})
    assert schedule.temperatures(0, 2, 4) == [1.0, 1.0, 1.0, 1.5] * 2
    assert make({"kind": "constant", "value": 1.0, "spread": 0.5}).temperatures(3, 1, 4) == [1.0, 1.0, 1.5, 1.5]


def simulate(schedule: TemperatureSchedule, measure: Any, steps: int) -> list[float]:
    """The temperatures of a run whose metric is a function of the temperature."""
    values = []
    for step in range(steps):
        values.append(schedule.base(step))
        schedule.observe(measure(values[-1]))
    return values


def test_entropy_reaches_its_target() -> None:
    """With an entropy of 0.35 T - 0.02, the target 0.3 is reached near T = 0.9, from above and from below."""
    for start in (0.7, 1.5):
        schedule = make({"kind": "entropy", "start": start, "tolerance": 0.005, "gain": 0.5})
        values = simulate(schedule, lambda value: {"entropy": 0.35 * value - 0.02}, 200)
        assert 0.35 * values[-1] - 0.02 == pytest.approx(0.3, abs=0.006)
        assert values[0] == start


def test_entropy_within_tolerance_moves_nothing_and_bounds_hold() -> None:
    schedule = make({"kind": "entropy"})
    assert simulate(schedule, lambda _: {"entropy": 0.33}, 20) == [1.0] * 20
    assert simulate(make({"kind": "entropy", "gain": 5.0}), lambda _: {"entropy": 0.0}, 50)[-1] == 1.5
    assert simulate(make({"kind": "entropy", "gain": 5.0}), lambda _: {"entropy": 9.0}, 50)[-1] == 0.7
    one_step = simulate(make({"kind": "entropy", "gain": 1e6}), lambda _: {"entropy": 0.0}, 2)
    assert one_step[1] == pytest.approx(math.exp(0.1))


def test_diversity_raises_and_never_lowers() -> None:
    schedule = make({"kind": "diversity", "start": 1.0, "target": 0.5, "step": 0.1, "max": 1.3, "memory": 0.0})
    values = []
    for distinct in (0.9, 0.4, 0.4, 0.9, 0.9, 0.1, 0.1):
        schedule.observe({"completions/distinct": distinct})
        values.append(schedule.base(0))
    assert values == pytest.approx([1.0, 1.1, 1.2, 1.2, 1.2, 1.3, 1.3])


def test_a_step_without_the_metric_changes_nothing() -> None:
    schedule = make({"kind": "diversity", "target": 0.5})
    schedule.observe({"loss": 0.0})
    schedule.observe({"completions/distinct": math.nan})
    assert schedule.base(0) == 1.0 and schedule.state_dict()["observed"] == 0
    constant = make(1.0)
    constant.observe({"entropy": 0.0})
    assert constant.base(0) == 1.0


@pytest.mark.parametrize("config", [{"kind": "entropy", "gain": 0.3}, {"kind": "diversity", "target": 0.8}])
def test_a_resumed_schedule_continues(config: dict[str, Any]) -> None:
    def measure(value: float) -> dict[str, float]:
        return {"entropy": 0.2 * value, "completions/distinct": 0.5 * value}

    whole = make(config)
    expected = simulate(whole, measure, 20)
    first = make(config)
    begin = simulate(first, measure, 8)
    second = make(config)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begin + simulate(second, measure, 12) == expected
    assert len(set(expected)) > 3  # the temperature changed
    with pytest.raises(ValueError, match="the saved temperature schedule is"):
        make(1.0).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (0.0, "above 0"),
        (-1.0, "above 0"),
        (math.nan, "finite"),
        (math.inf, "finite"),
        (True, "expected a number, or a dictionary"),
        ("hot", "expected a number, or a dictionary"),
        ({"kind": "warm"}, "kind is 'warm'; expected one of constant"),
        ({"value": 1.0}, "kind is None"),
        ({"kind": "constant"}, "lacks value"),
        ({"kind": "constant", "value": 0}, "value is 0; expected a number above 0"),
        ({"kind": "constant", "value": 1.0, "speed": 1}, "has no speed"),
        ({"kind": "linear", "start": 1.0, "end": 0.0, "steps": 5}, "end is 0.0"),
        ({"kind": "linear", "start": 1.0, "end": 2.0, "steps": 0}, "steps is 0"),
        ({"kind": "linear", "start": 1.0, "end": 2.0}, "lacks steps"),
        ({"kind": "staged", "stages": []}, "stages begin at"),
        ({"kind": "staged", "stages": [[5, 1.0]]}, "the first of them 0"),
        ({"kind": "staged", "stages": [[0, 1.0], [0, 1.1]]}, "ascending"),
        ({"kind": "staged", "stages": [1.0]}, "expected pairs"),
        ({"kind": "entropy", "start": 2.0}, "expected min <= start <= max"),
        ({"kind": "entropy", "memory": 1.0}, "memory is 1.0"),
        ({"kind": "constant", "value": 1.0, "spread": -1.0}, "above 0"),
        ({"kind": "constant", "value": 1.0, "spread": 1.0, "spread_share": 2}, "spread_share is 2"),
    ],
)
def test_bad_settings_raise(config: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        make(config)


@pytest.mark.parametrize("config", [0.6, {"kind": "linear", "start": 0.5, "end": 1.0, "steps": 9}, {"kind": "entropy", "min": 0.5}])
def test_cold_training_is_warned_about_with_the_evidence(config: Any) -> None:
    with pytest.warns(UserWarning, match=r"arXiv:2505\.22312"):
        make(config)


@pytest.mark.parametrize("kind", KINDS)
def test_warm_training_is_not(kind: str) -> None:
    needed: dict[str, Any] = {
        "constant": {"value": 0.7},
        "linear": {"start": 0.7, "end": 1.0, "steps": 5},
        "staged": {"stages": [[0, 0.7]]},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make({"kind": kind} | needed.get(kind, {}))


# --- temperature mismatch -------------------------------------------------------------------------------------------------------------


def drawn(temperature: float, *, size: tuple[int, ...] = (6, 40), vocabulary: int = 97) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, ids drawn at a temperature, and the sampler's log-probabilities at it."""
    logits = torch.randn(*size, vocabulary) * 3
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    ids = distribution.sample()
    return logits, ids, distribution.log_prob(ids)


@pytest.mark.parametrize("temperature", [0.3, 0.6, 0.93, 1.0, 1.4, 2.5])
def test_the_temperature_that_explains_the_sampler_is_found(temperature: float) -> None:
    logits, ids, theirs = drawn(temperature)
    found = explain_mismatch(logits, theirs, ids, temperature=1.0)
    assert found.temperature == pytest.approx(temperature, rel=5e-3)
    assert found.gap < 5e-3 and found.tokens == 240
    if abs(temperature - 1) > 0.05:
        assert found.explains() and found.assumed_gap > 10 * found.gap
        assert f"T = {found.temperature:.3g}" in found.sentence(1.0)


def test_untempered_logprobs_are_named_as_such() -> None:
    logits, ids, _ = drawn(0.6)
    raw = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    found = explain_mismatch(logits, raw, ids, temperature=0.6)
    assert found.temperature == pytest.approx(1.0, rel=5e-3)
    assert "before the temperature is applied" in found.sentence(0.6)


def test_a_gap_that_no_temperature_explains() -> None:
    logits, ids, _ = drawn(1.0)
    other = torch.randn_like(logits).mul(3).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    found = explain_mismatch(logits, other, ids, temperature=1.0)
    assert not found.explains() and "no temperature explains it" in found.sentence(1.0)


def test_a_callable_and_a_mask() -> None:
    logits, ids, theirs = drawn(0.6)
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    theirs[:, 20:] = 123.0  # masked, so these values must not be read
    theirs[0, 0] = -math.inf

    def ours(temperature: float) -> torch.Tensor:
        return (logits / temperature).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)

    for source, more in ((ours, {}), (logits, {"token_ids": ids})):
        found = explain_mismatch(source, theirs, mask=mask, **more)  # type: ignore[arg-type]
        assert found.temperature == pytest.approx(0.6, rel=5e-3) and found.tokens == 119


def test_bad_arguments_of_explain_mismatch() -> None:
    logits, ids, theirs = drawn(1.0, size=(2, 3))
    with pytest.raises(ValueError, match="expected"):
        explain_mismatch(logits, theirs)
    with pytest.raises(ValueError, match="no finite value"):
        explain_mismatch(logits, theirs, ids, mask=torch.zeros_like(ids))
    with pytest.raises(ValueError, match="above 0"):
        explain_mismatch(logits, theirs, ids, temperature=0.0)
    with pytest.raises(ValueError, match="the callable returned shape"):
        explain_mismatch(lambda _: theirs[0], theirs)
