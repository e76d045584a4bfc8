"""The contract of models, techniques and workloads, and their lookup through entry points.

A plug-in's module must not import torch when it is loaded: the runner reads its options without it. Import torch in
the methods; those run in the measured process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

from membench.errors import PluginError, did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import nn

KINDS = ("model", "technique", "workload")


class Options(BaseModel):
    """What every plug-in is: typed options, a docstring whose first line is shown by ``membench list``."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Names after the plug-in's own: preset '60m' of 'llama' is written 'llama-60m'."""
    imports: ClassVar[tuple[str, ...]] = ("torch",)
    """Modules the fork server imports once, so that no case pays for them."""


@dataclass(frozen=True)
class Context:
    """What a stage may ask: the device, the seed, the text, and a way to mark parts of a step."""

    device: str
    seed: int
    model: Model
    part: Callable[[str], AbstractContextManager[None]]


Step: TypeAlias = "Callable[[], torch.Tensor | None]"
"""Does one step; a training step returns its loss (a scalar, detached)."""


@dataclass
class TrainingStep:
    """The pieces of a training step, each replaceable by a technique."""

    loss: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor], None]
    step: Callable[[], None]
    zero_grad: Callable[[], None]


class Model(Options):
    """Builds a module and says how to feed it."""

    quality: ClassVar[bool] = False
    """Whether held-out bits per byte mean something: trained, and fed single bytes."""

    def prepare(self, progress: Callable[[int, int, str], None]) -> None:
        """Do once, before anything is measured, what needs doing once (train, download)."""

    def build(self, context: Context) -> nn.Module:
        """The module on ``context.device``, ready to run, with seeded weights."""
        raise NotImplementedError

    def miniature(self) -> Model | None:
        """A model of the same kind but of almost no size, or ``None``.

        The case is rehearsed on it before the baseline is taken, so that what libraries set up at their first call is
        not counted as the case's.
        """
        return None

    def vocabulary(self, module: nn.Module) -> int:
        """How many token ids the module knows."""
        return int(module.config.vocab_size)  # type: ignore[union-attr, arg-type]

    def max_tokens(self) -> int | None:
        """The longest sequence the model takes, if it has a limit that is known without building it."""
        return None

    def needed_bytes(self) -> int | None:
        """Bytes that ``build`` will take, by arithmetic, or ``None`` where that is not known."""
        return None


class Technique(Options):
    """One way to save memory. A technique overrides only the stages it touches; a stack runs each stage in order."""

    def refuse(self, workload: str, device: str) -> str | None:
        """Why this technique cannot serve the case, or ``None``."""
        return None

    def load(self, build: Callable[[], nn.Module], context: Context) -> nn.Module:
        return build()

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        return module

    def optimizer(self, optimizer: torch.optim.Optimizer, module: nn.Module, context: Context) -> torch.optim.Optimizer:
        return optimizer

    def step_context(self, context: Context) -> AbstractContextManager[Any]:
        return nullcontext()

    def training_step(self, step: TrainingStep, context: Context) -> TrainingStep:
        return step

    def generate_options(self, options: dict[str, Any], context: Context) -> dict[str, Any]:
        return options


class Workload(Options):
    """What is done with the model. ``start`` returns a function that does one step."""

    trains: ClassVar[bool] = False

    def longest_sequence(self) -> int:
        """Tokens of the longest sequence that the model will see."""
        raise NotImplementedError

    def tokens_per_step(self) -> int:
        """Tokens that a step works through, for tokens a second."""
        raise NotImplementedError

    def tokens_read(self) -> int:
        """Tokens of text that ``start`` is to be given."""
        return self.tokens_per_step()

    def decoded_tokens_per_step(self) -> int | None:
        """Tokens that the part ``decode`` of a step brings forth, if it has one."""
        return None

    def start(self, module: nn.Module, tokens: torch.Tensor, techniques: list[Technique], context: Context) -> Step:
        """Prepare (optimizer, batch) and return the step.

        Args:
            tokens: (``tokens_read()``,), int64, on the CPU, from the corpus.
        """
        raise NotImplementedError


CONTRACT: Mapping[str, type[Options]] = {"model": Model, "technique": Technique, "workload": Workload}


def registered(kind: str) -> dict[str, EntryPoint]:
    """The entry points of a kind by name. Nothing is imported."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=f"membench.{kind}s"):
        other = found.get(entry.name)
        if other is not None and other.value != entry.value:
            raise PluginError(f"two plug-ins are named {kind} '{entry.name}': {other.value} and {entry.value}")
        found[entry.name] = entry
    return found


def load_class(kind: str, entry: EntryPoint) -> type[Options]:
    """Import a plug-in and check it against its contract."""
    had_torch = "torch" in sys.modules
    try:
        loaded = entry.load()
    except Exception as error:
        raise PluginError(f"{kind} '{entry.name}' ({entry.value}) cannot be loaded: {error}") from error
    if "torch" in sys.modules and not had_torch:
        raise PluginError(f"{kind} '{entry.name}' ({entry.value}) imports torch when loaded; import it in the methods")
    if not (isinstance(loaded, type) and issubclass(loaded, CONTRACT[kind])):
        raise PluginError(f"{kind} '{entry.name}' ({entry.value}) is no subclass of membench.plugins.{kind.title()}")
    return loaded


def names(kind: str) -> Iterator[tuple[str, str]]:
    """Every name of a kind, presets too, with its first docstring line."""
    for name, entry in sorted(registered(kind).items()):
        loaded = load_class(kind, entry)
        line = (loaded.__doc__ or "").strip().partition("\n")[0]
        yield name, line
        for preset in loaded.presets:
            yield f"{name}-{preset}", line


def find(kind: str, name: str) -> tuple[type[Options], dict[str, Any]]:
    """The class behind a name and the options its preset sets.

    Raises:
        PluginError: for an unknown name, with the nearest known one.
    """
    entries = registered(kind)
    if name in entries:
        return load_class(kind, entries[name]), {}
    for family, entry in entries.items():
        if name.startswith(f"{family}-"):
            loaded = load_class(kind, entry)
            preset = loaded.presets.get(name.removeprefix(f"{family}-"))
            if preset is not None:
                return loaded, dict(preset)
    raise PluginError(f"no {kind} is named '{name}'; {did_you_mean(name, (n for n, _ in names(kind)))}")


def create(kind: str, name: str, options: Mapping[str, Any]) -> Any:
    """A plug-in with its options checked.

    Raises:
        PluginError: for an unknown name or option or a value that does not fit, in one line.
    """
    loaded, preset = find(kind, name)
    try:
        return loaded.model_validate({**preset, **options}, strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            hint = did_you_mean(key, loaded.model_fields)
            raise PluginError(f"{kind} '{name}' has no option '{key}'; {hint}") from None
        raise PluginError(f"{kind} '{name}', option '{key}' = {first['input']!r}: {first['msg']}") from None
