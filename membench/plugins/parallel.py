"""The base class of techniques that spread a case over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from membench.plugins.contract import Context, Setting, Technique
from membench.plugins.options import Unsuitable
from membench.plugins.ranks import DIMENSIONS, ORDER, Dimension

if TYPE_CHECKING:
    import torch
    from torch import nn

_INNER_DEGREE = 2


class Parallel(Technique):
    """A technique that spreads a case over ranks, one on each device of ``2xcpu`` or ``4xcuda``.

    Stages run on every rank. ``parallelize`` comes after ``apply`` of all members of the stack: first of the techniques
    that split the model, last of those that split the batch, whatever their order in the stack.
    """

    required: ClassVar[frozenset[str]] = frozenset({"parallelize"})
    dimension: ClassVar[Dimension] = "data"
    """Along which dimension of the mesh it works; two techniques of one dimension do not go together."""
    shares_batch: ClassVar[bool] = False
    """Whether each rank along its dimension gets its own rows of the batch; else all get the same."""
    splits_model: ClassVar[bool] = False
    """Whether it leaves each rank less of the model; one that then finds nothing to split is reported as idle."""
    shares_states: ClassVar[bool] = False
    """Whether each rank keeps optimizer states for some of the parameters alone."""
    degree: int | None = Field(None, ge=1, le=9999)
    """Ranks along its dimension. Left open: 2 along inner dimensions, and along the outermost all that are left."""

    checkpoint: Literal["gathered", "sharded"] = "gathered"
    """How it is saved: whole by the first rank, which all send their parts to, or by each rank its part."""

    def refuse(self, setting: Setting) -> str | None:
        """Return why the case cannot be spread, as far as any technique can tell; subclasses ask this, too."""
        if setting.ranks is None:
            return "it spreads a case over several devices: name them as device = '2xcpu' or '2xcuda'"
        others = (*setting.before, *setting.after)
        if any(isinstance(other, Parallel) and other.dimension == self.dimension for other in others):
            return f"the stack names two techniques that split the {self.dimension} over ranks"
        try:
            found = degrees((*setting.before, self, *setting.after), setting.ranks)
        except Unsuitable as error:
            return str(error)
        batch_size = getattr(setting.workload, "batch_size", None)
        shares = found[self.dimension]
        if self.shares_batch and batch_size is not None and batch_size % shares:
            return f"a batch of {batch_size} cannot be shared among {shares} ranks"
        return None

    def parallelize(self, module: nn.Module, context: Context) -> nn.Module:
        """Return the module, spread along the technique's dimension of ``context.ranks.mesh``."""
        raise NotImplementedError

    def whole_logits(self, logits: torch.Tensor, context: Context) -> torch.Tensor:
        """Return on all ranks the logits (T, V) of a forward pass, of which a rank may have returned a part or none.

        All ranks call it after such a pass for held-out text.
        """
        return logits

    def keeping_part(self) -> AbstractContextManager[None]:
        """Return a context in which the module may return the logits of a part of the tokens that it is given.

        Else each rank's module returns those of all tokens. Workloads that do not read logits enter it.
        """
        return nullcontext()

    def save(self, module: nn.Module, folder: Path, context: Context) -> str | None:
        """Write a checkpoint of the whole model into a folder that all ranks share; all of them call it.

        Returns:
            what wrote it; membench then waits for the other ranks. ``None``: the harness writes what ranks hold
            of a state dict of the same names on all of them, as ``checkpoint`` says.
        """
        return None


@contextmanager
def keeping_parts(techniques: Sequence[Technique]) -> Iterator[None]:
    """Enter ``keeping_part`` of the members of a stack that spread it."""
    with ExitStack() as stack:
        for technique in techniques:
            if isinstance(technique, Parallel):
                stack.enter_context(technique.keeping_part())
        yield


def degrees(techniques: Sequence[Technique], of: int) -> Mapping[Dimension, int]:
    """Return the number of ranks along each dimension that techniques of a stack use, the outermost first.

    Args:
        of: the number of ranks; the degrees multiply to it.

    Raises:
        Unsuitable: if they do not.
    """
    members = {each.dimension: each for each in techniques if isinstance(each, Parallel)}
    used = [dimension for dimension in DIMENSIONS if dimension in members]
    found: dict[Dimension, int] = {}
    for dimension in reversed(used):
        left = of // math.prod(found.values())
        is_last = dimension == used[0]
        found[dimension] = members[dimension].degree or (left if is_last else _INNER_DEGREE)
    written = " x ".join(f"{found[dimension]} ({dimension})" for dimension in used)
    if math.prod(found.values()) != of:
        raise Unsuitable(f"the degrees {written} of the stack do not multiply to {of} ranks")
    if of > 1 and (idle := [dimension for dimension in used if found[dimension] == 1]):
        raise Unsuitable(f"{of} ranks leave a degree of 1 along '{idle[0]}': the degrees are {written}")
    return {dimension: found[dimension] for dimension in used}


def parallel_last(techniques: Sequence[Technique]) -> list[Technique]:
    """Return techniques in the order in which their optimizers and training steps are made: parallel ones last.

    So the exchange between ranks lies around whatever the others make of a step, wherever the stack names it.
    """
    return sorted(techniques, key=lambda each: 1 + ORDER.index(each.dimension) if isinstance(each, Parallel) else 0)


def own_rows(batch: torch.Tensor, techniques: Sequence[Technique], context: Context) -> torch.Tensor:
    """Return this rank's rows of a batch (B, …): its share where a technique of the stack shares batches."""
    for technique in techniques:
        if isinstance(technique, Parallel) and technique.shares_batch and context.ranks is not None:
            count = context.ranks.degree(technique.dimension)
            size = len(batch) // count
            place = context.ranks.place(technique.dimension)
            batch = batch[place * size : (place + 1) * size]
    return batch
