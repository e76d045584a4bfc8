"""The stacks that a search for what fits tries, and what each surely needs by arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from membench.plugins import Technique, registry
from membench.plugins.parallel import Parallel, degrees
from membench.protocol.case import REFERENCE, Plugin

Free = Literal["batch", "context"]
"""What may grow as long as it fits: the rows of a batch, or the tokens of a sequence."""

VARIANTS: Mapping[str, Plugin] = {
    "fsdp-apart": Plugin("fsdp", {"apart": True}),
    "tensor-parallel-4": Plugin("tensor-parallel", {"degree": 4}),
    "tensor-parallel-8": Plugin("tensor-parallel", {"degree": 8}),
}
"""Techniques with options, by the name under which a stack has them."""

_PRECISION = ("bf16", "", "autocast-bf16")
_OPTIMIZER = ("", "adamw-fused", "adamw-8bit")
_OPTIMIZER_ALONE = ("adafactor", "step-in-backward")
_KEPT = ("", "checkpointing")
_LOSS = ("", "chunked-cross-entropy")
_LOSS_ALONE = ("fused-linear-cross-entropy",)
"""It reads the output head beside the module, which ranks share."""
_ADAPTERS = ("bf16+lora",)
_QUANTIZED_ADAPTERS = ("bf16+int8-weight-only+lora", "bf16+nf4+lora")
_PARALLEL = ("fsdp", "fsdp-apart", "tensor-parallel", "fsdp+tensor-parallel", "fsdp-apart+tensor-parallel-8", "zero1",
             "ddp")  # fmt: skip
_PARALLEL_INFERENCE = ("tensor-parallel", "fsdp")
_WEIGHTS = ("", "bf16", "bf16+int8-weight-only", "bf16+nf4", "bf16+int4-weight-only", "bf16+fp8-weight-only")
_CACHE = ("", "kv-cache-int8", "kv-cache-int4")
NOT_TRIED = (
    "pipelines, context parallelism, offloading, compiling, pruning, distillation, smaller ranks of adapters, and other"
    " options of the techniques"
)


@dataclass(frozen=True)
class Workload:
    """What a model is to do: a workload, and the numbers of it that may grow.

    Attributes:
        kind: the name of the workload.
        batch_size: over all devices.
        length: of a sequence in tokens; in ``generate``, of prompt and reply.
    """

    kind: str
    batch_size: int
    length: int

    @property
    def plugin(self) -> Plugin:
        """The workload with its options."""
        options: dict[str, Any] = {"batch_size": self.batch_size}
        if self.kind == "generate":
            # A cache grows by a token at a time: the last two tell of all, and each is a pass through the model.
            options |= {"prompt_length": max(1, self.length - 2), "new_tokens": 2}
        else:
            options |= {"sequence_length": self.length}
        return Plugin(self.kind, options)

    @property
    def trains(self) -> bool:
        return self.kind == "train"


@dataclass(frozen=True)
class Stack:
    """A stack of techniques by its members' names."""

    name: str
    techniques: tuple[Technique, ...] = field(compare=False, repr=False)
    plugins: tuple[Plugin, ...] = field(compare=False, repr=False)

    @classmethod
    def of(cls, name: str) -> Stack:
        """Return the stack of a name such as ``bf16+fsdp``.

        Raises:
            PluginError: if there is no technique of a name, with the nearest one.
        """
        plugins = tuple(VARIANTS.get(member) or Plugin(member) for member in name.split("+"))
        made = tuple(registry.create("technique", each.use, each.options) for each in plugins)
        return cls(name, made, plugins)

    @property
    def members(self) -> list[str]:
        return [] if self.name == REFERENCE else self.name.split("+")

    def least_bytes(self, parameters: int, workload: Workload, count: int) -> int:
        """Return what weights, gradients and optimizer states take on a device at least, by arithmetic.

        Source: bits a weight, and bytes of state a parameter, that techniques name.

        Args:
            parameters: of the model.

        Raises:
            plugins.Unsuitable: if its degrees do not multiply to so many devices.
        """
        named = [bits for each in self.techniques if (bits := each.nominal_bits()) is not None]
        weight = min([32.0, *named]) / 8
        states = [size for each in self.techniques if (size := each.nominal_state_bytes()) is not None]
        state = states[-1] if states else 0.0 if "adafactor" in self.members else 2 * weight
        trains_all = workload.trains and not any(each.trains_adapters for each in self.techniques)
        has_gradients = "step-in-backward" not in self.members
        shared = shared_states = 1
        along = degrees(self.techniques, count)
        for technique in self.techniques:
            if isinstance(technique, Parallel):
                share = along[technique.dimension]
                shared *= share if technique.splits_model else 1
                shared_states *= share if technique.splits_model or technique.shares_states else 1
        needed = parameters * weight / shared
        if trains_all:
            needed += parameters * (weight * has_gradients / shared + state / shared_states)
        return int(needed)


def candidates(workload: Workload, count: int) -> list[Stack]:
    """Return the stacks to try on so many devices, those of few members first."""
    names = dict.fromkeys(_training(count) if workload.trains else _inference(workload, count))
    return sorted((Stack.of(name) for name in names), key=lambda stack: len(stack.members))


def _training(count: int) -> Iterator[str]:
    is_alone = count == 1
    spread: Sequence[str] = ("",) if is_alone else _PARALLEL
    optimizers = (*_OPTIMIZER, *(_OPTIMIZER_ALONE if is_alone else ()))
    losses = (*_LOSS, *(_LOSS_ALONE if is_alone else ()))
    for precision, optimizer, kept, loss, parallel in itertools.product(_PRECISION, optimizers, _KEPT, losses, spread):
        if optimizer or precision == "bf16" or is_alone:
            yield _joined(precision, optimizer, kept, loss, parallel)
    for adapters, kept, loss, parallel in itertools.product(_ADAPTERS, _KEPT, losses if is_alone else ("",), spread):
        yield _joined(adapters, kept, loss, parallel)
    if is_alone:  # on fake tensors, too, quantizing takes long
        for adapters in _QUANTIZED_ADAPTERS:
            yield _joined(adapters, "checkpointing", "chunked-cross-entropy")


def _inference(workload: Workload, count: int) -> Iterator[str]:
    spread: Sequence[str] = ("",) if count == 1 else _PARALLEL_INFERENCE
    caches = _CACHE if workload.kind == "generate" else ("",)
    for weights, cache, parallel in itertools.product(_WEIGHTS, caches, spread):
        yield _joined(weights, cache, parallel)


def _joined(*members: str) -> str:
    return "+".join(member for member in members if member) or REFERENCE
