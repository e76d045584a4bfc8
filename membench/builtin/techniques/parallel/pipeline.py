"""Pipeline parallelism: every rank has some of the layers, and micro-batches go through all ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from membench.builtin.techniques.activations import StepInBackward
from membench.builtin.techniques.compiling import Compile
from membench.builtin.techniques.losses import FusedLinearCrossEntropy
from membench.builtin.techniques.parallel.data_parallel import DistributedDataParallel
from membench.builtin.techniques.parallel.stages import Stages
from membench.builtin.workloads.train import predicts_masked_tokens
from membench.builtin.workloads.training import go_backward, unsplit
from membench.plugins import Context, Dimension, Parallel, Ranks, Setting, Technique, TrainingStep, Unsuitable
from membench.plugins.parallel import degrees
from membench.worker.breakdown import COMMUNICATION

if TYPE_CHECKING:
    import torch
    from torch import nn

_CLASSES = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zb": "ScheduleInterleavedZeroBubble",
}
_IN_ROUNDS = ("interleaved", "zb")
_STAGES_OF_INTERLEAVED = 2


class Pipeline(Parallel):
    """Every rank has a stage of the model: some of the layers, the first the embedding, the last norm and head.

    A batch goes through the stages in micro-batches of equal size. How many of them a stage has in work at once, and so
    the activations that it holds, depends on the schedule: under ``gpipe`` all go forward before any goes backward;
    under ``1f1b`` (PipeDream) stage s of S holds at most S - s; ``interleaved`` gives each rank two stages, which
    shortens its waiting and holds more; ``zb`` (zero bubble) computes the gradients of weights later than those of
    inputs, for which it keeps what they need. Stages are not alike: the first has the embedding, the last the head and
    the logits, of which it keeps those of all micro-batches until the next step (micro-batches x rows x T x V numbers)
    unless ``return_outputs`` is off. An embedding that is the head, too, is on the first and the last stage, and the
    gradients of the two are added.

    Each rank builds the whole model and then frees what its stage does not have. Masks, positions and rotary
    embeddings are computed on each stage, by the model's own forward pass.

    Source: torch.distributed.pipelining (GPipe: Huang et al., 2018, arXiv:1811.06965; 1F1B and interleaved: Narayanan
    et al., 2021, arXiv:2104.04473; zero bubble: Qi et al., 2023, arXiv:2401.10241, as ZB1P with one stage a rank).
    Limits: the layers must be in a list that the model runs in order, which is tried before it is cut. Dropout draws
    other random numbers than on one device.

    Attributes:
        return_outputs: whether a training step returns the logits, as torch does.
        layers: a pattern of the paths of the layers, for models whose class does not say.
    """

    acts_on: ClassVar[str] = "weights, optimizer, activations"
    imports: ClassVar[tuple[str, ...]] = ("torch", "torch.distributed.pipelining")
    dimension: ClassVar[Dimension] = "stage"
    splits_model: ClassVar[bool] = True
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb"] = "1f1b"
    micro_batches: int = Field(4, ge=1)
    return_outputs: bool = True
    layers: str | None = None

    # Weakly: the technique outlives the rehearsal, of whose module nothing must stay. The module holds it.
    _weak: weakref.ref[_Running] | None = PrivateAttr(None)

    @property
    def _running(self) -> _Running:
        running = None if self._weak is None else self._weak()
        assert running is not None, "the module is spread first"
        return running

    def nominal_share(self) -> float | None:
        return None

    def refuse(self, setting: Setting) -> str | None:
        workload, others = setting.workload, (*setting.before, *setting.after)
        if workload.decoded_tokens_per_step() is not None:
            return "torch's schedules have no key-value cache: tokens cannot be generated one by one through stages"
        if "checkpoint" in self.model_fields_set and self.checkpoint == "gathered":
            return "each stage is saved by its rank: leave checkpoint = 'gathered' out"
        if not setting.model.gives_logits or workload.tokens_per_step() is None:
            return "there are no layers of a decoder to share out among stages"
        if (reason := super().refuse(setting)) is not None:
            return reason
        assert setting.ranks is not None
        found = degrees((*setting.before, self, *setting.after), setting.ranks)
        return (
            self._refuse_batch(getattr(workload, "batch_size", None), found)
            or self._refuse_beside(others)
            or (self._refuse_in_training(others) if workload.trains else None)
        )

    def _refuse_batch(self, batch_size: int | None, found: Any) -> str | None:
        count, stages = self.micro_batches, found["stage"]
        rows = None if batch_size is None else batch_size // found.get("data", 1)
        if rows is not None and rows % count:
            return f"{rows} rows cannot be shared out among micro_batches = {count} of equal size"
        if self.schedule == "1f1b" and count < stages:
            return f"schedule = '1f1b' needs as many micro-batches as stages: micro_batches = {count}, {stages} stages"
        if self.schedule in _IN_ROUNDS and count % max(1, count // stages):
            return f"schedule = '{self.schedule}' needs micro_batches to be a multiple of the {stages} ranks"
        if self.schedule == "interleaved" and stages == 1:
            return "schedule = 'interleaved' needs several ranks"
        return None

    def _refuse_beside(self, others: tuple[Technique, ...]) -> str | None:
        for other in others:
            if isinstance(other, Compile):
                return "a stage ends in the middle of the model's forward pass, and a compiler does not follow that"
            if not isinstance(other, Parallel):
                continue
            if not isinstance(other, DistributedDataParallel):
                return "stages are spread further by data parallelism with whole weights (ddp) alone"
            if other.checkpoint == "sharded":
                return "each stage is saved by its rank: leave checkpoint = 'sharded' out of 'ddp'"
            if self.schedule in _IN_ROUNDS:
                return (
                    f"schedule = '{self.schedule}' does not go backward through all of a module at once, as ddp needs"
                )
        return None

    def _refuse_in_training(self, others: tuple[Technique, ...]) -> str | None:
        for other in others:
            if other.needs_all_gradients:
                return (
                    "a member of the stack changes how a step goes backward, which a pipeline's schedule does by itself"
                    " (micro-batches are an option of it)"
                )
            if isinstance(other, StepInBackward):
                return "'step-in-backward' would update weights after the first of several micro-batches"
            if isinstance(other, FusedLinearCrossEntropy):
                return "the loss takes head and decoder apart, and they are on different stages"
        return None

    def parallelize(self, module: nn.Module, context: Context) -> nn.Module:
        assert context.ranks is not None
        if predicts_masked_tokens(type(module)):
            raise Unsuitable(f"a pipeline's loss is that of next tokens, and a {type(module).__name__} fills in masks")
        degree = context.ranks.degree(self.dimension)
        each = _STAGES_OF_INTERLEAVED if self.schedule == "interleaved" else 1
        cut = Stages(module, degree * each, self.layers, longer=context.rehearsal)
        running = _Running(self, cut, module, context)
        self._weak = weakref.ref(running)
        stage_forward = vars(module).get("forward")

        def forward(given: torch.Tensor) -> torch.Tensor:
            if running.in_schedule:
                assert stage_forward is not None
                returned: torch.Tensor = stage_forward(given)
                return returned
            return running.forward(given)

        module.forward = forward
        return module

    def training_step(self, step: TrainingStep, context: Context) -> TrainingStep:
        running = self._running
        if step.split is not unsplit or step.backward is not go_backward:
            raise Unsuitable(
                "a member of the stack changes how a step goes backward, which a pipeline's schedule does by itself"
            )
        return dataclasses.replace(
            step,
            loss=lambda module, rows: running.train(rows, step.loss),
            part="schedule",
            has_loss=running.has_last,
            wrap=running.wrap,
        )

    def whole_logits(self, logits: torch.Tensor, context: Context) -> torch.Tensor:
        return self._running.from_last(logits)

    def save(self, module: nn.Module, folder: Path, context: Context) -> str | None:
        """Write a file a stage, with the names that its weights have in the whole model.

        Weights that the first and the last stage share are in the file of the first one.
        """
        import torch

        assert context.ranks is not None
        if context.ranks.place("data") == 0:
            folder.mkdir(parents=True, exist_ok=True)
            elsewhere = self._running.saved_by_first
            state = {name: value for name, value in module.state_dict().items() if name not in elsewhere}
            torch.save(state, folder / f"stage-{context.ranks.place(self.dimension)}.pt")
        return "torch.save of each stage"


class _Running:
    """The stages of this rank, and the schedule that runs them for batches of one shape at a time.

    Attributes:
        in_schedule: whether the module is called by a schedule, for a stage alone.
        saved_by_first: the names of this rank's weights that the first stage has, too, and saves.
    """

    def __init__(self, options: Pipeline, cut: Stages, module: nn.Module, context: Context) -> None:
        assert context.ranks is not None
        ranks: Ranks = context.ranks
        self.in_schedule = False
        self._options, self._device, self._count = options, context.device, cut.count
        self._group = ranks.mesh[options.dimension].get_group()
        self._degree, place = ranks.degree(options.dimension), ranks.place(options.dimension)
        self._numbers = list(range(place, cut.count, self._degree))
        self.has_first, self.has_last = 0 in self._numbers, cut.count - 1 in self._numbers
        self._hidden, self._logits = cut.seen.hidden[0, 0].to("meta"), cut.seen.logits[0, 0].to("meta")
        self._modules = cut.keep(self._numbers)
        paths = [pair[0 if self.has_first else 1] for pair in cut.tied] if self._is_outer else []
        self._tied = [module.get_parameter(path) for path in paths]
        self.saved_by_first = frozenset() if self.has_first else frozenset(behind for _, behind in cut.tied)
        self._ready: tuple[Any, Any] | None = None
        self._loss: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None
        context.inventory[COMMUNICATION] = self._buffers

    @property
    def _is_outer(self) -> bool:
        return self._degree > 1 and (self.has_first or self.has_last)

    def wrap(self, wrapper: nn.Module) -> None:
        """Run a wrapper of the module in place of it."""
        self._modules = [wrapper]

    def train(self, rows: torch.Tensor, loss: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Go forward and backward through all stages with a batch (B, T); return its loss, zero if this rank has none.

        Args:
            loss: of a module and rows, as the stack makes it.
        """
        import torch

        if len(rows) % self._options.micro_batches:
            raise Unsuitable(f"{len(rows)} rows are no multiple of micro_batches = {self._options.micro_batches}")
        self._loss = loss
        losses: list[torch.Tensor] = []
        schedule = self._schedule(rows, self._options.micro_batches, trains=True)
        given = (rows,) if self.has_first else ()
        with self._in_schedule():
            schedule.step(
                *given,
                target=rows if self.has_last else None,
                losses=losses if self.has_last else None,
                return_outputs=self._options.return_outputs,
            )
        self._add_tied_gradients()
        if not self.has_last:
            return torch.zeros((), device=rows.device)
        return torch.stack([each.detach() for each in losses]).sum()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Go forward through all stages with token ids (B, T); return logits (B, T, V), zeros on all but the last."""
        schedule = self._schedule(rows, math.gcd(len(rows), self._options.micro_batches), trains=False)
        given = (rows,) if self.has_first else ()
        with self._in_schedule():
            logits: torch.Tensor | None = schedule.step(*given)
        if logits is not None:
            return logits
        return self._logits.new_zeros((), device=rows.device).expand(*rows.shape, len(self._logits))

    def from_last(self, logits: torch.Tensor) -> torch.Tensor:
        """Return on all ranks the logits that the last stage has."""
        from torch import distributed

        logits = logits.contiguous()
        distributed.broadcast(logits, group=self._group, group_src=self._degree - 1)
        return logits

    @contextlib.contextmanager
    def _in_schedule(self) -> Iterator[None]:
        self.in_schedule = True
        try:
            yield
        finally:
            self.in_schedule = False

    def _schedule(self, rows: torch.Tensor, count: int, *, trains: bool) -> Any:
        """Return torch's schedule for a batch (B, T) in some micro-batches; the last one is kept."""
        wanted = (rows.shape, count, trains)
        if self._ready is None or self._ready[0] != wanted:
            self._ready = None  # its buffers go before others come
            self._ready = (wanted, self._made(len(rows) // count, rows.shape[1], count, trains=trains))
        return self._ready[1]

    def _made(self, rows: int, tokens: int, count: int, *, trains: bool) -> Any:
        import torch
        from torch.distributed import pipelining

        ids = torch.empty(rows, tokens, dtype=torch.long, device="meta")
        hidden = torch.empty(rows, tokens, len(self._hidden), dtype=self._hidden.dtype, device="meta")
        logits = torch.empty(rows, tokens, len(self._logits), dtype=self._logits.dtype, device="meta")
        hidden.requires_grad_(trains)
        stages = [
            pipelining.PipelineStage(
                module,
                number,
                self._count,
                torch.device(self._device),
                input_args=ids if number == 0 else hidden,
                output_args=logits if number == self._count - 1 else hidden,
                group=self._group,
            )
            for module, number in zip(self._modules, self._numbers, strict=True)
        ]
        name = self._options.schedule
        # Forward alone, a stage has nothing to schedule: GPipe's first half.
        kind: Any = getattr(pipelining, _CLASSES[name if trains or len(stages) > 1 else "gpipe"])
        given = stages if issubclass(kind, pipelining.schedules.PipelineScheduleMulti) else stages[0]
        # Each micro-batch's loss is its share of the batch's, so that gradients need no scaling afterwards.
        loss = (lambda logits, ids: self._micro_batch_loss(logits, ids) / count) if trains else None
        return kind(given, count, loss_fn=loss, scale_grads=False)

    def _micro_batch_loss(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        assert self._loss is not None
        made: Any = _Made(logits)
        return self._loss(made, ids)

    def _add_tied_gradients(self) -> None:
        """Add the gradients of weights that the first and the last stage share, each of which has some."""
        import torch
        from torch import distributed

        for weight in self._tied:
            if weight.grad is None:
                continue
            theirs, other = torch.empty_like(weight.grad), self._degree - 1 if self.has_first else 0
            sent = distributed.P2POp(distributed.isend, weight.grad, group=self._group, group_peer=other)
            received = distributed.P2POp(distributed.irecv, theirs, group=self._group, group_peer=other)
            for work in distributed.batch_isend_irecv([sent, received]):
                work.wait()
            weight.grad.add_(theirs)

    def _buffers(self) -> list[torch.Tensor]:
        """Return the buffers in which hidden states and their gradients are received."""
        if self._ready is None:
            return []
        schedule = self._ready[1]
        stages = getattr(schedule, "_stages", None) or [schedule._stage]
        infos = [
            info
            for stage in stages
            for received in (stage.args_recv_info, stage.grad_recv_info)
            for each in received.values()
            for info in each
        ]
        return [info.buffer for info in infos if info.buffer is not None]


class _Made:
    """In place of a module whose logits (B, T, V) are there already, for a loss that asks it for them."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits = logits

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return self._logits
