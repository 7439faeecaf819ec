"""Makes a release of the version in grpo_fast/version.py: `make release`, and `make release ARGS=--dry-run` for the checks alone.

    python tools/release.py [--dry-run] [--output dist] [--kinds sdist pure cpu cuda]
    python tools/release.py --notes v0.2.0        print what CHANGELOG.md says about a version

Refuses a tree with changes, a tag that exists, and a version that CHANGELOG.md or CITATION.cff does not have. Builds into an empty folder,
checks metadata and contents, installs each file into a fresh environment and runs it there, then tags the commit. Nothing is uploaded:
pushing the tag starts the release workflow, which builds again on the forge.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKS = Path("tools", "ci")


class RefusedError(SystemExit):
    """The release cannot be made; the message says why and what to do."""


def version(root: Path) -> str:
    found = re.search(r'^__version__ = "(\d+\.\d+\.\d+)"$', (root / "grpo_fast" / "version.py").read_text(), re.MULTILINE)
    if found is None:
        raise RefusedError('grpo_fast/version.py has no line __version__ = "X.Y.Z". Fix: write the version to release there.')
    return found.group(1)


def section(changelog: str, of: str) -> tuple[str, str]:
    """Return the date of a version and what CHANGELOG.md says about it."""
    found = re.search(rf"^## \[{re.escape(of)}\] - (\d{{4}}-\d{{2}}-\d{{2}})\n(.*?)(?=^## \[|^\[|\Z)", changelog, re.MULTILINE | re.DOTALL)
    if found is None or not found.group(2).strip():
        raise RefusedError(f"CHANGELOG.md has nothing under '## [{of}] - YYYY-MM-DD'. Fix: move what is under [Unreleased] there.")
    return found.group(1), found.group(2).strip() + "\n"


def check_ready(root: Path) -> tuple[str, str]:
    """Return the tag and the notes.

    Raises:
        RefusedError: the tree, the tag, the changelog or the citation is not ready.
    """
    number = version(root)
    tag = f"v{number}"
    if changed := git(root, "status", "--porcelain").strip():
        raise RefusedError(f"the tree has changes:\n{changed}\nFix: commit or stash them.")
    if git(root, "tag", "--list", tag).strip():
        raise RefusedError(
            f"the tag {tag} exists. Fix: raise the version in grpo_fast/version.py, or delete the tag if it was never pushed."
        )
    date, notes = section((root / "CHANGELOG.md").read_text(encoding="utf-8"), number)
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    for line in (f"version: {number}", f"date-released: {date}"):
        if line not in citation.replace('"', "").splitlines():
            raise RefusedError(f"CITATION.cff has no line '{line}'. Fix: give it the version and the date of CHANGELOG.md.")
    return tag, notes


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout


def build_and_check(root: Path, output: Path, kinds: list[str]) -> None:
    """Build the artifacts into an empty folder and check them, as the workflow does."""
    shutil.rmtree(output, ignore_errors=True)
    torch_site = sysconfig.get_path("purelib")
    subprocess.run([sys.executable, str(CHECKS / "wheels.py"), "--output", str(output), *kinds], cwd=root, check=True)
    subprocess.run([str(root / CHECKS / "check_metadata.sh"), str(output)], cwd=root, check=True)
    artifacts = sorted(str(path) for path in output.iterdir())
    subprocess.run([sys.executable, str(CHECKS / "check_wheels.py"), *artifacts, "--torch", torch_site], cwd=root, check=True)


def main(arguments: list[str] | None = None, root: Path = ROOT) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="check that a release could be made; build and tag nothing")
    parser.add_argument("--output", type=Path, default=root / "dist")
    parser.add_argument("--kinds", nargs="+", default=["sdist", "pure", "cpu", "cuda"])
    parser.add_argument("--notes", metavar="TAG", help="only print the notes of a version")
    given = parser.parse_args(arguments)
    if given.notes:
        print(section((root / "CHANGELOG.md").read_text(encoding="utf-8"), given.notes.removeprefix("v"))[1], end="")
        return
    tag, notes = check_ready(root)
    if given.dry_run:
        print(f"{tag} can be released: would build {', '.join(given.kinds)} into {given.output}, check them and tag this commit. Notes:\n")
        print(notes, end="")
        return
    build_and_check(root, given.output.resolve(), given.kinds)
    subprocess.run(["git", "tag", "-a", tag, "--cleanup=verbatim", "-F", "-"], cwd=root, input=f"{tag}\n\n{notes}", text=True, check=True)
    print(f"{tag} is tagged. To publish it: git push origin {tag}")


if __name__ == "__main__":
    main()
