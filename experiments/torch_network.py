"""The networks of the report in PyTorch: what the tests and the speed table compare with."""

from __future__ import annotations

import torch

from resnet.export import state, torch_name
from resnet.torch_module import Network


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
