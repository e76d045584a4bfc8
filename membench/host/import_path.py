"""The import path of membench's own processes, which ``python -P`` starts without the current folder on it."""

from __future__ import annotations

import os
import sys


def add_current_folder() -> None:
    """Append the current folder to the import path, if it is not there yet.

    Models and plug-ins may import a user's modules from it. Being last, it replaces nothing: a file that is called like
    a module of the standard library, or like an installed one, is never imported in its place.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
