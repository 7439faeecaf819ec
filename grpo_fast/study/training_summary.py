"""Summary of a training study: means over the seeds, learning curves, and advice on the temperatures to train and to evaluate at.

Trainings are compared seed by seed, since all trainings of a seed begin with the same warm start. A difference is significant if it is
larger than its 95 % margin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TypedDict

from grpo_fast.study.estimates import EstimateJSON, difference, estimate, is_significant
from grpo_fast.study.options import temperature_name
from grpo_fast.study.result_files import JSONObject, differing_versions
from grpo_fast.study.training_gains import gains
from grpo_fast.study.training_study import BEFORE, TrainingStudy

__all__ = ["CurveEndsJSON", "CurveJSON", "SeedsJSON", "advise_training", "mean_curve", "summarize_training"]

EDGE_STEPS = 5  # steps at the beginning and at the end of a training whose mean is reported
NO_MEASURES = ("temperature", "samples", "right", "completions")  # keys of an evaluation that are no means
DIGITS = 6  # significant digits of the numbers that are listed seed by seed, or step by step


class SeedsJSON(EstimateJSON):
    """A mean over the seeds with its standard error, and the value of each seed."""

    by_seed: list[float]


class CurveEndsJSON(TypedDict):
    """A learning curve over its first and its last EDGE_STEPS steps."""

    first: SeedsJSON
    last: SeedsJSON


class CurveJSON(TypedDict):
    """A learning curve: for each step the mean over the seeds and its standard error (None with one seed)."""

    mean: list[float]
    error: list[float | None]


def summarize_training(study: TrainingStudy) -> JSONObject:
    """Summarize all runs that are asked for.

    Returns:
        ``seeds``; ``trained_at``, the labels; ``evaluation``, `SeedsJSON` by label, evaluation temperature (`temperature_name`) and
        measure; ``training``, `CurveEndsJSON` by label and curve; ``learning_curves``, `CurveJSON` by label and curve; ``first_step``,
        `SeedsJSON` by label and measure, if the runs measured their first step; ``gains``, see `gains`, and ``completions``, a few of the
        first seed by label and evaluation temperature, if the runs have them; and ``advice``, see `advise_training`.
    """
    runs = study.runs()
    by_label = {label: [run for run in runs if run["trained_at"] == label] for label in study.labels}
    places = [temperature_name(temperature) for temperature in study.eval_temperatures]
    measures = [name for name in runs[0]["table"][0] if name not in NO_MEASURES]
    accuracy = {
        label: {place: [_rounded(run["table"][i]["accuracy"]) for run in of_label] for i, place in enumerate(places)}
        for label, of_label in by_label.items()
    }
    evaluation = {
        label: {place: {name: _cell([run["table"][i][name] for run in of_label]) for name in measures} for i, place in enumerate(places)}
        for label, of_label in by_label.items()
    }
    curves = {
        label: {
            name: [run["curves"][name] for run in by_label[label]]
            for name in by_label[label][0]["curves"]
            if all(name in run["curves"] for run in by_label[label])
        }
        for label in study.variants
    }
    ratios = {label: [run.get("first_step") for run in by_label[label]] for label in study.variants}
    first_step = {
        label: {name: _cell([found[name] for found in of_label]) for name in of_label[0] if name != "tokens"}
        for label, all_found in ratios.items()
        if len(of_label := [found for found in all_found if found is not None]) == len(all_found)
    }
    of_questions = gains(by_label, BEFORE, places)
    tables = {label: of_label[0]["table"] for label, of_label in by_label.items()}
    completions = {
        label: {place: table[i]["completions"] for i, place in enumerate(places) if "completions" in table[i]}
        for label, table in tables.items()
    }
    training = {label: {name: _first_and_last(lines) for name, lines in of_label.items()} for label, of_label in curves.items()}
    advice = advise_training(accuracy, training, study.labels[1:], places)
    if (others := differing_versions(runs)) is not None:
        advice["sentences"].append(f"The runs were not all made with the same {others}.")
    if study.seeds == 1:
        advice["sentences"].append("With one seed there are no standard errors, so no difference is significant. Fix: --seeds 5.")
    if study.quick:
        advice["sentences"].append("This was --quick: its figures mean nothing.")
    return {
        "seeds": study.seeds,
        "trained_at": study.labels,
        "evaluation": evaluation,
        "training": training,
        "learning_curves": {label: {name: mean_curve(lines) for name, lines in of_label.items()} for label, of_label in curves.items()},
        **({"first_step": first_step} if first_step else {}),
        **({"gains": of_questions} if of_questions else {}),
        **({"completions": completions} if any(completions.values()) else {}),
        "advice": advice,
    }


def advise_training(
    accuracy: Mapping[str, Mapping[str, list[float]]],
    training: Mapping[str, Mapping[str, CurveEndsJSON]],
    labels: Sequence[str],
    places: Sequence[str],
) -> JSONObject:
    """Determine the pair of training and evaluation temperature with the highest accuracy, and describe the trainings in sentences.

    Args:
        accuracy: by label and evaluation temperature, one number per seed, in the same order everywhere.
        training: by label and curve, see `summarize_training`.
        labels: of the trainings.
        places: names of the evaluation temperatures.

    Returns:
        ``train`` (a label) and ``evaluate`` (a number), or None; ``tied``, the pairs that do not differ significantly; ``sentences``.
    """
    if not any(value for label in labels for values in accuracy[label].values() for value in values):
        message = "No answer was correct after any training, so there is no advice. Fix: more steps, or easier questions."
        return {"train": None, "evaluate": None, "tied": [], "sentences": [message]}
    sentences = []
    for place in places:
        best, tied = _best({label: accuracy[label][place] for label in labels})
        mean = fmean(accuracy[best][place])
        if len(labels) > 1 and len(tied) == len(labels) - 1:
            sentences.append(f"Evaluated at T = {place}: no significant difference between the trainings (highest: {mean:.3f}, of {best}).")
        else:
            sentences.append(f"Evaluated at T = {place}: best trained at {best} ({mean:.3f}){_name_tied(tied)}.")
    overall = {label: [fmean(values) for values in zip(*accuracy[label].values(), strict=True)] for label in labels}
    best, tied = _best(overall)
    average = f"{fmean(overall[best]):.3f} on average"
    sentences.append(f"Over all evaluation temperatures: best trained at {best}, {average}{_name_tied(tied)}.")
    sentences += [_training_sentence(label, training[label]) for label in labels]
    pairs = {(label, place): accuracy[label][place] for label in labels for place in places}
    chosen = max(pairs, key=lambda pair: _rounded(fmean(pairs[pair])))
    rivals = [pair for pair in pairs if pair != chosen and not is_significant(difference(pairs[chosen], pairs[pair]))]
    highest = f"{fmean(pairs[chosen]):.3f}"
    if len(pairs) == 1:
        reason = f"the only accuracy of the table, {highest}"
    elif rivals:
        reason = f"the highest accuracy of the table, {highest}{_name_tied([f'{label} at {place}' for label, place in rivals], '; ')}"
    else:
        reason = f"the highest accuracy of the table, {highest}, significantly above all others"
    train, evaluate = chosen
    sentences.append(f"Train at {train} and evaluate at T = {evaluate}: {reason}.")
    return {"train": train, "evaluate": float(evaluate), "tied": [[label, float(place)] for label, place in rivals], "sentences": sentences}


def mean_curve(lines: Sequence[Sequence[float]]) -> CurveJSON:
    """Average learning curves, one per seed, step by step.

    Example:
        >>> mean_curve([[0.1, 0.2], [0.3, 0.2]])
        {'mean': [0.2, 0.2], 'error': [0.1, 0.0]}
    """
    steps = [estimate(values).as_dict() for values in zip(*lines, strict=True)]
    errors = [None if step["error"] is None else _rounded(step["error"]) for step in steps]
    return {"mean": [_rounded(step["mean"]) for step in steps], "error": errors}


def _training_sentence(label: str, curves: Mapping[str, CurveEndsJSON]) -> str:
    zero_std, entropy = curves["zero_std"], curves["entropy"]
    return (
        f"Trained at {label}: share of groups without a gradient {zero_std['first']['mean']:.2f} at the beginning and "
        f"{zero_std['last']['mean']:.2f} at the end; entropy of softmax(z/T) {entropy['first']['mean']:.3f} and "
        f"{entropy['last']['mean']:.3f} nats per token."
    )


def _best(values: Mapping[str, Sequence[float]]) -> tuple[str, list[str]]:
    """Return the label with the highest mean, the first of equal ones, and those that do not differ significantly from it."""
    # Rounded: equal accuracies that are summed in another order differ in the last bit, which must not decide.
    best = max(values, key=lambda label: _rounded(fmean(values[label])))
    return best, [label for label in values if label != best and not is_significant(difference(values[best], values[label]))]


def _name_tied(names: Sequence[str], separator: str = ", ") -> str:
    return f"; not significantly lower: {_shorten(names, separator)}" if names else ""


def _shorten(names: Sequence[str], separator: str = ", ", most: int = 8) -> str:
    """Join at most so many names, and say how many more there are."""
    rest = len(names) - most
    return separator.join([*names[:most], *([f"and {rest} more"] if rest > 0 else [])])


def _first_and_last(lines: Sequence[Sequence[float]]) -> CurveEndsJSON:
    first, last = (_cell([fmean(line[part]) for line in lines]) for part in (slice(EDGE_STEPS), slice(-EDGE_STEPS, None)))
    return {"first": first, "last": last}


def _cell(values: Sequence[float]) -> SeedsJSON:
    return {**estimate(values).as_dict(), "by_seed": [_rounded(value) for value in values]}


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
