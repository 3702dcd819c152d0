"""Run the commands of every page, so that they cannot rot.

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
BLOCK = re.compile(r"^```sh run\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def main() -> None:
    path = f"{ROOT / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    pages = sorted(listed.stdout.split(), key=lambda page: (page.count("/"), page))
    found = {page: BLOCK.findall((ROOT / page).read_text()) for page in pages}
    if not found.get("README.md"):
        sys.exit("README.md: no block fenced as ```sh run")
    for page, blocks in found.items():
        for block in blocks:
            print(f"---- {page}\n{block.rstrip()}", flush=True)
            script = ["bash", "-euo", "pipefail", "-c", block]
            subprocess.run(script, cwd=ROOT, env={**os.environ, "PATH": path}, check=True)


if __name__ == "__main__":
    main()
