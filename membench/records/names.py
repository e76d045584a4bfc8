"""What the names in a suite may look like, and what a stack of techniques is made of.

Where two plug-ins have one name, ``package:name`` says whose is meant; it then stands so in ids of cases and tables.
"""

from __future__ import annotations

import re

from membench.host.device import Device
from membench.protocol.case import REFERENCE

_LONGEST_NAME_BYTES = 64  # model, workload and device together name a file


def checked_name(name: str) -> str:
    """``name``, if it can stand in the id of a case.

    Raises:
        ValueError: if it cannot.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        if re.fullmatch(r"[\w.*?\[\]!-]+", name):
            raise ValueError("write whole names here; patterns are for [[exclude]]")
        raise ValueError("a name has letters, digits, '.', '_' and '-' and nothing else")
    if len(name.encode()) > _LONGEST_NAME_BYTES:
        raise ValueError(f"a name has {_LONGEST_NAME_BYTES} bytes at most")
    return name


def checked_plugin(name: str) -> str:
    """``name``, if a plug-in can be asked for by it: a name, or 'package:name'.

    Raises:
        ValueError: if it cannot.
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
    """``stack``, if it is a technique's name or several joined by '+'.

    Raises:
        ValueError: if it is not.
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
    """``device``, if it is one.

    Raises:
        ValueError: if it is not.
    """
    if Device.parse(device).count > 1:  # no workload runs on several ranks yet
        raise ValueError("write cpu, cuda or cuda:0")
    return device


def members(stack: str) -> list[str]:
    """The techniques of a stack in order."""
    return stack.split("+")


def parts(stack: str) -> list[str]:
    """What a stack is compared with: all that its first members make, and each member alone.

    ``a+b+c`` has the parts ``a``, ``a+b``, ``b`` and ``c``; a single technique has none.
    """
    names = members(stack)
    prefixes = ["+".join(names[:count]) for count in range(1, len(names))]
    return [*prefixes, *names[1:]] if prefixes else []
