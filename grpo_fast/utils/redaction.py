"""Redaction of secrets (API keys, tokens, passwords) in everything that is written, logged or shown.

A setting is a secret if its name says so: ``hub_token``, ``api_key``, ``X-Api-Key``, ``clientSecret``, ``password``, at any depth. The
values of such settings, and those of such environment variables, are also replaced wherever they occur in a text.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any, TypeVar

__all__ = ["REDACTED", "is_secret_name", "redact", "redact_text", "redacted_copy", "redacted_paths", "remember_secrets"]

T = TypeVar("T")
REDACTED = "<redacted>"
MIN_LENGTH = 6  # characters of a value that is replaced in texts; a shorter one would also replace parts of ordinary words

_SECRET_ANYWHERE = {"secret", "secrets", "password", "passwords", "passwd", "passphrase", "credential", "credentials", "apikey", "apikeys"}
_SECRET_AT_THE_END = {"token", "key", "authorization", "cookie", "bearer"}
_SECRET_PLURALS = {"tokens", "keys"}  # only with one of the words below before them: max_new_tokens are no secrets
_ACCESS = {"api", "access", "auth", "bearer", "hub", "private", "refresh", "session"}
_ORDINARY = {  # the words before "token" or "key" of names that are no secrets
    "token": {"eos", "bos", "pad", "unk", "sep", "cls", "mask", "image", "end", "stop", "start", "per", "think", "last", "first", "next"},
    "key": {"answer", "cache", "column", "foreign", "group", "label", "metric", "primary", "row", "sort"},
}
_NAME = r"[A-Za-z0-9_.-]*(?:token|key|secret|password|passwd|passphrase|credentials?|authorization|cookie)s?"
_ASSIGNED = re.compile(
    rf"(?P<name>{_NAME})(?P<between>[\"']?\s*[=:]\s*)(?P<quote>[\"'])(?P<value>(?:\\.|(?!(?P=quote)).)+)(?P=quote)", re.I
)
# Letters and digits: a word of a program, as in token=token, is no secret.
_UNQUOTED = re.compile(
    rf"\b(?P<name>{_NAME})=(?=[^\s,;]*\d)(?=[^\s,;]*[a-z])[a-z0-9._~+/-]{{8,}}", re.I
)  # no word of a program: it has digits
_QUERY = re.compile(rf"(?P<before>[?&](?P<name>{_NAME})=)[^&\s\"']+", re.I)
_USER = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)[^/\s@\"']+@", re.I)  # user:password@ in a URL
_BEARER = re.compile(r"\b(Bearer|Basic)\s+(?!<)[A-Za-z0-9._~+/=-]{8,}")
_FORMATS = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16})\b")

_remembered: set[str] = set()


def is_secret_name(name: object) -> bool:
    """Whether the value of a setting, header or variable of this name is a secret.

    Example:
        >>> [is_secret_name(name) for name in ("hub_token", "X-Api-Key", "apiKey", "eos_token", "max_new_tokens", "answer_key")]
        [True, True, True, False, False, False]
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(name)).lower()
    parts = [word for word in re.split(r"[^a-z0-9]+", words) if word]
    if not parts:
        return False
    before, last = (parts[-2] if len(parts) > 1 else ""), parts[-1]
    if not _SECRET_ANYWHERE.isdisjoint(parts):
        return True
    if last in _SECRET_PLURALS:
        return before in _ACCESS
    return last in _SECRET_AT_THE_END and before not in _ORDINARY.get(last, ())


def redact(value: Any, *, name: object = "", known_only: bool = False) -> Any:
    """A copy of settings in which every secret is replaced, at any depth of dictionaries, lists and tuples.

    Args:
        value: settings, or one value. None, booleans and empty values are never secrets.
        name: of the value, where it is a single one.
        known_only: in texts, replace only remembered values and those of the environment: for the texts of a model, in which
            ``api_key="..."`` may be part of an answer.

    Example:
        >>> redact({"url": "http://me:pw@host", "headers": [{"api_key": "abc"}], "hub_token": None})
        {'url': 'http://<redacted>@host', 'headers': [{'api_key': '<redacted>'}], 'hub_token': None}
    """
    if is_secret_name(name) and value is not None and not isinstance(value, bool) and value not in ("", [], {}, ()):
        return REDACTED
    if isinstance(value, Mapping):
        return {key: redact(each, name=key, known_only=known_only) for key, each in value.items()}
    if isinstance(value, list):
        return [redact(each, known_only=known_only) for each in value]
    if type(value) is tuple:
        return tuple(redact(each, known_only=known_only) for each in value)
    if not isinstance(value, str):
        return value
    return _redact_known(value) if known_only else redact_text(value)


def redact_text(text: str) -> str:
    """A text in which secrets are replaced: remembered values, values assigned to secret names, passwords in URLs, well-known formats.

    Example:
        >>> redact_text("judge(api_key='abc', ngram_size=6) at https://me:pw@host/?token=1")
        "judge(api_key='<redacted>', ngram_size=6) at https://<redacted>@host/?token=<redacted>"
    """
    text = _ASSIGNED.sub(_assignment, _redact_known(text))
    text = _UNQUOTED.sub(lambda match: f"{match['name']}={REDACTED}" if is_secret_name(match["name"]) else match[0], text)
    text = _QUERY.sub(lambda match: match["before"] + REDACTED if is_secret_name(match["name"]) else match[0], text)
    text = _USER.sub(lambda match: f"{match['scheme']}{REDACTED}@", text)
    text = _BEARER.sub(lambda match: f"{match[1]} {REDACTED}", text)
    return _FORMATS.sub(REDACTED, text)


def redacted_copy(settings: T) -> T:
    """A copy of a dataclass of settings in which every secret is redacted."""
    plain = copy.copy(settings)
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        setattr(plain, field.name, redact(getattr(settings, field.name), name=field.name))
    return plain


def remember_secrets(settings: Mapping[str, Any]) -> None:
    """Replace the values of the secrets of these settings in all texts from now on, whatever message they occur in."""
    for name, value in settings.items():
        _remember(name, value)


def redacted_paths(value: Any, name: str = "") -> list[str]:
    """The names of the settings whose values have been redacted, nested ones with dots.

    Example:
        >>> redacted_paths({"hub_token": REDACTED, "sampler_options": {"api_key": REDACTED, "url": "http://host"}})
        ['hub_token', 'sampler_options.api_key']
    """
    prefix = f"{name}." if name else ""
    if isinstance(value, Mapping):
        return [path for key, each in value.items() for path in redacted_paths(each, f"{prefix}{key}")]
    if isinstance(value, (list, tuple)):
        return list(dict.fromkeys(path for each in value for path in redacted_paths(each, name)))
    return [name] if isinstance(value, str) and REDACTED in value else []


def _remember(name: object, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, each in value.items():
            _remember(key if not is_secret_name(name) else name, each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            _remember(name, each)
    elif is_secret_name(name) and isinstance(value, str) and len(value) >= MIN_LENGTH and value != REDACTED:
        _remembered.add(value)


def _redact_known(text: str) -> str:
    for secret in sorted(_remembered | _in_environment(), key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    return text


def _in_environment() -> set[str]:
    return {value for name, value in os.environ.items() if len(value) >= MIN_LENGTH and is_secret_name(name)}


def _assignment(match: re.Match[str]) -> str:
    if not is_secret_name(match["name"]):
        return match[0]
    return f"{match['name']}{match['between']}{match['quote']}{REDACTED}{match['quote']}"
