"""Text metrics against cases worked by hand."""

import pytest
import torch

from grpo_fast.metrics import coherence, distinct_share, entropy_summary, is_truncated, loop_period, parse_sections, repeated_ngrams


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
        ("<think>7\n3 + 4</think><answer>7</answer>", 2 / 3),  # it stands in the first step, not in the last
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
