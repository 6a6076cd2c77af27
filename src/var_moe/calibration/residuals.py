"""Residual means: what a dropped expert would have added, on average.

For each calibration token and layer, ``d`` is the full output minus the output of the leading
experts alone, which keep the router's own weights, and ``m`` the weight that was dropped. Per
cell, ``r = sum(m d) / (sum(m^2) + shrink)`` is the least-squares vector for ``d = m r``, shrunk
towards zero where little was seen. Scaling by the dropped weight fits better than the plain mean:
decisions that are cut drop little weight.

The kept experts are not rescaled, as they are without residual means: the mean stands in for
the dropped weight. Rescaling would let the first expert's own deviation from its mean stand in
for the dropped one's, and the two have little to do with each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from var_moe.routing.fast_path import ResidualMeans

BUDGET_BYTES = 256 * 2**20  # above this the table is keyed by the first expert alone
SHRINK_TOKENS = 20.0  # as if this many tokens of mean weight had shown no residual


def may_tell_pairs(top_k: int) -> bool:
    """Whether means can be of pairs of experts, as what stands in for single ones has to be."""
    return top_k == 2


class ResidualFit:
    """Streaming sums for `ResidualMeans`."""

    def __init__(self, *, layers: int, experts: int, top_k: int, hidden_size: int) -> None:
        self.experts, self.top_k = experts, top_k
        pairs = layers * experts**2 * hidden_size * 4
        self.by_pair = may_tell_pairs(top_k) and pairs <= BUDGET_BYTES
        rows = experts**2 if self.by_pair else experts
        self.moment = torch.zeros((layers, rows, hidden_size), dtype=torch.float32)
        self.square = torch.zeros((layers, rows), dtype=torch.float64)
        self.count = torch.zeros((layers, rows), dtype=torch.float64)

    def add(self, layer: int, *, outputs: Tensor, weight: Tensor, index: Tensor, lead: int) -> None:
        """Add one layer of one forward; slots are in rank order.

        Args:
            layer: MoE layer number.
            outputs: (T, K, D) unweighted outputs of every pair.
            weight: (T, K) router weights.
            index: (T, K) experts.
            lead: how many of the K experts lead.
        """
        if lead == self.top_k:
            return
        weight, outputs = weight.float(), outputs.float()
        difference = torch.einsum("tkd,tk->td", outputs[:, lead:], weight[:, lead:]).cpu()
        dropped = weight[:, lead:].sum(dim=1).cpu()
        first = index[:, 0].cpu()
        key = first * self.experts + index[:, -1].cpu() if self.by_pair else first
        self.moment[layer].index_add_(0, key, difference * dropped[:, None])
        self.square[layer].index_add_(0, key, dropped.double().square())
        self.count[layer].index_add_(0, key, torch.ones_like(dropped, dtype=torch.float64))

    def means(self) -> ResidualMeans:
        """The fitted table."""
        layers, _, hidden = self.moment.shape
        mean_square = self.square.sum(1) / self.count.sum(1).clamp(min=1)  # (L,)
        shrink = (SHRINK_TOKENS * mean_square).clamp(min=1e-12)[:, None]
        table = self.moment / (self.square + shrink)[:, :, None].float()
        zero = torch.zeros((1, hidden))
        return ResidualMeans(
            table=tuple(torch.cat((table[layer], zero)) for layer in range(layers)),
            by_pair=self.by_pair,
            experts=self.experts,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The sums: for checkpoints."""
        return {
            "residual_moment": self.moment,
            "residual_square": self.square,
            "residual_count": self.count,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        self.moment = state["residual_moment"].clone()
        self.square = state["residual_square"].clone()
        self.count = state["residual_count"].clone()
