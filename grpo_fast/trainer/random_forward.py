"""What makes a model's forward pass random in training, so that the policy that is trained is not the one that sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from grpo_fast.models.unwrap import unwrap

if TYPE_CHECKING:
    from grpo_fast.trainer.config import GRPOConfig

__all__ = ["describe_random_forward", "random_parts"]

_FIX = (
    "Fix: disable_dropout=True (the default; dropout of an adapter is in its own config: lora_dropout=0), no neftune_noise_alpha, and "
    "router_jitter_noise=0 in the model's config."
)


def describe_random_forward(model: nn.Module, args: GRPOConfig, gap: float, eval_gap: float) -> str:
    """Describe why the training forward pass differs from the sampler while the one in evaluation mode does not.

    Args:
        model: the model, in training mode.
        args: the settings of the run.
        gap: mean difference between the sampler's log-probabilities and those of the loss, in nats a token.
        eval_gap: the same for those of the model in evaluation mode.
    """
    parts = random_parts(model, args)
    found = f"Found: {', '.join(parts)}" if parts else "Likely causes: dropout, NEFTune, router jitter, or code of the model itself"
    return (
        f"The model's forward pass is random in training: the sampler's log-probabilities differ from those of the loss by {gap:.3g} nats "
        f"a token, and from those of the same model in evaluation mode by {eval_gap:.3g}. {found}. {_FIX}"
    )


def random_parts(model: nn.Module, args: GRPOConfig) -> list[str]:
    """The parts of a model that are random in training: dropout, the noise of NEFTune, and the jitter of routers.

    Example:
        >>> from grpo_fast.trainer import GRPOConfig
        >>> random_parts(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), GRPOConfig("out", use_cpu=True))
        ["dropout (p = 0.1 in '1')"]
    """
    parts = []
    for name, module in model.named_modules():
        rates = {"p": getattr(module, "p", 0)} if isinstance(module, nn.modules.dropout._DropoutNd) else _dropout_rates(module)
        active = next(((key, rate) for key, rate in rates.items() if isinstance(rate, float) and rate > 0), None)
        if active is not None:
            parts.append(f"dropout ({active[0]} = {active[1]:g} in {name!r})")
            break  # one of them is enough
    alpha = getattr(args, "neftune_noise_alpha", None)
    if alpha:
        parts.append(f"NEFTune (neftune_noise_alpha = {alpha:g})")
    config: Any = getattr(unwrap(model), "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for key, value in vars(text).items() if text is not None else ():
        if "jitter" in key and isinstance(value, float) and value > 0:
            parts.append(f"jitter of the routers ({key} = {value:g})")
    return parts


def _dropout_rates(module: nn.Module) -> dict[str, object]:
    """The rates that a module of transformers keeps as numbers, such as that of attention."""
    return {key: value for key, value in vars(module).items() if "dropout" in key}
