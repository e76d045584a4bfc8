"""The encoding of messages, requests, orders and devices: round trips, and errors for invalid input."""

from __future__ import annotations

import json
from typing import Any

import pytest

from membench.host.device import Device
from membench.protocol import forking, messages, requests
from membench.protocol.case import Plugin, PluginFile
from membench.protocol.readings import (
    Baseline,
    GpuReading,
    ModulesReading,
    PartReading,
    PhaseReading,
    QualityReading,
)  # fmt: skip

_PHASE = PhaseReading(
    name="run", allocator="pinned", duration_s=1.5, steps=3, peak_live_bytes=7, held_live_bytes=-1,
    parts={"forward": PartReading(durations_s=[0.5, 1.0], peak_live_bytes=6)},
)  # fmt: skip
_RESULT = messages.Result(
    pinned=True, durations_s=[0.1], losses_nats=[None, 2.5], weights_bytes=4, remarks=["a"], notes=[],
    modules_bytes=[ModulesReading("h.*", 2, 8)], breakdown_bytes={"forward": {"other": -3}},
    slept_s=[0.05], communicated_bytes={"all_reduce": 8},
    quality=QualityReading(nats=[1.0, None], tokens=[4, 4], bytes=[16, None]),
    facts={"data_bytes": messages.Fact(3, "files"), "open_s": messages.Fact(0.5, "clock")},
    custom_figures={"own.x.lower": messages.CustomFigure(None, "r")},
)  # fmt: skip


@pytest.mark.parametrize(
    "message",
    [
        messages.PhaseBegins("load"), messages.PhaseEnds(_PHASE), messages.MarkEntered("train"),
        messages.MarkLeft("train", "ValueError"), messages.BaselineTaken(Baseline(5, 6)),
        messages.GpuFound(GpuReading(uuid="u", capability=[9, 0])), messages.ResultSoFar(_RESULT),
        messages.EndedBadly("failed", "why", None), messages.Done(), messages.Progress(1, 2, "training"),
    ],
    ids=lambda message: message.event,
)  # fmt: skip
def test_a_message_survives_a_round_trip(message: messages.Message) -> None:
    line = messages.encode(message)
    assert line.count(b"\n") == 1
    assert messages.decode(line) == message


@pytest.mark.parametrize(
    "line",
    [
        b"", b"no JSON", b"[]", b"3", b'{"event": "unknown"}', b'{"event": []}', b'{"phase": "run"}',
        b'{"event": "begin", "phase": 3}', b'{"event": "end", "reading": {"name": "run"}}',
        b'{"event": "end", "reading": {"name": "run", "allocator": "pinned", "peak_live_bytes": "7"}}',
        b'{"event": "end", "reading": {"name": "run", "allocator": "pinned", "held_live_bytes": 1e300}}',
        b'{"event": "result", "result": {"pinned": 1}}', b'{"event": "begin", "phase": "run"', b"\xff\x00",
        b'{"event": "result", "result": {"pinned": true, "durations_s": [NaN]}}', b"[" * 100_000,
    ],
)  # fmt: skip
def test_an_invalid_message_is_an_error_of_one_line(line: bytes) -> None:
    with pytest.raises(messages.BrokenMessage) as caught:
        messages.decode(line)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "work",
    [
        requests.PrepareModel(Plugin("m", {"size": "60m"})),
        requests.MeasureFunction("pickled", "raised", requests.Steps(1, 5)),
        requests.MeasureCase(
            Plugin("m", {"only": ["a", None], "deep": {"x": 1.5}}, PluginFile("p.py", "/p.py", "0" * 64)),
            [Plugin("a"), Plugin("b")], ["a", "b"], Plugin("w"), 3, requests.Steps(1, 5),
            requests.ReferenceLogits("kept.npy", True), {"own.x.lower": Plugin("x")}, requests.Checkouts("a", "b"),
        ),
    ],
    ids=lambda work: work.what,
)  # fmt: skip
def test_a_request_survives_a_round_trip(work: Any) -> None:
    request = requests.Request(work, requests.Rank("cuda:1", 4, 1, 2), "scratch")
    assert requests.decode_json(json.dumps(requests.encode(request)).encode()) == request


def test_orders_and_answers_of_the_fork_server_survive_a_round_trip() -> None:
    for order in (forking.StartWorker({"a": 1}, 0, "fork"), forking.StartProgram(["true"], 0, 0.5), forking.Kill()):
        assert forking.decode_order(forking.encode_order(order)) == order
    ended = forking.WorkerEnded(7, 9, 1.0, 2, 3, True, ["sleep"], ["sh (process 8)"])
    for answer in (forking.Importing("torch"), forking.Ready(), forking.Started(7, 0.5), ended):
        assert forking.decode_answer(forking.encode_answer(answer)) == answer


@pytest.mark.parametrize(
    ("text", "kind", "index", "count"),
    [("cpu", "cpu", None, 1), ("cuda", "cuda", None, 1), ("cuda:12", "cuda", 12, 1), ("8xcuda", "cuda", None, 8)],
)
def test_a_device_is_parsed_into_kind_index_and_count(text: str, kind: str, index: int | None, count: int) -> None:
    device = Device.parse(text)
    assert (device.kind, device.index, device.count, str(device)) == (kind, index, count, text)
    assert len(device.ranks) == count


def test_each_rank_of_a_job_on_several_gpus_has_its_own() -> None:
    assert list(map(str, Device.parse("2xcuda").ranks)) == ["cuda:0", "cuda:1"]
    assert list(map(str, Device.parse("2xcpu").ranks)) == ["cpu", "cpu"]
    assert list(map(str, Device.parse("cuda").ranks)) == ["cuda"]


@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:01", "cpu:0", "0xcpu", "2xcuda:1", "2 x cpu", "cuda:1000"])
def test_an_invalid_device_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write cpu, cuda, cuda:0 or 2xcpu"):
        Device.parse(text)
