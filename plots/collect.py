"""Keep what was measured: logs and records of runs in plots/measured, and what is drawn from them.

  python plots/collect.py runs --name cifar10    adds the complete runs to plots/measured/cifar10
  python plots/collect.py                        draws what is there again
  python plots/collect.py --check                fails where what is there is not what the logs say

Of each run, log and args.json are kept, without this computer's paths; only runs of a clean commit.
Each folder has tables.md, claims.md, the report's figures, and picture.png of 20 and 56 layers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from matplotlib import pyplot as plt
from PIL import Image

from plots import claims, conditions, curves, figures, logs, tables
from plots.results import WITHIN
from plots.runs import UNFINISHED, Group
from resnet import command, files, record
from resnet.command import InputError, Parser

DRAWN = ("tables.md", "claims.md", "fig*.png", "picture.png")
MEASURED = Path(__file__).resolve().parent / "measured"
SHOWN = (("plain", 20), ("plain", 56), ("resnet", 20), ("resnet", 56))
TOLERANCE = 2.0  # grey levels of 255 in the mean: another Matplotlib draws letters otherwise


def add(runs: Sequence[Path], folder: Path) -> None:
    """Copy log and args.json of the complete runs under ``runs`` into ``folder``."""
    for group in logs.read(runs):
        for run in group.runs:
            target = folder / run.path.name
            if not run.identity or run.state == UNFINISHED:
                print(f"skipped {run.path}: not a complete run", file=sys.stderr)
                continue
            if target.exists() and kept(target) != run.identity:
                raise InputError(f"{target}: another run than {run.path}; legal: another --name")
            record.publish(run.path, target)
            print(f"kept {target}")


def kept(folder: Path) -> dict:
    """Tell what the run is that was kept in a folder."""
    try:
        return logs.read_run(folder / "log").identity
    except ValueError as error:
        raise InputError(f"{folder}: {error}; legal: remove it, and it is kept again") from None


def draw(groups: Sequence[Group], out: Path) -> None:
    """Write all that is drawn from ``groups`` into the folder ``out``."""
    (out / "tables.md").write_text(tables.markdown(groups), encoding="utf-8")
    (out / "claims.md").write_text(claims.markdown(groups), encoding="utf-8")
    for picture in figures.PICTURES:
        for name, _, figure in figures.draw(picture, groups):
            _save(figure, out / f"{name}.png")
    shown = [group for group in groups if (group.architecture, group.layers) in SHOWN]
    if shown:
        # Of one way to train, the one with the most nets and runs.
        part = max(
            conditions.partition(shown, WITHIN),
            key=lambda some: (len(some), sum(len(group.runs) for group in some)),
        )
        title = conditions.shared(part, but=["evaluation"])
        _save(curves.draw(part, conditions.labels(part), title), out / "picture.png")


def _save(figure, path: Path) -> None:
    curves.save(figure, path)
    plt.close(figure)


def differs(found: Path, wanted: Path) -> bool:
    """Tell whether a file differs from the wanted one; of a picture, whether it shows other things.

    What it was drawn from is compared, and what one sees: another Matplotlib writes other bytes.
    """
    if not found.exists() or not wanted.exists():
        return True
    if found.suffix != ".png":
        return found.read_bytes() != wanted.read_bytes()
    pixels, told = [], []
    for path in (found, wanted):
        with Image.open(path) as image:
            pixels.append(np.asarray(image.convert("RGB"), np.float32))
            told.append(image.info.get("Description"))
    if pixels[0].shape != pixels[1].shape or told[0] != told[1]:
        return True
    return float(abs(pixels[0] - pixels[1]).mean()) > TOLERANCE


def renew(folder: Path, check: bool) -> list[str]:
    """Draw a folder again, or find out what would change; names of the files that differ."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        draw(logs.read([folder]), out)
        here = {path.name for drawn in DRAWN for path in folder.glob(drawn)}
        names = sorted(here | {path.name for path in out.iterdir()})
        changed = [name for name in names if differs(folder / name, out / name)]
        for name in [] if check else changed:
            if (out / name).exists():
                files.write(folder / name, (out / name).read_bytes())
            else:
                (folder / name).unlink()
    return changed


def main() -> None:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", type=command.path, nargs="*", metavar="RUNS", help="runs to be kept")
    p.add_argument("--name", type=command.name, default="cifar10",
                   help="folder for them (default: %(default)s)")  # fmt: skip
    p.add_argument("--check", action="store_true", help="change nothing; fail where it would")
    p.add_argument("--measured", type=command.path, default=MEASURED, metavar="FOLDER",
                   help="where the folders are (default: plots/measured)")  # fmt: skip
    args = p.parse_args()
    if args.runs and args.check:
        raise InputError("--check: found with RUNS, legal: one of them", command.USAGE)
    if args.runs:
        add(args.runs, args.measured / args.name)
    stale = []
    for folder in sorted(path for path in args.measured.iterdir() if path.is_dir()):
        changed = renew(folder, args.check)
        stale += [str(folder / name) for name in changed] if args.check else []
        print(f"{folder.name}: {', '.join(changed) or 'as it should be'}")
    if stale:
        raise InputError(f"{', '.join(stale)}: not what the logs say; legal: make measured")


if __name__ == "__main__":
    command.run(main)
