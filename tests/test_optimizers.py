"""Optimizers: each step against a plain reference, each state to the byte."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

import membench
from membench.builtin.models.trained_tiny import TrainedTiny
from membench.builtin.models.transformer import Llama
from membench.builtin.techniques.none import NoTechnique
from membench.builtin.techniques.optimizers import (
    Adafactor,
    AdamW4bit,
    AdamW8bit,
    AdamWBf16StochasticRounding,
    AdamWFp8,
    AdamWFused,
    MasterWeights,
    OptimizerTechnique,
    SgdMomentum,
    missing_compiler,
)
from membench.builtin.workloads.forward import Forward
from membench.builtin.workloads.train import Train
from membench.errors import SuiteError
from membench.plugins import Context, Model, Setting, Technique, Unsuitable
from membench.records.record import Record
from membench.worker import notes

if TYPE_CHECKING:
    import torch
    from torch import nn

_RATE = 1e-3
_STEPS = 20
_LLAMA = Llama.model_validate({"size": "15m"})
_ADAFACTOR = Adafactor.model_validate({})
_ALL = [AdamWFused(), AdamW8bit(), AdamW4bit(), AdamWFp8(), AdamWBf16StochasticRounding(), MasterWeights(), _ADAFACTOR,
        SgdMomentum.model_validate({})]  # fmt: skip
_TORCHAO = ("adamw-8bit", "adamw-4bit", "adamw-fp8", "adamw-bf16-stochastic-rounding")
_OTHERS = ("adamw-fused", "master-weights", "adafactor", "sgd-momentum")
_SUITE = f"""\
[suite]
name = "optimizers"
[matrix]
model = ["trained-tiny"]
technique = {["none", *_TORCHAO, "adamw-8bit+adafactor"]}
workload = ["short"]
[[include]]
model = "llama-15m"
technique = {["none", *_OTHERS]}
workload = "short"
[workload.short]
use = "train"
batch_size = 1
sequence_length = 8
[settings]
measured_steps = 1
"""


@pytest.fixture
def _eager() -> Iterator[None]:
    """Steps without compiling them: the same formulas, without the seconds."""
    import torch

    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("optimizers")
    path = folder / "optimizers.toml"
    path.write_text(_SUITE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling takes minutes, and changes no byte of the states
        return {record.id: record for record in membench.run(membench.load_suite(path), output=folder).records}


def _context() -> Context:
    return Context("cpu", 0, _LLAMA, lambda name: pytest.fail(name), {}, Path())


def _optimizer(technique: Technique, weight: nn.Parameter, rate: float = _RATE) -> torch.optim.Optimizer:
    """What the technique makes of the workload's own optimizer."""
    import torch

    return technique.optimizer(torch.optim.AdamW([weight], lr=rate), torch.nn.Module(), _context())


def _weight(shape: tuple[int, ...] = (64, 64), dtype: str = "float32") -> nn.Parameter:
    import torch

    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 1
    return torch.nn.Parameter(values.to(getattr(torch, dtype)))


def _gradients(weight: nn.Parameter, steps: int = _STEPS) -> list[torch.Tensor]:
    """Noise around a direction that stays, as gradients are."""
    import torch

    random = torch.Generator().manual_seed(2)
    direction = 0.1 * torch.randn(weight.shape, generator=random)
    noise = (0.3 * torch.randn(weight.shape, generator=random) for _ in range(steps))
    return [(direction + each).to(weight.dtype) for each in noise]


def _walk(optimizer: torch.optim.Optimizer, weight: nn.Parameter, gradients: Iterable[torch.Tensor]) -> None:
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()


def _adamw(start: torch.Tensor, gradients: Iterable[torch.Tensor], rate: float = _RATE) -> torch.Tensor:
    """AdamW as Loshchilov and Hutter write it, in fp64, with torch's defaults."""
    import torch

    weight = start.detach().double()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, gradient in enumerate(gradients, 1):
        gradient = gradient.double()
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        direction = (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        weight = weight - rate * (direction + 0.01 * weight)
    return weight


def _adafactor(start: torch.Tensor, gradients: Iterable[torch.Tensor], rate: float) -> torch.Tensor:
    """Shazeer and Stern's algorithm 4 in fp64, the rate falling as 1/√t from the one given, without weight decay."""
    import torch

    weight = start.detach().double()
    rows, columns = torch.zeros(weight.shape[0], 1).double(), torch.zeros(1, weight.shape[1]).double()
    for t, gradient in enumerate(gradients, 1):
        gradient = gradient.double()
        kept = 1 - t**-0.8
        rows = kept * rows + (1 - kept) * gradient.square().mean(1, keepdim=True)
        columns = kept * columns + (1 - kept) * gradient.square().mean(0, keepdim=True)
        update = gradient / (rows @ columns / rows.mean()).sqrt()
        update = update / max(1.0, update.square().mean().sqrt().item())
        step = max(1e-3, weight.square().mean().sqrt().item()) * min(rate, t**-0.5)
        weight = weight - step * update
    return weight


def _off(weight: torch.Tensor, reference: torch.Tensor, start: torch.Tensor) -> float:
    """How far off a walk ended, as a share of its length."""
    way, error = reference - start.detach().double(), weight.detach().double() - reference
    return float(error.norm() / way.norm())


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("technique", [AdamW8bit(), AdamW4bit(), AdamWFp8()], ids=lambda t: type(t).__name__)
def test_the_first_step_of_quantized_adamw_is_adamws(technique: Technique) -> None:
    weight = _weight()
    start, gradients = weight.detach().clone(), _gradients(weight, 1)
    _walk(_optimizer(technique, weight), weight, gradients)
    assert _off(weight, _adamw(start, gradients), start) < 1e-3


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize(
    ("technique", "least", "most"),
    [(AdamW8bit(), 0.005, 0.03), (AdamWFp8(), 0.01, 0.06), (AdamW4bit(), 0.05, 0.3)],
    ids=["8 bits", "float8", "4 bits"],
)
def test_twenty_steps_of_quantized_adamw_end_near_adamws_but_not_there(
    technique: Technique, least: float, most: float
) -> None:
    weight = _weight()
    start, gradients = weight.detach().clone(), _gradients(weight)
    _walk(_optimizer(technique, weight), weight, gradients)
    assert least < _off(weight, _adamw(start, gradients), start) < most


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about its own parts
def test_a_compiled_step_is_the_eager_one_and_is_compiled_once() -> None:
    import torch

    ways = []
    gradients = _gradients(_weight())
    for stance in ("force_eager", "default"):
        weight = _weight()
        optimizer = _optimizer(AdamWFp8(), weight)
        torch.compiler.set_stance(cast(Any, stance))
        _walk(optimizer, weight, gradients[:1])
        if stance == "default":
            torch.compiler.set_stance("fail_on_recompile")
        _walk(optimizer, weight, gradients[1:])
        torch.compiler.set_stance("default")
        ways.append(weight.detach())
    torch.testing.assert_close(*ways, rtol=0, atol=_RATE / 10)


@pytest.mark.usefixtures("_eager")
def test_stochastic_rounding_keeps_on_average_what_rounding_to_nearest_loses() -> None:
    import torch

    torch.manual_seed(0)
    spacing = 2.0**-8  # of bfloat16 just below one
    quarter = spacing / 4
    count = 1_000_000
    weight = torch.nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
    expected = 1 - quarter * (1 + 0.01)  # a first step of AdamW is as long as the rate, and decays a hundredth of it
    _walk(_optimizer(AdamWBf16StochasticRounding(), weight, quarter), weight, [torch.ones_like(weight)])
    values = weight.detach().double()
    assert set(values.tolist()) == {1.0, 1 - spacing}
    share = (1 - expected) / spacing
    standard_error = spacing * (share * (1 - share) / count) ** 0.5
    assert abs(values.mean().item() - expected) < 4 * standard_error

    nearest = torch.nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
    _walk(torch.optim.AdamW([nearest], lr=quarter), nearest, [torch.ones_like(nearest)])
    assert (nearest == 1).all()


@pytest.mark.usefixtures("_eager")
def test_steps_with_stochastic_rounding_end_within_its_noise_of_adamws() -> None:
    import torch

    torch.manual_seed(0)
    weight = _weight((1000, 64), "bfloat16")
    start, gradients = weight.detach().clone(), _gradients(weight)
    _walk(_optimizer(AdamWBf16StochasticRounding(), weight), weight, gradients)
    error = weight.detach().double() - _adamw(start, gradients)
    # Each of the steps adds noise of at most half a spacing (2^-7 of the weight), and no bias.
    assert error.abs().mean() < 2**-7 * start.abs().double().mean() * _STEPS**0.5 / 2
    assert abs(error.mean().item()) < 4 * error.std().item() / error.numel() ** 0.5


def test_master_weights_step_as_fp32_adamw_does_on_an_fp32_copy_to_the_bit() -> None:
    import torch

    weight = _weight(dtype="bfloat16")
    copy = torch.nn.Parameter(weight.detach().float())
    plain, mixed = torch.optim.AdamW([copy], lr=1e-5), _optimizer(MasterWeights(), weight, 1e-5)
    for gradient in _gradients(weight):
        copy.grad = gradient.float()
        plain.step()
        _walk(mixed, weight, [gradient])
        assert torch.equal(mixed.state[weight]["master"], copy)
        assert torch.equal(weight, copy.bfloat16())


def test_steps_too_small_for_bf16_add_up_in_master_weights_alone() -> None:
    import torch

    ends = []
    for technique in (MasterWeights(), NoTechnique()):
        weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        _walk(_optimizer(technique, weight, 1e-4), weight, [torch.ones_like(weight)] * 100)
        ends.append(weight.detach().mean().item())
    assert ends == [pytest.approx(0.99, abs=2**-9), 1.0]


def test_a_weight_without_gradient_is_left_alone_by_master_weights() -> None:
    weight = _weight(dtype="bfloat16")
    before = weight.detach().clone()
    optimizer = _optimizer(MasterWeights(), weight)
    optimizer.step()
    assert (weight == before).all()
    assert not optimizer.state


@pytest.mark.parametrize("technique", [MasterWeights(), AdamWBf16StochasticRounding()], ids=lambda t: type(t).__name__)
def test_what_steps_bf16_weights_makes_them_bf16(technique: Technique) -> None:
    import torch

    module = technique.apply(torch.nn.Sequential(torch.nn.Linear(8, 8)), _context())
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert technique.nominal_bits() == 16


def test_adafactor_is_the_papers_formula() -> None:
    weight = _weight((48, 64))
    start, gradients = weight.detach().clone(), _gradients(weight)
    _walk(_optimizer(Adafactor.model_validate({"learning_rate": 0.1}), weight), weight, gradients)
    assert _off(weight, _adafactor(start, gradients, 0.1), start) < 1e-4


def test_sgd_with_momentum_is_the_textbooks_formula() -> None:
    import torch

    weight = _weight()
    reference = weight.detach().double()
    momentum = torch.zeros_like(reference)
    gradients = _gradients(weight)
    start = weight.detach().clone()
    for gradient in gradients:
        momentum = 0.8 * momentum + gradient.double()
        reference = reference - 0.1 * momentum
    _walk(_optimizer(SgdMomentum.model_validate({"momentum": 0.8, "learning_rate": 0.1}), weight), weight, gradients)
    assert _off(weight, reference, start) < 1e-5


@pytest.mark.parametrize("technique", _ALL, ids=lambda t: type(t).__name__)
def test_the_rate_and_the_parameters_are_the_workloads(technique: Technique) -> None:
    weight = _weight(dtype="bfloat16")
    group = _optimizer(technique, weight, 0.0123).param_groups[0]
    assert float(group["lr"]) == pytest.approx(0.0123)
    assert [id(parameter) for parameter in group["params"]] == [id(weight)]


def _state_bytes(name: str, shapes: Iterable[tuple[int, ...]]) -> float:
    return sum(_tensors_state_bytes(name, shape) for shape in shapes)


def _tensors_state_bytes(name: str, shape: tuple[int, ...]) -> float:
    """By arithmetic; most optimizers count their steps in a scalar of 4 bytes."""
    count = math.prod(shape)
    whole = {
        "none": 8 * count + 4,
        "adamw-fused": 8 * count + 4,
        "adamw-bf16-stochastic-rounding": 4 * count + 4,
        "master-weights": 12 * count + 4,
        "sgd-momentum": 4 * count,
        "adafactor": 4 * (count if len(shape) == 1 else sum(shape)) + 4,
    }
    if name in whole:
        return whole[name]
    bits, block, table_bytes = {
        "adamw-8bit": (8, 256, 256 * 4),
        "adamw-4bit": (4, 128, 16 * 4),
        "adamw-fp8": (8, 256, 0),
    }[name]
    if count < 4096 or count % block:
        return whole["none"]
    return 2 * (count * bits / 8 + 4 * count / block + table_bytes) + 4


def _shapes(model: Model) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in model.skeleton().parameters()]


def test_states_are_counted_to_the_byte(records: dict[str, Record]) -> None:
    tiny, llama = _shapes(TrainedTiny()), _shapes(_LLAMA)
    expected = {("trained-tiny", name): _state_bytes(name, tiny) for name in ("none", *_TORCHAO)}
    expected |= {("llama-15m", name): _state_bytes(name, llama) for name in ("none", *_OTHERS)}
    for (model, name), size in expected.items():
        record = records[f"{model}/{name}/short/cpu"]
        assert (name, record.status, record.metrics["optimizer_state_bytes"]) == (name, "ok", size)


def test_by_that_arithmetic_adams_states_take_8_2_and_1_bytes_a_parameter_and_their_scales() -> None:
    llama = _shapes(_LLAMA)
    for name, each in {
        "none": 8,
        "adamw-8bit": 2 + 8 / 256,
        "adamw-fp8": 2 + 8 / 256,
        "adamw-4bit": 1 + 8 / 128,
    }.items():
        assert _state_bytes(name, llama) == pytest.approx(each * sum(map(math.prod, llama)), rel=0.004)


@pytest.mark.usefixtures("_eager")
def test_a_note_names_what_kept_states_from_their_factor() -> None:
    large, small = _weight((64, 64)), _weight((2048,))
    optimizer = AdamW4bit().make([large, small], _RATE, _context())
    large.grad, small.grad = _gradients(large, 1)[0], _gradients(small, 1)[0]
    optimizer.step()
    (note,) = notes.on_states(optimizer.state, [large, small], [AdamW4bit()])
    # A byte for each weight of the large one, two scales for each 128, two tables of 16; fp32 for the small.
    kept_bytes = 4096 + 2 * 4 * 32 + 2 * 4 * 16 + 8 * 2048
    assert note == (
        f"optimizer states are ×{kept_bytes / (8 * (4096 + 2048)):.2f} where ×0.12 is the nominal factor: "
        "16.00 KiB of moments in float32, 256 B of scales in float32, 128 B of tables of values in float32"
    )


def test_states_that_were_never_made_are_no_saving() -> None:
    seen, unseen = _weight((100,)), _weight((300,))
    technique = SgdMomentum.model_validate({})
    optimizer = technique.make([seen, unseen], _RATE, _context())
    seen.grad = _gradients(seen, 1)[0]
    optimizer.step()
    (note,) = notes.on_states(optimizer.state, [seen, unseen], [technique])
    assert note == ("optimizer states are ×0.12 where ×0.50 is the nominal factor: 1.172 KiB of states not yet made")
    unseen.grad = _gradients(unseen, 1)[0]
    optimizer.step()
    assert notes.on_states(optimizer.state, [seen, unseen], [technique]) == []


def test_states_are_compared_with_adamws_in_the_type_that_the_model_was_built_in() -> None:
    """A moment in bf16 is half of AdamW's two on a model that is built in bf16, and a quarter of those in fp32."""
    import torch

    weight = torch.nn.Parameter(torch.zeros(100, dtype=torch.bfloat16))
    technique = SgdMomentum.model_validate({})
    optimizer = technique.make([weight], _RATE, _context())
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert notes.on_states(optimizer.state, [weight], [technique], built_bits=16) == []
    assert notes.on_states(optimizer.state, [weight], [technique], built_bits=32) == []
    master = MasterWeights.model_validate({})
    fp32: dict[torch.Tensor, dict[str, torch.Tensor]] = {
        weight: {"master": torch.zeros(100), "exp_avg": torch.zeros(100), "exp_avg_sq": torch.zeros(100)}
    }
    assert notes.on_states(fp32, [weight], [master], built_bits=16) == []  # ×3 of 4 bytes
    (note,) = notes.on_states({}, [weight], [master], built_bits=16)
    assert note.startswith("optimizer states are ×0.00 where ×3.00 is the nominal factor")


def test_what_a_training_holds_is_weights_gradients_and_states(records: dict[str, Record]) -> None:
    for name in ("none", "adafactor", "sgd-momentum"):
        metrics = records[f"llama-15m/{name}/short/cpu"].metrics
        weights, states = cast(int, metrics["weights_bytes"]), cast(int, metrics["optimizer_state_bytes"])
        assert metrics["held_live_bytes"] == pytest.approx(2 * weights + states, rel=0.03)


def test_two_optimizers_in_a_stack_are_skipped_with_the_reason(records: dict[str, Record]) -> None:
    record = records["trained-tiny/adamw-8bit+adafactor/short/cpu"]
    assert record.status == "skipped"
    assert record.message == "a training has one optimizer, and the stack names two"


def _refusal(
    technique: Technique, device: str = "cpu", before: tuple[Technique, ...] = (), after: tuple[Technique, ...] = ()
) -> str | None:
    return technique.refuse(Setting(_LLAMA, Train.model_validate({}), device, before, after))


@pytest.mark.parametrize("technique", _ALL, ids=lambda t: type(t).__name__)
def test_every_optimizer_refuses_another_one_and_forward_passes(technique: Technique) -> None:
    assert isinstance(technique, OptimizerTechnique)
    assert _refusal(technique, before=(NoTechnique(),)) is None
    for refusal in (_refusal(technique, before=(_ADAFACTOR,)), _refusal(technique, after=(_ADAFACTOR,))):
        assert refusal == "a training has one optimizer, and the stack names two"
    forward = Setting(_LLAMA, Forward.model_validate({}), "cpu", (), ())
    assert technique.refuse(forward) == "an optimizer needs a workload that trains"


@pytest.mark.parametrize(
    ("device", "variable", "reason"),
    [
        ("cpu", "CXX", "torch.compile needs a C++ compiler, and no-such-compiler is not there"),
        ("cuda:0", "CC", "torch.compile needs a C compiler, and no-such-compiler is not there"),
    ],
)
def test_torchaos_optimizers_are_skipped_where_nothing_can_compile_them(
    device: str, variable: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "no-such-compiler")
    for technique in _ALL:
        from_torchao = type(technique).__name__.startswith("AdamW") and not isinstance(technique, AdamWFused)
        assert _refusal(technique, device) == (reason if from_torchao else None)


def test_the_usual_compilers_are_looked_for_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_for: list[str] = []
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", looked_for.append)
    assert missing_compiler("cuda") == "torch.compile needs a C compiler, and gcc or clang is not there"
    missing_compiler("cpu")
    assert looked_for in (["gcc", "clang", "g++"], ["gcc", "clang", "clang++"])


def test_float8_states_are_skipped_on_a_gpu_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    capability: Callable[[str], tuple[int, int]] = lambda device: (8, 6)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    context = Context("cuda", 0, _LLAMA, lambda name: pytest.fail(name), {}, Path())
    with pytest.raises(Unsuitable, match=r"float8 needs compute capability 8\.9; this GPU has 8\.6"):
        AdamWFp8().optimizer(torch.optim.AdamW([_weight()]), torch.nn.Module(), context)


@pytest.mark.parametrize(
    ("use", "option"),
    [("sgd-momentum", "momentum = 1.0"), ("sgd-momentum", "learning_rate = 0.0"), ("adafactor", "learning_rate = -1.0"),
     ("adamw-8bit", "block_size = 64")],
)  # fmt: skip
def test_bad_options_are_an_error_of_the_suite_that_names_them(use: str, option: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        '[suite]\nname = "bad"\n[matrix]\nmodel = ["llama-15m"]\ntechnique = ["x"]\nworkload = ["train"]\n'
        f'[technique.x]\nuse = "{use}"\n{option}\n'
    )
    with pytest.raises(SuiteError, match=option.partition(" ")[0]):
        membench.load_suite(path)
