"""``membench run --against-ref``: another commit and what is here, measured in turn and judged."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from membench.cli import ci
from membench.errors import EXIT_CASES_FAILED, MembenchError

if TYPE_CHECKING:
    from membench import Suite

_ROUNDS = 5
"""Time is judged over three repeats or more; five tell it from chance more surely."""
_ROUNDS_MORE = 3


def run(arguments: argparse.Namespace, suite: Suite) -> int:
    """Measure both, print the comparison; the exit code: 0 fine, 1 regressed, 3 not to be compared.

    Raises:
        MembenchError: if there is nothing to compare with.
    """
    from rich.console import Console

    from membench import interleaving, selection
    from membench.progress import Display
    from membench.regression.measured import of_run
    from membench.regression.tolerances import Tolerances, parse_fail
    from membench.regression.verdict import judge
    from membench.report import checked, regression

    if arguments.resume:
        raise MembenchError("--resume goes on with one run; --against-ref measures two in turn, afresh")
    tolerances = Tolerances(suite=suite.tolerances, command_line=[parse_fail(text) for text in arguments.fail or ()])
    rounds = arguments.repeats or max(_ROUNDS, suite.settings.repeats)
    keep = selection.parse(arguments.expression) if arguments.expression else None
    with (
        Display(Console(stderr=True, force_terminal=sys.stderr.isatty())) as display,
        interleaving.Interleaved(
            suite.with_repeats(rounds),
            arguments.against_ref,
            ids=[case.id for case in suite.select(keep)] if keep else None,
            devices=arguments.device,
            output=arguments.output,
            tell=display,
        ) as both,
    ):
        head_name = "what is here" + (", with changes that are not committed" if both.is_changed else "")
        names = (f"{arguments.against_ref} ({both.commit[:12]})", head_name)

        def judged(sides: interleaving.Sides):  # type: ignore[no-untyped-def]
            base, head = (of_run(side, name) for side, name in zip(sides, names, strict=True))
            return judge(base, head, tolerances)

        sides = both.measure(rounds)
        judgement = judged(sides)
        if judgement.suspects:
            sides = both.measure(_ROUNDS_MORE, judgement.suspects)
            judgement = judged(sides)
    print(regression.table([judgement], arguments.format))
    for line in (*judgement.sentences(), f"kept in {sides.base.path} and {sides.head.path}"):
        print(line, file=sys.stderr if arguments.format in ("csv", "json") else sys.stdout)
    cases = checked.together(checked.of_records(suite.name, sides.head.records), checked.of_judgement(judgement))
    ci.write(
        arguments, f"{suite.name} against {arguments.against_ref}", cases, [regression.table([judgement], "github")]
    )
    if judgement.exit_code != EXIT_CASES_FAILED and any(record.broken_limits for record in sides.head.records):
        return EXIT_CASES_FAILED
    return judgement.exit_code
