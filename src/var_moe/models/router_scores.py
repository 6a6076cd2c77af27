"""What a router's logits mean: the score whose shares are its weights.

Families turn router logits into weights in a few ways (softmax, sigmoid, the square root of a
softplus, or probabilities already), and their configurations mostly do not say which. The
router's own decision does: the weights of the experts that it chose stand in the ratio of
their scores, whether they are normalised, scaled or neither.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Score = Callable[[Tensor], Tensor]  # (T, E) logits -> (T, E) scores, not negative


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1)


def _sigmoid(logits: Tensor) -> Tensor:
    return logits.sigmoid()


def _sqrt_softplus(logits: Tensor) -> Tensor:
    return F.softplus(logits).sqrt()


def _probabilities(logits: Tensor) -> Tensor:
    return logits.clamp(min=0.0)


# A rival must explain the weights to this much of the chosen experts' mass; the coarsest dtype
# that weights come in, bfloat16, rounds them to 0.4%.
_TOLERANCE = 0.01
_RIVALS: tuple[Score, ...] = (_sigmoid, _sqrt_softplus)


def find_score(logits: Tensor, index: Tensor, weight: Tensor) -> Score:
    """The score that explains a router's decision.

    Args:
        logits: (T, E) what the router recorded; probabilities are known by their sum of one.
        index: (T, K) the experts that it chose.
        weight: (T, K) their weights.

    Returns:
        The score. Softmax unless another one explains the weights, and better; with K = 1 there
        is no ratio to see, and it is softmax.
    """
    logits, weight = logits.float(), weight.float()
    if bool((logits >= 0).all()) and bool(((logits.sum(dim=-1) - 1).abs() < _TOLERANCE).all()):
        return _probabilities
    best: Score = _softmax
    least = _misfit(_softmax(logits), index, weight)
    for score in _RIVALS:
        misfit = _misfit(score(logits), index, weight)
        if misfit < min(least, _TOLERANCE):
            best, least = score, misfit
    return best


def _misfit(scores: Tensor, index: Tensor, weight: Tensor) -> float:
    """How far the chosen scores are from the weights, as shares; all but the worst 1%."""
    chosen = scores.gather(1, index)
    expected = chosen / chosen.sum(dim=1, keepdim=True)
    seen = weight / weight.sum(dim=1, keepdim=True)
    worst = (expected - seen).abs().amax(dim=1).nan_to_num(0.0)
    return float(worst.quantile(0.99))


def entropy(scores: Tensor) -> Tensor:
    """Entropy in nats of the shares of (T, E) scores. (T,)"""
    shares = scores / scores.sum(dim=-1, keepdim=True)
    total: Tensor = torch.special.entr(shares).sum(dim=-1)
    return total
