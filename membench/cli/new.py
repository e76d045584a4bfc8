"""``membench new``: write a package with a new plug-in."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from membench.cli.output import Verbs
from membench.errors import EXIT_OK
from membench.host.console import put

KINDS = ("technique", "model", "workload", "suite")


def add(verbs: Verbs) -> None:
    new = verbs.add_parser("new", help="write a package with a new plug-in, its tests and a suite")
    new.add_argument("kind", choices=KINDS)
    new.add_argument("name", help="its name in suites, such as half-linear; the package is then membench-half-linear")
    new.add_argument(
        "--into", metavar="FOLDER", type=Path, default=Path(), help="where to make its folder (default: here)"
    )
    new.set_defaults(do=_new)


def _new(arguments: argparse.Namespace) -> int:
    from membench.testing import skeletons

    folder, paths = skeletons.write(arguments.kind, arguments.name, arguments.into)
    for path in paths:
        put(str(folder / path))
    suite = arguments.name if arguments.kind == "suite" else f"{arguments.name}.toml"
    put(f"next: cd {shlex.quote(str(folder))} && pip install -e '.[test]' && pytest && membench run {suite}")
    return EXIT_OK
