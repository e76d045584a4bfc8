"""What others wrote never steers a terminal, a CI service or a page, whichever verb prints it."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from membench import cli
from membench.cli.progress import Display
from membench.errors import one_line
from membench.host import console
from membench.records.encoding import as_json
from membench.records.record import Record
from membench.records.run_file import read_run
from membench.report import formats, markdown, table_formats

from .made_up import MIB, process, record, run

_NAMES = (
    "::error title=forged::all is lost",
    "  ::warning::forged",
    "##[error]forged",
    "a ##vso[task.setvariable variable=x]forged",
    "one\n::error::forged\r::error::forged\u2028::error::forged",
    "\x1b[2J\x1b]0;title\x07\x9b31m\u202egnp.exe\u200b",
    "<img src=x onerror=alert(1)><script>alert(1)</script>",
    "[link](https://example.invalid) ![picture](x) <https://example.invalid>",
    "[ref]: https://example.invalid",
    "https://example.invalid www.example.invalid mail@example.invalid",
    "@octocat and @github/team, see #1 and GH-1",
    "`code` ``` ~~gone~~ **bold** _slanted_ *one* &lt;b&gt; \\",
    "# heading",
    "- item",
    "    code",
    "--- | ---",
    "=HYPERLINK(1)",
)  # fmt: skip
# TOML has no control characters.
_TEXT = "[suite]\nname = 'hostile'\ndescription = '''\n{}\n'''\n".format("\n".join(map(one_line, _NAMES)))
_FORGED = re.compile(r"^\s*::|##\w*\[")
_OWN_COMMAND = re.compile(r"::(error|warning) title=membench%3A [^:]*::")


def _spoilt(name: str, technique: str) -> Record:
    named = one_line(name)  # of a test function, whose names may have any sign that is printed
    made = record(
        technique,
        named,
        model=named,
        peak_live_bytes=2 * MIB,
        held_live_bytes=MIB,
        step_median_s=1.0,
        weights_bytes=MIB,
    )
    read = {"role": name, "rank": 0, "breakdown_bytes": {name: {name: MIB}}, "peak_part": name,
            "phases": [{"name": name, "allocator": name, "duration_s": 1.0, "live_peak_bytes": MIB}]}  # fmt: skip
    return dataclasses.replace(
        made, id=one_line(made.id), remarks=(name,), notes=(name,), broken_limits=(name,), reasons={"disk_bytes": name},
        processes=(process(**read),), machine={"processor": name}, settings={},
    )  # fmt: skip


def _ended_badly(name: str) -> Record:
    return dataclasses.replace(
        _spoilt(name, "bad"), status="failed", ended_in=name, message=name, metrics={}, output_tail=f"{name}\n{name}\n"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs of which every text is hostile, and a baseline of each."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "results" / "baselines").mkdir(parents=True)
    records = [
        made for name in _NAMES for made in (_spoilt(name, "none"), _spoilt(name, f"{name}"), _ended_badly(name))
    ]
    worse = [
        made if made.technique == "none" else dataclasses.replace(
            made, metrics={field: 2 * (value or 0) for field, value in made.metrics.items()}
        )
        for made in records
    ]  # fmt: skip
    for name, made in (("base", records), ("worse", worse), ("less", worse[:-4])):
        told = run(
            made, run=_NAMES[4], suite="hostile", suite_text=_TEXT, suite_sha256="0",
            devices=["cpu"], machine={"processor": f"{name} {_NAMES[5]}", "packages": {_NAMES[2]: _NAMES[0]}},
        )  # fmt: skip
        lines = [told.header, *map(as_json, made)]
        (folder / "results" / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


_TABLES = [
    *(["show", "results/base.jsonl", *more, "--format", form]
      for form in table_formats.FORMATS for more in ([], ["--phases"], ["--explain"])),
    *([verb, *runs, "--across-machines", "--format", form]
      for form in table_formats.FORMATS
      for verb, runs in (
          ("compare", ["results/base.jsonl", "results/worse.jsonl", "results/less.jsonl"]),
          ("check", ["results/worse.jsonl", "--against", "results/base.jsonl", "--annotations"]),
      )),
    *(["baseline", "show", "kept", "--format", form] for form in table_formats.FORMATS),
]  # fmt: skip
_OTHERS = [
    *(["report", "results/base.jsonl", "--format", form] for form in formats.REPORTS),
    *(["plot", "results/base.jsonl", kind, "-o", "picture.svg"] for kind in formats.PICTURES),
    *(["export", form, "results/base.jsonl"] for form in formats.EXPORTS),
    ["advise", "results/base.jsonl", "--budget", "1MiB"],
    ["advise", "results/base.jsonl", "--budget", "8GiB"],
    ["check", "results/less.jsonl", "--against", "results/base.jsonl"],
    ["show", "results/base.jsonl", "-k", "nothing"],
    ["baseline", "save", "again", "--run", "results/worse.jsonl"],
    ["baseline", "list"],
    ["baseline", "remove", "kept"],
    ["run", "own.toml"],
    ["run", "own.toml", "--dry-run"],
    ["calibrate", "own.toml", "--repeats", "2"],
    ["check", "own.toml", "--against", "results/base.jsonl"],
    ["list"],
    ["list", "suites"],
    ["list", "own.toml"],
    ["list", "own.toml", "odd"],
]


_OWN = f"""\
from membench.plugins import Technique


class Odd(Technique):
    __doc__ = {(chr(10) * 2).join(_NAMES)!r}

    text: str = {_NAMES[5]!r}

    def apply(self, module, context):
        print({chr(10).join(_NAMES)!r})
        raise RuntimeError({_NAMES[5]!r} + "##[error]")
"""
_SUITE = f"""\
[suite]
name = "own"
description = {json.dumps(_NAMES[0])}
[matrix]
model = ["small"]
technique = ["odd"]
workload = ["still"]
[model.small]
use = "ballast"
mib = 8
[workload.still]
use = "burst"
mib = 0
[settings]
threads = 1
measured_steps = 1
"""


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own with the hostile runs, a baseline, a suite and plug-ins beside it."""
    (tmp_path / "results" / "baselines").mkdir(parents=True)
    (tmp_path / "suites").mkdir()
    for path in (folder / "results").glob("*.jsonl"):
        (tmp_path / "results" / path.name).write_bytes(path.read_bytes())
    for name in ("own.toml", "suites/own.toml"):
        (tmp_path / name).write_text(_SUITE)
    (tmp_path / "membench_plugins.py").write_text(_OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert cli.main(["baseline", "save", "kept", "--run", "results/base.jsonl"]) == 0
    return tmp_path


@pytest.mark.parametrize("words", [*_TABLES, *_OTHERS], ids=" ".join)
@pytest.mark.usefixtures("here")
def test_no_verb_prints_what_steers_a_terminal_or_a_ci_service(
    words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(SystemExit):
        capfd.readouterr()
        cli.main(words)
    output, errors = capfd.readouterr()
    is_page = words[0] == "report" and words[-1] == "html"
    for line in (output + errors).replace("\r\n", "\n").split("\n"):
        assert is_page or line.replace("\t", " ").isprintable(), repr(line)
        assert not _FORGED.search(line) or _OWN_COMMAND.match(line), repr(line)
    assert not _FORGED.search(output)
    if words[0] == "run" and len(words) == 2:
        assert "failed in apply: RuntimeError" in output  # it is measured, and its message is printed


class _Read(HTMLParser):
    """The tags of a page, and the pieces of text that are not code."""

    def __init__(self, written: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.shown = ""
        self._in_code = 0
        self.feed(written)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._in_code += tag == "code"

    def handle_endtag(self, tag: str) -> None:
        self._in_code -= tag == "code"

    def handle_data(self, data: str) -> None:
        self.shown += data
        if not self._in_code:
            self.texts.append(data)


def _rendered(written: str) -> _Read:
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    return _Read(parser.render(written))


_ALLOWED = {"p", "ul", "li", "h1", "pre", "table", "thead", "tbody", "tr", "th", "td", "code"}


@pytest.mark.parametrize(
    "words",
    [words for words in _TABLES if words[-1] == "github"] + [["report", "results/base.jsonl", "--format", "md"]],
    ids=" ".join,
)
@pytest.mark.usefixtures("here")
def test_in_markdown_tables_and_the_lines_below_them_hold_no_html_no_link_and_no_mention(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    cli.main(words)
    read = _rendered(capsys.readouterr().out)
    assert read.tags <= _ALLOWED
    for text in read.texts:
        assert not re.search(r"(?<!\w)@\w", text), text
    if "--phases" not in words:
        assert "@octocat and @github/team" in read.shown


@pytest.mark.parametrize("name", _NAMES)
def test_a_line_that_markdown_would_change_is_shown_as_code(name: str) -> None:
    told = markdown.verbatim(name)
    read = _rendered(f"a line before it\n{told}\nand one after it\n")
    assert read.tags <= {"p", "code"}
    assert " ".join(one_line(name).split()) in " ".join(read.shown.split())


@pytest.mark.parametrize(
    "line",
    [
        "bf16: saved peak_live ×0.50 to ×0.62, weights ×0.50; cost KL 1.1e-05 nats",
        "own/none/forward/cpu: weights 513.0 KiB → 1.001 MiB (+99.8%, ×1.998 [1.9, 2.1]), at most +2.00% is allowed",
        "kept in results/quickstart@2-cores-epyc.jsonl",
        "nothing was measured: every case was skipped",
        "a/b+c/d/cuda:0: broken: worst_piece <= reference + 0.1 (2.1 <= 2.0)",
    ],
)
def test_a_harmless_line_stays_as_it_is(line: str) -> None:
    assert markdown.verbatim(line) == line == console.harmless(line)


@pytest.mark.parametrize("path", sorted(Path(formats.__file__).parents[2].joinpath("results").glob("*.jsonl")), ids=str)
def test_what_is_printed_of_a_kept_run_stays_as_it_is(path: Path) -> None:
    from membench.report import savings, text

    records = read_run(path).records
    for line in (*text.remarks(records), *savings.verdicts(records), text.comparison(records)):
        assert console.harmless(line) == line


@pytest.mark.parametrize("name", _NAMES)
def test_the_progress_of_a_run_steers_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    import rich.console

    display = Display(rich.console.Console(width=500))
    display("progress", {"what": name, "done": 1, "total": 2})
    display._said_at = -1000.0
    display("progress", {"what": name, "done": 1, "total": 2})
    display("record", {"status": "ok", "id": name, "duration_s": 1.0})
    told = capsys.readouterr().out
    assert len(told.splitlines()) == 2
    assert not any(_FORGED.search(line) or not line.isprintable() for line in told.splitlines())


def test_the_verbs_print_by_one_function() -> None:
    package = Path(cli.__file__).parent
    calls = [
        f"{path.name}: {ast.unparse(node)}"
        for path in (*package.glob("*.py"), *package.parent.joinpath("doctor").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    ]
    # A page's scripts must stay as they are.
    assert calls == ["report.py: print(without_commands(made, FORMATS[form].coded))"]


@pytest.mark.usefixtures("here")
def test_a_program_that_reads_json_gets_every_name_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["show", "results/base.jsonl", "--format", "json"]) == 0
    cases = [row["case"] for row in json.loads(capsys.readouterr().out)]
    assert sorted(cases) == sorted(record.id for record in read_run("results/base.jsonl").records)
