"""What differs between the supported versions of transformers, with stand-ins for what the installed version does not have."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trainer_cases import model

pytest.importorskip("transformers", reason="the trainer needs transformers")

from grpo_fast.generation import SamplerError
from grpo_fast.generation.paged_model import run_as_here
from grpo_fast.trainer import GRPOConfig
from grpo_fast.trainer import config_checks as checks


@pytest.mark.parametrize("given", [True, False])
def test_gradient_checkpointing_is_passed_on_under_transformers_newer_name_without_a_warning(tmp_path: Path, given: bool) -> None:
    newer = SimpleNamespace(  # as in transformers 5.23 and newer
        gradient_checkpointing=given,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        activation_checkpointing=None,
        activation_checkpointing_kwargs=None,
    )
    checks.resolve_checkpointing(newer)  # type: ignore[arg-type]
    assert newer.activation_checkpointing is given and newer.activation_checkpointing_kwargs == {"use_reentrant": False}
    newer = SimpleNamespace(activation_checkpointing=not given, gradient_checkpointing=given, activation_checkpointing_kwargs={})
    checks.resolve_checkpointing(newer)  # type: ignore[arg-type]
    assert newer.activation_checkpointing is not given
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        config = GRPOConfig(str(tmp_path), use_cpu=True, gradient_checkpointing=given)
    assert config.gradient_checkpointing is given
    assert getattr(config, "activation_checkpointing", given) is given


def test_a_manager_of_continuous_batching_that_keeps_its_model_elsewhere_is_refused() -> None:
    manager: Any = SimpleNamespace(_model=None)
    with pytest.raises(SamplerError, match=r"does not keep its model as `model`.*Fix: transformers 5.17 to 5.24"):
        run_as_here(manager, model())
