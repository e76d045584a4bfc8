"""``membench run --script``: measure a user's program without changing it."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from membench.cli.output import print_table
from membench.errors import MembenchError, SuiteError
from membench.host.device import MOST_RANKS
from membench.report.table_formats import FORMATS

if TYPE_CHECKING:
    from membench import Suite
    from membench.running.rank import Tell


def add(run: argparse.ArgumentParser) -> None:
    """Add the options that name a program and its limits; its own arguments follow ``--``."""
    run.add_argument(
        "--script", metavar="FILE",
        help="measure this program, and the phases that it marks with membench.phase; its own arguments follow --",
    )  # fmt: skip
    run.add_argument("-m", dest="module", metavar="MODULE", help="like --script, for a module that python -m runs")
    run.add_argument(
        "--ranks", type=_ranks, metavar="N",
        help="with --script or -m: start N processes of the program, with the variables that torchrun sets",
    )  # fmt: skip
    run.add_argument(
        "--limit", action="append", default=[], metavar="METRIC=MOST",
        help="with --script or -m: a limit, such as peak_footprint=1GiB; can be given several times",
    )  # fmt: skip


def _ranks(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_RANKS:
        raise argparse.ArgumentTypeError(f"write a number from 1 to {MOST_RANKS}")
    return int(text)


def split_arguments(words: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Split a command line into membench's own words and those behind ``--``, which are the program's arguments."""
    if words[:1] == ["run"] and "--" in words:
        at = words.index("--")
        return list(words[:at]), list(words[at + 1 :])
    return list(words), None


def refuse_unknown_options(arguments: argparse.Namespace, unknown: Sequence[str]) -> None:
    """Refuse options that membench does not know, if the command line names a program that they may be meant for.

    Raises:
        MembenchError: if it does, and there are some.
    """
    program = None
    if arguments.verb == "run" and unknown:
        named = (("--script", arguments.script), ("-m", arguments.module))
        program = next((f"{option} {shlex.quote(value)}" for option, value in named if value is not None), None)
    if program is not None:
        raise MembenchError(
            f"membench run has no option '{unknown[0]}'; put -- before the program's own arguments:"
            f" membench run {program} -- {shlex.quote(unknown[0])}"
        )


def is_asked_for(arguments: argparse.Namespace) -> bool:
    """Return whether the command line names a program.

    Raises:
        MembenchError: if it names none and has an option that only programs take.
    """
    if arguments.script is not None or arguments.module is not None:
        return True
    if arguments.program_arguments is not None:
        raise MembenchError("what stands behind '--' is for a script: name it with --script FILE or -m MODULE")
    if arguments.ranks is not None:
        raise MembenchError("--ranks is for --script and -m; of a suite's cases the device says it, as in 2xcpu")
    if arguments.limit:
        raise MembenchError("--limit is for --script and -m; a suite has a table [limits]")
    if not arguments.suite:
        raise MembenchError("name a suite, or a program with --script FILE or -m MODULE")
    return False


def suite(arguments: argparse.Namespace) -> Suite:
    """Make the suite whose one case is the program on the command line.

    Raises:
        MembenchError: if the program cannot be started, or an option does not apply to programs.
    """
    import membench

    if arguments.script is not None and arguments.module is not None:
        raise MembenchError("--script FILE and -m MODULE name two programs; name one")
    option = "-m" if arguments.script is None else "--script"
    if arguments.suite:
        raise MembenchError(
            f"{option} runs one program, and '{arguments.suite[0]}' is a suite;"
            " what is for the program stands behind '--'"
        )
    for name, why in (
        ("resume", "goes on with a suite"),
        ("against_ref", "measures a suite; write one with a table [script]"),
        ("fail", "belongs to --against-ref GIT_REF"),
    ):
        if getattr(arguments, name):
            raise MembenchError(f"--{name.replace('_', '-')} {why}; it does not go with {option}")
    if len(arguments.device or ()) > 1:
        raise MembenchError(f"{option} runs on one --device")
    named = {"file": arguments.script} if arguments.script is not None else {"module": arguments.module}
    ranks = {} if arguments.ranks is None else {"ranks": arguments.ranks}
    device = (arguments.device or ["cpu"])[0]
    program = {**named, **ranks, "arguments": arguments.program_arguments or [], "device": device}
    name = Path(arguments.script).stem if arguments.script else arguments.module or ""
    try:
        return membench.Suite(
            re.sub(r"[^\w.-]+", "-", name)[:64] or "script",
            script=program, limits=_limits(arguments.limit), settings={"repeats": arguments.repeats or 1},
        )  # fmt: skip
    except SuiteError as error:
        _, _, wrong = str(error).partition(": ")
        wrong = wrong.replace("script.ranks = ", "--ranks ")
        raise MembenchError(wrong.replace(f"script.{next(iter(named))} = ", f"{option} ")) from None


def _limits(asked: Sequence[str]) -> dict[str, str]:
    limits = {}
    for text in asked:
        metric, sign, most = text.partition("=")
        if not sign or not metric or not most:
            raise MembenchError(f"--limit '{text}': write METRIC=MOST, such as peak_footprint=1GiB")
        limits[metric.strip()] = most.strip()
    return limits


@contextlib.contextmanager
def showing_progress(suite: Suite, form: str) -> Iterator[Tell]:
    """Show the progress of a suite's run, unless it runs a program, which writes to the terminal itself.

    If a program reads our output, what the measured program prints goes to standard error.
    """
    from rich.console import Console

    from membench.cli.progress import Display
    from membench.running.session import silent

    if not suite.runs_program:
        # With FORCE_COLOR the library believes in a terminal even where the output goes into a file.
        with Display(Console(stderr=True, force_terminal=sys.stderr.isatty())) as display:
            yield display
        return
    sys.stdout.flush()
    if not FORMATS[form].is_for_machines:
        yield silent
        return
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        yield silent
    finally:
        os.dup2(output, 1)
        os.close(output)


def print_phases(records: Sequence[Any], form: str) -> None:
    """Print a table of the phases that a program marked, and of the peaks of its ranks."""
    from membench.report import phase_table

    marked = [
        record for record in records
        if any(process.includes_interpreter for process in record.processes)
        and (len(record.processes) > 1 or any(phase.inside for phase in record.processes[0].phases))
    ]  # fmt: skip
    if marked and not FORMATS[form].is_for_machines:
        print_table(f"{phase_table.phases(marked, form)}\n", form)
