"""What other libraries' options mean in ours: their names, their defaults, and the conventions that differ without saying so.

The same word means different things: CISPO's epsilon_high is the bound of the ratio in TRL, Liger and ms-swift and its distance from 1 in
verl; a "sequence" weight of the sampler's mismatch is a product in TRL and verl and a geometric mean in ms-swift and OpenRLHF; a fully
masked row counts in a mean over sequences (TRL, Liger, ms-swift) or does not (verl, OpenRLHF); dual clip is always on in verl; TRL
corrects the KL by the ratio unless told not to. Here each becomes a setting that can be read.

    loss_config(library, options)             LossConfig.like: the loss
    rollout_settings(library, ...)            what to pass to gf.rollout_weights
    advantage_settings(library, ...)          what to pass to gf.group_advantages

What has no counterpart is refused by name, and so is a library that is installed in another version than those of versions.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from grpo_fast.integrations.versions import refuse_other_versions
from grpo_fast.loss.config import LossConfig

__all__ = ["LIBRARIES", "advantage_settings", "loss_config", "rollout_settings"]

IN_THE_CALL = {  # options of theirs that are arguments of grpo_loss and linear_grpo_loss: what they become
    "temperature": "temperature=",
    "num_items_in_batch": "num_items=",
    "vllm_is_ratio": "rollout_weights=",
    "importance_sampling_ratio": "rollout_weights=",
    "rollout_is_weights": "rollout_weights=",
    "batch_num_tokens": "num_items= (divided by dp_size)",
    "global_batch_size": "loss_scale=",
    "dp_size": "loss_scale=",
    "top_entropy_quantile": "rollout_weights=gf.top_entropy_mask(...)",
    "off_policy_mask_threshold": "rollout_weights=gf.off_policy_sequence_mask(...)",
    "off_policy_sequence_mask_delta": "mask=, made from gf.off_policy_sequence_mask(...)",
}


class _Options:
    """A library's options: each is taken once, with its default there, and what is left over is refused."""

    def __init__(self, library: str, given: Mapping[str, Any]):
        self.library, self.given, self.known = library, dict(given), set[str]()

    def take(self, name: str, default: Any) -> Any:
        self.known.add(name)
        return self.given.get(name, default)

    def refuse(self, name: str, value: Any, why: str) -> NoReturn:
        raise ValueError(f"LossConfig.like({self.library!r}): {name} is {value!r}; {why}")

    def loss_type(self, default: str, allowed: tuple[str, ...], name: str = "loss_type") -> str:
        value = self.take(name, default)
        if value not in allowed:
            self.refuse(name, value, f"expected one of {', '.join(allowed)}: the others have no counterpart here.")
        return str(value)

    def check_all_taken(self) -> None:
        for name in self.given:
            if name in self.known:
                continue
            if name in IN_THE_CALL:
                self.refuse(name, self.given[name], f"expected it in the call, not in the settings: grpo_loss(..., {IN_THE_CALL[name]}).")
            self.refuse(name, self.given[name], f"expected one of the options of the loss: {', '.join(sorted(self.known))}.")


def loss_config(library: str, options: Mapping[str, Any]) -> LossConfig:
    """LossConfig.like; see there.

    Raises:
        ValueError: names the library or the option, and says what to do.
        ImportError: the library is installed in a version that was not compared with.
    """
    if library not in _LOSSES:
        raise ValueError(f"LossConfig.like: library is {library!r}; expected one of {', '.join(LIBRARIES)}.")
    distribution = {"liger": "liger-kernel", "swift": "ms-swift"}.get(library, library)
    refuse_other_versions(distribution, f"LossConfig.like({library!r})", "Its options may mean something else there: make a LossConfig.")
    given = _Options(library, options)
    with warnings.catch_warnings():  # a bound of CISPO's that the library has by default is meant
        warnings.simplefilter("ignore", UserWarning)
        config = _LOSSES[library](given)
    given.check_all_taken()
    return config


def _of_sapo_and_vespo(o: _Options) -> dict[str, Any]:
    """As TRL, Liger and we call them."""
    defaults = {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
    defaults |= {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}
    return {name: o.take(name, default) for name, default in defaults.items()}


# TRL, its relatives -------------------------------------------------------------------------------------------------------------------


def _trl(o: _Options) -> LossConfig:
    loss_type = o.loss_type("dapo", ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"))
    epsilon = o.take("epsilon", 0.2)
    epsilon_high = o.take("epsilon_high", None)
    delta = o.take("delta", None)
    return LossConfig(
        loss_type=loss_type,
        epsilon_low=epsilon,
        epsilon_high=epsilon if epsilon_high is None else epsilon_high,  # of CISPO: the bound of the ratio itself
        delta=delta if _clips(loss_type) else None,  # TRL does not look at it elsewhere
        beta=o.take("beta", 0.0),
        bias_corrected_kl=o.take("use_bias_correction_kl", True),
        entropy_coef=o.take("entropy_coef", 0.0),
        entropy_aggregation="token_mean",  # whatever the loss type
        importance_sampling_level=o.take("importance_sampling_level", "token"),  # of LUSPO too, whose paper's is the sequence
        **_of_sapo_and_vespo(o),
        max_completion_length=o.take("max_completion_length", 512),
    )


def _liger(o: _Options) -> LossConfig:
    """The options of LigerFusedLinearGRPOLoss; those of triton_grpo_loss have other defaults (eps_high 0.4)."""
    loss_type = o.loss_type("dapo", ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"))
    level = o.take("importance_sampling_level", "token")
    if level == "sequence" and not _clips(loss_type):
        o.refuse("importance_sampling_level", level, f"expected 'token' with loss_type={loss_type!r}, as Liger does.")
    delta = o.take("delta", None)
    length = o.take("max_completion_length", None)
    if loss_type == "dr_grpo" and length is None:
        o.refuse("max_completion_length", length, "expected an int with loss_type='dr_grpo': pass the generation limit of the run.")
    use_ref_model, beta = o.take("use_ref_model", True), o.take("beta", 0.04)
    for name, default in (("compiled", True), ("chunk_size", 1)):  # how it is computed, not what
        o.take(name, default)
    return LossConfig(
        loss_type=loss_type,
        epsilon_low=o.take("epsilon_low", 0.2),
        epsilon_high=o.take("epsilon_high", 0.2),
        delta=delta,
        beta=beta if use_ref_model else 0.0,
        bias_corrected_kl=o.take("use_bias_correction_kl", False),
        importance_sampling_level=level,
        **_of_sapo_and_vespo(o),
        max_completion_length=length,
    )


def _swift(o: _Options) -> LossConfig:
    loss_type = o.loss_type("grpo", ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"))
    epsilon = o.take("epsilon", 0.2)
    epsilon_high = o.take("epsilon_high", None)
    delta = o.take("delta", None)
    kl_in_reward = o.take("kl_in_reward", False)
    beta = o.take("beta", 0.04)
    beta = 0.0 if kl_in_reward else beta
    if o.take("rollout_importance_sampling_mode", None) is not None and beta != 0:
        o.refuse(
            "rollout_importance_sampling_mode",
            o.given["rollout_importance_sampling_mode"],
            "expected None with a KL in the loss: ms-swift weighs the KL by the sampler's mismatch too, here (as in TRL, Liger) nothing "
            "does. Pass beta=0.0 or kl_in_reward=True, or leave this option out and pass rollout_weights= to the call.",
        )
    _kl_cap(o, "beta", beta, "expected 0: ms-swift caps the estimate of a token at 10 nats and its log-ratio at 20")
    return LossConfig(
        loss_type=loss_type,
        epsilon_low=epsilon,
        epsilon_high=epsilon if epsilon_high is None else epsilon_high,
        delta=delta if _clips(loss_type) else None,
        beta=beta,
        importance_sampling_level=o.take("importance_sampling_level", "token"),
        sapo_temperature_pos=o.take("tau_pos", 1.0),
        sapo_temperature_neg=o.take("tau_neg", 1.05),
        max_completion_length=o.take("max_completion_length", 512),
    )


# verl and OpenRLHF: a fully masked row does not count, the KL and the entropy are averaged like the surrogate -----------------------------


def _verl(o: _Options) -> LossConfig:
    """Options of ActorConfig and of its policy_loss (loss_mode)."""
    mode = o.loss_type("vanilla", ("vanilla", "gspo", "sapo", "cispo", "gpg"), "loss_mode")
    clip_ratio = o.take("clip_ratio", 0.2)
    low = _or(o.take("clip_ratio_low", None), clip_ratio)
    high = _or(o.take("clip_ratio_high", None), clip_ratio)
    dual_clip = o.take("clip_ratio_c", 3.0)
    if mode == "cispo" and low < 1:
        o.refuse(
            "clip_ratio_low",
            low,
            "expected at least 1 with loss_mode='cispo', that is no lower bound: verl keeps the ratio above 1 - clip_ratio_low, MiniMax-M1 "
            "and this package do not. grpo_fast.integrations.verl.policy_loss has the bound, over log-probabilities.",
        )
    use_kl_loss, kl_type = o.take("use_kl_loss", False), o.take("kl_loss_type", "low_var_kl")
    kl_coef = o.take("kl_loss_coef", 0.001)
    beta = kl_coef if use_kl_loss else 0.0
    kl_estimator = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}.get(kl_type)
    if beta != 0 and kl_estimator is None:
        o.refuse("kl_loss_type", kl_type, "expected kl, mse or low_var_kl (k1, k2, k3): the others have no counterpart here.")
    if kl_estimator == "k3":
        _kl_cap(o, "kl_loss_type", beta, "expected 'mse' or 'kl': verl caps low_var_kl of a token at 10 nats", got=kl_type)
    else:
        o.take("uncapped_kl", False)
    loss_type, level = {
        "vanilla": ("dapo", "token"),
        "gspo": ("gspo", "sequence_token"),
        "sapo": ("sapo", "token"),
        "cispo": ("cispo", "token"),
        "gpg": ("reinforce", "token"),
    }[mode]
    aggregation, length = _verl_aggregation(o, "seq-mean-token-mean" if mode == "sapo" else None)
    return LossConfig(
        loss_type=loss_type,
        epsilon_low=low,
        epsilon_high=1 + high if mode == "cispo" else high,
        dual_clip=dual_clip if mode == "vanilla" else None,  # and there always
        beta=beta,
        kl_estimator=kl_estimator or "k3",
        entropy_coef=o.take("entropy_coeff", 0.0),
        importance_sampling_level=level,
        aggregation=aggregation,
        log_ratio_clamp=10.0 if mode == "gspo" else 20.0,
        sapo_temperature_pos=o.take("tau_pos", 1.0),
        sapo_temperature_neg=o.take("tau_neg", 1.05),
        max_completion_length=length,
    )


def _verl_aggregation(o: _Options, forced: str | None) -> tuple[str, int | None]:
    mode = o.take("loss_agg_mode", "token-mean")
    factor = o.take("loss_scale_factor", None)
    mode = forced or mode
    if mode == "seq-mean-token-sum-norm":
        o.refuse(
            "loss_agg_mode",
            mode,
            "expected another: its mean is over the sequences that are not masked and divides by a length as well. Take "
            "'seq-mean-token-sum' and pass loss_scale=1 / loss_scale_factor to the call.",
        )
    if factor is not None:
        o.refuse("loss_scale_factor", factor, "expected None with this loss_agg_mode, which does not use it.")
    aggregations = {
        "token-mean": "global_token_mean",  # num_items= is the optimiser step's token count, over dp_size
        "token-sum": "global_token_mean",  # with num_items=1 and loss_scale=dp_size in the call
        "seq-mean-token-mean": "nonempty_sequence_mean",
        "seq-mean-token-sum": "nonempty_sequence_sum",
    }
    if mode not in aggregations:
        o.refuse("loss_agg_mode", mode, f"expected one of {', '.join(aggregations)}.")
    return aggregations[mode], None


def _openrlhf(o: _Options) -> LossConfig:
    """The options of PolicyLoss, and those of the KL: kl_coef (init_coef with use_loss) and kl_estimator."""
    policy_loss_type = o.loss_type("ppo", ("ppo", "gspo"), "policy_loss_type")
    correction = o.take("is_correction_level", "off")
    if correction != "off":
        o.refuse(
            "is_correction_level",
            correction,
            "expected 'off': pass rollout_weights= to the call. grpo_fast.integrations.openrlhf.PolicyLoss has the corrections.",
        )
    for name in ("is_correction_mode", "is_correction_gating", "is_correction_threshold"):
        o.take(name, None)
    beta = o.take("kl_coef", 0.0)
    kl_estimator = o.take("kl_estimator", "k1")
    if o.take("unbiased_gradient", False):
        o.refuse("unbiased_gradient", True, "expected False: for that gradient take kl_estimator='k2', or bias_corrected_kl of LossConfig.")
    _kl_cap(o, "kl_coef", beta, "expected 0: OpenRLHF caps the estimate of a token at 10 nats")
    token_level = o.take("token_level_loss", True)
    return LossConfig(
        loss_type="gspo" if policy_loss_type == "gspo" else "dapo",
        epsilon_low=o.take("clip_eps_low", 0.2),
        epsilon_high=o.take("clip_eps_high", 0.2),
        dual_clip=o.take("dual_clip", None),
        beta=beta,
        kl_estimator=kl_estimator,
        entropy_coef=o.take("entropy_coef", None) or 0.0,
        aggregation="global_token_mean" if token_level and policy_loss_type == "ppo" else "nonempty_sequence_mean",
    )


def _kl_cap(o: _Options, name: str, beta: float, why: str, got: Any = None) -> None:
    if not o.take("uncapped_kl", False) and beta != 0:
        o.refuse(name, beta if got is None else got, f"{why}, which LossConfig does not do. Pass uncapped_kl=True to leave the cap out.")


def _clips(loss_type: str) -> bool:
    return loss_type not in ("cispo", "sapo", "vespo")


def _or(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


_LOSSES: dict[str, Callable[[_Options], LossConfig]] = {
    "trl": _trl,
    "liger": _liger,
    "verl": _verl,
    "openrlhf": _openrlhf,
    "swift": _swift,
}
LIBRARIES = tuple(_LOSSES)


# The sampler's mismatch ---------------------------------------------------------------------------------------------------------------


def rollout_settings(library: str, mode: str, *, high: float | None = None, low: float | None = None) -> dict[str, Any]:
    """What a library's correction for a sampler that is not the trainer is, as arguments of gf.rollout_weights.

    Args:
        library: ``"trl"`` (vllm_importance_sampling_mode), ``"swift"`` (rollout_importance_sampling_mode) or ``"verl"`` (rollout_is).
        mode: of TRL and ms-swift ``token_truncate``, ``token_mask``, ``sequence_truncate`` or ``sequence_mask``; of verl ``token`` or
            ``sequence``.
        high, low: the library's threshold or bounds; None = its default (TRL 3.0, the others 2.0; no lower one).

    Raises:
        ValueError: names what is unknown, or has no counterpart, and says what to do.

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
            "sequence by its mean. Multiply rollout_weights(level='token', high=None) by rollout_weights(level='sequence_mean', "
            "mode='mask') > 0."
        )
    return {
        "mode": kind,
        "level": "sequence_mean" if library == "swift" and level == "sequence" else level,
        "low": low,
        "high": _or(high, 3.0 if library == "trl" else 2.0),
    }


# Advantages ---------------------------------------------------------------------------------------------------------------------------


def advantage_settings(library: str, estimator: str = "group") -> dict[str, Any]:
    """What a library's group-relative advantages are, as arguments of gf.group_advantages: baseline, scale, and the epsilon of its std.

    All of them divide by the unbiased standard deviation, and here equal rewards give exactly 0 where theirs give a rounding error over
    epsilon. A group of one gives 0 here; in verl it gives the reward itself.

    Args:
        library: ``"trl"``, ``"swift"``, ``"verl"`` or ``"openrlhf"``.
        estimator: of TRL and ms-swift scale_rewards (``"group"``, ``"batch"``, ``"none"``; ``"gdpo"``); of verl adv_estimator (``"grpo"``,
            ``"rloo"``; ``"dr_grpo"`` for norm_adv_by_std_in_grpo=False); of OpenRLHF the estimator (``"group_norm"``, ``"rloo"``,
            ``"dr_grpo"``).

    Raises:
        ValueError: names what is unknown or has no counterpart.

    Example:
        >>> advantage_settings("verl", "grpo")
        {'scale': 'group', 'baseline': 'mean', 'eps': 1e-06}
    """
    trl: dict[str, dict[str, Any]] = {
        "group": {"scale": "group", "baseline": "mean", "eps": 1e-4},
        "batch": {"scale": "batch", "baseline": "mean", "eps": 1e-4},
        "none": {"scale": "none", "baseline": "mean"},
        "gdpo": {"scale": "group", "normalize": "normalize_then_sum", "eps": 1e-4},
    }
    rloo, centred = {"scale": "none", "baseline": "leave_one_out"}, {"scale": "none", "baseline": "mean"}
    tables: dict[str, dict[str, dict[str, Any]]] = {
        "trl": trl,
        "swift": {name: settings for name, settings in trl.items() if name != "gdpo"},  # its GDPO has an epsilon of 1e-8
        "verl": {"grpo": {"scale": "group", "baseline": "mean", "eps": 1e-6}, "rloo": rloo, "dr_grpo": centred},
        "openrlhf": {"group_norm": {"scale": "group", "baseline": "mean", "eps": 1e-9}, "rloo": rloo, "dr_grpo": centred},
    }
    if library not in tables or estimator not in tables[library]:
        known = "; ".join(f"{name}: {', '.join(table)}" for name, table in tables.items())
        raise ValueError(f"advantage_settings: {library!r} with estimator {estimator!r}; expected one of {known}.")
    return dict(tables[library][estimator])
