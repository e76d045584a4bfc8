"""Valid names in suites, and the members and parts of stacks.

If two packages provide plug-ins of the same name, ``package:name`` selects one; it appears so in case ids and tables.
"""

from __future__ import annotations

import re

from membench.host.device import Device
from membench.protocol.case import REFERENCE

_LONGEST_NAME_BYTES = 64  # model, workload and device together form a file name


def checked_name(name: str) -> str:
    """Check a name that is part of a case id, and return it.

    Raises:
        ValueError: if it is not valid.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        if re.fullmatch(r"[\w.*?\[\]!-]+", name):
            raise ValueError("write whole names here; patterns are for [[exclude]]")
        raise ValueError("a name has letters, digits, '.', '_' and '-' and nothing else")
    if len(name.encode()) > _LONGEST_NAME_BYTES:
        raise ValueError(f"a name has {_LONGEST_NAME_BYTES} bytes at most")
    return name


def checked_plugin(name: str) -> str:
    """Check the name of a plug-in, written 'name' or 'package:name', and return it.

    Raises:
        ValueError: if it is not valid.
    """
    package, colon, own = name.rpartition(":")
    if not colon:
        return checked_name(name)
    if not (package and own) or ":" in package:
        raise ValueError("where two plug-ins have one name, write 'package:name'")
    checked_name(package)
    checked_name(own)
    if own == REFERENCE:
        raise ValueError(f"the reference is written '{REFERENCE}'; no other package has it")
    if len(name.encode()) > _LONGEST_NAME_BYTES:
        raise ValueError(f"a name has {_LONGEST_NAME_BYTES} bytes at most, its package included")
    return name


def checked_stack(stack: str) -> str:
    """Check a stack, which is one technique's name or several joined by '+', and return it.

    Raises:
        ValueError: if it is not valid.
    """
    names = members(stack)
    if len(names) > 1 and not all(names):
        raise ValueError("a stack is written 'first+second'; one of its members has no name")
    if len(names) > 1 and " " in stack:
        raise ValueError(f"a stack is written without spaces: '{''.join(stack.split())}'")
    for name in names:
        checked_plugin(name)
    if len(names) > 1 and REFERENCE in names:
        raise ValueError(f"'{REFERENCE}' has no place in a stack")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"'{twice}' is in the stack twice")
    return stack


def checked_device(device: str) -> str:
    """Check the name of a device, and return it.

    Raises:
        ValueError: if it is not valid.
    """
    Device.parse(device)
    return device


def members(stack: str) -> list[str]:
    """Return the techniques of a stack, in order."""
    return stack.split("+")


def parts(stack: str) -> list[str]:
    """Return the stacks that a stack is compared with: its proper prefixes, and each of its members alone.

    ``a+b+c`` has the parts ``a``, ``a+b``, ``b`` and ``c``; a single technique has none.
    """
    names = members(stack)
    prefixes = ["+".join(names[:count]) for count in range(1, len(names))]
    return [*prefixes, *names[1:]] if prefixes else []
