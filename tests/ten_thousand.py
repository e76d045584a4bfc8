"""How long the command line takes over ten thousand cases, and how much memory: ``python -m tests.ten_thousand``.

The records are those of a kept run, under other names: each is as large as a real one.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tabulate

_KEPT = Path(__file__).parent.parent / "results" / "everything@2-cores-epyc.jsonl"
_LOOKS_EVERY_S = 0.02
_TECHNIQUES, _MODELS, _WORKLOADS = 100, 20, 5


def _suite(count: int) -> Iterator[str]:
    """A suite of so many variants of one technique."""
    yield '[suite]\nname = "variants"\n[matrix]\nmodel = ["trained-tiny"]\nworkload = ["forward"]\n'
    yield f"technique = {json.dumps(['none', *(f'variant-{number}' for number in range(count))])}\n[technique]\n"
    for number in range(count):
        yield f'variant-{number} = {{use = "magnitude-prune", recover_steps = {number}}}\n'


def _records(header: dict[str, Any], records: list[dict[str, Any]]) -> Iterator[str]:
    """The lines of a run of ten thousand cases: a group for each model and workload, each with its reference."""
    yield json.dumps({**header, "suite_text": "", "suite_sha256": "", "gate": []})
    reference = next(record for record in records if record["case"]["technique"] == "none")
    for number in range(_MODELS * _WORKLOADS * _TECHNIQUES):
        group, technique = divmod(number, _TECHNIQUES)
        model, workload = divmod(group, _WORKLOADS)
        source = records[number % len(records)] if technique else reference
        names = {
            "model": f"model-{model}", "workload": f"workload-{workload}",
            "technique": f"technique-{technique}" if technique else "none", "device": "cpu",
        }  # fmt: skip
        case_id = "/".join(names[key] for key in ("model", "technique", "workload", "device"))
        yield json.dumps({**source, "case": {**source["case"], **names}, "id": case_id, "repeat": 0})


def _timed(*words: str, folder: Path) -> tuple[float, float, int]:
    """The seconds and MiB that a command takes, and its exit code."""
    began, peak_kib = time.monotonic(), 0
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "membench", *words], cwd=folder, stdout=out, stderr=out)
        while process.poll() is None:
            # Not ru_maxrss, which is this process's own where that is larger.
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                peak_kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
            time.sleep(_LOOKS_EVERY_S)
    return time.monotonic() - began, peak_kib / 1024, process.returncode


def main() -> None:
    """Measure each command once and print a table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "variants.toml").write_text("".join(_suite(5000)))
        header, *records = map(json.loads, _KEPT.read_text().splitlines())
        for run in ("first", "second"):
            (folder / f"{run}.jsonl").write_text("\n".join(_records({**header, "run": run}, records)) + "\n")
        commands = {
            "list, 5,000 variants": ("list", "variants.toml"),
            "list everything": ("list", "everything"),
            "show": ("show", "first.jsonl"),
            "compare": ("compare", "first.jsonl", "second.jsonl"),
            "export": ("export", "benchmark-action", "first.jsonl"),
            "report": ("report", "first.jsonl", "-o", "page.html"),
        }
        rows = []
        for title, words in commands.items():
            took_s, taken_mib, code = _timed(*words, folder=folder)
            tail = (folder / "out").read_text(errors="replace").strip().splitlines()[-1:]
            rows.append([title, f"{took_s:.1f} s", f"{taken_mib:.0f} MiB", code, *(tail if code not in (0, 1) else ())])
        print(f"a run's file: {(folder / 'first.jsonl').stat().st_size / 1e6:.0f} MB")
        page = folder / "page.html"
        if page.exists():
            print(f"the page: {page.stat().st_size / 1e6:.0f} MB")
        print(tabulate.tabulate(rows, headers=["command", "time", "memory", "exit code", "said"]))


if __name__ == "__main__":
    main()
