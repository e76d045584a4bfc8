"""``membench calibrate``: measure the noise of this machine."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from membench.cli.interruption import TableIfInterrupted
from membench.cli.output import RESULTS, Verbs, add_format, print_remarks, print_table, remarks_stream
from membench.errors import EXIT_CASES_FAILED, EXIT_OK, CannotCompare, MembenchError
from membench.host.console import put

if TYPE_CHECKING:
    from membench import Suite
    from membench.regression.measured import Measured


def add(verbs: Verbs) -> None:
    calibrate = verbs.add_parser("calibrate", help="measure how much runs of the same code differ on this machine")
    calibrate.add_argument("suite", help="a suite's name or path")
    calibrate.add_argument(
        "name", nargs="?", help="name of the baseline to store the noise in (default: SUITE@MACHINE-CLASS)"
    )
    calibrate.add_argument("--repeats", type=_repeats, default=5, help="how often to measure each case (default: 5)")
    calibrate.add_argument("-k", dest="expression", help="only cases whose id matches, such as 'int8 and not train'")
    calibrate.add_argument(
        "--device", action="append", help="device to use instead of the suite's: cpu, cuda, cuda:0, 2xcpu"
    )
    calibrate.add_argument("--output", type=Path, default=RESULTS, help="folder for the run's file and for baselines")
    add_format(calibrate)
    calibrate.set_defaults(do=_calibrate)


def _repeats(text: str) -> int:
    if not text.isdecimal() or not 2 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError("noise shows from two repeats on; write a number from 2 to 1000")
    return int(text)


def _calibrate(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    import membench
    from membench.cli.progress import Display
    from membench.comparing.calibrating import calibrate
    from membench.regression import baselines
    from membench.regression.measured import of_run
    from membench.regression.noise import RUNS_FOR_TIMES, Noise
    from membench.report import noise as report
    from membench.suite import selection

    suite = membench.load_suite(arguments.suite, arguments.device)
    keep = selection.parse(arguments.expression) if arguments.expression else lambda _: True
    if not suite.select(keep):
        raise selection.no_case_matches(arguments.expression)
    path, kept = _baseline(arguments, suite)
    begun = TableIfInterrupted(arguments.format)
    with begun, Display(Console(stderr=True, force_terminal=sys.stderr.isatty())) as display:
        run = calibrate(suite, arguments.repeats, keep=keep, output=arguments.output, tell=begun.hearing(display))
    noise = Noise.of_records(run.records)
    print_table(report.table(run.records, noise, arguments.format), arguments.format)
    if not noise.spreads:
        raise MembenchError(f"no case ended well twice, so no noise can be estimated; see {run.path}")
    # The noise of other cases is kept; that of these cases is replaced.
    spreads = {**(kept.noise.spreads if kept else {}), **noise.spreads}
    baselines.write(dataclasses.replace(kept or of_run(run), noise=Noise(spreads)), path)
    put(file=remarks_stream(arguments.format))
    remarks = [
        f"each case was measured {arguments.repeats} times, each time out of a fork server of its own",
        "range: the highest less the lowest; noise: three standard deviations of the difference of two runs, estimated"
        " from it: no tolerance of memory is below that, and no time that changed by less is called slower",
        f"kept in {path}" + (", whose figures are as they were" if kept else ", which is a baseline of this code"),
        f"measured in {run.path}",
    ]
    if arguments.repeats < RUNS_FOR_TIMES:
        remarks.append(f"with less than {RUNS_FOR_TIMES} repeats the noise of times stays unknown")
    print_remarks(remarks, arguments.format)
    return EXIT_CASES_FAILED if any(record.status not in ("ok", "skipped") for record in run.records) else EXIT_OK


def _baseline(arguments: argparse.Namespace, suite: Suite) -> tuple[Path, Measured | None]:
    """Return where to store the noise, and the baseline that is stored there already. Called before measuring.

    Raises:
        MembenchError: if that belongs to another suite, or is not a baseline.
        CannotCompare: if that belongs to a machine whose times cannot be compared with this one's.
    """
    from membench.comparing import checking
    from membench.regression import baselines
    from membench.regression.machines import differences

    here = checking.expected(suite)
    path = baselines.path_of(arguments.name or baselines.default_name(here), arguments.output / baselines.FOLDER.name)
    if not path.exists():
        return path, None
    kept = baselines.read(path)
    if kept.suite != suite.name:
        raise MembenchError(f"{path}: is a baseline of suite '{kept.suite}', not of '{suite.name}'")
    for difference in differences(kept.machine, here.machine):
        if "time" in difference.bars(here.on_gpu):
            raise CannotCompare(f"{path}: is of another machine ({difference}), whose noise does not apply here")
    return path, kept
