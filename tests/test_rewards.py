"""Rewards against cases worked by hand, and the errors of wrong lengths."""

import math
import pickle

import pytest
import torch

from grpo_fast.rewards import CoherenceReward, RepetitionPenalty, accuracy_reward, extract_answer, format_reward, reward_matrix

GOOD = "<think>3 + 4\nso 7</think><answer>7</answer>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("7", None),  # a number alone is not a stated answer
        ("<answer> 7 </answer>", "7"),
        ("<answer>6</answer> no, <answer>7</answer>", "7"),  # the last one counts
        (r"so \boxed{7}", "7"),
        (r"\boxed{6}, no: \boxed{\frac{1}{2}}", r"\frac{1}{2}"),  # braces nest
        (r"\boxed{7", None),  # broken off
        (r"\boxed{6} <answer>7</answer>", "7"),
        ("<answer>7", None),
    ],
)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("stated", "truth", "expected"),
    [
        ("7", "7", 1.0),
        ("8", "7", 0.0),
        ("1,000.0", "1000", 1.0),
        ("+7", "7.00", 1.0),
        ("125", "0125", 0.0),  # leading zeros: a text, not a number
        ("0125", "0125", 1.0),
        ("1,00", "100", 0.0),  # no thousands
        (" two  words ", "two words", 1.0),
        ("Two", "two", 0.0),
        ("", "", 1.0),
        ("7", None, None),  # unknown truth: does not apply
    ],
)
def test_accuracy_by_hand(stated, truth, expected):
    assert accuracy_reward(["q"], [f"<answer>{stated}</answer>"], [[1]], answer=[truth]) == [expected]


def test_accuracy_takes_numbers_in_the_column():
    assert accuracy_reward(["q"], ["<answer>7</answer>"], [[1]], answer=[7]) == [1.0]


def test_an_empty_completion_earns_nothing_and_costs_nothing():
    empty = {"prompts": ["What is 3 + 4?"] * 2, "completions": ["", []], "completion_ids": [[], []]}
    assert accuracy_reward(**empty, answer=["7", "7"]) == [0.0, 0.0]
    assert format_reward(**empty) == [0.0, 0.0]
    assert CoherenceReward()(**empty) == [0.0, 0.0]
    assert RepetitionPenalty()(**empty) == [0.0, 0.0]


def test_no_completions_at_all():
    assert accuracy_reward([], [], [], answer=[]) == []
    assert reward_matrix([format_reward], [], [], []).shape == (0, 1)


def test_format_and_chat_messages():
    chat = [{"role": "user", "content": "ignored"}, {"role": "assistant", "content": GOOD}]
    assert format_reward(["q"] * 3, [GOOD, chat, GOOD + "!"], [[1]] * 3) == [1.0, 1.0, 0.0]


def test_coherence_reward_reads_the_prompt():
    reward = CoherenceReward()
    assert reward(["What is 3 + 4?", "What is 5 + 2?"], [GOOD, GOOD], [[1], [1]]) == [1.0, pytest.approx(2 / 3)]
    assert CoherenceReward(step_pattern=" so ")(["What is 3 + 4?"], [GOOD.replace("\n", " ")], [[1]]) == [1.0]


def test_repetition_penalty_by_hand():
    ids = [[1, 2, 3, 4], [1, 1, 1, 1], []]
    assert RepetitionPenalty(2, max_penalty=0.3)(["q"] * 3, [""] * 3, ids) == [0.0, pytest.approx(-0.2), 0.0]


@pytest.mark.parametrize("settings", [{"ngram_size": 0}, {"max_penalty": -1.0}, {"max_penalty": math.nan}, {"max_penalty": math.inf}])
def test_repetition_penalty_refuses(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"RepetitionPenalty: {name} is .*; expected"):
        RepetitionPenalty(**settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accuracy_reward(["q"], ["a"], [[1]], answer=["7", "8"]), "accuracy_reward: answer has 2 items; expected 1"),
        (lambda: accuracy_reward(["q"], ["a", "b"], [[1]], answer=["7"]), "accuracy_reward: completions has 2 items; expected 1"),
        (lambda: format_reward(["q", "r"], ["a"], [[1]]), "format_reward: completions has 1 items; expected 2"),
        (lambda: CoherenceReward()(["q"], [], []), "coherence_reward: completions has 0 items; expected 1"),
        (lambda: RepetitionPenalty()(["q"], ["a"], []), "repetition_penalty: completion_ids has 0 items; expected 1"),
        (lambda: reward_matrix([format_reward], ["q"], ["a"], [[1]], answer=[]), "RewardRunner: answer has 0 items; expected 1"),
    ],
)
def test_wrong_lengths_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_reward_matrix_holds_nan_where_a_reward_does_not_apply():
    table = reward_matrix([accuracy_reward, format_reward], ["q", "q"], [GOOD, "7"], [[1], [2]], answer=["7", None])
    assert table.dtype == torch.float32
    torch.testing.assert_close(table, torch.tensor([[1.0, 1.0], [math.nan, 0.0]]), equal_nan=True)


def test_reward_matrix_names_the_reward_that_returned_too_few():
    def forgetful(prompts, **columns):
        return [1.0]

    with pytest.raises(ValueError, match="reward 'forgetful' returned 1 values for 2 completions; expected one per completion"):
        reward_matrix([forgetful], ["q", "q"], ["", ""], [[], []])


def test_rewards_with_settings_can_be_pickled_compared_and_named():
    for reward in (CoherenceReward(key_pattern="x"), RepetitionPenalty(3)):
        assert pickle.loads(pickle.dumps(reward)) == reward
        assert hash(reward) == hash(pickle.loads(pickle.dumps(reward)))
    assert CoherenceReward().__name__ == "coherence_reward"
    assert RepetitionPenalty().__name__ == "repetition_penalty"
