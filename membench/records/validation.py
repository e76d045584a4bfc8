"""Conversion of pydantic's validation errors to messages in the terms of the TOML file."""

from __future__ import annotations

import datetime
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from membench.errors import did_you_mean, nearest, one_line

_LONGEST_VALUE = 80

_EXPECTED = {
    "model_type": "a table",
    "dict_type": "a table",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
}
_BOUNDS = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "multiple_of": "a multiple of {multiple_of}",
    "finite_number": "finite",
}
_COUNTS = {
    "too_short": ("at least", "min_length", "entry", "entries"),
    "too_long": ("at most", "max_length", "entry", "entries"),
    "string_too_short": ("at least", "min_length", "character", "characters"),
    "string_too_long": ("at most", "max_length", "character", "characters"),
}


@dataclass(frozen=True)
class Problem:
    """The problem to report of an invalid input.

    Attributes:
        kind: an ``unknown`` key, a ``missing`` key, or an invalid ``value``.
        value: the value as TOML writes it, shortened.
        remedy: what is valid instead.
    """

    kind: typing.Literal["unknown", "missing", "value"]
    key: str
    value: str
    remedy: str

    def sentence(self, noun: str = "") -> str:
        """Return the message.

        Args:
            noun: the word for a key, such as 'option'.
        """
        if self.kind == "unknown":
            return f"unknown {noun or 'key'} '{self.key}'; {self.remedy}"
        name = f"{noun} '{self.key}'" if noun else self.key
        if self.kind == "missing":
            return f"{name} is missing" if noun else f"'{name}' is missing"
        return f"{name} = {self.value}: {self.remedy}" if self.key else self.remedy


def problem(error: ValidationError, schema: type[BaseModel], given: Mapping[str, Any]) -> Problem:
    """Return the problem to report of a validation error.

    Unknown keys come first, since a misspelled key is also reported as missing.

    Args:
        schema: the schema that the input was validated against.
        given: the input.
    """
    found = error.errors(include_url=False)
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    if first["type"] == "extra_forbidden":
        *path, last = first["loc"]
        return Problem("unknown", _dotted(first["loc"]), "", did_you_mean(str(last), _keys(schema, path)))
    if first["type"] == "missing":
        return Problem("missing", _dotted(first["loc"]), "", "")
    # Each branch of a union reports an error of its own, with the name of the branch at the end of the path.
    place = _place(first["loc"], given)
    remedies = [_remedy(each) for each in found if _place(each["loc"], given) == place]
    remedy, *others = dict.fromkeys(remedies)
    remedy = " or ".join([remedy, *(other.removeprefix("expected ") for other in others)])
    return Problem("value", _dotted(place), shown(_at(place, given)), remedy)


def shown(value: Any) -> str:
    """Format a value as TOML writes it, on one line and shortened."""
    text = _written(value)
    if isinstance(value, str) and len(text) > _LONGEST_VALUE:
        return repr(value[: _LONGEST_VALUE - 3] + "…")
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def shortened(name: str) -> str:
    """Format the name of a key on one line, shortened."""
    name = one_line(name[:_LONGEST_VALUE]) + name[_LONGEST_VALUE:]
    return name if len(name) <= _LONGEST_VALUE else name[: _LONGEST_VALUE - 1] + "…"


def _written(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() if abs(value) >= 10**_LONGEST_VALUE:
            return "a very large number"
        case datetime.date() | datetime.time():
            return value.isoformat()
        case dict():
            return "{" + ", ".join(f"{key} = {_written(inner)}" for key, inner in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(_written, value)) + "]"
    return repr(value)


def _dotted(path: Sequence[str | int]) -> str:
    return ".".join(shortened(str(name)) for name in path)


def _place(path: Sequence[str | int], given: Any) -> tuple[str | int, ...]:
    """Return the part of an error's path that exists in the input; the rest are pydantic's names of union branches."""
    place: list[str | int] = []
    for part in path:
        inside = isinstance(given, dict) and part in given
        inside |= isinstance(given, list) and isinstance(part, int) and part < len(given)
        if not inside:
            break
        given = given[part]
        place.append(part)
    return tuple(place)


def _at(place: Sequence[str | int], given: Any) -> Any:
    for part in place:
        given = given[part]
    return given


def _keys(schema: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    for part in path:
        if isinstance(part, str) and part in schema.model_fields:
            schema = _table_in(schema.model_fields[part].annotation) or schema
    return list(schema.model_fields)


def _table_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((table for inner in typing.get_args(annotation) if (table := _table_in(inner))), None)


def _remedy(error: Any) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "list_type" and isinstance(error["input"], str):
        return f"expected a list: [{shown(error['input'])}]"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}"
    if kind in _BOUNDS:
        whole = {key: int(v) if isinstance(v, float) and v.is_integer() else v for key, v in context.items()}
        return f"must be {_BOUNDS[kind].format(**whole)}"
    if kind in _COUNTS:
        bound, key, one, many = _COUNTS[kind]
        return f"must have {bound} {context[key]} {one if context[key] == 1 else many}"
    if kind == "literal_error":
        choices = [quoted or bare for quoted, bare in re.findall(r"'([^']*)'|([^\s,']+)", context["expected"])]
        near = nearest(error["input"], choices) if isinstance(error["input"], str) else None
        return f"did you mean '{near}'?" if near else f"expected {context['expected']}"
    if kind == "string_pattern_mismatch":
        return f"does not fit the pattern {context['pattern']}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
