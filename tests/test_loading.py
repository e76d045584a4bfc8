"""Loading from files: what comes out is the model bit for bit, and what it takes meanwhile is what is promised."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import membench
from membench import plugins
from membench.builtin.models.factory import Factory
from membench.builtin.models.transformer import Gpt2, Llama
from membench.builtin.techniques.bitsandbytes import BnbInt8, BnbNf4
from membench.builtin.techniques.loading import MemoryMapped, MetaInit, PlainLoad, Saved, Streamed
from membench.builtin.techniques.mapped_checkpoint import MappedCheckpoint, held_by, write
from membench.builtin.techniques.optimizers import MasterWeights, SgdMomentum
from membench.builtin.techniques.precision import Bf16
from membench.builtin.techniques.quantization import Int4WeightOnly, Int8WeightOnly, RoundToNearest
from membench.builtin.techniques.structured_pruning import PruneFfn
from membench.builtin.workloads.forward import Forward
from membench.builtin.workloads.train import Train
from membench.host import procfs
from membench.records.record import Record
from membench.worker import converted_layers
from membench.worker.assembly import Assembly
from membench.worker.storages import plain_tensors
from membench.worker.weights import own_tensors, weight_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

_TIED_LLAMA = Llama.of_shape(plugins.Shape(64, 2, 4, 2, 192, 512, 128, tied=True))
_UNTIED_LLAMA = Llama.of_shape(plugins.Shape(64, 2, 4, 2, 192, 512, 128, tied=False))
_GPT2 = Gpt2.of_shape(plugins.Shape(64, 2, 4, 4, 256, 512, 128, tied=True))
_NORMS = Factory.model_validate({"function": "tests.test_loading:batch_normed"})
_MODELS = {"llama": _TIED_LLAMA, "gpt2": _GPT2, "batch norm": _NORMS}


def batch_normed() -> nn.Module:
    """For 40 tokens: an embedding, a batch norm over them (its buffers are kept, one is an integer) and a head."""
    from torch import nn

    return nn.Sequential(nn.Embedding(256, 32), nn.BatchNorm1d(40), nn.Linear(32, 256))


@contextlib.contextmanager
def _unmarked(name: str) -> Iterator[None]:
    del name
    yield


def _context(model: plugins.Model, folder: Path, part: Any = _unmarked) -> plugins.Context:
    return plugins.Context("cpu", 0, model, part, {}, folder)


def _converted(model: plugins.Model, folder: Path, *stack: plugins.Technique) -> nn.Module:
    """The model as it is built, with each technique applied to all of it."""
    module = model.build(_context(model, folder))
    for technique in stack:
        module = technique.apply(module, _context(model, folder))
    return module.eval()


def _loaded(model: plugins.Model, folder: Path, loading: plugins.Technique, *rest: plugins.Technique) -> nn.Module:
    """What a stack that begins with a way of loading makes of the model."""
    context = _context(model, folder)
    loading.prepare(lambda: _converted(model, folder, *(rest if loading.prepares_rest else ())), context)
    return loading.load(lambda: model.build(context), rest, context).eval()


def _logits(module: nn.Module) -> torch.Tensor:
    import torch

    with torch.no_grad():
        output = module(torch.arange(3, 43)[None])
    logits: torch.Tensor = getattr(output, "logits", output)
    return logits


def _contents(module: nn.Module) -> dict[str, tuple[type, list[torch.Tensor]]]:
    """By name, each tensor's class and the plain tensors inside."""
    return {
        f"{path}.{name}.{number}": (type(tensor), [plain.detach() for plain in plain_tensors(tensor)])
        for path, layer in module.named_modules()
        for number, (name, tensor) in enumerate(own_tensors(layer))
    }


def _assert_same(module: nn.Module, expected: nn.Module) -> None:
    import torch

    found, wanted = _contents(module), _contents(expected)
    assert found.keys() == wanted.keys()
    for name, (kind, tensors) in wanted.items():
        assert found[name][0] is kind, name
        for own, theirs in zip(found[name][1], tensors, strict=True):
            assert own.dtype == theirs.dtype, name
            assert torch.equal(own, theirs), name
    assert torch.equal(_logits(module), _logits(expected))
    assert weight_bytes(module) == weight_bytes(expected)


@pytest.mark.parametrize("model", _MODELS.values(), ids=_MODELS)
@pytest.mark.parametrize("technique", [PlainLoad(), MetaInit(), MemoryMapped(), Streamed(), Saved(), Saved(mmap=True)],
                         ids=repr)  # fmt: skip
def test_a_loaded_model_is_the_built_one_bit_for_bit(
    technique: plugins.Technique, model: plugins.Model, tmp_path: Path
) -> None:
    _assert_same(_loaded(model, tmp_path, technique), _converted(model, tmp_path))


@pytest.mark.parametrize("technique", [MetaInit(), MemoryMapped(), Streamed(), Saved()], ids=repr)
def test_weights_that_were_shared_stay_one_tensor_and_can_be_trained(
    technique: plugins.Technique, tmp_path: Path
) -> None:
    module: Any = _loaded(_TIED_LLAMA, tmp_path, technique)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert all(parameter.requires_grad for parameter in module.parameters())
    Bf16().apply(module, _context(_TIED_LLAMA, tmp_path))
    assert module.lm_head.weight is module.model.embed_tokens.weight


_INT8 = Int8WeightOnly.model_validate({})
_STACKS: dict[str, tuple[plugins.Technique, ...]] = {
    "bf16": (Bf16(),),
    "int8": (_INT8,),
    "bf16+int8": (Bf16(), Int8WeightOnly(group_size=32)),
    "bf16+int4": (Bf16(), Int4WeightOnly()),
    "3 bits, table and head too": (RoundToNearest.model_validate({"bits": 3, "embeddings": True, "head": True}),),
    "bnb-int8": (BnbInt8(),),
    "bnb-nf4": (BnbNf4(block_size=32),),
}


@pytest.mark.parametrize("model", [_TIED_LLAMA, _GPT2], ids=["tied", "gpt2"])
@pytest.mark.parametrize("stack", _STACKS.values(), ids=_STACKS)
def test_what_is_converted_layer_by_layer_while_loading_equals_what_is_converted_in_place(
    stack: tuple[plugins.Technique, ...], model: plugins.Model, tmp_path: Path
) -> None:
    _assert_same(_loaded(model, tmp_path, Streamed(), *stack), _converted(model, tmp_path, *stack))


@pytest.mark.parametrize("stack", _STACKS.values(), ids=_STACKS)
def test_what_was_converted_and_saved_equals_what_is_converted_in_place(
    stack: tuple[plugins.Technique, ...], tmp_path: Path
) -> None:
    _assert_same(_loaded(_TIED_LLAMA, tmp_path, Saved(), *stack), _converted(_TIED_LLAMA, tmp_path, *stack))


def test_streaming_leaves_nothing_in_the_files_pages(tmp_path: Path) -> None:
    module: Any = _loaded(_GPT2, tmp_path, Streamed(), _INT8)
    assert "loaded.weights" not in Path("/proc/self/maps").read_text()
    assert all(parameter.untyped_storage().nbytes() == parameter.nbytes for parameter in module.lm_head.parameters())


def test_mapped_weights_are_pages_of_the_file_until_they_are_written_to(tmp_path: Path) -> None:
    import torch

    model = Llama.of_shape(plugins.Shape(256, 1, 4, 4, 512, 16384, 128, tied=True))
    module: Any = _loaded(model, tmp_path, MemoryMapped())
    before = procfs.resident()
    table = module.lm_head.weight
    with torch.no_grad():
        float(table.sum())
        read = procfs.resident()
        table.add_(1)
    written = procfs.resident()
    assert read.file_bytes - before.file_bytes == pytest.approx(table.nbytes, rel=0.03)
    assert read.private_bytes - before.private_bytes < 2**20
    assert written.private_bytes - read.private_bytes == pytest.approx(table.nbytes, rel=0.03)
    assert written.file_bytes - read.file_bytes == pytest.approx(-table.nbytes, rel=0.03)


def test_taking_a_tensor_over_keeps_what_was_written_to_it_and_to_its_neighbour_on_the_page(tmp_path: Path) -> None:
    import torch
    from torch import nn

    module: Any = nn.Sequential(nn.Linear(3, 5), nn.Linear(700, 700), nn.Linear(2, 3))
    write(lambda: module, tmp_path / "small")
    checkpoint = MappedCheckpoint(tmp_path / "small")
    tensors = {held.name: checkpoint.touched(held.name, _unmarked) for held in held_by(module)}
    expected = {name: tensor + 1 for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.add_(1)
    for tensor in tensors.values():
        checkpoint.take_over(tensor)
    checkpoint.drop_pages(tensors, _unmarked)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert torch.equal(checkpoint.mapped("1.weight"), module[1].weight)  # the file is as it was


def _refused(technique: plugins.Technique, **setting: Any) -> str | None:
    given = {"before": (), "after": (), "device": "cpu", **setting}
    return technique.refuse(plugins.Setting(model=_TIED_LLAMA, workload=Forward.model_validate({}), **given))


@pytest.mark.parametrize("technique", [PlainLoad(), MetaInit(), MemoryMapped(), Streamed(), Saved()], ids=repr)
def test_what_loads_comes_first(technique: plugins.Technique) -> None:
    assert _refused(technique) is None
    assert _refused(technique, before=(Bf16(),)) == "it loads the model, so it has to come first in the stack"


def test_what_changes_the_model_as_a_whole_cannot_be_streamed_and_is_named() -> None:
    reason = "'prune-ffn' changes the model as a whole, so it cannot be streamed layer by layer"
    assert _refused(Streamed(), after=(Bf16(), PruneFfn.model_validate({}))) == reason
    assert _refused(Streamed(), after=(Bf16(), Int4WeightOnly(), SgdMomentum.model_validate({}))) is None


def test_only_a_cpu_has_files_pages_as_weights() -> None:
    reason = "pages of a file can be weights on a CPU only"
    assert _refused(MemoryMapped(), device="cuda:0") == reason
    assert _refused(Saved(mmap=True), device="cuda") == f"mmap = true: {reason}"
    assert _refused(Saved(), device="cuda") is None
    assert _refused(Streamed(), device="cuda") is None


class _Boneless(Llama):
    def skeleton(self) -> nn.Module:
        raise NotImplementedError("no skeleton")


class _Unlike(Llama):
    def skeleton(self) -> nn.Module:
        return _UNTIED_LLAMA.skeleton()


@pytest.mark.parametrize("technique", [MetaInit(), MemoryMapped(), Streamed()], ids=repr)
def test_a_skeleton_that_is_not_there_or_not_the_models_is_told(technique: plugins.Technique, tmp_path: Path) -> None:
    assert _TIED_LLAMA.shape is not None
    with pytest.raises(plugins.Unsuitable, match=r"^no skeleton$"):
        _loaded(_Boneless.of_shape(_TIED_LLAMA.shape), tmp_path, technique)
    with pytest.raises(plugins.Unsuitable, match=r"^the model and its skeleton .* differ in 'lm_head.weight'$"):
        _loaded(_Unlike.of_shape(_TIED_LLAMA.shape), tmp_path, technique)


def test_a_file_for_which_there_is_no_room_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    for technique in (PlainLoad(), MetaInit(), Saved()):
        with pytest.raises(plugins.Unsuitable, match=r"^the checkpoint takes .* KiB, and 1000 B are free in "):
            _loaded(_GPT2, tmp_path, technique)
    assert not any(tmp_path.iterdir())


class _Later(plugins.Technique):
    """Needs its own file when it is applied, and must not load."""

    def prepare(self, make: Callable[[], nn.Module], context: plugins.Context) -> None:
        (context.scratch / "later").touch()

    def load(self, build: Callable[[], nn.Module], rest: Any, context: plugins.Context) -> nn.Module:
        assert not (context.scratch / "loaded.pt").exists(), "loaded once more"
        return build()

    def apply(self, module: nn.Module, context: plugins.Context) -> nn.Module:
        assert (context.scratch / "later").exists()
        (context.scratch / "later").unlink()
        return module


def test_who_prepares_the_rest_of_a_stack_finds_what_the_rest_prepared_and_it_is_not_applied_again(
    tmp_path: Path,
) -> None:
    stack = (Saved(), _Later())
    case = Assembly(_TIED_LLAMA, stack, Forward.model_validate({}), ("saved", "later"), _context(_TIED_LLAMA, tmp_path))
    case.prepare()
    assert (tmp_path / "loaded.pt").exists()
    assert not (tmp_path / "later").exists()
    _assert_same(case.make().eval(), _converted(_TIED_LLAMA, tmp_path))


class _Idle(plugins.LayerWise):
    """Finds nothing to convert."""

    def convert(self, name: str, layer: nn.Module, head: nn.Module | None) -> nn.Module:
        return layer


@pytest.mark.parametrize("loading", [MetaInit(), Streamed(), Saved()])
def test_a_member_that_changed_nothing_is_named_wherever_it_was_applied(
    loading: plugins.Technique, tmp_path: Path
) -> None:
    stack = (loading, Bf16(), _Idle(), MasterWeights())  # the last finds bf16 weights, and acts while training
    names = ("loading", "bf16", "idle", "master-weights")
    case = Assembly(_UNTIED_LLAMA, stack, Train.model_validate({}), names, _context(_UNTIED_LLAMA, tmp_path))
    case.prepare()
    case.make()
    assert converted_layers.remarks(case.names, case.techniques, case.context) == [
        "'idle' changed nothing in the model"
    ]


def hooked() -> nn.Module:
    """A model that keeps a function which no other process could find."""
    from torch import nn

    module = nn.Sequential(nn.Embedding(256, 32), nn.Linear(32, 256))
    module.register_forward_hook(lambda *_: None)
    return module


def test_what_cannot_be_saved_is_told_by_the_process_that_found_out(tmp_path: Path) -> None:
    model = Factory.model_validate({"function": "tests.test_loading:hooked"})
    case = Assembly(model, (Saved(),), Forward.model_validate({}), ("saved",), _context(model, tmp_path))
    with pytest.raises(plugins.Unsuitable, match=r"^what the stack makes of the model cannot be saved: Can't pickle"):
        case.prepare()


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("loading")
    path = folder / "loading.toml"
    path.write_text(
        """
        [suite]
        name = "loading"
        [matrix]
        model = ["llama-15m"]
        technique = ["none", "plain-load", "meta-init", "mmap", "streamed+bf16", "streamed+int8-weight-only",
                     "saved+int8-weight-only", "int8-weight-only", "streamed+nf4", "streamed+all-in-4-bits",
                     "streamed+all-in-int8", "streamed+all-in-fp8"]
        workload = ["short"]
        [[exclude]]
        technique = ["bf16", "nf4", "all-in-4-bits", "all-in-int8", "all-in-fp8"]
        [[include]]
        model = "trained-tiny"
        technique = ["saved+sgd-momentum", "sgd-momentum"]
        workload = "train"
        [workload.short]
        use = "forward"
        sequence_length = 32
        [technique.all-in-4-bits]
        use = "round-to-nearest"
        bits = 4
        embeddings = true
        head = true
        [technique.all-in-int8]
        use = "int8-weight-only"
        embeddings = true
        head = true
        [technique.all-in-fp8]
        use = "fp8-weight-only"
        embeddings = true
        head = true
        [settings]
        measured_steps = 1
        """
    )
    return {record.id: record for record in membench.run(membench.load_suite(path), output=folder).records}


def _metric(records: dict[str, Record], technique: str, name: str) -> float:
    record = records[f"llama-15m/{technique}/short/cpu"]
    assert record.status == "ok", record.message
    value = record.metrics[name]
    assert value is not None
    return value


_WEIGHTS_BYTES = 4 * 15_191_712
_MIB = 2**20


def test_plain_loading_holds_the_weights_twice_and_a_meta_skeleton_once(records: dict[str, Record]) -> None:
    assert _metric(records, "plain-load", "load_peak_live_bytes") == pytest.approx(2 * _WEIGHTS_BYTES, rel=0.02)
    assert _metric(records, "meta-init", "load_peak_live_bytes") == pytest.approx(_WEIGHTS_BYTES, rel=0.05)
    for technique in ("none", "plain-load", "meta-init"):
        assert _metric(records, technique, "held_live_bytes") == pytest.approx(_WEIGHTS_BYTES, rel=0.02)


def test_a_mapped_model_holds_file_pages_and_no_live_memory(records: dict[str, Record]) -> None:
    assert _metric(records, "mmap", "load_peak_live_bytes") < _MIB
    assert _metric(records, "mmap", "held_live_bytes") < _MIB
    assert _metric(records, "mmap", "weights_bytes") == pytest.approx(_WEIGHTS_BYTES, rel=1e-4)
    phases = {phase.name: phase.file_end_bytes for phase in records["llama-15m/mmap/short/cpu"].processes[0].phases}
    assert None not in phases.values()
    assert (phases["load"] or 0) < _MIB
    assert (phases["apply"] or 0) < _MIB  # looking whether something changed reads nothing
    assert phases["run"] == pytest.approx(_WEIGHTS_BYTES, rel=0.02)


def test_ways_of_loading_change_no_logit(records: dict[str, Record]) -> None:
    for technique in ("plain-load", "meta-init", "mmap", "streamed", "saved"):
        assert _metric(records, technique, "kl_nats") == 0
    converted = _metric(records, "int8-weight-only", "kl_nats")
    assert converted > 0
    assert _metric(records, "streamed+int8-weight-only", "kl_nats") == converted
    assert _metric(records, "saved+int8-weight-only", "kl_nats") == converted


_LINEAR_WEIGHTS = 6 * (4 * 288 * 288 + 3 * 288 * 768)
_ROWS = 32_000 + 6 * (5 * 288 + 2 * 768)
_INT8_WEIGHTS_BYTES = _WEIGHTS_BYTES - 3 * _LINEAR_WEIGHTS


@pytest.mark.parametrize(
    ("technique", "result_bytes"),
    [
        ("streamed", _WEIGHTS_BYTES),
        ("streamed+bf16", _WEIGHTS_BYTES / 2),
        ("streamed+int8-weight-only", _INT8_WEIGHTS_BYTES),
        ("streamed+nf4", _INT8_WEIGHTS_BYTES - (0.5 - 1 / 64) * _LINEAR_WEIGHTS),
        ("streamed+all-in-4-bits", _WEIGHTS_BYTES / 8 + 4 * _ROWS),
        ("streamed+all-in-int8", _WEIGHTS_BYTES / 4 + 5 * _ROWS),
        ("streamed+all-in-fp8", _WEIGHTS_BYTES / 4 + 4 * _ROWS),
    ],
)
def test_streaming_never_takes_a_fifth_more_than_the_result(
    records: dict[str, Record], technique: str, result_bytes: float
) -> None:
    assert _metric(records, technique, "weights_bytes") == pytest.approx(result_bytes, rel=0.005)
    for phase in ("load", "apply"):
        field = f"{phase}_peak_live_bytes"
        most = _metric(records, technique, field)
        # Python's objects and the rows that are being converted do not grow with the model.
        assert 0.99 * result_bytes < most < 1.2 * result_bytes + _MIB


def test_what_was_saved_converted_holds_no_more_than_converting_does(records: dict[str, Record]) -> None:
    converted, saved = "int8-weight-only", "saved+int8-weight-only"
    assert _metric(records, saved, "weights_bytes") == _metric(records, converted, "weights_bytes")
    # Reading a checkpoint leaves some 0.5 MiB of modules that it imports.
    assert _metric(records, saved, "held_live_bytes") <= _metric(records, converted, "held_live_bytes") + _MIB
    assert _metric(records, saved, "load_peak_live_bytes") < 1.05 * _metric(records, converted, "weights_bytes")


def test_a_note_on_what_was_not_saved_is_the_same_however_the_model_was_loaded(records: dict[str, Record]) -> None:
    notes = records["llama-15m/int8-weight-only/short/cpu"].notes
    assert notes
    for loading in ("streamed", "saved"):
        assert records[f"llama-15m/{loading}+int8-weight-only/short/cpu"].notes == notes
    assert records["llama-15m/streamed+bf16/short/cpu"].notes == ()


def test_members_for_training_do_their_part_on_what_was_loaded(records: dict[str, Record]) -> None:
    losses = {
        technique: records[f"trained-tiny/{technique}/train/cpu"].processes[0].losses_nats
        for technique in ("none", "saved", "sgd-momentum", "saved+sgd-momentum")
    }
    assert losses["saved"] == losses["none"]
    assert losses["saved+sgd-momentum"] == losses["sgd-momentum"] != losses["none"]
    states = {
        technique: records[f"trained-tiny/{technique}/train/cpu"].metrics["optimizer_state_bytes"]
        for technique in ("none", "sgd-momentum", "saved+sgd-momentum")
    }
    assert states["saved+sgd-momentum"] == states["sgd-momentum"]
    assert (states["sgd-momentum"] or 0) < (states["none"] or 0)
