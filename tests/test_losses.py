"""Cross entropy in chunks and fused with the output head: the plain loss and its gradients, without whole logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import membench
from membench import plugins
from membench.builtin.models.transformer import Gpt2, Llama, Qwen
from membench.builtin.techniques import cross_entropy
from membench.plugins import Shape, registry
from membench.records.record import Record
from tests.training import context, train

if TYPE_CHECKING:
    import torch
    from torch import nn

_SHAPE = Shape(64, 2, 4, 2, 128, 300, 64, True)
_MODELS = {
    "llama, tied": Llama.of_shape(_SHAPE),
    "llama": Llama.of_shape(_SHAPE._replace(tied=False)),
    "qwen, tied": Qwen.of_shape(_SHAPE),
    "gpt2, tied": Gpt2.of_shape(_SHAPE._replace(key_value_heads=4)),
}
_CHUNK = 10  # does not divide the 124 or 128 tokens of a step
_BOTH = ("chunked-cross-entropy", "fused-linear-cross-entropy")


def _technique(name: str, **options: Any) -> Any:
    return registry.create("technique", name, options)


@pytest.mark.parametrize("name", _BOTH)
@pytest.mark.parametrize("model", _MODELS)
def test_it_trains_as_the_plain_loss_does(model: str, name: str) -> None:
    plain = train(_MODELS[model])
    chunked = train(_MODELS[model], [_technique(name, chunk_tokens=_CHUNK)])
    assert chunked.losses == pytest.approx(plain.losses, abs=2e-6)
    assert chunked.largest_difference(plain) < 1e-5
    assert plain.largest_difference(train(_MODELS[model], learning_rate=0.505)) > 1e-4  # what 1% of a gradient is


def test_it_trains_alike_under_micro_batches_and_checkpointing() -> None:
    model = _MODELS["llama, tied"]
    names = ("checkpointing", "fused-linear-cross-entropy", "accumulate-2")
    for order in (names, names[::-1]):
        stacked = train(model, [_technique(name) for name in order])
        assert stacked.largest_difference(train(model)) < 1e-5


@pytest.mark.parametrize("head", ["frozen", "trained alone"])
def test_a_frozen_part_gets_no_gradient_and_the_other_its_own(head: str) -> None:
    model = _MODELS["llama"]
    names = [name for name, _ in model.build(context(model)).named_parameters()]
    frozen = [name for name in names if (name == "lm_head.weight") == (head == "frozen")]
    plain = train(model, frozen=frozen)
    fused = train(model, [_technique("fused-linear-cross-entropy", chunk_tokens=_CHUNK)], frozen=frozen)
    assert fused.largest_difference(plain) < 1e-5
    trained = {name for name, parameter in fused.module.named_parameters() if parameter.grad is not None}
    assert trained == set(names) - set(frozen)


def _tensors(dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states (37, 16), weight (53, 16) and bias (53,); targets (37,)."""
    import torch

    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(37, 16), torch.randn(53, 16) * 0.3, torch.randn(53)
    wanted = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias)]
    return wanted, torch.randint(0, 53, (37,))


def _fused(inputs: list[torch.Tensor], targets: torch.Tensor, chunk_tokens: int = _CHUNK) -> torch.Tensor:
    hidden, weight, bias = inputs
    return cross_entropy.fused(hidden, weight, bias, targets, chunk_tokens)


@pytest.mark.parametrize("with_bias", [True, False])
def test_fused_gradients_are_the_exact_ones(with_bias: bool) -> None:
    import torch

    (hidden, weight, bias), targets = _tensors(torch.float64)
    inputs = [hidden, weight, bias] if with_bias else [hidden, weight]
    logits = torch.nn.functional.linear(hidden, weight, bias if with_bias else None)
    plain = torch.nn.functional.cross_entropy(logits, targets)
    fused = cross_entropy.fused(hidden, weight, bias if with_bias else None, targets, _CHUNK)
    assert fused.item() == pytest.approx(plain.item(), rel=1e-13)
    for own, exact in zip(torch.autograd.grad(fused * 3, inputs), torch.autograd.grad(plain * 3, inputs), strict=True):
        assert torch.allclose(own, exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_fused_gradients_are_as_close_as_the_plain_loss_gives_them(dtype: str) -> None:
    import torch

    inputs, targets = _tensors(getattr(torch, dtype))
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = torch.autograd.grad(
        torch.nn.functional.cross_entropy(torch.nn.functional.linear(*exact_inputs), targets), exact_inputs
    )
    plain = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*inputs).float(), targets)
    fused = _fused(inputs, targets, 4)
    for own, theirs, right in zip(
        torch.autograd.grad(fused, inputs), torch.autograd.grad(plain, inputs), exact, strict=True
    ):
        assert own.dtype == theirs.dtype
        assert (own - right).norm() < 1.5 * (theirs - right).norm()


def test_small_gradients_survive_float16_where_the_loss_is_scaled() -> None:
    import torch

    # Hidden states of zero make every token's probability 1/V; divided by N that is below what float16 can hold.
    count, vocabulary, scale = 2**15, 2**10, 2.0**16
    torch.manual_seed(0)
    hidden = torch.zeros(count, 4, dtype=torch.float16, requires_grad=True)
    weight = (1 + torch.randn(vocabulary, 4) / 8).half()
    targets = torch.randint(0, vocabulary, (count,))
    expected = (weight.double().mean(0) - weight.double()[targets]) * scale / count
    (own,) = torch.autograd.grad(cross_entropy.fused(hidden, weight, None, targets, 256) * scale, hidden)
    assert (own - expected).norm() < 0.01 * expected.norm()


def test_under_autocast_the_products_are_in_its_type() -> None:
    import torch

    inputs, targets = _tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        plain = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*inputs).float(), targets)
        fused = _fused(inputs, targets)
    assert fused.item() == pytest.approx(plain.item(), abs=1e-5)
    assert fused.item() != pytest.approx(_fused(inputs, targets).item(), abs=1e-6)
    for own, theirs in zip(torch.autograd.grad(fused, inputs), torch.autograd.grad(plain, inputs), strict=True):
        assert own.dtype == torch.float32
        assert (own - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_chunked_gradients_are_the_plain_ones_and_tokens_without_target_have_none(dtype: str) -> None:
    import torch

    torch.manual_seed(0)
    logits = (5 * torch.randn(37, 53)).to(getattr(torch, dtype)).requires_grad_()
    targets = torch.randint(0, 53, (37,))
    targets[::5] = cross_entropy.NOTHING
    precise = torch.promote_types(logits.dtype, torch.float32)
    plain = torch.nn.functional.cross_entropy(logits.to(precise), targets)
    chunked = cross_entropy.chunked(logits, targets, _CHUNK)
    assert chunked.item() == pytest.approx(plain.item(), rel=1e-6)
    (own,), (theirs,) = torch.autograd.grad(chunked * 3, logits), torch.autograd.grad(plain * 3, logits)
    assert own.dtype == logits.dtype
    assert torch.allclose(own, theirs, rtol=torch.finfo(logits.dtype).eps, atol=1e-7)
    assert not own[::5].any()


def test_fused_gradients_can_be_asked_for_once() -> None:
    import torch

    inputs, targets = _tensors(torch.float32)
    loss = _fused(inputs, targets)
    torch.autograd.grad(loss, inputs, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, inputs)


def _largest_made(loss: Callable[[], torch.Tensor], wanted: torch.Tensor) -> dict[torch.dtype, int]:
    """The most elements that any operation brings forth, by type, in forward and backward pass."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    made: dict[torch.dtype, int] = {}

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            found = operation(*arguments, **(options or {}))
            for tensor in tree_leaves(found):
                if isinstance(tensor, torch.Tensor):
                    made[tensor.dtype] = max(tensor.numel(), made.get(tensor.dtype, 0))
            return found

    with Watch():  # type: ignore[no-untyped-call]
        torch.autograd.grad(loss(), wanted)
    return made


def test_chunked_logits_are_never_whole_in_fp32() -> None:
    import torch

    logits = torch.randn(64, 100).bfloat16().requires_grad_()
    targets = torch.randint(0, 100, (64,))
    made = _largest_made(lambda: cross_entropy.chunked(logits, targets, 8), logits)
    assert made[torch.float32] == 8 * 100
    assert made[torch.bfloat16] == 64 * 100  # their gradient
    plain = _largest_made(lambda: torch.nn.functional.cross_entropy(logits.float(), targets), logits)
    assert plain[torch.float32] == 64 * 100


def test_fused_logits_are_never_whole_in_any_type() -> None:
    import torch

    hidden, weight = torch.randn(64, 5).bfloat16().requires_grad_(), torch.randn(100, 5).bfloat16().requires_grad_()
    targets = torch.randint(0, 100, (64,))
    made = _largest_made(lambda: cross_entropy.fused(hidden, weight, None, targets, 8), hidden)
    assert made[torch.float32] == made[torch.bfloat16] == 8 * 100


def _capped(module: nn.Module) -> nn.Module:
    """The module with its logits bent to ±30, as Gemma 2 bends them."""
    module.register_forward_hook(lambda layer, given, output: _cap(output))
    return module


def _cap(output: Any) -> Any:
    output.logits = 30 * (output.logits / 30).tanh()
    return output


def _with_head_in_a_class_of_its_own(module: nn.Module) -> nn.Module:
    import torch

    class Quantized(torch.nn.Linear):
        pass

    module.lm_head = Quantized(64, 300, bias=False)
    return module


def _with_a_hook_on_its_gradients(module: nn.Module) -> nn.Module:
    """Seen by no logit, and lost where the head is not called."""
    module.lm_head.register_full_backward_hook(lambda layer, gradients, of_output: None)  # type: ignore[union-attr]
    return module


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_with_a_hook_on_its_gradients, "the output head cannot be fused with the loss: .* it has hooks"),
        (_capped, "LlamaForCausalLM does more to its logits than its output head"),
        (
            _with_head_in_a_class_of_its_own,
            "the output head is a Quantized of tests: only a plain linear layer can be fused",
        ),
        (lambda module: module.model, "the model does not say what its decoder and its output head are"),
    ],
)
def test_a_model_that_cannot_be_taken_apart_is_not_served(change: Any, reason: str) -> None:
    model = _MODELS["llama"]
    with pytest.raises(plugins.Unsuitable, match=reason):
        train(model, [_technique("fused-linear-cross-entropy")], module=change(model.build(context(model))))


def test_an_output_head_that_peft_has_adapted_is_said_to_be_pefts() -> None:
    adapters = _technique("lora", targets=["lm_head"])
    with pytest.raises(plugins.Unsuitable, match="the output head is a Linear of peft: only a plain linear layer can"):
        train(_MODELS["llama"], [adapters, _technique("fused-linear-cross-entropy")])


@pytest.mark.parametrize("name", _BOTH)
def test_a_loss_that_would_replace_another_or_what_offloads_it_is_refused(name: str) -> None:
    def reason(*before: str) -> str | None:
        workload = registry.create("workload", "train", {})
        members = tuple(_technique(member) for member in before)
        found: str | None = _technique(name).refuse(plugins.Setting(_MODELS["llama"], workload, "cuda", members, ()))
        return found

    for other in _BOTH:
        assert reason("bf16", other) == "a training step has one loss, and the stack names two"
    assert reason("offload-activations") == (
        "it would replace the loss whose activations 'offload-activations' moves: put that after the loss"
    )
    assert reason("bf16", "checkpointing", "accumulate-2") is None


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("losses")
    path = folder / "losses.toml"
    path.write_text(
        '[suite]\nname = "losses"\n[matrix]\nmodel = ["llama-15m"]\nworkload = ["steps"]\n'
        'technique = ["none", "fused"]\n[technique.fused]\nuse = "fused-linear-cross-entropy"\nchunk_tokens = 64\n'
        '[workload.steps]\nuse = "train"\nbatch_size = 2\nsequence_length = 256\n'
        "[settings]\nwarmup_steps = 1\nmeasured_steps = 1\nevaluate_s = 0\n"
    )
    found = membench.run(membench.load_suite(path), output=Path(folder)).records
    return {record.technique: record for record in found}


_LOGITS = 4 * 2 * 255 * 32000  # bytes in fp32: 65 MB
_HEAD = 4 * 32000 * 288


def _beyond_what_is_kept(record: Record, part: str) -> float:
    """The live peak of a part above weights, optimizer states and what autograd kept from forward to backward."""
    figures = record.metrics
    kept = [figures[name] or 0 for name in ("weights_bytes", "optimizer_state_bytes", "activations_bytes")]
    return (figures[f"{part}_peak_live_bytes"] or 0) - sum(kept)


def test_a_step_with_the_fused_loss_has_room_for_no_whole_logits(records: dict[str, Record]) -> None:
    plain, fused = records["none"], records["fused"]
    # Logits and the copy that cutting off the last token takes, beside the log-softmax that is kept.
    assert _beyond_what_is_kept(plain, "forward") > 1.9 * _LOGITS
    assert _beyond_what_is_kept(fused, "forward") < 0.3 * _LOGITS
    kept = [record.metrics["activations_bytes"] or 0 for record in (plain, fused)]
    # The gradient of the head waits in place of the log-softmax, that of the head's input in place of the input.
    assert kept[0] - kept[1] == pytest.approx(_LOGITS - _HEAD, rel=0.01)
