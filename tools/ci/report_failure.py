"""Opens an issue on the forge for a failure of the nightly run, or comments on the open one of the same library. Needs the command gh.

GH_TOKEN=... RUN_URL=... python tools/ci/report_failure.py LIBRARY nightly.md
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

LONGEST = 60_000  # characters that a forge takes in a body


def main(library: str, report: str) -> None:
    title = f"The newest {library} does not work"
    path = Path(report)
    text = path.read_text()[:LONGEST] if path.exists() else "The run ended before it wrote a report."
    body = f"{text}\n\nRun: {os.environ.get('RUN_URL', 'unknown')}\n"
    listed = gh("issue", "list", "--state", "open", "--search", f'in:title "{title}"', "--json", "number,title")
    numbers = [str(issue["number"]) for issue in json.loads(listed) if issue["title"] == title]
    if numbers:
        gh("issue", "comment", numbers[0], "--body-file", "-", body=body)
    else:
        gh("issue", "create", "--title", title, "--body-file", "-", body=body)


def gh(*arguments: str, body: str | None = None) -> str:
    return subprocess.run(["gh", *arguments], input=body, text=True, stdout=subprocess.PIPE, check=True).stdout


if __name__ == "__main__":
    main(*sys.argv[1:])
