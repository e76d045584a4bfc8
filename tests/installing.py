"""Distributions with plug-ins of their own, as if they were installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def install(site: Path, distribution: str, entry_points: str, modules: Mapping[str, str]) -> None:
    """Write version 1.0 of a distribution to a folder, which is to be put on Python's path.

    Args:
        modules: texts by file name.
    """
    info = site / f"{distribution}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    for name, text in modules.items():
        (site / name).write_text(text)
