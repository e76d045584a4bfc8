"""A commit of the user's repository, checked out into a folder of its own for as long as it is measured."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from types import TracebackType

from membench.errors import MembenchError
from membench.host.scratch import Scratch, is_scratch

_TIMEOUT_S = 300
_FOLDER = "tree"


class GitError(MembenchError):
    """A repository or a commit that cannot be measured."""


class Repository:
    """The repository that a folder lies in."""

    def __init__(self, folder: Path) -> None:
        """Find it.

        Raises:
            GitError: if there is none, or git is not installed or refuses it.
        """
        self._folder = folder
        try:
            self.root = Path(self.git("rev-parse", "--show-toplevel")).resolve()
        except GitError as error:
            if "not a git repository" in str(error):
                raise GitError(f"{folder} is in no git repository: there is no other commit to compare with") from None
            raise

    def commit(self, ref: str) -> str:
        """The full id of the commit that a branch, tag or expression names.

        Raises:
            GitError: if there is none; in a shallow clone, with how to get it.
        """
        try:
            return self.git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
        except GitError:
            message = f"'{ref}' names no commit here"
            if self.git("rev-parse", "--is-shallow-repository") == "true":
                message += (
                    "; this clone is shallow: fetch it ('git fetch --unshallow'; in GitHub Actions"
                    " 'fetch-depth: 0' of actions/checkout, in GitLab 'GIT_DEPTH: 0')"
                )
            raise GitError(message) from None

    def has(self, commit: str, path: Path) -> bool:
        """Whether a commit has a file of the repository; one outside it is the same for all commits."""
        resolved = path.resolve()
        if not resolved.is_relative_to(self.root):
            return True
        return bool(
            self.git("ls-tree", "--full-tree", "--name-only", commit, "--", str(resolved.relative_to(self.root)))
        )

    def is_changed(self) -> bool:
        """Whether files that git follows are not as in the commit that is checked out."""
        return bool(self.git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no"))

    def work_tree(self, commit: str) -> WorkTree:
        """A commit's files in a folder of their own. Use as a context manager."""
        return WorkTree(self, commit)

    def git(self, *arguments: str) -> str:
        """What a command of git prints.

        Raises:
            GitError: if it fails: the first line of what it says.
        """
        # A hook's or a script's GIT_DIR would lead to another repository.
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        command = ["git", "-C", str(self._folder), "-c", "core.hooksPath=/dev/null", *arguments]
        try:
            done = subprocess.run(command, env={**clean, "LC_ALL": "C"}, capture_output=True, timeout=_TIMEOUT_S,
                                  stdin=subprocess.DEVNULL, check=False)  # fmt: skip
        except FileNotFoundError:
            raise GitError("git is not installed: there is no other commit to compare with") from None
        except subprocess.TimeoutExpired:
            raise GitError(f"git {arguments[0]} did not end within {_TIMEOUT_S} s") from None
        if done.returncode:
            said = os.fsdecode(done.stderr).strip().partition("\n")[0].removeprefix("fatal: ")
            raise GitError(f"git {arguments[0]}: {said or f'exit code {done.returncode}'}")
        return os.fsdecode(done.stdout).rstrip("\n")


class WorkTree:
    """A folder with the files of a commit; removed at the end, or by the next run if this one is killed."""

    def __init__(self, repository: Repository, commit: str) -> None:
        self.repository = repository
        self.commit = commit

    def __enter__(self) -> WorkTree:
        """Check the commit out.

        Raises:
            GitError: if git cannot.
            MembenchError: if there is no room.
        """
        self._scratch = Scratch()
        self.path = (self._scratch.path / _FOLDER).resolve()
        try:
            self._forget_leftovers()
            self.repository.git("worktree", "add", "--quiet", "--detach", str(self.path), self.commit)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._remove()

    def counterpart(self, path: Path) -> Path | None:
        """Where a file or folder of the repository lies here, whether or not it is there; ``None`` of one outside."""
        resolved, root = path.resolve(), self.repository.root
        return self.path / resolved.relative_to(root) if resolved.is_relative_to(root) else None

    def _forget_leftovers(self) -> None:
        """Let git forget those of runs that were killed: their folders are gone. Others' may be so for a while only."""
        for line in self.repository.git("worktree", "list", "--porcelain").splitlines():
            path = Path(line.removeprefix("worktree "))
            if line.startswith("worktree ") and path.name == _FOLDER and is_scratch(path.parent) and not path.exists():
                self._forget(path)

    def _remove(self) -> None:
        self._scratch.remove()
        self._forget(self.path)

    def _forget(self, path: Path) -> None:
        with contextlib.suppress(GitError):  # what went wrong before is what is to be told
            self.repository.git("worktree", "remove", "--force", str(path))
