"""Writes grpo_fast/integrations/digests/LIBRARY.json: what grpo_fast/integrations/relied_on.py names, in the compared version of a library.

    python tools/generate_peer_digests.py                          those that are in this environment or in .venv/peers
    python tools/generate_peer_digests.py vllm --source FOLDER     one, from another site-packages
    python tools/generate_peer_digests.py --check                  fails if a file is stale

Run it after a change of relied_on.py, and for a new version after it was compared and entered in versions.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path

from packaging.version import Version

from grpo_fast.integrations.probe import DIGESTS, found_parts, source_root
from grpo_fast.integrations.relied_on import RELIED_ON
from grpo_fast.integrations.versions import COMPARED

NEWEST = {**{name: versions[-1] for name, versions in COMPARED.items()}, "vllm": "0.32.0"}


def folder_with(distribution: str, folders: list[Path]) -> Path | None:
    """The first folder with the newest compared version of a library."""
    for folder in folders:
        for found in distributions(path=[str(folder)]):
            name = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
            if name.removesuffix("-cpu") == distribution and Version(found.version).public == NEWEST[distribution]:
                return folder
    return None


def content(distribution: str, folder: Path) -> str:
    """The text of the file.

    Raises:
        SystemExit: something that relied_on.py names is not in the library.
    """
    parts = found_parts(distribution, folder)
    named = {f"{file.removesuffix('.py').replace('/', '.')}.{name}" for file, names in RELIED_ON[distribution].items() for name in names}
    if absent := sorted(named - set(parts)):
        raise SystemExit(f"{distribution} {NEWEST[distribution]} in {folder} has no {', '.join(absent)}. Fix: relied_on.py.")
    if lacking := [f"{name}: {', '.join(part.missing)}" for name, part in parts.items() if part.missing]:
        raise SystemExit(f"{distribution} {NEWEST[distribution]} in {folder} does not hold {'; '.join(lacking)}. Fix: relied_on.py.")
    stored = {name: {key: value for key, value in asdict(part).items() if value} for name, part in parts.items()}
    for part in stored.values():
        part.setdefault("signature", "")
    return json.dumps({"version": NEWEST[distribution], "parts": stored}, indent=1) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", metavar="library", help=f"some of {', '.join(RELIED_ON)}; all if none is named")
    parser.add_argument("--source", type=Path, help="the site-packages to read")
    parser.add_argument("--check", action="store_true", help="compare in place of writing")
    given = parser.parse_args(arguments)
    stale = 0
    for distribution in given.libraries or RELIED_ON:
        roots = [given.source] if given.source else [Path(sys.prefix) / "peers", source_root(distribution)]
        folder = folder_with(distribution, [root for root in roots if root is not None])
        if folder is None:
            print(f"{distribution} {NEWEST[distribution]} is not here: skipped")
            continue
        path, text = DIGESTS / f"{distribution}.json", content(distribution, folder)
        if given.check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            print(f"{path} is stale. Fix: python tools/generate_peer_digests.py {distribution}")
            stale = 1
        elif not given.check:
            DIGESTS.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"{path}: {len(json.loads(text)['parts'])} parts of {distribution} {NEWEST[distribution]}")
    return stale


if __name__ == "__main__":
    sys.exit(main())
