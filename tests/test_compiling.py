"""A compiled model gives what the plain one gives, is known to be compiled, and says so where it is not."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from membench import plugins
from membench.builtin.models.trained_tiny import TrainedTiny
from membench.builtin.techniques.compiling import Compile
from membench.plugins import registry
from tests.training import context

if TYPE_CHECKING:
    import torch
    from torch import nn

_SURROUNDINGS = context(TrainedTiny())
_NO_COMPILER = Compile().refuse(
    plugins.Setting(TrainedTiny(), registry.create("workload", "forward", {}), "cpu", (), ())
)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Kernels of the test's own: an empty cache, and nothing left of it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(_SURROUNDINGS.scratch / tmp_path.name))
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    shutil.rmtree(_SURROUNDINGS.scratch / tmp_path.name, ignore_errors=True)


def _layers(between: Any) -> nn.Module:
    import torch

    class Layers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return torch.sin(self.second(between(torch.cos(self.first(given)))))

    return Layers()


def _gradients(module: nn.Module) -> list[torch.Tensor]:
    import torch

    module.zero_grad()
    torch.manual_seed(1)
    module(torch.randn(4, 8)).square().sum().backward()
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def _stop(given: torch.Tensor) -> torch.Tensor:
    import torch

    torch._dynamo.graph_break()
    return given


@pytest.mark.skipif(_NO_COMPILER is not None, reason=str(_NO_COMPILER))
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("case", ["whole", "broken", "untraceable"])
def test_compiled_gradients_are_the_plain_ones_and_what_was_left_out_is_told(case: str) -> None:
    import torch

    module = _layers(_stop if case == "broken" else lambda given: given)
    plain = [gradient.clone() for gradient in _gradients(module)]
    if case == "untraceable":
        disable: Any = torch._dynamo.disable
        module.forward = disable(module.forward)
    compiled = Compile().apply(module, _SURROUNDINGS)
    for own, expected in zip(_gradients(compiled), plain, strict=True):
        assert torch.allclose(own, expected, rtol=1e-5, atol=1e-6)
    remark = Compile().remark(compiled, _SURROUNDINGS) or ""
    expected_remark = {
        "whole": "",
        "broken": "did not compile the whole model; places left out: 1: ",
        "untraceable": "compiled nothing, and the model ran as without it",
    }
    assert remark.startswith(expected_remark[case])
    assert bool(remark) is (case != "whole")


def test_no_compiler_is_the_reason_to_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    setting = plugins.Setting(TrainedTiny(), registry.create("workload", "forward", {}), "cpu", (), ())
    assert Compile().refuse(setting) == "torch.compile needs a C++ compiler, and no-such-compiler is not there"
