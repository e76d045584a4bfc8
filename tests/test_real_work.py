"""That what is measured is real work, under the conditions that the figures are said to hold for."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import membench
from membench.builtin.models.transformer import Llama
from membench.builtin.workloads.train import Train
from membench.data import corpus
from membench.host import procfs
from membench.plugins import Context, Shape, Tokens, Unsuitable
from membench.protocol.case import Plugin
from membench.protocol.requests import MeasureCase, Rank, ReferenceLogits, Steps
from membench.records.record import Record
from membench.running.observer import Observer
from membench.running.timeline import Timeline
from membench.worker.assembly import Assembly

_SHAPE = Shape(width=32, layers=1, heads=2, key_value_heads=2, inner_width=64, vocabulary=300, longest=64, tied=True)


def _no_parts(name: str) -> contextlib.AbstractContextManager[None]:
    del name
    return contextlib.nullcontext()


def _tokens(model: str, scratch: Path) -> Tokens:
    """The text as a case of this model gets it."""
    asked = MeasureCase(
        Plugin(model), [Plugin("none")], ["none"], Plugin("forward"),
        seed=0, steps=Steps(1, 1), reference=ReferenceLogits("", is_written_here=False),
    )  # fmt: skip
    assembly = Assembly.of(asked, Rank("cpu", 1), scratch, _no_parts, contextlib.nullcontext)
    return assembly.tokens(assembly.model.skeleton())


def test_a_byte_model_reads_the_text_byte_by_byte(tmp_path: Path) -> None:
    tokens, text = _tokens("trained-tiny", tmp_path), corpus.split()[0]
    assert bytes(tokens(500).tolist()) == text[:500]
    assert bytes(tokens(500).tolist()) == text[500:1000]


def test_a_model_of_words_reads_words_as_they_recur(tmp_path: Path) -> None:
    tokens = _tokens("llama-15m", tmp_path)
    first, second = tokens(2000).tolist(), tokens(2000).tolist()
    assert first != second
    for ids in (first, second):
        assert 100 < len(set(ids)) < 1000  # words, neither all the same nor all different
        assert 0 <= min(ids) < max(ids) < 32000


def _run(folder: Path, seed: int, repeats: int) -> list[Record]:
    path = folder / f"seed-{seed}.toml"
    path.write_text(
        f'[suite]\nname = "seed-{seed}"\n[matrix]\nmodel = ["llama-15m"]\ntechnique = ["none"]\nworkload = ["brief"]\n'
        '[workload.brief]\nuse = "forward"\nsequence_length = 8\n'
        f"[settings]\nseed = {seed}\nrepeats = {repeats}\nmeasured_steps = 1\n"
    )
    return list(membench.run(membench.load_suite(path), output=folder).records)


def test_a_case_that_is_repeated_does_the_same_and_another_seed_does_other(tmp_path: Path) -> None:
    # Of random weights too, what they make of the held-out text is as good as a fingerprint.
    read = [record.processes[0].quality for record in (*_run(tmp_path, 0, 2), *_run(tmp_path, 1, 1))]
    first, again, other = (quality.nats for quality in read if quality is not None)
    assert first == pytest.approx(again, rel=1e-6)
    assert first[0] != pytest.approx(other[0], rel=1e-6)


def test_a_training_step_moves_every_weight_as_adamw_says(tmp_path: Path) -> None:
    import torch

    context = Context("cpu", 0, Llama.of_shape(_SHAPE), _no_parts, {}, tmp_path)
    module = context.model.build(context)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    rate, decay, epsilon = 1e-2, 1e-2, 1e-8
    workload = Train(batch_size=1, sequence_length=32, learning_rate=rate)
    step = workload.start(module, lambda count: torch.arange(count) % 300, (), context)
    loss = step()
    assert loss is not None
    assert 5 < loss.item() < 7  # log(300) is 5.7: as good as guessing
    for name, parameter in module.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        # The first step of AdamW: both moments are the gradient's own.
        expected = before[name] * (1 - rate * decay) - rate * gradient / (gradient.abs() + epsilon)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-6)
    assert step() != loss


@pytest.mark.parametrize(
    ("device", "count", "reason"),
    [
        ("cuda:9", 1, "there is no cuda:9 here: the last is cuda:0"),
        ("cuda:1", 1, "there is no cuda:1 here: the last is cuda:0"),
        ("cuda", 0, "no CUDA device here, or a torch build without CUDA"),
        ("cuda:1", 2, None),
        ("cuda", 1, None),
    ],
)
def test_a_gpu_that_is_not_there_is_no_failure_but_unsuitable(
    monkeypatch: pytest.MonkeyPatch, device: str, count: int, reason: str | None
) -> None:
    import torch

    from membench.worker.device import refuse_missing

    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if reason is None:
        refuse_missing(device)
        return
    with pytest.raises(Unsuitable) as raised:
        refuse_missing(device)
    assert str(raised.value) == reason


_ALLOCATING = """\
import ctypes, platform, sys
from membench.worker import allocator

if platform.libc_ver()[0] != "glibc":
    sys.exit(77)

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keep")]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.mallinfo2.restype = Info

def has_mapping_of_its_own(size):
    before = libc.mallinfo2().hblks
    block = libc.malloc(size)
    after = libc.mallinfo2().hblks
    libc.free(block)
    return after > before

sizes = (2**20, 16 * 2**20, 64 * 2**20)
for change in (allocator.pin, allocator.unpin, allocator.pin):
    change()
    allocator.settle()
    print(*map(has_mapping_of_its_own, sizes))
"""


def test_pinned_blocks_are_mapped_alone_and_unpinned_ones_come_from_the_heap() -> None:
    ran = subprocess.run([sys.executable, "-c", _ALLOCATING], capture_output=True, text=True)
    if ran.returncode == 77:
        pytest.skip("the C library is not glibc")
    assert ran.stdout.splitlines() == ["True True True", "False False True", "True True True"], ran.stderr


class _Scripted(procfs.Watch):
    """A process that holds what it is told to."""

    def __init__(self, resident_bytes: Callable[[int], int]) -> None:
        self._resident_bytes, self._looks = resident_bytes, 0

    def resident(self) -> tuple[int, int]:
        self._looks += 1
        return self._resident_bytes(self._looks), self._looks

    def descendants(self) -> list[int]:
        return []

    def close(self) -> None:
        pass


@pytest.mark.parametrize("looks", [100, 1999, 2000, 2001, 5001, 20_000])
def test_a_long_case_loses_resolution_and_never_its_peak(looks: int) -> None:
    peak_at = looks // 3
    kept = Timeline()
    observer = Observer(os.getpid(), None, {}, kept)
    observer.close()
    observer._watch = _Scripted(lambda look: 10**9 if look == peak_at else look)
    for _ in range(looks):
        observer.sample()
    timeline = kept.columns()
    assert min(looks, 1000) <= len(timeline["at_s"]) <= 2000
    assert {len(column) for column in timeline.values()} == {len(timeline["at_s"])}
    assert max(value for value in timeline["rss_bytes"] if value is not None) == 10**9
    assert timeline["anonymous_bytes"][-1] == looks
    assert timeline["at_s"] == sorted(at for at in timeline["at_s"] if at is not None)
