"""Run the commands of the README and of jobs/README.md, so that they cannot rot.

Blocks fenced as ```sh run are run, in their order, each from the top of the checkout with the
project's environment first on the PATH; blocks fenced as plain ```sh need a GPU, a download or a
cluster and are not.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    path = f"{ROOT / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"
    for page in ("README.md", "jobs/README.md"):
        text = (ROOT / page).read_text()
        blocks = re.findall(r"^```sh run\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        if not blocks:
            sys.exit(f"{page}: no block fenced as ```sh run")
        for block in blocks:
            print(f"---- {page}\n{block.rstrip()}", flush=True)
            script = ["bash", "-euo", "pipefail", "-c", block]
            subprocess.run(script, cwd=ROOT, env={**os.environ, "PATH": path}, check=True)


if __name__ == "__main__":
    main()
