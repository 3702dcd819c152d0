"""Packaging of the project; what can be said without code is in pyproject.toml."""

import sys

from setuptools import setup

if sys.platform == "win32":
    sys.exit("error: found Windows, legal: Linux or macOS; on Windows, a Linux under WSL 2")

setup()
