"""What a run was made with: command, device, versions and the state of the checkout."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import chainer
import h5py
import numpy as np

from resnet import __version__, files
from resnet.command import InputError

ROOT = Path(__file__).resolve().parent.parent
CODE = ("resnet", "experiments")  # whose files a run is made from
LARGEST_DIFF = 200_000  # characters of a modified checkout's diff that are kept
# Processors that this process may use; on macOS, which cannot say, all there are. Asked for before
# a library brings OpenMP: with OMP_PROC_BIND in the environment that leaves the thread one of them.
PROCESSORS = (
    os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
)


def quota(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Count the processors whose time a container may take, as ``docker run --cpus`` says.

    Args:
        folder: Where Linux tells it, as version 2 or 1 of its control groups do.

    Returns:
        That number, rounded up; None without a limit, or where nothing is told.
    """
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            share, period = " ".join((folder / name).read_text() for name in names).split()
            return max(1, math.ceil(int(share) / int(period))) if int(share) > 0 else None
    return None


def command() -> str:
    """Write the command line of this process, to be typed again; any interpreter is ``python``."""
    words = sys.orig_argv[1:]
    if words and Path(words[0]).name == "chainer-resnet":
        return shlex.join(["chainer-resnet", *words[1:]])
    return shlex.join(["python", *words])


def command_here() -> str:
    """Write the command line of this process, to be typed again in any shell of this computer."""
    return shlex.join([sys.executable, *sys.orig_argv[1:]])


def device_name(device: chainer.backend.Device) -> str:
    """Name the processor behind a device."""
    if device.xp is not np:
        properties = device.xp.cuda.runtime.getDeviceProperties(device.device.id)
        return f"GPU {device.device.id}, {properties['name'].decode()}"
    return f"CPU, {processor()}, {len(PROCESSORS)} cores, {platform.machine()}"


def processor() -> str:
    """Name the model of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown model"


def versions() -> dict[str, str]:
    """List the versions of all that computes."""
    found = {
        "resnet": __version__,
        "python": platform.python_version(),
        "chainer": chainer.__version__,
        "numpy": np.__version__,
        "h5py": h5py.__version__,
    }
    if chainer.cuda.available:
        found["cupy"] = chainer.cuda.cupy.__version__
    return found


def packages() -> dict[str, str]:
    """List the versions of all installed packages."""
    found = {item.metadata["Name"]: item.version for item in importlib.metadata.distributions()}
    return {name: found[name] for name in sorted(found, key=lambda name: str(name).lower())}


def git_state(root: Path = ROOT) -> dict | None:
    """Find the state of the checkout; None outside of one.

    Returns:
        ``commit``; ``modified``, whether a tracked file or a file of ``CODE`` differs from it; and
        of a modified one ``diff``, which brings it back; or ``repeatable``, False, where the diff
        is too large to be kept, or a file of ``CODE`` is in no commit.
    """

    # Git refuses a folder of somebody else's, as in a container, lest it run what is said there.
    # This process runs that checkout's code already.
    trusted = "-c", f"safe.directory={root}"
    # Variables of another repository, as in its hooks, would have git answer for that one.
    elsewhere = "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY"
    here = {name: value for name, value in os.environ.items() if name not in elsewhere}

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *trusted, "-C", root, *words], capture_output=True, encoding="utf-8",
            errors="surrogateescape", check=True, timeout=30, env=here,
        ).stdout  # fmt: skip

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()) != root:
            return None  # installed into an environment inside some other checkout
        commit = git("rev-parse", "HEAD").strip()
        new = git("ls-files", "--others", "--exclude-standard", *CODE)
        diff = git("diff", "--no-ext-diff", "--no-textconv", "--no-color", "--binary", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
    if not diff and not new:
        return {"commit": commit, "modified": False}
    if new or len(diff) > LARGEST_DIFF:
        return {"commit": commit, "modified": True, "repeatable": False}
    return {"commit": commit, "modified": True, "diff": diff}


def sources(*classes: type) -> dict[str, str]:
    """Find the files outside of this package that define these classes: sha256 by name."""
    outside = [each for each in classes if each.__module__.partition(".")[0] != "resnet"]
    found = {}
    for each in outside:
        with contextlib.suppress(OSError, TypeError):  # typed at a prompt: in no file
            path = Path(inspect.getsourcefile(each))
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def changed_sources(starts: list[dict], start: dict) -> list[str]:
    """Name the ``sources`` of a start that differ from those of one before."""
    before = [each["sources"].items() for each in starts if "sources" in each]
    return [name for name, digest in start["sources"].items()
            if any((name, digest) not in each for each in before)]  # fmt: skip


def publish(run: Path, target: Path) -> None:
    """Copy ``log`` and ``args.json`` of a run, without this computer's paths.

    Raises:
        InputError: They are not those of a run, or of one that not everybody can repeat.
    """
    try:
        content = json.loads((run / "args.json").read_text())
        log = (run / "log").read_text()
        starts = content["starts"]
        clean = all(start["git"] and start["git"]["modified"] is False for start in starts)
        for start in starts:
            words = shlex.split(start["command"])
            words = [Path(word).name if Path(word).is_absolute() else word for word in words]
            start |= {"command": shlex.join(words), "data": Path(start["data"]).name}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{run}: not the folder of a run ({error})") from None
    if not clean:
        raise InputError(f"{run}: not made from a clean checkout; legal: a run of a commit")
    target.mkdir(parents=True, exist_ok=True)
    files.write_json(target / "args.json", content)
    files.write(target / "log", log)


def describe_code(git: dict | None) -> str:
    """Say what ``git_state`` has found, in one line for people."""
    if git is None:
        return f"version {__version__}, not from a checkout"
    if not git["modified"]:
        return f"commit {git['commit']}"
    kept = "its diff is in args.json" if "diff" in git else "a run that CANNOT BE REPEATED"
    return f"commit {git['commit']}, modified: {kept}"
