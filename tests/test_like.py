"""LossConfig.like means what each library means: the library's own function and ours, on the same log-probabilities."""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peers import needs_trl, peer_methods, peer_module
from policy_batch import assert_same, poisoned, policy_batch, value_and_gradient
from torch import Tensor

import grpo_fast as gf
from grpo_fast.integrations.conventions import LIBRARIES, advantage_settings, rollout_settings
from grpo_fast.integrations.logprobs import logprob_loss
from grpo_fast.loss.config import LossConfig

TOLERANCE = 1e-9  # float64; their k3 cancels where ours does not


def ours(batch: dict[str, Tensor], config: LossConfig, **call: Any) -> tuple[Tensor, Tensor]:
    given = poisoned(batch)
    return value_and_gradient(
        lambda logprobs: logprob_loss(
            logprobs,
            given["advantages"],
            config=config,
            mask=given["mask"],
            entropy=given["entropy"],
            old_logprobs=given["old"],
            ref_logprobs=given["ref"] if config.beta != 0 else None,
            **call,
        ),
        given["logprobs"],
    )


# TRL ------------------------------------------------------------------------------------------------------------------------------------

TRL_CASES: list[dict[str, Any]] = [
    {},
    {"loss_type": "luspo"},  # with ratios of tokens by default
    {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.1},
    {"loss_type": "cispo", "epsilon_high": 1.2, "delta": 1.5},  # delta is not looked at
    {"loss_type": "grpo", "beta": 0.3},  # the KL is corrected by the ratio
    {"loss_type": "bnpo", "beta": 0.3, "use_bias_correction_kl": False, "delta": 1.6},
    {"loss_type": "sapo", "sapo_temperature_neg": 1.5},
    {"loss_type": "vespo", "vespo_k_pos": 1.5},
    {"loss_type": "dr_grpo", "max_completion_length": 7, "epsilon_high": 0.3},
    {"loss_type": "grpo", "entropy_coef": 0.2},  # the entropy is averaged over tokens
]


@needs_trl
@pytest.mark.parametrize("options", TRL_CASES, ids=lambda options: "-".join(map(str, options.values())) or "defaults")
def test_trl(options: dict[str, Any], generator: torch.Generator) -> None:
    from trl import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    batch = policy_batch(generator)
    args = GRPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **options)

    def theirs(logprobs: Tensor) -> Tensor:
        stand_in = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, batch["entropy"], None),
            get_gamma_weights=GRPOTrainer.get_gamma_weights,
            model=SimpleNamespace(training=True),
            accelerator=SimpleNamespace(num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x),
            args=SimpleNamespace(**{**vars(args), "steps_per_generation": 1}),
            epsilon_low=args.epsilon,
            epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
            current_gradient_accumulation_steps=1,
            _entropy_bonus_enabled=args.entropy_coef != 0,
            aux_loss_enabled=False,
            _metrics={"train": _Discard()},
            **{name: getattr(args, name) for name in ("loss_type", "importance_sampling_level", "beta", "max_completion_length")},
            **{name: getattr(args, name) for name in ("entropy_coef", "use_adaptive_entropy", "top_entropy_quantile", "use_vllm")},
            off_policy_mask_threshold=None,
            vllm_importance_sampling_correction=False,
        )
        inputs = {
            "prompt_ids": torch.zeros(6, 2, dtype=torch.int64),
            "prompt_mask": torch.ones(6, 2, dtype=torch.int64),
            "completion_ids": torch.zeros(6, 5, dtype=torch.int64),
            "completion_mask": batch["mask"].long(),
            "advantages": batch["advantages"],
            "old_per_token_logps": batch["old"],
            "ref_per_token_logps": batch["ref"],
            "num_items_in_batch": torch.tensor(19),
        }
        return GRPOTrainer._compute_loss(stand_in, stand_in.model, inputs)

    expected = value_and_gradient(theirs, batch["logprobs"])
    assert_same(ours(batch, LossConfig.like("trl", **options), num_items=19), expected, batch["mask"], TOLERANCE)


class _Discard(dict):
    def __missing__(self, key: str) -> Any:
        return []


# Liger ----------------------------------------------------------------------------------------------------------------------------------

LIGER_CASES: list[dict[str, Any]] = [
    {},
    {"loss_type": "grpo", "beta": 0.0, "delta": 1.5},
    {"loss_type": "bnpo", "use_bias_correction_kl": True, "beta": 0.3},
    {"loss_type": "cispo", "epsilon_high": 1.2},
    {"loss_type": "sapo", "sapo_temperature_pos": 1.5},
    {"loss_type": "vespo", "vespo_lambda_neg": 1.5},
    {"loss_type": "dr_grpo", "max_completion_length": 7},
    {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.0, "epsilon_low": 0.1},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.3, "use_bias_correction_kl": True},
]


@pytest.mark.parametrize("options", LIGER_CASES, ids=lambda options: "-".join(map(str, options.values())) or "defaults")
def test_liger(options: dict[str, Any], generator: torch.Generator) -> None:
    liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", reason="liger-kernel is not installed")
    batch = policy_batch(generator)
    settings = {"beta": 0.04, "epsilon_low": 0.2, "epsilon_high": 0.2, "loss_type": "dapo", **options}
    expected = value_and_gradient(
        lambda logprobs: liger.LigerFusedLinearGRPOFunction.ppo_loss_fn(
            logprobs, batch["mask"].double(), batch["advantages"], batch["mask"].double(), batch["ref"], batch["old"], **settings
        )[0],
        batch["logprobs"],
    )
    assert_same(ours(batch, LossConfig.like("liger", **options)), expected, batch["mask"], 1e-6)  # it divides by a float32


# verl -----------------------------------------------------------------------------------------------------------------------------------

VERL_CASES: list[dict[str, Any]] = [
    {},
    {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "loss_agg_mode": "seq-mean-token-mean"},
    {"clip_ratio_c": 1.25, "loss_agg_mode": "seq-mean-token-sum"},
    {"loss_mode": "gspo", "loss_agg_mode": "seq-mean-token-mean", "clip_ratio": 0.05},
    {"loss_mode": "gspo"},
    {"loss_mode": "sapo", "tau_neg": 1.5},
    {"loss_mode": "cispo", "clip_ratio_low": 1.0, "clip_ratio_high": 0.2},
    {"loss_mode": "cispo", "clip_ratio_low": 0.1, "clip_ratio_high": 0.2},
    {"loss_mode": "geo_mean", "clip_ratio_low": 0.1, "clip_ratio_high": 0.15},
    {"loss_mode": "dppo_tv", "clip_ratio_low": 0.02, "clip_ratio_high": 0.01, "clip_ratio_c": 1.2},
    {"loss_mode": "dppo_kl", "clip_ratio_low": 0.002, "clip_ratio_high": 0.001, "clip_ratio_c": 1.2, "loss_agg_mode": "seq-mean-token-sum"},
    {"loss_mode": "gpg"},
    {"use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": "mse", "loss_agg_mode": "seq-mean-token-mean"},
    {"use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": "kl"},
    {"use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": "low_var_kl", "uncapped_kl": True},
]


def verl_core() -> Any:
    return peer_module("verl", "0.9.1", "trainer.ppo.core_algos", ("omegaconf", "tensordict", "verl.trainer.config", "verl.workers.config"))


def verl_actor_config(core: Any, **options: Any) -> Any:
    class ActorConfig(core.ActorConfig):
        clip_ratio, clip_ratio_low, clip_ratio_high, clip_ratio_c, tau_pos, tau_neg = 0.2, None, None, 3.0, 1.0, 1.05

        def __init__(self) -> None:
            self.global_batch_info: dict[str, Any] = {}
            for name, value in options.items():
                setattr(self, name, value)

        def get(self, name: str, default: Any) -> Any:
            return getattr(self, name, default)

    return ActorConfig()


@pytest.mark.parametrize("options", VERL_CASES, ids=lambda options: "-".join(map(str, options.values())) or "defaults")
def test_verl(options: dict[str, Any], generator: torch.Generator) -> None:
    core = verl_core()
    batch = policy_batch(generator)
    mode = options.get("loss_agg_mode", "token-mean")

    def theirs(logprobs: Tensor) -> Tensor:
        loss, _ = core.get_policy_loss_fn(options.get("loss_mode", "vanilla"))(
            batch["old"],
            logprobs,
            batch["advantages"].unsqueeze(1).expand_as(logprobs),
            batch["mask"],
            mode,
            verl_actor_config(core, **options),
        )
        if options.get("use_kl_loss"):
            kl = core.kl_penalty(logprobs, batch["ref"], options["kl_loss_type"])
            loss = loss + options["kl_loss_coef"] * core.agg_loss(kl, batch["mask"], mode)
        return loss

    expected = value_and_gradient(theirs, batch["logprobs"])
    assert_same(ours(batch, LossConfig.like("verl", **options)), expected, batch["mask"], 1e-6)  # |o| + 1e-8, taus in float32


# OpenRLHF -------------------------------------------------------------------------------------------------------------------------------

OPENRLHF_CASES: list[dict[str, Any]] = [
    {},
    {"clip_eps_low": 0.1, "clip_eps_high": 0.3, "dual_clip": 1.25},
    {"token_level_loss": False},
    {"policy_loss_type": "gspo", "clip_eps_low": 0.05, "clip_eps_high": 0.05},
]


@pytest.mark.parametrize("options", OPENRLHF_CASES, ids=lambda options: "-".join(map(str, options.values())) or "defaults")
@pytest.mark.parametrize("kl", [None, "k1", "k2", "k3"])
def test_openrlhf(options: dict[str, Any], kl: str | None, generator: torch.Generator) -> None:
    loss_module = peer_module("openrlhf", "0.11.2", "models.loss", ("deepspeed",))
    utils = peer_module("openrlhf", "0.11.2", "models.utils", ("deepspeed",))
    batch = policy_batch(generator)
    actor_loss = loss_module.PolicyLoss(**options)

    def theirs(logprobs: Tensor) -> Tensor:
        loss = actor_loss(logprobs, batch["old"], batch["advantages"].unsqueeze(1), batch["mask"])[0]
        if kl is not None:
            estimate = utils.compute_approx_kl(logprobs, batch["ref"], kl_estimator=kl)
            loss = loss + 0.3 * loss_module.aggregate_loss(estimate, batch["mask"], token_level_loss=actor_loss.token_level_loss)
        return loss

    settings = {**options, **({} if kl is None else {"kl_coef": 0.3, "kl_estimator": kl, "uncapped_kl": True})}
    expected = value_and_gradient(theirs, batch["logprobs"])
    assert_same(ours(batch, LossConfig.like("openrlhf", **settings)), expected, batch["mask"], 1e-6)  # they compute the KL in float32


# ms-swift ---------------------------------------------------------------------------------------------------------------------------------


def swift(**settings: Any) -> Any:
    """Its trainer's own methods for the loss, on a stand-in for the trainer."""
    methods = (
        "_compute_loss_and_metrics",
        "_undo_gradient_accumulation_scaling",
        "_apply_rollout_importance_sampling",
        "_compute_sequence_level_ratios",
    )
    found = peer_methods(
        "ms-swift",
        "4.6.0",
        "swift/rlhf_trainers/grpo_trainer.py",
        tuple(f"GRPOTrainer.{name}" for name in methods),
        torch=torch,
        nanmin=torch.amin,
        nanmax=torch.amax,
        WINDOW_NORMALIZED_LOSS_TYPES=["cispo", "dapo", "fipo"],
    )
    given: dict[str, Any] = {
        "loss_type": "grpo",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "beta": 0.0,
        "tau_pos": 1.0,
        "tau_neg": 1.05,
        "importance_sampling_level": "token",
        "max_completion_length": 512,
        "delta": None,
        **settings,
    }
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=given.pop("delta"), top_entropy_quantile=1.0, log_entropy=False, gradient_accumulation_steps=1),
        accelerator=SimpleNamespace(num_processes=1, gather_for_metrics=lambda x: x),
        model_accepts_loss_kwargs=False,
        compute_loss_func=None,
        chord_sft_iterator=None,
        off_policy_sequence_mask_delta=None,
        rollout_importance_sampling_mode=None,
        sdar_loss_coef=0.0,
        **dict.fromkeys(("compute_entropy", "overlong_filter", "kl_in_reward", "log_rollout_offpolicy_metrics", "_has_teacher"), False),
        disable_rollout_importance_sampling=True,
        **given,
    )
    for name, method in found.items():
        setattr(trainer, name, functools.partial(method, trainer))
    return trainer


SWIFT_CASES: list[dict[str, Any]] = [
    *({"loss_type": name, "beta": beta} for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo") for beta in (0.0, 0.3)),
    {"delta": 1.5, "epsilon_high": 0.3},
    {"importance_sampling_level": "sequence", "epsilon": 0.05},
    {"importance_sampling_level": "sequence_token", "epsilon": 0.05, "beta": 0.3},
]


@pytest.mark.parametrize("options", SWIFT_CASES, ids=lambda options: "-".join(map(str, options.values())))
def test_swift(options: dict[str, Any], generator: torch.Generator) -> None:
    batch = policy_batch(generator)
    options = {"tau_pos": 1.25, "tau_neg": 1.5, "max_completion_length": 7, "beta": 0.0, **options}
    if options.get("loss_type") == "cispo":
        options["epsilon_high"] = 1.2
    epsilon = options.get("epsilon", 0.2)
    settings = {name: value for name, value in options.items() if name != "epsilon"}
    trainer = swift(**{**settings, "epsilon_low": epsilon, "epsilon_high": options.get("epsilon_high", epsilon)})
    grpo_batch = SimpleNamespace(
        completion_mask=batch["mask"],
        truncated_mask=torch.zeros(6, dtype=torch.bool),
        advantages=batch["advantages"].unsqueeze(1).expand(6, 5),
        old_per_token_logps=batch["old"],
        ref_per_token_logps=batch["ref"],
        rollout_per_token_logps=None,
        num_items_in_batch=29,
    )

    def theirs(logprobs: Tensor) -> Tensor:
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, None)
        return trainer._compute_loss_and_metrics(trainer.model, {}, grpo_batch)[0]

    config = LossConfig.like("swift", uncapped_kl=True, **options)
    assert_same(ours(batch, config, num_items=29), value_and_gradient(theirs, batch["logprobs"]), batch["mask"], 1e-7)  # float32's taus


# prime-rl -------------------------------------------------------------------------------------------------------------------------------


def test_prime_rl(generator: torch.Generator) -> None:
    """Its default loss by the formula of its source: it cannot be installed beside the tests."""
    batch = policy_batch(generator)
    options = {"dppo_mask_low": 0.02, "dppo_mask_high": 0.01, "kl_tau": 0.3}
    a = batch["advantages"].unsqueeze(1)

    def theirs(logprobs: Tensor) -> Tensor:
        moved = logprobs.exp() - batch["old"].exp()
        keep = ~torch.where(a > 0, moved > options["dppo_mask_high"], moved < -options["dppo_mask_low"])
        assert 0 < (keep & batch["mask"]).sum() < batch["mask"].sum()
        log_ratio = logprobs - batch["old"]
        return ((-keep.double() * a * log_ratio.exp() + options["kl_tau"] * log_ratio**2) * batch["mask"]).sum() / 29

    expected = value_and_gradient(theirs, batch["logprobs"])
    assert_same(ours(batch, LossConfig.like("prime-rl", **options), num_items=29), expected, batch["mask"], 1e-12)


# What is refused ------------------------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("trl", {"temperature": 0.7}, r"temperature is 0.7; .*grpo_loss\(\.\.\., temperature=\)"),
    ("trl", {"top_entropy_quantile": 0.2}, "top_entropy_quantile.*gf.top_entropy_mask"),
    ("trl", {"off_policy_mask_threshold": 0.2}, "off_policy_mask_threshold.*gf.off_policy_sequence_mask"),
    ("trl", {"epsilon_hi": 0.2}, "epsilon_hi is 0.2; expected one of the options of the loss: .*epsilon_high"),
    ("trl", {"loss_type": "gspo"}, "loss_type is 'gspo'"),
    ("liger", {"loss_type": "cispo", "importance_sampling_level": "sequence"}, "importance_sampling_level is 'sequence'"),
    ("liger", {"loss_type": "dr_grpo"}, "max_completion_length is None"),
    ("prime-rl", {"adv_tau": 0.5}, "adv_tau is 0.5; expected 1.0: multiply the advantages"),
    ("prime-rl", {"teacher_tau": 0.5}, "teacher_tau is 0.5; expected 0.0"),
    ("verl", {"loss_mode": "clip_cov"}, "loss_mode is 'clip_cov'"),
    ("verl", {"use_kl_loss": True}, "kl_loss_type is 'low_var_kl'; .*uncapped_kl"),
    ("verl", {"use_kl_loss": True, "kl_loss_type": "abs"}, "kl_loss_type is 'abs'"),
    ("verl", {"loss_agg_mode": "seq-mean-token-sum-norm"}, "loss_agg_mode.*loss_scale"),
    ("verl", {"loss_scale_factor": 12}, "loss_scale_factor is 12"),
    ("openrlhf", {"is_correction_level": "token"}, "is_correction_level is 'token'; .*rollout_weights"),
    ("openrlhf", {"kl_coef": 0.1}, "kl_coef is 0.1; .*10 nats"),
    ("openrlhf", {"unbiased_gradient": True}, "unbiased_gradient is True"),
    ("swift", {"loss_type": "fipo"}, "loss_type is 'fipo'"),
    ("swift", {}, "beta is 0.04; .*10 nats"),
    ("swift", {"rollout_importance_sampling_mode": "token_mask", "uncapped_kl": True}, "rollout_importance_sampling_mode.*KL"),
    ("slime", {}, "library is 'slime'; expected one of trl, liger, verl, openrlhf, swift, prime-rl"),
]


@pytest.mark.parametrize(("library", "options", "message"), REFUSED, ids=lambda x: x if isinstance(x, str) and len(x) < 12 else None)
def test_refused_by_name(library: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        LossConfig.like(library, **options)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_every_library_has_defaults_that_work() -> None:
    for library in LIBRARIES:
        options = {"uncapped_kl": True} if library == "swift" else {}
        assert isinstance(LossConfig.like(library, **options), LossConfig)


# The sampler's mismatch, and advantages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("library", ["trl", "swift", "verl"])
def test_rollout_settings(library: str, mode: str, generator: torch.Generator) -> None:
    """A sequence's weight is a product in TRL and verl, and a geometric mean in ms-swift."""
    batch = policy_batch(generator)
    if (library, mode) == ("swift", "sequence_mask"):
        with pytest.raises(ValueError, match="sequence_mask"):
            rollout_settings(library, mode)
        return
    settings: dict[str, Any] = rollout_settings(library, mode, high=1.2)
    weights = gf.rollout_weights(batch["old"], batch["ref"], batch["mask"], **settings)
    difference = (batch["old"] - batch["ref"]) * batch["mask"]
    if mode.startswith("sequence"):
        difference = difference.sum(1, keepdim=True)
        difference = difference / batch["mask"].sum(1, keepdim=True).clamp(min=1) if library == "swift" else difference
    expected = difference.exp()
    expected = expected.clamp(max=1.2) if mode.endswith("truncate") else expected * (expected <= 1.2)
    torch.testing.assert_close(weights, expected.float())
    assert 0 < (expected != difference.exp()).float().mean() < 1, "the bound must cut somewhere"
    if library == "verl" and mode.endswith("truncate"):
        stand_ins = tuple(f"verl.{name}" for name in ("protocol", "trainer.config", "workers.config"))
        stand_ins += ("verl.trainer.config.algorithm", "verl.workers.config.actor", "tensordict", "omegaconf")
        helper = peer_module("verl", "0.9.1", "trainer.ppo.rollout_corr_helper", stand_ins)
        log_ratio, level = batch["old"] - batch["ref"], mode.partition("_")[0]
        theirs, _ = helper.compute_rollout_correction_weights(log_ratio, batch["mask"].double(), level, 1.2)
        torch.testing.assert_close(weights.expand(6, 5)[batch["mask"]], theirs[batch["mask"]].float())
    if library == "swift":
        trainer = swift()
        trainer.rollout_importance_sampling_mode, trainer.rollout_importance_sampling_threshold = mode, 1.2
        theirs = trainer._apply_rollout_importance_sampling(batch["old"] - batch["ref"], batch["mask"])
        torch.testing.assert_close(weights.expand(6, 5)[batch["mask"]], theirs[batch["mask"]].float())


def test_advantages_of_verl(generator: torch.Generator) -> None:
    import numpy

    core = verl_core()
    rewards = torch.rand(12, generator=generator)
    index = numpy.repeat(numpy.arange(3), 4)
    mask = torch.ones(12, 2)
    for name, theirs in (
        ("grpo", lambda r: core.compute_grpo_outcome_advantage(r, mask, index)),
        ("dr_grpo", lambda r: core.compute_grpo_outcome_advantage(r, mask, index, norm_adv_by_std_in_grpo=False)),
        ("rloo", lambda r: core.compute_rloo_outcome_advantage(r, mask, index)),
    ):
        expected = theirs(torch.stack([rewards, torch.zeros(12)], 1))[0][:, 0]
        settings: dict[str, Any] = advantage_settings("verl", name)
        advantages = gf.group_advantages(rewards, group_size=4, **settings).advantages
        torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("library", "estimator", "expected"),
    [
        ("trl", "group", lambda r: (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)),
        ("trl", "batch", lambda r: (r - r.mean(1, keepdim=True)) / (r.std() + 1e-4)),
        ("trl", "none", lambda r: r - r.mean(1, keepdim=True)),
        ("openrlhf", "group_norm", lambda r: (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-9)),
        ("openrlhf", "rloo", lambda r: r - (r.sum(1, keepdim=True) - r) / 3),
    ],
)
def test_advantages(library: str, estimator: str, expected: Any, generator: torch.Generator) -> None:
    rewards = torch.rand(3, 4, generator=generator)
    settings: dict[str, Any] = advantage_settings(library, estimator)
    advantages = gf.group_advantages(rewards.flatten(), group_size=4, **settings).advantages
    torch.testing.assert_close(advantages, expected(rewards.double()).flatten().float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ["group", "batch", "none"])
def test_advantages_of_swift(estimator: str, generator: torch.Generator) -> None:
    module = peer_module("swift", "4.6.0", "rl_core.advantage", ("swift.utils",), distribution="ms-swift")
    rewards, weights = torch.rand(12, 2, generator=generator), torch.tensor([1.0, 0.3])
    expected, _ = module.compute_advantages(rewards, weights, 4, scale_rewards=estimator)
    settings: dict[str, Any] = advantage_settings("swift", estimator)
    advantages = gf.group_advantages(rewards, group_size=4, reward_weights=weights, **settings).advantages
    torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-6)


def test_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="reinforce_baseline"):
        advantage_settings("openrlhf", "reinforce_baseline")


def test_the_comparison_rejects(generator: torch.Generator) -> None:
    batch = policy_batch(generator)
    right = ours(batch, LossConfig.like("trl"))
    for wrong in ((right[0], 2 * right[1]), (right[0], torch.zeros_like(right[1])), (2 * right[0] + 1, right[1])):
        with pytest.raises(AssertionError):
            assert_same(wrong, right, batch["mask"], TOLERANCE)


def test_a_loss_over_logprobs_names_what_is_wrong() -> None:
    logprobs, mask = torch.randn(2, 3), torch.ones(2, 3)
    with pytest.raises(TypeError, match="config is a str; expected a LossConfig"):
        logprob_loss(logprobs, torch.ones(2), config="dapo", mask=mask)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"logprobs is a list; expected a torch.Tensor. Wrap it: torch.as_tensor\(logprobs\)"):
        logprob_loss([1.0], torch.ones(2), config=LossConfig(), mask=mask)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"old_logprobs has shape \[2\]; expected .*sizes follow from logprobs\)"):
        logprob_loss(logprobs, torch.ones(2), config=LossConfig(), mask=mask, old_logprobs=torch.ones(2))
