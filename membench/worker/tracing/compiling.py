"""Code that a case compiles, on fake tensors: it runs as it is written."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from membench.worker.tracing.ledger import Ledger


@contextlib.contextmanager
def running_as_written(ledger: Ledger) -> Iterator[list[Any]]:
    """Let ``torch.compile`` give back what it is given, and yield a list of all that it was given.

    Temporaries of functions without gradients, such as an optimizer's, are left out: compilers fuse such functions, so
    that what is computed in between needs no memory. Modules count as they are written.
    """
    original, given = torch.compile, list[Any]()

    def compile_(model: Any = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(compile_, **options)
        given.append(model)
        is_module = isinstance(getattr(model, "__self__", model), torch.nn.Module)
        return model if is_module else _fused(model, ledger)

    torch.compile = compile_
    try:
        # Of what was compiled before, when its file was imported.
        with torch.compiler.set_stance("force_eager"):
            yield given
    finally:
        torch.compile = original


def _fused(function: Callable[..., Any], ledger: Ledger) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            return function(*arguments, **options)
        with ledger.without_temporaries(), contextlib.suppress(RuntimeError):
            return function(*arguments, **options)
        return None  # compilers know rules for states in few bits that are sharded, single operations do not

    return run
