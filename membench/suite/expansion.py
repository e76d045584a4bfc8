"""Expansion of a suite into cases: variants, matrix, exclusions, additions, parts of stacks, and references."""

from __future__ import annotations

import fnmatch
import itertools
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from membench.errors import PluginError, SuiteError, did_you_mean, summary
from membench.host.device import Device
from membench.plugins import Parallel, Setting, Technique, Unsuitable, registry
from membench.plugins.parallel import degrees
from membench.protocol.case import REFERENCE, Case, Group, Plugin, PluginFile, reference_group
from membench.records.metric import own_field
from membench.records.metrics import METRICS, own_metrics
from membench.records.names import checked_name, members, parts
from membench.records.validation import shown

if TYPE_CHECKING:
    from membench.suite.schema import Addition, Contents, Matrix, Program, Selection


_LONGEST_NAME = 64


class _Combination(NamedTuple):
    model: str
    technique: str
    workload: str
    device: str

    @property
    def group(self) -> Group:
        return (self.model, self.workload, self.device)

    @property
    def reference(self) -> _Combination:
        model, workload, device = reference_group(self.group)
        return _Combination(model, REFERENCE, workload, device)


def expand(contents: Contents, devices: Sequence[str] | None, files: Sequence[PluginFile] = ()) -> tuple[Case, ...]:
    """Expand a suite into cases: each group's reference first, the parts of a stack before it.

    Parts of a stack that the suite does not list are added, so that the effect of each member can be reported. In ranks
    a part runs on as many as its members have in the stack, and on the single device if none of them spreads it. The
    reference runs there, too: ``none`` on ``2xcpu`` stands for ``none`` on ``cpu``. Exclusions apply to cases of the
    matrix and to added parts, but not to [[include]]. The reference of a group is added, even if excluded, as long as
    the group has another case. An added part is left out if its ``check`` rejects it.

    Args:
        devices: devices in place of the suite's own.
        files: the suite's own plug-in files.

    Raises:
        SuiteError: if the suite is invalid; in one line: key, value and what is valid.
    """
    plugins = _Plugins(contents, files)
    product, included = _combinations(contents, devices)
    written = dict.fromkeys([*(each for each in product if not _excluded(each, contents.exclude)), *included])
    wanted: dict[_Combination, None] = {}
    for each in written:
        added = (p for p in plugins.parts(each) if p not in written and not _excluded(p, contents.exclude))
        wanted |= dict.fromkeys([*added, each])
    if not wanted:
        raise SuiteError("no case is left after [[exclude]]")
    wanted |= dict.fromkeys([each.reference for each in wanted])
    # Include the suite's own devices, so that an exclusion for a device that --device replaces is still accepted.
    named = [each for chosen in (devices, None) for some in _combinations(contents, chosen) for each in some]
    named += [part for each in named for part in plugins.parts(each)]
    named += [each.reference for each in named]
    _refuse_unmatched_exclusions(contents.exclude, named, wanted)

    cases = []
    for each in _in_order(wanted):
        wrong = plugins.incompatibility(each)
        if wrong is None:
            cases.append(plugins.case(each))
        elif each in written:
            raise SuiteError(wrong)
    return tuple(cases)


def _in_order(wanted: Iterable[_Combination]) -> list[_Combination]:
    """Return cases group by group, the reference first and fewer ranks before more, else in the order given."""
    groups = {each.group: number for number, each in reversed(list(enumerate(wanted)))}
    first: dict[Group, int] = {}
    for group, number in groups.items():
        of = reference_group(group)
        first[of] = min(first.get(of, number), number)

    def place(each: _Combination) -> tuple[int, int, int, bool]:
        device = Device.parse(each.device)
        ranks = device.count if device.in_ranks else 0
        return first[each.reference.group], ranks, groups[each.group], each.technique != REFERENCE

    return sorted(wanted, key=place)


def cases_of_program(program: Program, folder: Path, devices: Sequence[str] | None) -> tuple[Case, ...]:
    """Make a case of a user's program for each device, named after the program's file or module.

    Args:
        folder: the folder that the program's file is relative to.
        devices: devices in place of the suite's own.

    Raises:
        SuiteError: if the program cannot be started: key, value and what is wrong.
    """
    if program.module is not None:
        command, name = [sys.executable, "-m", program.module], program.module
    else:
        path = folder / str(program.file)
        command, name = _command_of_file(path, str(program.file)), path.stem
    name = re.sub(r"[^\w.-]+", "-", name)[:_LONGEST_NAME] or "script"
    options = program.model_dump(exclude_none=True, exclude={"device", "ranks"})
    return tuple(
        Case(name, REFERENCE, "script", device, Plugin("script", options), (Plugin(REFERENCE),), Plugin("script"),
             command=(*command, *program.arguments))
        for device in _on_ranks(devices or [program.device], program.ranks)
    )  # fmt: skip


def _on_ranks(devices: Sequence[str], ranks: int | None) -> list[str]:
    """Return the devices with a number of ranks on each.

    Raises:
        SuiteError: if one of them has a number already, or is one GPU of several.
    """
    if ranks is None:
        return list(devices)
    found = []
    for device in devices:
        try:
            found.append(str(Device.parse(device).on_ranks(ranks)))
        except ValueError as error:
            raise SuiteError(f"script.ranks = {ranks} on device {shown(device)}: {error}") from None
    return found


def _command_of_file(path: Path, written: str) -> list[str]:
    """Return the command that runs a file: with this interpreter if it is a Python file, else the file itself."""
    where = f"script.file = {shown(written)}"
    try:
        if path.is_dir():
            raise SuiteError(f"{where}: it is a folder")
        if not path.is_file():
            raise SuiteError(f"{where}: there is no such file")
    except (OSError, ValueError) as error:
        raise SuiteError(f"{where}: {getattr(error, 'strerror', None) or error}") from None
    is_python = path.suffix == ".py"
    if not os.access(path, os.R_OK if is_python else os.X_OK):
        raise SuiteError(f"{where}: {'it cannot be read' if is_python else 'it is neither Python nor executable'}")
    return [sys.executable, str(path)] if is_python else [str(path.absolute())]


def _combinations(contents: Contents, devices: Sequence[str] | None) -> tuple[list[_Combination], list[_Combination]]:
    """Return the combinations of [matrix], and those of [[include]]."""

    def product(axes: Matrix | Addition) -> list[_Combination]:
        chosen = devices or axes.device or contents.matrix.device
        listed = itertools.product(axes.model, axes.technique, axes.workload, chosen)
        combinations = [_Combination(*names) for names in listed]
        return [each.reference if each.technique == REFERENCE else each for each in combinations]

    return product(contents.matrix), [each for more in contents.include for each in product(more)]


def _matches(selection: Selection, each: _Combination) -> bool:
    return all(
        patterns is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        for patterns, name in zip(selection.axes, each, strict=True)
    )


def _excluded(each: _Combination, exclude: Iterable[Selection]) -> bool:
    return any(_matches(selection, each) for selection in exclude)


def _refuse_unmatched_exclusions(
    exclude: Sequence[Selection], candidates: Sequence[_Combination], wanted: Iterable[_Combination]
) -> None:
    """Refuse exclusions that match no case, since such a mistake may cost hours of measuring unwanted cases.

    Raises:
        SuiteError: if there is one.
    """
    for number, selection in enumerate(exclude):
        matched = [each for each in candidates if _matches(selection, each)]
        if matched and all(each.technique == REFERENCE and each in wanted for each in matched):
            raise SuiteError(f"exclude.{number} fits only the reference '{REFERENCE}', which every ratio is against")
        if matched:
            continue
        for position, (axis, patterns) in enumerate(zip(_Combination._fields, selection.axes, strict=True)):
            known = {each[position] for each in candidates}
            for pattern in patterns or ():
                if not any(fnmatch.fnmatchcase(name, pattern) for name in known):
                    hint = did_you_mean(pattern, known)
                    raise SuiteError(f"exclude.{number}.{axis} = {shown(pattern)} fits no {axis} of the suite; {hint}")
        raise SuiteError(f"exclude.{number} = {shown(selection.model_dump(exclude_none=True))} fits no case")


class _Plugins:
    """The plug-ins that a suite names. Each variant is made once, even if no case uses it, to check its options."""

    def __init__(self, contents: Contents, files: Sequence[PluginFile]) -> None:
        self._files = files
        self._variants: dict[str, Mapping[str, Mapping[str, Any]]] = {
            "model": contents.model,
            "technique": contents.technique,
            "workload": contents.workload,
            "metric": contents.metric,
        }
        self._made: dict[tuple[str, str], tuple[Plugin, Any]] = {}
        for kind, variants in self._variants.items():
            for name, table in variants.items():
                self._made[kind, name] = self._variant(kind, name, table)
        self._made["technique", REFERENCE] = self._make("technique", REFERENCE, {}, "matrix.technique")
        self._make_named("matrix", contents.matrix)
        for number, more in enumerate(contents.include):
            self._make_named(f"include.{number}", more)
        self._metrics = self._metric_plugins(contents.suite.metrics)

    def _variant(self, kind: str, name: str, table: Mapping[str, Any]) -> tuple[Plugin, Any]:
        where = f"{kind}.{name}"
        try:
            checked_name(name)
        except ValueError as error:
            raise SuiteError(f"{kind}.{shown(name)}: {error}") from None
        if kind == "technique" and name == REFERENCE:
            raise SuiteError(f"{where}: every ratio is against it, so it cannot be a variant")
        if registry.is_taken(kind, name, self._files):
            raise SuiteError(f"{where}: there is a {kind} of that name already; give the variant another one")
        options = dict(table)
        use = options.pop("use", None)
        if use is None:
            raise SuiteError(f"'{where}.use' is missing: name the {kind} that this is a variant of")
        if not isinstance(use, str):
            raise SuiteError(f"{where}.use = {shown(use)}: expected the name of a {kind}")
        if use in self._variants[kind]:
            raise SuiteError(f"{where}.use = {shown(use)}: that is a variant itself; name the {kind} that it is one of")
        return self._make(kind, use, options, where)

    def _make(self, kind: str, use: str, options: Mapping[str, Any], where: str) -> tuple[Plugin, Any]:
        try:
            found = registry.find(kind, use, self._files, also=self._variants[kind])
            made = registry.made(kind, use, found, options)
        except PluginError as error:
            raise SuiteError(f"{where}: {error}") from None
        try:
            wrong = made.check() if kind in ("model", "workload") else None
        except Exception as error:
            raise SuiteError(f"{where}: 'check' of {kind} '{use}' ended in {summary(error)}") from None
        if wrong:
            raise SuiteError(f"{where}: {wrong}")
        return Plugin(use, made.model_dump(mode="json", exclude_unset=True), found.file), made

    def _make_named(self, where: str, axes: Matrix | Addition) -> None:
        techniques = [member for stack in axes.technique for member in members(stack)]
        for kind, names in (("model", axes.model), ("technique", techniques), ("workload", axes.workload)):
            for name in names:
                if (kind, name) in self._made:
                    continue
                try:
                    self._made[kind, name] = self._make(kind, name, {}, f"{where}.{kind}")
                except SuiteError as error:
                    if not str(error).endswith(" is missing"):
                        raise
                    raise SuiteError(f"{error}; give it in [{kind}.NAME] with use = '{name}'") from None
        for stack in axes.technique:
            seen: dict[tuple[type, str], str] = {}
            for member in members(stack):
                plugin, made = self._made["technique", member]
                same = seen.setdefault((type(made), str(plugin.options)), member)
                if same != member:
                    raise SuiteError(f"{where}.technique = {shown(stack)}: '{same}' and '{member}' are the same")

    def _metric_plugins(self, names: Sequence[str]) -> dict[str, Plugin]:
        """Return the custom quality metrics of a suite, by field."""
        found: dict[str, Plugin] = {}
        for name in names:
            where, own = f"suite.metrics: '{name}'", name.rpartition(":")[2]
            if own in (metric.name for metric in METRICS):
                raise SuiteError(f"{where}: membench has a metric '{own}'; give this one another name in [metric.NAME]")
            if own in (metric.name for metric in own_metrics(found)):
                raise SuiteError(f"{where}: there are two of that name; give one another name in [metric.NAME]")
            if ("metric", name) not in self._made:
                self._made["metric", name] = self._make("metric", name, {}, "suite.metrics")
            plugin, made = self._made["metric", name]
            try:
                found[own_field(own, made.better, made.unit)] = plugin
            except ValueError as error:
                raise SuiteError(f"{where}: {error}") from None
        return found

    def case(self, each: _Combination) -> Case:
        techniques = tuple(self._plugin("technique", member) for member in members(each.technique))
        return Case(
            *each, self._plugin("model", each.model), techniques, self._plugin("workload", each.workload),
            self._metrics, unspread=self._unspread(each),
            parts={part.technique: part.device for part in self.parts(each)},
        )  # fmt: skip

    def _unspread(self, each: _Combination) -> str | None:
        """Return the stack without the members that spread it over ranks; ``None`` on a single device."""
        if not Device.parse(each.device).in_ranks:
            return None
        techniques = self._techniques(each.technique)
        return "+".join(name for name in techniques if not isinstance(techniques[name], Parallel)) or REFERENCE

    def parts(self, each: _Combination) -> list[_Combination]:
        """Return the cases that a stack is compared with; none if it cannot be spread over its ranks.

        In ranks, these include the stack without the members that spread it: the same training on a single device.
        """
        device, techniques = Device.parse(each.device), self._techniques(each.technique)
        spreads = {name for name, technique in techniques.items() if isinstance(technique, Parallel)}
        if not device.in_ranks:
            return [] if spreads else [each._replace(technique=part) for part in parts(each.technique)]
        try:
            ranks = degrees(list(techniques.values()), device.count)
        except Unsuitable:
            return []
        if not spreads or len(ranks) < len(spreads):
            return []
        alone = self._unspread(each)
        found = []
        for part in dict.fromkeys([*parts(each.technique), *([alone] if alone and alone != REFERENCE else [])]):
            own = [technique.dimension for name in members(part) if isinstance(technique := techniques[name], Parallel)]
            many = f"{math.prod(ranks[dimension] for dimension in own)}x" if own else ""
            found.append(each._replace(technique=part, device=f"{many}{device.single}"))
        return found

    def _techniques(self, stack: str) -> dict[str, Technique]:
        return {name: self._made["technique", name][1] for name in members(stack)}

    def _plugin(self, kind: str, name: str) -> Plugin:
        return self._made[kind, name][0]

    def incompatibility(self, each: _Combination) -> str | None:
        """Return why the model, techniques and workload of a case are incompatible, or ``None`` if they are not."""
        (_, model), (_, workload) = self._made["model", each.model], self._made["workload", each.workload]
        names = members(each.technique)
        techniques = tuple(self._techniques(each.technique).values())
        try:
            longest, needed = model.max_tokens(), workload.longest_sequence()
            if longest is not None and needed > longest:
                return f"workload '{each.workload}' needs {needed} tokens; model '{each.model}' takes {longest} at most"
            for position, (name, technique) in enumerate(zip(names, techniques, strict=True)):
                device = Device.parse(each.device)
                setting = Setting(
                    model, workload, str(device.ranks[0]), techniques[:position], techniques[position + 1 :],
                    device.count if device.in_ranks else None,
                )  # fmt: skip
                wrong = technique.check(setting)
                if wrong:
                    return f"technique '{name}' on model '{each.model}' with workload '{each.workload}': {wrong}"
        except Exception as error:
            return f"{'/'.join(each)} cannot be checked: a plug-in ended in {summary(error)}"
        return None
