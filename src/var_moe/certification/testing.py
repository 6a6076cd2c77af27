"""Several tests, one error rate: in a fixed order, by Holm, and claims of different kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

QUALITY, SPEEDUP, LEARNED = "quality", "speedup", "learned_pct"
QUALITY_SHARE = 0.8
"""Share of alpha that quality has where more than quality is claimed: of the three it is the one
that costs text, while a block more buys what speedup and tiers need."""


def fixed_sequence(tests: Iterable[Callable[[], bool]]) -> list[bool]:
    """Make the tests in their order and stop at the first that does not reject.

    Each at the full level: the first true hypothesis of the order is reached at all only when
    those before it were rejected, and rejecting it is the only way to a first error (Maurer,
    Hothorn, Lehmacher 1995). The order must not depend on the text that is tested on.

    Returns:
        Whether each test that was made rejects: all True, but perhaps the last.
    """
    found = []
    for test in tests:
        found.append(test())
        if not found[-1]:
            break
    return found


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Which hypotheses Holm's step-down procedure rejects (Holm 1979): needs no order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    rejected = [False] * len(p_values)
    for step, at in enumerate(order):
        if p_values[at] > alpha / (len(p_values) - step):
            break
        rejected[at] = True
    return rejected


def split_alpha(alpha: float, claims: Sequence[str]) -> Mapping[str, float]:
    """Share alpha out over the claims that are made, so that all hold together (Bonferroni).

    Quality alone gets all of it; with others it keeps `QUALITY_SHARE`, and the others share the
    rest equally.
    """
    others = [claim for claim in claims if claim != QUALITY]
    if not others:
        return {QUALITY: alpha}
    rest = alpha * (1 - QUALITY_SHARE) / len(others)
    return {QUALITY: alpha * QUALITY_SHARE, **dict.fromkeys(others, rest)}
