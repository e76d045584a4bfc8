"""Which malloc a process really calls: live memory is reported only where that one gives freed memory back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_PINNING = """\
import platform, sys
from membench.worker import allocator
if platform.libc_ver()[0] != "glibc":
    sys.exit(77)
print(allocator.pin(), allocator.state("pinned"))
"""

_OWN_MALLOC = """\
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>

/* Blocks lie one after the other and are never used again; the pages of freed ones go back to the kernel. */
static char *region;
static size_t used;

static void *block(size_t alignment, size_t size) {
    if (!__atomic_load_n(&region, __ATOMIC_ACQUIRE)) {
        char *none = NULL, *mapped = mmap(NULL, 1UL << 38, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped == MAP_FAILED) return NULL;
        if (!__atomic_compare_exchange_n(&region, &none, mapped, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
            munmap(mapped, 1UL << 38);
    }
    if (alignment < 16) alignment = 16;
    size_t at = __atomic_fetch_add(&used, size + 2 * alignment + 16, __ATOMIC_RELAXED);
    at = (at + 16 + alignment - 1) / alignment * alignment;
    *(size_t *)(region + at - 16) = size;
    return region + at;
}

void *malloc(size_t size) { return block(16, size); }
void *calloc(size_t count, size_t size) { return block(16, count * size); }
void *aligned_alloc(size_t alignment, size_t size) { return block(alignment, size); }
void *memalign(size_t alignment, size_t size) { return block(alignment, size); }
int posix_memalign(void **found, size_t alignment, size_t size) {
    *found = block(alignment, size);
    return *found ? 0 : ENOMEM;
}
size_t malloc_usable_size(void *old) { return old ? *(size_t *)((char *)old - 16) : 0; }
void free(void *old) {
    size_t from = ((size_t)old + 4095) & ~4095UL, to = ((size_t)old + malloc_usable_size(old)) & ~4095UL;
    if (old && to > from) madvise((void *)from, to - from, MADV_DONTNEED);
}
void *realloc(void *old, size_t size) {
    void *found = block(16, size);
    size_t kept = malloc_usable_size(old);
    if (found && old) memcpy(found, old, kept < size ? kept : size);
    free(old);
    return found;
}
"""

_PASSING_ON = """\
#define _GNU_SOURCE
#include <stddef.h>
extern void *__libc_malloc(size_t);
unsigned long calls;
void *malloc(size_t size) { calls++; return __libc_malloc(size); }
"""


_THREADS = """\
import ctypes, platform, sys, threading
from membench.host import procfs
from membench.worker import allocator, malloc_counts

if platform.libc_ver()[0] != "glibc":
    sys.exit(77)
libc, BLOCK = ctypes.CDLL("libc.so.6"), 3000
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]

class Worker:
    # Like a thread of OpenMP: it stays, and does what it is given.
    def __init__(self):
        self._turn, self._done = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self):
        while True:
            self._turn.acquire()
            self._made = self._task()
            self._done.release()

    def do(self, task):
        self._task = task
        self._turn.release()
        self._done.acquire()
        return self._made

def blocks(count):
    found = [libc.malloc(BLOCK) for _ in range(count)]
    for block in found:
        ctypes.memset(block, 1, BLOCK)
    return found

def heap_of(block):
    return next((first for first, last in malloc_counts._heaps_of_threads() if first <= block < last), "main")

"""

_HEAPS = f"""{_THREADS}
allocator.pin()
workers = [Worker(), Worker()]
for worker in workers:
    worker.do(lambda: blocks(1))
allocator.unpin()
workers.append(Worker())
print(len({{heap_of(block) for block in blocks(1) + [worker.do(lambda: blocks(1))[0] for worker in workers]}}))
"""

_HOLES = f"""{_THREADS}
allocator.pin()
before, worker = malloc_counts.free_resident_bytes(), Worker()
held = worker.do(lambda: blocks(40_000))  # more than one heap of a thread holds
whole = malloc_counts.free_resident_bytes()
for block in held[::2]:
    libc.free(block)
allocator.settle()
half = malloc_counts.free_resident_bytes()
for block in held[1::2]:
    libc.free(block)
allocator.settle()
print(whole - before, half - before, malloc_counts.free_resident_bytes() - before)
"""


def _library(folder: Path, name: str, code: str) -> Path:
    if not (compiler := shutil.which("cc")):
        pytest.skip("there is no C compiler 'cc'")
    source, library = folder / f"{name}.c", folder / f"lib{name}.so"
    source.write_text(code)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-fno-builtin", "-o", library, source], check=True)
    return library


def _pinned(**environment: str) -> str:
    return _printed(_PINNING, **environment)


def _printed(code: str, **environment: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    if ran.returncode == 77:
        pytest.skip("the C library is not glibc")
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def _installed(name: str) -> str:
    found = sorted(str(path) for path in Path("/usr/lib").glob(f"*/lib{name}.so.*"))
    if not found:
        pytest.skip(f"lib{name} is not installed")
    return found[0]


@pytest.mark.parametrize(
    ("library", "name"), [("jemalloc", "jemalloc"), ("tcmalloc_minimal", "tcmalloc"), ("mimalloc", "mimalloc")]
)
def test_a_preloaded_allocator_is_known_by_name_and_not_believed_to_be_pinned(library: str, name: str) -> None:
    assert _pinned(LD_PRELOAD=_installed(library)) == f"False {name}"


def test_a_known_allocator_in_a_file_of_another_name_is_known_by_its_functions(tmp_path: Path) -> None:
    library = _library(tmp_path, "own", f"{_OWN_MALLOC}int mallctl(void) {{ return 0; }}\n")
    assert _pinned(LD_PRELOAD=str(library)) == "False jemalloc"


def test_an_allocator_that_nobody_knows_is_named_by_its_file(tmp_path: Path) -> None:
    library = _library(tmp_path, "own", _OWN_MALLOC)
    assert _pinned(LD_PRELOAD=str(library)) == "False the malloc of libown.so"


def test_a_malloc_that_passes_calls_on_to_that_of_glibc_is_pinned(tmp_path: Path) -> None:
    assert _pinned(LD_PRELOAD=str(_library(tmp_path, "counting", _PASSING_ON))) == "True pinned"


def test_a_glibc_that_was_forbidden_to_map_blocks_is_pinned_all_the_same() -> None:
    assert _pinned() == "True pinned"
    assert _pinned(MALLOC_MMAP_MAX_="0") == "True pinned"


def test_threads_that_were_started_while_malloc_was_pinned_have_heaps_of_their_own_as_in_any_process() -> None:
    assert _printed(_HEAPS) == "4"  # of the main thread, of two that were there before, and of a new one


def test_holes_in_the_heaps_of_threads_are_counted_as_free() -> None:
    whole, half, none = map(int, _printed(_HOLES).split())
    assert whole == pytest.approx(0, abs=2**20)
    assert half == pytest.approx(20_000 * 3008, rel=0.02)
    assert none == pytest.approx(0, abs=2**20)


_CASES = """\
from pathlib import Path
import membench
from membench.doctor import checks
from membench.report import text
suite = membench.Suite(
    "own", matrix={"model": ["small"], "technique": ["none"], "workload": ["still", "broken"]},
    model={"small": {"use": "ballast", "mib": 8}}, settings={"measured_steps": 2},
    workload={"still": {"use": "burst", "mib": 0}, "broken": {"use": "forward"}},
)
records = membench.run(suite, output=Path("results")).records
for record in records:
    print(record.status)
    for field in ("load_peak_live_bytes", "peak_live_bytes", "held_live_bytes"):
        print(record.metrics[field], record.reasons.get(field))
    print({phase.allocator for process in record.processes for phase in process.phases})
print(text.remarks(records)[0])
print(checks.table(checks.known_amounts(), "csv"))
"""


def test_records_and_the_doctor_say_under_which_allocator_live_memory_is_not_available(tmp_path: Path) -> None:
    library = _library(tmp_path, "own", _OWN_MALLOC)
    ran = subprocess.run(
        [sys.executable, "-c", _CASES], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "LD_PRELOAD": str(library)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    unknown = "None live is not available under the malloc of libown.so"
    lines = ran.stdout.splitlines()
    assert lines[:5] == ["ok", unknown, unknown, unknown, "{'the malloc of libown.so'}"]
    # A case that ended in its first step has read its loading, under the same allocator.
    assert lines[5:7] == ["failed", unknown]
    assert f"None {lines[10]}" == unknown
    doctor = [line for line in lines if ",held_live," in line or ",peak_live," in line]
    told = [line for line in doctor if "live is not available under the malloc of libown.so" in line]
    assert len(told) == 4
    assert not any(",right," in line for line in doctor)
    assert any(",held_footprint," in line and ",right," in line for line in lines)
