"""The error for an invalid setting of GRPOConfig."""

from __future__ import annotations

from grpo_fast.utils.redaction import redact

__all__ = ["bad_setting"]


def bad_setting(name: str, value: object, expected: str) -> ValueError:
    """Return the error for an invalid setting."""
    return ValueError(f"GRPOConfig: {name} is {redact(value, name=name)!r}; expected {expected}.")
