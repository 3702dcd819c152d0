"""What tells groups of runs apart: data, schedule, batch size ...; in words for people."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

from plots.runs import Group

ORDER = (
    "data",
    "training images",
    "schedule",
    "batchsize",
    "augmentation",
    "evaluation",
    "warm-up",
)


def describe(key: str, value: object) -> str:
    """Say a condition in a few words; '' for one that goes without saying."""
    match key:
        case "training images":
            return f"{value:,} training images"
        case "batchsize":
            return f"batch {value}"
        case "evaluation":
            return f"{value} images"
        case "augmentation":  # only where it is not the report's
            return "no augmentation" if value == "none" else f"{value}s as the only augmentation"
        case "freeze":
            return "earlier blocks held still"
        case "new ends":
            return "fresh conv1 and fc"
        case "warm-up":
            return "warm-up" if value else ""
        case "schedule" if value.get("name") == "custom":
            drops = ", ".join(f"{drop:,}" for drop in value["drops"]) or "none"
            return f"{value['iterations']:,} iterations (drops: {drops})"
        case "schedule" if is_partial(value):
            name = value["name"].replace("partial", "partial training")
            return f"{name}, {value['iterations']:,} iterations in all"
        case "schedule":
            return f"schedule {value.get('name')}"
        case "data":
            return str(value)
    return f"{key} {value}"


def is_partial(plan: dict) -> bool:
    """Tell whether a schedule is that of partial training, all stages, maybe shortened."""
    return str(plan.get("name")).partition(" / ")[0] == "partial"


def tag(key: str, values: dict) -> str:
    """Say a condition in a word or two, for the name of a file.

    Args:
        key: Its name.
        values: The conditions of a group.
    """
    value = values.get(key)
    match key:
        case "training images":
            return f"{value} images"
        case "schedule" if value["name"] == "custom":
            epochs = value["iterations"] * values["batchsize"] / values["training images"]
            return f"{math.floor(epochs)} epochs"
        case "schedule":
            return value["name"]
        case "evaluation":
            return value
    return describe(key, value)


def _rank(key: str) -> tuple:
    return (ORDER.index(key), "") if key in ORDER else (len(ORDER), key)


def varying(groups: Sequence[Group]) -> list[str]:
    """List the conditions in which the groups differ."""
    keys = {key for group in groups for key in group.conditions}
    return [
        key
        for key in sorted(keys, key=_rank)
        if any(g.conditions.get(key) != groups[0].conditions.get(key) for g in groups)
    ]


def partition(groups: Sequence[Group], but: Sequence[str]) -> list[list[Group]]:
    """Put groups together where their conditions agree, those in ``but`` aside."""
    parts: dict[str, list[Group]] = {}
    for group in groups:
        key = {name: value for name, value in group.conditions.items() if name not in but}
        parts.setdefault(json.dumps(key, sort_keys=True), []).append(group)
    return list(parts.values())


def shared(groups: Sequence[Group], but: Sequence[str] = ()) -> str:
    """Say the conditions in which all groups agree, in words, leaving out those in ``but``."""
    if not groups:
        return ""
    left_out = {*varying(groups), "architecture", "n", "log", *but}
    conditions = groups[0].conditions
    keys = sorted(conditions.keys() - left_out, key=_rank)
    return ", ".join(filter(None, (describe(key, conditions[key]) for key in keys)))


def labels(groups: Sequence[Group], name: Callable[[Group], str] | None = None) -> list[str]:
    """Name each group, with the conditions in which it differs from others.

    Args:
        groups: The groups that are shown together.
        name: How to call one (default: by architecture and depth).
    """
    keys = [key for key in varying(groups) if key not in ("architecture", "n", "log")]

    def label(group: Group) -> str:
        own = [describe(key, group.conditions[key]) for key in keys if key in group.conditions]
        return ", ".join(filter(None, [name(group) if name else group.name, *own]))

    found = [label(group) for group in groups]
    return [
        f"{text} ({group.runs[0].path})" if text and found.count(text) > 1 else text
        for text, group in zip(found, groups, strict=True)
    ]
