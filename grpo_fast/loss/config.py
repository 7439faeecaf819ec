"""The settings of the loss: the frozen dataclass LossConfig, and the table of loss types.

A loss type is a row ``(surrogate, ratio level, aggregation)`` of ``LOSS_TYPES``. The kernels get the number of the surrogate, the settings
whose field says ``KERNEL``, and one weight per token, computed from the aggregation. CONTRIBUTING.md explains how to add a loss.
"""

from __future__ import annotations

import difflib
import math
import numbers
import sys
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

from grpo_fast.loss.custom_surrogate import CustomSurrogate, Surrogate
from grpo_fast.utils.load_object import load_object
from grpo_fast.utils.warn import warn

__all__ = ["AGGREGATIONS", "CUSTOM", "KL_ESTIMATORS", "LEVELS", "LOSS_TYPES", "SURROGATES", "LossConfig", "LossRow"]

# The kernels get the position of a name. New names go to the end; then run python tools/generate_loss_settings.py.
SURROGATES = ("clip", "cispo", "sapo", "reinforce", "vespo", "dppo_tv", "dppo_kl", "gmpo")
KL_ESTIMATORS = ("k1", "k2", "k3")
LEVELS = ("token", "sequence", "sequence_token")
AGGREGATIONS = (
    "sequence_mean",
    "token_mean",
    "global_token_mean",
    "fixed_length",
    "sequence_sum",
    "nonempty_sequence_mean",
    "nonempty_sequence_sum",
)
ENTROPY_AGGREGATIONS = ("same", "token_mean")
KERNEL = {"kernel": True}  # metadata of the fields of LossConfig that the kernels take
_REAL: tuple[type, ...] = (int, float, numbers.Real)  # numbers.Real includes NumPy's scalars
# Names under which other libraries, or other functions of this package, know a setting.
_OTHER_NAMES = {
    "epsilon": "epsilon_low and epsilon_high",
    "eps": "epsilon_low and epsilon_high",
    "clip_range": "epsilon_low and epsilon_high",
    "clip_ratio": "epsilon_low and epsilon_high (settings of verl: LossConfig.like('verl', clip_ratio=...))",
    "clip_ratio_low": "epsilon_low",
    "clip_ratio_high": "epsilon_high",
    "kl_coef": "beta",
    "kl_beta": "beta",
    "kl_type": "kl_estimator",
    "kl_tau": "squared_log_ratio_coef",
    "entropy_coeff": "entropy_coef",
    "loss_agg_mode": "aggregation",
    "loss_mode": "loss_type",
    "temperature": "the argument temperature of grpo_loss: it is not a setting of the loss, and may differ from call to call",
    "num_items": "the argument num_items of grpo_loss",
    "num_generations": "the argument group_size of group_advantages",
    "scale_rewards": "the argument scale of group_advantages",
}
LARGEST_LOG_RATIO = 80  # exp(88.8) overflows float32

_warned_cispo_bounds: set[float] = set()  # bounds below 1 for which the warning has been given


class LossRow(NamedTuple):
    """A row of LOSS_TYPES: the three parts of a loss type."""

    surrogate: str  # per-token objective, one of SURROGATES
    level: str  # of the importance ratio, one of LEVELS
    aggregation: str  # the weights of the tokens, one of AGGREGATIONS


LOSS_TYPES: dict[str, LossRow] = {
    "grpo": LossRow("clip", "token", "sequence_mean"),  # DeepSeekMath, arXiv:2402.03300
    "bnpo": LossRow("clip", "token", "token_mean"),  # TRL's name for the mean over the tokens of the local batch
    "dr_grpo": LossRow("clip", "token", "fixed_length"),  # Dr. GRPO, arXiv:2503.20783
    "dapo": LossRow("clip", "token", "global_token_mean"),  # DAPO, arXiv:2503.14476
    "cispo": LossRow("cispo", "token", "global_token_mean"),  # MiniMax-M1, arXiv:2506.13585
    "sapo": LossRow("sapo", "token", "sequence_mean"),  # SAPO, arXiv:2511.20347
    "luspo": LossRow("clip", "sequence", "sequence_sum"),  # LUSPO, arXiv:2602.05261
    "vespo": LossRow("vespo", "token", "global_token_mean"),  # VESPO, arXiv:2602.10693 (sequence-level weight, token-level gradient)
    "gspo": LossRow("clip", "sequence", "sequence_mean"),  # GSPO, arXiv:2507.18071
    "gmpo": LossRow("gmpo", "sequence", "sequence_mean"),  # GMPO, arXiv:2507.20673
    "dppo_tv": LossRow("dppo_tv", "token", "global_token_mean"),  # DPPO with a binary total variation, arXiv:2602.04879
    "dppo_kl": LossRow("dppo_kl", "token", "global_token_mean"),  # DPPO with a binary KL divergence, arXiv:2602.04879
    "reinforce": LossRow("reinforce", "token", "global_token_mean"),  # no ratio at all: -A log p
}
CUSTOM = "custom"  # the loss type whose surrogate is a function of the user; the kernels do not know it
_CUSTOM_ROW = LossRow(CUSTOM, "token", "global_token_mean")


@dataclass(frozen=True)
class LossConfig:
    """Settings of the loss: immutable, hashable, checked on construction.

    Args:
        loss_type: a name of ``LOSS_TYPES``, which sets surrogate, ratio level and aggregation; or ``"custom"``: the surrogate is a function
            of yours, at the level ``"token"`` with ``"global_token_mean"`` unless set otherwise.
        epsilon_low: the ratio is clipped below ``1 - epsilon_low``. With ``"custom"``, epsilon_low and epsilon_high have no effect on the
            loss: they bound the range of which the metrics ``clip_low`` and ``clip_high`` report the tokens outside.
        epsilon_high: the ratio is clipped above ``1 + epsilon_high``. With ``loss_type="cispo"`` it is the raw upper bound of the ratio
            (as in TRL and MiniMax-M1), so 5.0 rather than 0.2; a bound below 1 reduces every ratio and gives a warning. With
            ``loss_type="gmpo"`` epsilon_low and epsilon_high bound the log-ratio of a token: the ratio is clipped below
            ``exp(-epsilon_low)`` where the advantage is negative, and above ``exp(epsilon_high)`` where it is positive; the paper has 0.4.
        delta: upper bound of the unclipped ratio, ``> 1 + epsilon_high`` (two-sided clipping, INTELLECT-2, arXiv:2505.07291).
        dual_clip: bound ``c > 1`` of the loss of a negative advantage: at most ``-c * A`` (Dual-clip PPO, arXiv:1912.09729).
        beta: weight of the KL penalty against the reference policy; 0 needs no ``ref_logprobs``.
        kl_estimator: ``"k1"``, ``"k2"`` or ``"k3"`` (http://joschu.net/blog/kl-approx.html).
        bias_corrected_kl: multiply the estimator by the (differentiable) importance ratio: the unbiased reverse-KL gradient of
            DeepSeek-V3.2, arXiv:2512.02556, section 3.1.
        entropy_coef: weight of the entropy bonus, subtracted from the loss.
        entropy_aggregation: ``"same"`` gives each token's entropy the weight that the token has in the loss; ``"token_mean"`` is the mean
            over the batch's unmasked tokens for every loss type, as in TRL.
        importance_sampling_level: ``"token"``, ``"sequence"`` (GSPO) or ``"sequence_token"`` (GSPO-token); None = that of the loss type.
        aggregation: a name of ``AGGREGATIONS``; None = that of the loss type.
        log_ratio_clamp: every log-ratio is clamped to ``±log_ratio_clamp`` before ``exp`` (and has no gradient beyond).
        sapo_temperature_pos: SAPO's temperature for a positive advantage.
        sapo_temperature_neg: SAPO's temperature for an advantage of 0 or less.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: VESPO's shape parameters for ``A >= 0`` and ``A < 0``, at least 0:
            with a negative k its weight W^k exp(lambda (1 - W)) would grow without bound where W goes to 0.
        dppo_mask_low: DPPO (arXiv:2602.04879) drops a token with a negative advantage whose probability fell by more than this divergence
            from the old policy; 0.2 as in prime-rl and verl. The divergence compares the sampled token with all others as one:
            ``loss_type="dppo_tv"`` measures the total variation ``|p - p_old|`` (the authors train with 0.15), ``"dppo_kl"`` the KL
            divergence of the two Bernoulli distributions in nats (0.05).
        dppo_mask_high: the same for a positive advantage and a probability that rose.
        cispo_ratio_low: the lower bound of CISPO's ratio, the bound itself as is epsilon_high: ``1 - clip_ratio_low`` of verl and slime, 0
            (no bound) in MiniMax-M1 (arXiv:2506.13585).
        dppo_ratio_max: with a number, DPPO's loss is ``-min(r, dppo_ratio_max) A log p`` for the tokens that are not dropped, the ratio r
            being a constant: verl's form, whose gradient is that of ``-r A`` up to the bound. None: ``-r A``.
        squared_log_ratio_coef: weight of ``(log p - log p_old)^2``, which is added to the loss of every unmasked token: the regularizer of
            Kimi-K2.5 (arXiv:2602.02276, tau there) against the policy that sampled, and ``kl_tau`` of prime-rl. ``old_logprobs`` are then
            the sampler's; without them the term is 0.
        max_completion_length: the fixed length of ``"fixed_length"`` (Dr. GRPO), in tokens; required there.
        surrogate: with ``"custom"``, a function that returns the loss of each token, or the name of one, ``"package.module:function"`` or
            ``"path/to/file.py:function"``. Its parameters name its inputs, each ``[n]`` with one number per token, float32 (float64 in the
            reference): ``ratio``, ``logprobs`` and ``entropy``, through which the gradient flows; ``advantages``, ``old_logprobs``,
            ``ref_logprobs`` and ``rollout_weights``; and any name in ``surrogate_inputs``, an argument of the loss. A function that takes
            ``rollout_weights`` applies them itself; else the loss multiplies by them. Other parameters need a default. It must treat
            each token by itself, without randomness. docs/custom-loss.md has examples. With another loss type None; the attribute is then
            the name of the built-in surrogate.
        zero_advantage_loss: with ``"custom"``, whether the surrogate has a loss or a gradient where the advantage is 0, so that such tokens
            must be computed; None = found by evaluating the function.

    Raises:
        ValueError: a setting is out of range or does not fit the loss type; the message names the setting, its value, what was expected
            and the fix.
        TypeError: a setting has the wrong type.

    Example:
        >>> LossConfig(loss_type="gspo", epsilon_low=3e-4, epsilon_high=4e-4).level
        'sequence'
    """

    loss_type: str = field(default="dapo", metadata={"names": (*LOSS_TYPES, CUSTOM)})
    epsilon_low: float = field(default=0.2, metadata=KERNEL)
    epsilon_high: float = field(default=0.2, metadata=KERNEL)
    delta: float | None = field(default=None, metadata=KERNEL)
    dual_clip: float | None = field(default=None, metadata=KERNEL)
    beta: float = field(default=0.0, metadata=KERNEL)
    kl_estimator: str = field(default="k3", metadata={**KERNEL, "names": KL_ESTIMATORS})
    bias_corrected_kl: bool = field(default=False, metadata=KERNEL)
    entropy_coef: float = field(default=0.0, metadata=KERNEL)
    entropy_aggregation: str = field(default="same", metadata={"names": ENTROPY_AGGREGATIONS})
    importance_sampling_level: str | None = field(default=None, metadata={"names": LEVELS})
    aggregation: str | None = field(default=None, metadata={"names": AGGREGATIONS})
    log_ratio_clamp: float = field(default=20.0, metadata=KERNEL)
    sapo_temperature_pos: float = field(default=1.0, metadata=KERNEL)
    sapo_temperature_neg: float = field(default=1.05, metadata=KERNEL)
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    dppo_mask_low: float = field(default=0.2, metadata=KERNEL)
    dppo_mask_high: float = field(default=0.2, metadata=KERNEL)
    max_completion_length: int | None = None
    surrogate: str | Surrogate | None = None
    zero_advantage_loss: bool | None = None
    cispo_ratio_low: float = field(default=0.0, metadata=KERNEL)
    dppo_ratio_max: float | None = field(default=None, metadata=KERNEL)
    squared_log_ratio_coef: float = field(default=0.0, metadata=KERNEL)
    custom: ClassVar[CustomSurrogate | None] = None  # what is known of a custom surrogate; set on the instance

    def __new__(cls, *settings: object, **named: object) -> LossConfig:
        """Raise a TypeError for an unknown setting that suggests a known one; the message of a dataclass names the unknown one only."""
        known = [name for name in cls.__dataclass_fields__ if name != "custom"]  # torch.compile does not trace fields()
        for name in named:
            if name not in known:
                near = _OTHER_NAMES.get(name) or ", ".join(difflib.get_close_matches(name, known, n=2, cutoff=0.6))
                hint = f"Did you mean {near}?" if near else f"The settings are {', '.join(known)}."
                raise TypeError(f"LossConfig has no setting {name!r}. {hint}")
        if "surrogate" in named and len(named) < len(known):  # replace() gives all, with the name that is set below
            _check_surrogate(named["surrogate"], named.get("loss_type", settings[0] if settings else "dapo"))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _one_of("loss_type", self.loss_type, (*LOSS_TYPES, CUSTOM))
        self._set_surrogate()
        _one_of("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        _one_of("entropy_aggregation", self.entropy_aggregation, ENTROPY_AGGREGATIONS)
        if self.importance_sampling_level is not None:
            _one_of("importance_sampling_level", self.importance_sampling_level, LEVELS)
        if self.aggregation is not None:
            _one_of("aggregation", self.aggregation, AGGREGATIONS)
        for each in fields(self):
            if each.type in ("float", "float | None"):
                self._set_finite(each.name, optional=each.type == "float | None")
        switch: Any = self.bias_corrected_kl
        if not isinstance(switch, bool):
            raise TypeError(f"LossConfig: bias_corrected_kl is {switch!r} ({type(switch).__name__}); expected True or False.")
        needed: Any = self.zero_advantage_loss
        if needed is not None and not isinstance(needed, bool):
            raise TypeError(f"LossConfig: zero_advantage_loss is {needed!r} ({type(needed).__name__}); expected True, False or None.")
        self._check_ranges()
        self._check_combinations()
        self._warn_of_cispo_bound()

    def _set_surrogate(self) -> None:
        """Set ``surrogate`` to the name of the built-in one or to the custom function, and ``custom`` to what is known of the latter."""
        given, custom = self.surrogate, None
        if self.loss_type != CUSTOM:
            if not isinstance(given, str):
                _check_surrogate(given, self.loss_type)
            surrogate: str | Surrogate = _row_of(self.loss_type).surrogate
        else:
            function = load_object(given, by="LossConfig: surrogate") if isinstance(given, str) else given
            custom = CustomSurrogate.of(function)  # type: ignore[arg-type]  # which rejects None
            surrogate = custom.function
        object.__setattr__(self, "surrogate", surrogate)
        object.__setattr__(self, "custom", custom)

    def _set_finite(self, name: str, *, optional: bool) -> None:
        value: Any = getattr(self, name)
        if value is None and optional:
            return
        is_number = isinstance(value, _REAL) and not isinstance(value, bool)
        if not is_number:
            raise TypeError(f"LossConfig: {name} is {value!r} ({type(value).__name__}); expected a number{' or None' if optional else ''}.")
        if not isinstance(value, (int, float)):  # a NumPy scalar
            value = float(value)
            object.__setattr__(self, name, value)
        _require(abs(value) < math.inf and abs(value) <= sys.float_info.max, name, value, "a finite number")

    def _check_ranges(self) -> None:
        vespo = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
        others = ("dppo_mask_low", "dppo_mask_high", "cispo_ratio_low", "squared_log_ratio_coef")
        for name in ("epsilon_low", "epsilon_high", "beta", *vespo, *others):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "a number >= 0")
        for name in ("log_ratio_clamp", "sapo_temperature_pos", "sapo_temperature_neg"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a number > 0")
        most = f"at most {LARGEST_LOG_RATIO}, since exp(88.8) overflows float32"
        _require(self.log_ratio_clamp <= LARGEST_LOG_RATIO, "log_ratio_clamp", self.log_ratio_clamp, most)
        if self.surrogate == "clip" or self.custom is not None:
            _require(self.epsilon_low <= 1, "epsilon_low", self.epsilon_low, "at most 1: a ratio is never below 0")
        if self.max_completion_length is not None:
            length: Any = self.max_completion_length
            is_int = isinstance(length, (int, numbers.Integral)) and not isinstance(length, bool)
            _require(is_int and length > 0, "max_completion_length", length, "an int > 0")
            if not isinstance(length, int):
                object.__setattr__(self, "max_completion_length", int(length))

    def _check_combinations(self) -> None:
        if self.surrogate != "clip":
            for name in ("delta", "dual_clip"):
                value, fix = getattr(self, name), f"Fix: drop {name}, or take a loss_type that clips (grpo, dapo, gspo ...)"
                _require(value is None, name, value, f"None with loss_type={self.loss_type!r}, which does not clip the ratio. {fix}")
        if self.delta is not None:
            _require(self.delta > 1 + self.epsilon_high, "delta", self.delta, f"more than 1 + epsilon_high = {1 + self.epsilon_high:g}")
        if self.dual_clip is not None:
            _require(self.dual_clip > 1, "dual_clip", self.dual_clip, "more than 1 (3.0 is usual)")
        if self.surrogate in ("vespo", "reinforce"):
            fix = f"Fix: leave importance_sampling_level unset with loss_type={self.loss_type!r}: it has no ratio with a level"
            _require(self.level == "token", "importance_sampling_level", self.level, f"'token'. {fix}")
        if self.surrogate == "cispo":
            most = min(1.0, self.epsilon_high)
            expected = f"at most {most:g}: the lower bound of the ratio is neither above 1 nor above epsilon_high"
            _require(self.cispo_ratio_low <= most, "cispo_ratio_low", self.cispo_ratio_low, expected)
        if self.dppo_ratio_max is not None:
            _require(self.dppo_ratio_max >= 1, "dppo_ratio_max", self.dppo_ratio_max, "at least 1, or None for no bound")
        if self.surrogate == "gmpo":
            fix = "Fix: leave importance_sampling_level unset with loss_type='gmpo': its ratio is the geometric mean over the sequence"
            _require(self.level == "sequence", "importance_sampling_level", self.level, f"'sequence'. {fix}")
        if self.surrogate in ("dppo_tv", "dppo_kl"):
            fix = f"Fix: leave importance_sampling_level unset with loss_type={self.loss_type!r}: it compares single probabilities"
            _require(self.level == "token", "importance_sampling_level", self.level, f"'token'. {fix}")
        if self.resolved_aggregation == "fixed_length":
            fix = "Fix: set max_completion_length to the generation limit of the run: the scale of the loss is then the same in every batch"
            _require(self.max_completion_length is not None, "max_completion_length", None, f"an int for a fixed-length mean. {fix}")

    def _warn_of_cispo_bound(self) -> None:
        """Warn once per bound. LossConfig.like gives no warning."""
        if self.surrogate == "cispo" and self.epsilon_high < 1 and self.epsilon_high not in _warned_cispo_bounds:
            _warned_cispo_bounds.add(self.epsilon_high)
            warn(
                f"LossConfig: epsilon_high is {self.epsilon_high:g} with loss_type='cispo', where it is the bound of the ratio itself, not "
                "its distance from 1: every ratio becomes at most that. 5.0 is usual.",
                UserWarning,
            )

    @classmethod
    def like(cls, library: str, **options: Any) -> LossConfig:
        """Return the settings that correspond to another library's options, with its names, defaults and conventions.

        Args:
            library: ``"trl"`` (1.15, 1.16), ``"liger"`` (0.8.1 to 0.8.5), ``"verl"`` (0.9.1), ``"openrlhf"`` (0.11.2), ``"swift"``
                (ms-swift 4.6.0) or ``"prime-rl"`` (its default loss since 2026). It need not be installed.
            options: the library's loss options; those not given have the library's defaults. grpo_fast/integrations/loss_options.py lists
                them and the settings they become. ``uncapped_kl=True`` omits the cap that some libraries put on the KL estimate and that
                LossConfig does not have (required for ms-swift's default).

        Raises:
            ValueError: an option is unknown, is an argument of the call rather than a setting, or has no counterpart here; the message
                names it and the fix.
            ImportError: the library is installed in another version.

        Example:
            >>> LossConfig.like("verl", clip_ratio_high=0.28).dual_clip
            3.0
        """
        from grpo_fast.integrations.conventions import loss_config  # imported here because that module imports this class

        return loss_config(library, options)

    @property
    def surrogate_weighs(self) -> bool:
        """Whether the surrogate applies the rollout weights itself; the loss then does not multiply by them."""
        return self.surrogate == "vespo" or (self.custom is not None and "rollout_weights" in self.custom.names)

    @property
    def needs_all_tokens(self) -> bool:
        """Whether every unmasked token can change the gradient, also one with an advantage of 0."""
        return self.beta != 0 or self.entropy_coef != 0 or self.squared_log_ratio_coef != 0 or not self.skips_zero_advantages

    @property
    def skips_zero_advantages(self) -> bool:
        """Whether tokens with an advantage of 0 cannot change the gradient of the surrogate."""
        if self.custom is None:
            return True
        return not (self.custom.zero_advantage_loss if self.zero_advantage_loss is None else self.zero_advantage_loss)

    @property
    def level(self) -> str:
        """The level of the importance ratio, a name of ``LEVELS``."""
        return self.importance_sampling_level or _row_of(self.loss_type).level

    @property
    def resolved_aggregation(self) -> str:
        """The aggregation, a name of ``AGGREGATIONS``: ``aggregation``, or else that of the loss type."""
        return self.aggregation or _row_of(self.loss_type).aggregation


def _row_of(loss_type: str) -> LossRow:
    return _CUSTOM_ROW if loss_type == CUSTOM else LOSS_TYPES[loss_type]


def _check_surrogate(surrogate: object, loss_type: object) -> None:
    if surrogate is not None and loss_type != CUSTOM:
        fix = f"Fix: loss_type={CUSTOM!r} for a function of yours; a built-in surrogate is chosen by loss_type"
        raise ValueError(f"LossConfig: surrogate is {surrogate!r} with loss_type={loss_type!r}; expected None. {fix}.")


def _require(ok: bool, name: str, value: Any, expected: str) -> None:
    if not ok:
        raise ValueError(f"LossConfig: {name} is {value!r}; expected {expected}.")


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"LossConfig: {name} is {value!r} ({type(value).__name__}); expected one of the names {', '.join(allowed)}.")
    _require(value in allowed, name, value, f"one of {', '.join(allowed)}")
