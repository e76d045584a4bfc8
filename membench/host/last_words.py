"""What the output of a program says of how it ended: the line that tells it, among all that is printed after it.

A launcher prints a block with rules below the traceback of its ranks, exit handlers print their own lines, and errors
have messages of several lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from membench.errors import is_rule

_LONGEST_LINE, _LONGEST_LOOKED_AT, _MOST_CAUSES = 300, 1000, 3
_MEMORY = re.compile(
    r"""
    (?<!['"`\w])(?:
      (?:CUDA|HIP|XPU|NPU|MPS\ backend)\ out\ of\ memory
    | (?:CUDA|HIP)\ (?:driver\ |runtime\ )?error:\ out\ of\ memory
    | Triton\ Error\ \[\w+\]:\ out\ of\ memory
    | (?:cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|hipErrorOutOfMemory)\b
    | (?:CUBLAS|CUDNN|CUSPARSE|CUSOLVER|CUFFT|HIPBLAS|MIOPEN)_(?:STATUS_)?ALLOC_FAILED
    | DefaultCPUAllocator:\ (?:can't\ allocate|not\ enough)\ memory
    | Caught\ (?:Memory|OutOfMemory)Error\ in\b
    | RESOURCE_EXHAUSTED:.*(?:memory|allocat|OOM)
    | OOM\ when\ allocating
    | memory\ allocation\ of\ \d+\ bytes\ failed
    | Unable\ to\ allocate\ [\d.]+\ [KMGTPE]?i?B
    )
    | Cuda\ failure\ (?:\d+\ )?'out\ of\ memory'
    | (?:^|\bof\ |')std::bad_alloc\b
    | (?:^|:\ |\]\ )(?:can't|cannot|could\ not|failed\ to)\ allocate\ memory\b(?!\ in\ static\ TLS)
    | \bJavaScript\ heap\ out\ of\ memory\b
    | ^fatal\ error:\ (?:\w+:\ )?out\ of\ memory
    """,
    re.VERBOSE | re.IGNORECASE,
)
_MEMORY_TYPE = re.compile(r"(?:\w+\.)*(?:_Array)?(?:MemoryError|OutOfMemoryError|ResourceExhaustedError)\b(?::|$)")
_EXCEPTION = re.compile(r"((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit|Iteration|ExceptionGroup))(?::|$| \()")
_FROM_LIBRARY = re.compile(
    r"(?:\w+\.)*\w*(?:Runtime|OS|System|Accelerator|Internal|Backend|Cuda|CUDA|Triton|Worker|Engine|Task|Process)\w*"
    r"(?:Error|Exception)\b"
)
"""Exceptions by which libraries raise; the messages of others may quote any words."""
_OTHER_ERROR = re.compile(
    r"(?:\S+: )?(?:fatal |internal |runtime )?(?:error|panic)\b(?!s)[:! ]|fatal:|usage: ", re.IGNORECASE
)
_CONSEQUENCE = re.compile(
    r"ChildFailedError|ProcessRaisedException|ProcessExitedException|CalledProcessError|BrokenProcessPool|ExceptionGroup"
    r"|DistBackendError|NCCL|nccl|Connection (?:closed|reset)|Broken ?[Pp]ipe|ConnectionResetError|SystemExit"
    r"|exit(?:ed|s)?[ _-]?(?:code|status|with)|non-zero|Error \d+$|[Ss]ignal \d|SIG(?:KILL|TERM|ABRT|SEGV|INT|BUS)"
    r"|killed by signal|exited unexpectedly|terminated"
)
"""Errors of a process that ended because another one had failed."""
_GOING_ON = re.compile(r"\b(?:retrying|falling back|skipping|continuing|resuming|recovered)\b", re.IGNORECASE)
_KILLED = re.compile(
    r"exit ?code\s*:\s*-9\b|[Ss]ignal 9\b|SIGKILL|killed by signal: Killed"
    r"|exit(?:ed)? (?:with )?(?:code|status) (?:137|-9)\b|^(?:.*: line \d+:\s+\d+ )?Killed\b",
    re.MULTILINE,
)
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_RANK = re.compile(r"\[?(?:rank|default) ?(\d+)\]?: ?")
_CAUSED = "The above exception was the direct cause of the following exception:"


@dataclass(frozen=True)
class LastWords:
    """The line of an output that tells how the program ended, with its cause, and whether it means lack of memory."""

    line: str
    are_of_memory: bool


def tell_of_memory(text: str) -> bool:
    """Whether a text of a library, such as the message of its exception, means that memory ran out."""
    return any(_MEMORY.search(line) for line in _lines(text))


def tell_of_a_kill(text: str) -> bool:
    """Whether an output says that a process was killed (by SIGKILL)."""
    return _KILLED.search(text) is not None


def last_line(text: str) -> str:
    """Return the last line that tells something."""
    return next((line.strip()[:_LONGEST_LINE] for line in reversed(list(_lines(text))) if not is_rule(line)), "")


def are_of_another(line: str) -> bool:
    """Whether a line only says that another process failed."""
    return _CONSEQUENCE.search(line) is not None


def of(text: str) -> LastWords:
    """Find the last words in an output.

    The last error decides, not one that was followed by others. What a process of several ranks says is looked at by
    rank, since the first that fails makes the others fail.
    """
    streams: dict[str, list[str]] = {}
    places: dict[str, list[int]] = {}
    for place, line in enumerate(_lines(text)):
        named = _RANK.match(line)
        rank = named[1] if named else ""
        streams.setdefault(rank, []).append(line[named.end() :] if named else line)
        places.setdefault(rank, []).append(place)
    found = {rank: _ending(lines) for rank, lines in streams.items()}
    common = found.pop("", _Ending(""))
    ranks = sorted(found.items(), key=lambda each: (not each[1].is_of_memory, not each[1].is_decided, not each[1].line))
    if not ranks:
        return LastWords(common.line, common.is_of_memory)
    number, first = ranks[0]
    is_later = common.is_decided and places[""][common.at] > places[number][first.at]
    said = common if is_later or (common.line and not first.is_decided) else first
    return LastWords(said.line, said.is_of_memory)


@dataclass(frozen=True)
class _Ending:
    """What one stream of lines says: the line that tells most, its number, and whether it is an error of its own."""

    line: str
    at: int = 0
    is_of_memory: bool = False
    is_decided: bool = False


def _lines(text: str) -> Iterator[str]:
    for line in re.split(r"[\r\n]", _ESCAPES.sub("", text)):
        yield line[:_LONGEST_LOOKED_AT].rstrip()


def _ending(lines: Sequence[str], causes: int = _MOST_CAUSES) -> _Ending:
    goes_on, consequence, last, others = False, "", "", ""
    for number in range(len(lines) - 1, -1, -1):
        in_group = lines[number].lstrip(" ").startswith(("|", "+"))
        line = lines[number].lstrip(" |") if in_group else lines[number]
        if others and not in_group:
            return _Ending(others, number, is_decided=True)
        if not line.strip() or is_rule(line) or line[0].isspace():
            last = last or (line.strip() if line.strip() and not is_rule(line) else "")
            continue
        raises = _follows_traceback(lines, number) or _EXCEPTION.match(line) is not None
        if _MEMORY_TYPE.match(line) or _MEMORY.match(line) or (_MEMORY.search(line) and _is_of_library(line)):
            if not goes_on and not _GOING_ON.search(line):
                return _Ending(line[:_LONGEST_LINE], number, is_of_memory=True, is_decided=True)
        elif _CONSEQUENCE.search(line):
            consequence = consequence or (line[:_LONGEST_LINE] if raises else "")
        elif raises:
            cause = _Ending("") if in_group or not causes else _cause(lines, number, causes - 1)
            told = line[:_LONGEST_LINE] + (f" (caused by {cause.line})" if cause.line else "")
            if cause.is_of_memory or not in_group:
                return _Ending(told, number, cause.is_of_memory, is_decided=True)
            others = others or told
        elif _OTHER_ERROR.match(line):
            return _Ending((last or line)[:_LONGEST_LINE], number, is_decided=True)
        goes_on = goes_on or _GOING_ON.search(line) is not None
        last = last or line
    return _Ending(others or consequence or last[:_LONGEST_LINE], is_decided=bool(others))


def _is_of_library(line: str) -> bool:
    """Whether a line has the form in which a library or a program reports an error, so that its words count."""
    if line.startswith("terminate called") or _FROM_LIBRARY.match(line):
        return True
    # A program's name, a colon, and what happened.
    return re.match(r"[\w./-]+: ", line) is not None and not _EXCEPTION.match(line) and line.lower().endswith("memory")


def _follows_traceback(lines: Sequence[str], number: int) -> bool:
    """Whether a line is the one that ends a traceback, whatever its exception is named."""
    for line in reversed(lines[max(0, number - 1000) : number]):
        if line.startswith("Traceback (most recent call last)"):
            return True
        if line and not line[0].isspace():
            return False
    return False


def _cause(lines: Sequence[str], number: int, causes: int) -> _Ending:
    """Return the exception that a traceback names as the direct cause of the one in a line."""
    for start in range(number - 1, -1, -1):
        if lines[start].startswith("Traceback (most recent call last)"):
            before = [line for line in lines[:start] if line]
            return _ending(before[:-1], causes) if before and before[-1] == _CAUSED else _Ending("")
    return _Ending("")
