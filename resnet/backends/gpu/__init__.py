"""NVIDIA GPUs: convolutions of cuDNN, kernels of our own, and CUDA graphs of whole steps."""
