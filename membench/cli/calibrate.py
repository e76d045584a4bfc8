"""``membench calibrate``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from membench.cli.output import RESULTS, Verbs, beside
from membench.errors import EXIT_CASES_FAILED, EXIT_OK, MembenchError

_FORMATS = ("simple", "github", "csv", "json")


def add(verbs: Verbs) -> None:
    calibrate = verbs.add_parser("calibrate", help="measure how far apart runs of the same code are on this machine")
    calibrate.add_argument("suite", help="a suite's name or path")
    calibrate.add_argument("--repeats", type=_repeats, default=5, help="how often each case is measured (5)")
    calibrate.add_argument("-k", dest="expression", help="only cases whose id fits, such as 'int8 and not train'")
    calibrate.add_argument("--device", action="append", help="in place of the suite's devices: cpu, cuda, cuda:0")
    calibrate.add_argument("--output", type=Path, default=RESULTS, help="folder of the run's file and of baselines")
    calibrate.add_argument("--format", choices=_FORMATS, default=_FORMATS[0])
    calibrate.set_defaults(do=_calibrate)


def _repeats(text: str) -> int:
    if not text.isdecimal() or not 2 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError("noise shows from two repeats on; write a number from 2 to 1000")
    return int(text)


def _calibrate(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    import membench
    from membench import selection
    from membench.calibrating import calibrate
    from membench.progress import Display
    from membench.regression import baselines, sources
    from membench.regression.measured import of_run
    from membench.regression.noise import Noise
    from membench.report import noise as report

    suite = membench.load_suite(arguments.suite, arguments.device)
    keep = selection.parse(arguments.expression) if arguments.expression else lambda _: True
    if not suite.select(keep):
        raise selection.fits_nothing(arguments.expression)
    with Display(Console(stderr=True, force_terminal=sys.stderr.isatty())) as display:
        run = calibrate(suite, arguments.repeats, keep=keep, output=arguments.output, tell=display)
    noise = Noise.of_records(run.records)
    print(report.table(run.records, noise, arguments.format))
    if not noise.spreads:
        raise MembenchError(f"no case ended well twice, so nothing is known of its noise; see {run.path}")
    measured = of_run(run)
    path = sources.baseline_path(measured, arguments.output)
    is_new = not path.exists()
    # What other cases showed before stays; of these, what was measured last counts.
    kept = measured if is_new else baselines.read(path)
    spreads = {**({} if is_new else kept.noise.spreads), **noise.spreads}
    baselines.write(dataclasses.replace(kept, noise=Noise(spreads)), path)
    for line in (
        "",
        f"each case was measured {arguments.repeats} times, each time out of a fork server of its own",
        "range: the highest less the lowest; noise: three standard deviations of the difference of two runs, estimated"
        " from it: no tolerance is below that",
        f"kept in {path}" + (", which is a baseline of this code" if is_new else ", whose figures are as they were"),
        f"measured in {run.path}",
    ):
        print(line, file=beside(arguments.format))
    return EXIT_CASES_FAILED if any(record.status not in ("ok", "skipped") for record in run.records) else EXIT_OK
