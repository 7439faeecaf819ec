"""Settings of ``grpo-fast train`` and ``grpo-fast study``: a YAML or JSON file, and every field on the command line too, which wins."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from grpo_fast.generation import SAMPLERS, sampler_class
from grpo_fast.loss.config import LOSS_TYPES, LossConfig
from grpo_fast.rewards import BUILT_IN
from grpo_fast.utils.errors import SettingsError

__all__ = [
    "TrainOptions",
    "build_parser",
    "help_tables",
    "option_table",
    "parse",
    "parse_overrides",
    "read_settings",
    "reward_table",
]


@dataclass
class TrainOptions:
    """What is trained, on what, and for which rewards. How is in GRPOConfig.

    Args:
        model: name on the hub, or folder, of the causal language model.
        dataset: name on the hub; a folder; a .jsonl, .json, .parquet or .csv file; or a task that is generated: arithmetic, sorting or
            reasoning_gym:TASK, with settings as in 'reasoning_gym:chain_sum(min_terms=2, max_terms=3)'.
        rewards: built-in ones by name (see below), with settings or without, as in accuracy 'repetition(ngram_size=6)';
            package.module:function; path/to/file.py:function; or task, the reward of a generated dataset, which is the default there.
        dataset_config: configuration of a dataset on the hub, such as 'main'.
        dataset_split: split to train on; slices as in 'train[:1000]'.
        dataset_size: rows to generate, where the dataset is a task.
        eval_dataset: dataset to evaluate on, written like dataset; by default there is none.
        eval_split: its split.
        eval_size: its rows, where it is a task; they are drawn with another seed than the training rows.
        max_prompt_length: leave out rows whose prompt has more tokens than this; by default none.
        prompt_column: column that holds the prompt, if it is not called 'prompt'.
        prompt_template: makes the prompt from the columns, as in 'Question: {question} Answer: '.
        system_prompt: makes the prompt a chat that begins with this; the rest is the user's message.
        tokenizer: name or folder of the tokenizer, if it is not the model's.
        use_peft: train a LoRA adapter in place of all weights (needs peft).
        lora_r: rank of the adapter.
        lora_alpha: scale of the adapter; what it adds is multiplied by lora_alpha / lora_r.
        lora_dropout: dropout before the adapter; above 0 the policy that is trained is not quite the one that sampled.
        lora_target_modules: modules that get one; by default all linear layers but the head.
        lora_modules_to_save: modules that are trained whole.
    """

    model: str | None = None
    dataset: str | None = None
    rewards: list[str] | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    dataset_size: int = 1000
    eval_dataset: str | None = None
    eval_split: str = "test"
    eval_size: int = 100
    max_prompt_length: int | None = None
    prompt_column: str | None = None
    prompt_template: str | None = None
    system_prompt: str | None = None
    tokenizer: str | None = None
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | None = None
    lora_modules_to_save: list[str] | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"command line: {message.rstrip('.')}.")


def parse(args: Sequence[str], config_class: Any, options_class: Any = TrainOptions) -> tuple[Any, Any, dict[str, Any]]:
    """Options, configuration, and what was set explicitly, from the arguments ``[FILE] [--name value ...]``.

    Raises:
        SettingsError: see there. Everything else that is wrong is raised by the configuration itself, as ValueError.
    """
    given = parse_overrides(args, config_class, options_class)
    own = {each.name for each in dataclasses.fields(options_class)}
    options = options_class(**{name: value for name, value in given.items() if name in own})
    for name in ("model", "dataset"):
        if not getattr(options, name):
            raise SettingsError(f"{name} is not set; expected it in the settings file or as --{name}. See --help.")
    return options, config_class(**{name: value for name, value in given.items() if name not in own}), given


def parse_overrides(args: Sequence[str], config_class: Any, options_class: Any = TrainOptions) -> dict[str, Any]:
    """What ``[FILE] [--name value ...]`` sets, by name, of the fields of both classes; ``config_class`` None: of the options alone."""
    file = args[0] if args and not args[0].startswith("-") else None
    parser, actions = build_parser(config_class, options_class)
    given = {} if file is None else read_settings(file, actions)
    namespace, unknown = parser.parse_known_args(list(args[1:] if file is not None else args))
    if unknown:
        name = next((word for word in unknown if word.startswith("-")), None)
        if name is None:
            raise SettingsError(
                f"command line: {unknown[0]!r} is no option's value; expected a settings file in the first place, or options."
            )
        raise SettingsError(f"command line: there is no {name}.{_near(name.lstrip('-').partition('=')[0], actions)}")
    given |= vars(namespace)  # only what was said: the parser has no defaults
    return {name: None if value == [None] else _from_json(name, value, actions[name]) for name, value in given.items()}


def build_parser(config_class: Any, options_class: Any = TrainOptions) -> tuple[_Parser, dict[str, argparse.Action]]:
    """A parser of all fields, and its actions by name. HfArgumentParser reads the types; what it misreads (bool or text) is mended."""
    from transformers import HfArgumentParser
    from transformers.hf_argparser import string_to_bool

    classes = [options_class] if config_class is None else [options_class, config_class]
    made = HfArgumentParser(classes, allow_abbrev=False, add_help=False)
    parser = _Parser(allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
    hints = {name: hint for each in reversed(classes) for name, hint in typing.get_type_hints(each).items()}
    actions: dict[str, argparse.Action] = {}
    for action in made._actions:
        kinds = set(typing.get_args(hints[action.dest])) if _is_union(hints[action.dest]) else {hints[action.dest]}
        if isinstance(action, argparse._StoreAction):
            if bool in kinds and str in kinds:
                action.type, action.nargs, action.const = _true_false_or_text, None, None
            elif bool in kinds:
                action.nargs, action.const = "?", True  # --bf16 alone is true, also where the default is None
            if type(None) in kinds and action.type in (int, float, string_to_bool):  # a text may well be "none": report_to, say
                action.type = _or_none(action.type)
            if any((typing.get_origin(kind) or kind) is dict for kind in kinds):
                action.type, action.metavar = str, "JSON"
        action.required, action.default = False, argparse.SUPPRESS
        parser._add_action(action)
        if not isinstance(action, argparse._StoreFalseAction):
            actions[action.dest] = action
    return parser, actions


def read_settings(file: str, actions: dict[str, argparse.Action]) -> dict[str, Any]:
    """The settings of a YAML or JSON file, each converted as on the command line."""
    path = Path(file)
    if not path.is_file():
        raise SettingsError(f"there is no settings file {file}; expected a .yaml or .json file, or options that begin with --.")
    import yaml

    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _once_each())  # JSON is YAML
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        what = "is empty" if found is None else f"holds a {type(found).__name__}"
        raise SettingsError(f"{file} {what}; expected lines of 'name: value'.")
    settings = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            raise SettingsError(f"{file}: there is no setting {key!r}.{_near(name, actions)}")
        settings[name] = _convert(f"{file}: {key}", value, actions[name])
    return settings


def _once_each() -> Any:
    """YAML's safe loader, which takes the last of several lines with one name, made to refuse them."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value]
            for name in names:
                if names.count(name) > 1:
                    raise yaml.constructor.ConstructorError(problem=f"{name} is set twice", problem_mark=node.start_mark)
            return super().construct_mapping(node, deep)

    return Loader


def help_tables(config_class: Any) -> list[Any]:
    """Rich tables of all settings with defaults and meaning (what is trained, GRPO, TrainingArguments), and of rewards and samplers."""
    bases = [base for base in config_class.__mro__[1:] if dataclasses.is_dataclass(base)]
    inherited = {each.name for base in bases for each in dataclasses.fields(base)}
    words = {name: text for base in (*reversed(bases), config_class, TrainOptions) for name, text in _described(base).items()}
    for name, text in _of_the_loss().items():
        if words.get(name, "see LossConfig").startswith("see LossConfig"):
            words[name] = text
    own = [each.name for each in dataclasses.fields(config_class) if each.init]
    groups = {
        "What is trained": (TrainOptions, [each.name for each in dataclasses.fields(TrainOptions)]),
        "GRPO (grpo_fast.trainer.config.GRPOConfig)": (config_class, [name for name in own if name not in inherited]),
        "Training (transformers.TrainingArguments)": (config_class, [name for name in own if name in inherited]),
    }
    tables = [option_table(title, kind, names, words) for title, (kind, names) in groups.items()]
    tables.insert(1, reward_table())
    samplers = [(name, _settings_of(sampler_class(name)), _first_sentence(sampler_class(name))) for name in SAMPLERS]
    tables.insert(2, _help_table("Samplers (--sampler, --sampler_options)", ("name", "options", "meaning"), samplers, ratio=(2, 3)))
    return tables


def option_table(title: str, kind: Any, names: Sequence[str], words: dict[str, str] | None = None) -> Any:
    """Rich table of fields of a dataclass: name, default, and meaning, which is what ``words`` or else its docstrings say."""
    if words is None:
        words = {name: text for base in reversed(kind.__mro__) for name, text in _described(base).items()}
    fields = {each.name: each for each in dataclasses.fields(kind)}
    return _help_table(
        title, ("option", "default", "meaning"), [(f"--{name}", _default(fields[name]), words.get(name, "")) for name in names]
    )


def reward_table() -> Any:
    """Rich table of the package's rewards."""
    rewards = [(name, _settings_of(reward), _first_sentence(reward)) for name, reward in BUILT_IN.items()]
    return _help_table("Rewards of the package (--rewards)", ("name", "settings", "meaning"), rewards, ratio=(2, 3))


def _help_table(title: str, columns: tuple[str, str, str], rows: list[tuple[str, str, str]], ratio: tuple[int, int] = (1, 3)) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False, expand=True)
    table.add_column(columns[0], header_style="dim", no_wrap=True)
    table.add_column(columns[1], header_style="dim", ratio=ratio[0], overflow="fold")
    table.add_column(columns[2], header_style="dim", ratio=ratio[1], overflow="fold")
    for first, *rest in rows:
        table.add_row(Text(first, style="bold"), *map(Text, rest))
    return table


def _of_the_loss() -> dict[str, str]:
    """What `LossConfig` says of the settings that a trainer's configuration hands on to it, under their names there."""
    words = _described(LossConfig)
    words["epsilon"], words["use_bias_correction_kl"] = words["epsilon_low"].replace("_low", ""), words["bias_corrected_kl"]
    words["loss_type"] = f"one of {', '.join(LOSS_TYPES)}."
    return words


def _settings_of(reward_or_sampler: Any) -> str:
    """Name and default of the plain values that a class is made with; a function takes none."""
    if not inspect.isclass(reward_or_sampler):
        return ""
    parameters = inspect.signature(reward_or_sampler).parameters.values()
    plain = [each for each in parameters if each.name not in ("model", "tokenizer") and not inspect.isfunction(each.default)]
    return "\n".join(str(each.replace(annotation=each.empty, kind=each.POSITIONAL_OR_KEYWORD)) for each in plain)


def _first_sentence(of: Any) -> str:
    text = inspect.cleandoc(of.__doc__ or "").partition("\n\n")[0].removesuffix("::")
    return " ".join(text.replace("``", "").replace("`", "").split()).rstrip(":.") + "."


def _convert(where: str, value: Any, action: argparse.Action) -> Any:
    if value is None or (isinstance(value, dict) and _takes_mapping(action)):
        return value
    if isinstance(value, list) or action.nargs == "+":
        if action.nargs != "+":
            raise SettingsError(f"{where} is {value!r}; expected one value, not a list.")
        return [_convert_one(where, item, action) for item in (value if isinstance(value, list) else [value])]
    return _convert_one(where, value, action)


def _convert_one(where: str, value: Any, action: argparse.Action) -> Any:
    kind: Any = action.type or str
    if isinstance(value, (dict, list)):
        raise SettingsError(f"{where} is {value!r}; expected {_name(kind)}.")
    try:
        found = kind(str(value))
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise SettingsError(f"{where} is {value!r}; expected {_name(kind)}.") from error
    if action.choices is not None and found not in action.choices:
        raise SettingsError(f"{where} is {value!r}; expected one of {', '.join(map(str, action.choices))}.")
    return found


def _from_json(name: str, value: Any, action: argparse.Action) -> Any:
    """``--sampler_options '{"batch_size": 4}'``: a mapping on the command line is JSON."""
    if not isinstance(value, str) or not value.lstrip().startswith("{") or not _takes_mapping(action):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise SettingsError(f"{name} is {value!r}; expected JSON, such as '{{\"key\": 1}}' ({error}).") from error


def _takes_mapping(action: argparse.Action) -> bool:
    return action.metavar == "JSON"


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _true_false_or_text(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def _or_none(kind: Any) -> Any:
    def convert(text: str) -> Any:
        return None if text.lower() in ("none", "null") else kind(text)

    convert.kind = kind  # type: ignore[attr-defined]
    convert.__name__ = _name(kind)  # argparse names it in its errors
    return convert


def _name(kind: Any) -> str:
    kind = getattr(kind, "kind", kind)
    names = {"string_to_bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}
    return names.get(getattr(kind, "__name__", ""), getattr(kind, "__name__", str(kind)))


def _near(name: str, actions: dict[str, argparse.Action]) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), actions, 3, 0.6)
    return f" Did you mean {' or '.join(close)}?" if close else " See --help."


def _default(each: dataclasses.Field[Any]) -> str:
    if each.default is not dataclasses.MISSING:
        return str(getattr(each.default, "value", each.default))
    return str(each.default_factory()) if each.default_factory is not dataclasses.MISSING else ""


def _described(kind: Any) -> dict[str, str]:
    """name -> first sentence of what the docstring's list says: ``name, name: text``, or transformers' ``name (`type`...):`` and a line."""
    text = inspect.cleandoc(kind.__doc__ or "")
    pattern = r"^ {4}([a-z_0-9]+(?:, [a-z_0-9\\*]+)*)\s*(?:\(.*\))?:[ \n](.*(?:\n {8,}.*)*)"
    found: dict[str, str] = {}
    for names, words in re.findall(pattern, text, re.MULTILINE):
        words = " ".join(words.replace("`", "").split())
        sentence = re.split(r"(?<=[a-z0-9)`'\"])\. (?=[A-Z])", words)[0].rstrip(".")
        found |= {name: f"{sentence}." for name in names.split(", ") if sentence}
    return found
