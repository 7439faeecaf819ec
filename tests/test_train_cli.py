"""``grpo-fast train``: settings from file and command line, data, rewards, errors before the model loads; and the command line's mounts."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="the trainer is transformers'")
pytest.importorskip("datasets", reason="rows are a dataset")

from grpo_fast.cli import train as command
from grpo_fast.data.loading import make_task, shape_prompts
from grpo_fast.data.prompts import read_rows
from grpo_fast.data.tasks.sorting import make_tokenizer
from grpo_fast.generation import SAMPLERS, SamplerError
from grpo_fast.rewards import BUILT_IN, RewardError
from grpo_fast.trainer.callbacks import ProgressBarCallback
from grpo_fast.trainer.checkpoint_files import CheckpointError
from grpo_fast.trainer.config import GRPOConfig
from grpo_fast.trainer.run_settings import TrainOptions, parse
from grpo_fast.utils.dataclass_options import read_options
from grpo_fast.utils.disk import DiskFullError
from grpo_fast.utils.errors import SettingsError

TOKENIZER = make_tokenizer()
TOKENIZER.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
ROWS = [{"prompt": f"sort {i}=", "question": f"what is {i}?", "answer": str(i)} for i in range(8)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a data file and a settings file; datasets keeps its cache in it too."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # a reward's file puts its folder there
    monkeypatch.setitem(sys.modules, "mine", None)  # so that what is imported under this name is forgotten after the test ...
    del sys.modules["mine"]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    TOKENIZER.save_pretrained("model")
    Path("mine.py").write_text("def short(completions, **columns):\n    return [-float(len(c)) for c in completions]\n")
    Path("config.yaml").write_text(
        """
        model: ./model
        dataset: rows.jsonl
        rewards: [accuracy, "repetition(ngram_size=6)", "mine.py:short"]
        output_dir: run
        learning_rate: 1e-6          # YAML reads this as a text
        max-steps: 3
        per_device_train_batch_size: 4
        num_generations: 4
        use_cpu: true
        report_to: none
        scale_rewards: none
        packing: false
        sampler_options: {batch_size: 2}
        reward_weights: [1, 0.5, 0.1]
        """
    )
    return tmp_path


class StubTrainer:
    """Takes what GRPOTrainer takes, and writes down what is asked of it."""

    made: list[StubTrainer] = []  # noqa: RUF012
    ends_in: BaseException | None = None

    def __init__(self, **arguments: Any) -> None:
        self.arguments, self.args = arguments, arguments["args"]
        self.done: list[Any] = []
        self.state = SimpleNamespace(global_step=7)
        self.callback_handler = SimpleNamespace(callbacks=[ProgressBarCallback()])
        StubTrainer.made.append(self)

    def is_world_process_zero(self) -> bool:
        return True

    def output_dir_locked(self) -> AbstractContextManager[None]:
        return nullcontext()

    def train(self, resume_from_checkpoint: Any) -> None:
        if self.ends_in is not None:
            raise self.ends_in
        self.done.append(("train", resume_from_checkpoint))

    def save_model(self, folder: str) -> None:
        self.done.append(("save", folder))


def train(*args: str) -> StubTrainer:
    stub: Any = StubTrainer
    command.app(list(args), trainer_class=stub)
    return StubTrainer.made[-1]


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one message of a command that ends with status 2 and makes no trainer."""
    before = len(StubTrainer.made)
    with pytest.raises(SystemExit) as ended:
        train(*args)
    assert ended.value.code == 2 and len(StubTrainer.made) == before
    return " ".join(capsys.readouterr().err.split())


def test_file_and_command_line_make_a_trainer(here: Path) -> None:
    trainer = train("config.yaml", "--learning_rate", "2e-6", "--num-generations", "2", "--seed", "7")
    config = trainer.args
    assert isinstance(config, GRPOConfig)
    assert (config.learning_rate, config.num_generations, config.max_steps, config.seed) == (2e-6, 2, 3, 7)
    found: tuple[Any, ...] = (config.scale_rewards, config.packing, config.use_cpu, config.sampler_options)
    assert found == ("none", False, True, {"batch_size": 2})
    assert config.reward_weights == [1.0, 0.5, 0.1] and config.report_to == []
    assert trainer.arguments["model"] == "./model" and trainer.arguments["peft_config"] is None
    assert trainer.arguments["train_dataset"].column_names == ["prompt", "question", "answer"]
    assert len(trainer.arguments["train_dataset"]) == 8 and trainer.arguments["eval_dataset"] is None
    accuracy, repetition, short = trainer.arguments["reward_funcs"]
    assert repetition.ngram_size == 6 and short(completions=["abc"]) == [-3.0]
    assert accuracy([""], ["<answer>3</answer>"], answer=["3"]) == [1.0]
    assert trainer.done == [("train", None), ("save", "run")]


def test_the_settings_it_leaves_run_it_again(here: Path) -> None:
    first = train("config.yaml", "--seed", "7", "--resume_from_checkpoint", "auto")
    second = train("run/settings.json", "--resume_from_checkpoint", "auto")
    assert "resume_from_checkpoint" not in json.loads(Path("run/settings.json").read_text())  # how a run began is no setting of it
    ignore = {"logging_dir"}
    one, two = (dataclasses.asdict(trainer.args) for trainer in (first, second))
    assert {k: str(v) for k, v in one.items() if k not in ignore} == {k: str(v) for k, v in two.items() if k not in ignore}


def test_everything_on_the_command_line(here: Path) -> None:
    pytest.importorskip("peft", reason="LoRA options need peft")
    trainer = train(
        *("--model", "model", "--dataset", "rows.jsonl", "--rewards", "accuracy", "format", "--use_cpu", "--report_to", "none"),
        *("--output_dir", "run"),
        *("--dataset_split", "train[:4]", "--eval_dataset", "rows.jsonl", "--eval_split", "x[4:6]", "--system_prompt", "Think."),
        *("--prompt_template", "Q: {question}", "--temperature_schedule", '{"kind": "linear", "start": 0.8, "end": 1.2, "steps": 9}'),
        *("--use_peft", "--lora_r", "3", "--lora_target_modules", "q_proj", "v_proj", "--packing", "true", "--delta", "none"),
    )
    assert trainer.args.temperature_schedule == {"kind": "linear", "start": 0.8, "end": 1.2, "steps": 9}
    assert trainer.args.packing is True and trainer.args.delta is None
    rows, evaluation = trainer.arguments["train_dataset"], trainer.arguments["eval_dataset"]
    assert len(rows) == 4 and len(evaluation) == 2
    assert rows[1]["prompt"] == [{"role": "system", "content": "Think."}, {"role": "user", "content": "Q: what is 1?"}]
    lora = trainer.arguments["peft_config"]
    assert lora.r == 3 and lora.target_modules == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere.yaml"], "there is no settings file nowhere.yaml"),
        (["config.yaml", "--learning_rat", "1"], "there is no --learning_rat. Did you mean learning_rate"),
        (["config.yaml", "--learning_rate", "fast"], "learning_rate"),
        (["config.yaml", "stray"], "'stray' is no option's value"),
        (["--seed", "1", "config.yaml"], "'config.yaml' is no option's value; expected a settings file in the first place"),
        (["config.yaml", "--num_generations", "1"], "GRPOConfig: num_generations is 1; expected at least 2"),
        (["config.yaml", "--temperature", "0"], "greedy decoding"),
        (["config.yaml", "--loss_type", "ppo"], "ppo"),
        (["config.yaml", "--rewards", "acuracy"], "'acuracy' is none of the package's own rewards"),
        (["config.yaml", "--rewards", "accuracy"], "weights has 3 numbers; expected 1, one for each of accuracy_reward"),
        (["config.yaml", "--reward_weights", "1", "none", "1"], "reward_weights is [1.0, None, 1.0]; expected a list of finite numbers"),
        (["config.yaml", "--output_dir", "rows.jsonl/run"], "output_dir is 'rows.jsonl/run'; expected a folder to write to"),
        (["config.yaml", "--sampler", "tensorrt"], "tensorrt"),
        (["config.yaml", "--sampler_options", '{"batchsize": 2}'], "has no option batchsize; it has batch_size, cache_implementation"),
        (
            ["config.yaml", "--reward_isolation", "process", "--rewards", "accuracy", "--reward_weights", "1", "--reward_timeout", "0"],
            "is 0",
        ),
        (["config.yaml", "--dataset", "gone.jsonl"], "data set 'gone.jsonl': there is no such file"),
        (["config.yaml", "--dataset", "mine.py"], "files that end in '.py' are not read"),
        (["config.yaml", "--prompt_column", "text"], "prompt_column is 'text'; expected one of prompt, question, answer"),
        (["config.yaml", "--prompt_template", "{text}"], "expected columns in braces"),
        (["config.yaml", "--prompt_template", "{answer.value}"], "expected columns in braces"),
        (["config.yaml", "--prompt_template", "{answer}", "--prompt_column", "answer"], "both set"),
        (["config.yaml", "--model", "./gone"], "model is './gone'; there is no such folder"),
        (["config.yaml", "--resume_from_checkpoint", "./gone"], "lacks trainer_state.json"),
        (["config.yaml", "--eval_strategy", "steps"], "there is no eval_dataset"),
        (["config.yaml", "--sampler_options", "{batch_size: 4"], "expected JSON"),
        (["--dataset", "rows.jsonl"], "model is not set"),
        (["--dataset", "rows.jsonl", "--model", "model", "--use_cpu", "--output_dir", "run"], "rewards is not set"),
        (["--dataset", "rows.jsonl", "--model", "model", "--rewards", "accuracy", "--use_cpu"], "output_dir is not set"),
        (["config.yaml", "--tokenizer", "nobody/nothing"], "the tokenizer of 'nobody/nothing' cannot be loaded"),
        (["config.yaml", "--max_prompt_length", "2"], "max_prompt_length is 2, and every one of the 8 prompts is longer"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_loads(here: Path, capsys: pytest.CaptureFixture[str], args: list[str], words: str) -> None:
    message = refused(capsys, *args)
    assert "grpo-fast train: " in message and words in message


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("lerning_rate: 1", "there is no setting 'lerning_rate'. Did you mean learning_rate"),
        ("max_steps: 1.5", "max_steps is 1.5; expected a whole number"),
        ("max_steps: true", "max_steps is True; expected a whole number"),
        ("learning_rate: [1]", "expected one value, not a list"),
        ("use_cpu: maybe", "use_cpu is 'maybe'; expected true or false"),
        ("eval_strategy: sometimes", "expected one of no, steps, epoch"),
        ("beta: {a: 1}", "expected a number"),
        ("- a", "holds a list"),
        ("", "bad.yaml is empty"),
        ("seed: 1\nmax_steps: 2\nseed: 3", "bad.yaml is no YAML: seed is set twice"),
        ("a: [", "is no YAML"),
    ],
)
def test_a_settings_file_with_a_mistake(here: Path, capsys: pytest.CaptureFixture[str], lines: str, words: str) -> None:
    Path("bad.yaml").write_text(lines)
    assert words in refused(capsys, "bad.yaml")


def test_a_reward_that_needs_a_column_the_rows_have_not(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bare.jsonl").write_text('{"prompt": "a"}\n')
    message = refused(capsys, "config.yaml", "--dataset", "bare.jsonl")
    assert "reward 'accuracy_reward' needs 'answer', neither a column of the data set" in message and "the columns are: none" in message
    Path("bare.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    assert "no column 'prompt', but question, answer" in refused(capsys, "config.yaml", "--dataset", "bare.jsonl")
    Path("bare.jsonl").write_text("nonsense\n")
    assert "cannot be loaded" in refused(capsys, "config.yaml", "--dataset", "bare.jsonl")


def checkpoint(step: int) -> str:
    folder = Path(f"run/checkpoint-{step}")
    folder.mkdir(parents=True)
    for name in ("trainer_state.json", "grpo_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_text("{}")
    return str(folder)


def test_resuming(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("config.yaml", "--resume_from_checkpoint", "auto").done[0] == ("train", None)
    first, last = checkpoint(2), checkpoint(10)
    (Path(last) / "grpo_state.json").unlink()
    assert train("config.yaml", "--resume_from_checkpoint", "auto").done[0] == ("train", True)  # the trainer passes over a half one
    assert train("config.yaml", "--resume_from_checkpoint", first).done[0] == ("train", first)
    assert "which lacks grpo_state.json" in refused(capsys, "config.yaml", "--resume_from_checkpoint", last)
    (Path(first) / "optimizer.pt").unlink()
    message = refused(capsys, "config.yaml", "--resume_from_checkpoint", "auto")
    assert "no checkpoint in run is complete (checkpoint-10 lacks grpo_state.json" in message and "To start a new run from" in message


def test_a_run_is_not_begun_in_the_folder_of_another(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(2)
    message = refused(capsys, "config.yaml")
    assert "holds a run already (checkpoint-2); expected another folder, or" in message and "--resume_from_checkpoint auto" in message


def test_how_a_run_ended_is_said_in_a_few_lines(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(error: BaseException, code: int) -> str:
        monkeypatch.setattr(StubTrainer, "ends_in", error)
        with pytest.raises(SystemExit) as exit_:
            train("config.yaml", "--resume_from_checkpoint", "auto")
        assert exit_.value.code == code
        return capsys.readouterr().err

    failed = RewardError("reward 'mine' failed: KeyError: 'gold'")
    try:
        {}["gold"]  # type: ignore[index]
    except KeyError as error:
        failed.__cause__ = error
    message = ended(failed, 1)
    assert '{}["gold"]' in message and "reward 'mine' failed" in message and message.count("Traceback") == 1  # of the user's code alone
    assert "7 steps were done. There is no checkpoint yet" in message
    checkpoint(5)
    for cause in (SamplerError("the server is gone"), FloatingPointError("the loss is not finite")):
        message = ended(cause, 1)
        assert str(cause) in message and "checkpoint-5 is complete. To go on from there" in message and "Traceback" not in message
    assert "interrupted." in ended(KeyboardInterrupt(), 130)
    assert "the disk is full" in ended(DiskFullError(28, "the disk is full"), 1)
    assert "it is damaged" in ended(CheckpointError("it is damaged"), 2)
    monkeypatch.setattr(StubTrainer, "ends_in", ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):  # a mistake of ours
        train("config.yaml", "--resume_from_checkpoint", "auto")


def test_a_model_without_weights_and_rows_too_few_are_no_tracebacks(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from grpo_fast.demo.model import make_model

    make_model(TOKENIZER).config.save_pretrained("model")
    for more, words in (
        ((), "model.safetensors"),
        (("--dataset_split", "train[:2]", "--num_generations", "2"), "train_dataset has 2 rows"),
    ):
        with pytest.raises(SystemExit) as ended:
            command.app(["config.yaml", "--per_device_train_batch_size", "8", *more])
        assert ended.value.code == 2
        message = capsys.readouterr().err
        assert words in message and "grpo-fast train: " in message and "Traceback" not in message


def test_what_a_file_sets_the_command_line_can_unset(here: Path) -> None:
    assert train("config.yaml", "--reward_weights", "none").args.reward_weights is None


@pytest.mark.parametrize("ending", ["json", "parquet", "csv", "folder"])
def test_rows_from_files(here: Path, ending: str) -> None:
    import datasets

    whole = datasets.Dataset.from_list(ROWS)
    if ending == "folder":
        whole.save_to_disk("saved")
        name = "saved"
    else:
        name = f"rows.{ending}"
        {"json": whole.to_json, "parquet": whole.to_parquet, "csv": whole.to_csv}[ending](name)
    rows = read_rows(name)
    assert rows[3]["prompt"] == "sort 3=" and len(rows) == 8
    assert shape_prompts(rows, column="question")[3]["prompt"] == "what is 3?"


def test_every_field_is_an_option_and_in_the_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    names = {each.name for kind in (TrainOptions, GRPOConfig) for each in dataclasses.fields(kind) if each.init}
    assert set(read_options([TrainOptions, GRPOConfig])) == names and len(names) > 150
    with pytest.raises(SystemExit) as ended:
        command.app(["--help-all"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert set(BUILT_IN) | set(SAMPLERS) <= {line.split()[0] for line in shown.splitlines() if line and not line.startswith(" ")}
    assert "ngram_size=4" in shown and "weight_sync='auto'" in shown
    lines = {line.split()[0]: line for line in shown.splitlines() if line.startswith("--")}
    assert "gspo" in lines["--loss_type"] and "1 - epsilon." in lines["--epsilon"] and "INTELLECT-2" in lines["--delta"]
    assert {f"--{name}" for name in names} == set(lines)
    assert "completions per prompt" in lines["--num_generations"] and " 8 " in lines["--num_generations"]
    assert "initial learning rate" in lines["--learning_rate"] and "1e-06" in lines["--learning_rate"]
    assert sum(len(line.split()) > 2 for line in lines.values()) > 0.9 * len(names)  # nearly all are explained


def test_the_parser_leaves_types_as_they_were_said() -> None:
    cases: tuple[tuple[str, Any], ...] = (("true", True), ("False", False), ("batch", "batch"))
    for text, expected in cases:
        _, config, _ = parse(
            ["--model", "m", "--dataset", "d", "--rewards", "format", "--scale_rewards", text, "--use_cpu", "--report_to", "none"],
            GRPOConfig,
        )
        assert config.scale_rewards == {True: "group", False: "none"}.get(expected, expected)
    own = ["--model", "m", "--dataset", "d", "--rewards", "format", "--use_cpu", "--report_to", "none"]
    for words, expected in ((["--bf16"], True), (["--bf16", "false"], False), ([], False), (["--bf16", "none"], False)):
        assert parse([*own, *words, "--vllm_importance_sampling_correction"], GRPOConfig)[1].bf16 is expected
    with pytest.raises(SettingsError, match="dataset is not set"):
        parse(["--model", "m"], GRPOConfig)


@pytest.mark.slow
def test_the_real_trainer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps of a random model, and two more of the resumed run; metrics, completions, model and curves are there."""
    from grpo_fast.demo.model import make_model
    from grpo_fast.trainer.callbacks import read_run
    from grpo_fast.trainer.plot import plot_runs

    make_model(TOKENIZER).save_pretrained("model")
    settings = (
        *("--model", "model", "--dataset", "sorting(digits=2)", "--rewards", "task", "repetition", "--output_dir", "run", "--use_cpu"),
        *("--per_device_train_batch_size", "8", "--num_generations", "4", "--max_completion_length", "6", "--report_to", "none"),
        *("--disable_tqdm", "False"),  # its default is transformers' verbosity, which other libraries change
        *("--logging_steps", "1", "--save_steps", "1", "--log_completions", "--temperature_schedule"),
        '{"kind": "linear", "start": 0.8, "end": 1.2, "steps": 4}',
    )
    command.app([*settings, "--max_steps", "2"])
    command.app([*settings, "--max_steps", "4", "--resume_from_checkpoint", "auto"])
    records = [record for record in read_run("run") if "reward" in record]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["temperature"] for record in records] == pytest.approx([0.8, 0.9, 1.0, 1.1])
    assert Path("run/model.safetensors").is_file() and Path("run/completions/step-000004.jsonl").is_file()
    assert "Reward" in plot_runs(["run"], "run/curves.png")
    assert "step 4/4  reward" in capsys.readouterr().err


# --- tasks -------------------------------------------------------------------------------------------------------------------------


def test_a_task_brings_rows_and_its_reward(here: Path) -> None:
    own = ("--model", "model", "--use_cpu", "--report_to", "none", "--output_dir", "run")
    trainer = train(
        *own, "--dataset", "sorting(digits=3)", "--dataset_size", "5", "--eval_dataset", "sorting(digits=3)", "--eval_size", "3"
    )
    rows, evaluation = trainer.arguments["train_dataset"], trainer.arguments["eval_dataset"]
    assert len(rows) == 5 and len(evaluation) == 3 and rows[0]["prompt"] != evaluation[0]["prompt"]
    (reward,) = trainer.arguments["reward_funcs"]
    assert reward([""], [f"<answer>{rows[0]['answer']}</answer>"], answer=[rows[0]["answer"]]) == [1.0]
    both = train(*own, "--dataset", "arithmetic", "--rewards", "format", "task", "--dataset_size", "4", "--max_prompt_length", "900")
    assert len(both.arguments["reward_funcs"]) == 2 and len(both.arguments["train_dataset"]) == 4
    assert make_task("rows.jsonl") is None


def test_task_errors(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "unexpected keyword argument 'colour'" in refused(capsys, "config.yaml", "--dataset", "sorting(colour=1)")
    assert "digits is 0" in refused(capsys, "config.yaml", "--dataset", "sorting(digits=0)")
    assert "Expected arithmetic, sorting or reasoning_gym:TASK" in refused(capsys, "config.yaml", "--dataset", "sorting(3)")
    assert "the dataset is not a task" in refused(capsys, "config.yaml", "--rewards", "task", "--reward_weights", "1")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert "reasoning-gym package, which is not installed" in refused(capsys, "config.yaml", "--dataset", "reasoning_gym:chain_sum")


def test_reasoning_gym(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("reasoning_gym", reason="its generators are the package's")
    trainer = train("config.yaml", "--reward_weights", "1", "--rewards", "task", "--dataset", "reasoning_gym:gcd", "--dataset_size", "4")
    assert len(trainer.arguments["train_dataset"]) == 4 and trainer.arguments["reward_funcs"][0].name == "gcd"
    (line,) = capsys.readouterr().err.splitlines()[:-1]
    assert line.startswith("grpo-fast train: warning: reasoning_gym_task: gcd's score function gives")
    assert "name is 'nothing'; expected one of" in refused(capsys, "config.yaml", "--dataset", "reasoning_gym:nothing")


# --- the command line's mounts -----------------------------------------------------------------------------------------------------


def test_train_and_plot_are_mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_fast.cli import main as cli

    shown = CliRunner().invoke(cli.app, ["--help"]).output
    assert "train" in shown and "plot" in shown
    seen: list[Any] = []
    monkeypatch.setattr(command, "app", lambda **arguments: seen.append(arguments))
    assert CliRunner().invoke(cli.app, ["train", "config.yaml", "--help", "--learning_rate=1"]).exit_code == 0
    assert seen == [{"args": ["config.yaml", "--help", "--learning_rate=1"], "prog_name": "grpo-fast train"}]
    result = CliRunner().invoke(cli.app, ["plot", "/nowhere/at/all"])
    assert result.exit_code == 2 and "there is no /nowhere/at/all" in result.output


def test_doctor_names_what_training_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_fast.cli import doctor
    from grpo_fast.cli import main as cli

    versions = {"transformers": "5.17.0", "matplotlib": "3.9", "datasets": "5.2"}
    monkeypatch.setattr(doctor, "installed_version", versions.get)
    shown = CliRunner().invoke(cli.app, ["doctor"], env={"COLUMNS": "120"}).output
    lines = {line.split("│")[1].strip(): line for line in shown.splitlines() if line.startswith("│")}
    assert "5.17.0" in lines["transformers"] and "not installed" in lines["math-verify"] and "--rewards math" in lines["math-verify"]
    assert "pip install '.[math,peft,tasks,train]' in the checkout" in shown


# --- the page on training ----------------------------------------------------------------------------------------------------------

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = (DOCS / "training.md").read_text()


def test_the_pages_have_every_reward_and_sampler() -> None:
    pages = "".join((DOCS / page).read_text() for page in ("rewards.md", "samplers.md"))
    rows = re.findall(r"^\| `\"?(\w+)\"?` \| (\S+)", pages, re.M)
    named = {name: what.strip("`") for name, what in rows}
    assert {name: reward.__name__ for name, reward in BUILT_IN.items()}.items() <= named.items()
    assert set(SAMPLERS) <= set(named)


def test_the_settings_and_commands_of_the_page_are_taken(here: Path) -> None:
    pytest.importorskip("reasoning_gym", reason="its generators are the package's")
    Path("my_rewards.py").write_text("def brief(completions, **columns):\n    return [-float(len(c)) for c in completions]\n")
    (settings,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    Path("sums.yaml").write_text(settings)
    commands = [shlex.split(line) for line in re.findall(r"^grpo-fast train (.*)$", PAGE, re.M)]
    assert len(commands) == 3
    for command_line in commands:
        trainer = train(*command_line, "--model", "model", "--use_cpu", "--report_to", "none")
    assert trainer.done[0] == ("train", None) and trainer.args.learning_rate == 2e-6 and len(trainer.arguments["reward_funcs"]) == 4
    assert trainer.args.temperature_schedule == {"kind": "entropy", "target": 0.3} and len(trainer.arguments["eval_dataset"]) == 100


def test_secrets_are_not_stored_with_the_settings(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "sesame-4711-open"
    given = ("--hub_token", secret, "--model_init_kwargs", f'{{"token": "{secret}"}}', "--resume_from_checkpoint", "auto")
    trainer = train("config.yaml", *given)
    assert trainer.args.hub_token == trainer.args.model_init_kwargs["token"] == secret
    assert not [path for path in here.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    message = refused(capsys, "run/settings.json", "--resume_from_checkpoint", "auto")
    assert "hub_token, model_init_kwargs.token: the value is a secret, which was not stored" in message
    assert train("run/settings.json", *given).args.hub_token == secret


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)),
            "aliases",
        ),
        ("a: &a {b: x, c: y}\nd: &d {<<: *a, e: *a}\n" + "".join(f"f{i}: *d\n" for i in range(4000)), "more than 20000 names and values"),
        ("sampler_options: " + "[" * 20_000, "nested more than 32 deep"),
        ("- " * 20_000 + "x", "nested more than 32 deep"),
        ('{"sampler_options": ' + '{"a": ' * 5_000 + "1" + "}" * 5_001, "nested more than 32 deep"),
        ("a: &a [*a]", "a contains itself"),
        ("seed: 1" + "#" * (1 << 20), "expected a settings file, of at most 1048576"),
        ("a: 2020-99-99", "is no YAML"),
        ("? [1, 2]\n: 3", "unhashable key"),
    ],
)
def test_a_hostile_settings_file_is_refused(here: Path, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    Path("bad.yaml").write_text(text)
    assert words in refused(capsys, "bad.yaml")


def test_nested_json_on_the_command_line_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nested = '{"a": ' * 40_000 + "1" + "}" * 40_000
    assert "nested more than 32 deep" in refused(capsys, "config.yaml", "--sampler_options", nested)
    assert train("config.yaml", "--sampler_options", '{"batch_size": 3}').args.sampler_options == {"batch_size": 3}


def test_aliases_and_merges_are_read(here: Path) -> None:
    text = Path("config.yaml").read_text().replace("        ", "")
    Path("with.yaml").write_text("num_iterations: &n 2\n" + text.replace("num_generations: 4", "num_generations: *n"))
    assert train("with.yaml").args.num_generations == 2
