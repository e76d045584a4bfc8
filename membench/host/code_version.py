"""The commit of the code that a run measures."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from membench.errors import one_line
from membench.host.git import GitFailed, git

_TIMEOUT_S = 5.0
_INSTALLED = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class CodeVersion:
    """The commit that is measured, for the header of its run.

    Attributes:
        commit: its full id; ``None`` if it is not known, and then ``reason`` says why.
        ref: what the user called it, ``HEAD`` for what is checked out.
        is_changed: whether files that git tracks differ from the commit; ``None`` if that is not known.
        committed_at: when it was committed (ISO, UTC).
    """

    commit: str | None
    ref: str | None = None
    is_changed: bool | None = None
    committed_at: str | None = None
    reason: str | None = None


def code_version(folder: Path) -> CodeVersion:
    """Return the commit that is checked out in the repository of a folder."""
    folder = folder.resolve()
    if any(name in folder.parts for name in _INSTALLED):
        # An environment may lie in a repository, to which its packages do not belong.
        return CodeVersion(None, reason=f"{folder} is part of an installed package")
    try:
        commit, seconds = git(
            folder, "log", "-1", "--no-show-signature", "--format=%H %ct", "HEAD", "--", timeout_s=_TIMEOUT_S
        ).split()
        committed_at = datetime.fromtimestamp(int(seconds), UTC).isoformat(timespec="seconds")
    except GitFailed as error:
        message = f"{folder} is in no git repository" if "not a git repository" in str(error) else str(error)
        return CodeVersion(None, reason=one_line(message))
    except (ValueError, OverflowError, OSError):  # a date beyond all calendars
        return CodeVersion(None, reason="git's answer was not understood")
    try:
        changes = git(
            folder, "--no-optional-locks", "status", "--porcelain", "--untracked-files=no", timeout_s=_TIMEOUT_S
        )
    except GitFailed as error:
        return CodeVersion(commit, "HEAD", None, committed_at, f"whether files are changed: {error}")
    return CodeVersion(commit, "HEAD", bool(changes), committed_at)
