"""Options of a command from the fields of dataclasses: the same conversion and the same messages for the command line and for a file.

jsonargparse 4.53 and tyro 1.0 were tried in its place: jsonargparse refuses ``--rewards a b``, a bare ``--bf16`` and ``--delta none``; tyro
refuses ``--use_peft true`` and does not tell which options were given; both report errors in terms of Python types.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import enum
import json
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from grpo_fast.utils.errors import SettingsError
from grpo_fast.utils.redaction import redact

__all__ = ["Option", "convert_value", "parse_words", "read_options", "suggest", "unknown_option"]

MAX_DEPTH = 32  # of JSON
_BOOLEANS = {"true": True, "yes": True, "t": True, "y": True, "1": True, "false": False, "no": False, "f": False, "n": False, "0": False}
_EXPECTED: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True)
class Option:
    """The type of one field, and how its values are written on a command line and converted."""

    name: str
    kind: type  # of one value: bool, int, float, str, or a class that only Python code can make
    optional: bool = False  # "none" means None; never for texts, since a text may well be "none"
    bool_or_text: bool = False
    takes_list: bool = False
    takes_single: bool = True  # one value that is no list
    takes_mapping: bool = False  # JSON on the command line
    bare: Any = None  # the value of the option without a value on the command line; None = it needs one
    negatable: bool = False  # --no_NAME
    choices: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """Describe the expected value, for messages."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return _EXPECTED.get(self.kind, f"a {self.kind.__name__}, which only Python code can make")


def read_options(classes: Sequence[type]) -> dict[str, Option]:
    """The options of all fields of these dataclasses that their constructors take, by name; of equal names the first class's."""
    found: dict[str, Option] = {}
    for kind in classes:
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.init and field.name not in found:
                found[field.name] = _option(field, hints[field.name])
    return found


def parse_words(words: Sequence[str], options: dict[str, Option], refused: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The converted values of the options that a command line gives, by name; ``--some_name`` and ``--some-name`` are the same option.

    Args:
        words: of the command line.
        options: all options, by name.
        refused: why options of other programs do not exist, by their names.

    Raises:
        SettingsError: an option does not exist, lacks its value, or has a wrong one.
    """
    parser = _Parser(allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
    for name, option in options.items():
        nargs = "+" if option.takes_list else None if option.bare is None else "?"
        parser.add_argument(*_flags(name), dest=name, nargs=nargs, const=option.bare if nargs == "?" else None)
        if option.negatable:
            parser.add_argument(*_flags(f"no_{name}"), dest=name, action="store_const", const=False)
    namespace, unknown = parser.parse_known_args(list(words))
    if unknown:
        wrong = next((word for word in unknown if word.startswith("-")), None)
        if wrong is None:
            raise SettingsError(
                f"command line: {unknown[0]!r} is no option's value; expected a settings file in the first place, or options."
            )
        flag = wrong.partition("=")[0]
        raise SettingsError(f"command line: {unknown_option(flag, flag.lstrip('-'), options, refused)}")
    return {name: _from_words(value, options[name]) for name, value in vars(namespace).items()}


def convert_value(where: str, value: Any, option: Option) -> Any:
    """Convert a value of a settings file or of the command line to the type of its field.

    Args:
        where: where it was set, for messages.
        value: a text, number, boolean, list, mapping, or None, which every option takes.
        option: whose value it is.

    Raises:
        SettingsError: the value does not fit.
    """
    if value is None or (isinstance(value, dict) and option.takes_mapping):
        return value
    if isinstance(value, list):
        if not option.takes_list:
            raise SettingsError(f"{where} is {redact(value, name=option.name)!r}; expected one value, not a list.")
        return [_convert_one(where, each, option) for each in value]
    converted = _convert_one(where, value, option)
    return converted if option.takes_single or converted is None else [converted]


def unknown_option(shown: str, name: str, options: Collection[str], refused: Mapping[str, str] | None = None) -> str:
    """A message about an option that does not exist: why, if the reason is known, else names that are close to it.

    Args:
        shown: the name as it was written.
        name: the name.
        options: the names that exist.
        refused: reasons, by the names of options of other programs.
    """
    plain = name.replace("-", "_")
    if refused is not None and plain in refused:
        return f"{plain} does not exist here: {refused[plain]}."
    return f"there is no {shown}.{suggest(name, options)}"


def suggest(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name: the known names that are close to it."""
    close = difflib.get_close_matches(name.replace("-", "_"), known, 3, 0.6)
    return f" Did you mean {' or '.join(close)}?" if close else " See --help."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"command line: {message.rstrip('.')}.")


def _flags(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _option(field: dataclasses.Field[Any], hint: Any) -> Option:
    kinds = set(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else {hint}
    origins = {typing.get_origin(kind) or kind for kind in kinds}
    lists = [kind for kind in kinds if (typing.get_origin(kind) or kind) is list]
    elements = [element for kind in lists for element in typing.get_args(kind)]
    enums = [kind for kind in (*kinds, *elements) if isinstance(kind, type) and issubclass(kind, enum.Enum)]
    singles = [kind for kind in kinds if isinstance(kind, type) and kind is not type(None) and kind not in (*enums, dict, list)]
    choices = [str(member.value) for member in enums[0]] if enums else [str(choice) for choice in field.metadata.get("choices", ())]
    if bool in singles and str not in singles:
        kind: type = bool
    elif str in singles or enums or dict in origins:
        kind = str
    elif singles:
        kind = float if float in singles else singles[0]
    else:  # only a list: the type of its elements
        kind = elements[0] if elements and elements[0] in _EXPECTED else str
    return Option(
        name=field.name,
        kind=kind,
        optional=type(None) in kinds and kind is not str,
        bool_or_text=bool in singles and str in singles,
        takes_list=bool(lists),
        takes_single=not lists or bool(singles),
        takes_mapping=dict in origins,
        bare=True if kind is bool else field.metadata.get("const"),  # --bf16 alone is true, also where the default is None
        negatable=kind is bool and field.default is True,
        choices=tuple(choices),
    )


def _from_words(value: Any, option: Option) -> Any:
    if isinstance(value, bool):  # a bare option, or --no_NAME
        return value
    where = f"command line: {option.name}"
    if option.takes_mapping and value.lstrip().startswith("{"):
        try:
            return _load_json(value)
        except ValueError as error:
            raise SettingsError(
                f"{option.name} is {redact(value, name=option.name)!r}; expected JSON, such as '{{\"key\": 1}}' ({error})."
            ) from error
    return convert_value(where, value[0] if option.takes_list and len(value) == 1 else value, option)


def _load_json(text: str) -> Any:
    depth = 0
    for bracket in re.findall(r"[\[{}\]]", re.sub(r'"(?:\\.|[^"\\])*"', "", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    return json.loads(text)


def _convert_one(where: str, value: Any, option: Option) -> Any:
    if not isinstance(value, (dict, list)):
        try:
            found = _CONVERTERS.get(option.kind, _refuse)(str(value), option)
        except (ValueError, TypeError):
            pass
        else:
            if not option.choices or found in option.choices:
                return found
    raise SettingsError(f"{where} is {redact(value, name=option.name)!r}; expected {option.expected}.")


def _boolean(text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise ValueError(text)
    return _BOOLEANS[text.lower()]


def _text(text: str, option: Option) -> str | bool:
    return {"true": True, "false": False}.get(text.lower(), text) if option.bool_or_text else text


def _refuse(text: str, option: Option) -> NoReturn:
    raise ValueError(text)


def _or_none(convert: Callable[[str], Any]) -> Callable[[str, Option], Any]:
    return lambda text, option: None if option.optional and text.lower() in ("none", "null") else convert(text)


_CONVERTERS: dict[type, Callable[[str, Option], Any]] = {
    bool: _or_none(_boolean),
    int: _or_none(int),
    float: _or_none(float),
    str: _text,
}
