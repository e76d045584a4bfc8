"""The size on disk of modules that hold unusual tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from membench.builtin.models.factory import Factory
from membench.plugins import Context, Unsuitable, registry
from membench.worker import checkpoint

if TYPE_CHECKING:
    import torch
    from torch import nn

_KIB = 1024
_SLACK_BYTES = 6 * _KIB
"""Names and headers; a sparse matrix is three tensors."""


def _layer() -> nn.Linear:
    """64 KiB of weights."""
    from torch import nn

    return nn.Linear(128, 128, bias=False)


def _with_buffers(*buffers: torch.Tensor) -> nn.Module:
    layer = _layer()
    for number, buffer in enumerate(buffers):
        layer.register_buffer(f"buffer_{number}", buffer)
    return layer


def _plain() -> nn.Module:
    import torch

    return _with_buffers(torch.ones(16, 256))


def _tied() -> nn.Module:
    from torch import nn

    first, second = _layer(), _layer()
    second.weight = first.weight
    return nn.Sequential(first, second)


def _shared() -> nn.Module:
    return _layer().share_memory()


def _views() -> nn.Module:
    import torch

    whole = torch.ones(64, 256)
    return _with_buffers(whole[:10], whole[10:20])


def _overlapping() -> nn.Module:
    import torch

    whole = torch.ones(64, 256)
    return _with_buffers(whole[:20], whole[10:])


def _expanded() -> nn.Module:
    import torch

    return _with_buffers(torch.ones(1, 256).expand(100_000, 256))


def _compressed_rows() -> nn.Module:
    import torch

    return _with_buffers(torch.eye(256).to_sparse_csr())  # 256 values of 4 bytes, 257 + 256 indices of 8


def _coordinates() -> nn.Module:
    import torch

    return _with_buffers(torch.eye(256).to_sparse())  # 256 values of 4 bytes, 512 indices of 8


def _transposed() -> nn.Module:
    import torch

    return _with_buffers(torch.ones(16, 256).t())


def _complex() -> nn.Module:
    import torch

    return _with_buffers(torch.ones(16, 128, dtype=torch.complex64))


def _extra_state() -> nn.Module:
    from torch import nn

    class Counting(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 7}

        def set_extra_state(self, state: dict[str, int]) -> None: ...

    return Counting(128, 128, bias=False)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize(
    ("make", "size_bytes", "library"),
    [
        (_plain, (64 + 16) * _KIB, "safetensors"),
        (_tied, 64 * _KIB, "safetensors"),
        (_shared, 64 * _KIB, "safetensors"),
        (_views, (64 + 64) * _KIB, "torch.save"),
        (_overlapping, (64 + 64) * _KIB, "torch.save"),
        (_expanded, (64 + 1) * _KIB, "torch.save"),
        (_compressed_rows, (64 + 1) * _KIB + 8 * (257 + 256), "torch.save"),
        (_coordinates, (64 + 1) * _KIB + 8 * 512, "torch.save"),
        (_transposed, (64 + 16) * _KIB, "torch.save"),
        (_complex, (64 + 16) * _KIB, "torch.save"),
        (_extra_state, 64 * _KIB, "torch.save"),
    ],
)
def test_a_checkpoint_takes_the_bytes_of_the_storages_that_it_keeps(
    make: Callable[[], nn.Module], size_bytes: int, library: str, tmp_path: Path
) -> None:
    found_bytes, found_library = checkpoint.save(make(), tmp_path)
    assert found_library == library
    assert found_bytes is not None
    assert size_bytes <= found_bytes <= size_bytes + _SLACK_BYTES
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_cannot_be_saved_has_no_size_and_says_why(tmp_path: Path) -> None:
    from torch import nn

    class Unsaved(nn.Linear):
        def get_extra_state(self) -> object:
            return lambda: None

    size_bytes, reason = checkpoint.save(Unsaved(128, 128), tmp_path)
    assert size_bytes is None
    assert reason.startswith("the checkpoint cannot be written: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("technique", ["meta-init", "mmap", "streamed"])
@pytest.mark.parametrize(("kind", "size_bytes"), [("views", 25 * 64 * 4), ("expanded", 64 * 4)])
def test_unusual_tensors_are_loaded_from_a_file_of_their_size(
    technique: str, kind: str, size_bytes: int, tmp_path: Path
) -> None:
    import torch

    model = Factory.model_validate({"function": f"tests.own_layers:{kind}"})
    context = Context("cpu", 0, model, lambda part: contextlib.nullcontext(), {}, tmp_path)
    loader: Any = registry.create("technique", technique, {})
    loader.prepare(lambda: model.build(context), context)
    plain = model.build(context)
    (path,) = tmp_path.iterdir()
    weights_bytes = sum(parameter.nbytes for parameter in plain.parameters())
    assert 0 <= path.stat().st_size - weights_bytes - size_bytes < _SLACK_BYTES
    loaded = loader.load(lambda: model.build(context), (), context)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_a_sparse_buffer_is_a_reason_not_to_write_a_loaders_file(tmp_path: Path) -> None:
    model = Factory.model_validate({"function": "tests.own_layers:sparse"})
    context = Context("cpu", 0, model, lambda part: contextlib.nullcontext(), {}, tmp_path)
    loader: Any = registry.create("technique", "meta-init", {})
    with pytest.raises(Unsuitable, match=r"'eye' is sparse .*, which the file of a loader cannot hold"):
        loader.prepare(lambda: model.build(context), context)
