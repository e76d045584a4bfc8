"""Weight quantizers: bytes by arithmetic, values against plain references, checkpoints, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

import membench
from membench.builtin.models.transformer import Gpt2, Llama
from membench.builtin.techniques import quantization
from membench.builtin.techniques.bitsandbytes import BnbInt8, BnbNf4
from membench.builtin.techniques.precision import Bf16
from membench.builtin.techniques.qat import QuantizationAwareTraining
from membench.builtin.techniques.quantization import (
    Fp8Dynamic,
    Fp8WeightOnly,
    Int4WeightOnly,
    Int8Dynamic,
    Int8WeightOnly,
    Nf4,
    RoundToNearest,
)
from membench.builtin.techniques.quantizer import WeightQuantizer
from membench.builtin.workloads.forward import Forward
from membench.builtin.workloads.train import Train
from membench.errors import SuiteError
from membench.plugins import Context, LayerWise, Model, Options, Setting, Shape, Technique, Unsuitable, registry
from membench.records.record import Record
from membench.worker import checkpoint, notes
from membench.worker.weights import weight_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # what the libraries warn of while they are imported is not ours

_TIED = Shape(128, 2, 4, 4, 384, 512, 128, True)
_UNTIED = _TIED._replace(tied=False)
_Kind = TypeVar("_Kind", bound=Options)
_Bytes = Callable[[int, int], float]
"""Bytes of a layer of (rows, columns)."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Two threads wait for each other where other work runs beside."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _built(model: Model) -> tuple[nn.Module, Context]:
    context = Context("cpu", 0, model, lambda name: nullcontext(), {}, Path("nowhere"))
    return model.build(context).eval(), context


def _made(kind: type[_Kind], **options: Any) -> _Kind:
    return kind.model_validate(options)


def _rtn(bits: int, group_size: int | None = None, **which: bool) -> RoundToNearest:
    granularity = "channel" if group_size is None else "group"
    return _made(RoundToNearest, bits=bits, granularity=granularity, group_size=group_size, **which)


def _stacked(quantizer: Technique) -> tuple[Technique, ...]:
    return (Bf16(), quantizer) if isinstance(quantizer, Int4WeightOnly) else (quantizer,)


def _name(value: Any) -> str | None:
    return repr(value) if isinstance(value, Technique) else None


def _built_with_other_weights(model: Model) -> tuple[nn.Module, Context]:
    module, context = _built(model)
    for parameter in module.parameters():
        parameter.data.mul_(0.5)
    return module, context


def _applied(stack: tuple[Technique, ...], module: nn.Module, context: Context) -> nn.Module:
    for technique in stack:
        module = technique.apply(module, context)
    return module.eval()


def _linear_shapes(model: Llama | Gpt2) -> list[tuple[int, int]]:
    """(rows, columns) of each linear layer but the head."""
    shape = model.shape
    width, inner = shape.width, shape.inner_width
    if isinstance(model, Gpt2):
        a_layer = [(3 * width, width), (width, width), (inner, width), (width, inner)]
    else:
        a_layer = [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)]
    return a_layer * shape.layers


def _summed(bytes_of: _Bytes, model: Llama | Gpt2) -> float:
    return sum(bytes_of(*shape) for shape in _linear_shapes(model))


def _linear_bytes(model: Llama | Gpt2, quantizer: WeightQuantizer, passes: int = 0) -> float:
    """Bytes of the linear layers as quantized: all that are counted but those of what was left alone."""
    import torch

    module, context = _built(model)
    *before, _ = _stacked(quantizer)
    module = _applied(tuple(before), module, context)
    linear = _summed(lambda rows, columns: rows * columns * (2 if before else 4), model)
    untouched = weight_bytes(module) - linear
    module = _applied((quantizer,), module, context)
    for _ in range(passes):
        with torch.no_grad():
            module(torch.arange(32)[None])
    return weight_bytes(module) - untouched


def _nf4_bytes(rows: int, columns: int) -> float:
    blocks = rows * columns / 64
    # Where one scale does for all blocks, torchao holds on to the 256 equal ones that it took it from.
    scales = 256 if blocks == 256 else blocks / 256
    return rows * columns / 2 + blocks + 4 * scales + 4 + 16 * 4


_BY_ARITHMETIC: list[tuple[WeightQuantizer, _Bytes]] = [
    (_rtn(8), lambda rows, columns: rows * columns + 4 * rows),
    (_rtn(5), lambda rows, columns: rows * columns * 5 / 8 + 4 * rows),
    (_rtn(4, 32), lambda rows, columns: rows * columns * (4 / 8 + 4 / 32)),
    (_rtn(3, 64), lambda rows, columns: rows * columns * (3 / 8 + 4 / 64)),
    (_rtn(2, 32), lambda rows, columns: rows * columns * (2 / 8 + 4 / 32)),
    (_made(RoundToNearest, bits=4, granularity="tensor"), lambda rows, columns: rows * columns / 2 + 4),
    (_made(Int8WeightOnly), lambda rows, columns: rows * columns + 5 * rows),
    (_made(Int8WeightOnly, group_size=64), lambda rows, columns: rows * columns * (1 + 5 / 64)),
    (Int8Dynamic(), lambda rows, columns: rows * columns + 5 * rows),
    (Fp8WeightOnly(), lambda rows, columns: rows * columns + 4 * rows),
    (_made(Nf4), _nf4_bytes),
    (BnbInt8(), lambda rows, columns: rows * columns + 4 * rows),
    (_made(QuantizationAwareTraining, steps=1), lambda rows, columns: rows * columns * (4 / 8 + 4 / 32)),
]


@pytest.mark.parametrize("family", [Llama, Gpt2])
@pytest.mark.parametrize(("quantizer", "bytes_of"), _BY_ARITHMETIC, ids=_name)
def test_weights_take_the_bytes_that_bits_groups_and_scales_say(
    quantizer: WeightQuantizer, bytes_of: _Bytes, family: type[Llama | Gpt2]
) -> None:
    model = family.of_shape(_TIED)
    assert _linear_bytes(model, quantizer) == pytest.approx(_summed(bytes_of, model), rel=0.001)


def test_int4_takes_half_a_byte_a_weight_and_four_bytes_a_group() -> None:
    model = Llama.of_shape(_TIED)
    expected = _summed(lambda rows, columns: rows * columns * (4 / 8 + 4 / 64), model)
    assert _linear_bytes(model, Int4WeightOnly(group_size=64)) == pytest.approx(expected, rel=0.001)


@pytest.mark.parametrize("double", [True, False])
def test_bnb_nf4_takes_the_bytes_of_its_scales_wherever_it_keeps_them(double: bool) -> None:
    from bitsandbytes import functional

    has_avx512bf16: Any = functional.has_avx512bf16
    model = Llama.of_shape(_TIED)

    def loaded(rows: int, columns: int) -> float:
        blocks = rows * columns / 64
        scales = blocks + 4 * max(1, blocks / 256) + 256 * 4 + 4 if double else 4 * blocks
        return rows * columns / 2 + scales + 16 * 4

    def packed(rows: int, columns: int) -> float:
        return rows * columns / 2 + 2 * rows * columns / 64 + 16 * 4 + 4 * double

    quantizer = BnbNf4(double_quantization=double)
    assert _linear_bytes(model, quantizer) == pytest.approx(_summed(loaded, model), rel=0.001)
    after_a_pass = packed if has_avx512bf16() else loaded
    assert _linear_bytes(model, quantizer, passes=1) == pytest.approx(_summed(after_a_pass, model), rel=0.001)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 33])
def test_packed_codes_take_their_bits_and_unpack_exactly(bits: int, columns: int) -> None:
    import torch

    from membench.builtin.layers.packed import pack, unpack

    codes = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8)
    codes[0, 0], codes[1, 0] = 0, 2**bits - 1
    packed = pack(codes, bits)
    assert packed.shape == (5, -(-columns // 8) * bits)
    assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_rounding_to_nearest_is_the_textbooks_and_off_by_half_a_step_at_most(bits: int, granularity: Any) -> None:
    from torch import nn

    layer = nn.Linear(96, 48)
    layer.weight.data[3] = 0.0
    weight = layer.weight.data.double()
    blocks = {"tensor": weight.view(1, 1, -1), "channel": weight.view(48, 1, 96), "group": weight.view(48, 3, 32)}
    step = blocks[granularity].abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    expected = (blocks[granularity] / step.clamp(min=1e-30)).round() * step
    group_size = 32 if granularity == "group" else None
    quantizer = _made(RoundToNearest, bits=bits, granularity=granularity, group_size=group_size)
    found: Any = quantizer.convert("layer", layer, None)
    dequantized = found.packed.dequantized().double()
    # Where a weight lies between two integers, single precision may take the other one.
    assert ((dequantized.view_as(expected) - expected).abs() > 1e-6).sum() <= 2
    off = (dequantized - weight).abs().view_as(expected)
    assert (off <= step / 2 * (1 + 1e-5)).all()
    assert off.max() > 0.4 * step.max()
    assert (found.packed.scale > 0).all()


def _rounded(x: torch.Tensor, steps: float, least: int, most: int) -> torch.Tensor:
    """Rows rounded to multiples of max|x| / ``steps``."""
    scale = x.abs().amax(-1, keepdim=True) / steps
    return (x / scale).round().clamp(least, most) * scale


def _int4(weight: torch.Tensor) -> torch.Tensor:
    """Sixteen steps from a group's least to its most; all in bf16, as torchao reckons."""
    groups = weight.bfloat16().view(weight.shape[0], -1, 32)
    least = groups.amin(-1, keepdim=True)
    scale = (groups.amax(-1, keepdim=True) - least) / 15
    middle = least + scale * 8
    codes = ((groups - (middle - scale * 8)) / scale).round().clamp(0, 15)
    return ((codes - 8).float() * scale.float() + middle.float()).flatten(1)


def _fp8(weight: torch.Tensor) -> torch.Tensor:
    import torch

    scale = weight.abs().amax(-1, keepdim=True) / 448
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def _nf4(weight: torch.Tensor) -> torch.Tensor:
    """The nearest of the levels in appendix E of the paper, times the largest of each 64."""
    import torch

    below = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
    above = [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    levels = torch.tensor(below + above)
    blocks = weight.view(-1, 64)
    largest = blocks.abs().amax(-1, keepdim=True)
    nearest = (blocks[..., None] / largest[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * largest).view_as(weight)


_Values = Callable[["torch.Tensor"], "torch.Tensor"]


@pytest.mark.parametrize(
    ("quantizer", "weight_of", "input_of", "off_by_at_most"),
    [
        # The largest of a row lies between two integers, so it may become either.
        (_made(Int8WeightOnly), lambda w: _rounded(w, 127.5, -128, 127), None, 1e-3),
        (Int8Dynamic(), lambda w: _rounded(w, 127.5, -128, 127), lambda x: _rounded(x, 127.5, -128, 127), 2e-3),
        (Int4WeightOnly(), _int4, lambda x: x.bfloat16().float(), 0.01),
        (Fp8WeightOnly(), _fp8, None, 1e-5),
        (_made(Nf4), _nf4, None, 0.02),
        (BnbInt8(), lambda w: _rounded(w.half().float(), 127, -127, 127),
         lambda x: _rounded(x.half().float(), 127, -127, 127), 1e-3),
        (BnbNf4(), _nf4, None, 0.02),
        (BnbNf4(double_quantization=False), _nf4, None, 0.02),
    ],
    ids=_name,
)  # fmt: skip
def test_a_layer_gives_what_its_formula_gives(
    quantizer: Any, weight_of: _Values, input_of: _Values | None, off_by_at_most: float
) -> None:
    import torch
    from torch import nn

    torch.manual_seed(0)
    layer, inputs = nn.Linear(128, 256), torch.randn(64, 128)
    weight, bias = layer.weight.data.clone(), layer.bias.data.clone()
    dtype = torch.bfloat16 if isinstance(quantizer, Int4WeightOnly) else torch.float32
    with torch.no_grad():
        plain = inputs @ weight.T + bias
        expected = (inputs if input_of is None else input_of(inputs)) @ weight_of(weight).T + bias
        found = quantizer.convert("layer", layer.to(dtype).eval(), None).eval()(inputs.to(dtype)).float()
    assert _distance(found, expected) < off_by_at_most
    assert _distance(plain, expected) > 1.5 * off_by_at_most  # doing nothing would not pass


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("quantizer", [_rtn(4, 32), _made(Int8WeightOnly), Fp8WeightOnly()], ids=_name)
@pytest.mark.parametrize("family", [Llama, Gpt2])
def test_a_table_that_is_also_the_head_is_quantized_once_for_both(
    quantizer: LayerWise, family: type[Llama | Gpt2]
) -> None:
    import torch

    model = family.of_shape(_TIED)
    module, context = _built(model)
    ids = torch.arange(32)[None]
    with torch.no_grad():
        before, logits = weight_bytes(quantizer.apply(module, context)), module(ids).logits
        both = quantizer.model_copy(update={"embeddings": True, "head": True})
        module, _ = _built(model)
        plain = module(ids).logits
        all_of_it = both.apply(module, context)
        assert _distance(all_of_it(ids).logits, plain) < 2 * _distance(logits, plain) + 0.02
    tables = [(512, 128), *([(128, 128)] if family is Gpt2 else [])]
    table_bytes = sum(rows * columns * 4 for rows, columns in tables)
    assert before - weight_bytes(all_of_it) > 0.7 * table_bytes


@pytest.mark.parametrize("quantizer", [_rtn(3, embeddings=True, head=True), _rtn(4, 32, embeddings=True, head=True)])
def test_a_packed_table_gives_the_rows_it_is_asked_for(quantizer: RoundToNearest) -> None:
    import torch
    from torch import nn

    table = nn.Embedding(40, 64)
    table.weight.data *= torch.arange(1, 41)[:, None]
    ids = torch.tensor([[39, 0, 7], [7, 12, 1]])
    found: Any = quantizer.convert("table", table, None)
    assert torch.equal(found(ids), found.packed.dequantized()[ids])
    assert _distance(found(ids), table(ids)) < 0.3


@pytest.mark.parametrize("quantizer", [_rtn(8), _made(Int8WeightOnly), _made(Nf4), BnbInt8(), BnbNf4()], ids=_name)
def test_the_head_is_quantized_when_asked_and_left_alone_when_not(quantizer: LayerWise) -> None:
    model = Llama.of_shape(_UNTIED)
    saved = []
    for head in (False, True):
        module, context = _built(model)
        saved.append(weight_bytes(quantizer.model_copy(update={"head": head}).apply(module, context)))
    assert saved[0] - saved[1] > 0.7 * 4 * 512 * 128


def test_a_table_shared_with_the_head_of_a_model_of_unknown_shape_is_not_quantized_for_one_of_them() -> None:
    module, context = _built(Llama.of_shape(_TIED))
    with pytest.raises(Unsuitable, match="quantize both"):
        _made(Int8WeightOnly, head=True).apply(module, context)


def test_gradients_pass_a_packed_layer_which_keeps_nothing_for_them() -> None:
    import torch
    from torch import nn

    layer = _rtn(4, 32).convert("layer", nn.Linear(64, 48), None)
    packed: Any = layer
    inputs, twin = torch.randn(3, 5, 64, requires_grad=True), torch.randn(3, 5, 64, requires_grad=True)
    twin.data.copy_(inputs.data)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = layer(inputs)
    torch.autograd.backward(outputs.square().sum())
    bias = packed.bias.detach().clone().requires_grad_()
    torch.autograd.backward(nn.functional.linear(twin, packed.packed.dequantized(), bias).square().sum())
    assert inputs.grad is not None
    assert twin.grad is not None
    torch.testing.assert_close(inputs.grad, twin.grad)
    torch.testing.assert_close(packed.bias.grad, bias.grad)
    assert kept == []


@pytest.mark.parametrize(
    "quantizer",
    [*(quantizer for quantizer, _ in _BY_ARITHMETIC), Int4WeightOnly(), BnbNf4(), BnbNf4(double_quantization=False)],
    ids=_name,
)
def test_a_checkpoint_loads_into_a_fresh_module_that_gives_the_same(quantizer: Technique, tmp_path: Path) -> None:
    import safetensors.torch
    import torch

    model = Llama.of_shape(_TIED)
    module, context = _built(model)
    ids = torch.arange(32)[None]
    stack = _stacked(quantizer)
    module, fresh = _applied(stack, module, context), _applied(stack, *_built_with_other_weights(model))
    with torch.no_grad():
        first = module(ids).logits
        size_bytes, library = checkpoint.save(module, tmp_path)
        assert weight_bytes(module) < (size_bytes or 0) < weight_bytes(module) + 60_000
        # bitsandbytes rounds scales once more that it had quantized twice and then packed.
        assert _distance(module(ids).logits, first) < (0.03 if isinstance(quantizer, BnbNf4) else 1e-6)
        saved = module(ids).logits
        if library == "safetensors":
            safetensors.torch.save_model(module, str(tmp_path / "saved"))
            safetensors.torch.load_model(fresh, str(tmp_path / "saved"))
        else:
            torch.save(module.state_dict(), tmp_path / "saved")
            # The first releases of Python 3.11 pickle members of an enumeration by getattr.
            with torch.serialization.safe_globals([getattr]):
                fresh.load_state_dict(torch.load(tmp_path / "saved", weights_only=True), assign=True)
        assert _distance(fresh(ids).logits, saved) < (0.03 if isinstance(quantizer, BnbNf4) else 1e-6)


def test_bitsandbytes_scales_come_out_of_a_packed_layer_in_their_own_order() -> None:
    import torch

    module, context = _built(Llama.of_shape(_TIED))
    module = BnbNf4(double_quantization=False).apply(module, context).eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items() if name.endswith("absmax")}
    with torch.no_grad():
        module(torch.arange(32)[None])
    after = module.state_dict()
    for name, largest in before.items():
        torch.testing.assert_close(after[name], largest, rtol=2**-8, atol=0.0)  # they were in bf16 meanwhile


@pytest.mark.parametrize("bits", [3, 8])
def test_what_qat_keeps_computes_what_its_training_computed(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from membench.builtin.techniques import qat

    ids, trained = torch.arange(32)[None], []

    def tune(module: nn.Module, *rest: Any) -> None:
        with torch.no_grad():
            trained.append(module.eval()(ids).logits)

    monkeypatch.setattr(qat, "tune", tune)
    for fake in (True, False):
        module, context = _built(Llama.of_shape(_TIED))
        module = _made(QuantizationAwareTraining, bits=bits, fake_quantization=fake).apply(module, context).eval()
        with torch.no_grad():
            trained.append(module(ids).logits)
    fake_quantized, kept, plain, kept_without = trained
    assert _distance(kept, fake_quantized) < 1e-6
    assert _distance(kept, plain) > 1e-3
    assert torch.equal(kept, kept_without)  # nothing was learnt here, so the same weights are rounded


def test_a_note_on_packed_weights_names_scales_and_what_was_left_alone_but_no_codes() -> None:
    module, context = _built(Llama.of_shape(_TIED))
    plain = notes.PlainWeights.of(module)
    quantizer = _rtn(4, 32)
    (note,) = notes.on_weights(quantizer.apply(module, context), [quantizer], plain)
    assert note == (
        "weights are ×0.27 where ×0.12 is the nominal factor: 256.0 KiB of embeddings left in float32,"
        " 52.00 KiB scales and zero points in float32, 2.500 KiB of norms left in float32,"
        " 128 B of LlamaRotaryEmbedding layers left in float32"
    )


def test_what_is_quantized_is_compared_with_the_type_that_the_model_was_built_in() -> None:
    """Int8 is half of bf16: 4 MiB of weights become 2 MiB, and no note says that a quarter was due."""
    import torch
    from torch import nn

    bf16, mixed = nn.Linear(2048, 1024, dtype=torch.bfloat16), nn.Linear(2048, 1024)
    quantizer, context = _rtn(8), _built(Llama.of_shape(_TIED))[1]
    plain = notes.PlainWeights.of(bf16)
    assert (plain.bits, plain.bytes) == (16, 2 * (2048 * 1024 + 1024))
    assert notes.PlainWeights.of(mixed).bits == 32
    made = quantizer.apply(nn.Sequential(bf16), context)
    assert weight_bytes(made) == pytest.approx(0.5 * plain.bytes, rel=0.01)
    assert notes.on_weights(made, [quantizer], plain) == []
    (note,) = notes.on_weights(nn.Sequential(nn.Linear(2048, 1024, dtype=torch.bfloat16)), [quantizer], plain)
    assert note == "weights are ×1.000 where ×0.50 is the nominal factor: 4.002 MiB of Linear layers left in bfloat16"
    assert notes.on_weights(nn.Sequential(nn.Linear(2048, 1024, dtype=torch.bfloat16)), [Bf16()], plain) == []


_SUITE = (
    '[suite]\nname = "s"\n[matrix]\nmodel = ["llama-15m"]\ntechnique = ["q"]\nworkload = ["forward"]\n[technique.q]\n'
)
_TWO = "the output head of this model is its embedding table"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ('use = "round-to-nearest"\nbits = 1', "option 'bits' = 1: must be at least 2"),
        ('use = "round-to-nearest"\nbits = 9', "option 'bits' = 9: must be at most 8"),
        ('use = "qat"\nbits = 1', "option 'bits' = 1: must be at least 2"),
        (
            'use = "round-to-nearest"\ngranularity = "group"\ngroup_size = 50',
            "group_size = 50 does not divide the width 288 of the model's layers",
        ),
        ('use = "round-to-nearest"\ngranularity = "group"', "granularity = 'group' needs a group_size"),
        (
            'use = "round-to-nearest"\ngroup_size = 32',
            "group_size = 32 has no meaning with granularity = 'channel'",
        ),
        ('use = "round-to-nearest"\nembeddings = true', f"{_TWO}: quantize both"),
        ('use = "int8-weight-only"\nhead = true', f"{_TWO}: quantize both"),
        ('use = "int8-weight-only"\ngroup_size = 64', "group_size = 64 does not divide the width 288"),
        ('use = "int4-weight-only"\ngroup_size = 128', "group_size = 128 does not divide the width 288"),
        ('use = "int4-weight-only"\ngroup_size = 256', "group_size = 256: on a CPU it is 32, 64 or 128"),
        (
            'use = "int4-weight-only"\nembeddings = true',
            "embeddings = true: torchao cannot look up rows of 4-bit weights",
        ),
        ('use = "nf4"\nembeddings = true', "embeddings = true: torchao cannot look up rows of NF4 weights"),
        ('use = "nf4"\nhead = true', f"head = true: {_TWO}, and torchao cannot look up rows of NF4 weights"),
        ('use = "nf4"\nblock_size = 100', "block_size = 100 does not divide a layer of 288 × 288 weights"),
        ('use = "bnb-int8"\nembeddings = true', "embeddings = true: bitsandbytes cannot save a quantized embedding"),
        ('use = "bnb-nf4"', "block_size = 64 does not divide the width 288 of the model's layers"),
        ('use = "qat"\ngroup_size = 64', "group_size = 64 does not divide the width 288 of the model's layers"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_the_suite(options: str, message: str, suite_file: Path) -> None:
    suite_file.write_text(_SUITE + options + "\n")
    with pytest.raises(SuiteError) as caught:
        membench.load_suite(suite_file)
    assert message in str(caught.value)


class _Adapters(Technique):
    """Stands for adapters, which train beside frozen weights."""

    trains_adapters = True


def _reason(quantizer: Technique, trains: bool = False, before: Any = (), after: Any = (), device: str = "cpu") -> Any:
    workload = _made(Train) if trains else _made(Forward)
    return quantizer.refuse(Setting(Llama.of_shape(_TIED), workload, device, tuple(before), tuple(after)))


@pytest.mark.parametrize("quantizer", [_rtn(4, 32), _made(Int8WeightOnly), _made(Nf4), BnbInt8(), BnbNf4()], ids=_name)
def test_frozen_weights_are_not_trained_unless_adapters_come_after(quantizer: WeightQuantizer) -> None:
    assert _reason(quantizer) is None
    assert _reason(quantizer, trains=True) == f"{quantizer.kind} weights have no gradients: they cannot be trained"
    assert _reason(quantizer, trains=True, after=[_Adapters()]) is None


@pytest.mark.parametrize("quantizer", [Int8Dynamic(), Int4WeightOnly()], ids=_name)
def test_adapters_are_refused_over_layers_that_no_gradient_passes(quantizer: WeightQuantizer) -> None:
    assert _reason(quantizer, trains=True, before=[Bf16()], after=[_Adapters()]) == quantizer.no_gradients is not None


def test_stacks_and_devices_that_cannot_be_served_are_skipped_with_the_reason() -> None:
    assert _reason(_made(Int8WeightOnly), before=[_made(Nf4)]) == "the weights are quantized already"
    assert "put 'bf16' before it" in _reason(Int4WeightOnly())
    assert _reason(Int4WeightOnly(), before=[Bf16()]) is None
    assert "capability 8.9" in _reason(Fp8Dynamic())
    assert _reason(Fp8Dynamic(), device="cuda") is None


def test_bnb_nf4_multiplies_a_transposed_view_as_any_other_input() -> None:
    import torch
    from torch import nn

    layer = BnbNf4().convert("layer", nn.Linear(64, 64), None).eval()
    inputs = torch.randn(1, 64, 5)
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs.transpose(1, 2)), layer(inputs.transpose(1, 2).contiguous()))


def test_a_layer_that_was_pruned_with_masks_is_not_quantized_unnoticed() -> None:
    from torch import nn
    from torch.nn.utils import prune

    layer = nn.Linear(64, 64)
    prune.random_unstructured(layer, "weight", 0.5)  # type: ignore[no-untyped-call]
    context = _built(Llama.of_shape(_TIED))[1]
    assert _made(Int8WeightOnly).converted("proj", layer, None, context) is layer
    (left,) = context.left_alone
    assert (left.path, left.reason) == ("proj", "it has hooks")


def test_qat_learns_to_live_with_three_bits_better_than_as_much_training_without_rounding() -> None:
    import torch

    from membench.data import corpus

    model = registry.create("model", "trained-tiny", {})
    model.prepare(lambda done, total, what: None)
    held_out = torch.tensor(list(corpus.split()[1][: 16 * 257])).view(16, 257)
    losses = []
    for fake in (True, False):
        module, context = _built(model)
        quantizer = _made(QuantizationAwareTraining, bits=3, steps=40, fake_quantization=fake)
        module = quantizer.apply(module, context).eval()
        with torch.no_grad():
            logits = module(held_out[:, :-1]).logits
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten()).item())
    assert losses[0] < losses[1] - 0.05


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("quantization")
    path = folder / "real.toml"
    path.write_text(
        '[suite]\nname = "real"\n[matrix]\nmodel = ["trained-tiny"]\ntechnique = ["none", "int8-weight-only"]\n'
        'workload = ["forward"]\n[settings]\nmeasured_steps = 1\nevaluate_s = 2\n'  # the tiny model needs half a second
        '[[include]]\nmodel = "llama-15m"\ntechnique = ["everything-4", "nf4-32"]\nworkload = "forward"\n'
        '[technique.everything-4]\nuse = "round-to-nearest"\nbits = 4\ngranularity = "group"\ngroup_size = 32\n'
        'embeddings = true\nhead = true\n[technique.nf4-32]\nuse = "bnb-nf4"\nblock_size = 32\n'
    )
    return {record.id: record for record in membench.run(membench.load_suite(path), output=folder).records}


def test_int8_weights_lose_less_than_half_a_percent_of_quality(records: dict[str, Record]) -> None:
    plain, quantized = (records[f"trained-tiny/{name}/forward/cpu"].metrics for name in ("none", "int8-weight-only"))
    assert plain["bits_per_byte"] is not None
    assert quantized["bits_per_byte"] is not None
    assert 0 < abs(quantized["bits_per_byte"] / plain["bits_per_byte"] - 1) < 0.005


@pytest.mark.parametrize("technique", ["none", "everything-4", "nf4-32"])
def test_the_weights_that_are_counted_are_what_memory_holds(records: dict[str, Record], technique: str) -> None:
    metrics = records[f"llama-15m/{technique}/forward/cpu"].metrics
    assert metrics["held_live_bytes"] == pytest.approx(metrics["weights_bytes"], rel=0.01, abs=900_000)


def test_a_row_of_zeros_stays_zero_in_every_quantizer() -> None:
    import torch

    for technique in (Int8WeightOnly.model_validate({}), Fp8WeightOnly(), RoundToNearest.model_validate({})):
        layer = torch.nn.Linear(64, 32, bias=False)
        layer.weight.data[3] = 0
        made = technique.convert("layer", layer, None)
        output = made(torch.ones(1, 64))
        assert output[0, 3] == 0
        assert output.isfinite().all()


def test_a_weight_is_the_same_whether_converted_at_once_or_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for technique in (Int8WeightOnly.model_validate({"group_size": 32}), Int8Dynamic(), Fp8WeightOnly()):
        weight, inputs = torch.randn(48, 64), torch.randn(5, 64)
        outputs = []
        for at_once in (64 * 7, 64 * 48):
            monkeypatch.setattr(quantization, "_AT_ONCE", at_once)
            layer = torch.nn.Linear(64, 48, bias=False)
            layer.weight.data = weight.clone()
            outputs.append(technique.convert("layer", layer, None)(inputs))
        assert torch.equal(*outputs)
