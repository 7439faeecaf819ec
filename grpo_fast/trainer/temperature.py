"""ONE temperature: sampler, loss, old and reference log-probabilities and metrics all read it here.

Sampling at T draws from softmax(z/T); the policy that is optimised must be that same softmax(z/T), or the ratio is wrong from the first
step. So there is one object, `TemperatureSchedule`, that says what T is at a step, for each completion; and `explain_mismatch`, which names
the temperature that a sampler must have used if its log-probabilities disagree with ours.

    schedule = TemperatureSchedule.from_config({"kind": "linear", "start": 0.6, "end": 1.4, "steps": 100})
    schedule.temperatures(step=0, num_prompts=2, group_size=4)       # eight times 0.6

What is known about training temperatures: T = 1 for DeepSeek-R1-Zero, and 0.7 in the second stage of DeepSeek-R1, where higher ones gave
incoherent text (arXiv:2501.12948); T = 0.6 starts with an entropy near zero, or collapses to it within some hundred steps, where T = 1
learns longer (Skywork-OR1, arXiv:2505.22312, section 3.2.4); best is the T whose temperature-adjusted entropy stays near 0.3
(AceReason-Nemotron 1.1, arXiv:2506.13284); and T may rise stage by stage as diversity falls (POLARIS, hkunlp.github.io/blog/2025/Polaris).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["KINDS", "Mismatch", "TemperatureSchedule", "explain_mismatch"]

KINDS = ("constant", "linear", "staged", "entropy", "diversity")
COLD = 0.7  # below: a warning

_FIELDS = {  # kind -> what a spec of it may say; the first ones must be said
    "constant": (("value",), ()),
    "linear": (("start", "end", "steps"), ()),
    "staged": (("stages",), ()),
    "entropy": ((), ("start", "target", "tolerance", "gain", "min", "max", "memory", "metric")),
    "diversity": ((), ("start", "target", "step", "min", "max", "memory", "metric")),
}
_SPREAD = ("spread", "spread_share")


@dataclass(frozen=True)
class TemperatureSpec:
    """What a schedule is made of; see `TemperatureSchedule.from_config`."""

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
    """The temperature at each step, for each completion; with a state, where it is adaptive by what the run shows.

    Make one with `from_config`. It is asked with `temperatures` for a rollout, told with `observe` what a step measured, and saved and
    restored with `state_dict` and `load_state_dict`, so that a resumed run goes on where it was.
    """

    def __init__(self, spec: TemperatureSpec) -> None:
        self.spec = spec
        self._value = spec.start  # of the adaptive kinds
        self._mean: float | None = None  # running mean of the observed metric
        self._observed = 0

    @classmethod
    def from_config(cls, config: float | Mapping[str, Any] | TemperatureSchedule) -> TemperatureSchedule:
        """A number, or a dictionary with a ``kind`` and what belongs to it; a schedule is handed back as it is.

        ==============  ===================================================================================================
        constant        ``value``
        linear          ``start``, ``end``, ``steps``: from the one to the other in as many steps, then it stays
        staged          ``stages``: [[0, 1.4], [1000, 1.45], [2000, 1.5]]: from this step on, this temperature (POLARIS)
        entropy         steers the entropy of softmax(z/T) to ``target`` (0.3, arXiv:2506.13284): after each step T is multiplied by
                        exp(gain (target - entropy)), gain 0.05, left alone within ``tolerance`` (0.05) of the target
        diversity       steers a measure of diversity: below ``target``, T grows by ``step`` (0.05); it never falls (POLARIS raises T
                        from stage to stage). ``metric``: which ("completions/distinct", the share of different completions in a group,
                        target 0.5)
        ==============  ===================================================================================================

        The adaptive kinds have a ``start`` (1.0), the bounds ``min`` (0.7) and ``max`` (1.5), and a ``memory`` (0.8): the share that the
        running mean of the observations keeps at each step. Every kind may have a ``spread`` within the group (arXiv:2510.08892 trains on
        mixed temperatures): the last ``spread_share`` (0.5) of each group is drawn at T + spread.

        Raises:
            ValueError: an unknown kind or field, one missing, or a temperature that is not above 0.
        """
        if isinstance(config, TemperatureSchedule):
            return config
        if isinstance(config, (int, float)) and not isinstance(config, bool):
            schedule = cls(TemperatureSpec("constant", _above_zero("temperature", config)))
        elif isinstance(config, Mapping):
            schedule = cls(_parse(dict(config)))
        else:
            raise TypeError(
                f"temperature is a {type(config).__name__}; expected a number, or a dictionary such as "
                "{'kind': 'constant', 'value': 1.0}."
            )
        if schedule.lowest < COLD:
            warnings.warn(
                f"temperature goes down to {schedule.lowest:g}: training below {COLD:g} tends to collapse. Measured by Skywork-OR1 "
                "(arXiv:2505.22312, section 3.2.4): at 0.6 the entropy starts near zero, or gets there within some 100 steps, and learning "
                "slows; at 1.0 it starts slower and ends higher. Cure: train at 1.0 and keep 0.6 for evaluation.",
                UserWarning,
                stacklevel=2,
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
        """Whether `observe` can change what comes."""
        return self.spec.kind in ("entropy", "diversity")

    def base(self, step: int) -> float:
        """The temperature at a step, before the spread within the group."""
        spec = self.spec
        if spec.kind == "linear":
            assert spec.end is not None
            return spec.start + (spec.end - spec.start) * min(max(step / spec.steps, 0.0), 1.0)
        if spec.kind == "staged":
            return [value for begin, value in spec.stages if begin <= max(step, 0)][-1]
        return self._value

    def temperatures(self, step: int, num_prompts: int, group_size: int) -> list[float]:
        """One temperature for each completion, [num_prompts * group_size]; a group's completions stand side by side."""
        if num_prompts < 0 or group_size < 1:
            raise ValueError(f"num_prompts is {num_prompts}, group_size is {group_size}; expected at least 0 and 1.")
        base = self.base(step)
        hot = round(group_size * self.spec.spread_share) if self.spec.spread else 0
        return ([base] * (group_size - hot) + [base + self.spec.spread] * hot) * num_prompts

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Tell what a step measured. The adaptive kinds read one of the metrics, and move T; the others ignore it.

        Call it once for each rollout. A step without the metric, or with a NaN, changes nothing.
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
                self._value *= math.exp(max(-0.1, min(0.1, spec.gain * gap)))  # at most a tenth a step, however wild the observation
        elif gap > 0:
            self._value += spec.gain
        self._value = min(max(self._value, spec.low), spec.high)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; plain numbers, fit for JSON."""
        return {"kind": self.spec.kind, "value": self._value, "mean": self._mean, "observed": self._observed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: the state is another kind of schedule's.
        """
        if state.get("kind") != self.spec.kind:
            raise ValueError(
                f"the saved temperature schedule is {state.get('kind')!r}, this one is {self.spec.kind!r}; expected the same. "
                "Resume with the configuration that the run was started with."
            )
        self._value, self._mean, self._observed = float(state["value"]), state["mean"], int(state["observed"])

    def __repr__(self) -> str:
        return f"TemperatureSchedule({self.spec.kind}, now {self._value:g})" if self.adaptive else f"TemperatureSchedule({self.spec})"


class Mismatch(NamedTuple):
    """How a sampler's log-probabilities compare with ours; gaps are mean absolute differences, in nats per token."""

    temperature: float  # that explains the sampler's log-probabilities best
    gap: float  # at that temperature
    assumed_gap: float  # at the temperature that was assumed
    tokens: int

    def explains(self, share: float = 0.25) -> bool:
        """Whether another temperature takes most of the disagreement away."""
        return self.gap <= share * self.assumed_gap

    def sentence(self, assumed: float) -> str:
        """For a log or an error: what is wrong and what to do."""
        found = f"The sampler's log-probabilities differ from ours at T = {assumed:g} by {self.assumed_gap:.3g} nats a token"
        if not self.explains():
            return (
                f"{found}, and no temperature explains it (the best, {self.temperature:.3g}, leaves {self.gap:.3g}). Look for other "
                "weights in the sampler, a truncation or penalty, another precision, or positions that do not heed the padding."
            )
        what = "reports log-probabilities before the temperature is applied" if abs(self.temperature - 1) < 0.02 else "draws at it"
        return (
            f"{found}; at T = {self.temperature:.3g} by {self.gap:.3g}. Most likely it {what}. Let sampler and loss read one temperature."
        )


@torch.no_grad()
def explain_mismatch(
    logits_or_callable: Tensor | Callable[[float], Tensor],
    sampler_logprobs: Tensor,  # [B, T] or [N]
    token_ids: Tensor | None = None,  # int64 like sampler_logprobs; not needed with a callable
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    grid: Sequence[float] = (0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0, 3.0, 5.0),
    tolerance: float = 1e-3,
    max_tokens: int = 512,
) -> Mismatch:
    """The temperature T* at which our log-probabilities come closest to the sampler's: the fingerprint of a mismatch.

    The mean of abs(l(T) - l_sampler) is searched on the grid, then by golden section around its best point.

    Args:
        logits_or_callable: logits [B, T, V] or [N, V] of the tokens that were drawn; or, where they do not fit, a function from T to the
            tokens' log-probabilities, shaped like ``sampler_logprobs`` (about 30 calls).
        sampler_logprobs: what the sampler says. Tokens where it is not finite do not count.
        token_ids: the tokens that were drawn, with logits.
        mask: bool or 0/1, like ``sampler_logprobs``; None = all tokens.
        temperature: the one that was assumed.
        grid: where to look first, ascending.
        tolerance: how finely T* is found, relative.
        max_tokens: so many tokens, evenly spread, are enough; with a callable all are used.

    Raises:
        ValueError: shapes that do not fit, or no token that counts.

    Example:
        >>> logits, ids = torch.randn(64, 50), torch.randint(50, (64,))
        >>> theirs = (logits / 0.6).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
        >>> round(explain_mismatch(logits, theirs, ids, temperature=1.0).temperature, 2)
        0.6
    """
    _above_zero("temperature", temperature)
    counts = torch.isfinite(sampler_logprobs) if mask is None else torch.isfinite(sampler_logprobs) & mask.bool()
    if not bool(counts.any()):
        raise ValueError("sampler_logprobs has no finite value on a token that counts; expected at least one.")
    theirs = sampler_logprobs[counts].double()
    ours: Callable[[float], Tensor]
    if callable(logits_or_callable):
        score = logits_or_callable

        def ours(value: float) -> Tensor:
            found = score(value)
            if found.shape != sampler_logprobs.shape:
                raise ValueError(
                    f"the callable returned shape {list(found.shape)}; expected {list(sampler_logprobs.shape)}, as sampler_logprobs."
                )
            return found[counts].double()
    else:
        logits = logits_or_callable
        if token_ids is None or token_ids.shape != sampler_logprobs.shape or logits.shape[:-1] != sampler_logprobs.shape:
            shapes = f"logits {list(logits.shape)}, sampler_logprobs {list(sampler_logprobs.shape)}, token_ids "
            shapes += "None" if token_ids is None else str(list(token_ids.shape))
            raise ValueError(f"{shapes}; expected [..., V], and two shapes like it without V.")
        keep = torch.linspace(0, theirs.numel() - 1, min(max_tokens, theirs.numel()), device=theirs.device).round().long()
        theirs, rows, ids = theirs[keep], logits[counts][keep].double(), token_ids[counts][keep]

        def ours(value: float) -> Tensor:
            scaled = rows / value
            return scaled.gather(-1, ids[:, None]).squeeze(-1) - scaled.logsumexp(-1)

    def gap(value: float) -> float:
        return float((ours(value) - theirs).abs().mean())

    gaps = [gap(value) for value in grid]
    best = min(range(len(grid)), key=gaps.__getitem__)
    found, low = _golden(gap, grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)], tolerance)
    candidates = [(low, found), (gaps[best], grid[best])]
    smallest, where = min(candidates)
    return Mismatch(where, smallest, gap(temperature), int(theirs.numel()))


def _golden(function: Callable[[float], float], low: float, high: float, tolerance: float) -> tuple[float, float]:
    """Minimum of a function with one valley between two points: where, and how low."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = function(a), function(b)
    while high - low > tolerance * low:
        if at_a <= at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = function(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = function(b)
    return (a, at_a) if at_a <= at_b else (b, at_b)


def _parse(config: dict[str, Any]) -> TemperatureSpec:
    kind = config.pop("kind", None)
    if kind not in _FIELDS:
        raise ValueError(f"temperature: kind is {kind!r}; expected one of {', '.join(KINDS)}.")
    needed, optional = _FIELDS[kind]
    if missing := [name for name in needed if name not in config]:
        raise ValueError(f"temperature: kind {kind!r} lacks {', '.join(missing)}; expected {', '.join(needed)}.")
    if unknown := sorted(set(config) - {*needed, *optional, *_SPREAD}):
        raise ValueError(f"temperature: kind {kind!r} has no {', '.join(unknown)}; it has {', '.join((*needed, *optional, *_SPREAD))}.")
    spread, share = _number("spread", config.get("spread", 0.0)), _number("spread_share", config.get("spread_share", 0.5))
    if not 0 <= share <= 1:
        raise ValueError(f"temperature: spread_share is {share}; expected the share of a group, from 0 to 1.")
    more: dict[str, Any] = {}
    if kind == "constant":
        start = _above_zero("value", config["value"])
    elif kind == "linear":
        start = _above_zero("start", config["start"])
        steps = config["steps"]
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"temperature: steps is {steps!r}; expected a whole number of at least 1.")
        more = {"end": _above_zero("end", config["end"]), "steps": steps}
    elif kind == "staged":
        stages = _stages(config["stages"])
        start, more = stages[0][1], {"stages": stages}
    else:
        start, more = _parse_adaptive(kind, config)
    spec = TemperatureSpec(kind, start, spread=spread, spread_share=share, **more)
    lowest = min([start, *(value for _, value in spec.stages), *([spec.end] if spec.end else []), *([spec.low] if spec.low else [])])
    if not lowest + min(spread, 0.0) > 0:
        raise ValueError(f"temperature: a spread of {spread} takes {lowest:g} down to {lowest + spread:g}; expected a temperature above 0.")
    return spec


def _stages(stages: Any) -> tuple[tuple[int, float], ...]:
    try:
        pairs = tuple((int(begin), _above_zero("stages", value)) for begin, value in stages)
    except (TypeError, ValueError) as error:
        raise ValueError(f"temperature: stages is {stages!r} ({error}); expected pairs [first step, temperature].") from error
    begins = [begin for begin, _ in pairs]
    if not pairs or begins[0] != 0 or begins != sorted(set(begins)):
        raise ValueError(f"temperature: stages begin at {begins}; expected ascending steps, the first of them 0.")
    return pairs


def _parse_adaptive(kind: str, config: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    start = _above_zero("start", config.get("start", 1.0))
    low, high = _above_zero("min", config.get("min", 0.7)), _above_zero("max", config.get("max", 1.5))
    if not low <= start <= high:
        raise ValueError(f"temperature: start is {start}, min {low}, max {high}; expected min <= start <= max.")
    memory = _number("memory", config.get("memory", 0.8))
    if not 0 <= memory < 1:
        raise ValueError(f"temperature: memory is {memory}; expected a number in [0, 1): what the running mean keeps of the steps before.")
    more: dict[str, Any] = {"low": low, "high": high, "memory": memory}
    if kind == "entropy":
        more |= {"target": _above_zero("target", config.get("target", 0.3)), "metric": str(config.get("metric", "entropy"))}
        more |= {"tolerance": _number("tolerance", config.get("tolerance", 0.05)), "gain": _above_zero("gain", config.get("gain", 0.05))}
    else:
        more |= {"target": _above_zero("target", config.get("target", 0.5)), "metric": str(config.get("metric", "completions/distinct"))}
        more |= {"gain": _above_zero("step", config.get("step", 0.05)), "low": start}  # it never falls
    return start, more


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"temperature: {name} is {value!r}; expected a finite number.")
    return float(value)


def _above_zero(name: str, value: Any) -> float:
    number = _number(name, value)
    if not number > 0:
        raise ValueError(
            f"temperature: {name} is {value!r}; expected a number above 0. Greedy decoding gives a whole group the same completion, and "
            "nothing to learn from. Cure: 1.0; keep 0 for evaluation."
        )
    return number
