"""Metrics of texts, groups and evaluations against cases worked by hand."""

import doctest
import itertools
import math
import random
from statistics import fmean, pstdev

import pytest
import torch

from grpo_fast.loss import statistics as loss_statistics
from grpo_fast.loss.statistics import entropy_summary, zero_variance_share
from grpo_fast.utils import statistics, text_statistics
from grpo_fast.utils.statistics import consensus_at_k, pass_at_1, pass_at_k, standard_error
from grpo_fast.utils.text_statistics import (
    coherence,
    completion_statistics,
    distinct_ngrams,
    distinct_share,
    distinct_shares,
    is_truncated,
    longest_certain_run,
    loop_period,
    parse_sections,
    repeated_ngrams,
    truncated_share,
)


@pytest.mark.parametrize(
    ("tokens", "n", "expected"),
    [
        ([], 2, 0.0),
        ([1], 2, 0.0),  # too short for a single n-gram
        ([1, 2, 3, 4], 2, 0.0),
        ([1, 1, 1, 1], 2, 2 / 3),  # (1,1) three times: one different of three
        ([1, 2, 1, 2, 1], 2, 1 / 2),  # 12 21 12 21
        (list("abcabc"), 3, 1 / 4),  # abc bca cab abc
        ([7, 7], 1, 1 / 2),
    ],
)
def test_repeated_ngrams_by_hand(tokens, n, expected):
    assert repeated_ngrams(tokens, n) == pytest.approx(expected)


def test_repeated_ngrams_refuses_an_empty_ngram():
    with pytest.raises(ValueError, match=r"n is 0; expected at least 1"):
        repeated_ngrams([1, 2], 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("aaa", 1),
        ("aa", None),
        ("xyzxyzxyz", 3),
        ("start: xyzxyzxyz", 3),
        ("xyzxyzxyzx", 3),  # cut inside a block: the tail is zxyzxyzx..., of the same period
        ("xyzxyzxy", None),  # two and two thirds
        ("abababab!", None),  # it stopped looping
    ],
)
def test_loop_period_by_hand(text, expected):
    assert loop_period(text) == expected


def test_loop_period_takes_the_shortest_block():
    assert loop_period([5] * 12) == 1


def test_loop_period_refuses_one_repeat():
    with pytest.raises(ValueError, match=r"min_repeats is 1; expected at least 2"):
        loop_period([1, 1], min_repeats=1)


def test_truncated_means_no_end_token():
    assert is_truncated([], 9)
    assert is_truncated([1, 2], 9)
    assert not is_truncated([1, 9], 9)
    assert not is_truncated([1, 8], (9, 8))  # several end tokens: any will do
    assert is_truncated([1, 2], [9, 8])


def test_truncated_share():
    assert truncated_share([[1, 9], [1], [], [9]], 9) == 0.5
    assert truncated_share([], 9) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<think>a</think>",
        "<answer>b</answer>",
        "<answer>b</answer><think>a</think>",  # wrong order
        "<think>a</think><answer>b</answer> and more",
        "<think>a<think></think></think><answer>b</answer>",  # nested
        "<think>a</think><answer>b</answer><answer>c</answer>",  # two answers
        "<think>a</think><answer>b",  # broken off
        "<think>a</think>hm<answer>b</answer>",
    ],
)
def test_sections_of_a_malformed_completion(text):
    assert parse_sections(text) is None


def test_sections_of_a_well_formed_completion():
    assert parse_sections(" <think>a\nb</think>\n<answer></answer>\n") == ("a\nb", "")


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>3 + 4\nso 7</think><answer>7</answer>", 1.0),
        ("<think>3 + 4\nso 7</think><answer>8</answer>", 2 / 3),  # answer and reasoning disagree
        ("<think>3 + 4 is 17</think><answer>7</answer>", 2 / 3),  # 7 is not the whole word 17
        ("<think>7\n3 + 4</think><answer>7</answer>", 2 / 3),  # the answer is in the first step, not in the last
        ("<think>so 7</think><answer>7</answer>", 2 / 3),  # takes up no number of the question
        ("<think>3, so 7</think><answer>7</answer>", (1 + 1 + 1 / 2) / 3),  # takes up one of two
        ("<think>3 + 4\n3 + 4\n3 +", 1 / 3),  # breaks off: the question is taken up, nothing else holds
        ("<answer>7</answer>", 0.0),
        ("<think>3 + 4</think><answer></answer>", 2 / 3),  # an empty answer agrees with nothing
        ("", 0.0),
    ],
)
def test_coherence_by_hand(completion, expected):
    assert coherence("What is 3 + 4?", completion) == pytest.approx(expected)


def test_coherence_without_keys_in_the_question_is_the_mean_of_two_rules():
    assert coherence("Who wrote Emma?", "<think>It was Austen</think><answer>Austen</answer>") == 1.0
    assert coherence("Who wrote Emma?", "<think>It was Eliot</think><answer>Austen</answer>") == 0.5


def test_coherence_counts_a_key_as_often_as_the_question_has_it():
    prompt, key = "sort 9770=", r"\d"
    assert coherence(prompt, "<think>0779</think><answer>0779</answer>", key_pattern=key) == 1.0
    assert coherence(prompt, "<think>0799</think><answer>0799</answer>", key_pattern=key) == pytest.approx((2 + 3 / 4) / 3)


def test_coherence_takes_the_answer_literally():
    assert coherence("?", "<think>x is (a+b)*</think><answer>(a+b)*</answer>") == 1.0  # not as a regular expression


def test_distinct_share():
    assert distinct_share(["a", "a", "b", "a"]) == 0.5
    assert distinct_share(["a"]) == 1.0
    with pytest.raises(ValueError, match="group is empty"):
        distinct_share([])


def test_distinct_shares_group_by_group():
    assert distinct_shares(["a", "a", "a", "b", "c", "a"], 2) == [0.5, 1.0, 1.0]
    assert distinct_shares(["a", "a", "a", "b", "c", "a"], 3) == [pytest.approx(1 / 3), 1.0]


def test_the_shape_of_completions_by_hand():
    shape = completion_statistics([[1, 2] * 6, [1, 2] * 6, [1, 2, 3]], [True, False, True], 2)
    assert shape["endless"] == [1.0, 0.0, 0.0], "a loop that ended is none, and what is cut may be no loop"
    assert shape["repetition"] == [pytest.approx(9 / 11), pytest.approx(9 / 11), 0.0]
    assert shape["truncated"] == [1.0, 0.0, 1.0] and shape["length"] == [12.0, 12.0, 3.0]
    with pytest.raises(ValueError, match="zip"):
        completion_statistics([[1, 2], [3]], [True], 2)


def test_the_standard_error_of_a_mean_by_hand():
    assert standard_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx(math.sqrt(5 / 3 / 4))
    assert math.isnan(standard_error([1.0]))


@pytest.mark.parametrize("module", [text_statistics, statistics, loss_statistics])
def test_examples(module):
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0


def test_entropy_summary_leaves_masked_tokens_out():
    entropy = torch.tensor([[0.0, 1.0, 2.0], [3.0, float("nan"), float("nan")]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    summary = entropy_summary(entropy, mask)
    assert summary.mean == 1.5
    assert summary.median == 1.5
    assert summary.p90 == pytest.approx(2.7)
    assert summary.tokens == 4
    assert entropy_summary(entropy, torch.zeros(2, 3)) == (0.0, 0.0, 0.0, 0)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 2\); expected that of entropy, \(2, 3\)"):
        entropy_summary(entropy, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ([], 0),
        ([0.5], 0),
        ([0.999], 1),
        ([0.99], 0),  # above, not at
        ([1.0, 0.995, 0.98, 0.995, 0.995, 0.995], 3),
        ([0.995, 0.995, 0.5, 0.995], 2),
    ],
)
def test_longest_certain_run_by_hand(probabilities, expected):
    assert longest_certain_run([math.log(p) for p in probabilities]) == expected


def test_longest_certain_run_settings():
    assert longest_certain_run([math.log(0.8)] * 3, threshold=0.7) == 3
    assert longest_certain_run([math.nan, -math.inf]) == 0
    with pytest.raises(ValueError, match="threshold is 1; expected a probability"):
        longest_certain_run([0.0], threshold=1)


@pytest.mark.parametrize(
    ("group", "n", "expected"),
    [
        (["abc", "abc"], 2, 1 / 2),  # ab bc ab bc
        (["abcd", "bcx"], 2, 4 / 5),  # ab bc cd bc cx
        (["aaaa"], 2, 1 / 3),
        (["abc", "def"], 3, 1.0),
        (["ab", ""], 3, 1.0),  # none that long
        ([], 3, 1.0),
        ([[1, 2], [2, 1]], 1, 1 / 2),
    ],
)
def test_distinct_ngrams_by_hand(group, n, expected):
    assert distinct_ngrams(group, n) == pytest.approx(expected)


def test_distinct_ngrams_refuses_an_empty_ngram():
    with pytest.raises(ValueError, match="n is 0; expected at least 1"):
        distinct_ngrams(["ab"], 0)


def test_zero_variance_share():
    nan = math.nan
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, nan, nan, 0.5, nan, 0.1 + 0.2, 0.3])
    assert zero_variance_share(rewards, 2) == pytest.approx(4 / 5)  # in float32 the last two are equal
    assert zero_variance_share(torch.tensor([0.0, 0.0, 0.0, 1.0]), 4) == 0.0
    assert zero_variance_share(torch.empty(0), 4) == 0.0
    with pytest.raises(ValueError, match=r"rewards has shape \(2, 2\); expected \[B\]"):
        zero_variance_share(torch.zeros(2, 2), 2)


def test_pass_at_1_by_hand():
    result = pass_at_1([[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    assert result.mean == pytest.approx(7 / 12)  # 1/2, 1, 1/4
    # s_i^2 of four: 1/3, 0, 1/4
    assert result.sampling_error == pytest.approx(math.sqrt((1 / 3 + 1 / 4) / 4) / 3)
    # means 1/2, 1, 1/4 about 7/12: squares 1/144, 25/144, 16/144
    assert result.prompt_error == pytest.approx(math.sqrt(42 / 144 / 2 / 3))
    assert (result.prompts, result.rounds) == (3, 4)


def test_pass_at_1_says_what_it_cannot_tell():
    one_round = pass_at_1([[1], [0]])
    assert one_round.mean == 0.5 and math.isnan(one_round.sampling_error) and one_round.prompt_error == pytest.approx(0.5)
    one_prompt = pass_at_1([[1, 0]])
    assert math.isnan(one_prompt.prompt_error) and one_prompt.sampling_error == pytest.approx(0.5)


def test_the_sampling_error_is_the_spread_of_repeated_evaluations():
    """400 evaluations of five prompts of known difficulty, eight rounds each: the mean error and the spread of the means agree."""
    rng = random.Random(0)
    chances = (0.05, 0.3, 0.5, 0.8, 0.95)
    results = [pass_at_1([[float(rng.random() < p) for _ in range(8)] for p in chances]) for _ in range(400)]
    spread = pstdev([result.mean for result in results])
    truth = math.sqrt(sum(p * (1 - p) for p in chances) / 8) / 5
    assert fmean(result.sampling_error for result in results) == pytest.approx(truth, rel=0.05)
    assert spread == pytest.approx(truth, rel=0.12)


@pytest.mark.parametrize(("k", "expected"), [(1, 2 / 4), (2, 5 / 6), (3, 1.0), (4, 1.0)])
def test_pass_at_k_of_two_right_in_four(k, expected):
    results = [1, 0, 0, 1]
    assert pass_at_k([results], k) == pytest.approx(expected)
    assert pass_at_k([results], k) == pytest.approx(fmean(any(chosen) for chosen in itertools.combinations(results, k)))
    assert pass_at_k([results, [0] * 4], k) == pytest.approx(expected / 2)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_refuses(k):
    with pytest.raises(ValueError, match=f"k is {k}; expected 1 to 4"):
        pass_at_k([[1, 0, 0, 1]], k)


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        ("aab", [1, 1, 0], 1.0),
        ("abb", [1, 0, 0], 0.0),
        ("ab", [1, 0], 0.5),  # a tie: by lot
        ("abc", [0, 1, 0], 1 / 3),
        (["a", None, None], [1, 0, 0], 1.0),  # no answer, no vote
        ([None, None], [0, 0], 0.0),
        ("a", [1], 1.0),
    ],
)
def test_consensus_by_hand(answers, correct, expected):
    assert consensus_at_k([answers], [correct]) == pytest.approx(expected)
    assert consensus_at_k([answers] * 3, [correct] * 3) == pytest.approx(expected)


def test_evaluations_refuse_ragged_tables():
    with pytest.raises(ValueError, match=r"pass_at_1: correct has rows of \[1, 2\] results; expected one row per prompt, all of the same"):
        pass_at_1([[1], [1, 0]])
    with pytest.raises(ValueError, match=r"pass_at_k: correct has rows of \[\] results"):
        pass_at_k([], 1)
    with pytest.raises(ValueError, match=r"consensus_at_k: answers is not of the shape of correct, \[1\]\[2\]"):
        consensus_at_k([["a"]], [[1, 0]])
