"""Conversion of the loss options of each library, with its names and defaults, to a LossConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from grpo_fast.loss.config import LossConfig

__all__ = [
    "LibraryOptions",
    "liger_loss_config",
    "openrlhf_loss_config",
    "prime_rl_loss_config",
    "swift_loss_config",
    "trl_loss_config",
    "verl_loss_config",
]

T = TypeVar("T")

_CALL_ARGUMENTS = {  # options that are arguments of grpo_loss and linear_grpo_loss, and the argument that each becomes
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


class LibraryOptions:
    """The options that a caller gave under a library's names. Each is read once, with the library's default; unread ones are an error."""

    def __init__(self, library: str, given: Mapping[str, Any]) -> None:
        self.library, self.given, self.known = library, dict(given), set[str]()

    def take(self, name: str, default: T) -> T:
        """Return the option's value, or the library's default."""
        self.known.add(name)
        return self.given.get(name, default)

    def take_or(self, name: str, default: T) -> T:
        """Return the value of an option whose default None means ``default``."""
        value: T | None = self.take(name, None)
        return default if value is None else value

    def refuse(self, name: str, value: object, why: str) -> NoReturn:
        """Raise a ValueError that names the option and says why it has no counterpart."""
        raise ValueError(f"LossConfig.like({self.library!r}): {name} is {value!r}; {why}")

    def loss_type(self, default: str, allowed: tuple[str, ...], name: str = "loss_type") -> str:
        """Return the option that selects the loss; raise ValueError if it is not one of ``allowed``."""
        value = self.take(name, default)
        if value not in allowed:
            self.refuse(name, value, f"expected one of {', '.join(allowed)}: the others have no counterpart here.")
        return str(value)

    def check_all_taken(self) -> None:
        """Raise a ValueError if an option was given that has not been read."""
        for name in self.given:
            if name in self.known:
                continue
            if name in _CALL_ARGUMENTS:
                why = f"expected it in the call, not in the settings: grpo_loss(..., {_CALL_ARGUMENTS[name]})."
                self.refuse(name, self.given[name], why)
            self.refuse(name, self.given[name], f"expected one of the options of the loss: {', '.join(sorted(self.known))}.")


def _sapo_and_vespo_settings(options: LibraryOptions) -> dict[str, Any]:
    """The settings of SAPO and VESPO, which have the same names in TRL, Liger and this package."""
    defaults = {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
    defaults |= {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}
    return {name: options.take(name, default) for name, default in defaults.items()}


# TRL, Liger, ms-swift -------------------------------------------------------------------------------------------------------------------


def trl_loss_config(options: LibraryOptions) -> LossConfig:
    """The options of TRL's GRPOConfig."""
    loss_type = options.loss_type("dapo", ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"))
    epsilon = options.take("epsilon", 0.2)
    epsilon_high = options.take_or("epsilon_high", epsilon)
    delta: float | None = options.take("delta", None)
    return LossConfig(
        loss_type=loss_type,
        epsilon_low=epsilon,
        epsilon_high=epsilon_high,  # for CISPO this is the bound of the ratio itself
        delta=delta if _clips(loss_type) else None,  # TRL ignores it with the other losses
        beta=options.take("beta", 0.0),
        bias_corrected_kl=options.take("use_bias_correction_kl", True),
        entropy_coef=options.take("entropy_coef", 0.0),
        entropy_aggregation="token_mean",  # for every loss type
        importance_sampling_level=options.take("importance_sampling_level", "token"),  # with LUSPO too, unlike its paper
        **_sapo_and_vespo_settings(options),
        max_completion_length=options.take("max_completion_length", 512),
    )


def liger_loss_config(options: LibraryOptions) -> LossConfig:
    """The options of LigerFusedLinearGRPOLoss; those of triton_grpo_loss have other defaults (eps_high 0.4)."""
    loss_type = options.loss_type("dapo", ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"))
    level = options.take("importance_sampling_level", "token")
    if level == "sequence" and not _clips(loss_type):
        options.refuse("importance_sampling_level", level, f"expected 'token' with loss_type={loss_type!r}, as Liger does.")
    delta: float | None = options.take("delta", None)
    length: int | None = options.take("max_completion_length", None)
    if loss_type == "dr_grpo" and length is None:
        options.refuse("max_completion_length", length, "expected an int with loss_type='dr_grpo': pass the generation limit of the run.")
    use_ref_model, beta = options.take("use_ref_model", True), options.take("beta", 0.04)
    for name, default in (("compiled", True), ("chunk_size", 1)):  # they do not change the result
        options.take(name, default)
    return LossConfig(
        loss_type=loss_type,
        epsilon_low=options.take("epsilon_low", 0.2),
        epsilon_high=options.take("epsilon_high", 0.2),
        delta=delta,
        beta=beta if use_ref_model else 0.0,
        bias_corrected_kl=options.take("use_bias_correction_kl", False),
        importance_sampling_level=level,
        **_sapo_and_vespo_settings(options),
        max_completion_length=length,
    )


def swift_loss_config(options: LibraryOptions) -> LossConfig:
    """The options of ms-swift's GRPO arguments."""
    loss_type = options.loss_type("grpo", ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"))
    epsilon = options.take("epsilon", 0.2)
    epsilon_high = options.take_or("epsilon_high", epsilon)
    delta: float | None = options.take("delta", None)
    kl_in_reward = options.take("kl_in_reward", False)
    beta = options.take("beta", 0.04)
    beta = 0.0 if kl_in_reward else beta
    if options.take("rollout_importance_sampling_mode", None) is not None and beta != 0:
        options.refuse(
            "rollout_importance_sampling_mode",
            options.given["rollout_importance_sampling_mode"],
            "expected None with a KL in the loss: ms-swift multiplies the KL by the sampler correction too, and this package, as TRL and "
            "Liger, does not. Pass beta=0.0 or kl_in_reward=True, or leave this option out and pass rollout_weights= to the call.",
        )
    _refuse_capped_kl(options, "beta", beta, "expected 0: ms-swift caps the estimate of a token at 10 nats and its log-ratio at 20")
    return LossConfig(
        loss_type=loss_type,
        epsilon_low=epsilon,
        epsilon_high=epsilon_high,
        delta=delta if _clips(loss_type) else None,
        beta=beta,
        importance_sampling_level=options.take("importance_sampling_level", "token"),
        sapo_temperature_pos=options.take("tau_pos", 1.0),
        sapo_temperature_neg=options.take("tau_neg", 1.05),
        max_completion_length=options.take("max_completion_length", 512),
    )


# verl and OpenRLHF: a mean over sequences leaves fully masked ones out; KL and entropy are averaged like the surrogate -----------------


_VERL_LOSSES = {  # loss_mode -> loss type and level of the ratio
    "vanilla": ("dapo", "token"),
    "gspo": ("gspo", "sequence_token"),
    "sapo": ("sapo", "token"),
    "cispo": ("cispo", "token"),
    "gpg": ("reinforce", "token"),
    "geo_mean": ("gmpo", "sequence"),
    "dppo_tv": ("dppo_tv", "token"),
    "dppo_kl": ("dppo_kl", "token"),
}


def verl_loss_config(options: LibraryOptions) -> LossConfig:
    """The options of verl's ActorConfig and of its policy_loss (loss_mode)."""
    mode = options.loss_type("vanilla", tuple(_VERL_LOSSES), "loss_mode")
    clip_ratio = options.take("clip_ratio", 0.2)
    low = options.take_or("clip_ratio_low", clip_ratio)
    high = options.take_or("clip_ratio_high", clip_ratio)
    dual_clip: float | None = options.take("clip_ratio_c", 3.0)
    use_kl_loss, kl_type = options.take("use_kl_loss", False), options.take("kl_loss_type", "low_var_kl")
    kl_coef = options.take("kl_loss_coef", 0.001)
    beta = kl_coef if use_kl_loss else 0.0
    kl_estimator = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}.get(kl_type)
    if beta != 0 and kl_estimator is None:
        options.refuse("kl_loss_type", kl_type, "expected kl, mse or low_var_kl (k1, k2, k3): the others have no counterpart here.")
    if kl_estimator == "k3":
        _refuse_capped_kl(options, "kl_loss_type", beta, "expected 'mse' or 'kl': verl caps low_var_kl of a token at 10 nats", got=kl_type)
    else:
        options.take("uncapped_kl", False)
    loss_type, level = _VERL_LOSSES[mode]
    aggregation = _verl_aggregation(options, "seq-mean-token-mean" if mode == "sapo" else None)
    if mode == "geo_mean":
        aggregation = "sequence_mean"  # for every loss_agg_mode, over all sequences
    divergences: dict[str, Any] = (
        {"dppo_mask_low": low, "dppo_mask_high": high, "dppo_ratio_max": dual_clip} if mode.startswith("dppo_") else {}
    )
    return LossConfig(
        loss_type=loss_type,
        epsilon_low=low,
        epsilon_high=1 + high if mode == "cispo" else high,
        cispo_ratio_low=max(1 - low, 0.0) if mode == "cispo" else 0.0,
        **divergences,
        dual_clip=dual_clip if mode == "vanilla" else None,  # verl always applies it
        beta=beta,
        kl_estimator=kl_estimator or "k3",
        entropy_coef=options.take("entropy_coeff", 0.0),
        importance_sampling_level=level,
        aggregation=aggregation,
        log_ratio_clamp=10.0 if mode == "gspo" else 20.0,
        sapo_temperature_pos=options.take("tau_pos", 1.0),
        sapo_temperature_neg=options.take("tau_neg", 1.05),
    )


def _verl_aggregation(options: LibraryOptions, forced: str | None) -> str:
    mode = options.take("loss_agg_mode", "token-mean")
    factor: float | None = options.take("loss_scale_factor", None)
    mode = forced or mode
    if mode == "seq-mean-token-sum-norm":
        options.refuse(
            "loss_agg_mode",
            mode,
            "expected another: its mean is over the sequences that are not masked and divides by a length as well. Take "
            "'seq-mean-token-sum' and pass loss_scale=1 / loss_scale_factor to the call.",
        )
    if factor is not None:
        options.refuse("loss_scale_factor", factor, "expected None with this loss_agg_mode, which does not use it.")
    aggregations = {
        "token-mean": "global_token_mean",  # pass num_items= (the optimiser step's token count / dp_size)
        "token-sum": "global_token_mean",  # pass num_items=1 and loss_scale=dp_size
        "seq-mean-token-mean": "nonempty_sequence_mean",
        "seq-mean-token-sum": "nonempty_sequence_sum",
    }
    if mode not in aggregations:
        options.refuse("loss_agg_mode", mode, f"expected one of {', '.join(aggregations)}.")
    return aggregations[mode]


def openrlhf_loss_config(options: LibraryOptions) -> LossConfig:
    """The options of PolicyLoss, and those of the KL: kl_coef (init_coef with use_loss) and kl_estimator."""
    policy_loss_type = options.loss_type("ppo", ("ppo", "gspo"), "policy_loss_type")
    correction = options.take("is_correction_level", "off")
    if correction != "off":
        options.refuse(
            "is_correction_level",
            correction,
            "expected 'off': pass rollout_weights= to the call. grpo_fast.integrations.openrlhf.PolicyLoss has the corrections.",
        )
    for name in ("is_correction_mode", "is_correction_gating", "is_correction_threshold"):
        options.take(name, None)
    beta = options.take("kl_coef", 0.0)
    kl_estimator = options.take("kl_estimator", "k1")
    if options.take("unbiased_gradient", False):
        options.refuse("unbiased_gradient", True, "expected False. Fix: kl_estimator='k2' has that gradient.")
    _refuse_capped_kl(options, "kl_coef", beta, "expected 0: OpenRLHF caps the estimate of a token at 10 nats")
    token_level = options.take("token_level_loss", True)
    return LossConfig(
        loss_type="gspo" if policy_loss_type == "gspo" else "dapo",
        epsilon_low=options.take("clip_eps_low", 0.2),
        epsilon_high=options.take("clip_eps_high", 0.2),
        dual_clip=options.take("dual_clip", None),
        beta=beta,
        kl_estimator=kl_estimator,
        entropy_coef=options.take_or("entropy_coef", 0.0),
        aggregation="global_token_mean" if token_level and policy_loss_type == "ppo" else "nonempty_sequence_mean",
    )


def prime_rl_loss_config(options: LibraryOptions) -> LossConfig:
    """The options of prime-rl's default loss (DefaultLossConfig): DPPO-TV and the squared log-ratio to the sampler, whose log-probabilities
    are ``old_logprobs``. prime-rl divides the sum over the tokens by its own scale: ``num_items=``.
    """
    tau = options.take("adv_tau", 1.0)
    if tau != 1:
        options.refuse("adv_tau", tau, "expected 1.0: multiply the advantages by it.")
    teacher = options.take("teacher_tau", 0.0)
    if teacher != 0:
        options.refuse("teacher_tau", teacher, "expected 0.0: add its log-ratio to the teacher to the advantages.")
    return LossConfig(
        loss_type="dppo_tv",
        dppo_mask_low=options.take("dppo_mask_low", 0.2),
        dppo_mask_high=options.take("dppo_mask_high", 0.2),
        squared_log_ratio_coef=options.take("kl_tau", 1e-3),
    )


def _refuse_capped_kl(options: LibraryOptions, name: str, beta: float, why: str, got: object = None) -> None:
    """Raise a ValueError for a KL that the library caps, unless the caller omits the cap with uncapped_kl=True."""
    if not options.take("uncapped_kl", False) and beta != 0:
        why += ", which LossConfig does not do. Fix: uncapped_kl=True leaves the cap out."
        options.refuse(name, beta if got is None else got, why)


def _clips(loss_type: str) -> bool:
    return loss_type not in ("cispo", "sapo", "vespo")
