"""Measure another commit and the current files in turn, so that disturbances of the machine affect both alike."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from membench.comparing.git import Repository, WorkTree
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
from membench.errors import MembenchError
from membench.host.code_version import code_version
from membench.records.run_file import Run, read_run
from membench.running.session import silent
from membench.suite.suite import Suite

_END_TIMEOUT_S = 20
_SILENCE_S = 120
"""Seconds of silence beyond the time limit of a case: a process reports what it samples while a case runs."""

Tell = Callable[[str, Mapping[str, Any]], None]


class BothRuns(NamedTuple):
    """The runs of both versions."""

    base: Run
    head: Run


class Interleaved:
    """Measures two versions in turn. Use as a context manager."""

    def __init__(
        self,
        suite: Suite,
        ref: str,
        *,
        ids: Sequence[str] | None = None,
        devices: Sequence[str] | None = None,
        output: Path = Path("results"),
        evaluates: bool = True,
        tell: Tell = silent,
    ) -> None:
        """Find the commit; no process is started yet.

        Args:
            suite: the current suite; the other version reads the suite's file from its own commit.
            ref: a git revision: a branch, tag or expression that names the commit.
            ids: the ids of the cases to measure, including those that they are compared with; ``None``: all.
            devices: devices in place of the suite's own.
            output: folder for the run of the current files; the commit's run goes into ``base`` below it.
            evaluates: whether quality is judged over held-out text, which takes time of its own.
            tell: receives the events of both sessions; ids begin with the version's name, ``base`` or ``head``.

        Raises:
            GitError: if the repository has no such commit.
        """
        self._repository = Repository(Path.cwd())
        self._suite, self._ids, self._devices = suite, ids, devices
        self._output, self._evaluates, self._tell = output, evaluates, tell
        self.ref, self.commit = ref, self._repository.commit(ref)
        self.is_changed = self._repository.is_changed()
        self._rounds = 0
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Interleaved:
        """Check out the commit and start the processes of both versions.

        Raises:
            MembenchError: if a version lacks the suite or its process cannot be started.
        """
        with contextlib.ExitStack() as opened:
            tree = opened.enter_context(self._repository.work_tree(self.commit))
            here = Path.cwd()
            there = self._in(tree, here, "this folder")
            path = self._suite.path
            if path is None:
                raise MembenchError(
                    f"suite '{self._suite.name}' comes from no file, so the other commit has none to compare with"
                )
            theirs = self._in(tree, path, f"suite {path}")
            chosen = f"::{self._suite.name}" if path.suffix == ".py" else ""
            head = Setup(
                suite=f"{path.resolve()}{chosen}",
                output=str(self._output.absolute()),
                root=str(self._repository.root),
                repeats=self._suite.settings.repeats,
                code=dataclasses.replace(code_version(self._repository.root), is_changed=self.is_changed),
                devices=self._devices,
                ids=self._ids,
                evaluates=self._evaluates,
            )
            base = dataclasses.replace(
                head,
                suite=f"{theirs}{chosen}",
                output=str(self._output.absolute() / "base"),
                root=str(tree.path),
                code=dataclasses.replace(
                    code_version(tree.path), commit=self.commit, ref=self.ref, is_changed=False, reason=None
                ),
                not_from=str(self._repository.root),
            )
            paths, timeout_s = _import_paths(self._repository.root), self._suite.settings.timeout_s
            self._base = opened.enter_context(
                _VersionProcess("base", there, _counterparts(tree, paths), base, timeout_s, self._tell)
            )
            self._head = opened.enter_context(_VersionProcess("head", here, paths, head, timeout_s, self._tell))
            for version in (self._base, self._head):
                version.wait_until_ready()
            self._open = opened.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.__exit__(kind, error, at)

    def _in(self, tree: WorkTree, path: Path, what: str) -> Path:
        """Return a path's counterpart in the other commit; a path outside the repository is returned unchanged.

        Raises:
            MembenchError: if the other commit does not contain the path.
        """
        counterpart = tree.counterpart(path)
        if counterpart is not None and not counterpart.exists():
            raise MembenchError(f"{what} is not in '{self.ref}' ({self.commit[:12]}): there is nothing to compare with")
        return counterpart or path.resolve()

    def measure(self, rounds: int, ids: Sequence[str] | None = None) -> BothRuns:
        """Measure cases in rounds: each case in both versions in turn, in odd rounds head first.

        Args:
            rounds: how often to measure each case.
            ids: the ids of the cases; ``None``: all.

        Raises:
            MembenchError: if a version's process ends unexpectedly; the records measured before are kept.
        """
        known = dict.fromkeys((*self._head.ids, *self._base.ids))
        wanted = [case_id for case_id in known if ids is None or case_id in ids]
        total = rounds * sum(case_id in version.ids for case_id in wanted for version in (self._base, self._head))
        self._tell("start", {"path": str(self._head.path), "of": total})
        number = 0
        for _ in range(rounds):
            for case_id in wanted:
                for version in (self._base, self._head) if self._rounds % 2 == 0 else (self._head, self._base):
                    if case_id in version.ids:
                        number += 1
                        self._tell("case", {"id": f"{version.name} {case_id}", "number": number, "of": total})
                        version.measure(case_id, self._rounds)
            self._rounds += 1
        return BothRuns(*(read_run(version.path) for version in (self._base, self._head)))


class _VersionProcess:
    """The process that measures one version. Use as a context manager."""

    def __init__(
        self, name: str, folder: Path, paths: Sequence[Path], setup: Setup, timeout_s: float, tell: Tell
    ) -> None:
        """Prepare the process.

        Args:
            timeout_s: the time limit of a case.
        """
        self.name, self._folder, self._setup, self._tell = name, folder, setup, tell
        self._longest_silence_s = timeout_s + _SILENCE_S
        self._paths = list(map(str, paths))
        self.path: Path = Path()
        self.ids: Sequence[str] = ()
        self._is_silent = False
        self._unread = b""

    def __enter__(self) -> _VersionProcess:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(self._paths)}
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "membench.comparing.version_process"],
            cwd=self._folder, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            start_new_session=True,  # Ctrl-C in the terminal reaches only this process, which then ends the other
        )  # fmt: skip
        self._send(self._setup)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            self._process.send_signal(signal.SIGTERM)  # it may be measuring a case
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(0 if self._is_silent else _END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # the kernel holds it
                self._process.wait(_END_TIMEOUT_S)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()

    def wait_until_ready(self) -> None:
        """Wait until the process has loaded its suite and reported its cases.

        Raises:
            MembenchError: if the process refuses its suite or plug-ins.
        """
        ready = self._wait_for(lambda message: isinstance(message, Ready))
        assert isinstance(ready, Ready)
        if ready.path is None:
            raise MembenchError(f"{self.name}: its suite has none of the cases to compare")
        self.path, self.ids = Path(ready.path), ready.ids

    def measure(self, case_id: str, repeat: int) -> None:
        """Have the process measure a case; return when the record is on disk."""
        self._send(MeasureCase(case_id, repeat))
        self._wait_for(lambda message: isinstance(message, SessionEvent) and message.event == "record")

    def _send(self, message: VersionMessage) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended; its last message can still be read
            self._process.stdin.write(encode(message).encode())
            self._process.stdin.flush()

    def _next_line(self) -> str | None:
        """Return the next line from the process; ``None`` at its end.

        Raises:
            MembenchError: if it says nothing for longer than a case may take.
        """
        assert self._process.stdout is not None
        while b"\n" not in self._unread:
            if not select.select([self._process.stdout], [], [], self._longest_silence_s)[0]:
                self._is_silent = True
                raise MembenchError(
                    f"{self.name}: its process in {self._folder} did not answer within {self._longest_silence_s:g} s"
                )
            data = os.read(self._process.stdout.fileno(), 65536)
            if not data:
                return None
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode(errors="replace")

    def _wait_for(self, is_wanted: Callable[[VersionMessage], bool]) -> VersionMessage:
        while (line := self._next_line()) is not None:
            message = decode(line)
            if isinstance(message, Refused):
                raise MembenchError(f"{self.name}: {message.message}")
            if isinstance(message, SessionEvent):
                details = message.details
                named = {"id": f"{self.name} {details['id']}"} if "id" in details else {}
                self._tell(message.event, {**details, **named})
            if is_wanted(message):
                return message
        self._errors.seek(0)
        written = self._errors.read().decode(errors="replace").strip().splitlines()
        last = written[-1] if written else "without a word"
        if f"No module named '{__package__}" in last:
            raise MembenchError(
                f"{self.name}: the membench of that commit cannot be measured in turn with this one;"
                " measure both, then 'membench compare BASE NEW'"
            )
        raise MembenchError(f"{self.name}: its process in {self._folder} ended unexpectedly: {last}")


def _import_paths(root: Path) -> list[Path]:
    """Return the folders that come first on the import path of a version's process.

    These are the folders in the repository that are on this process's import path, the repository itself and its
    ``src``, then the folders outside it that PYTHONPATH lists.
    """
    entries = [Path(entry or ".").resolve() for entry in sys.path]
    inside = [path for path in (*entries, root, root / "src") if path.is_relative_to(root) and path.is_dir()]
    # Packages of a virtual environment inside the repository belong to no commit.
    own = [path for path in inside if "site-packages" not in path.parts]
    named = [Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return list(dict.fromkeys([*own, *(path for path in named if not path.is_relative_to(root))]))


def _counterparts(tree: WorkTree, paths: Sequence[Path]) -> list[Path]:
    """Return the counterparts of folders in the other commit, without those that it lacks.

    Folders outside the repository are returned unchanged.
    """
    found = [tree.counterpart(path) or path for path in paths]
    return [path for path in found if path.is_dir()]
