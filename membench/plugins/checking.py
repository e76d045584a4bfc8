"""Whether a class keeps the contract of its kind: what would else fail, or be passed over, in the middle of a run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

from membench.errors import nearest
from membench.plugins import CONTRACT_CLASSES
from membench.plugins.options import CONTRACT_VERSION, Options
from membench.records.validation import shown

_ALIKE = 0.75
_NOT_HASHABLE = (list, dict, set, bytearray)


@functools.cache
def complaint(loaded: type[Options], base: type[Options]) -> str | None:
    """What is wrong with a plug-in's class: method or option, and argument; ``None`` if nothing is."""
    return next(_complaints(loaded, base), None)


def _complaints(loaded: type[Options], base: type[Options]) -> Iterator[str]:
    if loaded.contract != CONTRACT_VERSION:
        yield f"it was written for version {shown(loaded.contract)} of it, and this membench has {CONTRACT_VERSION}"
    stages = {
        name: stage
        for owner in reversed([each for each in loaded.__mro__ if each in CONTRACT_CLASSES])
        for name, stage in vars(owner).items()
        if not name.startswith("_") and (inspect.isfunction(stage) or isinstance(stage, property))
    }
    yield from _of_options(loaded, stages)
    own = _own(loaded)
    if "__init__" in own:
        yield "'__init__' is not called with anything of yours: write options as fields with types, 'keep: float = 0.5'"
    for name, given in own.items():
        if name in stages:
            yield from _of_stage(name, given, stages[name])
        elif inspect.isfunction(given) and not name.startswith("_"):
            near = nearest(name, stages, _ALIKE)
            if near is not None and near not in own:
                yield f"no stage is named '{name}'; did you mean '{near}'? A method of your own begins with '_'"
    for name in sorted(getattr(base, "required", frozenset()) | loaded.required):
        if name not in own:
            yield f"'{name}{_signature(stages[name])}' is missing"


def _own(loaded: type[Options]) -> dict[str, Any]:
    """What a class and those that it is derived from define, the contract's own classes aside."""
    found: dict[str, Any] = {}
    for owner in reversed(loaded.__mro__):
        if owner not in CONTRACT_CLASSES and owner.__module__.partition(".")[0] not in ("pydantic", "builtins"):
            found |= vars(owner)
    return found


def _of_options(loaded: type[Options], stages: dict[str, Any]) -> Iterator[str]:
    for name, field in loaded.model_fields.items():
        if name in stages:
            yield f"option '{name}' has the name of a stage"
        declaring = [each for each in loaded.__mro__ if name in vars(each).get("__annotations__", {})]
        of_contract = [each for each in declaring if each in CONTRACT_CLASSES]
        if len(declaring) > len(of_contract) > 0 and name in of_contract[0].model_fields:
            yield f"'{name}' is an option that {of_contract[0].__name__} has already: take another name for yours"
        elif of_contract and name not in of_contract[0].model_fields:
            yield f"'{name}' is no option: write '{name}: ClassVar[TYPE] = …', or leave its type out"
        if isinstance(field.default, _NOT_HASHABLE):
            kind = type(field.default).__name__
            yield f"option '{name}' = {shown(field.default)}: a {kind} can change and cannot be hashed; take a tuple"
    for name in ("imports", "devices"):
        value = getattr(loaded, name, ())
        if isinstance(value, str):
            yield f"{name} = {shown(value)}: expected a tuple of names: ({shown(value)},)"
    better = getattr(loaded, "better", "lower")
    if better not in ("lower", "higher"):
        yield f"better = {shown(better)}: expected 'lower' or 'higher'"
    for preset, options in loaded.presets.items():
        unknown = next((option for option in options if option not in loaded.model_fields), None)
        if unknown is not None:
            yield f"preset '{preset}' sets '{unknown}', which is no option"


def _of_stage(name: str, given: Any, stage: Any) -> Iterator[str]:
    if isinstance(stage, property):
        if not isinstance(given, property | functools.cached_property):
            yield f"'{name}' is a property: write @property above it"
        return
    if isinstance(given, staticmethod | classmethod) or not callable(given):
        yield f"'{name}' is not a method: write 'def {name}{_signature(stage)}'"
        return
    if inspect.iscoroutinefunction(given) or inspect.isgeneratorfunction(given):
        yield f"'{name}' is a coroutine or a generator; it must be a regular function"
        return
    wanted = list(inspect.signature(stage).parameters)
    taken: list[str] = []
    spare = False
    for argument in inspect.signature(given).parameters.values():
        if argument.kind is argument.VAR_POSITIONAL:
            spare = True
        elif argument.kind in (argument.POSITIONAL_ONLY, argument.POSITIONAL_OR_KEYWORD):
            if len(taken) < len(wanted) or argument.default is argument.empty:
                taken.append(argument.name)
        elif argument.kind is argument.KEYWORD_ONLY and argument.default is argument.empty:
            taken.append(argument.name)
    for number, argument_name in enumerate(wanted):
        if number >= len(taken) and not spare:
            yield f"'{name}' lacks the argument '{argument_name}': write 'def {name}{_signature(stage)}'"
            return
        if number < len(taken) and taken[number].lstrip("_") != argument_name:
            yield (
                f"'{name}' has the argument '{taken[number]}' where '{argument_name}' comes:"
                f" write 'def {name}{_signature(stage)}'"
            )
            return
    if len(taken) > len(wanted):
        extra = taken[len(wanted)]
        yield f"'{name}' needs an argument '{extra}' that it is not given: write 'def {name}{_signature(stage)}'"


def _signature(stage: Any) -> str:
    """A stage's arguments, without their types."""
    return f"({', '.join(inspect.signature(stage).parameters)})"
