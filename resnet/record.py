"""What a run was made with: command, device, versions and the state of the checkout."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import chainer
import h5py
import numpy as np

from resnet import __version__


def command() -> str:
    """The command line of this process, to be typed again."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def cores() -> int:
    """Processors that this process may use; on macOS, which cannot say, all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def device_name(device: chainer.backend.Device) -> str:
    """Name of the processor behind a device."""
    if device.xp is not np:
        properties = device.xp.cuda.runtime.getDeviceProperties(device.device.id)
        return f"GPU {device.device.id}, {properties['name'].decode()}"
    return f"CPU, {cores()} cores, {platform.machine()}"


def versions() -> dict[str, str]:
    """Versions of all that computes."""
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


def git_state() -> dict | None:
    """Commit of the checkout and whether a tracked file was changed; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *words], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None  # installed into an environment inside some other checkout
        changes = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        return None
