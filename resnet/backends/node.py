"""What the nodes of the compiled backends share."""

from __future__ import annotations

import chainer
from chainer import function_node
from chainer import functions as F


class Node(function_node.FunctionNode):
    """A node whose first-order gradients are arrays; higher orders go through Chainer's own.

    A subclass has ``reference(*inputs)``, the same out of Chainer's functions, and
    ``gradients(indexes, gy, before)``: arrays for the inputs ``indexes``, ``before`` (an array or
    None for each of them) added.
    """

    def backward_accumulate(self, indexes, grad_outputs, grad_inputs):
        if chainer.config.enable_backprop:  # gradients of gradients are wanted
            # Behind F.identity, the gradient of one input leaves out its ways through another.
            inputs = [F.identity(x) for x in self.get_retained_inputs()]
            y = self.reference(*inputs)
            wanted = [inputs[i] for i in indexes]
            found = chainer.grad([y], wanted, [grad_outputs[0]], enable_double_backprop=True)
            pairs = zip(found, grad_inputs, strict=True)
            return tuple(g if before is None else g + before for g, before in pairs)
        before = [None if g is None else g.array for g in grad_inputs]
        results = self.gradients(indexes, grad_outputs[0].array, before)
        return tuple(map(chainer.as_variable, results))


def accumulated(indexes, results, before) -> list:
    """The results asked for, each with the gradient that was there before."""
    pairs = zip(indexes, before, strict=True)
    return [results[i] if earlier is None else results[i] + earlier for i, earlier in pairs]


def normalized(x, gamma, beta, bn, trains: bool):
    """BN(x) as the link ``bn`` computes it, of variables for gamma and beta; no averages change."""
    if trains:
        return F.batch_normalization(x, gamma, beta, eps=bn.eps)
    return F.fixed_batch_normalization(x, gamma, beta, bn.avg_mean, bn.avg_var, eps=bn.eps)
