"""A library in a version that was not compared with: it runs if what is used is unchanged in it; else the error names what changed."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import PEERS, installed

import grpo_fast as gf
from grpo_fast.integrations import liger, openrlhf, probe, verl
from grpo_fast.integrations.conventions import LIBRARIES
from grpo_fast.integrations.relied_on import RELIED_ON
from grpo_fast.integrations.versions import ACCEPT_VERSIONS, COMPARED, refuse_other_versions

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


@pytest.fixture
def other_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder in which the probe finds the libraries' files: empty, so that everything is missing in a newer version."""
    monkeypatch.setattr(probe, "source_root", lambda distribution: tmp_path)
    monkeypatch.delenv(ACCEPT_VERSIONS, raising=False)
    return tmp_path


def refused(call: Any, distribution: str, version: str) -> None:
    with pytest.raises(ImportError) as caught:
        call()
    message = str(caught.value)
    assert f"{distribution} is {version}; expected one of" in message
    assert all(tested in message for tested in COMPARED[distribution])


# prime-rl is not released as a package, so there is no version to compare.
@pytest.mark.parametrize("library", [library for library in LIBRARIES if library != "prime-rl"])
@pytest.mark.parametrize("version", ["0.0.1", "99.1", "99.1.dev0"])
def test_settings_like_those_of_another_version(library: str, version: str, versions: dict[str, str | None], other_sources: Path) -> None:
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
def test_trl_when_its_adapter_is_imported(
    version: str | None, versions: dict[str, str | None], other_sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


# ---- the probe of a newer version

LIGER_LOSS = "liger_kernel/chunked_loss/grpo_loss.py"
CHANGES = {  # what a newer Liger has in place of what, and what the error says; None = nothing that matters
    "a comment": ("def k3_loss_fn(log_p, log_q):\n", "def k3_loss_fn(log_p, log_q):  # unbiased\n\n", None),
    "another function": ("def k3_loss_fn", "def k4_loss_fn(x):\n    return x\n\n\ndef k3_loss_fn", None),
    "arithmetic": ("torch.exp(log_p - log_q) - (log_p - log_q) - 1.0", "torch.exp(log_p - log_q) - 1.0", "source of {}.k3_loss_fn changed"),
    "a default": ("def sapo_loss_fn(importance_ratio: torch.Tensor, temperature: float)",
                  "def sapo_loss_fn(importance_ratio: torch.Tensor, temperature: float = 1.0)",
                  "signature of {}.sapo_loss_fn is (importance_ratio, temperature=1.0); it was (importance_ratio, temperature)"),
    "a name": ("def clip_coef_fn(", "def clip_coefficient(", "{}.clip_coef_fn is missing"),
}  # fmt: skip


@pytest.fixture
def newer_liger(versions: dict[str, str | None], other_sources: Path) -> Callable[[str, str], None]:
    """Pretend that a newer Liger is installed, whose files are the installed ones but for one replaced text."""
    pytest.importorskip("liger_kernel", reason="Liger is not installed")
    if installed("liger-kernel") != COMPARED["liger-kernel"][-1]:
        pytest.skip(f"the last compared Liger is {COMPARED['liger-kernel'][-1]}")
    site = Path(importlib.import_module("liger_kernel").__path__[0]).parent

    def pretend(old: str = "", new: str = "") -> None:
        for file in RELIED_ON["liger-kernel"]:
            (other_sources / file).parent.mkdir(parents=True, exist_ok=True)
            text = (site / file).read_text()
            assert file != LIGER_LOSS or old in text
            (other_sources / file).write_text(text.replace(old, new) if file == LIGER_LOSS and old else text)
        versions["liger-kernel"] = "0.9.0"

    return pretend


@pytest.mark.parametrize(("old", "new", "message"), CHANGES.values(), ids=CHANGES)
def test_a_newer_version_runs_if_nothing_that_is_used_changed(
    old: str, new: str, message: str | None, newer_liger: Callable[[str, str], None]
) -> None:
    newer_liger(old, new)
    if message is None:
        with pytest.warns(
            UserWarning, match=r"liger-kernel 0\.9\.0 is newer than the last that was compared, 0\.8\.5; .* unchanged"
        ) as said:
            gf.LossConfig.like("liger")
            gf.LossConfig.like("liger")
        assert len([each for each in said if "0.9.0" in str(each.message)]) == 1 and said[0].filename == __file__
        return
    with pytest.raises(ImportError) as caught:
        gf.LossConfig.like("liger")
    assert message.format("liger_kernel.chunked_loss.grpo_loss") in str(caught.value)
    assert f"{ACCEPT_VERSIONS}=liger-kernel==0.9.0" in str(caught.value)


def test_a_changed_version_runs_if_the_user_names_it(newer_liger: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    newer_liger(*CHANGES["a name"][:2])
    monkeypatch.setenv(ACCEPT_VERSIONS, "trl==1.17.0, liger-kernel==0.9")
    with pytest.warns(UserWarning, match=r"accepted by GRPO_FAST_ACCEPT_VERSIONS.*clip_coef_fn is missing"):
        gf.LossConfig.like("liger")
    refuse_other_versions.cache_clear()
    monkeypatch.setenv(ACCEPT_VERSIONS, "liger-kernel==0.9.1")  # accepted once, and not for ever
    with pytest.raises(ImportError, match="clip_coef_fn is missing"):
        gf.LossConfig.like("liger")


@pytest.mark.parametrize("value", ["1", "liger-kernel", "liger-kernel==", "liger==0.9.0", "liger-kernel==newest"])
def test_an_override_that_cannot_be_read_names_what_is_expected(
    value: str, newer_liger: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    newer_liger(*CHANGES["a name"][:2])
    monkeypatch.setenv(ACCEPT_VERSIONS, value)
    with pytest.raises(ValueError, match=f"holds '{value}'; expected LIBRARY==VERSION.* Fix: for example"):
        gf.LossConfig.like("liger")


def test_a_known_version_is_not_probed(versions: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "changed_parts", lambda distribution: pytest.fail("its files were read"))
    versions["trl"] = COMPARED["trl"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gf.LossConfig.like("trl")


def test_the_differences_between_two_versions_of_trl_are_found() -> None:
    older = PEERS / "trl-1.15.0"
    if not older.is_dir():
        pytest.skip(f"trl 1.15.0 is not in {older}")
    changes = probe.changed_parts("trl", older)
    assert "trl.kernels.chunked_logprob._use_triton is missing" in changes and 1 <= len(changes) < 5


@pytest.mark.parametrize("distribution", RELIED_ON)
def test_the_generated_files_are_of_the_parts_that_are_listed(distribution: str) -> None:
    version, parts = probe.recorded(distribution)
    listed = {f"{file[:-3].replace('/', '.')}.{name}" for file, names in RELIED_ON[distribution].items() for name in names}
    assert set(parts) == listed and len(listed) >= 3
    assert distribution == "vllm" or version == COMPARED[distribution][-1]
    stored = json.loads((probe.DIGESTS / f"{distribution}.json").read_text())
    assert not any(part.get("missing") for part in stored["parts"].values())
