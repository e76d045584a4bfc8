"""Checkpoints that ranks write together: each weight once, under a name that a model alone has for it."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.on_ranks import on_ranks

_WIDTH, _VOCABULARY = 64, 512


class _Tied(nn.Module):
    """An embedding whose weight is the head's, and a layer between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(_VOCABULARY, _WIDTH)
        self.between = nn.Linear(_WIDTH, _WIDTH, bias=False)
        self.head = nn.Linear(_WIDTH, _VOCABULARY, bias=False)
        self.head.weight = self.embed.weight


def _write(how: str, kind: str, folder: Path) -> int:
    """Write a checkpoint as a technique would have the module; return the bytes of all files with weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    from membench.builtin.techniques.parallel.local_shards import make_shards_plain
    from membench.worker import ranks_checkpoint

    module, mesh = _Tied(), init_device_mesh("cpu", (2,))
    if how == "fsdp":
        fully_shard(module, mesh=mesh)
    else:
        parallelize_module(module, mesh, {"between": ColwiseParallel()})
        make_shards_plain(module)
    {"gathered": ranks_checkpoint.gathered, "sharded": ranks_checkpoint.sharded}[kind](module, folder)
    distributed.barrier()
    return sum(file.stat().st_size for file in folder.iterdir() if file.name != ".metadata")


@pytest.mark.parametrize("kind", ["gathered", "sharded"])
@pytest.mark.parametrize("how", ["fsdp", "local shards"])
def test_a_weight_that_layers_share_is_written_once(how: str, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    sizes = on_ranks(functools.partial(_write, how, kind, folder), tmp_path)
    weights_bytes = 4 * (_VOCABULARY * _WIDTH + _WIDTH * _WIDTH)
    assert sizes == pytest.approx([weights_bytes] * 2, abs=8192)
    if kind == "gathered":
        written = safetensors.torch.load_file(folder / "model.safetensors")
    else:
        dcp_to_torch_save(folder, tmp_path / "whole.pt")
        written = torch.load(tmp_path / "whole.pt")
    alone = _Tied()
    assert set(written) == {"embed.weight", "between.weight"}
    assert torch.equal(written["between.weight"], alone.between.weight)
    assert torch.equal(written["embed.weight"], alone.embed.weight)
