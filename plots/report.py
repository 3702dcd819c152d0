"""Write one HTML page from the runs made so far: the report's claims, its tables and figures.

  python plots/report.py runs                       report.html in the current folder
  python plots/report.py runs -o results/page.html

Each number leads to its runs: commands, versions, devices, commits, times, data.
The page needs no other file.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from plots import claims, conditions, curves, figures, logs, results
from plots.runs import Group, Run
from resnet import command, files
from resnet.command import clock

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
h3 { margin: 1.8rem 0 .4rem; } p { margin: .4rem 0; max-width: 46rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid #1a1a1a; } tbody tr + tr > * { border-top: 1px solid #e4e4e4; }
figure { margin: 1.2rem 0; } figure img { width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: .9rem; }
a { color: #0050a0; } code { font-size: .85em; overflow-wrap: anywhere; }
tbody th { font-weight: 500; }
details { margin: .3rem 0 .3rem; } summary { cursor: pointer; }
details table { font-size: .9rem; margin-left: 1rem; } details th { white-space: nowrap; }
:target { background: #fff6d6; }
@media print { body { max-width: none; } }
"""
STARTS = {  # of args.json
    "time": "Started",
    "iteration": "From iteration",
    "command": "Command",
    "data": "Data",
    "data digest": "sha256 of images and labels",
    "device": "Device",
    "backend": "Backend",
    "versions": "Versions",
    "packages": "Packages",
    "git": "Commit",
}


def page(groups: Sequence[Group]) -> str:
    """Write the whole page."""
    anchors = {id(group): f"runs-{i}" for i, group in enumerate(groups, 1)}
    count = sum(len(group.runs) for group in groups)
    runs = "".join(_group(group, anchors[id(group)]) for group in groups)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Residual networks: tables and figures</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Residual networks: tables and figures</h1>
<p>Made from {count} run{"s" * (count != 1)}. The reference numbers are those of He et al. (2015)
and of the report that this project repeats, Gelda et al. (2016), both on CIFAR-10. Ours are the
accuracy after the last epoch, as mean ± standard deviation (runs). Each leads to its runs.</p>
<h2>The report's claims</h2>
{_claims(groups, anchors)}
<h2>Tables</h2>
{"".join(_table(table, anchors) for table in results.build(groups))}
<h2>Figures</h2>
{"".join(_figures(groups)) or "<p>No run of a network in the report's figures.</p>"}
<h2>Runs</h2>
{runs}
</body>
</html>
"""


def _claims(groups: Sequence[Group], anchors: dict[int, str]) -> str:
    """Write every claim with its rule, commands, what was measured, and the verdicts."""

    def lines(texts: Sequence[str]) -> str:
        return "<br>".join(map(escape, texts)) or results.BLANK

    def measured(verdict: claims.Verdict) -> str:
        links = "".join(
            f' <a href="#{anchors[id(group)]}">[{i}]</a>'
            for i, group in enumerate(verdict.groups, 1)
        )
        return lines(verdict.measured) + links

    rows = ""
    for claim, found in claims.verdicts(groups):
        span = f' rowspan="{len(found)}"' if len(found) > 1 else ""
        commands = "".join(f"<br><code>{escape(each)}</code>" for each in claim.commands)
        first = (
            f'<th scope="row"{span}>{escape(claim.section)}</th><td{span}>{escape(claim.text)}'
            f"<details><summary>Decided by</summary>{escape(claim.rule)}{commands}</details></td>"
        )
        for verdict in found:
            rows += (
                f"<tr>{first}<td>{escape(verdict.schedules) or results.BLANK}</td>"
                f"<td>{measured(verdict)}</td>"
                f"<td><b>{escape(verdict.word)}</b> {escape(verdict.reason)}</td></tr>\n"
            )
            first = ""
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("Report", "Claim", "Schedule", "Measured", "Verdict")
    )
    sentences = "".join(f"<li>{escape(each)}</li>" for each in claims.summary(groups))
    return f"""<p class="note">{escape(claims.note(groups))} {escape(claims.SHORTER)}</p>
<ul>{sentences}</ul>
<div class="wide"><table><thead><tr>{head}</tr></thead>
<tbody>
{rows}</tbody></table></div>
"""


def _table(table: results.Table, anchors: dict[int, str]) -> str:
    def cell(content: results.Cell) -> str:
        text = escape(content.text).replace(" run", "&nbsp;run")  # '(3 runs)' in one piece
        if len(content.groups) == 1:
            return f'<td><a href="#{anchors[id(content.groups[0])]}">{text}</a></td>'
        links = "".join(
            f' <a href="#{anchors[id(group)]}">[{i}]</a>'
            for i, group in enumerate(content.groups, 1)
        )
        return f"<td>{text}{links}</td>"

    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.head)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0].text)}</th>{"".join(map(cell, row[1:]))}</tr>\n'
        for row in table.rows
    )
    return f"""<h3>{escape(table.title)}</h3>
<p class="note">{escape(table.note)}</p>
<div class="wide"><table><thead><tr>{head}</tr></thead>
<tbody>
{rows}</tbody></table></div>
"""


def _figures(groups: Sequence[Group]) -> Iterator[str]:
    for picture in figures.PICTURES:
        for _, caption, figure in figures.draw(picture, groups):
            caption = escape(f"Fig. {picture.name.removeprefix('fig')}: {caption}")
            yield f"""<figure><img alt="{caption}" src="{_embedded(figure)}">
<figcaption>{caption}. Training loss and error against the epoch.</figcaption></figure>
"""


def _embedded(figure: Figure) -> str:
    """Write the picture as a data URL; as an image of its own, its ids meet no others."""
    file = io.BytesIO()
    curves.write(figure, file, "svg")
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def _group(group: Group, anchor: str) -> str:
    warm_up = ", warm-up" if group.conditions.get("warm-up") else ""
    return f"""<section id="{anchor}"><h3>{escape(group.name)}: {escape(results.last(group))}</h3>
<p class="note">{escape(conditions.shared([group]) + warm_up)}</p>
{"".join(map(_run, group.runs))}</section>
"""


def _run(run: Run) -> str:
    seed = f"Seed {run.identity['seed']}: " if run.identity else ""
    took = f", {clock(run.seconds)} of training" if run.seconds is not None else ""
    devices = ", ".join(dict.fromkeys(str(start.get("device", "?")) for start in run.starts))
    summary = f"{seed}{run.state}, {run.last:.2f} % at the last epoch{took}"
    starts = (
        "".join(map(_start, run.starts)) or "<p>A plain log, without a record of its making.</p>"
    )
    return f"""<details><summary>{escape(summary + (f", {devices}" if devices else ""))}</summary>
<p class="note">Best epoch: {run.best:.2f} % (chosen on the images it is measured on: no result).
From <code>{escape(str(run.path))}</code></p>
{starts}</details>
"""


def _start(start: dict) -> str:
    rows = ""
    for key, name in STARTS.items():
        value = start.get(key)
        if key == "packages" and key not in start:
            continue  # as at the start before
        if key in ("versions", "packages") and isinstance(value, dict):
            value = ", ".join(
                f"{key} {text}" for key, text in value.items() if isinstance(text, str)
            )
        elif key == "git" and isinstance(value, dict):
            kept = "its diff is in args.json" if value.get("diff") else "cannot be repeated"
            modified = f", modified: {kept}" if value.get("modified") else ""
            value = f"{value.get('commit')}{modified}"
        text = escape(str(value) if isinstance(value, str | int | float) else results.BLANK)
        text = f"<code>{text}</code>" if key == "command" else text
        rows += f'<tr><th scope="row">{name}</th><td>{text}</td></tr>\n'
    return f"<table><tbody>\n{rows}</tbody></table>\n"


def page_name(text: str) -> Path:
    """Parse an argument: the name of an HTML file."""
    path = command.path(text)
    if path.suffix.lower() not in (".html", ".htm"):
        raise argparse.ArgumentTypeError(f"found '{text}', legal: a name in .html")
    return path


def main() -> None:
    p = logs.parser(__doc__)
    p.add_argument(
        "--out",
        "-o",
        type=page_name,
        default=Path("report.html"),
        metavar="FILE",
        help="the page (default: %(default)s)",
    )
    args = p.parse_args()
    text = page(logs.read(args.runs))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    files.write(args.out, text)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    command.run(main)
