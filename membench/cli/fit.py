"""``membench fit``: which stacks of techniques make a model fit."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from membench.cli.output import Verbs, add_format, print_remarks, print_table
from membench.errors import EXIT_CASES_FAILED, EXIT_OK, one_line
from membench.host.console import put
from membench.units import format_bytes

_SHOWN = 12


def add(verbs: Verbs) -> None:
    fit = verbs.add_parser("fit", help="find the stacks of techniques that make a model fit")
    fit.add_argument("model", help="its name, a config.json of transformers or its folder, or module:function")
    fit.add_argument("--device", help="such as RTX-4090 or 8xH100-80GB")
    fit.add_argument("--memory", help="of one device instead, such as 24GB; 8x80GB: of each of eight")
    fit.add_argument("--workload", choices=("train", "forward", "generate"), default="train")
    fit.add_argument("--batch-size", type=int, help="rows of a step over all devices (default: one a device)")
    fit.add_argument("--length", type=int, help="tokens of a sequence, or of prompt and reply (default: 2048)")
    fit.add_argument("--free", choices=("batch", "context"), help="what may grow as long as it fits (default: batch)")
    fit.add_argument("--why", metavar="STACK", help="say what a stack needs, and what keeps it from fitting")
    fit.add_argument(
        "--runs", metavar="FOLDER", type=Path, help="kept runs that know what techniques cost (default: results)"
    )
    fit.add_argument("--all", action="store_true", help="show all stacks that were tried, too large ones too")
    add_format(fit)
    fit.set_defaults(do=_fit)


def _fit(arguments: argparse.Namespace) -> int:
    from membench.estimating import answers
    from membench.estimating.fit import fit
    from membench.estimating.why import why

    asked = {
        "device": arguments.device, "memory": arguments.memory, "workload": arguments.workload,
        "batch_size": arguments.batch_size, "length": arguments.length,
    }  # fmt: skip
    if arguments.why:
        reasons = why(arguments.model, arguments.why, **asked)
        print_table(answers.breakdown(reasons, arguments.format), arguments.format)
        print_remarks(answers.reasons(reasons), arguments.format)
        return EXIT_OK if reasons.left_bytes >= 0 else EXIT_CASES_FAILED
    folder = arguments.runs or Path("results")
    runs = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    found = fit(arguments.model, **asked, free=arguments.free, runs=runs, tell=_Progress())
    print_table(answers.table(found, arguments.format, None if arguments.all else _SHOWN), arguments.format)
    print_remarks(answers.remarks(found, has_runs=bool(runs)), arguments.format)
    return EXIT_OK if found.fitting else EXIT_CASES_FAILED


class _Progress:
    """Prints how far a search is to standard error: each tenth of it, and each stack better than those before."""

    def __init__(self) -> None:
        self._said, self._best, self._began = 0, "", time.monotonic()

    def __call__(self, event: str, details: Mapping[str, Any]) -> None:
        if event != "searching":
            self._print(f"{event} {details['stack']}")
            return
        best = details["best"]
        name = best.stack if best else ""
        tried, of = details["tried"], details["of"]
        if tried < of and tried - self._said < of / 10 and name == self._best:
            return
        self._said, self._best = tried, name
        so_far = f"; best so far {name}: {format_bytes(best.needed_bytes)} a device" if best else ""
        self._print(f"{tried} of {of} stacks tried, {details['fits']} fit{so_far}")

    def _print(self, line: str) -> None:
        put(one_line(f"{time.monotonic() - self._began:5.0f} s  {line}"), file=sys.stderr)
