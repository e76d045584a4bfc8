"""An environment of its own with membench from its wheel, away from the checkout and from any network."""

from __future__ import annotations

import shlex
import subprocess
import sys
import venv
from pathlib import Path

_ROOT = Path(__file__).parent.parent
_COMMANDS = {
    "pip": f'{shlex.quote(sys.executable)} -m pip --python "$HERE/python" "$@" --no-build-isolation --no-index -q',
    "pytest": '"$HERE/python" -m pytest "$@"',
    "membench": '"$HERE/python" -m membench "$@"',
}


def install_wheel(folder: Path) -> Path:
    """Build membench's wheel and install it to a folder, to be put on the path of environments; that of the wheel."""
    wheels = folder.parent / "wheels"
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(wheels), str(_ROOT)],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = wheels.glob("*.whl")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--ignore-installed",
         "--target", str(folder), str(wheel)],
        check=True, capture_output=True,
    )  # fmt: skip
    return wheel


class FreshEnvironment:
    """A virtual environment. Dependencies are borrowed from that of the tests; membench itself comes from the wheel."""

    def __init__(self, folder: Path, membench: Path) -> None:
        """``membench``: where the wheel is installed."""
        self.folder = folder
        venv.create(folder, with_pip=False)
        (installed,) = folder.glob("lib/python*/site-packages")
        borrowed = [path for path in sys.path if Path(path, "torch").is_dir()]
        (installed / "borrowed.pth").write_text("\n".join([str(membench), *borrowed]))
        for name, command in _COMMANDS.items():
            program = folder / "bin" / name
            program.write_text(f"#!/bin/sh\nHERE={shlex.quote(str(folder / 'bin'))}\nexec {command}\n")
            program.chmod(0o755)

    def run(self, script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run lines of a shell in it; the first that fails ends them."""
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-e", "-c", script],
            cwd=cwd, capture_output=True, text=True,
            env={"PATH": f"{self.folder / 'bin'}:/usr/bin:/bin", "HOME": str(cwd), "LC_ALL": "C.UTF-8",
                 "MEMBENCH_CALM_WITHIN_S": "0"},  # tests run beside each other: the machine is never calm
        )  # fmt: skip
