"""LossConfig: the settings that it rejects, the messages, the settings that it accepts, and the table of loss types."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import math
import pickle
import re
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import grpo_fast as gf
from grpo_fast.loss.config import AGGREGATIONS, KL_ESTIMATORS, LEVELS, LOSS_TYPES, SURROGATES, LossConfig, LossRow
from grpo_fast.loss.kernel_settings import loss_settings
from grpo_fast.ops import extension

NUMBERS = [field.name for field in dataclasses.fields(LossConfig) if field.type == "float"]
OPTIONAL_NUMBERS = [field.name for field in dataclasses.fields(LossConfig) if field.type == "float | None"]
NAMES = {
    "loss_type": tuple(LOSS_TYPES),
    "kl_estimator": KL_ESTIMATORS,
    "entropy_aggregation": ("same", "token_mean"),
    "importance_sampling_level": LEVELS,
    "aggregation": AGGREGATIONS,
}


def refused(error: type[Exception], *pieces: str, **settings: Any) -> None:
    """LossConfig(**settings) raises the error, and its message has all the pieces (regular expressions) in order."""
    with pytest.raises(error) as caught:
        LossConfig(**settings)
    assert type(caught.value) is error
    assert re.search(".*".join(("LossConfig: ", *pieces)), str(caught.value), re.DOTALL), f"{pieces} not in: {caught.value}"


def test_every_setting_is_tested_here() -> None:
    other = {"bias_corrected_kl", "max_completion_length", "surrogate", "zero_advantage_loss"}  # the last two: test_custom_surrogate.py
    assert {field.name for field in dataclasses.fields(LossConfig)} == {*NUMBERS, *OPTIONAL_NUMBERS, *NAMES, *other}


@pytest.mark.parametrize("name", [*NUMBERS, *OPTIONAL_NUMBERS])
@pytest.mark.parametrize("value", ["0.2", True, [0.2], torch.tensor(0.2), 1j], ids=["str", "bool", "list", "tensor", "complex"])
def test_a_number_of_another_type(name: str, value: Any) -> None:
    optional = " or None" if name in OPTIONAL_NUMBERS else ""
    refused(TypeError, rf"{name} is .*\({type(value).__name__}\)", f"expected a number{optional}", **{name: value})


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_cannot_be_left_out(name: str) -> None:
    refused(TypeError, rf"{name} is None \(NoneType\)", "expected a number", **{name: None})


@pytest.mark.parametrize("name", [*NUMBERS, *OPTIONAL_NUMBERS])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite(name: str, value: float) -> None:
    refused(ValueError, f"{name} is {value}", "expected a finite number", **{name: value})


RANGES = [
    ("epsilon_low", -0.1, "a number >= 0"),
    ("epsilon_low", 1.1, "at most 1: a ratio is never below 0"),
    ("epsilon_high", -0.1, "a number >= 0"),
    ("beta", -1e-9, "a number >= 0"),
    ("vespo_k_pos", -5.0, "a number >= 0"),
    ("vespo_k_neg", -1e-3, "a number >= 0"),
    ("vespo_lambda_pos", -1.0, "a number >= 0"),
    ("vespo_lambda_neg", -1.0, "a number >= 0"),
    ("dppo_mask_low", -0.1, "a number >= 0"),
    ("dppo_mask_high", -0.1, "a number >= 0"),
    ("cispo_ratio_low", -0.1, "a number >= 0"),
    ("squared_log_ratio_coef", -0.1, "a number >= 0"),
    ("dppo_ratio_max", 0.9, "at least 1, or None"),
    ("log_ratio_clamp", 0.0, "a number > 0"),
    ("log_ratio_clamp", -20.0, "a number > 0"),
    ("log_ratio_clamp", 81.0, "at most 80, since exp"),
    ("sapo_temperature_pos", 0.0, "a number > 0"),
    ("sapo_temperature_neg", -1.0, "a number > 0"),
    ("delta", 1.2, "more than 1 [+] epsilon_high = 1.2"),
    ("delta", 0.0, "more than 1 [+] epsilon_high = 1.2"),
    ("dual_clip", 1.0, "more than 1 .3.0 is usual"),
    ("dual_clip", -3.0, "more than 1"),
    ("max_completion_length", 0, "an int > 0"),
    ("max_completion_length", -5, "an int > 0"),
    ("max_completion_length", 5.0, "an int > 0"),
    ("max_completion_length", True, "an int > 0"),
    ("max_completion_length", "5", "an int > 0"),
]


@pytest.mark.parametrize(("name", "value", "expected"), RANGES)
def test_a_value_out_of_range(name: str, value: Any, expected: str) -> None:
    refused(ValueError, f"{name} is {re.escape(repr(value))}; expected {expected}", **{name: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"epsilon_low": 0},
        {"epsilon_low": 1.0},
        {"epsilon_high": 0},
        {"epsilon_low": 0.0, "epsilon_high": 0.0, "delta": 1.001},
        {"loss_type": "cispo", "epsilon_low": 3.0, "epsilon_high": 5.0},  # the raw bound; the lower one is not used
        {"log_ratio_clamp": 80.0},
        {"dual_clip": 1.001},
        {"beta": 0},
        {"entropy_coef": -0.1},  # a penalty on entropy is allowed
        {"vespo_k_pos": 0.0},
        {"vespo_lambda_pos": 0.0},
        {"loss_type": "dppo_tv", "dppo_mask_low": 0, "dppo_mask_high": 1.0},
        {"loss_type": "cispo", "epsilon_high": 1.2, "cispo_ratio_low": 1.0},
        {"loss_type": "dppo_tv", "dppo_ratio_max": 1.0},
        {"loss_type": "gmpo", "epsilon_low": 3.0, "epsilon_high": 4.0},  # bounds of the log-ratio
        {"cispo_ratio_low": 7.0},  # of another loss type
        {"max_completion_length": 1},
        {"epsilon_low": np.float64(0.2)},  # a float
        {"epsilon_high": np.float32(0.25), "delta": np.float16(2), "beta": np.int64(1), "max_completion_length": np.int32(7)},
        {"loss_type": "dapo", "importance_sampling_level": "sequence_token", "aggregation": "sequence_mean"},
    ],
    ids=repr,
)
def test_the_edges_that_are_taken(settings: dict[str, Any]) -> None:
    config = LossConfig(**settings)
    for name, value in settings.items():
        assert getattr(config, name) == value
        assert isinstance(getattr(config, name), (int, float, str))


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_name(name: str) -> None:
    refused(ValueError, f"{name} is 'ppo'; expected one of {', '.join(NAMES[name])}", **{name: "ppo"})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [1, ("grpo",), b"grpo", 0.5])
def test_a_name_of_another_type(name: str, value: Any) -> None:
    refused(
        TypeError,
        rf"{name} is {re.escape(repr(value))} \({type(value).__name__}\); expected one of the names",
        NAMES[name][0],
        **{name: value},
    )


@pytest.mark.parametrize("name", ["loss_type", "kl_estimator", "entropy_aggregation"])
def test_a_name_cannot_be_left_out(name: str) -> None:
    refused(TypeError, rf"{name} is None \(NoneType\); expected one of the names", **{name: None})


@pytest.mark.parametrize("loss_type", [name for name, row in LOSS_TYPES.items() if row.surrogate != "clip"])
@pytest.mark.parametrize("name", ["delta", "dual_clip"])
def test_bounds_of_the_clip_belong_to_the_clip(loss_type: str, name: str) -> None:
    """Without the error the setting would have no effect, silently."""
    fix = f"drop {name}, or take a loss_type that clips"
    refused(ValueError, f"{name} is 9.0; expected None with loss_type='{loss_type}'", fix, loss_type=loss_type, **{name: 9.0})


@pytest.mark.parametrize("loss_type", ["vespo", "reinforce", "dppo_tv", "dppo_kl"])
@pytest.mark.parametrize("level", ["sequence", "sequence_token"])
def test_a_level_where_there_is_no_ratio(loss_type: str, level: str) -> None:
    fix = f"leave importance_sampling_level unset with loss_type='{loss_type}'"
    refused(
        ValueError, f"importance_sampling_level is '{level}'; expected 'token'", fix, loss_type=loss_type, importance_sampling_level=level
    )


@pytest.mark.parametrize("level", ["token", "sequence_token"])
def test_the_ratio_of_gmpo_is_that_of_the_sequence(level: str) -> None:
    expected = f"importance_sampling_level is '{level}'; expected 'sequence'"
    refused(ValueError, expected, "leave importance_sampling_level unset", loss_type="gmpo", importance_sampling_level=level)


def test_the_bounds_of_cispo_are_in_order() -> None:
    for high, low, most in ((5.0, 1.1, "1"), (0.9, 1.0, "0.9")):
        expected = f"cispo_ratio_low is {low}; expected at most {most}"
        refused(ValueError, expected, "neither above 1 nor", loss_type="cispo", epsilon_high=high, cispo_ratio_low=low)


@pytest.mark.parametrize("settings", [{"loss_type": "dr_grpo"}, {"loss_type": "grpo", "aggregation": "fixed_length"}])
def test_a_fixed_length_must_be_given(settings: dict[str, Any]) -> None:
    refused(ValueError, "max_completion_length is None; expected an int", "set max_completion_length to the generation limit", **settings)
    assert LossConfig(**settings, max_completion_length=512).max_completion_length == 512


@pytest.mark.parametrize("value", [1, None, "no"], ids=repr)
def test_a_switch_is_a_bool(value: Any) -> None:
    refused(TypeError, "bias_corrected_kl is ", "expected True or False", bias_corrected_kl=value)


def test_a_bound_of_cispo_that_was_meant_as_a_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[LossConfig.__module__], "_warned_cispo_bounds", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LossConfig("cispo", epsilon_high=1.0)
        LossConfig("dapo", epsilon_high=0.28)
        gf.LossConfig.like("trl", loss_type="cispo")  # its own default
    with pytest.warns(UserWarning, match=r"epsilon_high is 0\.28 with loss_type='cispo'.*5\.0 is usual") as caught:
        config = LossConfig("cispo", epsilon_high=0.28)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataclasses.replace(config, beta=0.1)  # said already


def test_an_unknown_setting() -> None:
    with pytest.raises(TypeError, match="epsilon"):
        LossConfig(epsilon=0.2)  # type: ignore[call-arg]


# ---- what it is


def test_it_is_immutable_hashable_and_equal_by_value() -> None:
    config = LossConfig(loss_type="gspo", epsilon_low=3e-4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.beta = 1.0  # type: ignore[misc]
    assert config == LossConfig(loss_type="gspo", epsilon_low=3e-4)
    assert hash(config) == hash(LossConfig(loss_type="gspo", epsilon_low=3e-4))
    assert config != LossConfig(loss_type="gspo")
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_a_changed_copy_is_checked_too() -> None:
    config = LossConfig(loss_type="grpo", delta=2.0)
    assert dataclasses.replace(config, beta=0.1).beta == 0.1
    with pytest.raises(ValueError, match=r"delta is 2\.0"):
        dataclasses.replace(config, loss_type="sapo")


@pytest.mark.parametrize(
    ("loss_type", "row"),
    [
        ("grpo", ("clip", "token", "sequence_mean")),
        ("bnpo", ("clip", "token", "token_mean")),
        ("dr_grpo", ("clip", "token", "fixed_length")),
        ("dapo", ("clip", "token", "global_token_mean")),
        ("cispo", ("cispo", "token", "global_token_mean")),
        ("sapo", ("sapo", "token", "sequence_mean")),
        ("luspo", ("clip", "sequence", "sequence_sum")),
        ("vespo", ("vespo", "token", "global_token_mean")),
        ("gspo", ("clip", "sequence", "sequence_mean")),
        ("gmpo", ("gmpo", "sequence", "sequence_mean")),
        ("dppo_tv", ("dppo_tv", "token", "global_token_mean")),
        ("dppo_kl", ("dppo_kl", "token", "global_token_mean")),
        ("reinforce", ("reinforce", "token", "global_token_mean")),
    ],
)
def test_the_table_of_loss_types(loss_type: str, row: tuple[str, str, str]) -> None:
    assert LOSS_TYPES[loss_type] == LossRow(*row)
    config = LossConfig(loss_type=loss_type, epsilon_high=5.0, max_completion_length=3)
    assert (config.surrogate, config.level, config.resolved_aggregation) == row


def test_the_table_is_complete_and_its_order_is_the_kernels() -> None:
    assert len(LOSS_TYPES) == 13
    assert SURROGATES[:4] == ("clip", "cispo", "sapo", "reinforce")
    assert KL_ESTIMATORS == ("k1", "k2", "k3")
    for surrogate, level, aggregation in LOSS_TYPES.values():
        assert surrogate in SURROGATES
        assert level in LEVELS
        assert aggregation in AGGREGATIONS
    assert gf.LOSS_TYPES is LOSS_TYPES
    assert gf.LossConfig is LossConfig


def test_the_generated_files_are_up_to_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the declaration; and one that is not is found, by its name."""
    root = Path(__file__).resolve().parents[1]
    main = runpy.run_path(str(root / "tools" / "generate_loss_settings.py"))["main"]
    assert main(["--check"]) == 0, "Fix: python tools/generate_loss_settings.py"
    for folder in ("csrc", "kernels/fused"):
        (tmp_path / folder).mkdir(parents=True)
    assert main(["--root", str(tmp_path)]) == 0 and main(["--check", "--root", str(tmp_path)]) == 0
    header = tmp_path / "csrc" / "policy_loss_config.h"
    header.write_text(header.read_text().replace("double beta;", "double gamma;"))
    capsys.readouterr()
    assert main(["--check", "--root", str(tmp_path)]) == 1
    assert "csrc/policy_loss_config.h is out of date. Fix:" in capsys.readouterr().err


def test_the_numbers_that_the_kernels_take() -> None:
    """The surrogate, then every field that says so, in the order of the fields; the Triton kernels know them by the same names."""
    config = LossConfig(loss_type="dppo_kl", kl_estimator="k2", bias_corrected_kl=True, dppo_mask_low=0.03, beta=0)
    numbers = loss_settings(config)
    assert all(type(number) is float for number in numbers)
    names = [each.name for each in dataclasses.fields(LossConfig) if each.metadata.get("kernel")]
    found = dict(zip(names, numbers[1:], strict=True))
    assert numbers[0] == SURROGATES.index("dppo_kl")
    assert (found["kl_estimator"], found["bias_corrected_kl"], found["dppo_mask_low"], found["beta"]) == (1.0, 1.0, 0.03, 0.0)
    assert found["delta"] == found["dual_clip"] == math.inf
    if importlib.util.find_spec("triton") is not None:
        from grpo_fast.kernels.loss_settings import LossSettings

        assert list(LossSettings._fields) == names


@pytest.mark.skipif(not extension.load(), reason=f"the extension is not loaded: {extension.status().why}")
def test_an_extension_with_other_settings_is_reported() -> None:
    one, ids = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    call = (torch.zeros(1, 1, 3), ids, ids == 0, one, one, *[None] * 5, 1.0, 0.0, 1.0, 1.0)
    settings = loss_settings(LossConfig())
    torch.ops.grpo_fast.grpo_loss(*call, settings, False, True)
    with pytest.raises(RuntimeError, match=rf"{len(settings) - 1} settings given, expected {len(settings)}.*Fix: build it again"):
        torch.ops.grpo_fast.grpo_loss(*call, settings[:-1], False, True)


def test_a_setting_goes_before_the_loss_type() -> None:
    config = LossConfig(loss_type="gspo", importance_sampling_level="sequence_token", aggregation="token_mean")
    assert (config.level, config.resolved_aggregation) == ("sequence_token", "token_mean")


def test_the_defaults_are_dapo_without_a_reference() -> None:
    config = LossConfig()
    assert (config.loss_type, config.epsilon_low, config.epsilon_high, config.beta, config.entropy_coef) == ("dapo", 0.2, 0.2, 0.0, 0.0)
    assert config.delta is config.dual_clip is config.max_completion_length is None
    assert not config.bias_corrected_kl
