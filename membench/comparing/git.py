"""A commit of the user's repository, checked out into a temporary folder while it is measured."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType

from membench.errors import MembenchError
from membench.host.git import GitFailed, GitMissing, git
from membench.host.scratch import Scratch, is_scratch

_TIMEOUT_S = 300
_FOLDER = "tree"


class GitError(MembenchError):
    """A missing repository, commit or git."""


class Repository:
    """The git repository that contains a folder."""

    def __init__(self, folder: Path) -> None:
        """Find the repository.

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
        """Return the full id of the commit that a branch, tag or expression names.

        Raises:
            GitError: if there is none; in a shallow clone the message says how to fetch it.
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
        """Return whether a commit contains a file; a file outside the repository is the same for all commits."""
        resolved = path.resolve()
        if not resolved.is_relative_to(self.root):
            return True
        return bool(
            self.git("ls-tree", "--full-tree", "--name-only", commit, "--", str(resolved.relative_to(self.root)))
        )

    def is_changed(self) -> bool:
        """Return whether tracked files differ from the commit that is checked out."""
        return bool(self.git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no"))

    def work_tree(self, commit: str) -> WorkTree:
        """Return a context manager that checks out a commit into a temporary folder."""
        return WorkTree(self, commit)

    def git(self, *arguments: str) -> str:
        """Run git and return what it prints.

        Raises:
            GitError: if it fails, with the first line of its message.
        """
        try:
            return git(self._folder, *arguments, timeout_s=_TIMEOUT_S)
        except GitMissing as error:
            raise GitError(f"{error}: there is no other commit to compare with") from None
        except GitFailed as error:
            raise GitError(str(error)) from None


class WorkTree:
    """A temporary folder with a commit's files. It is removed at the end, or by the next run if this one is killed."""

    def __init__(self, repository: Repository, commit: str) -> None:
        self.repository = repository
        self.commit = commit

    def __enter__(self) -> WorkTree:
        """Check out the commit.

        Raises:
            GitError: if git fails.
            MembenchError: if the temporary folder cannot be made.
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
        """Return a path of the repository in this folder, whether or not it exists; ``None`` for a path outside."""
        resolved, root = path.resolve(), self.repository.root
        return self.path / resolved.relative_to(root) if resolved.is_relative_to(root) else None

    def _forget_leftovers(self) -> None:
        """Make git forget the work trees of killed runs; other work trees stay, even if their folder is missing."""
        for line in self.repository.git("worktree", "list", "--porcelain").splitlines():
            path = Path(line.removeprefix("worktree "))
            if line.startswith("worktree ") and path.name == _FOLDER and is_scratch(path.parent) and not path.exists():
                self._forget(path)

    def _remove(self) -> None:
        self._scratch.remove()
        self._forget(self.path)

    def _forget(self, path: Path) -> None:
        with contextlib.suppress(GitError):  # an earlier error matters more
            self.repository.git("worktree", "remove", "--force", str(path))
