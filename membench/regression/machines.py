"""How two machines differ, and which figures depend on that."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from membench.host import environment
from membench.records.metric import Dependence

_NOTHING: frozenset[Dependence] = frozenset()
_TIME: frozenset[Dependence] = frozenset({"time"})
_MEMORY: frozenset[Dependence] = frozenset({"live", "footprint", "time"})
_FOOTPRINT: frozenset[Dependence] = frozenset({"footprint", "time"})

_OF_A_CPU_CASE: Mapping[str, frozenset[Dependence]] = {
    # Each thread takes buffers of its own; which kernels run, and what they pack, goes by the instructions there are.
    "threads": _MEMORY,
    "cpu.instructions": _MEMORY,
    "cpu.vendor": _MEMORY,
    "architecture": _MEMORY,
    "page_bytes": _MEMORY,
    "variables.LD_PRELOAD": _MEMORY,  # another malloc, most often
    "system": frozenset({"footprint"}),
    "processor": _TIME,
    "cores": _TIME,
    "cpu.family": _TIME,
    "cpu.model": _TIME,
    "cpu.stepping": _NOTHING,
    "variables.OMP_NUM_THREADS": _MEMORY,
    "variables.OMP_WAIT_POLICY": _TIME,
    "variables.GOMP_SPINCOUNT": _TIME,
    "variables.KMP_BLOCKTIME": _TIME,
    "memory_bytes": _NOTHING,
    "python": _NOTHING,
}
"""What bars which figures of a case that runs on a processor: whatever cards there are is nothing to it."""

_OF_A_GPU_CASE: Mapping[str, frozenset[Dependence]] = {
    **_OF_A_CPU_CASE,
    # Live memory is the card's own.
    "threads": _TIME,
    "cpu.instructions": _TIME,
    "cpu.vendor": _TIME,
    "variables.OMP_NUM_THREADS": _TIME,
    "variables.PYTORCH_ALLOC_CONF": _MEMORY,
    "variables.PYTORCH_CUDA_ALLOC_CONF": _MEMORY,
    "gpus": _MEMORY,
}
_OF_A_CARD: Mapping[str, frozenset[Dependence]] = {"name": _MEMORY, "memory_bytes": _NOTHING, "driver": _FOOTPRINT}


@dataclass(frozen=True)
class Difference:
    """One respect in which two machines or their software differ."""

    respect: str
    base: Any
    new: Any

    def __str__(self) -> str:
        """``cores: 2, now 4``."""
        told = f"{self.respect}: {self.base}, now {self.new}"
        if self.respect == "variables.OMP_WAIT_POLICY" and (self.base, self.new) == ("PASSIVE", None):
            told += " (earlier versions of membench set it, and measured longer times)"
        return told

    def bars(self, on_gpu: bool) -> frozenset[Dependence]:
        """The kinds of figures, by what they depend on, that cannot be compared because of it.

        Versions bar nothing: what they change is what one wants to know.

        Args:
            on_gpu: whether the case whose figures they are runs on one.
        """
        if self.respect.startswith("gpus."):
            return _OF_A_CARD.get(self.respect.rpartition(".")[2], _MEMORY) if on_gpu else _NOTHING
        return (_OF_A_GPU_CASE if on_gpu else _OF_A_CPU_CASE).get(self.respect, _NOTHING)


def differences(base: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[Difference, ...]:
    """All that differs between two descriptions of machines."""
    found = [Difference(*respect) for respect in environment.unlike(base, new)]
    if base.get("system") != new.get("system"):
        found.insert(0, Difference("system", base.get("system"), new.get("system")))
    return tuple(found)


_OF_NO_USE = re.compile(
    r"\((?:r|tm)\)|@.*|\b(?:amd|intel|nvidia|ampere|cpu|processor|with .*graphics|\d+-core|[\d.]+ghz)\b", re.IGNORECASE
)


def machine_class(machine: Mapping[str, Any], on_gpu: bool) -> str:
    """A short name for machines whose timings may be compared: '2-cores-epyc', '1-h100-80gb-hbm3'."""
    gpus = machine.get("gpus")
    if on_gpu and isinstance(gpus, list) and gpus and isinstance(gpus[0], dict):
        return f"{len(gpus)}-{_slug(gpus[0].get('name')) or 'gpu'}"
    cpu = machine.get("cpu")
    cpu = cpu if isinstance(cpu, Mapping) else {}
    name = _slug(machine.get("processor")) or _slug("-".join(str(cpu.get(key) or "") for key in ("vendor", "model")))
    return f"{machine.get('threads') or machine.get('cores') or 'some'}-cores-{name or 'cpu'}"


def _slug(name: Any) -> str:
    plain = _OF_NO_USE.sub(" ", str(name or ""))
    return "-".join(re.findall(r"[a-z0-9.]+", plain.lower()))[:40].strip(".-")
