"""Every command under one name: ``chainer-resnet COMMAND ARGUMENTS``, or ``python -m resnet``.

Every script of experiments/ and plots/ is a command, and so are the modules named below. An
installed package has the scripts inside of it, a checkout beside it.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path

from resnet import command
from resnet.command import USAGE

MODULES = "evaluate", "export", "pretrained", "cifar10", "compat"
HERE = Path(__file__).resolve().parent


def scripts() -> dict[str, Path]:
    """Find the scripts that can be run, by their names."""
    above = HERE / "scripts" if (HERE / "scripts").is_dir() else HERE.parent
    return {
        path.stem: path
        for folder in ("experiments", "plots")
        for path in sorted((above / folder).glob("*.py"))
        if '__name__ == "__main__"' in path.read_text()
    }


def main() -> None:
    """Run the command that the first argument names, with the others."""
    found = scripts()
    name = sys.argv[1] if len(sys.argv) > 1 else "nothing"
    if name not in found and name not in MODULES:
        asked = name in ("-h", "--help")
        names = ", ".join([*found, *MODULES])
        text = f"chainer-resnet COMMAND --help, where COMMAND is one of: {names}"
        print(text if asked else f"error: found '{name}', legal: {text}",
              file=sys.stdout if asked else sys.stderr)  # fmt: skip
        sys.exit(0 if asked else USAGE)
    sys.argv[:2] = [f"chainer-resnet {name}"]
    if name in found:
        runpy.run_path(str(found[name]), run_name="__main__")
        return
    run = importlib.import_module(f"resnet.{name}").main
    run() if name == "compat" else command.run(run)


if __name__ == "__main__":
    main()
