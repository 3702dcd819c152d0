"""The networks of the report in PyTorch: what the tests and the speed table compare with."""

from __future__ import annotations

import functools

import torch
from torch.nn import functional as F

from resnet import training
from resnet.backends.cpu import onednn
from resnet.backends.gpu.capture import EAGER
from resnet.command import InputError
from resnet.export import state, torch_name
from resnet.torch_module import Network

SCALE = 1024  # of the loss in float16, as of our float16 gradients


class TorchNetwork(Network):
    """The network ``architecture`` with 6n + 2 layers, of images whose mean is subtracted."""

    forward = Network.logits

    def __init__(self, architecture, n):
        super().__init__(architecture, n)
        del self.mean

    def load(self, network):
        """Take over every weight and statistic of a Chainer network; each must have its place."""
        arrays = state(network)
        self.load_state_dict({torch_name(k): torch.as_tensor(v) for k, v in arrays.items()})
        return self


def training_step(n, x, t, rate, variant="torch", precision="float32", gpu=None):
    """Make a function that trains a ResNet of 6n + 2 layers on one batch once.

    Args:
        n: Modules per block.
        x, t: Images (N, C, H, W) and labels (N,), NumPy arrays.
        rate: Learning rate.
        variant: ``torch``, or with channels last ``torch channels_last``, ``torch compile`` and,
            recorded as one CUDA graph, ``torch graph``.
        precision: Type of PyTorch's; but for float32, autocast chooses what is computed in it.
        gpu: Number of the GPU; None: on the CPU.

    Returns:
        It; on a GPU also one that waits for the GPU, and one that tells the bytes taken there.

    Raises:
        InputError: It cannot run here; the message says why.
    """
    if gpu is not None and not torch.cuda.is_available():
        raise InputError("this PyTorch has no CUDA")
    there, dtype = torch.device("cpu" if gpu is None else f"cuda:{gpu}"), getattr(torch, precision)
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise InputError("PyTorch has no bfloat16 convolutions for this processor")
    torch.set_num_threads(onednn.threads())
    torch.backends.cudnn.benchmark = True
    layout = torch.contiguous_format if variant == "torch" else torch.channels_last
    network = TorchNetwork("resnet", n).to(there, memory_format=layout)
    inputs = torch.as_tensor(x).to(there).contiguous(memory_format=layout)
    labels = torch.as_tensor(t, dtype=torch.int64).to(there)
    forward = torch.compile(network) if variant in ("torch compile", "torch graph") else network
    scale = SCALE if dtype is torch.float16 else 1  # of loss and gradients
    optimizer = torch.optim.SGD(
        network.parameters(), rate / scale, training.MOMENTUM,
        weight_decay=training.WEIGHT_DECAY * scale, fused=gpu is not None,
    )  # fmt: skip

    def step():
        with torch.autocast(there.type, dtype, enabled=dtype is not torch.float32):
            y = forward(inputs)
            loss = F.cross_entropy(y, labels)
        if y.dtype is not dtype:
            raise RuntimeError(f"autocast made logits of {y.dtype}, not {dtype}")
        optimizer.zero_grad()
        (loss * scale if scale > 1 else loss).backward()
        optimizer.step()

    if gpu is None:
        return (step,)
    taken = functools.partial(torch.cuda.max_memory_reserved, there)
    return graph_of(step) if variant == "torch graph" else step, torch.cuda.synchronize, taken


def graph_of(step):
    """Record a training step as one CUDA graph; returns what replays it."""
    side = torch.cuda.Stream()  # the default stream cannot be recorded
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(EAGER):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
