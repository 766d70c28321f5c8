"""A chain of linear layers with relu between them, one layer after the other, in terms of the single operators.

It serves the reference, chains that fused.py does not support, and derivatives of chains. The first argument, `of`, has
the single operators: the launchers, the reference or the registered operators, which may also take a batch of chains.
Layers are w1, bias1, w2, bias2, ... with None for missing ones; fused.py has the formulas.
"""

import torch

from .. import shapes


def forward(of, x, *layers_keep):
    """y and hidden."""
    *layers, keep = layers_keep
    pairs = [(w, bias) for w, bias in zip(layers[0::2], layers[1::2]) if w is not None]
    hidden = []
    for w, bias in pairs[:-1]:
        x = of.linear_relu(x, w, bias)
        hidden.append(x)
    return of.linear(x, *pairs[-1]), torch.cat(hidden, -1) if keep else x.new_empty(*x.shape[:-1], 0)


def input_grad(of, dy, hidden, *weights_needs_dx, dhidden=None):
    """dx and dz; `dhidden` is an additional gradient with respect to `hidden`."""
    *weights, needs_dx = weights_needs_dx
    widths = shapes.widths(weights)[:-1]
    h, dz = hidden.split(widths, -1), []
    for i in reversed(range(len(widths))):
        dy = of.linear(dy, weights[i + 1].mT, None)
        if dhidden is not None:
            dy = dy + dhidden.split(widths, -1)[i]
        dy = of.relu_grad(dy, h[i])
        dz.insert(0, dy)
    return of.linear(dy, weights[0].mT, None) if needs_dx else dy.new_empty(*dy.shape[:-1], 0), torch.cat(dz, -1)


def weight_grad(of, dy, dz, x, hidden, widths, with_bias):
    """The gradients of all weights, flat, and of all biases."""
    pairs = zip((*dz.split(widths, -1), dy), (x, *hidden.split(widths, -1)))
    dw, db = zip(*(of.linear_weight_grad(d, a, with_bias) for d, a in pairs))
    return torch.cat([d.flatten(-2) for d in dw], -1), torch.cat(db, -1)
