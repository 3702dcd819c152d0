"""Residual neural networks for image recognition: the report of Gelda et al. (2016) in Chainer."""

import sys

if sys.platform == "win32":
    sys.exit("error: found Windows, legal: Linux or macOS; on Windows, a Linux under WSL 2")

from resnet import command  # noqa: F401  first: a Ctrl-C while all else is imported is one line

# isort: split
from resnet import compat  # noqa: F401  before any import of chainer

__version__ = "0.1.0"
