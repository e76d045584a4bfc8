"""``membench doctor``: check what can be measured on this machine."""

from __future__ import annotations

import argparse

from membench.cli.output import Verbs, add_format
from membench.report.table_formats import FOR_PEOPLE


def add(verbs: Verbs) -> None:
    doctor = verbs.add_parser("doctor", help="check on known amounts what can be measured on this machine")
    doctor.add_argument("--full", action="store_true", help="also measure the harness's own promises (takes minutes)")
    add_format(doctor, FOR_PEOPLE)
    doctor.set_defaults(do=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from membench.doctor import checks

    return checks.report(full=arguments.full, form=arguments.format)
