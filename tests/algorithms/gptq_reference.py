"""GPTQ as its paper writes it down: one column at a time, by the inverse, in float64."""

import torch


def gptq_by_columns(weight, hessian, damping, snap):
    """Rounded weights, [N, K].

    `snap(column, k)` rounds the weights of input channel k, and is told so in order.
    """
    w = weight.double().clone()
    h = hessian.double().clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    inverse = torch.linalg.inv(h)
    rounded = torch.zeros_like(w)
    for k in range(w.shape[1]):
        rounded[:, k] = snap(w[:, k], k)
        # The optimal change of the remaining weights (equation 2), and the inverse without
        # column k (equation 3).
        error = (w[:, k] - rounded[:, k]) / inverse[k, k]
        w -= torch.outer(error, inverse[k])
        inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return rounded


def loss_of(error, hessian):
    e, h = error.double(), hessian.double()
    return float(((e @ h) * e).sum())
