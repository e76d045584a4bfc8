"""The verbs report, plot and advise."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

import pytest

from membench import cli
from membench.records.run_file import read_run
from membench.report import formats, table_formats

_RESULTS = Path(__file__).parent.parent / "results"
_QUICKSTART = str(_RESULTS / "quickstart@2-cores-epyc.jsonl")
_DATA = str(_RESULTS / "data@2-cores-epyc.jsonl")


def test_the_command_line_offers_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    tables = ("simple", "github", "csv", "json", "latex", "html", "plain")
    assert tuple(table_formats.FORMATS) == tables
    for words, offered in (
        (["report", "--help"], ("html", "md", "csv", "json", "latex")),
        (["plot", "--help"], formats.PICTURES),
        (["export", "--help"], ("benchmark-action", "bencher")),
        (["show", "--help"], tables),
        (["compare", "--help"], tables),
        (["doctor", "--help"], ("simple", "github", "plain")),
    ):
        with pytest.raises(SystemExit):
            cli.main(words)
        assert f"{{{','.join(offered)}}}" in "".join(capsys.readouterr().out.split())


_ROWS = [{"case": "a", "bytes": 1}, {"case": "b", "bytes": 2}]


@pytest.mark.parametrize("form", table_formats.FORMATS)
def test_every_table_format_writes_every_row(form: str) -> None:
    rows = table_formats.FORMATS[form].render(_ROWS)
    assert all(text in rows for text in ("case", "bytes", "a", "b", "1", "2"))
    assert "the title" in table_formats.FORMATS[form].title("the title")


def test_a_table_format_is_one_entry(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tabs = table_formats.TableFormat(
        lambda rows: "\n".join("\t".join(map(str, row.values())) for row in rows), is_flat=True, is_for_machines=True
    )
    monkeypatch.setitem(table_formats.FORMATS, "tabs", tabs)
    assert cli.main(["show", _QUICKSTART, "--format", "tabs"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("llama-60m/none/forward/cpu\tok\t")
    assert "kept in" in shown.err
    assert cli.main(["compare", _QUICKSTART, _QUICKSTART, "--format", "tabs"]) == 0
    assert capsys.readouterr().out.startswith("llama-60m/none/forward/cpu\t")


@pytest.mark.parametrize("form", [form for form in formats.REPORTS if form != "html"])
def test_the_ending_of_the_file_says_the_format(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"report{formats.REPORTS[form].ending}"
    assert cli.main(["report", _QUICKSTART, "-o", str(path)]) == 0
    assert cli.main(["report", _QUICKSTART, "--format", form]) == 0
    written = path.read_bytes().decode()
    assert written == capsys.readouterr().out
    assert "bf16" in written


def test_several_runs_go_into_one_table_with_the_name_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", _QUICKSTART, _DATA, "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 13 + 37
    assert len({row["run"] for row in rows}) == 2
    assert cli.main(["report", _QUICKSTART, "--format", "json"]) == 0
    first = json.loads(capsys.readouterr().out)[0]
    assert (first["case"], first["weights_bytes"]) == ("llama-60m/none/forward/cpu", 232294656)


def test_show_prints_several_runs_with_the_name_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(read_run(path).header["run"]) for path in (_QUICKSTART, _DATA)]
    assert cli.main(["show", _QUICKSTART, _DATA, "-k", "llama-60m or read"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first, second = map(lines.index, names)
    assert (first, lines[second - 1]) == (0, "")
    assert f"kept in {_QUICKSTART}" in lines[first:second]
    assert f"kept in {_DATA}" in lines[second:]
    assert cli.main(["show", _QUICKSTART, _DATA, "-k", "llama-60m"]) == 0
    assert names[1] not in capsys.readouterr().out  # it has no such case
    for more in ((), ("--phases",)):
        assert cli.main(["show", _QUICKSTART, _DATA, "--format", "csv", *more]) == 0
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        assert list(dict.fromkeys(row["run"] for row in rows)) == names


def test_rows_of_runs_with_metrics_of_their_own_go_into_one_table() -> None:
    rows = [{"case": "a", "own": 1}, {"case": "b", "other": 2}]
    assert table_formats.FORMATS["csv"].render(rows).splitlines() == ["case,own,other", "a,1,", "b,,2"]


def test_the_reference_is_explained_too_by_what_is_known_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", _QUICKSTART, "--explain", "-k", "llama-60m/none/forward/cpu"]) == 0
    explained = capsys.readouterr().out.partition("\nllama-60m/none/forward/cpu\n")[2]
    assert "warm-up peak    274.7 MiB" in explained
    assert "KL" not in explained


def test_a_page_is_one_file(tmp_path: Path) -> None:
    assert cli.main(["report", _QUICKSTART, "-o", str(tmp_path / "report.html")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_markdown_holds_the_summary_the_table_what_is_said_and_the_suite(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", _QUICKSTART, "--format", "md"]) == 0
    written = capsys.readouterr().out
    for part in ("# quickstart", "bf16 holds 2.0 times less", "| technique", "int8-weight-only: saved", "[matrix]"):
        assert part in written


def test_a_picture_is_drawn_of_the_cases_that_are_named(tmp_path: Path) -> None:
    path = tmp_path / "picture.svg"
    assert cli.main(["plot", _QUICKSTART, "memory", "-o", str(path), "-k", "llama-60m and train"]) == 0
    assert path.exists()


@pytest.mark.parametrize(
    ("budget", "code", "told"),
    [
        ("8GiB", 0, "none: needs 311.0 MiB at its footprint peak, leaves 7.696 GiB"),
        ("20 MiB", 1, "no measured stack fits 20.00 MiB"),
    ],
)
def test_advice_tells_by_its_exit_code_whether_something_fits(
    budget: str, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["advise", _QUICKSTART, "--budget", budget]) == code
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["report", _QUICKSTART, "-o", "report.pdf"], "report.pdf: its ending says no format; end it in .html, .md,"),
        (["report", _QUICKSTART, "-o", "nowhere/report.md"], "nowhere/report.md: cannot be written: No such file"),
        (["report", "nowhere.jsonl"], "nowhere.jsonl: cannot be read: No such file"),
        (["advise", _QUICKSTART, "--budget", "8"], "--budget: '8' is no size; write a number and B, KiB,"),
        (
            ["advise", _QUICKSTART, "--budget", "8GiB", "--max-quality-loss", "1"],
            "--max-quality-loss: '1' is no share;",
        ),
        (["plot", _QUICKSTART, "memory", "-o", "x.png", "-k", "nothing"], "-k 'nothing' fits no case in"),
    ],
)
def test_bad_input_is_one_clear_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"membench: {told}")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "library"),
    [(["report", _QUICKSTART], "jinja2"), (["report", _QUICKSTART], "plotly"),
     (["plot", _QUICKSTART, "memory", "-o", "x.png"], "matplotlib")],
)  # fmt: skip
def test_what_is_not_installed_is_named_with_the_command_that_installs_it(
    words: list[str], library: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    assert cli.main(words) == 2
    assert "pip install 'membench[report]'" in capsys.readouterr().err


def test_a_suite_cannot_end_the_block_that_it_stands_in() -> None:
    kept = read_run(_QUICKSTART)
    hostile = dataclasses.replace(kept, header={**kept.header, "suite_text": "# ```\n<img src=x>\n"}, records=())
    block = formats.REPORTS["md"].write([hostile]).split("\n\n")[-1].splitlines()
    assert block == ["````toml", "# ```", "<img src=x>", "````"]
