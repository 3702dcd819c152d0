"""Draw training loss and evaluation error against the epoch, for any logs.

  python plots/curves.py runs/resnet-20-seed0                one run
  python plots/curves.py runs -o curves.pdf                  all runs; seeds as mean and band
  python plots/curves.py runs --watch                        again and again while training goes on
  python plots/curves.py old/result/log runs/resnet-20-seed0    beside a log of another project

The mean over seeds is a line, with a band from the smallest to the largest run.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")  # draws without a display

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from plots import conditions, logs
from plots.runs import COMPLETE, DIVERGED, UNFINISHED, Group, Run
from resnet import command, files
from resnet.command import InputError

# Okabe and Ito, "Color Universal Design" (2008): told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = (  # and in black and white: one for each of the report's depths
    "-", (0, (4, 1.2)), (0, (4, 1, 1, 1)), (0, (1.2, 1)), (0, (6, 1, 1.2, 1, 1.2, 1)),
)  # fmt: skip
GREY = "0.55"
WIDTH, HEIGHT = 7.0, 2.5  # inches; two panels of a column's width, without the legend
LABEL = 104  # letters side by side in the legend
STYLE = {
    "font.size": 8,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "lines.linewidth": 1.1,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "pdf.fonttype": 42,  # text stays text
    "svg.hashsalt": "resnet",  # the same picture from the same logs, byte by byte
}
ENDS = {DIVERGED: "x", UNFINISHED: "o"}
FORMATS = (".png", ".pdf")
BAND = "smallest to largest run"


def combine(series: Sequence[dict[float, float]]) -> tuple[np.ndarray, ...]:
    """Find the epochs that all series have, and their mean, smallest and largest value there."""
    epochs = [epoch for epoch in series[0] if all(epoch in each for each in series)]
    values = np.array([[each[epoch] for epoch in epochs] for each in series])
    return np.array(epochs), values.mean(axis=0), values.min(axis=0), values.max(axis=0)


def draw(
    groups: Sequence[Group],
    labels: Sequence[str],
    title: str = "",
    looks: Sequence[int] | None = None,
) -> Figure:
    """Draw training loss on the left, evaluation error on the right.

    The complete runs of a group are one mean line with a band from the smallest to the largest;
    a run that diverged or is not finished is a thin line of its own.

    Args:
        groups: What to draw.
        labels: Their names in the legend.
        title: A line over both panels.
        looks: Numbers of their colours and line styles (default: in turn). Those with an equal
            number are taken in turn too.
    """
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, HEIGHT), layout="constrained")
        labels, title = map(_as_it_is, labels), _as_it_is(title)
        handles = []
        if looks is None or len(set(looks)) < len(groups):
            looks = range(len(groups))
        alike = all(group.runs[0].drops == groups[0].runs[0].drops for group in groups)
        for i, group, label in zip(looks, groups, labels, strict=True):
            look = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)]}
            complete = group.of(COMPLETE)
            if complete:
                runs = f" ({len(complete)} runs)" if len(complete) > 1 else ""
                for axes, name in ((left, "loss"), (right, "error")):
                    epochs, mean, low, high = combine([getattr(run, name) for run in complete])
                    # One or two points make no line that can be seen.
                    point = {"marker": "o", "markersize": 3} if len(epochs) < 3 else {}
                    (line,) = axes.plot(epochs, mean, label=label + runs, **look, **point)
                    if len(complete) > 1:
                        axes.fill_between(
                            epochs, low, high, color=look["color"], alpha=0.2, linewidth=0
                        )
                handles.append(line)
            for run in group.runs:
                if run.state != COMPLETE:
                    seed = f", seed {run.identity['seed']}" if run.identity else ""
                    end = {"label": f"{label}{seed}, {run.state}", "linewidth": 0.7, **look}
                    end |= {"marker": ENDS[run.state], "markersize": 4}
                    _plot_to_the_end(left, run.loss, end)
                    handles += _plot_to_the_end(right, run.error, end)
            if group is groups[0] or not alike:
                _mark(group.runs[0], (left, right), GREY if alike else look["color"])
        _dress(left, right, groups, title, figure)
        if any(len(group.of(COMPLETE)) > 1 for group in groups):
            handles.append(Patch(color=GREY, alpha=0.35, linewidth=0, label=f"band: {BAND}"))
        if any(group.runs[0].drops for group in groups):
            handles.append(Line2D([], [], color=GREY, linewidth=0.6, label="learning rate lowered"))
        if any(group.runs[0].additions for group in groups):
            handles.append(
                Line2D([], [], color=GREY, linewidth=0.9, linestyle=":", label="block added")
            )
        _legend(figure, handles)
    return figure


def _as_it_is(text: str) -> str:
    """Write ``text`` for Matplotlib, which takes what is between dollars for mathematics."""
    return command.one_line(text).replace("$", r"\$")


def _plot_to_the_end(axes, series: dict[float, float], look: dict) -> list[Line2D]:
    """Draw one run, with a mark where its numbers end."""
    values = list(series.values())
    finite = [i for i, value in enumerate(values) if np.isfinite(value)]
    return axes.plot(list(series), values, markevery=finite[-1:], **look)


def _mark(run: Run, panels: Sequence, colour: str) -> None:
    for axes in panels:
        for epoch in run.drops:
            axes.axvline(epoch, color=colour, linewidth=0.6, alpha=0.6, zorder=0)
        for epoch in run.additions:
            axes.axvline(epoch, color=colour, linewidth=0.9, alpha=0.8, linestyle=":", zorder=0)


def _dress(left, right, groups: Sequence[Group], title: str, figure: Figure) -> None:
    evaluations = {run.evaluation for group in groups for run in group.runs}
    what = evaluations.pop() if len(evaluations) == 1 else "evaluation"
    smallest = min(min(run.error.values()) for group in groups for run in group.runs)
    # Both 90 % and the last tenths can be read on a log scale; it has no place for 0 %.
    logarithmic = smallest > 0
    right.set_ylabel(f"{what} error, %" + (" (log scale)" if logarithmic else ""))
    losses = [loss for group in groups for run in group.runs for loss in run.loss.values()]
    # A run may diverge in its first epoch.
    positive = any(0 < loss < np.inf for loss in losses)
    left.set_ylabel("training loss" + (" (log scale)" if positive else ""))
    for axes in [left] * positive + [right] * logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(left=0)
        axes.grid(True)
    if title:
        figure.suptitle(fill(title, LABEL - 8), fontsize=9)


def _legend(figure: Figure, handles: list) -> None:
    """Draw a legend below the panels, where it hides no line; the picture grows by its height."""
    for handle in handles:
        handle.set_label(fill(handle.get_label(), LABEL))
    labels = [handle.get_label() for handle in handles]
    columns = max(1, min(len(handles), 4, LABEL // max(map(len, labels))))
    lines = -(-sum(label.count("\n") + 1 for label in labels) // columns)
    figure.set_figheight(HEIGHT + 0.17 * lines + 0.1)
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handlelength=2.6,
        columnspacing=1.5,
    )


def shows(figure: Figure) -> str:
    """Compute the sha256 of a picture's lines and words, however they are drawn."""
    found: list[str] = [figure.get_suptitle()]
    for legend in figure.legends:
        found += [text.get_text() for text in legend.get_texts()]
    for axes in figure.axes:
        found += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
        found += [f"{v:.6g}" for line in axes.lines for v in np.ravel(line.get_xydata())]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def write(figure: Figure, file: IO[bytes], kind: str) -> None:
    """Write the picture as ``kind``: png, which tells what it ``shows``, pdf or svg."""
    # Without a date, the same logs give the same file.
    metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    metadata["png"] = {"Description": f"sha256 of what is drawn: {shows(figure)}"}
    with plt.rc_context(STYLE):
        figure.savefig(file, format=kind, dpi=200, metadata=metadata[kind])


def save(figure: Figure, path: Path | str) -> None:
    """Write the picture in the format that the name says; there is a whole file or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()  # on a full disk Matplotlib's PDF hides the reason
    write(figure, content, path.suffix.lower().removeprefix("."))
    files.write(path, content.getvalue())


def picture(text: str) -> Path:
    """Parse an argument: the name of a PNG or PDF file."""
    path = command.path(text)
    if path.suffix.lower() not in FORMATS:
        raise argparse.ArgumentTypeError(f"found '{text}', legal: a name in {' or '.join(FORMATS)}")
    return path


def main() -> None:
    p = logs.parser(__doc__)
    p.add_argument(
        "--out",
        "-o",
        type=picture,
        default=Path("curves.png"),
        metavar="FILE",
        help="the picture, .png or .pdf (default: %(default)s)",
    )
    p.add_argument(
        "--watch", action="store_true", help="draw again whenever a log grows, until Ctrl-C"
    )
    args = p.parse_args()
    if args.watch:
        with contextlib.suppress(KeyboardInterrupt):
            watch(args.runs, args.out)
    else:
        write_curves(args.runs, args.out)


def write_curves(paths: Sequence[Path], out: Path) -> None:
    """Draw the runs under ``paths`` into the picture ``out``."""
    groups = logs.read(paths)
    title = conditions.shared(groups, but=["evaluation"])
    figure = draw(groups, conditions.labels(groups), title)
    save(figure, out)
    plt.close(figure)
    print(f"wrote {out}", flush=True)


def watch(paths: Sequence[Path], out: Path, wait: float = 5) -> None:
    """Draw again whenever a log under ``paths`` has changed, looking every ``wait`` seconds."""
    drawn = None
    while True:
        found = logs.stamps(paths)
        if found and found != drawn:
            drawn = found
            try:
                write_curves(paths, out)
            except InputError as error:  # no log has an entry yet
                print(f"waiting: {error}", file=sys.stderr)
        time.sleep(wait)


if __name__ == "__main__":
    command.run(main)
