"""What is said of the layers that techniques convert: none, some that they left alone, some that broke the model."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from membench import plugins
from membench.errors import MembenchError
from membench.host.out_of_memory import is_out_of_memory
from membench.plugins import Context, Parallel, SelectsLayers, Technique
from membench.plugins.replacing import LeftAlone, numberless, reason_to_keep

if TYPE_CHECKING:
    from torch import nn

_MOST_NAMES = 4


class OwnLayers:
    """The layers of a module that have a forward or hooks of their own; none of them is kept alive.

    A technique that derives from no class that asks may replace them by itself.
    """

    def __init__(self, module: nn.Module) -> None:
        self._all = weakref.WeakSet(module.modules())
        self._own = [
            (path, weakref.ref(layer), weakref.ref(module.get_submodule(path.rpartition(".")[0])), reason)
            for path, layer in module.named_modules()
            if path and (reason := reason_to_keep(layer, None)) is not None
        ]

    def lost(self, module: nn.Module, technique: Technique) -> Iterator[LeftAlone]:
        """Yield those in whose places are new modules, but none that is gone with what was around it."""
        present = set(module.modules())
        for path, layer, parent, reason in self._own:
            around, name = parent(), path.rpartition(".")[2]
            new = around._modules.get(name) if around in present else None
            if layer() not in present and new is not None and new not in self._all:
                yield LeftAlone(technique, path, reason)


class BrokenForward(MembenchError):
    """The model's forward pass fails with a technique; the message names the layer and how to leave it out."""


def remarks(names: Sequence[str], techniques: Sequence[Technique], context: Context) -> list[str]:
    """Return a remark for each technique that only converts the model and changed nothing in it, or left layers alone.

    Args:
        names: of the techniques in the suite.
    """
    members = list(zip(names, techniques, strict=True))
    idle = [
        f"'{name}' changed nothing in the model"
        for name, technique in members
        if not _acts_while_running(technique) and any(technique is each for each in context.idle)
    ]
    said = [
        f"'{name}' {remark}"
        for name, technique in members
        for what, layers in (("left {} alone", context.left_alone), ("dropped what {} did by itself", context.lost))
        if (remark := _listed(what, layers, technique))
    ]
    return [*idle, *said]


def _acts_while_running(technique: Technique) -> bool:
    """Whether a technique acts while steps run; then an unchanged model is not a problem.

    Of those that spread a model over ranks only those are idle that were to split it: to act in steps is no excuse.
    """
    if isinstance(technique, Parallel):
        return False
    stages = ("optimizer", "step_context", "training_step", "generate_options")
    return any(getattr(type(technique), stage) is not getattr(Technique, stage) for stage in stages)


def belongs_to(left: LeftAlone, technique: Technique) -> bool:
    """Whether a technique left a layer alone; in a rehearsal, it is a copy of it."""
    return left.technique is technique or type(left.technique) is type(technique)


def _listed(what: str, layers: Iterable[LeftAlone], technique: Technique) -> str:
    """Say what became of layers, with their number and names, those of alike blocks as one; empty if there are none."""
    reasons = {layer.path: layer.reason for layer in layers if belongs_to(layer, technique)}
    alike: dict[tuple[str, str], list[str]] = {}
    for path, reason in reasons.items():
        alike.setdefault((numberless(path), reason), []).append(path or "the model itself")
    named = [
        f"{paths[0] if len(paths) == 1 else common} ({reason})" for (common, reason), paths in alike.items()
    ]  # fmt: skip
    if len(named) > _MOST_NAMES:
        named[_MOST_NAMES:] = [f"{len(named) - _MOST_NAMES} more kinds"]
    count = f"{len(reasons)} layer{'' if len(reasons) == 1 else 's'}"
    return f"{what.format(count)}: {', '.join(named)}" if named else ""


@contextlib.contextmanager
def explaining(module: nn.Module, names: Sequence[str], techniques: Sequence[Technique]) -> Iterator[None]:
    """Run a part of the case; if it fails in the forward pass of a part of the model, name that part.

    Args:
        names: of the techniques in the suite.

    Raises:
        BrokenForward: in place of the error, if a technique converts layers.
    """
    try:
        yield
    except (plugins.Unsuitable, plugins.DoesNotFit, plugins.NotInModel):
        raise
    except Exception as error:
        members = [name for name, member in zip(names, techniques, strict=True) if isinstance(member, SelectsLayers)]
        path = _failing(error, module)
        if not members or not path or is_out_of_memory(error):
            raise
        kind = type(module.get_submodule(path)).__name__
        raise BrokenForward(
            f"with '{'+'.join(members)}', the forward pass fails in {path} ({kind}); "
            f'if its layers must stay as they are, leave them out: skip = ["{path}"]'
        ) from error


def _failing(error: Exception, module: nn.Module) -> str:
    """Return the path of the innermost module in whose methods an error was raised; empty if in none, or the whole."""
    paths = {id(child): path for path, child in module.named_modules()}
    found = ""
    trace = error.__traceback__
    while trace is not None:
        found = paths.get(id(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    return found
