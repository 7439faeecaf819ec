"""Copies the settings of the loss from LossConfig to GRPOConfig, so that the settings of a new loss are declared only once."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from grpo_fast.loss.config import LossConfig
from grpo_fast.trainer.config_checks import TYPES, bad_setting
from grpo_fast.utils.load_object import name_of_object

if TYPE_CHECKING:
    from grpo_fast.trainer.config import GRPOConfig

__all__ = ["add_loss_fields", "make_loss_config", "with_surrogate_name"]

T = TypeVar("T")

_RENAMED = ("epsilon_low", "bias_corrected_kl")  # TRL's names are epsilon and use_bias_correction_kl
_SET_BY_LOSS_TYPE = ("entropy_aggregation", "log_ratio_clamp")


def add_loss_fields(cls: type[T]) -> type[T]:
    """Class decorator, below ``@dataclass``: add every field of LossConfig that the class does not declare itself.

    It skips fields that have another name in GRPOConfig, fields that the loss type determines, and fields whose type a command line cannot
    express.
    """
    for each in fields(LossConfig):
        annotation = str(each.type)
        if each.name in (*cls.__annotations__, *_RENAMED, *_SET_BY_LOSS_TYPE) or annotation.removesuffix(" | None") not in TYPES:
            continue
        cls.__annotations__[each.name] = annotation
        setattr(cls, each.name, each.default)
    return cls


def make_loss_config(config: GRPOConfig) -> LossConfig:
    """The LossConfig of a GRPOConfig.

    Raises:
        ValueError: the settings of the loss do not fit together.
    """
    if config.loss_type == "cispo" and config.epsilon_high is None:
        raise bad_setting("epsilon_high", None, "a number with loss_type='cispo', the bound of the ratio itself: 5.0 (ScaleRL)")
    names = {each.name for each in fields(config)} - set(_SET_BY_LOSS_TYPE)
    settings: dict[str, Any] = {each.name: getattr(config, each.name) for each in fields(LossConfig) if each.name in names}
    settings |= {
        "epsilon_low": config.epsilon,
        "epsilon_high": config.epsilon if config.epsilon_high is None else config.epsilon_high,
        "bias_corrected_kl": config.use_bias_correction_kl,
        "aggregation": _aggregation(config),
    }
    made = LossConfig(**settings)
    if made.custom is not None:
        made.custom.check_inputs(dict.fromkeys(made.custom.columns), has_reference=config.beta != 0)  # columns of the dataset
    return made


def _aggregation(config: GRPOConfig) -> str | None:
    if config.aggregation is not None and config.aggregation.startswith("nonempty_"):
        expected = "one whose denominator is the same in all micro-batches. Fix: " + config.aggregation.removeprefix("nonempty_")
        raise bad_setting("aggregation", config.aggregation, expected)
    # Denominators are those of the whole optimizer step, so a mean over the tokens of the batch is one over all its tokens.
    if config.aggregation == "token_mean" or (config.aggregation is None and config.loss_type == "bnpo"):
        return "global_token_mean"
    return config.aggregation


def with_surrogate_name(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the name of a custom surrogate in place of the function, for files."""
    surrogate = settings.get("surrogate")
    return {**settings, "surrogate": name_of_object(surrogate)} if callable(surrogate) else settings
