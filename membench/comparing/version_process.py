"""The process that measures one of two versions, on request over a pipe.

``against_commit`` starts it in the version's folder, with the version's folders first on the import path. It loads that
version's suite, creates a run's file, reports its cases, and measures a case for each request. Requests and reports are
JSON, one object per line.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from membench.comparing.version_messages import (
    MeasureCase,
    Ready,
    Refused,
    SessionEvent,
    Setup,
    VersionMessage,
    decode,
    encode,
)
from membench.errors import EXIT_OK, MembenchError
from membench.host import console, import_path
from membench.host.import_guard import ON_PATH, ForeignCode, is_foreign
from membench.plugins import registry
from membench.protocol.case import Case, Plugin
from membench.protocol.requests import Checkouts
from membench.running import references
from membench.running.executors.executor import Opener
from membench.running.executors.local import LocalExecutor
from membench.running.session import Session, details_of
from membench.suite.loading import load_suite
from membench.suite.suite import Suite

_FOREIGN = f"{ForeignCode.__name__}: "
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def main() -> int:
    """Serve until standard input ends."""
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    # A user's module may print when it is loaded, and a program may read its input: keep both off these pipes.
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def send(message: VersionMessage) -> None:
        reports.write(encode(message))
        reports.flush()

    def work() -> int:
        try:
            setup = decode(requests.readline())
            assert isinstance(setup, Setup), "it comes first"
            _serve(setup, requests, send, LocalExecutor)
        except MembenchError as error:
            send(Refused(str(error)))
            return error.exit_code
        return EXIT_OK

    return console.main(work)


def _serve(
    setup: Setup, requests: TextIO, send: Callable[[VersionMessage], None], executor: Opener
) -> None:  # fmt: skip
    suite = load_suite(setup.suite, None if setup.devices is None else list(setup.devices))
    suite, ids = suite.with_repeats(setup.repeats), setup.ids
    if not setup.evaluates:
        suite = suite.without_held_out_text()
    checkouts: Checkouts | None = None
    if setup.not_from:
        checkouts = Checkouts(setup.not_from, setup.root)
        _refuse_other_checkout(suite, Path(setup.not_from), Path(setup.root))
    chosen = suite.cases if ids is None else suite.select(lambda case_id: case_id in ids)
    if not chosen:
        send(Ready(None, []))
        return
    cases = {case.id: case for case in chosen}

    def report_except_records(event: str, details: Mapping[str, Any]) -> None:
        if event != "record":  # a record is reported below, once it is certain that it measured this version
            send(SessionEvent(event, details))

    with (
        contextlib.ExitStack() as opened,
        Session(
            suite,
            chosen,
            Path(setup.output),
            tell=report_except_records,
            executor=executor,
            code=setup.code,
            checkouts=checkouts,
        ) as session,
    ):
        # Nothing goes on with such a run, however it ends.
        opened.callback(references.remove, session.path)
        send(Ready(str(session.path.resolve()), list(cases)))
        for line in requests:
            request = decode(line)
            assert isinstance(request, MeasureCase), "nothing else is asked for from here on"
            record = session.measure(cases[request.id], request.repeat)
            if record.status == "failed" and record.message and record.message.startswith(_FOREIGN):
                raise ForeignCode(record.message.removeprefix(_FOREIGN))
            send(SessionEvent("record", details_of(record)))


def _refuse_other_checkout(suite: Suite, other: Path, own: Path) -> None:
    """Refuse plug-ins from the other version's folder. Workers check all other modules that they import.

    Raises:
        ForeignCode: if there is one; the message has its name and path.
    """
    for case in suite.cases:
        for what, file, remedy in _origins(case):
            if is_foreign(file, other, own):
                raise ForeignCode.of(what, other, remedy)


def _origins(case: Case) -> Iterator[tuple[str, Path, str]]:
    """Yield the parts of a case: name, the file that it is loaded from, and what to do if that is the wrong one."""
    if case.command:
        return  # the program's file is relative to the suite
    for kind, plugin in case.plugins:
        family = registry.find(kind, plugin.use, plugin.files).loaded
        remedy = f"name {plugin.file.name} relative to the suite" if plugin.file else ON_PATH
        yield f"{kind} '{plugin.use}'", Path(inspect.getfile(family)), remedy
        for name in _functions(plugin):
            # Find the package without importing it, which may take seconds and much memory.
            found = importlib.util.find_spec(name.partition(":")[0].partition(".")[0])
            if found is not None and found.origin not in (None, "built-in", "frozen"):
                yield f"'{name}' of {kind} '{plugin.use}'", Path(str(found.origin)), ON_PATH


def _functions(plugin: Plugin) -> Iterator[str]:
    for value in plugin.options.values():
        if isinstance(value, str) and _FUNCTION.fullmatch(value):
            yield value


if __name__ == "__main__":
    import_path.add_current_folder()
    sys.exit(main())
