"""Asking git about a folder, whatever the user's own settings and environment make of it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


class GitFailed(Exception):
    """Git ended with an error; the text is the first line of its message."""


class GitMissing(GitFailed):
    """Git is not installed."""


def git(folder: Path, *arguments: str, timeout_s: float) -> str:
    """Run git in a folder and return what it prints, without the last line's end.

    Raises:
        GitMissing: if git is not installed.
        GitFailed: if it fails, or does not end in time.
    """
    # GIT_DIR, which is set in hooks, would select another repository.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    # A repository's own hooks and file-system monitor are programs, which are not to be run.
    command = ["git", "-C", str(folder), "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(command, env={**clean, "LC_ALL": "C"}, capture_output=True, timeout=timeout_s,
                              stdin=subprocess.DEVNULL, check=False)  # fmt: skip
    except FileNotFoundError:
        raise GitMissing("git is not installed") from None
    except OSError as error:
        raise GitFailed(f"git cannot be started: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise GitFailed(f"git {arguments[0]} did not end within {timeout_s:g} s") from None
    if done.returncode:
        message = os.fsdecode(done.stderr).strip().partition("\n")[0].removeprefix("fatal: ")
        raise GitFailed(f"git {arguments[0]}: {message or f'exit code {done.returncode}'}")
    return os.fsdecode(done.stdout).rstrip("\n")
