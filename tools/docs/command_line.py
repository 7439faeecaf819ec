"""Write docs/command-line.md from the help of every subcommand.

    python tools/docs/command_line.py            # write the page
    python tools/docs/command_line.py --check    # exit status 1 if it is out of date

The help of `grpo-fast train` follows from the fields of its settings, which need transformers. So the page is in the repository, and the
site is built without.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from pathlib import Path

from typer.testing import CliRunner

__all__ = ["PAGE", "main", "text"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "command-line.md"
COMMANDS: tuple[str, ...] = ("doctor", "train", "plot", "demo", "study sampling", "study training", "bench", "bench-head", "bench-kept")
COMMANDS += ("bench-trainer", "bench-trl", "bench-step", "bench-drop-ins")
SETTINGS = {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb"}
HEAD = """# Command line

What `grpo-fast COMMAND --help` prints. `grpo-fast train --help-all` has all settings; they are the fields of
[GRPOConfig](../grpo_fast/trainer/config.py).
"""


def help_of(command: str) -> str:
    """What the command prints when it is asked for help."""
    from grpo_fast.cli.main import app

    printed = io.StringIO()  # the subcommands that are mounted print past the runner
    with contextlib.redirect_stdout(printed):
        done = CliRunner().invoke(app, [*command.split(), "--help"], prog_name="grpo-fast", env=SETTINGS)
    if done.exit_code:
        raise RuntimeError(f"grpo-fast {command} --help ended with {done.exit_code}: {done.output}")
    shown = re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue() + done.output)
    return "\n".join(line.rstrip() for line in shown.strip("\n").splitlines())


def text() -> str:
    """The page."""
    os.environ.update(SETTINGS)
    parts = [f"## grpo-fast {command}\n\n```text\n{help_of(command)}\n```\n" for command in COMMANDS]
    return "\n".join([HEAD, *parts])


def main() -> int:
    page = text()
    if "--check" in sys.argv[1:]:
        if page == PAGE.read_text():
            return 0
        print(f"{PAGE} is out of date. Fix: python tools/docs/command_line.py")
        return 1
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
