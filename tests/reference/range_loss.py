"""Slow range losses: the formulas, left to autograd."""

import torch


def soft_min_max(w, alpha):
    """S1 eq. 1, written as it stands."""
    w = w.flatten()
    up = torch.exp(alpha * (w - w.max().detach()))
    down = torch.exp(-alpha * (w - w.min().detach()))
    return (w * up).sum() / up.sum() - (w * down).sum() / down.sum() + torch.exp(-alpha)


def l_inf(w):
    """ALGORITHMS 1.2."""
    return w.abs().max()


def margin(w, m):
    """ALGORITHMS 1.3."""
    return m.abs() + (w.abs() - m.abs()).clamp(min=0).sum()
