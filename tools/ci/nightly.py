"""Tries the newest version of another library beside the environment of the tests: what is used of it, and the tests that use it.

    .venv/bin/python tools/ci/nightly.py trl|transformers|liger-kernel|verl|vllm --report nightly.md [--folder runs/nightly]

Exits with 1 if something that this package uses changed, or a test fails. verl and vllm cannot be installed beside the others: their files
are compared, and nothing is imported from them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = {  # library -> tests that run with it
    "trl": ["tests/test_integrations_trl.py", "tests/test_integrations_trl_head.py", "tests/test_trl_parity.py", "tests/test_trl_names.py"],
    "liger-kernel": ["tests/test_integrations_liger.py"],
    "transformers": [
        "tests/test_generation.py", "tests/test_mixed_precision.py", "tests/test_trainer.py", "tests/test_trainer_runs.py",
        "tests/test_trainer_adapters.py", "tests/test_linear_models.py", "tests/test_transformers_versions.py",
    ],
    "verl": [],
    "vllm": [],
}  # fmt: skip


def install(library: str, folder: Path) -> str:
    """Install the newest version alone into a folder; return its version."""
    shutil.rmtree(folder, ignore_errors=True)
    # transformers needs the newest of its own small libraries; of the others, all but the library itself is installed already.
    alone = [] if library == "transformers" else ["--no-deps"]
    subprocess.run([sys.executable, "-m", "pip", "install", "-qq", "--no-compile", *alone, "--target", str(folder), library], check=True)
    shutil.rmtree(folder / "torch", ignore_errors=True)
    return version_in(folder, library)


def version_in(folder: Path, library: str) -> str:
    return next(found.version for found in distributions(path=[str(folder)]) if found.metadata["Name"].replace("_", "-") == library)


def changes(library: str, folder: Path) -> list[str]:
    """What this package uses of the library, and what changed of it."""
    if library == "transformers":
        return []
    from grpo_fast.integrations.probe import changed_parts

    return changed_parts(library, folder)


def failed_tests(library: str, folder: Path, version: str) -> str:
    """The last lines of the tests' output if one failed, else nothing. A changed version is accepted here, to see what it breaks."""
    if not TESTS[library]:
        return ""
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    if library != "transformers":
        environment["GRPO_FAST_ACCEPT_VERSIONS"] = f"{library}=={version}"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-m", "not slow and not sweep", *TESTS[library]]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return "" if run.returncode == 0 else (run.stdout + run.stderr)[-20_000:]


def report(library: str, version: str, changed: list[str], failure: str) -> str:
    """What was found, in Markdown."""
    lines = [f"Newest {library}: {version}.", ""]
    lines += (
        ["Changed since the version that was compared last:", "", *(f"- {change}" for change in changed)]
        if changed
        else ["Nothing that is used changed."]
    )
    if failure:
        lines += ["", "The tests that use it fail:", "", "```", failure.replace("```", "'''"), "```"]
    lines += [
        "",
        "What to do: compare it, then enter it in `grpo_fast/integrations/versions.py` and run `python tools/generate_peer_digests.py`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=sorted(TESTS))
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "nightly")
    arguments = parser.parse_args()
    version = install(arguments.library, arguments.folder)
    changed = changes(arguments.library, arguments.folder)
    failure = failed_tests(arguments.library, arguments.folder, version)
    arguments.report.write_text(report(arguments.library, version, changed, failure), encoding="utf-8")
    print(arguments.report.read_text())
    return int(bool(changed or failure))


if __name__ == "__main__":
    sys.exit(main())
