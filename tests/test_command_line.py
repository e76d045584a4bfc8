"""The command line as its user meets it: real processes, real signals."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import html.parser
import importlib.metadata
import io
import json
import os
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest
from rich.console import Console

import membench
from membench.cli import progress
from membench.host.nvml import gpus
from membench.protocol.readings import PartReading
from membench.report import phase_table

_SUITE = """\
[suite]
name = "small"
[matrix]
model = ["ballast"]
technique = ["none", "bf16"]
workload = ["still"]
[workload.still]
use = "burst"
mib = 0
[settings]
threads = 1
measured_steps = 2
"""


def _membench(
    *arguments: str, folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "membench", *arguments],
        cwd=folder, env={**os.environ, **(environment or {})}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a suite of two cases."""
    (tmp_path / "small.toml").write_text(_SUITE)
    return tmp_path


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the suite was run, for what only reads."""
    folder = tmp_path_factory.mktemp("measured")
    path = folder / "parts.toml"
    path.write_text(_SUITE.replace('"ballast"', '"llama-15m"').replace('"still"', '"brief"')
                    .replace('[workload.still]\nuse = "burst"\nmib = 0\n',
                             '[workload.brief]\nuse = "generate"\nprompt_length = 4\nnew_tokens = 2\n'))  # fmt: skip
    membench.run(membench.load_suite(path), output=folder / "results")
    return folder


Ran = tuple[Path, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """(folder, what came out) of a run whose output goes into files, with colours forced as many CI services do."""
    folder = tmp_path_factory.mktemp("ran")
    (folder / "small.toml").write_text(_SUITE)
    return folder, _membench("run", "small.toml", folder=folder, environment={"FORCE_COLOR": "1"})


def test_a_run_prints_the_table_and_show_prints_it_again(ran: Ran) -> None:
    folder, done = ran
    assert done.returncode == 0
    assert done.stdout.startswith("ballast · still · cpu\n\ntechnique    status    weights")
    assert "32.00 MiB ×0.50" in done.stdout
    assert _membench("show", folder=folder).stdout == done.stdout


def test_a_log_gets_a_plain_line_a_case_even_where_colours_are_forced(ran: Ran) -> None:
    assert [line.split()[:2] for line in ran[1].stderr.splitlines()] == [
        ["ok", "ballast/none/still/cpu"], ["ok", "ballast/bf16/still/cpu"],
    ]  # fmt: skip
    assert "\x1b" not in ran[1].stderr


def _phases(measured: Path, form: str) -> str:
    shown = _membench("show", "--phases", "-k", "bf16", "--format", form, folder=measured)
    assert (shown.returncode, shown.stderr) == (0, "")
    return shown.stdout


def test_phases_are_shown_on_request_without_rows_and_columns_of_dashes(measured: Path) -> None:
    shown = _phases(measured, "simple")
    assert shown.startswith("llama-15m/bf16/brief/cpu · ok\n")
    assert "none" not in shown
    _, rows = shown.split("---\n")
    names = [row.removeprefix("· ").split()[0] for row in rows.splitlines()]
    assert names == [
        "load", "apply", "warmup", "prefill", "decode", "run", "prefill", "decode", "breakdown", "prefill", "decode",
        "save", "time", "prefill", "decode", "evaluate",
    ]  # fmt: skip
    # Memory of parts is taken in one phase; in the others they have a duration and nothing that looks unknown.
    parts = [row for row in rows.splitlines() if row.startswith("· ")]
    assert [row.count("iB") >= 3 for row in parts] == [False, False, True, True, False, False, False, False]
    assert "–" not in shown


def test_a_part_of_which_nothing_is_known_is_not_shown(measured: Path) -> None:
    (path,) = (measured / "results").glob("*.jsonl")
    record = membench.read_run(path).records[0]
    shown = phase_table.phases([record])
    for phase in record.processes[0].phases:
        cast(dict[str, PartReading], phase.parts)["between"] = PartReading()
    assert phase_table.phases([record]) == shown


def test_phases_as_csv_and_json_are_numbers_that_a_program_reads(measured: Path) -> None:
    from_json = json.loads(_phases(measured, "json"))
    from_csv = list(csv.DictReader(_phases(measured, "csv").splitlines()))
    assert [{key: "" if value is None else str(value) for key, value in row.items()} for row in from_json] == from_csv
    named = {(row["phase"], row["part"]): row for row in from_json}
    (record,) = [
        r for r in membench.read_run(next((measured / "results").glob("*.jsonl"))).records if r.technique != "none"
    ]
    (run,) = [phase for phase in record.processes[0].phases if phase.name == "run"]
    assert named["run", None]["live_peak_bytes"] == run.peak_live_bytes == record.metrics["peak_live_bytes"]
    assert named["run", "decode"]["live_peak_bytes"] == run.parts["decode"].peak_live_bytes
    assert named["time", "decode"]["live_peak_bytes"] is None
    assert named["time", "decode"]["duration_s"] > 0


def test_every_metric_is_explained_on_request(measured: Path) -> None:
    plain, explained = (_membench("show", *more, folder=measured).stdout for more in ((), ("--explain",)))
    assert "apply time" not in plain
    assert "\nllama-15m/bf16/brief/cpu\n\nmetric " in explained
    assert "\napply time " in explained
    assert set(plain.splitlines()) < set(explained.splitlines())


class _Tags(html.parser.HTMLParser):
    """What stands outside any tag, which in a table is nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loose: list[str] = []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open and data.strip():
            self.loose.append(data)


@pytest.mark.parametrize("form", ["json", "csv", "html", "latex"])
def test_what_a_program_reads_comes_alone_and_the_rest_goes_to_the_other_stream(measured: Path, form: str) -> None:
    shown = _membench("show", "--format", form, folder=measured)
    assert "bf16: saved weights ×0.50" in shown.stderr
    assert "kept in " in shown.stderr
    assert "saved" not in shown.stdout
    match form:
        case "json":
            assert [row["case"] for row in json.loads(shown.stdout)] == [
                "llama-15m/none/brief/cpu", "llama-15m/bf16/brief/cpu",
            ]  # fmt: skip
        case "csv":
            rows = list(csv.DictReader(shown.stdout.splitlines()))
            assert [row["status"] for row in rows] == ["ok", "ok"]
        case "html":
            tags = _Tags()
            tags.feed(shown.stdout)
            assert (tags.open, tags.loose) == ([], [])
        case "latex":
            assert shown.stdout.startswith("\\subsection*{llama-15m · brief · cpu}\n")
            assert shown.stdout.endswith("\\end{tabular}\n")


def test_a_selection_of_nothing_is_bad_input(measured: Path) -> None:
    for more in ((), ("--phases",), ("--format", "json")):
        shown = _membench("show", "-k", "nothing", *more, folder=measured)
        assert (shown.returncode, shown.stdout) == (2, "")
        assert shown.stderr.startswith("membench: -k 'nothing' fits no case in results/")


@pytest.mark.parametrize("encoding", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0",
                                                                    "PYTHONCOERCECLOCALE": "0"}])  # fmt: skip
def test_a_terminal_that_knows_no_signs_gets_the_table_in_plain_ones(
    measured: Path, encoding: Mapping[str, str]
) -> None:
    shown = _membench("show", folder=measured, environment=encoding)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.isascii()
    assert "llama-15m | brief | cpu" in shown.stdout
    assert "MiB x0.50" in shown.stdout
    assert "?" not in shown.stdout


def test_the_version_is_that_of_the_distribution(folder: Path) -> None:
    assert _membench("--version", folder=folder).stdout == f"membench {importlib.metadata.version('membench')}\n"


def test_a_broken_limit_makes_the_exit_code_one(folder: Path) -> None:
    (folder / "small.toml").write_text(_SUITE + '[limits]\nweights = "40 MiB"\n')
    ran = _membench("run", "small.toml", folder=folder)
    assert ran.returncode == 1
    assert "ballast/none/still/cpu: weights 64.00 MiB is over its limit of 40.00 MiB" in ran.stdout


def test_a_dry_run_names_the_cases_and_measures_nothing(folder: Path) -> None:
    ran = _membench("run", "small.toml", "-k", "bf16", "--dry-run", folder=folder)
    assert ran.stdout.split() == ["ballast/none/still/cpu", "ballast/bf16/still/cpu"]
    assert not (folder / "results").exists()


def test_bad_input_is_one_line_and_exit_code_two(folder: Path) -> None:
    for arguments in (("run", "smal"), ("show", "absent.jsonl"), ("show", "--output", "absent")):
        ran = _membench(*arguments, folder=folder)
        assert ran.returncode == 2
        assert ran.stdout == ""
        assert len(ran.stderr.splitlines()) == 1
        assert ran.stderr.startswith("membench: ")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("/sys", "/sys/small-"),
        ("/sys/results", "/sys/results: no folder for results: "),
        ("/proc/results", "/proc/results: no folder for results: "),
        ("small.toml", "small.toml: no folder for results: File exists"),
    ],
)
def test_results_that_cannot_be_written_are_one_line_before_anything_is_measured(
    folder: Path, output: str, message: str
) -> None:
    ran = _membench("run", "small.toml", "--output", output, folder=folder)
    assert (ran.returncode, ran.stdout) == (2, "")
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"membench: {message}")


def test_a_disk_that_fills_up_costs_the_record_that_does_not_fit(folder: Path) -> None:
    command = f"ulimit -f 4; exec {sys.executable} -m membench run small.toml"
    ran = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ".jsonl: cannot be written: File too large; what was finished before is kept" in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr
    (path,) = (folder / "results").glob("*.jsonl")
    assert membench.read_run(path).records == ()


def test_a_folder_of_results_that_is_removed_meanwhile_is_one_line_and_no_record_is_lost(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "results").mkdir(exist_ok=True)
    (folder / "removes.py").write_text("import shutil; shutil.rmtree('own')")
    words = ("run", "--script", "removes.py", "--output", "own", "--repeats", "2")
    ran = _membench(*words, folder=folder, environment={"TMPDIR": str(tmp_path)})
    assert (ran.returncode, ran.stdout) == (2, "")
    said = re.fullmatch(
        r"membench: own/.*: was removed or replaced .*; its records are kept in (.*)", ran.stderr.strip()
    )
    assert said is not None, ran.stderr
    assert Path(said[1]).is_relative_to(tmp_path)
    (record,) = membench.read_run(said[1]).records
    assert record.status == "ok"


def test_output_for_which_there_is_no_room_is_one_line(measured: Path) -> None:
    with open("/dev/full", "w") as full:
        shown = subprocess.run([sys.executable, "-m", "membench", "show"], cwd=measured, stdout=full,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert shown.returncode == 2
    assert shown.stderr == "membench: the output cannot be written: No space left on device\n"


def test_an_output_that_is_closed_is_no_error(measured: Path) -> None:
    shown = subprocess.run(["bash", "-c", f"{sys.executable} -m membench show >&-"], cwd=measured, capture_output=True,
                           text=True)  # fmt: skip
    assert (shown.returncode, shown.stderr) == (0, "")


def test_a_suite_of_which_nothing_is_chosen_is_left_out_and_leaves_no_file(folder: Path) -> None:
    (folder / "other.toml").write_text(_SUITE.replace('"small"', '"other"').replace('"bf16"', '"fp16"'))
    ran = _membench("run", "other.toml", "small.toml", "-k", "bf16", folder=folder)
    assert ran.returncode == 0
    assert "other.toml is left out: -k 'bf16' fits none of its cases" in ran.stderr
    assert [path.name.partition("-")[0] for path in (folder / "results").iterdir()] == ["small"]

    neither = _membench("run", "other.toml", "small.toml", "-k", "nf4", folder=folder)
    assert neither.returncode == 2
    assert neither.stderr.splitlines()[-1] == ("membench: -k 'nf4' fits no case; 'membench list SUITE' names them")


def test_a_run_of_skipped_cases_alone_says_that_nothing_was_measured(folder: Path) -> None:
    ran = _membench("run", "small.toml", "--device", "cuda:9", folder=folder)
    assert ran.returncode == 0
    assert "\nnothing was measured: every case was skipped\n" in ran.stdout
    run = membench.read_run(next((folder / "results").glob("*.jsonl")))
    assert [record.status for record in run.records] == ["skipped", "skipped"]
    if gpus()[0] is None:
        assert {record.message for record in run.records} == {"no CUDA device here, or a torch build without CUDA"}


def test_a_training_that_diverged_makes_the_exit_code_one(folder: Path) -> None:
    (folder / "small.toml").write_text(
        '[suite]\nname = "small"\n[matrix]\nmodel = ["llama-15m"]\ntechnique = ["none"]\nworkload = ["wild"]\n'
        '[workload.wild]\nuse = "train"\noptimizer = "sgd"\nsequence_length = 8\nlearning_rate = 1e30\n'
        "[settings]\nmeasured_steps = 1\n"
    )
    ran = _membench("run", "small.toml", folder=folder)
    assert "llama-15m/none/wild/cpu: diverged in run: the training loss became nan in step " in ran.stdout
    assert ran.returncode == 1


def test_a_reader_that_leaves_early_is_no_error(measured: Path) -> None:
    shown = subprocess.run(
        f"{sys.executable} -m membench show | true", shell=True, cwd=measured, capture_output=True, text=True
    )
    assert shown.stderr == ""


_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def _in_a_terminal(folder: Path, columns: int, **environment: str) -> str:
    """All that a run writes to a terminal of so many columns."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    # Its size is asked of the terminal, unless something before us has put it into the environment.
    sizeless = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-m", "membench", "run", "small.toml"],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=theirs, env={**sizeless, "TERM": "xterm", **environment},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # a terminal whose last writer has gone ends so
        while data := os.read(ours, 4096):
            shown += data
    os.close(ours)
    assert process.wait() == 0
    return shown.decode()


def test_a_narrow_terminal_shows_case_phase_memory_and_time_left(folder: Path) -> None:
    shown = _in_a_terminal(folder, 60)
    lines = [line for line in re.split(r"[\r\n]+", _CONTROL.sub("\r", shown)) if line]
    assert [line for line in lines if len(line) > 60] == []
    assert lines[0].startswith("starting · left ? · 0:00")
    for phase in ("load", "apply", "warmup", "run", "time", "save"):
        (first, *_) = [line for line in lines if f"/none/still/cpu · {phase} · " in line]
        assert re.fullmatch(rf"\S+ · {phase} · [\d.]+ \w+ · 0/2 · left \S+( · .*)?", first)
    # The model's 64 MiB, and not the hundreds that the libraries hold.
    (saving, *_) = [line for line in lines if " · save · " in line]
    assert 60 < float(saving.split(" · ")[2].removesuffix(" MiB")) < 80
    assert [line.split()[:2] for line in lines if line.startswith("ok")] == [
        ["ok", "ballast/none/still/cpu"], ["ok", "ballast/bf16/still/cpu"],
    ]  # fmt: skip
    assert shown.endswith("\x1b[2K")  # nothing of the live line stays


def test_a_terminal_that_can_do_nothing_gets_plain_lines(folder: Path) -> None:
    shown = _in_a_terminal(folder, 80, TERM="dumb")
    assert "\x1b" not in shown
    assert [line.split()[:2] for line in shown.splitlines()] == [
        ["ok", "ballast/none/still/cpu"], ["ok", "ballast/bf16/still/cpu"],
    ]  # fmt: skip


class _Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def _second_case(clock: _Clock) -> progress.Display:
    """A display that has heard of a first case of 100 s and is 40 s into the second of four."""
    display = progress.Display(Console(file=io.StringIO()))
    display("start", {"of": 4})
    display("case", {"id": "llama-60m/none/forward/cpu", "number": 1, "of": 4})
    clock.now = 100
    display("record", {"status": "ok", "id": "llama-60m/none/forward/cpu", "duration_s": 100})
    display("case", {"id": "llama-60m/int8-weight-only/forward/cpu", "number": 2, "of": 4})
    display("memory", {"bytes": 700 * 2**20})
    display("baseline", {"bytes": 600 * 2**20})
    display("phase", {"phase": "evaluate"})
    display("memory", {"bytes": 731 * 2**20})
    display("memory", {"bytes": 610 * 2**20})
    clock.now = 140
    return display


@pytest.mark.parametrize(
    ("width", "name", "more"),
    [
        (120, "llama-60m/int8-weight-only/forward/cpu", " · 2:20 · ━━━━━───────────────"),
        (94, "llama-60m/int8-weight-only/forward/cpu", " · 2:20"),
        (80, "llama-60m/int8-weight-only/forward/cpu", ""),
        (70, "llama-60m/int8…ly/forward/cpu", ""),
        (60, "llama-60m…rward/cpu", ""),
    ],
)
def test_what_matters_is_shown_at_any_width(clock: _Clock, width: int, name: str, more: str) -> None:
    shown = _second_case(clock).line(width)
    assert shown == f"{name} · evaluate · 131.0 MiB · 1/4 · left 4:20{more}"
    assert len(shown) <= width


def test_making_a_model_ready_has_a_bar_and_a_time_of_its_own(clock: _Clock) -> None:
    display = _second_case(clock)
    display("case", {"id": "trained-tiny/none/forward/cpu", "number": 3, "of": 4})
    display("progress", {"what": "training trained-tiny", "done": 0, "total": 1200})
    clock.now += 30
    display("progress", {"what": "training trained-tiny", "done": 300, "total": 1200})
    clock.now += 10
    assert display.line(120) == "training trained-tiny · 300/1200 · left 1:20 · 3:00 · ━━━━━───────────────"
    display("phase", {"phase": "load"})
    assert display.line(120).startswith("trained-tiny/none/forward/cpu · load · 2/4 · left ")
