"""What a rank of a case knows of the others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Dimension = Literal["data", "stage", "sequence", "tensor"]
"""Dimensions of the mesh of ranks, the outermost first: neighbours talk most along the innermost."""
DIMENSIONS: tuple[Dimension, ...] = ("data", "stage", "sequence", "tensor")
ORDER: tuple[Dimension, ...] = ("stage", "tensor", "sequence", "data")
"""The order in which techniques spread a model: each gets what the ones before have left on the rank."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of a case, as one of them sees them.

    Attributes:
        number: this rank, from 0.
        of: how many there are (world size).
        mesh: all ranks, with a dimension for each parallel technique of the stack, named after its ``dimension``.
        shared: a folder that all ranks see, removed after the case.
    """

    number: int
    of: int
    mesh: DeviceMesh
    shared: Path

    def degree(self, dimension: Dimension) -> int:
        """Return how many ranks there are along a dimension; 1 if no technique of the stack has it."""
        return self.mesh[dimension].size() if dimension in (self.mesh.mesh_dim_names or ()) else 1

    def place(self, dimension: Dimension) -> int:
        """Return the place of this rank along a dimension, from 0."""
        return self.mesh.get_local_rank(dimension) if dimension in (self.mesh.mesh_dim_names or ()) else 0
