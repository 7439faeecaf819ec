"""What a resumed run does with settings that have changed since its checkpoint was written: the new ones are used, and each is named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR

from grpo_fast.utils.redaction import redact

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from grpo_fast.trainer.config import GRPOConfig

__all__ = ["OptimizerSettings", "SettingChange", "changes_since", "describe_changes", "recorded_settings"]

IGNORED = (  # do not change what is computed, or are those of this machine and process
    *(
        "output_dir",
        "run_name",
        "logging_dir",
        "report_to",
        "trackio_space_id",
        "project",
        "disable_tqdm",
        "log_level",
        "log_level_replica",
    ),
    *("resume_from_checkpoint", "local_rank", "log_completions", "num_completions_to_print", "log_on_each_node", "logging_first_step"),
    *("do_train", "do_eval", "do_predict", "push_to_hub", "dataloader_num_workers", "use_cpu", "use_vllm", "vllm_server_base_url"),
    *("vllm_server_host", "vllm_server_port", "sampler_options"),
)
IGNORED_PREFIXES = ("hub_", "dataloader_", "torch_compile", "debug", "ddp_", "deepspeed", "_")
LEARNING_RATE = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "max_steps",
    "num_train_epochs",
)
GROUP_KEYS = {"weight_decay": "weight_decay", "adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}


@dataclass(frozen=True)
class SettingChange:
    """A setting with its value in the checkpoint and its value now."""

    name: str
    before: object
    now: object

    def __str__(self) -> str:
        return f"{self.name}: {_short(self.before)} -> {_short(self.now)}"


def recorded_settings(args: GRPOConfig, rewards: Sequence[str]) -> dict[str, Any]:
    """The settings that a checkpoint records, without secrets, as values that JSON can hold.

    Args:
        args: the settings of the run.
        rewards: the names of its rewards.
    """
    given = args.to_dict()
    names = [each.name for each in fields(args) if each.name not in IGNORED and not each.name.startswith(IGNORED_PREFIXES)]
    settings = {name: given[name] for name in names if name in given} | {"reward_funcs": list(rewards)}
    found: dict[str, Any] = json.loads(json.dumps(settings, default=str), parse_constant=str)  # infinity as a text
    return found


def changes_since(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[SettingChange]:
    """The settings that differ from those of a checkpoint. Settings that one of the two does not have are left out."""
    return [SettingChange(name, before[name], value) for name, value in now.items() if name in before and before[name] != value]


def describe_changes(changes: Sequence[SettingChange], step: int, *, unfinished_rollout: bool, kept: Sequence[str] = ()) -> str:
    """One line that names each changed setting.

    Args:
        changes: at least one.
        step: from which the run is resumed.
        unfinished_rollout: whether the checkpoint holds the rest of a rollout.
        kept: sentences about parts of the run that continue with the state of the checkpoint.
    """
    line = f"Resumed from step {step} with changed settings, of which the new values are used: {'; '.join(map(str, changes))}."
    if unfinished_rollout:
        line += " The rest of the checkpoint's rollout, already drawn and scored, is trained on first."
    return line + "".join(f" {sentence}" for sentence in kept)


def _short(value: object) -> str:
    text = repr(redact(value))
    return text if len(text) <= 80 else text[:77] + "..."


class OptimizerSettings:
    """The settings of a new optimizer and its learning-rate schedule, to be restored after their state has been loaded.

    The state of an optimizer holds settings too, such as the learning rate, and would otherwise replace those of the run.

    Args:
        optimizer: before its state is loaded.
        scheduler: of its learning rate.
    """

    def __init__(self, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        self._groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        self._rates = list(getattr(scheduler, "base_lrs", []))

    def restore(self, optimizer: Optimizer, scheduler: LRScheduler, changed: Sequence[str]) -> None:
        """Use the settings that have changed, and keep everything else that was loaded.

        Args:
            optimizer: after its state was loaded.
            scheduler: likewise.
            changed: names of the changed settings of the run.
        """
        keys = {GROUP_KEYS[name] for name in changed if name in GROUP_KEYS}
        for group, new in zip(optimizer.param_groups, self._groups, strict=True):
            group.update({key: new[key] for key in keys if key in new})
        if self._rates and any(name in LEARNING_RATE for name in changed):
            self._restore_learning_rate(optimizer, scheduler, "learning_rate" in changed)

    def _restore_learning_rate(self, optimizer: Optimizer, scheduler: LRScheduler, new_rate: bool) -> None:
        before = scheduler.base_lrs
        if new_rate:
            scheduler.base_lrs = list(self._rates)
        for number, group in enumerate(optimizer.param_groups):
            group["initial_lr"] = base = scheduler.base_lrs[number]
            if isinstance(scheduler, LambdaLR):
                group["lr"] = base * scheduler.lr_lambdas[number](scheduler.last_epoch)
            elif before[number]:
                group["lr"] *= base / before[number]
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
