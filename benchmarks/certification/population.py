"""Endless text with a known perplexity ratio, resampled from recorded pages.

A population is the recorded pages, drawn with replacement. A page's Z is
``e - ln((1 + bound) / (1 + truth)) T`` where the residual ``e = d - ln(ratio) T`` sums to zero over
the recorded pages, so that the ratio over the population is ``1 + truth`` exactly.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
LOSSES_FILE = Path(__file__).with_name("losses.csv")

MEAN_ABS_T3 = 2 * np.sqrt(3) / np.pi
"""E|t| of Student's t with three degrees of freedom."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Recorded losses, by document."""

    page: NDArray[np.int64]  # (documents,) which page each is a section of
    tokens: Floats  # (documents,)
    change: dict[str, Floats]  # policy -> (documents,) nats over the baseline

    @classmethod
    def load(cls, path: Path = LOSSES_FILE) -> Recorded:
        """Read the table that `record` wrote."""
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        names = [name for name in rows[0] if name not in ("page", "tokens", "baseline")]
        pages = {name: number for number, name in enumerate(dict.fromkeys(r["page"] for r in rows))}
        baseline = np.array([float(row["baseline"]) for row in rows])
        return cls(
            page=np.array([pages[row["page"]] for row in rows]),
            tokens=np.array([float(row["tokens"]) for row in rows]),
            change={name: np.array([float(r[name]) for r in rows]) - baseline for name in names},
        )

    def residuals(self, name: str) -> Floats:
        """Each document's change beyond the mean ratio; sums to zero. (documents,)"""
        change = self.change[name]
        found: Floats = change - change.sum() / self.tokens.sum() * self.tokens
        return found

    def by_page(self, values: Floats) -> Floats:
        """Sums over the documents of each page."""
        return np.bincount(self.page, weights=values)


Noise = Callable[[Floats, Floats, np.random.Generator], Floats]
"""From residuals and tokens, as drawn, to residuals of the same (zero) mean."""


def as_recorded(residual: Floats, tokens: Floats, rng: np.random.Generator) -> Floats:
    """The recorded pages themselves."""
    return residual


def heavy(residual: Floats, tokens: Floats, rng: np.random.Generator) -> Floats:
    """Each residual scaled by |t| with three degrees of freedom: no third moment."""
    return residual * np.abs(rng.standard_t(3, size=residual.shape)) / MEAN_ABS_T3


def lognormal(residual: Floats, tokens: Floats, rng: np.random.Generator) -> Floats:
    """Each residual scaled by a lognormal weight of mean 1 (sigma 1)."""
    return residual * np.exp(rng.normal(size=residual.shape) - 0.5)


def correlated(residual: Floats, tokens: Floats, rng: np.random.Generator) -> Floats:
    """All sections of a page shifted by one draw of 1% per token: far more alike than recorded."""
    shifted: Floats = residual + 0.01 * tokens * rng.normal(size=residual.shape)
    return shifted


def disasters(residual: Floats, tokens: Floats, rng: np.random.Generator) -> Floats:
    """A stress beyond what was seen: each page's loss rises by lognormal noise (sigma 1) of 1%.

    Skewness about 6, in the direction that a sample hides.
    """
    return residual + 0.01 * tokens * (np.exp(rng.normal(size=residual.shape)) - np.exp(0.5))


POPULATIONS: dict[str, tuple[str, Noise]] = {
    "verified 0.80": ("verified_0.80", as_recorded),
    "verified 0.72": ("verified_0.72", as_recorded),
    "plain 0.80": ("plain_0.80", as_recorded),
    "top_p 0.80 (skewed)": ("top_p_0.80", as_recorded),
    "heavy tails (t3)": ("verified_0.80", heavy),
    "heavy tails, skewed (t3)": ("top_p_0.80", heavy),
    "heavy tails (lognormal)": ("top_p_0.80", lognormal),
    "correlated sections": ("verified_0.80", correlated),
}
"""Name -> recorded policy, and what is done to its residuals."""

POWER_OF = (
    *("verified 0.80", "verified 0.72", "top_p 0.80 (skewed)"),
    *("heavy tails, skewed (t3)", "correlated sections"),
)
"""The populations whose power is shown."""

STRESS: dict[str, tuple[str, Noise]] = {"rare disasters": ("verified_0.80", disasters)}
"""Populations that are shown without the promise that the tests hold."""


def draw(
    recorded: Recorded,
    name: str,
    *,
    pages: int,
    studies: int,
    truth: float,
    bound: float,
    rng: np.random.Generator,
) -> Floats:
    """Z of drawn pages. (pages, studies)"""
    policy, noise = {**POPULATIONS, **STRESS}[name]
    residual = recorded.by_page(recorded.residuals(policy))
    tokens = recorded.by_page(recorded.tokens)
    at = rng.integers(len(tokens), size=(pages, studies))
    found: Floats = noise(residual[at], tokens[at], rng)
    return found - (np.log1p(bound) - np.log1p(truth)) * tokens[at]
