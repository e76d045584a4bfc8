"""The screen that ``membench list contract`` prints: the plug-in contract, made from its base classes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from membench.plugins import CONTRACT_CLASSES, registry
from membench.plugins.options import CONTRACT_VERSION, PROMISE, Options

_FOR_THE_HARNESS = ("model_config", "required")
"""Class variables that a plug-in does not set."""
_RULES = """\
Derive from a class of membench.plugins and override what you need: every stage has a default unless it "must be there".
Options are annotated fields with hashable values; class variables describe the plug-in. 'presets' names variants: the
preset '60m' of 'llama' is 'llama-60m'. 'imports' names modules that the fork server imports once. Import torch inside
the methods only: they run in the measured process, except check, refuse and nominal_*, which run without torch. Begin
the names of your own methods with '_'. Register the class in the entry-point group that stands beside its base class;
in the group membench.suites, an entry point is the path of a suite file, under the name of the suite."""


def contract_lines() -> Iterator[str]:
    """The lines of the screen: version, promise, and what each class declares."""
    yield from _RULES.splitlines()
    yield ""
    yield from PROMISE.splitlines()
    yield ""
    yield f"CONTRACT_VERSION = {CONTRACT_VERSION}"
    for owner in CONTRACT_CLASSES:
        yield ""
        yield from _declared(owner)


def _declared(owner: type[Options]) -> Iterator[str]:
    """A class without the bodies of its stages; only what it declares itself."""
    group = next((f"  # membench.{kind}s" for kind, base in registry.CONTRACT.items() if base is owner), "")
    yield f"class {owner.__name__}({', '.join(base.__name__ for base in owner.__bases__)}):{group}"
    for name, annotation in inspect.get_annotations(owner).items():
        if name not in _FOR_THE_HARNESS:
            field = owner.model_fields.get(name)
            yield f"    {name}: {annotation} = {(vars(owner)[name] if field is None else field.default)!r}"
    for name, stage in vars(owner).items():
        if name.startswith("_"):
            continue
        required = "  # must be there" if name in owner.required else ""
        if isinstance(stage, property):
            assert stage.fget is not None
            yield "    @property"
            yield f"    def {name}{_signature(stage.fget)}: ..."
        elif inspect.isfunction(stage):
            yield f"    def {name}{_signature(stage)}: ...{required}"


def _signature(stage: object) -> str:
    """Arguments and types as they are written in the source."""
    assert inspect.isfunction(stage)
    signature = inspect.signature(stage)
    arguments = [
        name if argument.annotation is argument.empty else f"{name}: {argument.annotation}"
        for name, argument in signature.parameters.items()
    ]
    return f"({', '.join(arguments)}) -> {signature.return_annotation}"
