"""Checked cases as JUnit XML, in the dialect that GitLab and Jenkins read."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

from membench.report.case_outcomes import CheckedCase

# All that XML 1.0 cannot hold, written as a reference or not.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_TAGS = {"failed": "failure", "unfinished": "error", "skipped": "skipped"}


def document(cases: Sequence[CheckedCase]) -> str:
    """The whole file: a ``testsuite`` a suite, a ``testcase`` a case.

    A broken limit, rule or tolerance is a ``failure``, a case that was not measured to its end an ``error``. What is
    undecided fails nothing and was not skipped either: it stands in the case's ``system-out``. What GitLab shows as
    suite is ``classname``, and of failures their text, not their ``message``.
    """
    root = ElementTree.Element("testsuites", name="membench")
    for suite in dict.fromkeys(case.suite for case in cases):
        own = [case for case in cases if case.suite == suite]
        ends = [case.end for case in own]
        node = ElementTree.SubElement(
            root, "testsuite", name=_clean(suite), tests=str(len(own)), failures=str(ends.count("failed")),
            errors=str(ends.count("unfinished")), skipped=str(ends.count("skipped")),
            time=f"{sum(case.duration_s or 0 for case in own):.3f}",
        )  # fmt: skip
        for case in own:
            _add(node, case)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _add(suite: ElementTree.Element, case: CheckedCase) -> None:
    node = ElementTree.SubElement(
        suite, "testcase", classname=_clean(f"membench.{case.suite}"), name=_clean(case.id),
        time=f"{case.duration_s or 0:.3f}",
    )  # fmt: skip
    if case.end != "passed":
        reasons = [_clean(reason) for reason in case.reasons]
        end = ElementTree.SubElement(node, _TAGS[case.end], message=reasons[0] if reasons else "")
        if case.end != "skipped":
            end.text = "\n".join(reasons)
    undecided = (f"undecided: {doubt}" for doubt in case.undecided)
    printed = "\n".join(filter(None, (*undecided, *case.notes, case.output)))
    if printed:
        ElementTree.SubElement(node, "system-out").text = _clean(printed)


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("", text)
