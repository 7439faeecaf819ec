"""Rewards against cases worked by hand, the errors of wrong lengths, and the examples of every docstring."""

import doctest
import importlib
import importlib.util
import math
import pickle
import pkgutil
import time
from typing import Any

import pytest
import torch

import grpo_fast.rewards
from grpo_fast.rewards import (
    CertainRunPenalty,
    CoherenceReward,
    CosineLengthReward,
    FormatReward,
    LanguageConsistencyReward,
    LengthReward,
    ReferenceFluencyReward,
    RepetitionPenalty,
    SentenceReward,
    SoftOverlongPunishment,
    TagCountReward,
    accuracy_reward,
    extract_answer,
    format_reward,
    reward_matrix,
    tag_count_reward,
)
from grpo_fast.rewards.common import reasoning_of
from grpo_fast.rewards.fluency import well_formed_sentence
from grpo_fast.rewards.language import words_by_script

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
        ("<answer>6<answer>7</answer>", "7"),
        ("<answer>7</answer> or 6</answer>", "7"),
        ("</answer><answer>", None),
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
    empty: dict[str, Any] = {"prompts": ["What is 3 + 4?"] * 2, "completions": ["", []], "completion_ids": [[], []]}
    assert accuracy_reward(**empty, answer=["7", "7"]) == [0.0, 0.0]
    assert format_reward(**empty) == [0.0, 0.0]
    assert CoherenceReward()(**empty) == [0.0, 0.0]
    assert RepetitionPenalty()(**empty) == [0.0, 0.0]


def test_no_completions_at_all():
    assert accuracy_reward([], [], [], answer=[]) == []
    assert reward_matrix([format_reward], [], [], []).shape == (0, 1)


def test_messages_in_parts_and_without_content():
    parts: list[Any] = [
        {"role": "assistant", "content": [{"type": "text", "text": "<answer>"}, {"type": "image"}, {"type": "text", "text": "7</answer>"}]}
    ]
    empty: list[Any] = [{"role": "assistant", "content": None}]
    assert accuracy_reward(["q"] * 2, [parts, empty], answer=["7", "7"]) == [1.0, 0.0]


def test_format_and_chat_messages():
    chat = [{"role": "user", "content": "ignored"}, {"role": "assistant", "content": GOOD}]
    assert format_reward(["q"] * 3, [GOOD, chat, GOOD + "!"], [[1]] * 3) == [1.0, 1.0, 0.0]


def test_a_prompt_that_opens_the_reasoning():
    rest = "3 + 4; so 7</think><answer>7</answer>"
    chat = [{"role": "assistant", "content": rest}]
    for reward, whole in ((FormatReward, 1.0), (TagCountReward, 1.0), (CoherenceReward, 1.0)):
        assert reward(think_opened=True)(["What is 3 + 4?"] * 3, [rest, chat, f"<think>{rest}"])[:2] == [whole, whole]
        assert reward()(["What is 3 + 4?"], [f"<think>{rest}"]) == [whole] and reward()(["What is 3 + 4?"], [rest])[0] < whole  # type: ignore[operator]  # not None
    assert FormatReward(think_opened=True)(["q"], [f"<think>{rest}"]) == [0.0]  # then it is there twice


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


REWARDS = (
    FormatReward(),
    TagCountReward(think_opened=True),
    CoherenceReward(key_pattern="x"),
    RepetitionPenalty(3),
    CertainRunPenalty(run=9),
    SentenceReward(2),
    ReferenceFluencyReward(0.5),
    LengthReward(),
    CosineLengthReward(8, right=[2.0, 1.0]),  # type: ignore[arg-type]  # as JSON has it
    SoftOverlongPunishment(8, 4),
    LanguageConsistencyReward(["Han", "Hiragana"]),  # type: ignore[arg-type]
)


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: reward.__name__)
def test_rewards_with_settings_can_be_pickled_compared_and_named(reward):
    copy = pickle.loads(pickle.dumps(reward))
    assert copy == reward and hash(copy) == hash(reward)
    assert type(reward).__name__ == "".join(part.capitalize() for part in reward.__name__.split("_"))
    with pytest.raises(AttributeError):
        reward.ngram_size = 1


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: reward.__name__)
def test_every_reward_takes_chat_messages_and_no_completions(reward):
    assert reward(prompts=[], completions=[], completion_ids=[], answer=[], unknown=[]) == []
    chat = [{"role": "assistant", "content": "A word more."}]
    values = reward(prompts=[[{"role": "user", "content": "q"}]], completions=[chat], completion_ids=[[1, 2]], answer=["7"], x=[1])
    assert len(values) == 1
    with pytest.raises(ValueError, match=f"{reward.__name__}: .* items; expected 2"):
        reward(prompts=["q", "q"], completions=["a"], completion_ids=[[1]], answer=["7", "7"])


MODULES = ["grpo_fast.utils.text_statistics", "grpo_fast.utils.statistics"] + [
    f"grpo_fast.rewards.{module.name}" for module in pkgutil.iter_modules(grpo_fast.rewards.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_the_docstrings(name):
    if name.rpartition(".")[2] in ("mathematics", "math_check"):
        pytest.importorskip("math_verify", reason="needs the math-verify package: pip install '.[math]'")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_public_reward_has_an_example():
    for name in grpo_fast.rewards.__all__:
        thing = getattr(grpo_fast.rewards, name)
        if name.endswith(("Reward", "_reward", "Penalty", "Punishment")) and name not in ("Reward", "load_reward", "math_reward"):
            assert ">>> " in thing.__doc__, name


LOOPS = (
    "<think>",
    "<answer>",
    "</answer>",
    "</think><answer>",
    r"\\( ",
    r"\\[",
    "$",
    "`",
    "(",
    ". ",
    "the ",
    "<a",
    "\n",
    ".'",
    r"\\boxed{",
)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("reward", [accuracy_reward, *REWARDS], ids=lambda reward: reward.__name__)
def test_an_endless_loop_is_scored_in_no_time(reward, loop):
    """Half a megabyte of the same: regular expressions that take quadratic time would take minutes, and hold up the training."""
    text = "<think>" + loop * (500_000 // len(loop))
    began = time.process_time()
    reward(prompts=["q"], completions=[text], completion_ids=[[1, 2]], answer=["7"])
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("<think>a</think>", 0.5),
        ("<think>a<answer>b</answer><answer>c</answer>", 0.25),  # repeated tags earn nothing
        ("</answer></think><answer><think>", 1.0),  # order is format_reward's business
        ("", 0.0),
    ],
)
def test_tag_count_by_hand(text, expected):
    assert tag_count_reward(["q"], [text]) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>b</answer>", "a"),
        ("<think>a, broken off", "a, broken off"),
        ("a</think><answer>b</answer>", "a"),  # the chat template opened the tag
        ("a <answer>b</answer> c", "a   c"),
        ("a <answer>b", "a  "),
    ],
)
def test_reasoning_by_hand(text, expected):
    assert reasoning_of(text) == expected


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("We add three and four.", True),
        ("we add three and four.", False),
        ("We add three and", False),
        ("- Then: we add them!", True),
        ("2. Then we add them.", True),
        ("“Seven” (or 7) it is.", True),
        ("Seven (it is.", False),
        ("Seven) it is.", False),
        ("It is (seven].", False),
        ("It is the the the number.", False),
        ("It is what that that says.", True),  # twice can be right
        ("3 + 4 makes seven.", True),
        ("所以答案是七。", True),
        ("He said so.”", False),  # the quote was never opened
        ("The first step is this:", True),
        ("", False),
    ],
)
def test_well_formed_sentence_by_hand(sentence, expected):
    assert well_formed_sentence(sentence) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0.0),
        ("<think></think><answer>7</answer>", 0.0),
        ("<think>3 + 4 = 7</think><answer>7</answer>", None),  # no sentence to judge
        ("<think>We add them up. (It is easy.) So it is 3.5 in all.</think><answer>7</answer>", 1.0),
        ("We add them up\nWe add them up.", 0.5),  # a line end ends a sentence too
        ("We add them up. We add them up. we add", 1.0),  # two words: too few to judge
        ("We add them up. We add them up and", 0.5),
    ],
)
def test_sentences_by_hand(text, expected):
    assert SentenceReward()(["q"], [text]) == [expected]


def test_reference_fluency_by_hand():
    reward = ReferenceFluencyReward(expected=1.0, limit=3.0)
    ids = [[1], [1, 2], [1], [], [1]]
    rows = [[-0.1], [-1.0, -3.0, math.nan], [-9.0], [], None]  # beyond a completion's length is padding
    assert reward(["q"] * 5, [""] * 5, ids, ref_logprobs=rows) == [1.0, 0.5, 0.0, None, None]
    assert reward(["q"], [""], [[1, 2]], ref_logprobs=torch.tensor([[-2.0, -2.0, 0.0]])) == [0.5]
    assert reward(["q"], [""], [[1, 2]]) == [None]
    with pytest.raises(ValueError, match=r"reference_fluency_reward: ref_logprobs\[0\] has 1 numbers; expected at least 2"):
        reward(["q"], [""], [[1, 2]], ref_logprobs=[[-1.0]])
    with pytest.raises(ValueError, match="ref_logprobs has 2 items; expected 1"):
        reward(["q"], [""], [[1, 2]], ref_logprobs=[[-1.0, -1.0]] * 2)


def test_certain_run_penalty_by_hand():
    sure, unsure = math.log(0.995), math.log(0.9)
    reward = CertainRunPenalty(run=3, penalty=0.5)
    rows = [[sure, sure, sure], [sure, sure, unsure], [unsure, sure, sure]]
    # the third is two tokens and padding, which must not complete its run
    assert reward(["q"] * 4, [""] * 4, [[1, 2, 3], [1, 2, 3], [1, 2], []], logprobs=[*rows[:2], [sure] * 3, [sure] * 3]) == [-0.5, 0, 0, 0]
    assert reward(["q"], [""], [[1, 2, 3]]) == [None]


def test_length_reward_compares_within_a_prompt():
    right, wrong = "<answer>7</answer>", "<answer>8</answer>"
    prompts = ["p", "p", "p", "p", "q", "q", "r", "p"]
    completions = [right, right, wrong, wrong, right, right, right, right]
    ids = [[0] * n for n in (2, 6, 2, 6, 3, 3, 9, 4)]
    answer = ["7"] * 6 + [None, "7"]
    assert LengthReward()(prompts, completions, ids, answer=answer) == [0.5, -0.5, 0.0, -0.5, 0.0, 0.0, None, 0.0]


def test_cosine_length_by_hand():
    right, wrong = "<answer>7</answer>", "<answer>8</answer>"
    reward = CosineLengthReward(12, right=(2.0, 1.0), wrong=(-10.0, 0.0), exceeded=-5.0)
    ids = [[0] * n for n in (0, 4, 6, 12, 0, 4, 6, 13)]
    completions = [right] * 4 + [wrong] * 4
    expected = [2.0, 1.75, 1.5, -5.0, -10.0, -7.5, -5.0, -5.0]  # cos(pi/3) = 1/2
    assert reward(["p"] * 8, completions, ids, answer=["7"] * 8) == pytest.approx(expected)
    assert reward(["p"], [right], [[0]], answer=[None]) == [None]


def test_soft_overlong_by_hand():
    reward = SoftOverlongPunishment(max_length=20, margin=4)
    assert reward(["p"] * 6, [""] * 6, [[0] * n for n in (0, 16, 17, 19, 20, 99)]) == [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("3 + 4 = 7", {}),
        ("it isn't naïve", {"Latin": 3}),
        ("cafe\u0301 ok", {"Latin": 2}),  # a combining accent
        ("答案是 seven", {"Han": 3, "Latin": 1}),
        ("answer是seven", {"Latin": 2, "Han": 1}),
        ("ひらカタ", {"Hiragana": 2, "Katakana": 2}),
        ("привет мир", {"Cyrillic": 2}),
        ("안녕 하세요", {"Hangul": 2}),
        (r"так \frac{1}{2} $x + yes$ \(abc\) `code here` https://a.example/b", {"Cyrillic": 1}),
        ("ＡＢＣ", {"Latin": 1}),
        ("𝐱 µ", {}),  # mathematical letters, the micro sign: of no script
    ],
)
def test_words_by_script_by_hand(text, expected):
    assert words_by_script(text) == expected


def test_language_consistency_looks_at_the_reasoning():
    text = "<think>so 三 it is</think><answer>七七七七</answer>"
    assert LanguageConsistencyReward("Latin")(["q"], [text]) == [0.75]
    assert LanguageConsistencyReward(("Han", "Latin"))(["q"], [text]) == [1.0]
    with pytest.raises(ValueError, match=r"script is 'English'; expected one or more of Arabic, .*Thai"):
        LanguageConsistencyReward("English")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SentenceReward(0), ValueError, "SentenceReward: min_words is 0; expected"),
        (lambda: ReferenceFluencyReward(2.0, 2.0), ValueError, "limit is 2.0; expected a finite number of above 2"),
        (lambda: CertainRunPenalty(run=0), ValueError, "run is 0"),
        (lambda: CertainRunPenalty(threshold=1.0), ValueError, "threshold is 1.0; expected a probability"),
        (lambda: CosineLengthReward(0), ValueError, "max_length is 0"),
        (lambda: CosineLengthReward(5, right=(1.0,)), ValueError, "right is .*; expected two numbers"),  # type: ignore[arg-type]
        (lambda: CosineLengthReward(5, wrong=(1.0, math.nan)), ValueError, "wrong is nan"),
        (lambda: SoftOverlongPunishment(5, 6), ValueError, "margin is 6; expected a finite number of at least 1 and at most 5"),
        (lambda: SoftOverlongPunishment("5", 1), TypeError, r"max_length is '5' \(str\); expected a number"),  # type: ignore[arg-type]
        (lambda: LanguageConsistencyReward(()), ValueError, "script is empty"),
    ],
)
def test_settings_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()
