"""Settings: frozen dataclasses with a help string per field, on the command line and in JSON."""

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from kka.errors import UserError

S = TypeVar("S")


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field of a settings dataclass with its help string (and the values it may take)."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


class _Parser(argparse.ArgumentParser):
    """argparse that reports bad input as every other bad input: one sentence."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; see --help")


def build_parser(settings_class: type, description: str) -> argparse.ArgumentParser:
    """A parser with one flag per field; flags that are not given are absent from the result."""
    parser = _Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    hints = typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        kind, many = _element_type(hints[field.name])
        parse = parse_bool if kind is bool else kind
        extra: dict[str, Any] = {"nargs": "*", "action": "extend"} if many else {}
        parser.add_argument(
            f"--{field.name}",
            type=parse,
            choices=field.metadata["choices"],
            metavar=None if field.metadata["choices"] else kind.__name__.upper(),
            help=f"{field.metadata['help']} (default: {field.default})".replace("%", "%%"),
            **extra,
        )
    return parser


def make_settings(settings_class: type[S], *layers: Mapping[str, Any]) -> S:
    """Settings from layers of values, later ones winning; raises UserError for unknown keys or wrong types."""
    values: dict[str, Any] = {}
    for layer in layers:
        values.update(layer)
    hints = typing.get_type_hints(settings_class)
    for key, value in values.items():
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            raise UserError(f"unknown setting {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        values[key] = _convert(key, value, hints[key])
    return settings_class(**values)


def to_json(settings: Any) -> dict[str, Any]:
    """Settings as JSON values."""
    return dataclasses.asdict(settings)


def parse_bool(text: str) -> bool:
    """True or False as people write them; raises ValueError otherwise."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return words[text.lower()]


def _element_type(hint: Any) -> tuple[type, bool]:
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
        if not isinstance(value, list | tuple):
            raise UserError(f"setting {key!r} must be a list, it is {value!r}")
        return tuple(_scalar(key, item, kind) for item in value)
    return _scalar(key, value, kind)


def _scalar(key: str, value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise UserError(f"setting {key!r} must be of type {kind.__name__}, it is {value!r}")
    return value
