"""Checks .github/ without network: the workflows and dependabot.yml against their schemas, the workflows for unsafe constructs.

    python tools/ci/check_workflows.py

check-jsonschema and zizmor come with the test group; actionlint, which a package index has as a download only, runs where it is on PATH.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def commands(root: Path) -> list[list[str]]:
    """The commands to run, each with the files of ``root``; one whose tool is optional and absent is left out."""
    workflows = sorted(str(path) for path in (root / ".github" / "workflows").glob("*.yml"))
    if not workflows:
        raise SystemExit(f"{root}/.github/workflows has no *.yml file. Fix: run this in a checkout.")
    run = [
        [tool("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", *workflows],
        [tool("check-jsonschema"), "--builtin-schema", "vendor.dependabot", str(root / ".github" / "dependabot.yml")],
        [tool("zizmor"), "--offline", "--no-progress", "--quiet", "--persona=regular", *workflows],
    ]
    actionlint = find("actionlint")
    if actionlint:
        run.append([actionlint, "-no-color", *workflows])
    return run


def find(name: str) -> str | None:
    """A tool beside this interpreter, which need not be on PATH, else one on PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def tool(name: str) -> str:
    found = find(name)
    if found is None:
        raise SystemExit(f"{name} was not found. Fix: pip install --group test, or make check, which installs it.")
    return found


def main(root: Path = ROOT) -> int:
    failed = 0
    for command in commands(root):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            failed = 1
            print(f"{Path(command[0]).name}:\n{run.stdout}{run.stderr}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
