"""Git repositories of users, made in a temporary folder, with a model of their own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

MODEL = """\
from torch import nn


def make():
    return nn.Sequential(nn.Embedding(256, {width}), nn.Linear({width}, 256))
"""

SUITE = """\
[suite]
name = "small"
[matrix]
model = ["own"]
technique = ["none"]
workload = ["forward"]
[model.own]
use = "factory"
function = "model:make"
[settings]
threads = 1
measured_steps = 2
"""


def git(folder: Path, *arguments: str) -> str:
    """What a command of git prints, whatever this machine's own settings are."""
    own = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    named = ["-c", "user.name=Someone", "-c", "user.email=someone@example.org", "-c", "init.defaultBranch=main",
             "-c", "protocol.file.allow=always"]  # fmt: skip
    done = subprocess.run(["git", *named, *arguments], cwd=folder, env={**os.environ, **own}, capture_output=True,
                          text=True, check=True)  # fmt: skip
    return done.stdout.strip()


def commit(folder: Path, message: str, files: dict[str, str]) -> str:
    """Write files and commit all that is there; the commit's id."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", message)
    return git(folder, "rev-parse", "HEAD")


def repository(folder: Path, width: int = 256) -> Path:
    """A repository whose only commit has a model of two layers and a suite that measures it."""
    folder.mkdir()
    git(folder, "init", "--quiet")
    commit(folder, "The model", {"model.py": MODEL.format(width=width), "small.toml": SUITE, ".gitignore": "results\n"})
    return folder
