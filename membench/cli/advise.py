"""``membench advise``: name the technique that fits a memory budget."""

from __future__ import annotations

import argparse
from pathlib import Path

from membench.cli.output import Verbs
from membench.errors import EXIT_CASES_FAILED, EXIT_OK, MembenchError
from membench.host.console import put


def add(verbs: Verbs) -> None:
    advise = verbs.add_parser(
        "advise", help="name the measured stack that fits a budget and loses least quality (exit code 1 if none fits)"
    )
    advise.add_argument("run", type=Path)
    advise.add_argument("--budget", required=True, help="memory above the worker's baseline, such as 8GiB")
    advise.add_argument(
        "--max-quality-loss", help="such as 1%%: a share of bits per byte, or percentage points of accuracy"
    )
    advise.set_defaults(do=_advise)


def _advise(arguments: argparse.Namespace) -> int:
    import membench
    from membench.report import advice
    from membench.units import parse_bytes, parse_percent

    try:
        budget_bytes = parse_bytes(arguments.budget)
    except ValueError as error:
        raise MembenchError(f"--budget: {error}") from None
    try:
        most = parse_percent(arguments.max_quality_loss) if arguments.max_quality_loss else None
    except ValueError as error:
        raise MembenchError(f"--max-quality-loss: {error}") from None
    run = membench.read_run(arguments.run)
    if not run.records:
        raise MembenchError(f"{run.path}: no case was finished: there is nothing to advise from")
    given = advice.advise(run.records, budget_bytes, most)
    for line in advice.lines(run.records, given):
        put(line)
    return EXIT_OK if all(one.technique for one in given) else EXIT_CASES_FAILED
