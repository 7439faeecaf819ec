"""``grpo-fast bench-trl``: the loss stage of a training step, TRL's GRPOTrainer against this package's subclass of it.

Timed is what happens between a prepared batch and its gradients: compute_loss (backbone, head, loss), backward, and the metrics read as
they are logged. No generation, no optimizer. The model has a real head on one thin layer, so that the head is what is timed. Each trainer
lives in a process of its own, all at once, and repetitions are interleaved. No time is reported unless losses and gradients agree.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from grpo_fast.benchmark.measure import timed
from grpo_fast.integrations.versions import refuse_other_versions
from grpo_fast.ops.environment import caption, describe, load_average
from grpo_fast.utils.files import check_output, write_json
from grpo_fast.utils.install_hints import install

__all__ = ["CONTESTANTS", "Settings", "app", "disagreement", "run"]

CONTESTANTS = {
    "stock": "TRL",
    "ours": "grpo_fast",
    "ours_active": "grpo_fast, metrics on active",
}
TOLERANCE = 1e-4  # relative, of losses, of the norm of each parameter's gradient, and of some of its entries to the largest of them
_ENTRIES = 64  # of each parameter's gradient, that are compared
_NOISE = 0.2  # nats between the old log-probabilities and the model's: ratios on both sides of the clip band

SKIPPED = {
    "stock": "nothing. On the CPU it scores the prompt's positions too, so prompts have one token here, which leaves none to score.",
    "ours": (
        "the backward products of tokens without an advantage (groups whose rewards are all equal): their term of the loss is advantage "
        "times ratio, 0 at every value of the parameters as there is no KL term and no entropy bonus, and so is its gradient. Their "
        "log-probabilities and entropies are computed for the metrics, which equal TRL's."
    ),
    "ours_active": "of the same tokens the forward product too: the entropy that is logged is then the mean over the other tokens.",
}


@dataclass(frozen=True)
class Settings:
    """What is measured. ``active``: the shares of the groups whose rewards differ."""

    sequences: int = 8
    group: int = 4
    tokens: int = 128  # of each completion
    width: int = 896
    vocabulary: int = 151_936  # with this width: Qwen2.5-0.5B's head, which is tied to its embedding
    active: tuple[float, ...] = (1.0, 0.5)
    rounds: int = 3
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "rounds", "threads", "group"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.sequences < self.group or self.sequences % self.group:
            raise ValueError(f"sequences is {self.sequences}; expected a multiple of group, {self.group}.")
        for active in self.active:
            if not 0 < active <= 1 or (active * self.sequences / self.group) % 1:
                raise ValueError(
                    f"active is {active}; expected a share above 0 that is a whole number of {self.sequences // self.group} groups."
                )


# The batch ------------------------------------------------------------------------------------------------------------------------------


def make_model(settings: Settings) -> Any:
    """One layer and the head, random; logits with a standard deviation of about 1.5. The same in every process."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(settings.seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=settings.vocabulary,
            hidden_size=settings.width,
            intermediate_size=2 * settings.width,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=settings.tokens + 1,
            tie_word_embeddings=True,
            initializer_range=1.5 / settings.width**0.5,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=1,
        )
    )


def make_batch(settings: Settings) -> dict[str, Tensor]:
    """What TRL hands to compute_loss, for all groups active."""
    model = make_model(settings)
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(2, settings.vocabulary, (settings.sequences, settings.tokens + 1), generator=generator)
    logprobs = []
    with torch.no_grad():
        for row in ids:
            logits = model(row[None, :-1]).logits[0]
            logprobs.append(logits.log_softmax(-1).gather(-1, row[1:, None]).squeeze(-1))
    old = torch.stack(logprobs) + _NOISE * torch.randn(settings.sequences, settings.tokens, generator=generator)
    rewards = torch.randn(settings.sequences // settings.group, settings.group, generator=generator)
    return {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids[:, 1:],
        "completion_mask": torch.ones_like(ids[:, 1:]),
        "advantages": ((rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)).flatten(),
        "num_items_in_batch": torch.tensor(settings.sequences * settings.tokens),
        "old_per_token_logps": old,
    }


# A trainer in its process ---------------------------------------------------------------------------------------------------------------


def make_trainer(name: str, settings: Settings, folder: str) -> Any:
    """TRL's defaults (loss_type "dapo", beta 0), in float32."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig
    from trl import GRPOTrainer as Stock

    from grpo_fast.integrations.trl import GRPOTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    args = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        log_level="error",
        num_generations=settings.group,
        per_device_train_batch_size=settings.sequences,
        max_completion_length=settings.tokens,
    )
    make: Callable[..., Any] = Stock if name == "stock" else GRPOTrainer
    return make(
        make_model(settings),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": ""}] * settings.sequences),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"),
        **({"metrics_on": "active"} if name == "ours_active" else {}),
    )


def repetition(trainer: Any, batch: dict[str, Tensor], active: float, threads: int) -> dict[str, Any]:
    """One loss stage: seconds (CPU time of the thread; wall time with several), peak_bytes above what was resident before, the loss, and
    by parameter the norm of the gradient and _ENTRIES of its entries."""
    alive = round(active * len(batch["advantages"]))
    inputs = {**batch, "advantages": batch["advantages"] * (torch.arange(len(batch["advantages"])) < alive)}
    trainer.model.train()
    trainer.model.zero_grad(set_to_none=True)
    trainer.current_gradient_accumulation_steps = 1

    def stage() -> Tensor:
        loss: Tensor = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        trainer.log({})
        return loss

    loss, seconds, peak = timed(stage, threads)
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "loss": loss.item(),
        "norms": {name: gradient.norm().item() for name, gradient in gradients.items()},
        "entries": {name: _entries(gradient, inputs["completion_ids"]) for name, gradient in gradients.items()},
    }


def _entries(gradient: Tensor, token_ids: Tensor) -> list[float]:
    """The same of every contestant's; where the parameter has a row for each token of the vocabulary, in rows of the batch's tokens."""
    rows = token_ids.flatten()[:_ENTRIES] % len(gradient)
    if gradient.dim() == 1:
        return gradient[rows].tolist()
    return gradient[rows, torch.arange(len(rows)) % gradient.shape[1]].tolist()


def work() -> None:
    """A child: NAME, BATCH, SETTINGS as JSON; for each line of input, a share of active groups, it answers with a repetition."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get among the answers
    warnings.simplefilter("ignore")
    name, path, given = sys.argv[1:]
    settings = Settings(**json.loads(given))
    torch.set_num_threads(settings.threads)
    batch = torch.load(path)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(name, settings, folder)
        for line in sys.stdin:
            answers.write(json.dumps(repetition(trainer, batch, float(line), settings.threads)) + "\n")
            answers.flush()


class _Child:
    def __init__(self, name: str, path: Path, settings: Settings, stack: ExitStack):
        command = [sys.executable, "-c", "from grpo_fast.benchmark.trl_stage import work; work()", name, str(path)]
        process = subprocess.Popen(
            [*command, json.dumps(asdict(settings))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.name, self.process = name, stack.enter_context(process)
        stack.callback(process.kill)

    def ask(self, active: float) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(f"{active}\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it has ended: its answer is none
            pass
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{CONTESTANTS[self.name]}: its process ended with {self.process.wait()} and no answer (out of memory?).")
        return dict(json.loads(answer))


# The comparison -------------------------------------------------------------------------------------------------------------------------


def disagreement(answer: dict[str, Any], stock: dict[str, Any]) -> float:
    """The largest relative difference of the loss, of the gradients' norms and of their entries; infinite if they are of other parameters,
    or not numbers."""
    if answer["norms"].keys() != stock["norms"].keys() or not stock["norms"]:
        return math.inf
    triples = [(answer["loss"], stock["loss"], abs(stock["loss"]))]
    triples += [(answer["norms"][name], norm, norm) for name, norm in stock["norms"].items()]
    for name, entries in stock["entries"].items():
        largest = max(map(abs, entries))
        triples += [(mine, entry, largest) for mine, entry in zip(answer["entries"][name], entries, strict=True)]
    found = max((abs(mine - theirs) / max(size, 1e-6) if math.isfinite(mine + theirs) else math.inf) for mine, theirs, size in triples)
    return float(found)


def run(settings: Settings, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything; the answer is what is written to the JSON file.

    Raises:
        RuntimeError: losses or gradients differ, or a process ended.
    """
    load = load_average()
    found: dict[tuple[str, float], list[dict[str, Any]]] = {(name, active): [] for active in settings.active for name in CONTESTANTS}
    gate = dict.fromkeys(CONTESTANTS, 0.0)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        report("the batch")
        path = Path(folder) / "batch.pt"
        torch.save(make_batch(settings), path)
        children = [_Child(name, path, settings, stack) for name in CONTESTANTS]
        for number in range(settings.rounds + 1):
            for active in settings.active:
                stock: dict[str, Any] = {}
                for child in children:
                    report(f"round {number} of {settings.rounds}, {active:.0%} of the groups active: {CONTESTANTS[child.name]}")
                    answer = child.ask(active)
                    stock = stock or answer
                    gate[child.name] = max(gate[child.name], disagreement(answer, stock))
                    if not gate[child.name] <= TOLERANCE:
                        raise RuntimeError(
                            f"{CONTESTANTS[child.name]} at {active:.0%} active: loss and gradients differ from the "
                            f"stock ones by {gate[child.name]:.2g} relative; expected {TOLERANCE:g} at most. No times are reported."
                        )
                    if number:  # the first is the warm-up
                        found[child.name, active].append(answer)
    return {
        "kind": "trl_stage",
        "machine": {**describe(), "load_average": [load, load_average()]},
        "settings": {**asdict(settings), "dtype": "float32", "clock": "thread CPU time" if settings.threads == 1 else "wall time"},
        "timed": "compute_loss, backward and log on a prepared batch; no generation, no optimizer",
        "skipped_work": SKIPPED,
        "gate": {"tolerance": TOLERANCE, "largest_relative_difference": gate},
        "results": _summary(found),
    }


def _summary(found: dict[tuple[str, float], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    middle = {key: statistics.median(answer["seconds"] for answer in answers) for key, answers in found.items()}
    return [
        {
            "contestant": name,
            "active": active,
            "seconds": [answer["seconds"] for answer in answers],
            "median": middle[name, active],
            "faster_than_stock": middle["stock", active] / middle[name, active],
            "peak_bytes": max((answer["peak_bytes"] for answer in answers if answer["peak_bytes"] is not None), default=None),
            "loss": answers[0]["loss"],
            "gradient_norm": math.hypot(*answers[0]["norms"].values()),
        }
        for (name, active), answers in found.items()
    ]


# The command ----------------------------------------------------------------------------------------------------------------------------

_DEFAULTS = Settings()
app = typer.Typer(add_completion=False)


@app.command()
def bench_trl(
    sequences: Annotated[int, typer.Option(help="Of a batch.")] = _DEFAULTS.sequences,
    group: Annotated[int, typer.Option(help="Sequences of one prompt.")] = _DEFAULTS.group,
    tokens: Annotated[int, typer.Option(help="Of each completion.")] = _DEFAULTS.tokens,
    width: Annotated[int, typer.Option(help="Of the hidden states.")] = _DEFAULTS.width,
    vocabulary: Annotated[int, typer.Option(help="Rows of the head's weight.")] = _DEFAULTS.vocabulary,
    active: Annotated[list[float] | None, typer.Option(help=f"Share of groups with unequal rewards. Default: {_DEFAULTS.active}.")] = None,
    rounds: Annotated[int, typer.Option(help="Repetitions after a warm-up.")] = _DEFAULTS.rounds,
    threads: Annotated[int, typer.Option(help="One thread is timed by its CPU time, several by the wall clock.")] = _DEFAULTS.threads,
    output: Annotated[Path, typer.Option(help="The result as JSON.")] = Path("runs/bench/trl_cpu.json"),
) -> None:
    """Time the loss stage of TRL's GRPOTrainer against this package's. Seven minutes, 8 GiB."""
    from rich.console import Console
    from rich.table import Table

    try:
        shares = tuple(active or _DEFAULTS.active)
        settings = Settings(sequences, group, tokens, width, vocabulary, shares, rounds, threads)
        check_output(output)
        refuse_other_versions("trl", "grpo-fast bench-trl", "Another one may work otherwise inside.", required=True)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except ImportError as error:
        typer.echo(f"{error} Cure: {install('bench')}.", err=True)
        raise typer.Exit(2) from error
    torch.set_num_threads(threads)
    console = Console()
    with console.status("starting") as status:
        result = run(settings, status.update)
    write_json(output, result)
    table = Table(title="Loss stage: compute_loss, backward, log", title_justify="left")
    for column in ("", "groups active", "seconds", "faster than stock", "extra memory, MiB"):
        table.add_column(column, justify="left" if not column else "right")
    for entry in result["results"]:
        peak = "" if entry["peak_bytes"] is None else f"{entry['peak_bytes'] / 2**20:.0f}"
        label, times = CONTESTANTS[entry["contestant"]], f"{entry['faster_than_stock']:.2f}x"
        table.add_row(label, f"{entry['active']:.0%}", f"{entry['median']:.3g}", times, peak)
    console.print(table)
    console.print(caption(result["machine"], threads))
    typer.echo(f"Every number: {output}")


if __name__ == "__main__":
    app()
