"""Residual neural networks for image recognition: the report of Gelda et al. (2016) in Chainer."""

from resnet import compat  # noqa: F401  before any import of chainer

__version__ = "0.1.0"
