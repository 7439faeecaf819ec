"""The temperature of a run: one object that the sampler, the loss, the old and reference log-probabilities and the metrics all read.

Sampling at T draws from softmax(z/T). The policy that is optimised must be that same softmax(z/T), or the importance ratio is wrong from
the first step. So `TemperatureSchedule` alone says what T is at a step, for each completion; temperature_mismatch.py finds the temperature
that a sampler must have used if its log-probabilities disagree with the trainer's.

    schedule = TemperatureSchedule.from_config({"kind": "linear", "start": 0.6, "end": 1.4, "steps": 100})
    schedule.temperatures(step=0, num_prompts=2, group_size=4)       # eight times 0.6

Training temperatures in the literature: T = 1 for DeepSeek-R1-Zero, and 0.7 in the second stage of DeepSeek-R1, where higher ones gave
incoherent text (arXiv:2501.12948). At T = 0.6 the entropy starts near zero or falls to it within some hundred steps, while T = 1 goes on
learning (Skywork-OR1, arXiv:2505.22312, section 3.2.4). The best T keeps the entropy of softmax(z/T) near 0.3 (AceReason-Nemotron 1.1,
arXiv:2506.13284). T may rise from stage to stage as diversity falls (POLARIS, hkunlp.github.io/blog/2025/Polaris).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo_fast.utils.warn import warn

__all__ = ["KINDS", "ScheduleState", "TemperatureSchedule", "TemperatureSpec", "check_positive"]

Settings = Mapping[str, Any]  # of a schedule, as a user writes them; checked by `TemperatureSchedule.from_config`
ScheduleState = dict[str, Any]  # values that JSON can hold

KINDS = ("constant", "linear", "staged", "entropy", "diversity")
WARN_BELOW = 0.7
MAX_LOG_CHANGE = 0.1  # per observation: an outlier changes the temperature by at most about a tenth

_FIELDS = {  # kind -> (required, optional) keys of its dictionary
    "constant": (("value",), ()),
    "linear": (("start", "end", "steps"), ()),
    "staged": (("stages",), ()),
    "entropy": ((), ("start", "target", "tolerance", "gain", "min", "max", "memory", "metric")),
    "diversity": ((), ("start", "target", "step", "min", "max", "memory", "metric")),
}
_SPREAD = ("spread", "spread_share")


@dataclass(frozen=True)
class TemperatureSpec:
    """The parsed settings of a schedule; see `TemperatureSchedule.from_config`."""

    kind: str
    start: float
    end: float | None = None
    steps: int = 0
    stages: tuple[tuple[int, float], ...] = ()
    target: float = 0.0
    tolerance: float = 0.0
    gain: float = 0.0
    low: float = 0.0
    high: float = math.inf
    memory: float = 0.0
    metric: str = ""
    spread: float = 0.0
    spread_share: float = 0.5


class TemperatureSchedule:
    """The temperature at each step, for each completion. The adaptive kinds also depend on what the run has measured.

    Make one with `from_config`. `temperatures` gives the temperatures of a rollout, `observe` takes the metrics of a step, and `state_dict`
    and `load_state_dict` save and restore the state of the adaptive kinds, so that a resumed run continues with the same temperatures.
    """

    def __init__(self, spec: TemperatureSpec) -> None:
        self.spec = spec
        self._value = spec.start  # current temperature of the adaptive kinds
        self._mean: float | None = None  # running mean of the observed metric
        self._observed = 0

    @classmethod
    def from_config(cls, config: float | Settings | TemperatureSchedule) -> TemperatureSchedule:
        """Make a schedule from a number, or from a dictionary with a ``kind`` and its settings; a schedule is returned unchanged.

        ==============  ===================================================================================================
        constant        ``value``
        linear          ``start``, ``end``, ``steps``: from ``start`` to ``end`` in this many steps, constant afterwards
        staged          ``stages``: [[0, 1.4], [1000, 1.45], [2000, 1.5]]: from this step on, this temperature (POLARIS)
        entropy         moves the entropy of softmax(z/T) towards ``target`` (0.3, arXiv:2506.13284): after each rollout T is multiplied
                        by exp(gain (target - entropy)), gain 0.05, unless the entropy is within ``tolerance`` (0.05) of the target
        diversity       keeps a measure of diversity above ``target``: below it T grows by ``step`` (0.05); T never falls (POLARIS raises
                        T from stage to stage). ``metric``: which measure ("completions/distinct", the share of different completions in
                        a group, target 0.5)
        ==============  ===================================================================================================

        The adaptive kinds, entropy and diversity, have a ``start`` (1.0), the bounds ``min`` (0.7) and ``max`` (1.5), and a ``memory``
        (0.8), the weight of the past in the running mean of the observations. Every kind may have a ``spread`` within the group
        (arXiv:2510.08892 trains on mixed temperatures): the last ``spread_share`` (0.5) of each group is drawn at T + spread.

        Raises:
            ValueError: an unknown kind or key, a missing key, or a temperature that is not above 0.
            TypeError: it is neither a number nor a dictionary.

        Warns:
            UserWarning: the schedule goes below 0.7.
        """
        if isinstance(config, TemperatureSchedule):
            return config
        if isinstance(config, (int, float)) and not isinstance(config, bool):
            schedule = cls(TemperatureSpec("constant", check_positive("temperature", config)))
        elif isinstance(config, Mapping):
            schedule = cls(_parse(config))
        else:
            raise TypeError(
                f"temperature is a {type(config).__name__}; expected a number, or a dictionary such as "
                "{'kind': 'constant', 'value': 1.0}."
            )
        if schedule.lowest < WARN_BELOW:
            warn(
                f"temperature goes down to {schedule.lowest:g}: training below {WARN_BELOW:g} tends to collapse. Measured by Skywork-OR1 "
                "(arXiv:2505.22312, section 3.2.4): at 0.6 the entropy starts near zero, or gets there within some 100 steps, and learning "
                "slows; at 1.0 it starts slower and ends higher. Fix: train at 1.0 and keep 0.6 for evaluation.",
                UserWarning,
            )
        return schedule

    @property
    def lowest(self) -> float:
        """The lowest temperature this schedule can give."""
        spec = self.spec
        if spec.kind == "linear":
            assert spec.end is not None
            base = min(spec.start, spec.end)
        elif spec.kind == "staged":
            base = min(value for _, value in spec.stages)
        else:
            base = min(spec.start, spec.low) if spec.kind == "entropy" else spec.start
        return base + min(spec.spread, 0.0)

    @property
    def adaptive(self) -> bool:
        """Whether `observe` can change the temperature."""
        return self.spec.kind in ("entropy", "diversity")

    def base(self, step: int) -> float:
        """The temperature at a step, without the spread within the group."""
        spec = self.spec
        if spec.kind == "linear":
            assert spec.end is not None
            return spec.start + (spec.end - spec.start) * min(max(step / spec.steps, 0.0), 1.0)
        if spec.kind == "staged":
            return [value for begin, value in spec.stages if begin <= max(step, 0)][-1]
        return self._value

    def temperatures(self, step: int, num_prompts: int, group_size: int) -> list[float]:
        """One temperature per completion, ``num_prompts * group_size`` in total; the completions of a group are adjacent."""
        if num_prompts < 0 or group_size < 1:
            raise ValueError(f"num_prompts is {num_prompts}, group_size is {group_size}; expected at least 0 and 1.")
        base = self.base(step)
        hot = round(group_size * self.spec.spread_share) if self.spec.spread else 0
        return ([base] * (group_size - hot) + [base + self.spec.spread] * hot) * num_prompts

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Adapt the temperature to the metrics of a step; only the adaptive kinds do.

        Call it once per rollout. Metrics without the one that the schedule reads, or with a NaN for it, change nothing.
        """
        spec = self.spec
        value = metrics.get(spec.metric) if self.adaptive else None
        if value is None or math.isnan(float(value)):
            return
        self._observed += 1
        self._mean = float(value) if self._mean is None else spec.memory * self._mean + (1 - spec.memory) * float(value)
        gap = spec.target - self._mean
        if spec.kind == "entropy":
            if abs(gap) > spec.tolerance:
                self._value *= math.exp(max(-MAX_LOG_CHANGE, min(MAX_LOG_CHANGE, spec.gain * gap)))
        elif gap > 0:
            self._value += spec.gain
        self._value = min(max(self._value, spec.low), spec.high)

    def state_dict(self) -> ScheduleState:
        """The state that a resumed run needs, as values that JSON can hold."""
        return {"kind": self.spec.kind, "start": self.spec.start, "value": self._value, "mean": self._mean, "observed": self._observed}

    def can_continue(self, state: ScheduleState) -> bool:
        """Whether this schedule can continue with the state of another: of the same kind, and if it is adaptive with the same start."""
        return state.get("kind") == self.spec.kind and (not self.adaptive or state.get("start", self.spec.start) == self.spec.start)

    def load_state_dict(self, state: ScheduleState) -> None:
        """Continue with the state that `state_dict` returned.

        Only the adaptive kinds have one: the temperature of the others follows from their settings, which may have changed. A temperature
        outside of this schedule's bounds is moved to the nearest one.

        Raises:
            ValueError: the state belongs to another kind of schedule, or its values are not numbers of the kind that `state_dict` returns.
        """
        if state.get("kind") != self.spec.kind:
            raise ValueError(
                f"the saved temperature schedule is {state.get('kind')!r}, this one is {self.spec.kind!r}; expected the same. "
                "Resume with the configuration that the run was started with."
            )
        if not self.adaptive:
            return
        value, mean, observed = check_positive("value", state.get("value")), state.get("mean"), state.get("observed")
        if type(observed) is not int or observed < 0:
            raise ValueError(f"temperature: observed is {observed!r}; expected a whole number of at least 0.")
        self._value = min(max(value, self.spec.low), self.spec.high)
        self._mean, self._observed = None if mean is None else _number("mean", mean), observed

    def __repr__(self) -> str:
        return f"TemperatureSchedule({self.spec.kind}, now {self._value:g})" if self.adaptive else f"TemperatureSchedule({self.spec})"


def check_positive(name: str, value: object) -> float:
    """The value as a float.

    Raises:
        ValueError: it is not a finite number above 0.
    """
    number = _number(name, value)
    if not number > 0:
        raise ValueError(
            f"temperature: {name} is {value!r}; expected a number above 0. With greedy decoding all completions of a group are the same, "
            "and all advantages 0. Fix: 1.0; keep 0 for evaluation."
        )
    return number


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"temperature: {name} is {value!r}; expected a finite number.")
    return float(value)


def _parse(config: Settings) -> TemperatureSpec:
    kind = config.get("kind")
    if kind not in _FIELDS:
        raise ValueError(f"temperature: kind is {kind!r}; expected one of {', '.join(KINDS)}.")
    required, optional = _FIELDS[kind]
    if missing := [name for name in required if name not in config]:
        raise ValueError(f"temperature: kind {kind!r} lacks {', '.join(missing)}; expected {', '.join(required)}.")
    known = (*required, *optional, *_SPREAD)
    if unknown := sorted(set(config) - {"kind", *known}):
        raise ValueError(f"temperature: kind {kind!r} has no {', '.join(unknown)}; it has {', '.join(known)}.")
    spread, share = _number("spread", config.get("spread", 0.0)), _number("spread_share", config.get("spread_share", 0.5))
    if not 0 <= share <= 1:
        raise ValueError(f"temperature: spread_share is {share}; expected the share of a group, from 0 to 1.")
    if kind == "constant":
        settings: dict[str, Any] = {"start": check_positive("value", config["value"])}
    elif kind == "linear":
        settings = _parse_linear(config)
    elif kind == "staged":
        stages = _parse_stages(config["stages"])
        settings = {"start": stages[0][1], "stages": stages}
    else:
        settings = _parse_adaptive(kind, config)
    spec = TemperatureSpec(kind, spread=spread, spread_share=share, **settings)
    lowest = min([spec.start, *(value for _, value in spec.stages), *([spec.end] if spec.end else []), *([spec.low] if spec.low else [])])
    if not lowest + min(spread, 0.0) > 0:
        raise ValueError(f"temperature: a spread of {spread} takes {lowest:g} down to {lowest + spread:g}; expected a temperature above 0.")
    return spec


def _parse_linear(config: Settings) -> dict[str, Any]:
    start, end, steps = check_positive("start", config["start"]), check_positive("end", config["end"]), config["steps"]
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"temperature: steps is {steps!r}; expected a whole number of at least 1.")
    return {"start": start, "end": end, "steps": steps}


def _parse_stages(stages: Any) -> tuple[tuple[int, float], ...]:
    try:
        pairs = tuple((int(begin), check_positive("stages", value)) for begin, value in stages)
    except (TypeError, ValueError) as error:
        raise ValueError(f"temperature: stages is {stages!r} ({error}); expected pairs [first step, temperature].") from error
    begins = [begin for begin, _ in pairs]
    if not pairs or begins[0] != 0 or begins != sorted(set(begins)):
        raise ValueError(f"temperature: stages begin at {begins}; expected ascending steps, the first of them 0.")
    return pairs


def _parse_adaptive(kind: str, config: Settings) -> dict[str, Any]:
    start = check_positive("start", config.get("start", 1.0))
    low, high = check_positive("min", config.get("min", 0.7)), check_positive("max", config.get("max", 1.5))
    if not low <= start <= high:
        raise ValueError(f"temperature: start is {start}, min {low}, max {high}; expected min <= start <= max.")
    memory = _number("memory", config.get("memory", 0.8))
    if not 0 <= memory < 1:
        raise ValueError(f"temperature: memory is {memory}; expected a number in [0, 1), the weight of the past in the running mean.")
    settings: dict[str, Any] = {"start": start, "low": low, "high": high, "memory": memory}
    if kind == "entropy":
        return settings | {
            "target": check_positive("target", config.get("target", 0.3)),
            "metric": str(config.get("metric", "entropy")),
            "tolerance": _number("tolerance", config.get("tolerance", 0.05)),
            "gain": check_positive("gain", config.get("gain", 0.05)),
        }
    return settings | {
        "target": check_positive("target", config.get("target", 0.5)),
        "metric": str(config.get("metric", "completions/distinct")),
        "gain": check_positive("step", config.get("step", 0.05)),
        "low": start,  # the temperature never falls
    }
