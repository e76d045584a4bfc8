"""One of two versions that are measured in turn: a process that lives in its version's folder and obeys over a pipe.

The program that compares the two starts it there, with its version's folders first on Python's path. It loads the
suite as it is there, opens a run's file, tells which cases there are, and measures one whenever it is told to. It reads
and writes a JSON object a line.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from membench.errors import EXIT_OK, MembenchError
from membench.host import console
from membench.host.import_guard import ON_PATH, ForeignCode, is_foreign
from membench.plugins import registry
from membench.protocol.case import Case, Plugin
from membench.protocol.requests import Checkouts
from membench.running.executors.local import LocalExecutor
from membench.running.session import Session
from membench.suite.loading import load_suite
from membench.suite.suite import Suite

_FOREIGN = f"{ForeignCode.__name__}: "
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def main() -> int:
    """Serve until standard input ends."""
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    orders = os.fdopen(os.dup(0), encoding="utf-8")
    # What a user's module prints when it is loaded must not be taken for a message, nor a program read our orders.
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def tell(event: str, details: Mapping[str, Any]) -> None:
        told.write(json.dumps({"event": event, **details}) + "\n")
        told.flush()

    def work() -> int:
        try:
            _serve(json.loads(orders.readline()), orders, tell)
        except MembenchError as error:
            tell("refused", {"message": str(error)})
            return error.exit_code
        return EXIT_OK

    return console.main(work)


def _serve(order: Mapping[str, Any], orders: TextIO, tell: Any) -> None:
    suite = load_suite(order["suite"], order["devices"]).with_repeats(order["repeats"])
    checkouts: Checkouts | None = None
    if order["not_from"]:
        checkouts = Checkouts(order["not_from"], order["root"])
        _refuse_foreign_code(suite, Path(order["not_from"]), Path(order["root"]))
    chosen = suite.cases if order["ids"] is None else suite.select(lambda case_id: case_id in order["ids"])
    if not chosen:
        tell("ready", {"path": None, "ids": []})
        return
    cases = {case.id: case for case in chosen}

    def tell_but_records(event: str, details: Mapping[str, Any]) -> None:
        if event != "record":  # that a case is done is told once it is known to be of this version
            tell(event, details)

    with Session(
        suite,
        chosen,
        Path(order["output"]),
        tell=tell_but_records,
        executor=LocalExecutor,
        code=order["code"],
        checkouts=checkouts,
    ) as session:
        tell("ready", {"path": str(session.path.resolve()), "ids": list(cases)})
        for line in orders:
            wanted = json.loads(line)
            record = session.measure(cases[wanted["id"]], wanted["repeat"])
            if record.status == "failed" and record.message and record.message.startswith(_FOREIGN):
                raise ForeignCode(record.message.removeprefix(_FOREIGN))
            tell("record", {"id": record.id, "status": record.status, "duration_s": record.duration_s})


def _refuse_foreign_code(suite: Suite, other: Path, own: Path) -> None:
    """Hold that no plug-in comes out of the folder of the other version; what else is imported, workers look at.

    Raises:
        ForeignCode: if one does: its name, and where it is.
    """
    for case in suite.cases:
        for what, file, remedy in _origins(case):
            if is_foreign(file, other, own):
                raise ForeignCode.of(what, other, remedy)


def _origins(case: Case) -> Iterator[tuple[str, Path, str]]:
    """What a case is made of, with the file that it is loaded from, and what to do if that is the wrong one."""
    if case.command:
        return  # its file is named relative to the suite
    for kind, plugin in case.plugins:
        family = registry.find(kind, plugin.use, plugin.files).loaded
        remedy = f"name {plugin.file.name} relative to the suite" if plugin.file else ON_PATH
        yield f"{kind} '{plugin.use}'", Path(inspect.getfile(family)), remedy
        for name in _functions(plugin):
            # Only the package is looked for: to import it may take seconds and much memory.
            found = importlib.util.find_spec(name.partition(":")[0].partition(".")[0])
            if found is not None and found.origin not in (None, "built-in", "frozen"):
                yield f"'{name}' of {kind} '{plugin.use}'", Path(str(found.origin)), ON_PATH


def _functions(plugin: Plugin) -> Iterator[str]:
    for value in plugin.options.values():
        if isinstance(value, str) and _FUNCTION.fullmatch(value):
            yield value


if __name__ == "__main__":
    sys.exit(main())
