"""What kernels take beside tensors, measured by running them in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

_PROBE = """
import json, torch
from membench.worker import allocator
from membench.worker.tracing import kernel_probe
from membench.worker.tracing.kernel_probe import Call
allocator.pin()
torch.set_num_threads(2)
kernel_probe.warm_up()
squares = [torch.zeros(size, size, dtype=torch.bfloat16) for size in (32, 64, 96, 160)]
calls = [Call.of(torch.ops.aten.mm.default, (square, square), {}) for square in squares]
print(json.dumps([kernel_probe.buffers_after(calls) for _ in range(2)]))
"""
_NOISE_BYTES = 2**17


def test_code_that_is_compiled_for_the_first_calls_is_no_buffer() -> None:
    """Where products in bf16 are compiled for their shapes, four of them leave some 2 MiB of code once."""
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=300, check=True)
    first, second = json.loads(done.stdout)
    assert abs(first - second) <= _NOISE_BYTES
