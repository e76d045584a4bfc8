"""Output for CI services: the options of verbs that check something, and the files that they write."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from membench.errors import MembenchError, ResultsError
from membench.host.console import put_workflow_command

if TYPE_CHECKING:
    from membench.report.case_outcomes import CheckedCase


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``write`` reads."""
    parser.add_argument(
        "--summary",
        type=Path,
        metavar="FILE",
        help="append a Markdown summary to this file, such as $GITHUB_STEP_SUMMARY",
    )
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write JUnit XML to this file")
    parser.add_argument(
        "--annotations", action=argparse.BooleanOptionalAction, default=os.environ.get("GITHUB_ACTIONS") == "true",
        help="print failures as GitHub annotations (default where GITHUB_ACTIONS is true)",
    )  # fmt: skip


def write(arguments: argparse.Namespace, heading: str, cases: Sequence[CheckedCase], tables: Sequence[str]) -> None:
    """Write the outputs that the options ask for.

    Args:
        heading: of the summary.
        tables: in Markdown.

    Raises:
        ResultsError: if a file cannot be written.
    """
    from membench.report import github, junit

    if arguments.annotations:
        for line in github.workflow_commands(cases):
            put_workflow_command(line)
    if arguments.summary:
        _write(arguments.summary, "a", github.summary(heading, cases, tables))
    if arguments.junit:
        _write(arguments.junit, "w", junit.document(cases))


@contextlib.contextmanager
def reporting_errors(arguments: argparse.Namespace, verb: str, subject: str) -> Iterator[None]:
    """Write the outputs even if the work in this context fails before anything is judged; they then give the reason.

    Args:
        subject: the verb's arguments.
    """
    try:
        yield
    except (MembenchError, KeyboardInterrupt) as error:
        with contextlib.suppress(ResultsError):  # the error may be that a file cannot be written
            write(arguments, f"membench {verb} {subject}", [unfinished(subject, str(error) or "interrupted")], [])
        raise


def unfinished(subject: str, reason: str) -> CheckedCase:
    """Make one entry for everything that was not done."""
    from membench.report.case_outcomes import CheckedCase

    return CheckedCase(subject, "all that was asked for", "unfinished", (reason,))


def refuse_unwritable(arguments: argparse.Namespace) -> None:
    """Check before measuring that the files can be written, without leaving an empty one behind.

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
