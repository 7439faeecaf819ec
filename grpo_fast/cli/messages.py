"""Messages of the commands: one line on standard error, for wrong settings and for warnings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from grpo_fast.utils.redaction import redact_text

__all__ = ["exit_on_wrong_settings", "print_error"]


def print_error(message: str) -> None:
    """Print a message to standard error; long lines are wrapped on a terminal only, so that a log can be searched.

    Secrets in it are redacted.
    """
    console = Console(stderr=True)
    console.print(redact_text(message), highlight=False, markup=False, soft_wrap=not console.is_terminal)


@contextmanager
def exit_on_wrong_settings(prog_name: str) -> Iterator[None]:
    """A context in which errors about settings end the program with status 2 and one line; warnings are one line, too.

    Args:
        prog_name: name of the command, before each message.
    """
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print_error(f"{prog_name}: warning: {message}")
        try:
            yield
        except (ValueError, TypeError, ImportError, OSError) as error:
            print_error(f"{prog_name}: {error}")
            raise SystemExit(2) from error
