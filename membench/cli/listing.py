"""``membench list``: list plug-ins, suites, cases and options."""

from __future__ import annotations

import argparse

from membench.cli.output import Verbs
from membench.errors import EXIT_OK, MembenchError
from membench.host.console import put


def add(verbs: Verbs) -> None:
    listing = verbs.add_parser("list", help="list models, techniques, workloads, metrics, suites, or a suite's cases")
    listing.add_argument(
        "what",
        nargs="?",
        help="models, techniques, workloads, metrics or suites; a suite's name or path, for its cases;"
        " the name of a model, technique, workload or metric, for its options; contract, for the plug-in contract",
    )
    listing.add_argument(
        "plugin", nargs="?", help="after a suite: a plug-in's name, for its options; the suite's own files have more"
    )
    listing.set_defaults(do=_list)


def _list(arguments: argparse.Namespace) -> int:
    from membench.plugins import screen
    from membench.suite import catalog
    from membench.suite.loading import is_suite, load_suite

    # A kind first, then a suite, then a plug-in: what a name means must not depend on what is installed.
    if arguments.plugin is not None:
        if not is_suite(arguments.what):
            raise MembenchError(f"'{arguments.what}' is not a suite; write 'membench list SUITE NAME'")
        lines = catalog.details(arguments.plugin, load_suite(arguments.what).plugin_files)
    elif arguments.what is None or arguments.what in catalog.KINDS:
        lines = catalog.overview((arguments.what,) if arguments.what else catalog.KINDS)
    elif arguments.what == "contract":
        lines = screen.contract_lines()
    elif is_suite(arguments.what):
        lines = (case.id for case in load_suite(arguments.what).cases)
    else:
        lines = catalog.details(arguments.what)
    for line in lines:
        put(line)
    return EXIT_OK
