"""The choice of backend: forcing one, the warning of a fallback, the report; and the loading of the extension."""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hang import HANG
from typer.testing import CliRunner

import grpo_fast as gf
from grpo_fast.cli.main import MOUNTED
from grpo_fast.ops import build, extension
from grpo_fast.ops.backends import BACKENDS, _warn_once, select, use_backend

CPU = torch.device("cpu")
backends_module = importlib.import_module("grpo_fast.ops.backends")

needs_extension = pytest.mark.skipif(not extension.load(), reason=f"the extension is not loaded: {extension.status().why}")


@pytest.fixture
def no_extension(monkeypatch):
    """The extension has failed to load for good, and no warning about it has been given yet."""
    failed = extension.ExtensionStatus(loaded=False, why="a reason", fix="A fix.")
    monkeypatch.setattr(extension, "_status", failed)
    monkeypatch.setattr(backends_module, "_warned", set())


# ---- reporting


def test_backends_reports_every_backend_with_reason_and_fix_where_it_is_not_usable():
    found = gf.backends()
    assert tuple(found) == BACKENDS
    assert found["reference"].usable
    for name, status in found.items():
        assert status.name == name
        assert status.usable == (not status.why), "a usable backend has no reason against it, an unusable one has"
        assert (status.usable or status.fix) and status.cure == status.fix


def test_a_status_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        gf.backends()["reference"].usable = False  # type: ignore[misc]  # read-only


@needs_extension
def test_the_cpu_status_names_instruction_set_threads_and_library():
    details = gf.backends()["cpu"].details
    assert details["threads"] == str(torch.get_num_threads())
    assert Path(details["library"]).is_file()
    assert details["instruction set"]


@needs_extension
def test_an_extension_without_the_isa_operator_is_not_an_error(monkeypatch):
    class NoOperators:
        def __getattr__(self, name):
            raise AttributeError(name)

    monkeypatch.setattr(torch.ops, "grpo_fast", NoOperators(), raising=False)
    assert backends_module.cpu_isa().startswith("unknown")


def test_the_status_of_a_missing_extension_carries_its_reason(no_extension):
    status = gf.backends()["cpu"]
    assert (status.usable, status.why, status.fix) == (False, "a reason", "A fix.")


# ---- choosing


@needs_extension
def test_cpu_tensors_go_to_the_extension():
    assert select(CPU) == "cpu"


def test_other_devices_go_to_the_reference_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select(torch.device("meta")) == "reference"


def test_a_fallback_warns_once_with_reason_and_fix(no_extension):
    with pytest.warns(RuntimeWarning, match=r"'cpu' backend is not usable: a reason. A fix. .* reference"):
        assert select(CPU) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select(CPU) == "reference"


def test_a_message_of_another_kind_is_still_said(monkeypatch):
    monkeypatch.setattr(backends_module, "_warned", {"one"})
    with pytest.warns(RuntimeWarning, match="two"):
        _warn_once("another", "two")


def test_use_backend_forces_nests_and_restores():
    before = select(CPU)
    with use_backend("reference"):
        assert select(CPU) == "reference"
        with use_backend("reference"):
            assert select(CPU) == "reference"
        assert select(CPU) == "reference"
    assert select(CPU) == before


def test_use_backend_restores_after_an_exception():
    before = select(CPU)
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert select(CPU) == before


def test_use_backend_holds_in_every_thread():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(select(CPU)))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_an_unknown_backend_is_refused_with_the_allowed_names():
    with pytest.raises(ValueError, match="'cuda'; expected one of reference, cpu, triton"), use_backend("cuda"):
        pass


def test_forcing_an_unusable_backend_is_refused_at_the_with(no_extension):
    with pytest.raises(RuntimeError, match=r"'cpu' is not usable here: a reason. A fix."), use_backend("cpu"):
        pytest.fail("the body must not run")


@needs_extension
def test_forcing_cpu_on_another_device_is_refused_with_the_fix():
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"tensors are on meta; expected CPU tensors. Move them"):
        select(torch.device("meta"))


def test_select_compiles_without_a_graph_break_and_follows_use_backend():
    numbers = {name: float(i) for i, name in enumerate(BACKENDS)}

    def add(x):
        return x + numbers[select(x.device)]

    torch.compiler.reset()
    compiled = torch.compile(add, fullgraph=True, backend="eager")
    x = torch.zeros(2)
    usual = numbers[select(CPU)]
    assert compiled(x).tolist() == [usual, usual]
    with use_backend("reference"):
        assert compiled(x).tolist() == [0.0, 0.0]
    assert compiled(x).tolist() == [usual, usual]


# ---- the switch


@pytest.mark.parametrize("value", ["auto", "cpu", "CUDA", " none "])
def test_the_switch_is_read(monkeypatch, value):
    monkeypatch.setenv("GRPO_FAST_BUILD", value)
    assert build.mode() == value.strip().lower()


def test_a_wrong_value_of_the_switch_names_the_allowed_ones(monkeypatch):
    monkeypatch.setenv("GRPO_FAST_BUILD", "gpu")
    with pytest.raises(ValueError, match="'gpu'; expected one of auto, cpu, cuda, none"):
        build.mode()


def test_cuda_without_a_toolkit_is_an_error_only_when_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(build, "find_cuda_home", lambda: None)
    assert build.choose_cuda("auto", "13.0")[0] is None
    assert build.choose_cuda("cpu", "13.0")[0] is None
    with pytest.raises(RuntimeError, match=r"no CUDA toolkit .* GRPO_FAST_BUILD=cpu"):
        build.choose_cuda("cuda", "13.0")


def test_auto_builds_cuda_for_a_torch_with_cuda_and_a_toolkit_of_its_major_version(monkeypatch):
    monkeypatch.setattr(build, "find_cuda_home", lambda: "/toolkit")
    monkeypatch.setattr(build, "_nvcc_version", lambda home: "13.0")
    assert build.choose_cuda("auto", "13.2")[0] == "/toolkit"
    assert build.choose_cuda("auto", None)[0] is None
    home, reason = build.choose_cuda("auto", "12.8")
    assert home is None and "13.0" in reason and "12.8" in reason


def test_the_build_environment_is_put_back(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    before = dict(os.environ)
    with build.build_environment(native_archs=False):
        assert os.environ["TORCH_CUDA_ARCH_LIST"] == build.CUDA_ARCHS
    assert dict(os.environ) == before


def test_the_architectures_of_the_caller_are_kept(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    with build.build_environment(native_archs=False):
        assert os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0"


# ---- loading

# A C++ file of a second's compilation, in place of csrc: what is tested is the way to the cache, not the kernels.
TINY = 'extern "C" __attribute__((visibility("default"))) int grpo_fast_tiny() { return 42; }\n'


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An install without a prebuilt extension, a tiny csrc and an empty cache."""
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "ops.cpp").write_text(TINY)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("GRPO_FAST_BUILD", raising=False)
    monkeypatch.setattr(extension, "_status", None)
    monkeypatch.setattr(extension, "_prebuilt_failure", "")
    monkeypatch.setattr(extension, "load_prebuilt", lambda: False)
    monkeypatch.setattr(extension, "_source_folder", lambda: csrc)
    return csrc


def test_the_first_use_compiles_says_so_once_and_leaves_only_the_library(fresh, tmp_path, capfd):
    assert not extension.status().loaded
    assert extension.load() and extension.load()
    said = capfd.readouterr().err.splitlines()
    with_cuda = re.search(r"compiling the C\+\+( and CUDA)? extension", said[0]) if said else None  # CUDA: by the build of torch
    assert len(said) == 2 and with_cuda and "compiled in" in said[1], said
    left = sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert left == ["_C.so", "lock"]


def test_the_second_process_finds_it_in_the_cache(fresh, tmp_path, capfd):
    library = extension._cache_folder(fresh, None) / "_C.so"
    library.parent.mkdir(parents=True)
    compiler = build.cxx_compiler()
    assert compiler is not None
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, fresh / "ops.cpp"], check=True)
    assert extension.load()
    assert extension.status().path == str(library)
    assert capfd.readouterr().err == ""


def test_another_source_or_flag_is_another_library(fresh, monkeypatch):
    before = extension._cache_folder(fresh, None)
    assert extension._cache_folder(fresh, "/toolkit") != before
    (fresh / "ops.cpp").write_text(TINY + "// changed\n")
    assert extension._cache_folder(fresh, None) != before


def test_a_compilation_that_fails_is_a_status_with_the_compilers_words_in_a_log(fresh, tmp_path, capfd):
    (fresh / "ops.cpp").write_text("this is not C++\n")
    assert not extension.load()
    status = extension.status()
    assert "compilation at first use failed" in status.why and "_C.log" in status.fix
    (log,) = (tmp_path / "cache").rglob("_C.log")
    assert "this is not C++" in log.read_text()
    before = capfd.readouterr().err
    assert not extension.load() and capfd.readouterr().err == "", f"a failure is not tried again: {before}"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda m: m.setenv("GRPO_FAST_BUILD", "none"), "GRPO_FAST_BUILD=none forbids"),
        (lambda m: m.setenv("GRPO_FAST_BUILD", "wrong"), "expected one of auto"),
        (lambda m: m.setattr(build, "cxx_compiler", lambda: None), "no C\\+\\+ compiler"),
        (lambda m: m.setattr(extension, "_source_folder", lambda: None), "contains no C\\+\\+ sources"),
        (lambda m: m.setenv("TORCH_EXTENSIONS_DIR", "/proc/no"), "failed"),
    ],
)
def test_whatever_stops_the_compilation_is_a_status_and_never_an_error(fresh, monkeypatch, spoil, why):
    spoil(monkeypatch)
    assert not extension.load()
    assert re.search(why, extension.status().why) and extension.status().fix


def test_a_damaged_prebuilt_extension_is_reported_with_what_followed(monkeypatch, tmp_path):
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(extension, "_status", None)
    monkeypatch.setattr(extension, "_prebuilt_failure", "")
    monkeypatch.setattr(extension, "_PACKAGE", tmp_path)
    monkeypatch.setenv("GRPO_FAST_BUILD", "none")
    assert not extension.load()
    assert "_C.abi3.so does not load" in extension.status().why and "forbids" in extension.status().why


def hold_lock(path: str, held: Any, release: Any) -> None:  # two events of multiprocessing
    with extension._locked(Path(path)):
        held.set()
        release.wait(HANG)


def test_the_lock_is_released_when_its_holder_is_killed(tmp_path, capfd):
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=hold_lock, args=(str(tmp_path / "lock"), held, release))
    holder.start()
    assert held.wait(HANG)
    threading.Timer(0.3, holder.kill).start()
    with extension._locked(tmp_path / "lock"):
        pass
    holder.join()
    assert "another process is compiling" in capfd.readouterr().err


# ---- the tests' own ground


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_uninitialised_memory_is_nan(dtype):
    """Through each way in which ATen and the C++ kernels allocate memory."""
    x = torch.zeros(3, 5, dtype=dtype)
    for fresh in (torch.empty(7, dtype=dtype), torch.empty_like(x), x.new_empty(4, 2), torch.empty_strided((2, 2), (2, 1), dtype=dtype)):
        assert fresh.isnan().all()


# ---- the command line


def test_doctor_lists_backends_and_tools_and_succeeds():
    from grpo_fast.cli.main import app

    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for word in (*BACKENDS, "torch", "triton", "transformers", "nvcc", "C++ compiler", "instruction set", "threads"):
        assert word in result.output


def test_the_version_is_an_option():
    from grpo_fast.cli.main import app

    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"grpo_fast {gf.__version__}\n")
    assert "doctor" in CliRunner().invoke(app, []).output, "without a command there is the help"


@pytest.mark.parametrize("module", ["grpo_fast", "grpo_fast.cli", "grpo_fast.cli.main"])
def test_python_m_is_the_command(module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As ``python -m`` runs it, in this process: a name that ends with the package's file, and the modules imported afresh."""
    monkeypatch.setattr(sys, "argv", [f"{module}/__main__.py", "--version"])
    monkeypatch.delitem(sys.modules, "grpo_fast.cli.main")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert not ended.value.code and capsys.readouterr().out == f"grpo_fast {gf.__version__}\n"
    monkeypatch.setattr(sys, "argv", [f"{module}/__main__.py", "no-such-command"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert ended.value.code and "no-such-command" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in MOUNTED if name.startswith("bench")])
def test_a_benchmark_overwrites_no_kept_result_unasked(name):
    pytest.importorskip("transformers", reason="bench-trainer needs it")
    command = typer.main.get_command(importlib.import_module(MOUNTED[name].module).app)
    (output,) = (parameter.default for parameter in command.params if parameter.name == "output")
    assert isinstance(output, (str, Path)) and Path(output).parent == Path("runs/bench")


@pytest.mark.parametrize("name", [name for name in MOUNTED if name.startswith("bench")])
def test_a_benchmark_refuses_a_place_it_cannot_write_to_before_it_measures(name, tmp_path):
    pytest.importorskip("transformers", reason="bench-trainer needs it")
    (tmp_path / "file").write_text("")
    module = importlib.import_module(MOUNTED[name].module)
    for output, message in ((tmp_path / "found.txt", "a .json file"), (tmp_path / "file" / "found.json", "a place to write to")):
        done = CliRunner().invoke(module.app, ["--output", str(output)])
        assert done.exit_code == 2 and message in " ".join(done.output.replace("│", "").split())


@pytest.fixture
def mounted(monkeypatch, tmp_path):
    """Put a module of this text where `grpo-fast bench` looks, and run the command."""
    from grpo_fast.cli import main as cli

    def run(text: str, *args: str) -> Any:
        (tmp_path / "mounted_command.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "mounted_command", raising=False)
        monkeypatch.setitem(cli.MOUNTED, "bench", cli.Mounted("mounted_command", "bench", ""))
        return CliRunner().invoke(cli.app, ["bench", *args])

    return run


def test_a_mounted_command_gets_its_arguments_and_prints_its_own_help(mounted):
    text = """if True:
        import typer
        app = typer.Typer()
        @app.command()
        def bench(rows: int = 1): "Its own help."; typer.echo(f"rows: {rows}")
    """
    assert "rows: 7" in mounted(text, "--rows", "7").output
    assert "Its own help." in mounted(text, "--help").output


def test_a_mounted_command_without_its_dependency_names_the_fix(mounted):
    result = mounted("import a_package_that_is_not_there")
    assert result.exit_code == 2
    assert "needs the package 'a_package_that_is_not_there'" in result.output
    assert "pip install '.[bench]' in the checkout" in result.output


def test_a_mistake_inside_a_mounted_command_is_not_taken_for_a_missing_package(mounted):
    result = mounted("import grpo_fast.no_such_module")
    assert isinstance(result.exception, ModuleNotFoundError)
