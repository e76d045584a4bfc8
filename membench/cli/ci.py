"""What verbs that check something write for CI services, beside their own output."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from membench.errors import MembenchError, ResultsError

if TYPE_CHECKING:
    from membench.report.case_outcomes import CheckedCase


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``write`` reads."""
    parser.add_argument("--summary", type=Path, metavar="FILE", help="append Markdown to it: $GITHUB_STEP_SUMMARY")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write JUnit XML to it")
    parser.add_argument(
        "--annotations", action=argparse.BooleanOptionalAction, default=os.environ.get("GITHUB_ACTIONS") == "true",
        help="print what failed as GitHub's annotations (by default where GITHUB_ACTIONS is true)",
    )  # fmt: skip


def write(arguments: argparse.Namespace, heading: str, cases: Sequence[CheckedCase], tables: Sequence[str]) -> None:
    """Write all that is asked for.

    Args:
        heading: of the summary.
        tables: in Markdown.

    Raises:
        ResultsError: if a file cannot be written.
    """
    from membench.report import github, junit

    if arguments.annotations:
        for line in github.workflow_commands(cases):
            print(line, file=sys.stderr)  # GitHub looks there, too; what is printed may be read by a machine
    if arguments.summary:
        _write(arguments.summary, "a", github.summary(heading, cases, tables))
    if arguments.junit:
        _write(arguments.junit, "w", junit.document(cases))


@contextlib.contextmanager
def telling(arguments: argparse.Namespace, verb: str, subject: str) -> Iterator[None]:
    """Write all that is asked for also if what is done here ends before anything can be judged: then it says why.

    Args:
        subject: what the verb was given.
    """
    try:
        yield
    except (MembenchError, KeyboardInterrupt) as error:
        with contextlib.suppress(ResultsError):  # that a file cannot be written may be what is wrong
            write(arguments, f"membench {verb} {subject}", [unfinished(subject, str(error) or "interrupted")], [])
        raise


def unfinished(subject: str, reason: str) -> CheckedCase:
    """What stands for all that was not done."""
    from membench.report.case_outcomes import CheckedCase

    return CheckedCase(subject, "all that was asked for", "unfinished", (reason,))


def refuse_unwritable(arguments: argparse.Namespace) -> None:
    """Find out before anything is measured whether the files can be written. No empty one is left.

    Raises:
        ResultsError: if one cannot.
    """
    for path in filter(None, (arguments.summary, arguments.junit)):
        is_new = not path.exists()
        _write(path, "a", "")
        if is_new:
            path.unlink()


def _write(path: Path, mode: str, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, mode, encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError as error:
        raise ResultsError(f"{path}: cannot be written: {error.strerror}") from None
