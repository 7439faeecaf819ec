"""The mathematical reward: what is equal, what does not apply, and that nothing undecided is silently 0."""

from __future__ import annotations

import importlib.util
import pickle
import threading
import time
from collections import Counter

import pytest

from grpo_fast.rewards import MathReward, math_reward

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="needs the math-verify package: pip install '.[math]'"
)
FOREVER = r"\boxed{9^{9^{9^{9}}}}"  # sympy would write it out


def score(reward: MathReward, *cases: tuple[str, object]) -> list[float | None]:
    return reward(["q"] * len(cases), [completion for completion, _ in cases], answer=[truth for _, truth in cases])


@needs_math_verify
def test_by_hand():
    cases = [
        (r"\boxed{\frac{2}{4}}", r"$\frac12$", 1.0),
        (r"\boxed{\frac{2}{4}}", "1/2", 1.0),
        ("<answer>0.5</answer>", r"\frac{1}{2}", 1.0),
        ("<answer>$0.5$</answer>", r"so it is \boxed{\frac{1}{2}}.", 1.0),  # a worked solution as the true answer
        (r"\boxed{0.333}", r"\frac13", 0.0),
        (r"\boxed{2\sqrt{3}+1}", r"1 + 2\sqrt{3}", 1.0),
        (r"\boxed{x = 5}", "5", 1.0),
        (r"\boxed{4, 5}", "5", 0.0),  # two answers are not one of them
        (r"\boxed{1{,}000}", "1000", 1.0),
        ("<answer>7 apples</answer>", 7, 1.0),  # a column of numbers will do
        (r"\boxed{6} <answer>7</answer>", "6", 0.0),  # what is tagged is what is stated
        ("the answer is 7", "7", 0.0),  # nothing stated
        ("", "7", 0.0),
        (r"\boxed{}", "7", 0.0),
        (r"\boxed{7", "7", 0.0),
        (r"\boxed{Paris}", "Paris", 1.0),
        (r"\boxed{pairs}", "Paris", 0.0),  # as a product of letters it would be
        (r"\boxed{7}", None, None),
        (r"\boxed{7}", "???", None),  # unreadable: does not apply, and is not worth 1
        (r"\boxed{???}", "???", None),
        ("", "", None),
    ]
    assert score(math_reward, *[case[:2] for case in cases]) == [case[2] for case in cases]


@needs_math_verify
def test_the_whole_text_is_searched_only_on_request():
    cases = [("the answer is 7", "7"), (r"7, or rather \boxed{8}", "7")]
    assert score(MathReward(), *cases) == [0.0, 0.0]
    assert score(MathReward(whole_text=True), *cases) == [1.0, 0.0]


@needs_math_verify
@pytest.mark.parametrize(("undecided", "expected"), [(None, None), (0.0, 0.0)])
def test_what_takes_too_long_is_counted_and_undecided(undecided, expected):
    reward = MathReward(timeout=3.0, undecided=undecided)
    begin = time.monotonic()
    assert score(reward, (FOREVER, "7"), (r"\boxed{7}", "7"), (r"\boxed{8}", "7")) == [expected, 1.0, 0.0]
    assert reward.counters == Counter(timeouts=1)
    assert time.monotonic() - begin < 30
    assert score(reward, (r"\boxed{7}", "7")) == [1.0]  # the killed worker was replaced


@needs_math_verify
def test_from_any_thread():
    """math-verify's own time limit is SIGALRM, which raises outside the main thread."""
    results: list = []

    def work() -> None:
        results.append(score(math_reward, (r"\boxed{0.5}", "1/2"), (r"\boxed{0.6}", "1/2")))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[1.0, 0.0]] * 3


def test_missing_package_names_the_fix(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"math-verify package, which is not installed. Fix: pip install '\.\[math\]'"):
        score(math_reward, ("7", "7"))


def test_it_can_be_pickled_compared_and_named():
    reward = MathReward(timeout=3.0, undecided=0.0)
    copy = pickle.loads(pickle.dumps(reward))
    assert copy == reward and hash(copy) == hash(reward) and reward != math_reward
    assert reward.__name__ == "math_reward"


@pytest.mark.parametrize(
    ("settings", "error"), [({"timeout": 0}, ValueError), ({"workers": 0}, ValueError), ({"undecided": "0"}, TypeError)]
)
def test_settings_are_checked(settings, error):
    (name,) = settings
    with pytest.raises(error, match=f"MathReward: {name} is .*; expected"):
        MathReward(**settings)


def test_wrong_lengths_are_named():
    with pytest.raises(ValueError, match="math_reward: answer has 2 items; expected 1"):
        math_reward(["q"], ["a"], answer=["7", "8"])
