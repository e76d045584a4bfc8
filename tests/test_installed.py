"""The wheel in a fresh environment, away from the checkout."""

from __future__ import annotations

import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

_ROOT = Path(__file__).parent.parent


def test_the_wheel_runs_a_suite_by_name_outside_the_checkout(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(wheels), str(_ROOT)],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = wheels.glob("*.whl")
    page = {f"membench/report/page.{ending}" for ending in ("html", "css", "js")}
    assert page <= set(zipfile.ZipFile(wheel).namelist())
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    (installed,) = environment.glob("lib/python*/site-packages")
    # Dependencies are borrowed from the environment of the tests; membench itself comes from the wheel alone.
    borrowed = [path for path in site.getsitepackages() if Path(path, "torch").exists()]
    (installed / "borrowed.pth").write_text("\n".join(borrowed))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--ignore-installed",
         "--target", str(installed), str(wheel)],
        check=True, capture_output=True,
    )  # fmt: skip
    code = (
        "import membench, pathlib, sys;"
        f"assert pathlib.Path(membench.__file__).is_relative_to({str(environment)!r}), membench.__file__;"
        "from membench.cli import main;"
        "sys.exit(main(['run', 'quickstart', '-k', 'llama-60m/none/forward', '--format', 'csv']))"
    )
    ran = subprocess.run(
        [str(environment / "bin" / "python"), "-c", code],
        cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[1].startswith("llama-60m/none/forward/cpu,ok,,232")
