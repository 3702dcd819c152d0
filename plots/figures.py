"""Draw the report's figures 1, 5, 8 and 10 from the runs made so far.

  python plots/figures.py runs                   fig1.png, fig1.pdf ... in the current folder
  python plots/figures.py runs -o pictures       in the folder 'pictures'

Beside the training loss stands the test error; the report's Fig. 8 and 10 have accuracy there.
Runs with different data or schedules come into separate pictures. A figure without a run is named.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from plots import conditions, curves, logs, reference
from plots.results import WITHIN
from plots.runs import NAMES, Group
from resnet import command


@dataclass(frozen=True)
class Picture:
    """What a figure of the report shows.

    Attributes:
        name: Of its files.
        title: What it shows.
        nets: Pairs of architecture and layers.
        together: Conditions that may differ within one picture.
    """

    name: str
    title: str
    nets: tuple[tuple[str, int], ...]
    together: tuple[str, ...] = ()


def _depths(architecture: str, *layers: int) -> tuple[tuple[str, int], ...]:
    return tuple((architecture, depth) for depth in layers)


PICTURES = (
    Picture("fig1", "Plain networks", _depths("plain", 32, 44, 56, 110)),
    Picture("fig5", "Residual networks", _depths("resnet", 32, 44, 56, 110)),
    Picture("fig8", "Residual of residual networks", _depths("resresnet", 20, 32, 44, 56, 110)),
    Picture(
        "fig10",
        "ResNet-32, trained whole or block by block",
        (("resnet", 32), ("top_down", 32), ("bottom_up", 32)),
        ("schedule",),  # partial training has one of its own (report, III.B)
    ),
)


def draw(picture: Picture, groups: Sequence[Group]) -> Iterator[tuple[str, str, Figure]]:
    """Draw one figure, once for each set of conditions: name of the file, caption, picture."""
    chosen = [group for group in groups if (group.architecture, group.layers) in picture.nets]
    within = (*WITHIN, *picture.together)
    apart = [key for key in conditions.varying(chosen) if key not in within]
    slugs: list[str] = []
    one = len({architecture for architecture, _ in picture.nets}) == 1
    for part in conditions.partition(chosen, within):
        values = (conditions.tag(key, part[0].conditions) for key in apart)
        slug = re.sub(r"[^a-z0-9]+", "-", "-".join(values).lower()).strip("-")
        slugs.append(slug)
        if slugs.count(slug) > 1:
            slug = f"{slug}-{slugs.count(slug)}"
        title = f"{picture.title}: {conditions.shared(part, but=['evaluation'])}"
        labels = conditions.labels(part, (lambda g: f"{g.layers} layers") if one else None)
        # A depth keeps its colour from figure to figure.
        looks = [reference.DEPTHS.index(group.layers) for group in part] if one else None
        figure = curves.draw(part, labels, title, looks)
        yield "-".join(filter(None, [picture.name, slug])), title, figure


def main() -> None:
    p = logs.parser(__doc__)
    p.add_argument(
        "--out",
        "-o",
        type=command.path,
        default=Path(),
        metavar="FOLDER",
        help="where the pictures go (default: the current folder)",
    )
    args = p.parse_args()
    groups = logs.read(args.runs)
    for picture in PICTURES:
        drawn = list(draw(picture, groups))
        for name, _, figure in drawn:
            for suffix in curves.FORMATS:
                path = args.out / (name + suffix)
                curves.save(figure, path)
                print(f"wrote {path}")
            plt.close(figure)
        if not drawn:
            nets = ", ".join(f"{NAMES[name]}-{layers}" for name, layers in picture.nets)
            print(f"skipped {picture.name}: no run of {nets}", file=sys.stderr)


if __name__ == "__main__":
    command.run(main)
