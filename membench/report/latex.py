"""Text of others in LaTeX, where it is to stay text."""

from __future__ import annotations

from membench.errors import one_line


def escaped(text: str) -> str:
    """One line in which LaTeX finds no command and no formula: what tabulate does to the cells of its tables."""
    import tabulate  # takes long, and is wanted when a table is made

    return "".join(tabulate.LATEX_ESCAPE_RULES.get(sign, sign) for sign in one_line(text))
