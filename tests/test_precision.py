"""Half precision: what is kept in 16 bits, what is scaled, and what happens to a training in bare float16."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

import membench
from membench.builtin.models.transformer import Llama
from membench.builtin.techniques.precision import AutocastBf16, AutocastFp16, Bf16, Fp16
from membench.plugins import Context, Setting, Technique, TrainingStep, Unsuitable, registry, stepping
from membench.records.record import Record

if TYPE_CHECKING:
    import torch
    from torch import nn

_SUITE = """\
[suite]
name = "precision"
[matrix]
model = ["trained-tiny"]
technique = ["none", "fp16", "autocast-bf16", "autocast-fp16", "fp16+autocast-fp16"]
workload = ["finetune"]
[[include]]
model = "trained-tiny"
technique = ["none", "autocast-bf16"]
workload = "answer"
[workload.finetune]
use = "train"
sequence_length = 64
learning_rate = 1e-3
[workload.answer]
use = "generate"
prompt_length = 64
new_tokens = 2
[settings]
measured_steps = 6
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("precision")
    path = folder / "precision.toml"
    path.write_text(_SUITE)
    return {record.id: record for record in membench.run(membench.load_suite(path), output=folder).records}


def _figure(record: Record, name: str) -> float:
    return cast(float, record.metrics[name])


def _context(tmp_path: Path) -> Context:
    return Context("cpu", 0, Llama.model_validate({}), lambda name: pytest.fail(name), {}, tmp_path)


@pytest.mark.parametrize(("technique", "name"), [(Bf16(), "bfloat16"), (Fp16(), "float16")])
def test_casting_rounds_every_weight_to_the_nearest_value_of_16_bits(
    technique: Technique, name: str, tmp_path: Path
) -> None:
    import torch

    layer = torch.nn.Linear(64, 32)
    before = layer.weight.detach().clone()
    technique.apply(torch.nn.Sequential(layer), _context(tmp_path))
    assert layer.weight.dtype == layer.bias.dtype == getattr(torch, name)
    largest_error = 2.0 ** -(8 if name == "bfloat16" else 11)
    assert (layer.weight.detach().float() - before).abs().div(before.abs().clamp(min=2**-14)).max() <= largest_error


@pytest.mark.parametrize(("gradient", "state"), [(6e-3, 2.0**-24), (5e-3, 0.0)])
def test_adamws_second_state_in_float16_is_zero_for_gradients_below_five_and_a_half_thousandths(
    gradient: float, state: float
) -> None:
    import torch

    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float16))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.full_like(weight, gradient)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg_sq"].item() == state


def test_a_second_cast_is_refused_and_an_optimizer_that_casts_to_the_same_is_not() -> None:
    def reason(before: str, name: str) -> str | None:
        def member(which: str) -> Technique:
            return cast(Technique, registry.create("technique", which, {}))

        workload = registry.create("workload", "train", {})
        return member(name).refuse(Setting(Llama.model_validate({}), workload, "cuda", (member(before),), ()))

    assert reason("fp16", "bf16") == "the weights are cast already, to float16"
    assert reason("bf16", "fp16") == "the weights are cast already, to bfloat16"
    assert reason("master-weights", "fp16") == "the weights are cast already, to bfloat16"
    assert reason("bf16", "master-weights") is None
    assert reason("master-weights", "bf16") is None


def test_float16_overflows_where_bfloat16_keeps_fp32s_range(tmp_path: Path) -> None:
    import torch

    held = []
    for technique in (Bf16(), Fp16()):
        layer = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(layer.weight, 70_000)
        technique.apply(torch.nn.Sequential(layer), _context(tmp_path))
        held.append(layer.weight.item())
    assert held == [70_144, float("inf")]


@pytest.mark.parametrize(("technique", "name"), [(AutocastBf16(), "bfloat16"), (AutocastFp16(), "float16")])
def test_autocast_multiplies_in_16_bits_takes_losses_in_32_and_leaves_the_weights_alone(
    technique: Technique, name: str, tmp_path: Path
) -> None:
    import torch

    half = getattr(torch, name)
    layer, x = torch.nn.Linear(64, 32, bias=False), torch.randn(8, 64)
    with stepping([technique], _context(tmp_path)):
        product = layer(x)
        error = torch.nn.functional.mse_loss(product, product + 1)
    assert (product.dtype, error.dtype, layer.weight.dtype) == (half, torch.float32, torch.float32)
    plain = (x.to(half) @ layer.weight.to(half).T).float()
    torch.testing.assert_close(product.float(), plain, rtol=torch.finfo(half).eps, atol=torch.finfo(half).eps)
    assert layer(x).dtype == torch.float32


def _training(
    technique: AutocastFp16, module: nn.Module, loss: Callable[[], torch.Tensor], tmp_path: Path
) -> tuple[Callable[[], None], TrainingStep]:
    """A step of training with a rate of one, as the technique leaves it."""
    import torch

    context = _context(tmp_path)
    sgd = torch.optim.SGD(module.parameters(), lr=1.0)
    technique.optimizer(sgd, module, context)
    pieces = TrainingStep(
        lambda batch: [batch],
        lambda module, batch: loss(),
        torch.autograd.backward,
        lambda: cast(None, sgd.step()),
        sgd.zero_grad,
    )
    pieces = technique.training_step(pieces, context)

    def step() -> None:
        pieces.zero_grad()
        pieces.backward(pieces.loss(module, torch.zeros(1)))
        pieces.step()

    return step, pieces


def test_a_gradient_that_float16_cannot_hold_survives_by_scaling(tmp_path: Path) -> None:
    import torch

    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    tiny = 2.0**-26  # the smallest of float16 is 2^-24
    through_half: Callable[[], torch.Tensor] = lambda: module.weight.half().float().sum() * tiny  # noqa: E731
    torch.autograd.backward(through_half())
    assert cast(Any, module.weight.grad).item() == 0
    step, _ = _training(AutocastFp16(), module, through_half, tmp_path)
    step()
    assert cast(Any, module.weight.grad).item() == tiny
    assert module.weight.item() == -tiny


def test_a_step_whose_scaled_gradients_overflow_is_left_out_the_scale_halved_and_that_told(tmp_path: Path) -> None:
    import torch

    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    steep = 2.0**120  # times 2^16 it is no fp32 any more, times 2^7 it is
    technique = AutocastFp16()
    step, _ = _training(technique, module, lambda: module.weight.sum() * steep, tmp_path)
    weights = []
    for _ in range(11):
        step()
        weights.append(module.weight.item())
    assert weights[:9] == [0.0] * 9
    assert weights[9:] == [-steep, -2 * steep]
    remark = technique.remark(module, _context(tmp_path))
    assert remark == "left out 9 of the first 11 training steps: the scaled gradients overflowed"


def test_scaling_says_nothing_where_no_step_was_left_out(tmp_path: Path) -> None:
    import torch

    module, technique = torch.nn.Linear(1, 1), AutocastFp16()
    assert technique.remark(module, _context(tmp_path)) is None
    step, _ = _training(technique, module, lambda: module.weight.sum(), tmp_path)
    step()
    assert technique.remark(module, _context(tmp_path)) is None


def test_scaling_steps_the_optimizer_that_a_later_member_brings(tmp_path: Path) -> None:
    import torch

    module, stepped = torch.nn.Linear(1, 1, bias=False), []
    step, pieces = _training(AutocastFp16(), module, lambda: module.weight.sum(), tmp_path)
    technique = AutocastFp16()
    technique.optimizer(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), module, _context(tmp_path))
    own = dataclasses.replace(pieces, backward=torch.autograd.backward, step=lambda: stepped.append(1))
    scaled = technique.training_step(own, _context(tmp_path))
    scaled.backward(module.weight.sum())
    assert cast(Any, module.weight.grad).item() == 65_536
    scaled.step()
    assert (stepped, cast(Any, module.weight.grad).item()) == ([1], 1)
    del step


def test_nothing_of_a_rehearsed_training_is_kept_by_the_technique_that_scales(tmp_path: Path) -> None:
    import gc
    import weakref

    import torch

    technique = AutocastFp16()

    def rehearse() -> weakref.ref[torch.Tensor]:
        module = torch.nn.Linear(1, 1)
        step, _ = _training(technique, module, lambda: module.weight.sum(), tmp_path)
        step()
        return weakref.ref(module.weight)

    weight = rehearse()
    gc.collect()
    assert weight() is None


def test_gradients_of_float16_weights_are_refused_by_scaling(tmp_path: Path) -> None:
    import torch

    module = torch.nn.Linear(1, 1).half()
    with pytest.raises(Unsuitable, match="gradients of float16 weights cannot be scaled back"):
        AutocastFp16().optimizer(torch.optim.SGD(module.parameters()), module, _context(tmp_path))


def test_training_in_bare_float16_diverges_and_is_a_record_with_all_its_figures(records: dict[str, Record]) -> None:
    record = records["trained-tiny/fp16/finetune/cpu"]
    assert record.status == "diverged"
    assert record.message == "the training loss became nan in step 2"
    for name in ("bits_per_byte", "kl_nats", "top1_agreement_percent"):
        assert record.metrics[name] is None
    assert record.reasons["bits_per_byte"] == record.reasons["final_loss_nats"] == "it is not finite"
    for name in ("peak_live_bytes", "optimizer_state_bytes", "step_median_s"):
        assert _figure(record, name) > 0


def test_autocast_float16_with_scaling_trains_as_well_as_fp32(records: dict[str, Record]) -> None:
    plain, scaled = (records[f"trained-tiny/{name}/finetune/cpu"] for name in ("none", "autocast-fp16"))
    assert (scaled.status, scaled.remarks) == ("ok", ())
    assert _figure(scaled, "final_loss_nats") == pytest.approx(_figure(plain, "final_loss_nats"), abs=0.002)
    assert abs(_figure(scaled, "lost_bits_per_byte")) < 0.002
    # Training moved the model by far more than that, so that the agreement means something.
    untouched = records["trained-tiny/none/answer/cpu"]
    assert abs(_figure(plain, "bits_per_byte") - _figure(untouched, "bits_per_byte")) > 0.01


def test_autocast_keeps_fp32_weights_and_states_and_activations_in_half(records: dict[str, Record]) -> None:
    plain = records["trained-tiny/none/finetune/cpu"]
    for name in ("autocast-bf16", "autocast-fp16"):
        record = records[f"trained-tiny/{name}/finetune/cpu"]
        for same in ("weights_bytes", "optimizer_state_bytes"):
            assert record.metrics[same] == plain.metrics[same]
        assert 0.5 < _figure(record, "activations_bytes") / _figure(plain, "activations_bytes") < 0.9


def test_autocast_leaves_the_keys_of_a_llamas_cache_in_fp32(records: dict[str, Record]) -> None:
    whole = 2 * 2 * 64 * 65 * 4  # keys and values, layers, width, tokens, bytes
    assert records["trained-tiny/none/answer/cpu"].metrics["cache_bytes"] == whole
    # Keys are rotated in fp32; values are kept as keys are before transformers 5.24, and as they come from there on.
    autocast = records["trained-tiny/autocast-bf16/answer/cpu"].metrics["cache_bytes"]
    assert autocast in (whole, whole * 3 // 4)


def test_scaling_over_float16_weights_is_skipped_with_the_reason(records: dict[str, Record]) -> None:
    record = records["trained-tiny/fp16+autocast-fp16/finetune/cpu"]
    assert record.status == "skipped"
    assert record.message == "gradients of float16 weights cannot be scaled back: scaling needs weights in fp32 or bf16"
