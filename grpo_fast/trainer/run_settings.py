"""Settings of ``grpo-fast train`` and ``grpo-fast study``: a YAML or JSON file, and options, which take precedence over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from grpo_fast.trainer.trl_names import REFUSED_SETTINGS
from grpo_fast.utils.dataclass_options import Option, convert_value, parse_words, read_options, unknown_option
from grpo_fast.utils.errors import SettingsError
from grpo_fast.utils.redaction import redacted_paths, remember_secrets

__all__ = ["TrainOptions", "parse", "parse_overrides", "read_settings"]


@dataclass
class TrainOptions:
    """The model, the data and the rewards of a run. The settings of the training itself are those of GRPOConfig.

    Args:
        model: name on the hub, or folder, of the causal language model.
        dataset: name on the hub; a folder; a .jsonl, .json, .parquet or .csv file; or a task that is generated: arithmetic, sorting or
            reasoning_gym:TASK, with settings as in 'reasoning_gym:chain_sum(min_terms=2, max_terms=3)'.
        rewards: built-in ones by name (see below), with settings or without, as in accuracy 'repetition(ngram_size=6)';
            package.module:function; path/to/file.py:function; or task, the reward of a generated dataset, which is the default there.
        dataset_config: configuration of a dataset on the hub, such as 'main'.
        dataset_split: split to train on; slices as in 'train[:1000]'.
        dataset_size: rows to generate if the dataset is a task.
        eval_dataset: dataset to evaluate on, written like dataset; by default there is none.
        eval_split: split to evaluate on.
        eval_size: rows to generate if the evaluation dataset is a task; with another seed than the training rows.
        max_prompt_length: leave out rows whose prompt has more tokens than this; by default none.
        prompt_column: column that holds the prompt, if it is not called 'prompt'.
        prompt_template: makes the prompt from the columns, as in 'Question: {question} Answer: '.
        system_prompt: makes the prompt a chat that begins with this; the rest is the user's message.
        tokenizer: name or folder of the tokenizer, if it is not the model's.
        use_peft: train a LoRA adapter in place of all weights (needs peft).
        lora_r: rank of the adapter.
        lora_alpha: scale of the adapter; its output is multiplied by lora_alpha / lora_r.
        lora_dropout: dropout before the adapter; above 0 the policy that is trained is not quite the one that sampled.
        lora_target_modules: modules that get an adapter; by default all linear layers except the head.
        lora_modules_to_save: modules whose full weights are trained.
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


ConfigT = TypeVar("ConfigT")
OptionsT = TypeVar("OptionsT", bound=TrainOptions)


def parse(
    args: Sequence[str],
    config_class: type[ConfigT],
    options_class: type[OptionsT] = TrainOptions,  # type: ignore[assignment]
) -> tuple[OptionsT, ConfigT, dict[str, Any]]:
    """Options, configuration, and the settings that were given explicitly, from the arguments ``[FILE] [--name value ...]``.

    Args:
        args: of the command line.
        config_class: a dataclass, `grpo_fast.trainer.GRPOConfig` for instance.
        options_class: `TrainOptions`, or a subclass.

    Raises:
        SettingsError: a setting is unknown, missing or of the wrong type. Other errors are the configuration's own ValueErrors.
    """
    overrides = parse_overrides(args, config_class, options_class)
    own = {field.name for field in dataclasses.fields(options_class)}
    options = options_class(**{name: value for name, value in overrides.items() if name in own})
    for name in ("model", "dataset"):
        if not getattr(options, name):
            raise SettingsError(f"{name} is not set; expected it in the settings file or as --{name}. See --help.")
    return options, config_class(**{name: value for name, value in overrides.items() if name not in own}), overrides


def parse_overrides(args: Sequence[str], config_class: type | None, options_class: type = TrainOptions) -> dict[str, Any]:
    """The settings that ``[FILE] [--name value ...]`` gives, by name; no defaults.

    Args:
        args: of the command line; an option takes precedence over the file.
        config_class: a dataclass whose fields are settings, or None.
        options_class: a dataclass whose fields are settings.

    Raises:
        SettingsError: a setting is unknown or of the wrong type, or the file cannot be read.
    """
    file = args[0] if args and not args[0].startswith("-") else None
    options = read_options([options_class] if config_class is None else [options_class, config_class])
    overrides = {} if file is None else read_settings(file, options)
    overrides |= parse_words(args if file is None else args[1:], options, REFUSED_SETTINGS)
    remember_secrets(overrides)
    if missing := redacted_paths(overrides):
        name = missing[0].partition(".")[0]
        raise SettingsError(
            f"{', '.join(missing)}: the value is a secret, which was not stored with the settings. Fix: set it again, with --{name} or in "
            f"{file or 'a settings file'}."
        )
    return overrides


def read_settings(file: str, options: dict[str, Option]) -> dict[str, Any]:
    """The settings of a YAML or JSON file, each converted like on the command line.

    Raises:
        SettingsError: the file cannot be read, or has a setting that is unknown or of the wrong type.
    """
    path = Path(file)
    if not path.is_file():
        raise SettingsError(f"there is no settings file {file}; expected a .yaml or .json file, or options that begin with --.")
    import yaml

    from grpo_fast.trainer.settings_yaml import SettingsLoader, check_size

    check_size(path)
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), SettingsLoader)  # JSON is YAML
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} cannot be read: {error}.") from error
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: a date or a number that does not exist
        raise SettingsError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        what = "is empty" if found is None else f"holds a {type(found).__name__}"
        raise SettingsError(f"{file} {what}; expected lines of 'name: value'.")
    settings = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name not in options:
            raise SettingsError(f"{file}: {unknown_option(f'setting {key!r}', name, options, REFUSED_SETTINGS)}")
        settings[name] = convert_value(f"{file}: {key}", value, options[name])
    return settings
