"""Tasks: true answers earn 1, junk earns 0, whatever a generator's own scores say."""

from __future__ import annotations

import doctest
import importlib
import pickle
import warnings

import pytest

from grpo_fast.data.tasks import ReasoningGymReward, Task, arithmetic_task, reasoning_gym_task, sorting_task


def scorer_of(task: Task) -> ReasoningGymReward:
    assert isinstance(task.reward, ReasoningGymReward)
    return task.reward


def answers(task, texts):
    columns = {name: [row[name] for row in task.rows] for name in task.rows[0]}
    prompts = columns.pop("prompt")
    return task.reward(
        prompts=prompts, completions=[f"<answer>{text}</answer>" for text in texts], completion_ids=[[1]] * len(texts), **columns
    )


@pytest.fixture(scope="module")
def reasoning_gym():
    return pytest.importorskip("reasoning_gym", reason="needs the reasoning-gym package: pip install '.[tasks]'")


@pytest.mark.parametrize("name", ["arithmetic", "common", "reasoning_gym", "sorting"])
def test_the_examples_of_the_docstrings(name):
    assert doctest.testmod(importlib.import_module(f"grpo_fast.data.tasks.{name}")).failed == 0


@pytest.mark.parametrize("make", [arithmetic_task, sorting_task])
def test_built_in_tasks_are_solvable_and_repeatable(make):
    task = make(20, seed=3)
    truths = [row["answer"] for row in task.rows]
    assert len(task.rows) == 20 and task.rows == make(20, seed=3).rows != make(20, seed=4).rows
    assert answers(task, truths) == [1.0] * 20
    assert answers(task, [truth + "1" for truth in truths]) == [0.0] * 20


def test_arithmetic_is_right():
    for row in arithmetic_task(50, terms=4, digits=3, instruction="{question}").rows:
        expression = row["prompt"].removeprefix("What is ").removesuffix("?")
        assert eval(expression) == int(row["answer"])
        assert expression.count("+") + expression.count("-") == 3


def test_the_instruction_holds_the_question():
    (row,) = arithmetic_task(1).rows
    assert row["prompt"].startswith("What is ") and "<answer>" in row["prompt"]
    (row,) = sorting_task(1, instruction="{question} {x}").rows
    assert row["prompt"].endswith("= {x}")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: arithmetic_task(0), "arithmetic_task: size is 0; expected"),
        (lambda: arithmetic_task(1, terms=1), "arithmetic_task: terms is 1; expected"),
        (lambda: sorting_task(1, instruction="sort"), "sorting_task: instruction is 'sort'; expected a text with '{question}'"),
        (lambda: ReasoningGymReward("gcd", floor=0.0), "ReasoningGymReward: floor is 0.0; expected"),
    ],
)
def test_wrong_use_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_generator_whose_scores_can_be_trusted(reasoning_gym):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = reasoning_gym_task("complex_arithmetic", size=5, seed=1)
    assert not scorer_of(task).exact and task.reward.__name__ == "reasoning_gym_complex_arithmetic"
    truths = [row["answer"] for row in task.rows]
    assert answers(task, truths) == [1.0] * 5
    assert answers(task, ["junk", "", "0", "-", "1 + 1 + 1"]) == [0.0] * 5
    assert task.rows[0]["prompt"].endswith("</answer>.")
    again = reasoning_gym_task("complex_arithmetic", size=5, seed=1)
    assert list(again.rows) == list(task.rows) != list(reasoning_gym_task("complex_arithmetic", size=5, seed=2).rows)


def test_credit_for_being_wrong_is_not_paid(reasoning_gym):
    """Raw, this generator gives 0.01 or so to any wrong answer: enough to give a group of wrong answers full-sized advantages."""
    task = reasoning_gym_task("prime_factorization", size=3)
    entry = [row["entry"] for row in task.rows]
    raw = reasoning_gym.create_dataset("prime_factorization", size=3, seed=0)
    assert 0 < raw.score_answer("7 × 7 × 7", raw[0]) < 0.1
    assert task.reward(["q"] * 3, ["<answer>7 × 7 × 7</answer>"] * 3, entry=entry) == [0.0] * 3
    assert task.reward(["q"] * 3, ["nothing stated", "", "<answer>7"], entry=entry) == [0.0] * 3


def test_a_score_function_that_raises_means_wrong(reasoning_gym):
    task = reasoning_gym_task("prime_factorization", size=2)
    raw = reasoning_gym.create_dataset("prime_factorization", size=2, seed=0)
    with pytest.raises(ValueError, match="invalid literal"):
        raw.score_answer("junk", raw[0])
    assert scorer_of(task).counters == {}  # probing the generator does not count
    assert answers(task, ["junk", task.rows[1]["answer"]]) == [0.0, 1.0]
    assert scorer_of(task).counters == {"scorer_raised": 1}


def test_a_score_function_that_hangs_is_killed_and_counted(reasoning_gym):
    task = reasoning_gym_task("rubiks_cube", size=1)
    assert task.rows[0]["answer"] is None  # many solutions
    hasty = ReasoningGymReward("rubiks_cube", timeout=1.0)
    entry = task.rows[0]["entry"]
    hasty(["q"], ["<answer>warm up</answer>"], entry=[entry])
    hasty.counters.clear()
    late = hasty(["q"] * 2, ["<answer>-98765432</answer>", "<answer>junk</answer>"], entry=[entry] * 2)  # taken for as many moves
    assert late == [None, 0.0] and hasty.counters["timeouts"] == 1


def test_a_generator_that_pays_for_junk_is_scored_exactly_with_a_warning(reasoning_gym):
    raw = reasoning_gym.create_dataset("game_of_life_halting", size=2, seed=0)
    assert raw.score_answer("junk", raw[0]) + raw.score_answer("junk", raw[1]) > 0
    with pytest.warns(
        UserWarning, match="game_of_life_halting's score function gives 1 to 'junk'; answers are compared with the stored one"
    ):
        task = reasoning_gym_task("game_of_life_halting", size=4)
    assert scorer_of(task).exact
    truths = [row["answer"] for row in task.rows]
    assert answers(task, truths) == [1.0] * 4
    assert answers(task, ["junk"] * 4) == [0.0] * 4


def test_how_a_task_is_scored_does_not_depend_on_its_seed(reasoning_gym):
    with pytest.warns(UserWarning, match="chain_sum"):
        scored = {reasoning_gym_task("chain_sum", size=2, seed=seed, min_terms=2, max_terms=2).reward for seed in range(4)}
    assert len(scored) == 1
    assert not scorer_of(reasoning_gym_task("chain_sum", size=2, floor=1.0)).exact  # all or nothing: no junk earns all


@pytest.mark.sweep
def test_every_generator(reasoning_gym):
    """Each task is rejected, or gives 1 for the true answer and 0 for junk."""
    from reasoning_gym.factory import DATASETS

    refused = []
    for name in sorted(DATASETS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                task = reasoning_gym_task(name, size=3, seed=7)
            except ValueError:
                refused.append(name)
                continue
        if task.rows[0]["answer"] is not None:
            assert answers(task, [row["answer"] for row in task.rows]) == [1.0] * 3, name
        for junk in ("no", "-1234567.5", "(1, 2", "null", "x" * 500):
            paid = answers(task, [junk] * 3)
            if scorer_of(task).exact:  # else a short text may share letters with a true answer, and earn a part
                assert paid == [0.0] * 3, (name, junk)
            assert max(paid) < 1, (name, junk)
    assert refused == ["composite", "propositional_logic"]


def test_a_generator_that_cannot_be_trusted_and_stores_no_answer_is_refused(reasoning_gym):
    with pytest.raises(ValueError, match=r"name is 'propositional_logic', whose score function gives 0.25 to .*stores no answers"):
        reasoning_gym_task("propositional_logic", size=4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: reasoning_gym_task("no_such"), ValueError, "name is 'no_such'; expected one of ab, "),
        (lambda: reasoning_gym_task("gcd", nonsense=1), ValueError, "'gcd' does not take the settings .*nonsense"),
        (lambda: reasoning_gym_task("gcd", min_value=object()), TypeError, "expected plain values, as JSON has them"),
        (lambda: reasoning_gym_task("gcd", size=0), ValueError, "size is 0"),
    ],
)
def test_wrong_generators_and_settings_are_refused(call, error, message, reasoning_gym):
    with pytest.raises(error, match=message):
        call()


def test_the_reward_can_be_pickled(reasoning_gym):
    task = reasoning_gym_task("prime_factorization", size=1)
    copy = pickle.loads(pickle.dumps(task.reward))
    assert copy == task.reward and hash(copy) == hash(task.reward)
    row = task.rows[0]
    assert copy(["q"], [f"<answer>{row['answer']}</answer>"], entry=[row["entry"]]) == [1.0]
