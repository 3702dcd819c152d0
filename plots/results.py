"""The report's tables with our numbers in them, as rows of cells."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from plots import conditions, reference
from plots.runs import COMPLETE, DIVERGED, NAMES, UNFINISHED, Group

BLANK = "\N{EN DASH}"  # not measured
BEST = "Best epoch (chosen on the images it is measured on: no result)"
WITHIN = ("architecture", "n", "warm-up")  # conditions that may differ within a table or a picture
SOURCES = " after the last epoch; He et al. and the report on CIFAR-10"
PARTIAL = {  # III.B: how the blocks of a ResNet-32 were trained
    "resnet": "all from the start",
    "top_down": "top-down",
    "bottom_up": "bottom-up",
}
REPORT_NETS = {(name, layers) for name, column in reference.REPORT.items() for layers in column}


@dataclass(frozen=True)
class Cell:
    """One entry of a table.

    Attributes:
        text: What it says.
        groups: The runs it was measured from; none for words and reference numbers.
    """

    text: str
    groups: tuple[Group, ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; the note says what all of ours have in common."""

    title: str
    note: str
    head: list[str]
    rows: list[list[Cell]]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Write mean ± sample standard deviation (runs); a single run has no deviation."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation} ({len(values)} run{'s' * (len(values) > 1)})"


def last(group: Group) -> str:
    """Write accuracy after the last epoch; runs that diverged or are not finished stand apart."""
    parts = []
    if complete := group.of(COMPLETE):
        parts.append(spread([run.last for run in complete]))
    if diverged := group.of(DIVERGED):
        parts.append("diverged: " + spread([run.last for run in diverged]))
    if unfinished := group.of(UNFINISHED):
        done = ", ".join(f"{run.progress:.0%}" for run in unfinished)
        parts.append(f"unfinished: {done} done")
    return "; ".join(parts)


def best(group: Group) -> str:
    """Write accuracy of the best epoch of complete runs."""
    complete = group.of(COMPLETE)
    return spread([run.best for run in complete]) if complete else BLANK


def measured(groups: Sequence[Group], architecture: str, layers: int) -> Cell:
    """Make the cell of one network; with a note on each where it was trained in several ways."""
    own = [g for g in groups if (g.architecture, g.layers) == (architecture, layers)]
    if not own:
        return Cell(BLANK)
    notes = conditions.labels(own, lambda _: "") if len(own) > 1 else [""]
    texts = [
        f"{last(g)}" + (f" [{note or 'no warm-up'}]" if len(own) > 1 else "")
        for g, note in zip(own, notes, strict=True)
    ]
    return Cell("; ".join(texts), tuple(own))


def is_measured(group: Group) -> bool:
    """Tell whether one of its runs has come to its end."""
    return bool(group.of(COMPLETE) or group.of(DIVERGED))


def _number(column: dict[int, float], layers: int) -> Cell:
    return Cell(f"{column[layers]:.2f}" if layers in column else BLANK)


def _fig6(groups: list[Group]) -> Table:
    rows = [
        [
            Cell(str(layers)),
            _number(reference.HE2015, layers),
            _number(reference.REPORT["resnet"], layers),
            measured(groups, "resnet", layers),
        ]
        for layers in reference.DEPTHS
    ]
    head = ["Layers", "He et al.", "Report", f"Ours, {_images(groups)}"]
    return Table("Fig. 6: residual networks", _note(groups, SOURCES), head, rows)


def _fig9(groups: list[Group]) -> Table:
    names = ("plain", "resnet", "resresnet")
    head = ["Layers"]
    for name in names:
        head += [f"{NAMES[name]}: report", f"{NAMES[name]}: ours, {_images(groups)}"]
    rows = []
    for layers in reference.DEPTHS:
        row = [Cell(str(layers))]
        for name in names:
            row += [_number(reference.REPORT[name], layers), measured(groups, name, layers)]
        rows.append(row)
    return Table("Fig. 9: three architectures", _note(groups, SOURCES), head, rows)


def _beyond(groups: list[Group]) -> Table:
    """Set architectures that the report has not, each beside the one it is compared with."""
    labels = {group.architecture: group.label for group in groups}
    new = {group.architecture: group.beside for group in groups if group.beside}
    names = dict.fromkeys((*new.values(), *new))
    rows = [
        [Cell(str(layers)), *(measured(groups, name, layers) for name in names)]
        for layers in sorted({group.layers for group in groups if group.architecture in new})
    ]
    columns = [labels.get(name) or NAMES.get(name, name) for name in names]
    head = ["Layers", *(f"{column}: ours, {_images(groups)}" for column in columns)]
    return Table("Not in the report's tables", _note(groups, " after the last epoch"), head, rows)


def _partial(groups: list[Group]) -> Table:
    rows = []
    for name, order in PARTIAL.items():
        cell = measured(groups, name, 32)
        plans = [
            conditions.describe("schedule", group.conditions["schedule"]) for group in cell.groups
        ]
        report = _number(reference.REPORT[name], 32)
        rows.append([Cell(order), report, cell, Cell("; ".join(plans) or BLANK)])
    head = ["Blocks of ResNet-32", "Report", f"Ours, {_images(groups)}", "Our schedule"]
    note = _note(groups, SOURCES, but=["schedule"])
    return Table("III.B: initialization by partial training", note, head, rows)


def _others(groups: list[Group]) -> Table:
    rows = [
        [Cell(label), Cell(last(group), (group,))]
        for label, group in zip(conditions.labels(groups), groups, strict=True)
    ]
    title = "Other runs: the report has no number for them, or they are not finished"
    return Table(title, _note(groups), ["Run", "Last epoch"], rows)


def _best(groups: list[Group]) -> Table:
    rows = [
        [Cell(label), Cell(last(group), (group,)), Cell(best(group))]
        for label, group in zip(conditions.labels(groups), groups, strict=True)
    ]
    head = ["Run", "Last epoch: the result", BEST]
    return Table("Best epochs", _note(groups), head, rows)


def _note(groups: Sequence[Group], sources: str = "", but: Sequence[str] = ()) -> str:
    ours = conditions.shared(groups, but)
    return f"Accuracy in percent{sources}." + (f" Ours: {ours}." if ours else "")


def _images(groups: Sequence[Group]) -> str:
    """Say what the accuracy was measured on, to stand beside the number."""
    if not groups:
        return "not measured"
    ours = groups[0].conditions
    return ours["data"] + (" (validation)" if ours["evaluation"] == "validation" else "")


def build(groups: Sequence[Group]) -> list[Table]:
    """Make the report's tables for each set of conditions, then other runs and best epochs."""
    tables = []
    shown = []
    for table, nets, within in (
        (_fig6, {("resnet", layers) for layers in reference.DEPTHS}, WITHIN),
        (_fig9, {net for net in REPORT_NETS if net[0] not in ("top_down", "bottom_up")}, WITHIN),
        (_partial, {(name, 32) for name in PARTIAL}, (*WITHIN, "schedule")),
    ):
        chosen = [group for group in groups if (group.architecture, group.layers) in nets]
        parts = conditions.partition(chosen, within) or [[]]
        # One for each set of conditions in which something is measured.
        parts = [part for part in parts if any(map(is_measured, part))] or parts[:1]
        tables += map(table, parts)
        shown += itertools.chain(*parts)
    new = {(group.architecture, group.layers): group.beside for group in groups if group.beside}
    nets = {*new, *((beside, layers) for (_, layers), beside in new.items())}
    chosen = [group for group in groups if (group.architecture, group.layers) in nets]
    for part in conditions.partition(chosen, WITHIN):
        if any(group.beside for group in part):
            tables.append(_beyond(part))
            shown += part
    if others := [group for group in groups if group not in shown]:
        tables.append(_others(others))
    return [*tables, _best(groups)]
