"""Every command under one name: ``chainer-resnet COMMAND ARGUMENTS``, or ``python -m resnet``.

An installed package has the scripts inside of it, a checkout beside it.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path

from resnet import command
from resnet.command import USAGE

COMMANDS = {
    "experiments": ("plain", "resnet", "resresnet", "highway", "partial_training", "evidence",
                    "speed", "plans"),
    "plots": ("curves", "tables", "figures", "report", "claims"),
    "resnet": ("evaluate", "export", "pretrained", "cifar10", "compat"),
}  # fmt: skip


def main() -> None:
    """Run the command that the first argument names, with the others."""
    names = [name for group in COMMANDS.values() for name in group]
    name = sys.argv[1] if len(sys.argv) > 1 else "nothing"
    if name not in names:
        asked = name in ("-h", "--help")
        text = f"chainer-resnet COMMAND --help, where COMMAND is one of: {', '.join(names)}"
        print(text if asked else f"error: found '{name}', legal: {text}",
              file=sys.stdout if asked else sys.stderr)  # fmt: skip
        sys.exit(0 if asked else USAGE)
    sys.argv[:2] = [f"chainer-resnet {name}"]
    (folder,) = [folder for folder, members in COMMANDS.items() if name in members]
    if folder == "resnet":
        run = importlib.import_module(f"resnet.{name}").main
        run() if name == "compat" else command.run(run)
        return
    here = Path(__file__).resolve().parent
    scripts = here / "scripts" if (here / "scripts").is_dir() else here.parent
    runpy.run_path(str(scripts / folder / f"{name}.py"), run_name="__main__")


if __name__ == "__main__":
    main()
