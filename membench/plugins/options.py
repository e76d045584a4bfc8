"""The base of every plug-in: a class of typed options that states which version of the contract it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict

from membench.units import parse_bytes

CONTRACT_VERSION = 1
"""History: 1, the first."""
PROMISE = """\
Promise: within one CONTRACT_VERSION nothing here, nor an argument or field of what is passed, is removed, renamed,
reordered or given another meaning; new stages have defaults. A plug-in that states the version it was written for
(contract: ClassVar[int]) is refused by any other version instead of being run wrongly; the CHANGELOG says what to
change."""

_T = TypeVar("_T")


def _parsed(size: object) -> object:
    return parse_bytes(size) if isinstance(size, str) else size


ByteCount = Annotated[int, BeforeValidator(_parsed)]
"""The type of an option that is a size: bytes, or text such as '8 MiB'."""


class Options(BaseModel):
    """The base of every plug-in: typed options, and a docstring whose first line ``membench list`` shows."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)
    contract: ClassVar[int] = CONTRACT_VERSION
    """The version of the contract that the plug-in was written for, where it states one."""
    required: ClassVar[frozenset[str]] = frozenset()
    """Stages that have no default."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Options by the suffix that selects them: preset '60m' of 'llama' is written 'llama-60m'."""
    imports: ClassVar[tuple[str, ...]] = ("torch",)
    """Modules that the fork server imports once, so that no case pays for them."""


class Unsuitable(Exception):
    """Raised by a stage that cannot serve the case; the case is skipped with this reason."""


class NotInModel(ValueError):
    """Raised by a stage whose options name what the model does not have; the case fails with this one line."""


class DoesNotFit(Exception):
    """Arithmetic says that a case needs more memory than there is."""


def given_back(returned: _T | None, plugin: Options, method: str, wanted: str) -> _T:
    """Return what a method that changes something has returned.

    Raises:
        TypeError: if the method returned nothing: a ``return`` is missing.
    """
    if returned is None:
        raise TypeError(f"'{method}' of {type(plugin).__name__} returned nothing; end it with 'return {wanted}'")
    return returned
