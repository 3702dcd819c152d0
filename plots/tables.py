"""Print the report's tables (Fig. 6, Fig. 9, section III.B) beside the runs made so far.

  python plots/tables.py runs                            markdown, on the screen
  python plots/tables.py runs -o results                 results/tables.md
  python plots/tables.py runs --format csv -o results    results/tables.csv, a line per number

Accuracies in percent after the last epoch, as mean ± standard deviation (runs).
Runs with different data or schedules come into separate tables.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plots import conditions, logs, reference
from plots.results import BEST, REPORT_NETS, build
from plots.runs import COMPLETE, DIVERGED, UNFINISHED, Group
from resnet import command, files


def markdown(groups: Sequence[Group]) -> str:
    """Write the tables in Markdown."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    texts = []
    for table in build(groups):
        rows = "".join(line(cell.text for cell in row) for row in table.rows)
        texts.append(
            f"### {table.title}\n\n{table.note}\n\n"
            + line(table.head)
            + line(["---"] * len(table.head))
            + rows
        )
    return "\n".join(texts)


def comma_separated(groups: Sequence[Group]) -> str:
    """Write one line for each group of runs, and for each number of the report without one."""
    keys = ("data", "training images", "batchsize", "evaluation", "schedule", "warm-up", "log")
    lines = []
    for group in groups:
        net = (group.architecture, group.layers)
        ways = {key: group.conditions.get(key) for key in keys}
        if ways["schedule"]:
            ways["schedule"] = conditions.describe("schedule", ways["schedule"])
        runs, diverged = group.of(COMPLETE), group.of(DIVERGED)
        lasts = [run.last for run in runs]
        lines.append(
            _references(*net)
            | ways
            | {
                "mean": f"{mean(lasts):.4f}" if runs else None,
                "standard deviation": f"{stdev(lasts):.4f}" if len(runs) > 1 else None,
                "runs": len(runs),
                "diverged mean": f"{mean(run.last for run in diverged):.4f}" if diverged else None,
                "diverged runs": len(diverged),
                "unfinished runs": len(group.of(UNFINISHED)),
                BEST: f"{mean(run.best for run in runs):.4f}" if runs else None,
            }
        )
    fields = list(lines[0])
    have = {(group.architecture, group.layers) for group in groups}
    lines += [_references(*net) for net in sorted(REPORT_NETS - have)]
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _references(architecture: str | None, layers: int | None) -> dict:
    return {
        "architecture": architecture,
        "layers": layers,
        "He et al.": reference.HE2015.get(layers) if architecture == "resnet" else None,
        "report": reference.REPORT.get(architecture, {}).get(layers),
    }


FORMATS = {"markdown": (markdown, "tables.md"), "csv": (comma_separated, "tables.csv")}


def main() -> None:
    p = logs.parser(__doc__)
    p.add_argument("--format", choices=FORMATS, default="markdown", help="(default: %(default)s)")
    p.add_argument(
        "--out",
        "-o",
        type=command.path,
        metavar="FOLDER",
        help="write a file there (default: print the tables)",
    )
    args = p.parse_args()
    render, name = FORMATS[args.format]
    text = render(logs.read(args.runs))
    if args.out is None:
        print(text, end="")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    files.write(args.out / name, text)
    print(f"wrote {args.out / name}")


if __name__ == "__main__":
    command.run(main)
