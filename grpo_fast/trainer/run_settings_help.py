"""The tables of the ``--help`` of ``grpo-fast train`` and ``study``: each setting, its default, and its meaning from the docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from grpo_fast.generation import SAMPLERS, sampler_class
from grpo_fast.loss.config import LOSS_TYPES, LossConfig
from grpo_fast.rewards import BUILT_IN
from grpo_fast.trainer.run_settings import TrainOptions

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["help_tables", "option_table", "reward_table", "usual_tables"]

USUAL = {  # what --help shows of each class; --help-all shows everything
    "What is trained": ("model", "dataset", "rewards", "dataset_split", "eval_dataset", "max_prompt_length", "system_prompt", "use_peft"),
    "GRPO": (
        *(
            "num_generations",
            "max_completion_length",
            "steps_per_generation",
            "temperature",
            "beta",
            "loss_type",
            "epsilon",
            "epsilon_high",
        ),
        *("chat", "scale_rewards", "reward_weights", "sampler", "sampler_options", "log_completions"),
    ),
    "Training": (
        *("output_dir", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs"),
        *("bf16", "save_steps", "eval_strategy", "eval_steps", "logging_steps", "report_to", "seed", "resume_from_checkpoint"),
    ),
}


def help_tables(config_class: type) -> list[Table]:
    """Rich tables of all settings (what is trained, GRPO, TrainingArguments), of the rewards and of the samplers.

    Args:
        config_class: `grpo_fast.trainer.GRPOConfig`, or a subclass.
    """
    inherited = {field.name for base in _bases(config_class) for field in dataclasses.fields(base)}
    meanings = _meanings(config_class)
    own = [field.name for field in dataclasses.fields(config_class) if field.init]
    samplers = [(name, _parameters(sampler_class(name)), _first_sentence(sampler_class(name))) for name in SAMPLERS]
    return [
        option_table("What is trained", TrainOptions, [field.name for field in dataclasses.fields(TrainOptions)], meanings),
        reward_table(),
        _help_table("Samplers (--sampler, --sampler_options)", ("name", "options", "meaning"), samplers, ratio=(2, 3)),
        option_table("GRPO (grpo_fast.trainer.config.GRPOConfig)", config_class, [name for name in own if name not in inherited], meanings),
        option_table("Training (transformers.TrainingArguments)", config_class, [name for name in own if name in inherited], meanings),
    ]


def usual_tables(config_class: type) -> list[Table]:
    """Rich tables of the settings that most runs set: a screen, where `help_tables` has hundreds of lines.

    Args:
        config_class: `grpo_fast.trainer.GRPOConfig`, or a subclass.
    """
    meanings = _meanings(config_class)
    return [
        option_table(title, TrainOptions if title == "What is trained" else config_class, names, meanings) for title, names in USUAL.items()
    ]


def option_table(title: str, kind: type, names: Sequence[str], meanings: dict[str, str] | None = None) -> Table:
    """Rich table of some fields of a dataclass: name, default and meaning.

    Args:
        title: of the table.
        kind: the dataclass.
        names: of the fields to show.
        meanings: what to write for each name; None = what the docstrings of the dataclass and its bases say.
    """
    if meanings is None:
        meanings = {name: text for base in reversed(kind.__mro__) for name, text in _described_fields(base).items()}
    fields = {field.name: field for field in dataclasses.fields(kind)}
    rows = [(f"--{name}", _default(fields[name]), meanings.get(name, "")) for name in names]
    return _help_table(title, ("option", "default", "meaning"), rows)


def reward_table() -> Table:
    """Rich table of the package's rewards."""
    rewards = [(name, _parameters(reward), _first_sentence(reward)) for name, reward in BUILT_IN.items()]
    return _help_table("Rewards of the package (--rewards)", ("name", "settings", "meaning"), rewards, ratio=(2, 3))


def _help_table(title: str, columns: tuple[str, str, str], rows: list[tuple[str, str, str]], ratio: tuple[int, int] = (1, 3)) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False, expand=True)
    table.add_column(columns[0], header_style="dim", no_wrap=True)
    table.add_column(columns[1], header_style="dim", ratio=ratio[0], overflow="fold")
    table.add_column(columns[2], header_style="dim", ratio=ratio[1], overflow="fold")
    for first, *rest in rows:
        table.add_row(Text(first, style="bold"), *map(Text, rest))
    return table


def _bases(config_class: type) -> list[type]:
    return [base for base in config_class.__mro__[1:] if dataclasses.is_dataclass(base)]


def _meanings(config_class: type) -> dict[str, str]:
    classes = (*reversed(_bases(config_class)), config_class, TrainOptions)
    meanings = {name: text for base in classes for name, text in _described_fields(base).items()}
    for name, text in _loss_meanings().items():
        if meanings.get(name, "see LossConfig").startswith("see LossConfig"):
            meanings[name] = text
    return meanings


def _loss_meanings() -> dict[str, str]:
    """What `LossConfig` says about the settings that a trainer's configuration passes on to it, under their names there."""
    meanings = _described_fields(LossConfig)
    meanings["epsilon"] = meanings["epsilon_low"].replace("_low", "")
    meanings["use_bias_correction_kl"] = meanings["bias_corrected_kl"]
    meanings["loss_type"] = f"one of {', '.join(LOSS_TYPES)}, or custom, see surrogate."
    return meanings


def _described_fields(kind: type) -> dict[str, str]:
    """The first sentence about each parameter in a Google-style docstring, by name; ``first, second: text`` describes both."""
    from griffe import Docstring, DocstringSectionKind

    found: dict[str, str] = {}
    for section in Docstring(inspect.cleandoc(kind.__doc__ or "")).parse("google", warnings=False):
        if section.kind is DocstringSectionKind.parameters:
            for parameter in section.value:
                text = " ".join(parameter.description.replace("`", "").split())
                sentence = re.split(r"(?<=[a-z0-9)`'\"])\. (?=[A-Z])", text)[0].rstrip(".")
                found |= {name.strip(): f"{sentence}." for name in parameter.name.split(",") if sentence}
    return found


def _parameters(factory: Callable[..., object]) -> str:
    """The parameters of a reward's or sampler's class that take plain values, with their defaults, one a line; none for a function."""
    if not inspect.isclass(factory):
        return ""
    parameters = inspect.signature(factory).parameters.values()
    plain = [each for each in parameters if each.name not in ("model", "tokenizer") and not inspect.isfunction(each.default)]
    return "\n".join(str(each.replace(annotation=each.empty, kind=each.POSITIONAL_OR_KEYWORD)) for each in plain)


def _first_sentence(documented: object) -> str:
    text = inspect.cleandoc(documented.__doc__ or "").partition("\n\n")[0].removesuffix("::")
    return " ".join(text.replace("``", "").replace("`", "").split()).rstrip(":.") + "."


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return str(getattr(field.default, "value", field.default))
    return str(field.default_factory()) if field.default_factory is not dataclasses.MISSING else ""
