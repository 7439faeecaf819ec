"""A library in a version that was not compared with is rejected; the error names its version and the tested ones."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peers import PEERS, installed

import grpo_fast as gf
from grpo_fast.integrations import liger, openrlhf, verl
from grpo_fast.integrations.conventions import LIBRARIES
from grpo_fast.integrations.versions import COMPARED, refuse_other_versions

DISTRIBUTIONS = {"liger": "liger-kernel", "swift": "ms-swift"}
ZEROS = torch.zeros(2, 3)


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str | None]]:
    """What is installed; None = not at all. Others are as they are."""
    pretended: dict[str, str | None] = {}
    found = importlib.metadata.version

    def version(distribution: str) -> str:
        if distribution not in pretended:
            return found(distribution)
        claimed = pretended[distribution]
        if claimed is None:
            raise importlib.metadata.PackageNotFoundError(distribution)
        return claimed

    monkeypatch.setattr(importlib.metadata, "version", version)
    refuse_other_versions.cache_clear()
    yield pretended
    refuse_other_versions.cache_clear()


def refused(call: Any, distribution: str, version: str) -> None:
    with pytest.raises(ImportError) as caught:
        call()
    message = str(caught.value)
    assert f"{distribution} is {version}; expected one of" in message
    assert all(tested in message for tested in COMPARED[distribution])


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("version", ["0.0.1", "99.1", "99.1.dev0"])
def test_settings_like_those_of_another_version(library: str, version: str, versions: dict[str, str | None]) -> None:
    options = {"uncapped_kl": True} if library == "swift" else {}
    distribution = DISTRIBUTIONS.get(library, library)
    for tested in (*COMPARED[distribution], None):
        versions[distribution] = tested
        refuse_other_versions.cache_clear()
        gf.LossConfig.like(library, **options)
    refuse_other_versions.cache_clear()
    versions[distribution] = version
    refused(lambda: gf.LossConfig.like(library, **options), distribution, version)


def test_every_adapter_of_a_function_or_a_class(versions: dict[str, str | None]) -> None:
    versions.update({"liger-kernel": "0.8.0", "verl": "0.9.0", "openrlhf": "0.11.1"})
    ids = torch.zeros(2, 3, dtype=torch.int64)
    refused(liger.LigerFusedLinearGRPOLoss, "liger-kernel", "0.8.0")
    refused(lambda: liger.triton_grpo_loss(torch.zeros(2, 4, 5), None, None, ids, torch.zeros(2), beta=0.0), "liger-kernel", "0.8.0")
    for mode in verl.LOSS_MODES:
        refused(lambda mode=mode: verl.policy_loss(ZEROS, ZEROS, ZEROS, ZEROS + 1, loss_mode=mode), "verl", "0.9.0")
    refused(lambda: verl.group_relative_advantages(ZEROS, ZEROS + 1, ["a", "a"]), "verl", "0.9.0")
    refused(openrlhf.PolicyLoss, "openrlhf", "0.11.1")


@pytest.mark.parametrize("version", ["1.14.2", "1.17.0", "1.160.0", None])
def test_trl_when_its_adapter_is_imported(version: str | None, versions: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "grpo_fast.integrations.trl", raising=False)
    versions["trl"] = version
    if version is None:
        with pytest.raises(ImportError, match=r"trl is not installed; expected one of 1\.15\.0, 1\.16\.0"):
            importlib.import_module("grpo_fast.integrations.trl")
    else:
        refused(lambda: importlib.import_module("grpo_fast.integrations.trl"), "trl", version)


@pytest.mark.parametrize("distribution", COMPARED)
def test_the_newest_version_compared_with_is_that_of_the_tests(distribution: str) -> None:
    aside = next(PEERS.glob(f"{distribution.replace('-', '_')}-*.dist-info"), None)
    found = installed(distribution) if aside is None else importlib.metadata.Distribution.at(aside).version
    if found is None:
        pytest.skip(f"{distribution} is not there")
    assert found == COMPARED[distribution][-1]
