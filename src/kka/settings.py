"""Settings: frozen dataclasses with a help string per field, on the command line and in JSON."""

import argparse
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from kka.errors import UserError

S = TypeVar("S")


def option(default: Any, help: str, choices: tuple[str, ...] | None = None, alias: str | None = None) -> Any:
    """A field of a settings dataclass with its help string (the values it may take, another flag's name)."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "alias": alias})


class Parser(argparse.ArgumentParser):
    """argparse that reports bad input as every other bad input: one sentence."""

    appendix = ""
    """what --help prints behind the flags"""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; see --help")

    def format_help(self) -> str:
        return super().format_help() + self.appendix


def build_parser(description: str, *settings_classes: type, **prefixed: type) -> Parser:
    """A parser with one flag per field; flags that are not given are absent from the result.

    Flags of `llm=LanguageModelSettings` begin with --llm_; `take_prefix` finds their values.
    """
    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for prefix, settings_class in [*(("", cls) for cls in settings_classes), *prefixed.items()]:
        _add_group(parser, settings_class, prefix)
    return parser


def format_flags(settings_class: type) -> str:
    """The flags of one class as --help prints them."""
    parser = Parser(usage=argparse.SUPPRESS, add_help=False, argument_default=argparse.SUPPRESS)
    _add_group(parser, settings_class, "")
    return parser.format_help()


def _add_group(parser: argparse.ArgumentParser, settings_class: type, prefix: str) -> None:
    title = (settings_class.__doc__ or "").splitlines()[0].rstrip(".")
    group = parser.add_argument_group(f"--{prefix}_*: {title}" if prefix else title)
    hints = typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        _add_flag(group, prefix, field, *_element_type(hints[field.name]))


def take_prefix(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values whose names begin with `<prefix>_`, without it."""
    start = f"{prefix}_"
    return {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}


@contextmanager
def prefixed_flags(prefix: str, settings_class: type) -> Iterator[None]:
    """Within, errors name the flags of a class with their prefix: --size of drawer is --drawer_size."""
    try:
        yield
    except UserError as error:
        own: Any = settings_class
        names = "|".join(field.name for field in dataclasses.fields(own))
        raise type(error)(re.sub(rf"--({names})\b", rf"--{prefix}_\1", str(error))) from None


def _add_flag(group: Any, prefix: str, field: Any, kind: Any, many: bool) -> None:
    extra: dict[str, Any] = {"nargs": "*", "action": "extend"} if many else {}
    if kind is bool:
        extra = {"nargs": "?", "const": True}  # --flag, or as the official code: --flag True
    alias = field.metadata["alias"]
    group.add_argument(
        *(f"--{prefix}_{name}" if prefix else f"--{name}" for name in (field.name, alias) if name),
        type=PARSERS.get(kind, kind),
        choices=field.metadata["choices"],
        metavar=None if field.metadata["choices"] else _name(kind).upper(),
        help=f"{field.metadata['help']} (default: {field.default})".replace("%", "%%"),
        **extra,
    )


def check_keys(values: Mapping[str, Any], *settings_classes: Any, **prefixed: Any) -> None:
    """Raises UserError for a key that is a field of none of the classes, nor of those behind a prefix."""
    known = [field.name for cls in settings_classes for field in dataclasses.fields(cls)]
    known += [
        f"{prefix}_{field.name}" for prefix, cls in prefixed.items() for field in dataclasses.fields(cls)
    ]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise UserError(f"unknown setting {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))


def make_settings(settings_class: type[S], values: Mapping[str, Any]) -> S:
    """Settings from those values that are fields of the class; raises UserError for wrong types."""
    hints = typing.get_type_hints(settings_class)
    own: Any = settings_class  # a dataclass, which the type of a class cannot say
    fields: dict[str, Any] = {field.name: field for field in dataclasses.fields(own)}
    chosen = {}
    for key in [key for key in fields if key in values]:  # in one order, as the first wrong one is named
        chosen[key] = _convert(key, values[key], hints[key])
        choices = fields[key].metadata["choices"]
        if choices and chosen[key] not in choices:
            raise UserError(f"setting {key!r} must be one of {', '.join(choices)}; it is {chosen[key]!r}")
    return settings_class(**chosen)


def to_flags(settings: Any) -> list[str]:
    """The words of a command line that give these settings: a flag for each value that is not the default."""
    words = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value != field.default:
            words += [f"--{field.name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def parse_bool(text: str) -> bool:
    """True or False as people write them; raises ValueError otherwise."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return words[text.lower()]


def parse_number_or_name(text: str) -> int | str:
    """12 or screw: a class folder by its number or by its name."""
    return int(text) if text.isdecimal() else text


PARSERS: dict[Any, Any] = {bool: parse_bool, int | str: parse_number_or_name}


def _name(kind: Any) -> str:
    return "class" if kind == int | str else kind.__name__


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a type: list[str], float | None, dict[str, Any] and the like."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return any(fits(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(fits(item, parts[0]) for item in value)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is (origin or hint)


def _element_type(hint: Any) -> tuple[Any, bool]:
    """The type of one value, and whether the flag takes several: tuple[int, ...] | None -> (int, True)."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _convert(key: str, value: Any, hint: Any) -> Any:
    kind, many = _element_type(hint)
    if value is None:
        if type(None) in typing.get_args(hint):
            return None
        raise UserError(f"setting {key!r} must not be null")
    if many:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_scalar(key, item, kind) for item in items)
    return _scalar(key, value, kind)


def _scalar(key: str, value: Any, kind: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"setting {key!r} must be a finite number, it is {value}")
    if type(value) not in (typing.get_args(kind) or (kind,)):
        expected = " or ".join(part.__name__ for part in typing.get_args(kind) or (kind,))
        raise UserError(f"setting {key!r} must be of type {expected}, it is {value!r}")
    return value
