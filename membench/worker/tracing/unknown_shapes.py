"""Results whose shapes depend on values, which fake tensors have not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch._library.fake_impl import FakeImplCtx

_aten = torch.ops.aten


def answer(operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return a result of the shape that it has if every value is true, or not zero; ``None``: its shape is known.

    It is the largest that there can be. Counts of values have as many places as the caller asks for at least.
    """
    tensor: Any = args[0] if args else None
    if operation is _aten.nonzero.default:
        return tensor.new_empty((tensor.numel(), tensor.ndim), dtype=torch.long)
    if operation is _aten.bincount.default:
        return tensor.new_zeros(max(1, kwargs.get("minlength", args[2] if len(args) > 2 else 0)))
    if operation is _aten.index.Tensor and any(_is_mask(each) for each in args[1]):
        places = [place for each in args[1] for place in (_all_places(each) if _is_mask(each) else [each])]
        return tensor[tuple(slice(None) if each is None else each for each in places)]
    return None


@contextlib.contextmanager
def given_to_libraries(answered: Callable[[], None]) -> Iterator[None]:
    """Let operations of libraries have the least size that is possible where they say that it depends on values.

    Such are columns of an input with outliers, of which there are few.

    Args:
        answered: called each time.
    """
    original = FakeImplCtx.new_dynamic_size

    def new_size(context: FakeImplCtx, *, min: int = 0, max: int | None = None) -> int:
        del context, max
        answered()
        return min

    FakeImplCtx.new_dynamic_size = new_size  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        FakeImplCtx.new_dynamic_size = original  # type: ignore[method-assign]


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _all_places(mask: torch.Tensor) -> list[torch.Tensor]:
    return [mask.new_zeros(mask.numel(), dtype=torch.long) for _ in range(mask.ndim)]
