"""Results files that are damaged, forged or no results at all: one clear line, or what is in them, and never a lie."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from membench import cli
from membench.errors import ResultsError
from membench.records import run_file
from membench.records.encoding import as_json
from membench.records.metrics import METRICS
from membench.records.record import Record
from membench.records.run_file import find_run, newest_run, read_run
from membench.regression import baselines
from membench.regression.judging import judge
from membench.regression.measured import Measured, of_run
from membench.report import case_outcomes, github, junit, phase_table, regression, savings, text
from membench.suite.tolerances import Tolerances

_KEPT = Path(__file__).parent.parent / "results" / "quickstart@2-cores-epyc.jsonl"
_ODD_NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-1", "1" + "0" * 400, "1" * 5000, "0.1"]
_ODD_TEXTS = [
    "../../etc/passwd",
    "\x1b[2J\x1b]0;title\x07",
    "<script>alert(1)</script>",
    "n" * 10_000,
    "\u202egnp.exe",
    "",
]
_ODD_VALUES = ['"3"', "null", "true", "[]", "{}", "[[[[]]]]", '{"a":{"b":[{}]}}', '"\\ud800"']
_ODD = [*_ODD_NUMBERS, *map(json.dumps, _ODD_TEXTS), *_ODD_VALUES]


@pytest.fixture(scope="module")
def entries() -> list[dict[str, Any]]:
    """The header of a kept run and two of its records, with few samples and figures."""
    kept = [json.loads(line) for line in _KEPT.read_text().splitlines()[:3]]
    for record in kept[1:]:
        record["timeline"] = {name: column[:2] for name, column in record["timeline"].items()}
        record["processes"][0]["phases"] = [p for p in record["processes"][0]["phases"] if p["name"] in ("load", "run")]
        record["processes"][0]["quality"] = None
        record["obtained"] = dict(list(record["obtained"].items())[:3])
        record["metrics"] = dict(list(record["metrics"].items())[:12])
    return kept


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.jsonl"


def _write(path: Path, entries: list[dict[str, Any]]) -> bytes:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path.read_bytes()


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of an entry, and the first element of each list."""
    inner = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, below in inner:
        yield (*place, key)
        yield from _places(below, (*place, key))


def _at(entry: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        entry = entry[key]
    return entry


def _all_views(records: tuple[Record, ...]) -> str:
    """Every text that is made of records."""
    views = [text.comparison(records, form) for form in ("simple", "github", "csv", "html", "latex")]
    views += [phase_table.phases(records), phase_table.phases(records, "csv"), text.explanation(records)]
    return "\n".join([*views, *text.remarks(records), *savings.verdicts(records)])


def _clear(error: pytest.ExceptionInfo[ResultsError] | ResultsError, path: Path) -> str:
    """The message of an error, which is one line that names the file and is short enough to be read."""
    message = str(error.value if isinstance(error, pytest.ExceptionInfo) else error)
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) < len(str(path)) + 500
    return message


def test_a_file_cut_at_any_length_gives_its_whole_records_or_says_that_it_has_no_header(
    path: Path, entries: list[dict[str, Any]]
) -> None:
    short = [{**entry, "machine": {}, "obtained": {}} for entry in entries]
    short[0]["suite_text"] = ""
    for record in short[1:]:
        record["processes"] = [{**record["processes"][0], "phases": []}]
    whole = _write(path, short)
    for length in reversed(range(len(whole))):
        os.truncate(path, length)
        lines = whole[:length].count(b"\n")
        if lines == 0:
            with pytest.raises(ResultsError, match=r"run\.jsonl: not the results of a run \(no header\)$"):
                read_run(path)
        else:
            assert [record.id for record in read_run(path).records] == [entry["id"] for entry in entries[1:lines]]


def test_anything_anywhere_is_refused_with_its_line_and_key_or_can_be_shown(
    path: Path, entries: list[dict[str, Any]]
) -> None:
    draw = random.Random(6)
    refused = shown = 0
    for line in (0, 1):
        for place in _places(entries[line]):
            changed = copy.deepcopy(entries)
            _at(changed[line], place[:-1])[place[-1]] = "PLACE"
            if str(place[-1]) not in _write(path, changed).decode():
                continue
            template = path.read_text()
            # All kinds of nonsense in the keys that matter; two of them, drawn by lot, in each of the rest.
            for odd in _ODD if len(place) <= 2 else draw.sample(_ODD, 2):
                path.write_text(template.replace('"PLACE"', odd, 1))
                try:
                    run = read_run(path)
                    measured = of_run(run)
                except ResultsError as error:
                    message = _clear(error, path)
                    assert f", line {line + 1}: " in message or ", line 2: " in message, message
                    refused += 1
                else:
                    said = _all_views(run.records)
                    if draw.random() < 0.2:  # statistics take their time
                        said += _all_views_of(measured, measured)
                    assert not [c for c in said if not c.isprintable() and c not in "\r\n"]
                    shown += 1
    assert refused > 400
    assert shown > 100


@pytest.fixture
def baseline(path: Path, entries: list[dict[str, Any]]) -> tuple[Path, Measured]:
    """A baseline of two cases with their noise, and what it is of."""
    repeats = [{**copy.deepcopy(entry), "repeat": 1} for entry in entries[1:]]
    repeats[0]["metrics"]["peak_live_bytes"] += 2**20
    _write(path, [*entries, *repeats])
    measured = of_run(read_run(path))
    kept = path.with_name("quickstart@here.json")
    baselines.write(measured, kept)
    return kept, measured


def _all_views_of(base: Measured, new: Measured) -> str:
    """Every text that is made of comparisons."""
    judgements = [judge(base, new, Tolerances(), across_machines=True), judge(new, base, Tolerances())]
    views = [regression.table(judgements[:1], form) for form in ("simple", "github", "csv")]
    views += [
        line for judgement in judgements for line in (*regression.remarks(judgement), regression.summary(judgement))
    ]
    cases = [case for judgement in judgements for case in case_outcomes.of_judgement(judgement)]
    views += [regression.figures(base), regression.figures(base, "csv"), junit.document(cases)]
    return "\n".join([*views, *github.workflow_commands(cases), github.summary("s", cases, [])])


def test_a_baseline_cut_anywhere_is_refused(baseline: tuple[Path, Measured]) -> None:
    path, measured = baseline
    whole = path.read_bytes()
    assert {*baselines.read(path).cases} == {*measured.cases}
    for length in range(0, len(whole) - 2, 7):  # the last two are a bracket and the end of its line
        path.write_bytes(whole[:length])
        with pytest.raises(ResultsError) as raised:
            baselines.read(path)
        _clear(raised, path)


def test_anything_anywhere_in_a_baseline_is_refused_or_can_be_compared(baseline: tuple[Path, Measured]) -> None:
    path, measured = baseline
    draw = random.Random(7)
    content = json.loads(path.read_text())
    refused = shown = 0
    for place in _places(content):
        changed = copy.deepcopy(content)
        _at(changed, place[:-1])[place[-1]] = "PLACE"
        template = json.dumps(changed)
        for odd in _ODD if len(place) == 1 else draw.sample(_ODD, 2):
            path.write_text(template.replace('"PLACE"', odd, 1))
            try:
                base = baselines.read(path)
            except ResultsError as error:
                _clear(error, path)
                refused += 1
            else:
                assert not [c for c in _all_views_of(base, measured) if not c.isprintable() and c not in "\r\n"]
                shown += 1
    assert refused > 100
    assert shown > 20


def test_folders_pipes_and_other_files_are_no_baselines(baseline: tuple[Path, Measured]) -> None:
    path, _ = baseline
    for name, make in (("folder", os.mkdir), ("pipe", os.mkfifo)):
        make(path.with_name(f"{name}.json"))
    assert baselines.names(path.parent) == ["quickstart@here"]
    for name, content, message in (
        ("pipe", None, "cannot be read: it is no file"),
        ("folder", None, "cannot be read: Is a directory"),
        ("empty", b"", "not JSON"),
        ("binary", bytes(range(256)), "not JSON"),
        ("deep", b"[" * 200_000, "not JSON of membench: nested too deeply"),
        ("nan", b'{"schema": 1, "cases": {}, "machine": {"x": NaN}}', "NaN is no number of JSON"),
        ("newer", b'{"schema": 4, "cases": {}}', "schema 4 is newer than 3; a newer membench reads it"),
    ):
        other = path.with_name(f"{name}.json")
        if content is not None:
            other.write_bytes(content)
        with pytest.raises(ResultsError) as raised:
            baselines.read(other)
        assert _clear(raised, other) == f"{other}: {message}"


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", "a@b@c", "a\x1b[2J", "<b>", "a b", "n" * 300, "\u202ea"]
)
def test_a_baselines_name_leads_nowhere_else(name: str, tmp_path: Path) -> None:
    with pytest.raises(ResultsError) as raised:
        baselines.path_of(name, tmp_path)
    assert str(raised.value).isprintable()
    assert "is no name for a baseline" in str(raised.value)


def test_a_missing_key_is_named(path: Path, entries: list[dict[str, Any]]) -> None:
    for key in ("case", "id", "status", "metrics", "processes", "machine"):
        _write(path, [entries[0], {name: value for name, value in entries[1].items() if name != key}])
        with pytest.raises(ResultsError, match=rf"run\.jsonl, line 2: '{key}' is missing$"):
            read_run(path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("metrics", "weights_bytes"), "1", "metrics.weights_bytes = '1': expected a number"),
        (("metrics", "weights_bytes"), -5, "metrics.weights_bytes = -5: must be at least 0"),
        (("metrics", "step_median_s"), -0.5, "metrics.step_median_s = -0.5: must be at least 0"),
        (("metrics", "peak_live_bytes"), 2**70, f"metrics.peak_live_bytes = {2**70}: no machine has so much"),
        (("metrics",), [], "metrics = []: expected a table"),
        (("status",), "okay", "status = 'okay': "),
        (("repeat",), -1, "repeat = -1: must be at least 0"),
        (("case", "model"), "../x", "case.model = '../x': a name has letters, digits, '.', '_' and '-'"),
        (("case", "model"), "\x1b[2J", "case.model = '\\x1b[2J': a name has letters"),
        (("case", "technique"), "a+a", "case.technique = 'a+a': 'a' is in the stack twice"),
        (("case", "device"), "tpu", "case.device = 'tpu': write cpu, cuda, cuda:0 or 2xcpu"),
        (("id",), "other", "id = 'other': the case is llama-60m/none/"),
        (("processes", 0, "phases", 0, "peak_live_bytes"), 1.5, "processes.0.phases.0.peak_live_bytes = 1.5: "),
        (("timeline", "at_s", 0), "soon", "timeline.at_s.0 = 'soon': expected a number"),
        (("schema",), 2, "schema 2 is newer than 1; a newer membench reads it"),
        (("schema",), 0, "schema 0: there is none before 1"),
        (("schema",), True, "no membench record ('schema' is missing)"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_file_line_key_and_remedy(
    path: Path, entries: list[dict[str, Any]], place: tuple[Any, ...], value: Any, message: str
) -> None:
    changed = copy.deepcopy(entries)
    _at(changed[1], place[:-1])[place[-1]] = value
    _write(path, changed)
    with pytest.raises(ResultsError) as raised:
        read_run(path)
    assert _clear(raised, path).startswith(f"{path}, line 2: {message}")


def test_a_record_that_is_not_of_the_headers_suite_is_refused(path: Path, entries: list[dict[str, Any]]) -> None:
    for axis, name, message in (
        ("model", "gpt9", "case.model = 'gpt9': suite 'quickstart' has no model gpt9"),
        ("technique", "none+zip", "case.technique = 'none+zip': 'none' has no place in a stack"),
        ("technique", "zip", "case.technique = 'zip': suite 'quickstart' has no technique zip"),
        ("workload", "sleep", "case.workload = 'sleep': suite 'quickstart' has no workload sleep"),
        ("device", "cuda:1", "case.device = 'cuda:1': the run is on cpu"),
    ):
        other = copy.deepcopy(entries[1])
        other["case"][axis] = name
        other["id"] = "/".join(other["case"][each] for each in ("model", "technique", "workload", "device"))
        _write(path, [*entries, other])
        with pytest.raises(ResultsError) as raised:
            read_run(path)
        assert _clear(raised, path) == f"{path}, line 4: {message}"


def test_two_runs_in_one_file_and_a_record_twice_are_refused(path: Path, entries: list[dict[str, Any]]) -> None:
    _write(path, [*entries, *entries])
    with pytest.raises(ResultsError, match="line 4: a second header: two runs do not go into one file"):
        read_run(path)
    _write(path, [*entries, entries[1]])
    with pytest.raises(ResultsError, match=f"line 4: {entries[1]['id']}, repeat 0: it is there already"):
        read_run(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not the results of a run"),
        (b"\n", "line 1: not JSON"),
        (b"\0" * 4096 + b"\n", "line 1: not JSON"),
        (bytes(range(256)) * 8, "line 1: not JSON"),
        (b"\x7fELF\x02\x01\n", "line 1: not JSON"),
        (b"[" * 200_000 + b"\n", "line 1: not JSON of membench: nested too deeply"),
        (b'{"schema": ' + b"9" * 4000 + b"}\n", "line 1: schema a very large number is newer than 1"),
        (b'{"schema": 1, "run": NaN}\n', "line 1: NaN is no number of JSON"),
        (b'{"schema": 1, "run": "r", "suite": {"name": "s"}}\n', "line 1: suite = {name = 's'}: expected text"),
        (b'{"schema": 1, "run": "r", "suite": "s", "machine": {"packages": [1]}}\n', "line 1: machine.packages = [1]"),
        (b'{"schema": 1, "run": "r", "suite": "s", "started_at": 7}\n', "line 1: started_at = 7: expected text"),
        (b'{"schema": 1, "case": {}}\n', "not the results of a run"),
        (b"<!DOCTYPE html>\n<title>404</title>\n", "line 1: not JSON"),
    ],
)  # fmt: skip
def test_what_is_no_run_is_told_so_and_not_taken_for_the_newest(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ResultsError) as raised:
        read_run(path)
    assert message in _clear(raised, path)
    assert find_run(path.parent) is None


def test_folders_pipes_and_files_that_may_not_be_read_are_told_apart(
    path: Path, entries: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, make in (("folder", os.mkdir), ("pipe", os.mkfifo)):
        make(path.with_name(f"{name}.jsonl"))
    with pytest.raises(ResultsError, match=r"folder\.jsonl: cannot be read: Is a directory$"):
        read_run(path.with_name("folder.jsonl"))
    with pytest.raises(ResultsError, match=r"pipe\.jsonl: cannot be read: it is no file$"):
        read_run(path.with_name("pipe.jsonl"))
    _write(path, entries)
    # They do not hold up who looks for the newest run.
    assert newest_run(path.parent) == path
    if os.getuid():  # root may read anything
        path.chmod(0)
        with pytest.raises(ResultsError, match=r"run\.jsonl: cannot be read: Permission denied$"):
            read_run(path)


def test_a_line_longer_than_any_record_is_refused_without_reading_all_of_it(
    path: Path, entries: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(path, entries)
    monkeypatch.setattr(run_file, "_LONGEST_LINE_BYTES", 2**20)
    with open(path, "ab") as file:
        file.truncate(2**40)  # a terabyte that takes no room
    with pytest.raises(ResultsError, match=r"run\.jsonl, line 4: longer than any record: more than 1\.000 MiB$"):
        read_run(path)


def test_kept_runs_are_read_as_they_were_written() -> None:
    for kept in _KEPT.parent.glob("*.jsonl"):
        written = [json.loads(line) for line in kept.read_text().splitlines()]
        run = read_run(kept)
        assert run.header == written[0]
        read = [json.loads(json.dumps(as_json(record))) for record in run.records]
        for record in written[1:]:
            # Earlier versions did not write these, which are read as not known.
            later = dict.fromkeys(
                ("waited_s", "passive", "wait_policy", "modules_bytes", "slept_s", "communicated_bytes")
            )
            record["processes"] = [{**later, **each} for each in record["processes"]]
        assert read == written[1:]


def test_a_spreadsheet_finds_no_formula_and_a_terminal_no_commands(path: Path, entries: list[dict[str, Any]]) -> None:
    changed = copy.deepcopy(entries)
    changed[1] |= {"status": "failed", "message": "=1+1", "ended_in": None}
    changed[2] |= {"remarks": ["\x1b[31mred\x1b[0m\nsecond line"], "message": None}
    changed[2]["processes"][0]["phases"][0]["name"] = "\x07bell"
    _write(path, changed)
    records = read_run(path).records
    assert "failed: =1+1" in text.comparison(records, "csv")
    assert "\\x1b[31mred\\x1b[0m\\nsecond line" in "\n".join(text.remarks(records))
    assert "\\x07bell" in phase_table.phases(records)
    assert not [c for c in _all_views(records) if not c.isprintable() and c not in "\r\n"]
    changed[1]["message"] = "x"
    changed[1]["broken_limits"] = ["=cmd|' /C calc'!A0"]
    changed[1]["status"] = "ok"
    _write(path, changed)
    assert "'=cmd" in text.comparison(read_run(path).records, "csv")


def test_show_prints_one_line_and_ends_with_2(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_bytes(b"\x00\xff\n")
    assert cli.main(["show", str(path)]) == 2
    assert capsys.readouterr() == ("", f"membench: {path}, line 1: not JSON\n")


def test_numbers_that_nothing_measures_are_refused_with_their_key_or_can_be_compared(
    path: Path, entries: list[dict[str, Any]]
) -> None:
    _write(path, entries)
    whole = of_run(read_run(path))
    refused = compared = 0
    for metric in METRICS:
        for odd in (1e308, 1e-308, 5e-324):
            changed = copy.deepcopy(entries)
            changed[1]["metrics"][metric.field] = odd
            _write(path, changed)
            with pytest.raises(ResultsError, match=f"line 2: metrics.{metric.field} = .*no "):
                read_run(path)
            refused += 1
    steps = entries[1]["processes"][0]["durations_s"]
    for place in range(len(steps)):
        for odd in (1e308, 0, 1e-308, 5e-324):
            changed = copy.deepcopy(entries)
            changed[1]["processes"][0]["durations_s"][place] = odd
            _write(path, changed)
            damaged = of_run(read_run(path))
            for judgement in (judge(whole, damaged, Tolerances()), judge(damaged, whole, Tolerances())):
                assert all(regression.table([judgement], form) for form in ("simple", "json"))
                assert judgement.exit_code == 0
            compared += 1
    assert (refused, compared) == (3 * len(METRICS), 4 * len(steps))
    assert steps


def test_every_metric_may_be_as_small_as_its_source_makes_it(path: Path, entries: list[dict[str, Any]]) -> None:
    # Above a baseline, a step that gives something back is below zero.
    for metric in METRICS:
        changed = copy.deepcopy(entries)
        changed[1]["metrics"] = {metric.field: -1}
        _write(path, changed)
        above_a_baseline = metric.title.split()[0] in ("live", "footprint", "loss", "lost", "KL", "context") or any(
            word in metric.field for word in ("_live_", "_footprint_")
        )
        if above_a_baseline and metric.name != "loss_difference":
            read_run(path)
        else:
            with pytest.raises(ResultsError, match="must be at least 0"):
                read_run(path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("timeline", "rss_bytes"), [1], "timeline.rss_bytes has 1 entries and timeline.at_s has 2: "),
        (("timeline", "rss_bytes", 1), 10**400, "timeline.rss_bytes.1 = a very large number: "),
        (("timeline", "at_s", 1), None, "timeline.at_s.1 = null: expected a number"),
        (("timeline", "1" * 5000), [], f"timeline.{'1' * 79}… has 0 entries and timeline.at_s has 2: "),
        (("timeline",), {"rss_bytes": []}, "'timeline.at_s' is missing"),
        (("machine", "cores"), 10**400, "machine.cores = a very large number: must be at most "),
        (("machine", "page_bytes"), [4096], "machine.page_bytes = [4096]: expected a whole number"),
        (("machine", "architecture"), 7, "machine.architecture = 7: expected text"),
        (("machine", "cpu"), {"instructions": [{}]}, "machine.cpu.instructions.0 = {}: expected text"),
        (("machine", "cpu"), {"model": []}, "machine.cpu.model = []: expected text"),
        (("machine", "threads"), -1, "machine.threads = -1: must be at least 0"),
        (("metrics", "1" * 5000), "x", f"metrics.{'1' * 79}… = 'x': expected a number"),
        (("duration_s",), 1e308, "duration_s = 1e+308: must be at most "),
        (("processes", 0, "phases", 0, "began_s"), 1e308, "processes.0.phases.0.began_s = 1e+308: must be at most "),
        (("processes", 0, "phases", 0, "steps"), 10**400, "processes.0.phases.0.steps = a very large number: must be "),
    ],
)  # fmt: skip
def test_entries_of_other_types_columns_of_unequal_length_and_numbers_without_end_are_told_with_their_key(
    path: Path, entries: list[dict[str, Any]], place: tuple[Any, ...], value: Any, message: str
) -> None:
    changed = copy.deepcopy(entries)
    _at(changed[1], place[:-1])[place[-1]] = value
    _write(path, changed)
    with pytest.raises(ResultsError) as raised:
        read_run(path)
    assert _clear(raised, path).startswith(f"{path}, line 2: {message}")
