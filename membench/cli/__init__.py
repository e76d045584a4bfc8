"""The command line. Each verb has a file, which parses its options and calls the packages that do the work."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence

from membench.cli import (
    advise,
    calibrate,
    doctor,
    estimate,
    export,
    fit,
    listing,
    merge,
    new,
    regression,
    report,
    run,
    script,
    show,
)  # fmt: skip
from membench.host import console

# In the order in which the help shows them.
_VERBS = (run, merge, estimate, fit, listing, show, report, advise, regression, calibrate, export, new, doctor)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="membench", description="Measure what memory-saving techniques really save.")
    version = importlib.metadata.version("membench")
    parser.add_argument("--version", action="version", version=f"membench {version}")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in _VERBS:
        verb.add(verbs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit code.

    0: fine; 1: a case failed, broke a limit or a gate, or regressed; 2: bad input; 3: cannot compare, or a limit or a
    gate was not checked because its case was skipped or its figure is not known; 130: interrupted.
    """

    def work() -> int:
        words, program_arguments = script.split_arguments(sys.argv[1:] if argv is None else argv)
        parser = _parser()
        arguments, unknown = parser.parse_known_args(words)
        script.refuse_unknown_options(arguments, unknown)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        arguments.program_arguments = program_arguments
        code: int = arguments.do(arguments)
        return code

    return console.main(work)
