"""Running sums of a profile's pass over calibration text.

One class for each part: statistics per (layer, token id), residual means, and what the policies
`naee` (ratios of weights) and `per_layer_k` (changes of outputs) need.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from var_moe.routing.compensation import ResidualMeans
from var_moe.routing.keeping import leading_count, routing_mass, shares
from var_moe.routing.naee import RatioQuantiles
from var_moe.routing.per_layer_k import LayerSensitivity
from var_moe.tracing.all_pairs import LayerDecisions

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

BUDGET_BYTES = 256 * 2**20
"""Residual means that need more are keyed by the first expert alone."""
SHRINK_TOKENS = 20.0
"""Strength of the shrinkage of residual means: so many extra tokens of mean weight, residual 0."""
RATIO_BINS = 16384
"""Histogram bins, uniform in ratio ** (1 / 4), as a confident router's ratios are mostly near zero.
A quantile is right to within 4 / RATIO_BINS."""
RATIO_LEVELS = 201
"""Quantiles that are kept: every half percent, both ends included."""


class RunningSums(ABC):
    """Tensors that grow by addition; a checkpoint holds them by name."""

    sums: dict[str, Tensor]

    @abstractmethod
    def add(self, decided: LayerDecisions) -> None:
        """Add one layer of one forward."""


class RoutingStatistics(RunningSums):
    """Statistics of router decisions, one row per (layer, token id of the text), in float64.

    Means and variances are merged batch by batch (Chan, Golub, LeVeque 1979).
    """

    def __init__(self, ids: NDArray[np.int64], *, layers: int, experts: int) -> None:
        self.token_ids = np.unique(ids)  # (R,)
        self.layers, self.experts = layers, experts
        shape = (layers, len(self.token_ids))
        per_token = ("count", "entropy_mean", "entropy_m2", "confidence_mean", "confidence_m2")
        self.sums = {name: torch.zeros(shape, dtype=torch.float64) for name in per_token}
        self.sums["min_entropy"] = torch.full(shape, torch.inf, dtype=torch.float64)
        self.sums["max_entropy"] = torch.full(shape, -torch.inf, dtype=torch.float64)
        for name in ("first", "mass"):  # how often each expert came first, its routing mass
            self.sums[name] = torch.zeros((*shape, experts), dtype=torch.float64)

    @property
    def tokens(self) -> int:
        """Tokens that were added."""
        return int(self.sums["count"][0].sum())

    def add(self, decided: LayerDecisions) -> None:
        weight, index, layer = decided.weight, decided.index.cpu(), decided.layer
        rows = torch.from_numpy(np.searchsorted(self.token_ids, decided.ids.numpy()))  # (T,)
        lead = leading_count(weight.shape[1])
        entropy = decided.entropy.double().cpu()
        confidence = routing_mass(weight[:, :lead], weight).double().cpu()
        mass = shares(weight).double().cpu()
        new = rows.bincount(minlength=len(self.token_ids)).double()  # (R,)
        self._merge("entropy", layer, rows, new, entropy)
        self._merge("confidence", layer, rows, new, confidence)
        sums = {name: value[layer] for name, value in self.sums.items()}
        sums["min_entropy"].scatter_reduce_(0, rows, entropy, "amin")
        sums["max_entropy"].scatter_reduce_(0, rows, entropy, "amax")
        sums["count"] += new
        cell = rows[:, None] * self.experts + index  # (T, K)
        sums["first"].view(-1).index_add_(0, cell[:, 0], torch.ones_like(entropy))
        sums["mass"].view(-1).index_add_(0, cell.reshape(-1), mass.reshape(-1))

    def _merge(self, name: str, layer: int, rows: Tensor, new: Tensor, value: Tensor) -> None:
        """Merge a batch's ``value`` (T,), of which each row has ``new`` (R,), into mean and m2."""
        old = self.sums["count"][layer]
        mean, m2 = self.sums[f"{name}_mean"][layer], self.sums[f"{name}_m2"][layer]
        batch_mean = torch.zeros_like(old).index_add_(0, rows, value) / new.clamp(min=1)
        square = (value - batch_mean[rows]).square()
        batch_m2 = torch.zeros_like(old).index_add_(0, rows, square)
        count, delta = (old + new).clamp(min=1), batch_mean - mean
        mean += torch.where(new > 0, delta * new / count, 0.0)
        m2 += torch.where(new > 0, batch_m2 + delta.square() * old * new / count, 0.0)

    def frame(self, tokenizer: Any, *, leading: int) -> pd.DataFrame:
        """The columns of ``routing_stats.parquet``, ordered by layer and token id."""
        import pandas as pd

        strings = tokenizer.convert_ids_to_tokens(self.token_ids.tolist())
        parts = []
        for layer in range(self.layers):
            sums = {name: value[layer] for name, value in self.sums.items()}
            count, first, mass = sums["count"].clamp(min=1), sums["first"], sums["mass"]
            top = mass.argsort(dim=1, descending=True, stable=True)[:, :leading]
            columns = {
                "layer": np.int32(layer),
                "token_id": self.token_ids,
                "token_str": np.array(strings, dtype=object),
                "frequency": sums["count"].long().numpy(),
                "mean_entropy": sums["entropy_mean"].numpy(),
                "std_entropy": (sums["entropy_m2"] / count).sqrt().numpy(),
                "min_entropy": sums["min_entropy"].numpy(),
                "max_entropy": sums["max_entropy"].numpy(),
                "mean_confidence": sums["confidence_mean"].numpy(),
                "std_confidence": (sums["confidence_m2"] / count).sqrt().numpy(),
                "routing_consistency": (first.max(dim=1).values / count).numpy(),
                "top_expert": first.argmax(dim=1).numpy(),
                "leading_experts": list(top.numpy()),
                "leading_weights": list((mass.gather(1, top) / count[:, None]).numpy()),
            }
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)


def means_by_pair(top_k: int) -> bool:
    """Whether residual means can be keyed by pair: only where one expert of two is dropped."""
    return top_k == 2


class ResidualSums(RunningSums):
    """Least-squares fit of the residual means: what a dropped expert would have added.

    With ``d`` the weighted outputs of the dropped experts and ``m`` their summed weight, a cell's
    vector is ``r = sum(m d) / (sum(m^2) + shrink)``, the least-squares answer to ``d = m r``
    shrunk towards zero where little was seen. Kept experts are not rescaled where a mean stands
    in.
    """

    def __init__(self, *, layers: int, experts: int, top_k: int, hidden: int) -> None:
        self.experts, self.top_k = experts, top_k
        pairs = layers * experts**2 * hidden * 4
        self.by_pair = means_by_pair(top_k) and pairs <= BUDGET_BYTES
        rows = experts**2 if self.by_pair else experts
        self.sums = {
            "residual_moment": torch.zeros((layers, rows, hidden)),
            "residual_square": torch.zeros((layers, rows), dtype=torch.float64),
            "residual_count": torch.zeros((layers, rows), dtype=torch.float64),
        }

    def add(self, decided: LayerDecisions) -> None:
        lead = leading_count(self.top_k)
        if lead == self.top_k:
            return
        layer, index = decided.layer, decided.index
        moment, square, count = (value[layer] for value in self.sums.values())
        weight, outputs = decided.weight.float(), decided.ranked_outputs.float()
        difference = torch.einsum("tkd,tk->td", outputs[:, lead:], weight[:, lead:]).cpu()
        dropped = weight[:, lead:].sum(dim=1).cpu()
        first = index[:, 0].cpu()
        key = first * self.experts + index[:, -1].cpu() if self.by_pair else first
        moment.index_add_(0, key, difference * dropped[:, None])
        square.index_add_(0, key, dropped.double().square())
        count.index_add_(0, key, torch.ones_like(dropped, dtype=torch.float64))

    def means(self) -> ResidualMeans:
        """The fitted table."""
        moment, square, count = self.sums.values()
        mean_square = square.sum(1) / count.sum(1).clamp(min=1)  # (L,)
        shrink = (SHRINK_TOKENS * mean_square).clamp(min=1e-12)[:, None]
        table = moment / (square + shrink)[:, :, None].float()
        zero = torch.zeros((1, table.shape[2]))
        return ResidualMeans(
            table=tuple(torch.cat((layer, zero)) for layer in table),
            by_pair=self.by_pair,
            experts=self.experts,
        )


class RatioHistogram(RunningSums):
    """Histogram, per layer, of ``w_j / w_1`` over the experts after the first."""

    def __init__(self, *, layers: int, top_k: int) -> None:
        self.top_k = top_k
        self.sums = {"ratio_counts": torch.zeros((layers, RATIO_BINS), dtype=torch.float64)}

    def add(self, decided: LayerDecisions) -> None:
        weight = decided.weight.float()
        first, later = weight[:, :1], weight[:, 1:]
        ratio = torch.where(first > 0, later / first, 1.0)  # where all are zero, all are equal
        bins = (ratio.sqrt().sqrt() * RATIO_BINS).long().clamp(0, RATIO_BINS - 1)
        counts = bins.reshape(-1).bincount(minlength=RATIO_BINS).cpu()
        self.sums["ratio_counts"][decided.layer] += counts

    def quantiles(self, tokens: int) -> RatioQuantiles:
        """The quantiles of ``tokens`` tokens. The ends are 0 and 1 whatever was seen, so that they
        skip nothing and everything on any text."""
        rows = tuple(_quantiles(counts) for counts in self.sums["ratio_counts"])
        return RatioQuantiles(top_k=self.top_k, tokens=tokens, quantiles=rows)


def _quantiles(counts: Tensor) -> tuple[float, ...]:
    """Those of one layer's histogram (RATIO_BINS,)."""
    reached = counts.cumsum(dim=0)
    levels = torch.linspace(0, 1, RATIO_LEVELS, dtype=torch.float64)
    if reached[-1] == 0:  # K = 1: there is nothing after the first expert
        return tuple(levels.tolist())
    wanted = levels[1:-1] * reached[-1]
    bins = torch.searchsorted(reached, wanted)  # the bin in which each level is reached
    inside = 1 - (reached[bins] - wanted) / counts[bins]
    return (0.0, *((bins + inside) / RATIO_BINS).pow(4).tolist(), 1.0)


def rescaled_change(outputs: Tensor, weight: Tensor) -> Tensor:
    """Change of a layer's output by running the first k experts alone, rescaled, k = 1..K.

    From unweighted outputs (T, K, D) and float32 weights (T, K) by rank: (T, K, D) float32.
    """
    parts = (outputs.float() * weight[:, :, None]).cumsum(dim=1)
    kept = weight.cumsum(dim=1)
    scale = kept[:, -1:] / torch.where(kept == 0, 1.0, kept)
    return parts * scale[:, :, None] - parts[:, -1:]


class OutputChange(RunningSums):
    """Root mean square, over tokens, of `rescaled_change`: the Frobenius norm that LExI
    (arXiv:2509.02753) takes, on calibration text instead of random inputs."""

    def __init__(self, *, layers: int, top_k: int) -> None:
        self.sums = {"output_change": torch.zeros((layers, top_k), dtype=torch.float64)}

    def add(self, decided: LayerDecisions) -> None:
        change = rescaled_change(decided.ranked_outputs, decided.weight.float())
        change = change.double().square().sum(dim=2).sum(dim=0)
        change[-1] = 0.0  # all K experts: no change, whatever the rounding
        self.sums["output_change"][decided.layer] += change.cpu()

    def sensitivity(self, tokens: int) -> LayerSensitivity:
        """The root mean squares over ``tokens``."""
        rows = (self.sums["output_change"] / tokens).sqrt().tolist()
        return LayerSensitivity(
            measure="root mean square change of the layer's output",
            loss=tuple(tuple(row) for row in rows),
        )
