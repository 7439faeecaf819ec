"""Secrets are in nothing that is written, logged or shown: settings, checkpoints, completions, results, messages."""

from __future__ import annotations

import io
import json
import logging
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from grpo_fast.utils import redaction
from grpo_fast.utils.errors import SettingsError
from grpo_fast.utils.redacted_output import redacted_output
from grpo_fast.utils.redaction import REDACTED, is_secret_name, redact, redact_text, redacted_paths, remember_secrets

SECRET = "sesame-4711-open"


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_remembered", set())


@pytest.mark.parametrize(
    "name",
    [
        "hub_token",
        "token",
        "api_key",
        "apiKey",
        "X-Api-Key",
        "OPENAI_API_KEY",
        "clientSecret",
        "db_password",
        "Authorization",
        "access_tokens",
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name) and redact({name: SECRET}) == {name: REDACTED}
    assert redact({name: None}) == {name: None} and redact({name: True}) == {name: True}  # token=True: the one that is stored elsewhere


@pytest.mark.parametrize(
    "name",
    ["max_new_tokens", "eos_token", "pad_token_id", "num_input_tokens_seen", "answer_key", "keyboard", "tokenizer", "monkey", "keys", ""],
)
def test_other_names(name: str) -> None:
    assert not is_secret_name(name) and redact({name: "value"}) == {name: "value"}


def test_at_any_depth_and_without_a_change_of_the_original() -> None:
    settings = {"sampler_options": {"headers": [{"Authorization": f"Bearer {SECRET}"}], "size": 3}, "pair": ({"token": SECRET}, 1)}
    before = json.dumps(settings)
    found = redact(settings)
    assert SECRET not in str(found) and found["sampler_options"]["size"] == 3 and found["pair"] == ({"token": REDACTED}, 1)
    assert json.dumps(settings) == before
    assert redacted_paths(found) == ["sampler_options.headers.Authorization", "pair.token"]


@pytest.mark.parametrize(
    "text",
    [
        f"judge(api_key='{SECRET}')",
        f'{{"model": {{"api_key": "{SECRET}"}}}}',
        f"{{'token': '{SECRET}'}}",
        f"https://user:{SECRET}@host:8000/v1",
        f"https://host/?api_key={SECRET}&n=1",
        f"Authorization: Bearer {SECRET}",
        "the token hf_abcdefghijklmnopqrstuvwx is wrong",
    ],
)
def test_texts(text: str) -> None:
    shown = redact_text(text)
    assert REDACTED in shown and SECRET not in shown and "hf_" not in shown
    assert redact_text(shown) == shown


def test_ordinary_texts_stay() -> None:
    for text in (
        "repetition(ngram_size=6)",
        "The answer key: 42",
        "Write key = value.",
        "http://host:8000/v1",
        "sk-learn",
        "eos_token='</s>'",
    ):
        assert redact_text(text) == text


def test_what_is_known_is_redacted_wherever_it_occurs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SECRET in redact_text(f"the server refuses {SECRET}.")
    remember_secrets({"sampler_options": {"api_key": SECRET}})
    assert redact_text(f"the server refuses {SECRET}.") == f"the server refuses {REDACTED}."
    monkeypatch.setenv("MY_API_KEY", "from-the-environment")
    assert redact_text("it was from-the-environment.") == f"it was {REDACTED}."
    assert redact({"completion": f"x = {SECRET}; api_key='mine'"}, known_only=True) == {"completion": f"x = {REDACTED}; api_key='mine'"}


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_fast.cli import main as cli

    monkeypatch.setenv("GRPO_FAST_BUILD", "auto")
    monkeypatch.setenv("INDEX_TOKEN", "torch")  # shorter than what is replaced in texts
    monkeypatch.setenv("CXX_TOKEN", SECRET)
    monkeypatch.setattr("grpo_fast.cli.doctor._version_text", lambda program: [f"c++ at https://{SECRET}/"])
    shown = CliRunner().invoke(cli.app, ["doctor"], env={"COLUMNS": "160"}).output
    assert SECRET not in shown and REDACTED in shown and "torch" in shown


# ---- settings, trackers, checkpoints

pytest.importorskip("transformers", reason="the settings are transformers'")

from grpo_fast.trainer.config import GRPOConfig  # noqa: E402
from grpo_fast.trainer.run_settings import TrainOptions, parse_overrides  # noqa: E402


def config(folder: Path, **more: Any) -> GRPOConfig:
    options = {"url": "http://host", "api_key": SECRET}
    return GRPOConfig(
        str(folder),
        use_cpu=True,
        report_to=[],
        hub_token=SECRET,
        model_init_kwargs={"token": SECRET},
        sampler="vllm",
        sampler_options=options,
        **more,
    )


def test_what_trackers_and_logs_get(tmp_path: Path) -> None:
    settings = config(tmp_path)
    for shown in (str(settings), repr(settings), settings.to_json_string(), str(settings.to_dict()), str(settings.to_sanitized_dict())):
        assert SECRET not in shown and REDACTED in shown
    assert isinstance(settings.model_init_kwargs, dict)
    assert settings.hub_token == settings.sampler_arguments["api_key"] == settings.model_init_kwargs["token"] == SECRET


def test_messages_of_wrong_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sampler_options") as caught:
        GRPOConfig(str(tmp_path), use_cpu=True, sampler_options=[{"api_key": SECRET}])  # type: ignore[arg-type]
    assert SECRET not in str(caught.value)
    for words in (
        ["--hub_tokenn=" + SECRET],
        ["--sampler_options", f'{{"api_key": "{SECRET}", }}'],
        ["--hub_token", SECRET, "--use_cpu", "maybe"],
    ):
        with pytest.raises(SettingsError) as wrong:
            parse_overrides(words, GRPOConfig)
        assert SECRET not in str(wrong.value)


def test_a_redacted_value_is_named_as_missing(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(
        json.dumps(redact({"hub_token": SECRET, "sampler_options": {"api_key": SECRET}, "rewards": [f"a.py:f(api_key='{SECRET}')"]}))
    )
    with pytest.raises(SettingsError, match=r"^hub_token, sampler_options\.api_key, rewards: .* with --hub_token or in .*settings\.json"):
        parse_overrides([str(file)], GRPOConfig)
    again = ("--hub_token", SECRET, "--sampler_options", f'{{"api_key": "{SECRET}"}}', "--rewards", "accuracy")
    assert parse_overrides([str(file), *again], GRPOConfig, TrainOptions)["hub_token"] == SECRET


def test_a_training_writes_no_secret(tmp_path: Path) -> None:
    import torch
    import trainer_cases as cases

    def judge(completions, log_extra, **columns):  # type: ignore[no-untyped-def]
        log_extra("api_key", [SECRET] * len(completions))
        log_extra("request", [f"sent with {SECRET}"] * len(completions))
        return [float(i % 2) for i in range(len(completions))]

    remember_secrets({"token": SECRET})
    settings = {"hub_token": SECRET, "model_init_kwargs": {"token": SECRET}, "save_strategy": "steps", "save_steps": 1}
    run = cases.trainer(tmp_path, rewards=judge, sampler=cases.Scripted(), log_completions=True, report_to=[], **settings)
    run.train()
    run.save_model(str(tmp_path))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"training_args.bin", "metrics.jsonl", "step-000001.jsonl"} <= {path.name for path in files}
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert run.args.hub_token == run.args.model_init_kwargs["token"] == SECRET
    stored = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert (stored.hub_token, stored.model_init_kwargs, stored.max_steps) == (REDACTED, {"token": REDACTED}, 1)


def fails(*_: Any) -> None:
    api_key = "kept-in-the-line-4711"  # a traceback shows no line of this: it shows the next one
    raise ConnectionError(f"https://me:{SECRET}@judge.example/v1?api_key={api_key} answered 401, HF_TOKEN=abc12345def")


def test_a_traceback_of_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from grpo_fast.cli import main

    monkeypatch.setattr(main, "app", fails)
    with pytest.raises(SystemExit) as ended:
        main.start()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert "Traceback" in said and "in fails" in said and "answered 401" in said
    assert SECRET not in said and "4711" not in said and "abc12345def" not in said


def test_log_lines_warnings_and_threads(capsys: pytest.CaptureFixture[str]) -> None:
    """Of any library while a command runs; of this package also in a user's program."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    others, ours = logging.getLogger("somebody.else"), logging.getLogger("grpo_fast")
    for logger in (others, ours):
        logger.addHandler(handler)
    try:
        with redacted_output():
            others.warning("no answer from %s", f"http://me:{SECRET}@host")
            try:
                fails()
            except ConnectionError:
                others.exception("failed")
            thread = threading.Thread(target=fails)
            thread.start()
            thread.join()
            shown = warnings.formatwarning(f"api_key='{SECRET}'", UserWarning, "file.py", 1, "line")
        ours.warning("no answer from %s", f"http://me:{SECRET}@host")
    finally:
        for logger in (others, ours):
            logger.removeHandler(handler)
    everything = written.getvalue() + shown + capsys.readouterr().err
    assert written.getvalue().count("no answer from http://<redacted>@host") == 2
    assert everything.count("Traceback") == 2 and everything.count("\nConnectionError: https://<redacted>@judge") == 2
    assert SECRET not in everything and "4711" not in everything


def test_words_of_a_program_stay() -> None:
    text = "call(token=token, eos_token=vocabulary_2, key=lambda row: row) max_new_tokens=512 sort_key=column_12345"
    assert redact_text(text) == text
