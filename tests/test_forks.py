"""Forks of a worker: threads do not survive them, and nothing waits for those that did not."""

from __future__ import annotations

import contextlib
from pathlib import Path

import membench

_MODEL = """\
import numpy
import torch
from torch import nn


class Positions(nn.Module):
    \"\"\"Computes a table when it is made, from an array: on the CPU, wherever the rest of it is made.\"\"\"

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(256, 64), nn.Linear(64, 64), nn.Linear(64, 256)
        angles = torch.from_numpy(numpy.arange(4096 * 64, dtype=numpy.float32).reshape(4096, 64))
        self.register_buffer("positions", torch.sin(angles))

    def forward(self, ids):
        return self.head(self.mix(self.embed(ids) + self.positions[: ids.shape[-1]]))
"""

_SUITE = """\
[suite]
name = "forks"
[matrix]
model = ["own"]
technique = ["none", "round-to-nearest"]
workload = ["forward"]
[model.own]
use = "factory"
function = "model:Positions"
[settings]
threads = 2
measured_steps = 1
timeout_s = 60
"""


def test_a_model_that_starts_threads_when_it_is_made_is_measured(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(_MODEL)
    (tmp_path / "suite.toml").write_text(_SUITE)
    with contextlib.chdir(tmp_path):
        run = membench.run(membench.load_suite("suite.toml"))
    assert [record.status for record in run.records] == ["ok", "ok"], [record.message for record in run.records]
