"""Anybody's module, from a function."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PrivateAttr

from membench.errors import summary
from membench.plugins import Context, Model

if TYPE_CHECKING:
    from torch import nn


class Factory(Model):
    """Any nn.Module that 'package.module:function' returns; it takes token ids and gives logits.

    The function is called without arguments after torch's seed is set, in the folder the run was started in. Token ids
    are the first argument of the module's forward pass. Logits are what it returns, or its key or attribute ``logits``,
    or the first of a tuple; what it returns is checked before anything is measured.

    Attributes:
        vocabulary_size: how many token ids it gets; by default, as many as it has both embeddings and logits for.
    """

    imports: ClassVar[tuple[str, ...]] = (
        "torch",
        "torch._dynamo",
    )  # which torch imports when it draws weights without data, as of a skeleton
    function: str
    vocabulary_size: int | None = Field(None, ge=2, le=16_777_216)
    _depth: int | None = PrivateAttr(None)

    def check(self) -> str | None:
        where, _, name = self.function.partition(":")
        reason = _not_there(where, name) if where and name.isidentifier() else "write 'package.module:function'"
        return f"function = {self.function!r}: {reason}" if reason else None

    def build(self, context: Context) -> nn.Module:
        import torch

        torch.manual_seed(context.seed)
        return self._make().to(context.device)

    def skeleton(self) -> nn.Module:
        import torch

        try:
            with torch.device("meta"):
                return self._make()
        except Exception as error:
            raise NotImplementedError(f"{self.function} cannot be run on shapes alone: {summary(error)}") from error

    def needed_bytes(self) -> int | None:
        try:
            return sum(parameter.nbytes for parameter in self.skeleton().parameters())
        except NotImplementedError:
            return None

    def depth(self) -> int | None:
        from membench.builtin.models import depth

        try:
            return depth.of_module(self.skeleton())
        except NotImplementedError:
            return None

    def with_depth(self, layers: int) -> Model:
        made = self.model_copy()
        made._depth = layers
        return made

    def _make(self) -> nn.Module:
        where, _, name = self.function.partition(":")
        module: nn.Module = getattr(importlib.import_module(where), name)()
        if self._depth is not None:
            from membench.builtin.models import depth

            depth.cut_module(module, self._depth)
        return module

    def vocabulary(self, module: nn.Module) -> int:
        from membench.worker.output_check import found_vocabulary

        return found_vocabulary(self, module) if self.vocabulary_size is None else self.vocabulary_size


def _not_there(where: str, name: str) -> str | None:
    """Why a function cannot be imported or called without arguments; ``None`` if it can, or if only importing can tell.

    Nothing is imported, so that whatever the module imports (torch) stays away from the runner.
    """
    if where in sys.modules and where != "__main__":
        return None
    spec: ModuleSpec | None = None
    parts = where.split(".")
    for count, part in enumerate(parts, start=1):
        module, parent = ".".join(parts[:count]), ".".join(parts[: count - 1])
        if not part.isidentifier():
            return f"{where!r} is no module's name"
        if spec is not None and spec.submodule_search_locations is None:
            return f"there is no module '{module}': '{parent}' is no package"
        spec = _spec(module, None if spec is None else list(spec.submodule_search_locations or ()))
        if spec is None:
            folders = "the current folder or on Python's path" if count == 1 else f"package '{parent}'"
            return f"there is no module '{module}' in {folders}"
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    try:
        source = Path(spec.origin).read_bytes()
        tree = ast.parse(source)
    except SyntaxError as error:
        return f"{spec.origin}, line {error.lineno}: {error.msg}"
    except (OSError, ValueError):
        return None
    names = _TopLevel()
    names.visit(tree)
    if name not in names.bound:
        made_while_running = "*" in names.bound or "__getattr__" in names.bound or b"globals(" in source
        return None if made_while_running else f"module '{where}' has no '{name}'"
    wanted = _without_default(names.bound[name])
    return f"it is called without arguments, but needs {', '.join(wanted)}" if wanted else None


def _spec(module: str, folders: list[str] | None) -> ModuleSpec | None:
    importlib.invalidate_caches()
    if folders is not None:
        return PathFinder.find_spec(module, folders)
    # Workers have the folder that the run was started in at the end of their path; the runner itself may not.
    found = PathFinder.find_spec(module, [*sys.path, os.getcwd()])
    if found is None:
        try:
            return importlib.util.find_spec(module)
        except ValueError:  # __main__
            return None
    return found


class _TopLevel(ast.NodeVisitor):
    """Collects the names that a module binds, each with the function definition that binds it, if it is one."""

    def __init__(self) -> None:
        self.bound: dict[str, ast.FunctionDef | None] = {}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.bound[node.name] = None if node.decorator_list else node

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.bound[node.name] = None

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.bound[node.name] = None

    def visit_alias(self, node: ast.alias) -> None:
        self.bound[node.asname or node.name.partition(".")[0]] = None

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.bound[node.id] = None


def _without_default(function: ast.FunctionDef | None) -> list[str]:
    if function is None:
        return []
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    wanted = positional[: len(positional) - len(arguments.defaults)]
    wanted += [a for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default is None]
    return [argument.arg for argument in wanted]
