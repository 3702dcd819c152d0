"""Trained networks that come with the package, by name: a folder for each in ``pretrained``.

  python -m resnet.pretrained                              which there are
  python -m resnet.pretrained runs/resnet-20-seed0         adds one, as resnet-20

A folder has ``blocks.h5``, the run's ``log`` and ``args.json``, and a card for people, README.md.
"""

from __future__ import annotations

import argparse
import importlib.resources
from pathlib import Path

from resnet import command, files, record, weights
from resnet.command import InputError
from resnet.network import ARCHITECTURES

CARD = "README.md"


def folder() -> Path:
    """Tell where they are, in a checkout as in an installed package."""
    return Path(str(importlib.resources.files("resnet"))) / "pretrained"


def names() -> list[str]:
    """List the names of those that are there."""
    return sorted(path.parent.name for path in folder().glob("*/blocks.h5"))


def find(text: str | Path) -> Path:
    """Find the blocks.h5 that ``text`` means: such a file, a run folder, or a name.

    Raises:
        InputError: There is none; it lists the names.
    """
    path = Path(text)
    if path.is_dir():
        return path / "blocks.h5"
    if path.exists():
        return path
    text = str(text)
    if text in names():
        return folder() / text / "blocks.h5"
    known = ", ".join(names()) or "none is here"
    raise InputError(
        f"'{text}': no such file, folder or trained network; legal: a run folder, its blocks.h5, "
        f"or a name ({known})"
    )


def card(path: Path) -> str:
    """Write what is to be known of the network in ``path``, in Markdown, from its record."""
    log, content = files.read_json(path / "log"), files.read_json(path / "args.json")
    run, starts = content["run"], content["starts"]
    plan, last = run["schedule"], log[-1]
    evaluation = run["evaluation"]
    drops = ", ".join(f"{drop:,}" for drop in plan["drops"])
    commits = dict.fromkeys((start.get("git") or {}).get("commit", "unknown") for start in starts)
    commands = "\n".join(dict.fromkeys("    " + start["command"] for start in starts))
    kind = ARCHITECTURES[weights.describe(path / "blocks.h5").architecture]
    layers = kind.depth(run["n"])
    return f"""# {path.name}

A {kind.title} of {layers} layers (report, Table I), for images of 32 x 32 pixels in the ten
classes of CIFAR-10.

- Accuracy: {last[f"{evaluation}/main/accuracy"]:.2%} on the {evaluation} images after the last
  epoch, which no one chose; training loss {last["main/loss"]:.4f}.
- Data: {run["data"]}, {run["training images"]:,} training images,
  augmentation: {run.get("augmentation", "random crops and flips")}.
- Schedule: {plan["name"]}, {plan["iterations"]:,} iterations of {run["batchsize"]} images, rate 0.1
  divided by 10 at {drops}. Seed {run["seed"]}.
- Made at commit {", ".join(commits)} by

{commands}

- Licence: that of this project. The images it was trained on are CIFAR-10's (Krizhevsky 2009),
  whose authors name no licence.
- Limits: it knows ten classes and gives one of them for any image. It has learned from small
  photographs; an image file is cropped to its central square and scaled to 32 x 32, and what is
  small in it is lost. Its probabilities are not calibrated. It is one run: another seed gives
  another accuracy.
"""


def add(run: Path, name: str) -> Path:
    """Copy a complete run into the package as ``name`` and write its card; returns its folder.

    Raises:
        InputError: It is not complete, or not from a clean commit.
    """
    if not (run / "blocks.h5").exists():
        raise InputError(f"{run}: no blocks.h5 in it; legal: the folder of a complete run")
    weights.describe(run / "blocks.h5")
    try:
        with files.parsing():  # whether log and args.json hold what a card says
            card(run)
            files.check_digest(run)
    except ValueError as error:
        raise InputError(f"{run}: its log or args.json is damaged ({error})") from None
    target = folder() / name
    record.publish(run, target)
    files.write(target / "blocks.h5", (run / "blocks.h5").read_bytes())
    files.write(target / CARD, card(target))
    return target


def main() -> None:
    p = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "run", type=command.path, nargs="?", metavar="RUN", help="the folder of a complete run"
    )
    p.add_argument(
        "--name", type=command.name, help="what to call it (default: architecture and depth)"
    )
    args = p.parse_args()
    if args.run is None:
        print("\n".join(names()) or f"no trained network in {folder()}")
        return
    print(f"wrote {add(args.run, args.name or '-'.join(args.run.name.split('-')[:2]))}")


if __name__ == "__main__":
    command.run(main)
