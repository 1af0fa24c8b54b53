"""Options as frozen dataclasses whose fields say what they mean and which values they take.

A field is ``name: Annotated[type, "What it means.", Range(...)] = default``: the text stands in the
help, the range is optional. Types: bool, int, float, str, ``Literal`` of texts, ``tuple`` of these,
and ``| None``.
"""

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Literal, NamedTuple, TypeVar, Union

from pyfeat.ssl.registry import nearest, one_of

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Numbers that a field takes.

    Attributes:
        low: Smallest value.
        high: Largest value.
        above: What the value must exceed.
        below: What must exceed the value.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        names = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
        bounds = {text: getattr(self, name) for name, text in names.items()}
        return " and ".join(f"{text} {x:g}" for text, x in bounds.items() if x is not None)


AT_LEAST_ONE = Range(low=1)
NOT_NEGATIVE = Range(low=0)
POSITIVE = Range(above=0)
FRACTION = Range(low=0, high=1)


class Key(NamedTuple):
    """What a field says about itself."""

    name: str
    type: Any
    text: str
    range: Range | None
    default: Any  # MISSING where a value must be given

    @property
    def kind(self) -> str:
        """The type in words that suit an error message and the help."""
        return _kind(self.type)


def keys_of(options: type[Any]) -> Iterator[Key]:
    """Yield the fields of a dataclass, in order.

    Raises:
        TypeError: If a field does not say what it means.
    """
    hints = typing.get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        if typing.get_origin(hint) is not typing.Annotated:
            message = f"{options.__name__}: {field.name} must be Annotated with a text, got {hint}"
            raise TypeError(message)
        kind, text, *rest = typing.get_args(hint)
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        yield Key(field.name, kind, text, rest[0] if rest else None, default)


def read_options(op: str, place: str, options: type[T], values: Mapping[str, Any]) -> T:
    """Make options of values as YAML has them.

    Args:
        op: Opens every error message.
        place: Dotted name of the section; opens the names of keys in messages.
        options: Frozen dataclass.
        values: By key. Whole numbers pass for floats, and texts that read as a float, such as
            1e-3, which YAML takes for text; lists pass for tuples.

    Raises:
        ValueError: If a key is unknown or missing, or a value is of another type or out of range;
            names the key, and the nearest one if it is unknown.
    """
    keys = {key.name: key for key in keys_of(options)}
    prefix = f"{place}." if place else ""
    for name in values:
        if name not in keys:
            known = one_of(keys) if keys else "left out"
            message = f"{op}: {prefix}{name} must be a known key, got {name!r}"
            message += nearest(name, keys) or f"; known: {known}"
            raise ValueError(message)
    given = {name: _read(op, prefix + name, keys[name], value) for name, value in values.items()}
    for key in keys.values():
        if key.name not in given and key.default is MISSING:
            message = f"{op}: {prefix}{key.name} must be given ({key.text}), got nothing"
            raise ValueError(message)
    try:
        return options(**given)
    except ValueError as error:  # what a dataclass says of values that do not go together
        message = f"{op}: {place}: {error}"
        raise ValueError(message) from error


def write_options(options: Any) -> dict[str, Any]:
    """Return the values of options as YAML and JSON can hold them; ``read_options`` reads them."""
    return {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in dataclasses.fields(options)
        for value in [getattr(options, field.name)]
    }


def describe(place: str, options: type[Any]) -> Iterator[str]:
    """Yield one line of help for each field."""
    for key in keys_of(options):
        limits = f", {key.range}" if key.range else ""
        default = "must be given" if key.default is MISSING else f"default {_shown(key.default)}"
        yield f"{place}.{key.name} ({key.kind}{limits}; {default})\n    {key.text}"


def _read(op: str, name: str, key: Key, value: Any) -> Any:
    read = _converted(key.type, value)
    if read is _NO_VALUE:
        message = f"{op}: {name} must be {key.kind}, got {value!r}"
        if typing.get_origin(key.type) is Literal:
            message += nearest(value, [str(x) for x in typing.get_args(key.type)])
        raise ValueError(message)
    if key.range is not None:
        for number in read if isinstance(read, tuple) else (read,):
            if number is not None and number not in key.range:
                message = f"{op}: {name} must be {key.range}, got {value!r}"
                raise ValueError(message)
    return read


_NO_VALUE = object()


def _converted(kind: Any, value: Any) -> Any:
    """Return a value in a type, or ``_NO_VALUE`` if it has no place there."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        tried = (_converted(argument, value) for argument in arguments)
        return next((read for read in tried if read is not _NO_VALUE), _NO_VALUE)
    if kind is types.NoneType:
        return None if value is None else _NO_VALUE
    if origin is Literal:
        return value if value in arguments else _NO_VALUE
    if origin is tuple:
        return _converted_tuple(arguments, value)
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            return _NO_VALUE
        return number if number - number == 0 else _NO_VALUE  # neither NaN nor infinity
    return value if type(value) is kind else _NO_VALUE


def _converted_tuple(arguments: Sequence[Any], value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return _NO_VALUE
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = [arguments[0]] * len(value)
    if len(arguments) != len(value):
        return _NO_VALUE
    read = tuple(_converted(kind, item) for kind, item in zip(arguments, value, strict=True))
    return _NO_VALUE if any(item is _NO_VALUE for item in read) else read


def _kind(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(argument) for argument in arguments)
    if origin is Literal:
        return one_of(str(x) for x in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list, each {_kind(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {_kind(arguments[0])}"
    if kind is types.NoneType:
        return "null"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return words[kind]


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)
