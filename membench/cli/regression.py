"""``membench compare``, ``membench check`` and ``membench baseline``: compare a measurement with an earlier one."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from membench.cli import ci, rules, script
from membench.cli.interruption import TableIfInterrupted
from membench.cli.output import RESULTS, Verbs, add_format, print_remarks, print_table, remarks_stream
from membench.errors import EXIT_CANNOT_COMPARE, EXIT_OK, CannotCompare, MembenchError, one_line
from membench.host.console import put

if TYPE_CHECKING:
    from membench.records.metric import Metric
    from membench.records.run_file import Run
    from membench.regression.measured import Measured
    from membench.regression.verdict import Judgement
    from membench.suite.gates import Gate
    from membench.suite.tolerances import Tolerance

_WHAT = "a run's or a baseline's file, or the name of one in results"


def add(verbs: Verbs) -> None:
    """Add the three verbs to the command line's parser."""
    _add_compare(verbs)
    _add_check(verbs)
    _add_baseline(verbs)


def _add_compare(verbs: Verbs) -> None:
    compare = verbs.add_parser("compare", help="show measurements next to an earlier one: ratios, and what changed")
    compare.add_argument("base", help=_WHAT)
    compare.add_argument("new", nargs="+", help=_WHAT)
    _add_what_is_common(compare)
    compare.set_defaults(do=_compare)


def _add_check(verbs: Verbs) -> None:
    check = verbs.add_parser("check", help="compare; exit with 1 if something regressed, 3 if it cannot be compared")
    check.add_argument("new", help=f"{_WHAT}; or a suite to run, whose suspects are then measured again")
    check.add_argument(
        "--against", metavar="BASE", help=f"{_WHAT} (default: the baseline of the suite and this machine)"
    )
    add_fail(check)
    check.add_argument("--device", action="append", help="device to run a suite on, instead of its own devices")
    check.add_argument("--update", action="store_true", help="if nothing regressed, make this the baseline")
    _add_what_is_common(check)
    rules.add_allow_skipped(check)
    ci.add(check)
    check.set_defaults(do=_told)


def add_fail(verb: argparse.ArgumentParser, where: str = "") -> None:
    """Add the option that sets tolerances."""
    verb.add_argument(
        "--fail", action="append", default=[], metavar="[CASES:]METRIC:AMOUNT",
        help=f"{where}how much worse a metric may get: peak_live:2%%, peak_live:16MiB, 'llama-*:time:10%%', time:off",
    )  # fmt: skip


def _add_what_is_common(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("-k", dest="expression", help="only cases whose id matches, such as 'int8 and not train'")
    verb.add_argument(
        "--across-machines",
        action="store_true",
        help="judge figures that depend on the machine although machines differ",
    )
    verb.add_argument("--output", type=Path, default=RESULTS, help="folder of runs and of baselines/")
    add_format(verb)


def _add_baseline(verbs: Verbs) -> None:
    baseline = verbs.add_parser(
        "baseline", help="save, list, show and remove baselines, which later runs are compared with"
    )
    doing = baseline.add_subparsers(dest="action", required=True)
    save = doing.add_parser("save", help="save a run as a baseline")
    save.add_argument("name", nargs="?", help="default: SUITE@MACHINE-CLASS")
    save.add_argument("--run", help="a run's file or name (default: the newest)")
    save.set_defaults(do=_save)
    listing = doing.add_parser("list", help="list the baselines")
    listing.set_defaults(do=_list)
    show = doing.add_parser("show", help="print a baseline's figures")
    show.add_argument("name")
    add_format(show)
    show.set_defaults(do=_show)
    remove = doing.add_parser("remove", help="remove a baseline")
    remove.add_argument("name")
    remove.set_defaults(do=_remove)
    for each in (save, listing, show, remove):
        each.add_argument("--output", type=Path, default=RESULTS, help="folder of runs and of baselines/")


def _compare(arguments: argparse.Namespace) -> int:
    from membench.regression.judging import judge
    from membench.regression.sources import load, load_with_run
    from membench.suite.tolerances import Tolerances

    keep = _keep(arguments.expression)
    base = _only(load(arguments.base, arguments.output), keep)
    judgements = []
    for name in arguments.new:
        new, run = load_with_run(name, arguments.output)
        own, _ = _own_rules(new, run)
        judgements.append(judge(base, _only(new, keep), Tolerances(own), across_machines=arguments.across_machines))
    print_judgements(judgements, arguments.format)
    in_common = any(pair.base and pair.new for judgement in judgements for pair in judgement.pairs)
    return EXIT_OK if in_common else EXIT_CANNOT_COMPARE


def _told(arguments: argparse.Namespace) -> int:
    with ci.reporting_errors(arguments, "check", arguments.new):
        return _check(arguments)


def _check(arguments: argparse.Namespace) -> int:
    from membench.report import case_outcomes, regression
    from membench.suite.loading import is_suite

    ci.refuse_unwritable(arguments)
    if arguments.update and arguments.against and _baseline_named(arguments.against, arguments.output) is None:
        raise MembenchError(f"--update moves a baseline, and '{arguments.against}' is none")
    is_kept = arguments.new.endswith((".json", ".jsonl")) or not is_suite(arguments.new)
    if not is_kept:
        base, judgement, run, gates = _of_suite(arguments)
    else:
        if arguments.device:
            raise MembenchError("--device is for suites; a kept run has its devices")
        base, judgement, run, gates = _of_run(arguments)
    judgement = dataclasses.replace(judgement, allows_skipped=arguments.allow_skipped)
    print_judgements([judgement], arguments.format)
    is_of_file = run is None or "suite_tables" not in run.header
    if is_kept and is_of_file and any(change.repeats == 1 for change in judgement.regressions):
        what = f"'membench check {judgement.new.suite}'" if judgement.new.suite else "a check of its suite"
        print_remarks([f"each was measured once; {what} runs the suite and measures suspects again"], arguments.format)
    # A baseline has no records: its rules were checked when it was a run.
    kept = _keep(arguments.expression) if arguments.expression else None
    checked = rules.check(gates, _limits(run), run.records if run else (), kept)
    checked.print_gates(arguments.format)
    checked.print_limits(arguments.format)
    checked.print_unchecked(arguments.format, is_allowed=arguments.allow_skipped)
    code = checked.exit_code(judgement.exit_code, allows_skipped=arguments.allow_skipped)
    cases = case_outcomes.of_check(
        judgement,
        checked.records,
        checked.outcomes,
        idle_limits=checked.idle_limits,
        allows_skipped=arguments.allow_skipped,
    )
    ci.write(arguments, regression.summary(judgement), cases, [regression.table([judgement], "github")])
    if arguments.update:
        _update(base, judgement, arguments, code)
    return code


def _of_suite(arguments: argparse.Namespace) -> tuple[Measured, Judgement, Run | None, Sequence[Gate]]:
    """Run a suite and judge it; suspects are measured again."""
    from membench.comparing import checking
    from membench.regression import sources
    from membench.suite import selection
    from membench.suite.loading import load_suite
    from membench.suite.tolerances import Tolerances, parse_fail

    suite = load_suite(arguments.new, arguments.device)
    asked = [parse_fail(text, suite.own_metrics) for text in arguments.fail]
    keep = _keep(arguments.expression)
    if not suite.select(keep):
        raise selection.no_case_matches(arguments.expression)
    # Report everything that can be wrong before measuring.
    expected = checking.expected(suite)
    base = _only(_base(arguments, expected, sources), keep)
    tolerances = Tolerances(suite.tolerances, asked)
    _refuse_idle(asked, base, expected)
    begun = TableIfInterrupted(arguments.format)
    with begun, script.showing_progress(suite, arguments.format) as tell:
        run, judgement = checking.check(
            suite, base, tolerances, keep=keep, output=arguments.output, across_machines=arguments.across_machines,
            tell=begun.hearing(tell),
        )  # fmt: skip
    return base, dataclasses.replace(judgement, pairs=_kept_pairs(judgement, keep)), run, suite.gates


def _kept_pairs(judgement: Judgement, keep: Callable[[str], bool]) -> Any:
    """Leave out references that were measured only because the chosen cases are compared with them."""
    return tuple(pair for pair in judgement.pairs if keep(pair.id))


def _of_run(arguments: argparse.Namespace) -> tuple[Measured, Judgement, Run | None, Sequence[Gate]]:
    """Judge a kept run by the tolerances and gates of its suite."""
    from membench.regression import sources
    from membench.regression.judging import judge
    from membench.suite.tolerances import Tolerances, parse_fail

    keep = _keep(arguments.expression)
    measured, run = sources.load_with_run(arguments.new, arguments.output)
    base = _only(_base(arguments, measured, sources), keep)
    asked = [parse_fail(text, _own_metrics(measured, run)) for text in arguments.fail]
    own, gates = _own_rules(measured, run)
    _refuse_idle(asked, base, measured)
    judgement = judge(base, _only(measured, keep), Tolerances(own, asked), across_machines=arguments.across_machines)
    return base, judgement, run, gates


def _own_rules(measured: Measured, run: Run | None) -> tuple[Sequence[Tolerance], Sequence[Gate]]:
    """Return the tolerances and gates of a run's suite; a baseline does not store them."""
    from membench.suite.rules import rules_of

    return rules_of(run.header, _own_metrics(measured, run)) if run else ((), ())


def _limits(run: Run | None) -> Mapping[str, float]:
    """Return the limits of a run's suite; a baseline does not store them."""
    from membench.records.metrics import own_metrics
    from membench.suite import limits

    return limits.of_header(run.header, own_metrics(run.header.get("own_metrics", ()))) if run else {}


def _own_metrics(measured: Measured, run: Run | None) -> Sequence[Metric]:
    from membench.records.metrics import own_metrics

    if run:
        return own_metrics(run.header.get("own_metrics", ()))
    return own_metrics(field for case in measured.cases.values() for field in case.values)


def _base(arguments: argparse.Namespace, measured: Measured, sources: Any) -> Measured:
    found: Measured = (
        sources.load(arguments.against, arguments.output)
        if arguments.against
        else sources.baseline_for(measured, arguments.output)
    )
    return found


def _refuse_idle(asked: Sequence[Tolerance], *sides: Measured) -> None:
    from membench.suite.tolerances import Tolerances

    Tolerances(command_line=asked).refuse_unmatched([case_id for side in sides for case_id in side.cases])


def _keep(expression: str | None) -> Callable[[str], bool]:
    from membench.suite import selection

    return selection.parse(expression) if expression else lambda _: True


def _only(measured: Measured, keep: Callable[[str], bool]) -> Measured:
    cases = {case_id: case for case_id, case in measured.cases.items() if keep(case_id)}
    if measured.cases and not cases:
        raise CannotCompare(f"-k fits no case of {measured.name}")
    return dataclasses.replace(measured, cases=cases)


def print_judgements(judgements: Sequence[Judgement], form: str) -> None:
    """Print a comparison's table, and its remarks where ``remarks_stream`` says."""
    from membench.report import regression

    print_table(regression.table(judgements, form), form)
    put(file=remarks_stream(form))
    for judgement in judgements:
        print_remarks((*regression.remarks(judgement), regression.summary(judgement)), form)


def _update(base: Measured, judgement: Judgement, arguments: argparse.Namespace, code: int) -> None:
    """Replace the baseline, if everything is known to be fine.

    Raises:
        ResultsError: if cases from another machine would remain in it.
    """
    from membench.regression import baselines
    from membench.regression.sources import baseline_path

    named = arguments.against
    path = _baseline_named(named, arguments.output) if named else baseline_path(judgement.new, arguments.output)
    assert path is not None
    if code != EXIT_OK or judgement.undecided:
        why = "something failed or cannot be compared" if code != EXIT_OK else "some results are undecided"
        put(f"{path} stays as it is: {why}", file=sys.stderr)
        return
    baselines.write_into(judgement.new, path)
    put(f"{path} is moved to {judgement.new.name}", file=sys.stderr)


def _baseline_named(name: str, results: Path) -> Path | None:
    from membench.regression import baselines

    if name.endswith(".json"):
        return Path(name)
    folder = results / baselines.FOLDER.name
    return baselines.path_of(name, folder) if baselines.is_name(name) and name in baselines.names(folder) else None


def _save(arguments: argparse.Namespace) -> int:
    from membench.records.run_file import newest_run
    from membench.regression import baselines, sources
    from membench.regression.decision import said_of_few_times
    from membench.regression.timing import LEAST_REPEATS

    named = arguments.run or str(newest_run(arguments.output))
    measured = sources.load(named, arguments.output)
    folder = arguments.output / baselines.FOLDER.name
    path = baselines.path_of(arguments.name or baselines.default_name(measured), folder)
    is_there = path.is_file()
    baselines.write_anew(measured, path)
    put(f"{path}: {len(measured.cases)} cases of {measured.name}{', replacing the earlier one' if is_there else ''}")
    for case in measured.cases.values():
        if not case.is_measured:
            put(f"{case.id}: kept as {case.status}; later runs are not compared with it")
    kept = baselines.read(path)
    remedy = (
        f"repeats = {LEAST_REPEATS} in [settings] tells, or 'membench calibrate {kept.suite or 'SUITE'} {path.stem}'"
    )
    if all((case.stands_for.get("workload") or {}).get("use") == "script" for case in kept.cases.values()):
        remedy = f"--repeats {LEAST_REPEATS} tells"
    if said := said_of_few_times(kept, kept.cases, remedy):
        put(said)
    return EXIT_OK


def _list(arguments: argparse.Namespace) -> int:
    from membench.regression import baselines

    folder = arguments.output / baselines.FOLDER.name
    for name in baselines.names(folder):
        measured = baselines.read(baselines.path_of(name, folder))
        repeats = f"noise of {len(measured.noise.spreads)} cases known" if measured.noise.spreads else "noise not known"
        of = f"commit {measured.code}" if measured.code else "commit not known"
        put(one_line(f"{name}  {len(measured.cases)} cases  {measured.measured_at[:10]}  {of}  {repeats}"))
    return EXIT_OK


def _show(arguments: argparse.Namespace) -> int:
    from membench.regression import baselines
    from membench.report import regression

    found = baselines.named(arguments.name, arguments.output / baselines.FOLDER.name)
    print_table(regression.figures(found, arguments.format), arguments.format)
    return EXIT_OK


def _remove(arguments: argparse.Namespace) -> int:
    from membench.regression import baselines

    baselines.remove(arguments.name, arguments.output / baselines.FOLDER.name)
    return EXIT_OK
