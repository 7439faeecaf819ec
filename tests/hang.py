"""When a test that does not end is ended: a protection, and no statement about how fast anything is."""

from __future__ import annotations

HANG = 1500  # seconds for a process that a test starts; below pytest's own limit for a test (pyproject.toml), so that its output is shown
