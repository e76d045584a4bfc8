"""What is asked of a plug-in of any kind.

PYTEST_DONT_REWRITE: what an assertion says is for people who do not know this file.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import ValidationError

from membench.plugins import Options
from membench.plugins.checking import complaint
from membench.records.validation import problem

_IMPORT = """\
import importlib, importlib.util, runpy, sys
name, path = sys.argv[1:]
if name != "__main__" and importlib.util.find_spec(name.partition(".")[0]):
    importlib.import_module(name)
else:
    runpy.run_path(path)
print("torch" in sys.modules)
"""


class PluginConformance:
    """Tests that plug-ins of all kinds pass; the classes for each kind inherit them."""

    options: ClassVar[Mapping[str, Any]] = {}
    """Options to try it with, as a suite has them."""

    kind: ClassVar[tuple[str, type[Options]]]
    """The attribute that names the plug-in, and which contract that is held to."""

    def plugin(self) -> type[Options]:
        """The class that is tested."""
        __tracebackhide__ = True
        name, base = self.kind
        found = getattr(self, name, None)
        assert isinstance(found, type), f"{type(self).__name__} names no {name}; expected '{name} = Your{name.title()}'"
        assert issubclass(found, base), f"{found.__name__} is no subclass of membench.plugins.{base.__name__}"
        return found

    def made(self) -> Any:
        """A new plug-in with the options, checked as those of a suite are."""
        __tracebackhide__ = True
        plugin, given = self.plugin(), dict(self.options)
        try:
            return plugin.model_validate_json(json.dumps(given), strict=True)
        except ValidationError as error:
            said = problem(error, plugin, given).sentence("option")
            raise AssertionError(f"{plugin.__name__} does not take the options of this test: {said}") from None

    def test_it_keeps_the_contract(self) -> None:
        __tracebackhide__ = True
        plugin = self.plugin()
        wrong = complaint(plugin, self.kind[1])
        assert wrong is None, f"{plugin.__name__}: {wrong}"

    def test_its_options_come_back_from_json_as_they_were(self) -> None:
        __tracebackhide__ = True
        made = self.made()
        # What the worker gets: the options that were set, from the record's JSON.
        written = json.dumps(made.model_dump(mode="json", exclude_unset=True))
        try:
            back = type(made).model_validate_json(written, strict=True)
        except ValidationError as error:
            said = problem(error, type(made), json.loads(written)).sentence("option")
            raise AssertionError(f"options written as {written} are refused when they are read: {said}") from None
        for option in type(made).model_fields:
            was, read = getattr(made, option), getattr(back, option)
            assert was == read, (
                f"option '{option}' was {was!r} and comes back from JSON as {read!r}; expected a type that JSON keeps"
            )

    def test_it_can_be_pickled(self) -> None:
        __tracebackhide__ = True
        made = self.made()
        try:
            back = pickle.loads(pickle.dumps(made))
        except Exception as error:
            raise AssertionError(
                f"{type(made).__name__} cannot be pickled ({type(error).__name__}: {error}); expected options and"
                " private attributes that can, so that it can be sent to another process"
            ) from None
        assert made == back, f"{made!r} comes back from pickle as {back!r}; expected one that equals it"

    def test_its_module_does_not_import_torch_when_it_is_loaded(self) -> None:
        __tracebackhide__ = True
        plugin = self.plugin()
        assert not _imports_torch(plugin.__module__, inspect.getfile(plugin)), (
            f"loading {plugin.__module__} imports torch; expected 'import torch' inside the methods that need it,"
            " since the process that reads suites does without it"
        )


@functools.cache
def _imports_torch(module: str, path: str) -> bool:
    """Whether a new interpreter has torch once it has loaded a module."""
    __tracebackhide__ = True
    search = os.pathsep.join(entry for entry in sys.path if entry)
    ran = subprocess.run(
        [sys.executable, "-c", _IMPORT, module, path],
        env={**os.environ, "PYTHONPATH": search}, capture_output=True, text=True,
    )  # fmt: skip
    last = (ran.stderr.strip().splitlines() or ["without a word"])[-1]
    assert ran.returncode == 0, f"{module} cannot be loaded in a process of its own: {last}"
    return ran.stdout.split()[-1] == "True"
