"""Conversion of other libraries' options to settings of this package: their names, their defaults, and conventions that differ.

    loss_config(library, options)             LossConfig.like: the loss
    rollout_settings(library, ...)            the arguments of gf.rollout_weights
    rejection_settings(library, ...)          the arguments of gf.rejection_mask
    advantage_settings(library, ...)          the arguments of gf.group_advantages

The same word can mean different things:

- CISPO's epsilon_high is the bound of the ratio in TRL, Liger and ms-swift, and the bound's distance from 1 in verl.
- A sampler-mismatch weight of level "sequence" is a product in TRL and verl, and a geometric mean in ms-swift and OpenRLHF.
- verl's bounds of a k1 rejection are those of sampler / trainer, and gf.rejection_mask's those of trainer / sampler.
- A fully masked row counts in a mean over sequences in TRL, Liger and ms-swift, and does not in verl and OpenRLHF.
- verl always applies the dual clip. TRL multiplies the KL by the ratio by default.

An option without a counterpart raises an error that names it, and so does a version of a library that versions.py refuses.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from grpo_fast.integrations.loss_options import (
    LibraryOptions,
    liger_loss_config,
    openrlhf_loss_config,
    prime_rl_loss_config,
    swift_loss_config,
    trl_loss_config,
    verl_loss_config,
)
from grpo_fast.integrations.versions import COMPARED, refuse_other_versions
from grpo_fast.loss.config import LossConfig
from grpo_fast.loss.rejection import parse_rejections

__all__ = ["LIBRARIES", "advantage_settings", "loss_config", "rejection_settings", "rollout_settings"]

Settings = dict[str, str | float | None]  # keyword arguments of a function

_LOSS_CONFIGS: dict[str, Callable[[LibraryOptions], LossConfig]] = {
    "trl": trl_loss_config,
    "liger": liger_loss_config,
    "verl": verl_loss_config,
    "openrlhf": openrlhf_loss_config,
    "swift": swift_loss_config,
    "prime-rl": prime_rl_loss_config,
}
LIBRARIES = tuple(_LOSS_CONFIGS)


def loss_config(library: str, options: Mapping[str, Any]) -> LossConfig:
    """Implement LossConfig.like, which documents the arguments.

    Raises:
        ValueError: the library or an option is unknown or has no counterpart; the message names it and the fix.
        ImportError: the installed version of the library is not one of those that this package was compared with.
    """
    if library not in _LOSS_CONFIGS:
        raise ValueError(f"LossConfig.like: library is {library!r}; expected one of {', '.join(LIBRARIES)}.")
    distribution = {"liger": "liger-kernel", "swift": "ms-swift"}.get(library, library)
    if distribution in COMPARED:
        refuse_other_versions(distribution, f"LossConfig.like({library!r})", "Its options may mean something else: make a LossConfig.")
    taken = LibraryOptions(library, options)
    with warnings.catch_warnings():  # LossConfig warns of a small CISPO bound, which is the default of some libraries
        warnings.simplefilter("ignore", UserWarning)
        config = _LOSS_CONFIGS[library](taken)
    taken.check_all_taken()
    return config


def rollout_settings(library: str, mode: str, *, high: float | None = None, low: float | None = None) -> Settings:
    """Return a library's correction for the mismatch of sampler and trainer, as arguments of gf.rollout_weights.

    Args:
        library: ``"trl"`` (vllm_importance_sampling_mode), ``"swift"`` (rollout_importance_sampling_mode) or ``"verl"`` (rollout_is).
        mode: for TRL and ms-swift ``token_truncate``, ``token_mask``, ``sequence_truncate`` or ``sequence_mask``; for verl ``token`` or
            ``sequence``.
        high, low: the library's threshold or bounds; None = its default (TRL 3.0, the others 2.0; no lower bound).

    Raises:
        ValueError: the library or mode is unknown or has no counterpart; the message names it and the fix.

    Example:
        >>> rollout_settings("swift", "sequence_truncate")
        {'mode': 'truncate', 'level': 'sequence_mean', 'low': None, 'high': 2.0}
    """
    if library == "verl" and mode in ("token", "sequence"):
        mode = f"{mode}_truncate"
    level, _, kind = mode.partition("_")
    if library not in ("trl", "swift", "verl") or level not in ("token", "sequence") or kind not in ("truncate", "mask"):
        raise ValueError(f"rollout_settings: {library!r} with mode {mode!r}; expected 'trl', 'swift' or 'verl' and a mode of theirs.")
    if library == "swift" and mode == "sequence_mask":
        raise ValueError(
            "rollout_settings: mode is 'sequence_mask' of ms-swift; expected another: it keeps the weight of each token and drops a "
            "sequence by its mean. Fix: multiply rollout_weights(level='token', high=None) by rollout_weights(level='sequence_mean', "
            "mode='mask') > 0."
        )
    return {
        "mode": kind,
        "level": "sequence_mean" if library == "swift" and level == "sequence" else level,
        "low": low,
        "high": (3.0 if library == "trl" else 2.0) if high is None else high,
    }


def rejection_settings(library: str, criteria: str, threshold: str | float) -> list[Settings]:
    """Return a library's rejection of tokens and sequences, as arguments of gf.rejection_mask: one set for each criterion.

    A token is kept if every mask keeps it: multiply them. verl removes rejected tokens from the loss's mask, and so from its denominators.

    Args:
        library: ``"verl"``; NeMo-RL's ``seq-mask-tis`` with the bounds low and high is ``"seq_mean_k1"`` with ``"1/high_1/low"``.
        criteria: rollout_rs.
        threshold: rollout_rs_threshold.

    Raises:
        ValueError: the library, a criterion or a threshold is unknown; the message names it and the fix.

    Example:
        >>> rejection_settings("verl", "seq_mean_k1", "0.5_1.25")
        [{'estimator': 'k1', 'level': 'sequence_mean', 'low': 0.8, 'high': 2.0}]
    """
    if library != "verl":
        raise ValueError(f"rejection_settings: library is {library!r}; expected 'verl'.")
    return [each._asdict() for each in parse_rejections(criteria, threshold)]


def advantage_settings(library: str, estimator: str = "group") -> Settings:
    """Return a library's advantages as arguments of gf.group_advantages: baseline, scale, and the epsilon added to the divisor.

    All libraries divide by the unbiased standard deviation. Equal rewards give exactly 0 in this package, and a rounding error divided by
    epsilon in the libraries. A group of one completion gives 0 in this package, and the reward itself in verl. Those of REINFORCE++ also
    need ``lengths``; verl adds its epsilon, 1e-8, to the variance. For ``"reinforce_plus_plus"`` the whole batch is one group.

    Args:
        library: ``"trl"``, ``"swift"``, ``"verl"``, ``"openrlhf"`` or ``"skyrl"``.
        estimator: for TRL and ms-swift scale_rewards (``"group"``, ``"batch"``, ``"none"``; ``"gdpo"``); for verl adv_estimator
            (``"grpo"``, ``"rloo"``, ``"reinforce_plus_plus"``, ``"reinforce_plus_plus_baseline"``; ``"dr_grpo"`` for
            norm_adv_by_std_in_grpo=False); for OpenRLHF the estimator (``"group_norm"``, ``"rloo"``, ``"dr_grpo"``); for SkyRL
            advantage_estimator (``"maxrl"``).

    Raises:
        ValueError: the library or estimator is unknown or has no counterpart.

    Example:
        >>> advantage_settings("verl", "grpo")
        {'scale': 'group', 'baseline': 'mean', 'eps': 1e-06}
    """
    trl: dict[str, Settings] = {
        "group": {"scale": "group", "baseline": "mean", "eps": 1e-4},
        "batch": {"scale": "batch", "baseline": "mean", "eps": 1e-4},
        "none": {"scale": "none", "baseline": "mean"},
        "gdpo": {"scale": "group", "normalize": "normalize_then_sum", "eps": 1e-4},
    }
    rloo: Settings = {"scale": "none", "baseline": "leave_one_out"}
    centred: Settings = {"scale": "none", "baseline": "mean"}
    whitened: Settings = {"scale": "tokens", "baseline": "mean", "eps": 0.0}
    tables: dict[str, dict[str, Settings]] = {
        "trl": trl,
        "swift": {name: settings for name, settings in trl.items() if name != "gdpo"},  # its GDPO has an epsilon of 1e-8
        "verl": {
            "grpo": {"scale": "group", "baseline": "mean", "eps": 1e-6},
            "rloo": rloo,
            "dr_grpo": centred,
            "reinforce_plus_plus": whitened,
            "reinforce_plus_plus_baseline": whitened,
        },
        "openrlhf": {"group_norm": {"scale": "group", "baseline": "mean", "eps": 1e-9}, "rloo": rloo, "dr_grpo": centred},
        "skyrl": {"maxrl": {"scale": "mean", "baseline": "mean", "eps": 1e-6}},
    }
    if library not in tables or estimator not in tables[library]:
        known = "; ".join(f"{name}: {', '.join(table)}" for name, table in tables.items())
        raise ValueError(f"advantage_settings: {library!r} with estimator {estimator!r}; expected one of {known}.")
    return dict(tables[library][estimator])
