"""Mixtures of experts whose weights are stacked: really quantized, or left with a remark that says so."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from membench.plugins import Context, Technique, Unsuitable, registry
from membench.testing.tiny import Tiny
from membench.worker.weights import weight_bytes

if TYPE_CHECKING:
    import torch

_SIZES = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "num_local_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip
_FAMILIES = ["Mixtral", "GptOss"]
"""In the second experts are stacked as (inputs, outputs), gates and values take turns, and there are biases."""


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers.models.auto.modeling_auto  # noqa: F401

        yield


def _context() -> Context:
    return Context("cpu", 0, Tiny(), lambda name: contextlib.nullcontext(), {}, Path())


def _technique(name: str, **options: Any) -> Technique:
    return cast(Technique, registry.create("technique", name, options))


def _built(family: str, dtype: str = "float32", **sizes: int) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**_SIZES, **sizes})
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.to(getattr(torch, dtype))


def _logits(module: Any) -> torch.Tensor:
    import torch

    with torch.no_grad():
        return cast("torch.Tensor", module(torch.arange(40).view(2, 20)).logits)


def _rounded(matrix: torch.Tensor, bits: int, granularity: str, group_size: int | None) -> torch.Tensor:
    """What a matrix (outputs, inputs) is after rounding to the nearest of its integers, times their scales."""
    blocks = matrix if granularity != "group" else matrix.reshape(-1, cast(int, group_size))
    most = 2 ** (bits - 1) - 1
    largest = blocks.abs().amax() if granularity == "tensor" else blocks.abs().amax(1, keepdim=True)
    scale = largest / most
    rounded: torch.Tensor = (blocks / scale).round().clamp(-most, most) * scale
    return rounded.view(matrix.shape)


def test_qlora_says_with_its_own_remark_that_stacked_experts_stay_whole() -> None:
    technique = _technique("qlora", block_size=32, targets=["q_proj", "qproj"])
    module = technique.apply(
        _built("Mixtral", hidden_size=64, num_attention_heads=8, num_key_value_heads=4), _context()
    )
    remark = technique.remark(module, _context())
    assert remark is not None
    own, _, stacked = remark.partition("; ")
    assert own == "no layer is named qproj: there are no adapters for it"
    assert stacked.startswith("left 2 MixtralExperts as they are, whose weights are stacked in one tensor: ")


@pytest.mark.parametrize("family", _FAMILIES)
@pytest.mark.parametrize(
    "options",
    [{"bits": 8}, {"bits": 4, "granularity": "tensor"}, {"bits": 5, "granularity": "group", "group_size": 8}],
)
def test_a_mixture_of_packed_experts_computes_with_each_experts_rounded_weights(
    family: str, options: dict[str, Any]
) -> None:
    import torch

    module, by_hand = _built(family), _built(family)
    granularity, group_size = options.get("granularity", "channel"), options.get("group_size")
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            if parameter.ndim == 3:
                for expert in parameter:
                    matrix = expert.t() if family == "GptOss" else expert
                    rounded = _rounded(matrix.contiguous(), options["bits"], granularity, group_size)
                    expert.copy_(rounded.t() if family == "GptOss" else rounded)
            elif name.endswith("proj.weight"):
                parameter.copy_(_rounded(parameter, options["bits"], granularity, group_size))
    member = _technique("round-to-nearest", **options)
    member.apply(module, _context())
    torch.testing.assert_close(_logits(module), _logits(by_hand), rtol=1e-5, atol=1e-5)
    assert member.remark(module, _context()) is None


@pytest.mark.parametrize("family", _FAMILIES)
@pytest.mark.parametrize(("dtype", "scale_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_packed_experts_take_their_bits_and_a_scale_a_row(family: str, dtype: str, scale_bytes: int) -> None:
    module = _built(family, dtype)
    _technique("round-to-nearest", bits=4).apply(module, _context())
    experts = [child for child in module.modules() if type(child).__name__ == f"{family}Experts"]
    up, down = 4 * 80 * (48 // 2 + scale_bytes), 4 * 48 * (40 // 2 + scale_bytes)
    biases = 4 * (80 + 48) * scale_bytes if family == "GptOss" else 0
    assert [weight_bytes(each) for each in experts] == [up + down + biases] * 2


def test_a_group_that_does_not_divide_an_experts_columns_is_unsuitable() -> None:
    with pytest.raises(Unsuitable, match=r"group_size = 16 does not divide the 40 columns of '.*experts\.down_proj'"):
        _technique("round-to-nearest", granularity="group", group_size=16).apply(_built("Mixtral"), _context())


@pytest.mark.parametrize("name", ["int8-weight-only", "nf4", "magnitude-prune"])
def test_experts_that_are_left_alone_are_named_with_their_share_of_the_bytes(name: str) -> None:
    module = _built("Mixtral")
    member = _technique(name)
    member.apply(module, _context())
    size = 2 * 4 * 4 * (80 * 48 + 48 * 40)
    share = f"{size / weight_bytes(module):.0%}"
    expected = (
        f"left 2 MixtralExperts as they are, whose weights are stacked in one tensor: {size / 1024:.1f} KiB, {share}"
    )
    assert str(member.remark(module, _context())).startswith(expected)


def test_a_stack_that_a_module_uses_in_a_way_of_its_own_is_left_and_named() -> None:
    import torch
    from torch import nn

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 32, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bi,eoi->bo", x, self.weight)

    module = nn.Sequential(nn.Linear(32, 32), Experts())
    member = _technique("round-to-nearest")
    member.apply(module, _context())
    assert isinstance(module[1].weight, nn.Parameter)
    assert "left 1 Experts as they are, whose weights are stacked in one tensor: 16.00 KiB, " in str(
        member.remark(module, _context())
    )
    assert _technique("round-to-nearest").remark(nn.Sequential(nn.Conv1d(4, 4, 3)), _context()) is None
