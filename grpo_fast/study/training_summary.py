"""From the runs of a training study to advice: which temperature to train at, and which to evaluate at, in numbers and in words.

Trainings are compared seed by seed, since all of a seed have one warm start; a difference counts where it is larger than its 95 % margin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from grpo_fast.study.estimates import difference, estimate, told_apart
from grpo_fast.study.options import name_of
from grpo_fast.study.result_files import made_with_others
from grpo_fast.study.training_setup import CURVES, Prepared

__all__ = ["summarise"]

ENDS = 5  # steps at the beginning and at the end whose mean is reported


def summarise(prepared: Prepared) -> dict[str, Any]:
    """Means over the seeds with their standard errors, and a reading in words; of all runs that were asked for.

    Returns:
        ``seeds``; ``trained_at``, the labels; ``matrix``, by label, evaluation temperature (`name_of`) and measure, and ``training``, by
        label, curve and ``first`` or ``last`` steps, each with a ``mean`` and an ``error`` (None of one seed alone); and ``reading``:
        ``train`` (a label) and ``evaluate`` (a number), the pair to take, or None; ``tied``, pairs that cannot be told from it; and
        ``sentences``.
    """
    runs = prepared.runs()
    by_label = {label: [run for run in runs if run["trained_at"] == label] for label in prepared.labels}
    places = [name_of(temperature) for temperature in prepared.eval_temperatures]
    accuracy = {
        label: {place: [run["table"][i]["accuracy"] for run in of_label] for i, place in enumerate(places)}
        for label, of_label in by_label.items()
    }
    measured = [name for name in runs[0]["table"][0] if name not in ("temperature", "samples")]
    matrix = {
        label: {place: {name: _mean_of([run["table"][i][name] for run in of_label]) for name in measured} for i, place in enumerate(places)}
        for label, of_label in by_label.items()
    }
    curves = {
        label: {
            name: {
                "first": _mean_of([fmean(run["curves"][name][:ENDS]) for run in by_label[label]]),
                "last": _mean_of([fmean(run["curves"][name][-ENDS:]) for run in by_label[label]]),
            }
            for name in CURVES
        }
        for label in prepared.schedules
    }
    reading = _reading(accuracy, curves, prepared.labels[1:], places)
    if (others := made_with_others(runs)) is not None:
        reading["sentences"].append(f"The runs were not all made with the same {others}.")
    if prepared.seeds == 1:
        reading["sentences"].append("One seed has no errors, so that nothing can be told apart. Cure: --seeds 5.")
    if prepared.quick:
        reading["sentences"].append("This was --quick: its figures mean nothing.")
    return {"seeds": prepared.seeds, "trained_at": prepared.labels, "matrix": matrix, "training": curves, "reading": reading}


def _reading(
    accuracy: Mapping[str, Mapping[str, list[float]]], curves: Mapping[str, Any], labels: Sequence[str], places: Sequence[str]
) -> dict[str, Any]:
    """The pair to take, and in words: which training is best at each evaluation temperature, and what the curves did.

    ``accuracy`` has by label and place one number a seed, in the same order at all; ``curves`` is what `summarise` calls ``training``.
    """
    if not any(value for label in labels for values in accuracy[label].values() for value in values):
        nothing = "No answer was right after any training, so no temperature can be advised. Cure: more --steps or --warm_start_steps."
        return {"train": None, "evaluate": None, "tied": [], "sentences": [nothing]}
    sentences = []
    for place in places:
        best, tied = _best({label: accuracy[label][place] for label in labels})
        mean = fmean(accuracy[best][place])
        if len(labels) > 1 and len(tied) == len(labels) - 1:
            sentences.append(f"Evaluated at T = {place}: the trainings cannot be told apart (highest: {mean:.3f}, of {best}).")
        else:
            sentences.append(f"Evaluated at T = {place}: best trained at {best} ({mean:.3f}){_not_told(tied)}.")
    over_all = {label: [fmean(values) for values in zip(*accuracy[label].values(), strict=True)] for label in labels}
    best, tied = _best(over_all)
    average = f"{fmean(over_all[best]):.3f} on average"
    sentences.append(f"Over all evaluation temperatures: best trained at {best}, {average}{_not_told(tied)}.")
    for label in labels:
        flat, entropy = curves[label]["zero_std"], curves[label]["entropy"]
        sentences.append(
            f"Trained at {label}: groups without a gradient {flat['first']['mean']:.2f} at first, {flat['last']['mean']:.2f} in the end; "
            f"entropy of softmax(z/T) {entropy['first']['mean']:.3f} and {entropy['last']['mean']:.3f} nats a token."
        )
    pairs = {(label, place): accuracy[label][place] for label in labels for place in places}
    train, evaluate = max(pairs, key=lambda pair: fmean(pairs[pair]))
    rivals = [pair for pair in pairs if pair != (train, evaluate) and not told_apart(difference(pairs[train, evaluate], pairs[pair]))]
    if len(pairs) == 1:
        words = f"the only accuracy of the table, {fmean(pairs[train, evaluate]):.3f}"
    elif rivals:
        few = _few([f"{label} at {place}" for label, place in rivals], "; ")
        words = f"the highest accuracy of the table, {fmean(pairs[train, evaluate]):.3f}, not to be told within the errors from {few}"
    else:
        words = f"the highest accuracy of the table, {fmean(pairs[train, evaluate]):.3f}, by more than the errors"
    sentences.append(f"Train at {train} and evaluate at T = {evaluate}: {words}.")
    return {"train": train, "evaluate": float(evaluate), "tied": [[label, float(place)] for label, place in rivals], "sentences": sentences}


def _best(values: Mapping[str, Sequence[float]]) -> tuple[str, list[str]]:
    """The one with the highest mean, the first of equal ones, and those that cannot be told from it, seed by seed."""
    best = max(values, key=lambda label: fmean(values[label]))
    return best, [label for label in values if label != best and not told_apart(difference(values[best], values[label]))]


def _not_told(labels: Sequence[str]) -> str:
    return f", not to be told within the errors from {_few(labels)}" if labels else ""


def _few(names: Sequence[str], between: str = ", ", most: int = 8) -> str:
    """Not more than a reader takes in."""
    rest = len(names) - most
    return between.join([*names[:most], *([f"and {rest} more"] if rest > 0 else [])])


def _mean_of(values: Sequence[float]) -> dict[str, float | None]:
    return estimate(values).as_dict()
