"""A plug-in of each kind for membench."""

from pathlib import Path

suite = Path(__file__).parent / "example.toml"
