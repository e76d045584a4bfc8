"""The logits in whatever a module returns, taken in this one place by everything that runs a model.

B, T, V: batch, tokens, vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, TypeGuard

from membench.errors import MembenchError

if TYPE_CHECKING:
    import torch

_WANTED = "(batch, tokens, vocabulary)"
_MOST_PARTS = 5


class WrongOutput(MembenchError):
    """A module does not take the token ids of a case, or does not return logits for them."""

    def __init__(self, problem: str, name: str | None = None) -> None:
        """Make the error.

        Args:
            problem: what is wrong, as the predicate of a sentence about the model.
            name: the model's name in the suite, where it is known.
        """
        whose = "the model" if name is None else f"model '{name}'"
        super().__init__(f"{whose} {problem}")
        self.problem = problem


def logits_of(output: object, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, T, V) in what a module returned for token ids (B, T).

    They are the output itself, its attribute or key ``logits``, or come first in a tuple or a list, which may be
    nested; a loss before them is skipped.

    Raises:
        WrongOutput: if there are no logits of that shape; the message names the type and the shape of what came.
    """
    found = _logits_in(output)
    if found is None or found.ndim != 3 or found.shape[:2] != ids.shape:
        raise WrongOutput(_problem(output, ids))
    return found


def last_logits_of(output: object, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, 1, V) of the last position; a module may return those of all positions or of this one.

    Raises:
        WrongOutput: as ``logits_of``.
    """
    found = _logits_in(output)
    batch, tokens = ids.shape
    if found is not None and found.ndim == 2 and found.shape[0] == batch:
        return found[:, None]
    if found is None or found.ndim != 3 or found.shape[0] != batch or found.shape[1] not in (1, tokens):
        raise WrongOutput(_problem(output, ids))
    return found[:, -1:]


def _logits_in(output: object) -> torch.Tensor | None:
    """Return the first floating-point tensor that may be logits, those with three dimensions preferred."""
    found = list(_candidates(output))
    return next((tensor for tensor in found if tensor.ndim == 3), found[0] if found else None)


def _candidates(output: object) -> Iterator[torch.Tensor]:
    if _is_tensor(output):
        if output.is_floating_point() and output.ndim > 1:
            yield output
    elif (named := _named(output)) is not None:
        yield from _candidates(named)
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _candidates(part)


def _is_tensor(output: object) -> TypeGuard[torch.Tensor]:
    """Whether something is a tensor; torch itself is imported in the measured process alone."""
    return callable(getattr(output, "is_floating_point", None)) and hasattr(output, "ndim")


def _named(output: object) -> object:
    return output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)


def _problem(output: object, ids: torch.Tensor) -> str:
    batch, tokens = ids.shape
    named = _named(output)
    came = described(output) if named is None or callable(named) else f"{described(named)} as 'logits'"
    place = _place(output) if named is None else ""
    return f"returned {came} for {batch} × {tokens} token ids: logits must be {_WANTED}{place}"


def _place(output: object) -> str:
    """Return where logits are looked for in an output of a type that may hold them elsewhere; empty for a tensor."""
    if _is_tensor(output):
        return ""
    if isinstance(output, Mapping):
        return ", under the key 'logits'"
    return ", as the first tensor" if isinstance(output, tuple | list) else ", in a tensor or an attribute 'logits'"


def described(output: object) -> str:
    """Return the type and the shape of what a module returned, in words."""
    if output is None:
        return "None"
    if _is_tensor(output):
        dtype = "" if output.is_floating_point() else f" of {str(output.dtype).removeprefix('torch.')}"
        return f"a tensor of shape {tuple(output.shape)}{dtype}"
    kind = type(output).__name__
    name = f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"
    if isinstance(output, Mapping):
        return f"{name} with {_listed([f'{key!r}: {_short(value)}' for key, value in output.items()])}"
    if isinstance(output, tuple | list):
        return f"{name} of {_listed([_short(part) for part in output])}"
    if is_dataclass(output):
        parts = [f"'{field.name}': {_short(getattr(output, field.name, None))}" for field in fields(output)]
        return f"{name} with {_listed(parts)}"
    return name


def _short(part: object) -> str:
    """Return the shape of a tensor, or the type of what is none."""
    shape = getattr(part, "shape", None)
    return f"{tuple(shape)}" if isinstance(shape, tuple) else type(part).__name__


def _listed(parts: list[str]) -> str:
    more = f" and {len(parts) - _MOST_PARTS} more" if len(parts) > _MOST_PARTS else ""
    return (", ".join(parts[:_MOST_PARTS]) or "nothing") + more
