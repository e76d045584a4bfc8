"""What ``membench show --ranks`` prints: a table a case, a row a rank."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

from membench import cli
from membench.errors import MembenchError
from membench.records.encoding import as_json
from membench.records.record import Record
from membench.report import page, phase_table, rank_table

from .made_up import MIB, process, record, run

_HOSTILE = "\x1b[2J::error::forged|<script>"


def _rank(number: int, mib: int, part: str = "backward", **more: Any) -> Any:
    phases = [
        {"name": "run", "peak_live_bytes": mib * MIB, "held_live_bytes": 4 * MIB, "parts": {}},
        {"name": "time", "allocator": "default", "peak_footprint_bytes": 2 * mib * MIB, "bound": "at least"},
    ]
    held = {"weights": 4 * MIB, "gradients": 2 * MIB, "communication": MIB, "other": (mib - 7) * MIB}
    return process(rank=number, phases=phases, peak_part=part, breakdown_bytes={part: held},
                   durations_s=[1.0, 1.0], slept_s=[0.25, 0.25], **more)  # fmt: skip


def _on_two_ranks(part: str = "backward") -> Record:
    obtained = {"peak_live_bytes": {"bound": "about", "rank": 1}}
    made = record("ddp", peak_live_bytes=16 * MIB, obtained=obtained)
    return dataclasses.replace(made, processes=(_rank(0, 8, part), _rank(1, 16, part)))


def test_each_rank_has_a_row_of_what_it_needs_and_what_held_it() -> None:
    shown = rank_table.ranks_of_runs([run([record("none"), _on_two_ranks()])])
    assert shown == (
        "m/ddp/forward/cpu · ok\n"
        "\n"
        "rank    highest in    live peak    live held    weights    gradients    communication    footprint peak"
        "    waiting\n"
        "------  ------------  -----------  -----------  ---------  -----------  ---------------  ----------------"
        "  ---------\n"
        "0       backward      ≈8.000 MiB   4.000 MiB    4.000 MiB  2.000 MiB    1.000 MiB        ≥16.00 MiB"
        "        ≤25%\n"
        "1       backward      ≈16.00 MiB   4.000 MiB    4.000 MiB  2.000 MiB    1.000 MiB        ≥32.00 MiB"
        "        ≤25%"
    )


def test_flat_formats_have_every_column_in_bytes_and_say_what_is_not_known() -> None:
    made = run([_on_two_ranks()])
    first, second = json.loads(rank_table.ranks_of_runs([made], "json"))
    assert (first["case"], first["rank"], second["rank"]) == ("m/ddp/forward/cpu", 0, 1)
    assert (second["live_peak_bytes"], second["weights_bytes"], second["wait_percent"]) == (16 * MIB, 4 * MIB, 25.0)
    assert (second["optimizer_bytes"], second["footprint_peak_bound"]) == (None, "at least")
    rows = list(csv.DictReader(io.StringIO(rank_table.ranks_of_runs([made, made], "csv"))))
    assert [row["run"] for row in rows] == ["made-up-1"] * 4
    assert rows[1]["live_peak_bytes"] == str(16 * MIB)


@pytest.mark.parametrize("form", ["simple", "github", "csv", "json", "latex", "html", "plain"])
def test_a_name_of_a_record_steers_nothing(form: str) -> None:
    made = dataclasses.replace(_on_two_ranks(_HOSTILE), id=_HOSTILE)
    shown = rank_table.ranks_of_runs([run([made])], form)
    assert "\x1b" not in shown
    assert not [line for line in shown.splitlines() if line.startswith("::")]
    assert form != "html" or "<script>" not in shown


def test_a_program_that_started_its_ranks_itself_is_none_of_them() -> None:
    phase = {"name": "script", "allocator": "default", "peak_footprint_bytes": 8 * MIB}
    whole = process(role="script", phases=[{**phase, "bound": "at least", "own_peak_bytes": MIB}])
    ranks = (process(role="rank", phases=[phase]), process(role="rank", rank=1, phases=[phase]))
    made = dataclasses.replace(record("none"), processes=(whole, *ranks))
    assert [row["rank"] for row in json.loads(rank_table.ranks_of_runs([run([made])], "json"))] == [0, 1]
    rows = phase_table.phases([made]).splitlines()[4:]
    assert [row.split()[0] for row in rows] == ["–", "0", "1"]


def test_a_run_without_ranks_says_so_and_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = run([record("none")])
    with pytest.raises(MembenchError, match=r"no case in made-up-1\.jsonl ran on ranks, as on device 2xcpu"):
        rank_table.ranks_of_runs([made])
    kept = Path(__file__).parent.parent / "results" / "quickstart@2-cores-epyc.jsonl"
    assert cli.main(["show", "--ranks", str(kept)]) == 2
    assert capsys.readouterr().err.startswith("membench: no case in ")


def test_the_verb_prints_the_ranks_of_a_file_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = run([_on_two_ranks()])
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (made.header, *map(as_json, made.records))))
    assert cli.main(["show", "--ranks", str(path)]) == 0
    assert capsys.readouterr().out == rank_table.ranks_of_runs([made]) + "\n"


def test_the_page_has_the_picture_of_ranks() -> None:
    text = page.page([run([_on_two_ranks()])])
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert data["groups"][0]["ranks"]["names"] == ["ddp · rank 0", "ddp · rank 1"]
    assert '<div id="ranks">' in text
