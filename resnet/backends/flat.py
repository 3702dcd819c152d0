"""Momentum SGD over all parameters at once, for the compiled backends."""

from __future__ import annotations

import chainer
import numpy as np
from chainer import optimizers


class FlatMomentumSGD(optimizers.MomentumSGD):
    """Chainer's momentum SGD with weight decay, in one pass over all parameters.

    Parameters and velocities stay what and where they are for everyone else, but as views of two
    flat arrays. A subclass has ``step()``, the pass itself.
    """

    def __init__(self, momentum: float, weight_decay: float) -> None:
        super().__init__(momentum=momentum)
        self.weight_decay = weight_decay
        self._parts: list[tuple[chainer.Parameter, slice | None]] = []

    def update(self, lossfun=None, *args, **kwds):
        if lossfun is not None:
            loss = lossfun(*args, **kwds)
            self.target.cleargrads()
            loss.backward()
        self.reallocate_cleared_grads()
        self.call_hooks("pre")
        self.t += 1
        if not self._is_flat():
            self._flatten()
        for parameter, part in self._parts:
            if part is not None:
                self.gather(parameter, self.gradients[part])
        self.step()
        self.call_hooks("post")

    def step(self) -> None:
        """Move ``values`` and ``velocities`` by ``gradients``, flat float32 arrays."""
        raise NotImplementedError

    def gather(self, parameter: chainer.Parameter, place) -> None:
        """Bring the gradient of a parameter to its place in ``gradients``."""
        place[...] = parameter.grad.ravel()

    def _is_flat(self) -> bool:
        """Whether what is trained, and nothing else, is where ``_flatten`` has put it."""
        return bool(self._parts) and all(
            not parameter.update_rule.enabled
            if part is None
            else parameter.update_rule.enabled
            and parameter.array.base is self.values
            and parameter.update_rule.state["v"].base is self.velocities
            for parameter, part in self._parts
        )

    def _flatten(self) -> None:
        parameters = [parameter for _, parameter in sorted(self.target.namedparams())]
        size = sum(p.size for p in parameters if p.update_rule.enabled)
        xp = chainer.backend.get_array_module(*(p.array for p in parameters))
        self.values, self.gradients, self.velocities = (
            xp.zeros(size, np.float32) for _ in range(3)
        )
        self._parts, end = [], 0
        for parameter in parameters:
            rule = parameter.update_rule
            if not rule.enabled:
                self._parts.append((parameter, None))
                continue
            part = slice(end, end := end + parameter.size)
            if rule.state is None:
                rule._init_states(parameter)  # as its own first update would
            shape = parameter.shape
            self.values[part] = parameter.array.ravel()
            self.velocities[part] = xp.asarray(rule.state["v"]).ravel()  # NumPy's, once loaded
            parameter.array = self.values[part].reshape(shape)
            rule.state["v"] = self.velocities[part].reshape(shape)
            self._parts.append((parameter, part))
