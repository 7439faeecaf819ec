"""Redaction of secrets in what a process writes besides its results: tracebacks, log lines and warnings, the user's and libraries' too."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

from grpo_fast.utils.redaction import redact_text

__all__ = ["redact_record", "redacted_output", "redacted_traceback"]


def redacted_traceback(error: BaseException) -> str:
    """Python's traceback of an error, without secrets: they may be in its message, in its causes', and in the lines of code it shows."""
    return redact_text("".join(traceback.format_exception(error)))


def redact_record(record: logging.LogRecord) -> bool:
    """Redact a log record in place, its traceback too; always True, so that it can be a filter of a logger."""
    with contextlib.suppress(TypeError, ValueError, KeyError):  # arguments that do not fit the message: logging reports those itself
        record.msg, record.args = redact_text(record.getMessage()), ()
    if record.exc_info and record.exc_info[1] is not None:
        record.exc_text = redacted_traceback(record.exc_info[1]).rstrip()  # logging formats the error only where this is not set
    return True


@contextlib.contextmanager
def redacted_output() -> Iterator[None]:
    """Redact every log record, warning and thread's traceback of this process inside the ``with``; an error that leaves it ends the process
    with a redacted traceback and the status 1."""
    make, show, of_thread = logging.getLogRecordFactory(), warnings.formatwarning, threading.excepthook

    def make_record(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = make(*arguments, **options)
        redact_record(record)
        return record

    def format_warning(*arguments: Any, **options: Any) -> str:
        return redact_text(show(*arguments, **options))

    def end_of_thread(ended: threading.ExceptHookArgs) -> None:
        if ended.exc_value is not None and not isinstance(ended.exc_value, SystemExit):
            sys.stderr.write(f"Exception in thread {ended.thread.name if ended.thread else '?'}:\n{redacted_traceback(ended.exc_value)}")

    logging.setLogRecordFactory(make_record)
    warnings.formatwarning, threading.excepthook = format_warning, end_of_thread
    try:
        yield
    except Exception as error:
        sys.stderr.write(redacted_traceback(error))
        raise SystemExit(1) from error
    finally:
        logging.setLogRecordFactory(make)
        warnings.formatwarning, threading.excepthook = show, of_thread


logging.getLogger("grpo_fast").addFilter(redact_record)  # this package's own lines, where it is a user's program that runs
