"""By how much each training raised the held-out accuracy, with an error over questions and over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TypedDict

from grpo_fast.study.estimates import estimate
from grpo_fast.study.result_files import JSONObject

__all__ = ["ALL", "GainJSON", "gain", "gains", "not_learned"]

ALL = "all"  # key of the mean over the evaluation temperatures
ERRORS = 2.0  # a gain of more than so many standard errors counts as learning


class GainJSON(TypedDict):
    """A difference in accuracy, after training minus before, and its standard errors (None if there is one question, or one seed)."""

    mean: float
    error: float | None
    error_questions: float | None
    error_seeds: float | None


def gain(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> GainJSON:
    """Return the mean gain of several seeds on the same questions.

    The questions are a sample, and so are the seeds: ``error`` is the root of the sum of the two squared errors, which is at least the
    error of the two-way design.

    Args:
        before: ``[seeds][questions]``, the accuracy on each question.
        after: the same after training.

    Raises:
        ValueError: the two have different shapes, or are empty.

    Example:
        >>> gain([[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.5], [0.5, 0.0]])
        {'mean': 0.5, 'error': 0.35355339059327373, 'error_questions': 0.25, 'error_seeds': 0.25}
    """
    gaps = [[a - b for a, b in zip(new, old, strict=True)] for new, old in zip(after, before, strict=True)]
    seeds = estimate([fmean(of_seed) for of_seed in gaps]).as_dict()
    questions = estimate([fmean(of_question) for of_question in zip(*gaps, strict=True)]).as_dict()
    errors = [each["error"] for each in (questions, seeds)]
    known = [error for error in errors if error is not None]
    return {
        "mean": seeds["mean"],
        "error": math.hypot(*known) if known else None,
        "error_questions": errors[0],
        "error_seeds": errors[1],
    }


def gains(by_label: Mapping[str, Sequence[JSONObject]], before: str, places: Sequence[str]) -> dict[str, dict[str, GainJSON]]:
    """Return the `gain` of each training at each evaluation temperature, and as ALL the mean over these.

    Args:
        by_label: the runs of each label, seed by seed.
        before: label of the runs without training.
        places: names of the evaluation temperatures, in the order of the tables of the runs.

    Returns:
        By label and place; empty if the runs do not list which questions were answered correctly.
    """
    if not all("right" in cell for runs in by_label.values() for run in runs for cell in run["table"]):
        return {}
    right = {
        label: {place: [run["table"][i]["right"] for run in runs] for i, place in enumerate(places)} for label, runs in by_label.items()
    }
    for of_label in right.values():
        by_seed = zip(*(of_label[place] for place in places), strict=True)
        of_label[ALL] = [[fmean(each) for each in zip(*of_seed, strict=True)] for of_seed in by_seed]
    return {
        label: {place: gain(right[before][place], right[label][place]) for place in (*places, ALL)} for label in by_label if label != before
    }


def not_learned(result: JSONObject) -> list[str]:
    """Return the labels of the trainings whose mean gain over the evaluation temperatures is not more than ERRORS standard errors above 0.

    Args:
        result: of a training study; without ``gains`` no training is known to have learned.
    """
    labels: list[str] = list(result["training"])
    found = {label: result.get("gains", {}).get(label, {}).get(ALL) for label in labels}
    return [label for label, each in found.items() if each is None or each["error"] is None or each["mean"] <= ERRORS * each["error"]]
