"""What verbs that check something write for CI services, beside their own output."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from membench.errors import ResultsError

if TYPE_CHECKING:
    from membench.report.checked import CheckedCase


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


def refuse_unwritable(arguments: argparse.Namespace) -> None:
    """Find out before anything is measured whether the files can be written.

    Raises:
        ResultsError: if one cannot.
    """
    for path in filter(None, (arguments.summary, arguments.junit)):
        _write(path, "a", "")


def _write(path: Path, mode: str, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, mode, encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError as error:
        raise ResultsError(f"{path}: cannot be written: {error.strerror}") from None
