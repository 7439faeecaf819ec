"""README.md: its Python is run, its commands as far as a test run can contain them, and its numbers are those of the result files."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hang import HANG

import grpo_fast as gf
from grpo_fast.benchmark.harness.suite import load
from grpo_fast.benchmark.head.suite import markdown

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs" / "results.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", TEXT + RESULTS, re.S)
    for line in block.splitlines()
    if line and not line.startswith("#")
]

# Where a command of the README is run, if not here: a command that is in no list fails the test below.
RUN_ELSEWHERE = {
    "pip install .": "tests/test_packaging.py builds and installs the wheel",
    "pip install '.[train]'": "tests/test_packaging.py knows the extras",
    "make demo": "tests/test_demo.py runs the command behind it",
    "make test": "is what runs this",
    "make bench": "tests/test_benchmark.py runs the command behind it",
    "grpo-fast bench-trainer": "tests/test_trainer_stage.py runs it at toy size",
    "grpo-fast bench-drop-ins": "tests/test_benchmark_drop_ins.py runs it at toy size",
    "grpo-fast bench-trl": "tests/test_benchmark_trl.py runs it at toy size",
    "grpo-fast bench-step": "tests/test_benchmark_step.py runs it at toy size",
    "grpo-fast bench-head": "tests/test_benchmark_head.py runs it at toy size",
    "grpo-fast bench-kept": "tests/test_benchmark_kept.py runs it at toy size",
    "grpo-fast train --model Qwen/Qwen3-0.6B --dataset 'reasoning_gym:chain_sum' --rewards task format --output_dir runs/sums": (
        "tests/test_train_cli.py runs such commands with a model that lies on the disk"
    ),
    "grpo-fast study sampling --model Qwen/Qwen3-0.6B --dataset 'reasoning_gym:chain_sum' --rewards task format "
    "--temperatures 0 0.2 0.6 1.0 1.4": "tests/test_study_docs.py runs it with a model that lies on the disk",
    "grpo-fast plot runs/sums": "tests/test_callbacks.py draws runs",
}
RUN_HERE = ("grpo-fast doctor",)


def python_block(beginning: str) -> str:
    """The block that has this line in it."""
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", TEXT, re.S) if beginning in block)
    return block


def the_loss_of(block: str, names: dict[str, Any]) -> torch.Tensor:
    exec(block, names)
    return names.pop("out").loss if "out" in names else names["loss"]


@pytest.fixture
def model() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=50, initializer_range=0.5, **sizes))


def test_every_python_block_is_run() -> None:
    known = ("log_softmax(-1)", "gf.grpo_loss(", "gf.linear_loss_from(", "GRPOTrainer(")
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert [sum(beginning in block for beginning in known) for block in blocks] == [1] * len(known)


def test_before_after_and_without_logits_agree(model: Any) -> None:
    ids = torch.randint(50, (16, 9))
    names: dict[str, Any] = {
        "torch": torch,
        "model": model,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_ids": ids[:, -5:],
        "completion_mask": (torch.rand(16, 5) > 0.2).long(),
        "rewards": torch.rand(16),
        "temperature": 0.7,
    }
    logits = model(ids).logits[:, -6:].detach()
    names["old_logprobs"] = gf.token_logprobs(logits, names["completion_ids"], temperature=0.7).logprobs + torch.randn(16, 5) * 0.2
    results = []
    for beginning in ("log_softmax(-1)", "gf.grpo_loss("):
        names["logits"] = logits.clone().requires_grad_()
        loss = the_loss_of(python_block(beginning), names)
        results.append((loss.detach(), names["logits"].grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)
    assert results[1][1].abs().max() > 1e-3

    block, weight = python_block("gf.linear_loss_from("), model.get_output_embeddings().weight
    gradients = []
    for fused in (True, False):  # on-policy, as the block has it
        model.zero_grad()
        if fused:
            loss = the_loss_of(block, names)
        else:
            options = {"mask": names["completion_mask"], "temperature": 0.7}
            loss = gf.grpo_loss(model(ids).logits[:, -6:], names["completion_ids"], names["advantages"], **options).loss
            loss.backward()
        gradients.append((loss.detach(), weight.grad.clone()))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_trainer_trains(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerFast

    from grpo_fast.data.tasks.sorting import make_tokenizer

    tokenizer: PreTrainedTokenizerFast = make_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    block = python_block("GRPOTrainer(").replace(
        "max_completion_length=512", "max_completion_length=4, max_steps=1, use_cpu=True, bf16=False"
    )
    names: dict[str, Any] = {
        "model_name": str(tmp_path / "model"),
        "dataset": [{"prompt": "1", "answer": "1"}, {"prompt": "2", "answer": "2"}],
    }
    exec(block, names)
    assert names["trainer"].state.global_step == 1


def test_every_command_is_run_somewhere() -> None:
    commands = [command.split("#")[0].strip() for command in COMMANDS]
    assert commands, "README.md has no commands"
    assert sorted(set(commands)) == sorted([*RUN_ELSEWHERE, *RUN_HERE])


IMPLEMENTATIONS = {
    "grpo_fast (with the entropy)": "ours",
    "grpo_fast": "ours",
    "grpo_fast, `inplace=True`": "ours_inplace",
    "torch.compile": "compile",
    "PyTorch eager": "eager",
    "TRL `selective_log_softmax`": "trl",
    "TRL's loss": "trl",
}


def rows_of(header: str) -> list[list[str]]:
    """The cells of the table whose header begins so."""
    text = TEXT if f"| {header} |" in TEXT else RESULTS
    table = text[text.index(f"| {header} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table[2:]]


@pytest.mark.parametrize(("header", "step"), [("log-probabilities, no gradient", "forward"), ("loss and gradient", "forward_backward")])
def test_the_tables_of_the_loss_say_what_was_measured(header: str, step: str) -> None:
    result = load(ROOT / "bench/results/cpu.json", "bench")
    found = {(e["case"], e["implementation"], e["malloc"]): e["summary"] for e in result["results"] if e["step"] == step}
    cases = list(dict.fromkeys(case for case, _, _ in found))
    rows = rows_of(header)
    assert [IMPLEMENTATIONS[name.replace("**", "")] for name, *_ in rows] == [
        name for name in ("ours", "ours_inplace", "compile", "eager", "trl") if (cases[0], name, "touched") in found
    ]
    for name, *cells in rows:
        for case, cell in zip(cases, cells, strict=False):
            touched, default = (found[case, IMPLEMENTATIONS[name.replace("**", "")], malloc] for malloc in ("touched", "default"))
            expected = f"{touched['median_ms']:.0f} ({touched['times_roofline']:.1f}x) / {default['median_ms']:.0f}"
            assert cell.replace("**", "") == expected, f"{name}, {case}"


def test_the_table_of_the_heads_says_what_was_measured() -> None:
    expected = markdown(load(ROOT / "bench/results/head_cpu.json", "bench-head"))
    rows = [f"| {' | '.join(cells)} |" for cells in rows_of("loss and gradients from hidden states")]
    assert rows == expected, "the rows of the table are:\n" + "\n".join(expected)


def test_the_table_of_the_readme_says_what_was_measured() -> None:
    """One row per measurement: the README shows a part of what docs/results.md shows."""
    loss = load(ROOT / "bench/results/cpu.json", "bench")["results"]
    head = load(ROOT / "bench/results/head_cpu.json", "bench-head")["results"]
    stage = load(ROOT / "bench/results/trl_cpu.json", "bench-trl")["results"]

    def of_loss(step: str, name: str) -> str:
        (entry,) = (
            e for e in loss if (e["step"], e["implementation"], e["malloc"], e["case"]) == (step, name, "touched", "2048x32000 float32")
        )
        return f"{entry['summary']['median_ms']:.0f} ms"

    def of_head(name: str, active: float) -> str:
        (entry,) = (e for e in head if (e["implementation"], e["active"], e["tokens"], e["trainable"]) == (name, active, 1024, True))
        return f"{entry['median']:.1f} s, {entry['peak_bytes'] / 2**30:.2f} GiB"

    def of_stage(name: str) -> str:
        (entry,) = (e for e in stage if (e["implementation"], e["active"]) == (name, 1.0))
        return f"{entry['median']:.1f} s"

    whole_head = [of_head(name, 1.0) for name in ("eager", "trl", "liger")]
    expected = [
        [of_loss("forward", name) for name in ("ours", "compile", "eager", "trl")] + ["-"],
        [of_loss("forward_backward", name) for name in ("ours", "compile", "eager", "trl")] + ["-"],
        [of_head("ours", 1.0), "-", *whole_head],
        [of_head("ours", 0.3), "-", *whole_head],
        [of_stage("ours"), "-", "-", of_stage("stock"), "-"],
    ]
    rows = [[cell.replace("**", "") for cell in row[1:]] for row in rows_of("CPU time, peak memory beyond the inputs for the head")]
    assert rows == expected


def test_the_readme_is_short_and_names_every_loss_type() -> None:
    assert len(TEXT.splitlines()) <= 150
    assert [name for name in gf.LOSS_TYPES if f"`{name}`" not in TEXT] == []


@pytest.mark.parametrize("command", RUN_HERE)
def test_command(command: str) -> None:
    program, *arguments = shlex.split(command)
    done = subprocess.run(
        [str(Path(sys.executable).parent / program), *arguments], capture_output=True, text=True, check=False, timeout=HANG
    )
    assert done.returncode == 0, done.stderr
    assert "reference" in done.stdout


@pytest.mark.parametrize("command", [command for command in RUN_ELSEWHERE if command.startswith("make")])
def test_make_knows_its_targets(command: str) -> None:
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bootstrap.sh" in done.stdout


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            made_with_the_site = page.name == "index.md" and target == "troubleshooting.md"
            assert "://" in target or made_with_the_site or (page.parent / target).exists(), f"{page.name}: {target}"
