"""Which policy ``var-moe tune`` searches: its name, method and space."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

from var_moe.errors import UsageError

if TYPE_CHECKING:
    from var_moe.optimization.search_space import SearchSpace


def tuned_policy(
    name: str | None, mode: Literal["verified", "plain"] | None
) -> tuple[str | None, Literal["verified", "plain"] | None]:
    """The policy to tune, None for VAR, and VAR's mode: ``var_plain`` is VAR in that mode."""
    from var_moe.routing.registry import policy_spec

    if name is None:
        return None, mode
    own = policy_spec(name).settings.get("mode")
    if mode is not None and own != mode:
        raise UsageError(f"--mode {mode} does not belong to --policy {name}: leave one out")
    if own is not None:
        return None, own
    if not policy_spec(name).search_space(2):
        raise UsageError(f"--policy {name} has nothing to tune")
    return name, None


def default_method(policy: str | None) -> Literal["replay", "bayesian"]:
    """Replay, wherever a trace tells what decisions cost."""
    from var_moe.routing.registry import policy_spec

    return "replay" if policy is None or policy_spec(policy).cuts_only else "bayesian"


def space_of(policy: str | None, *, top_k: int) -> SearchSpace:
    from var_moe.optimization.search_space import SEARCH_SPACE
    from var_moe.routing.registry import policy_spec

    return SEARCH_SPACE if policy is None else policy_spec(policy).search_space(top_k)


def confirm_grid(size: int) -> None:
    from var_moe.optimization.grid import CONFIRM_ABOVE

    print(f"grid: {size:,} evaluations", file=sys.stderr)
    if size <= CONFIRM_ABOVE:
        return
    if not sys.stdin.isatty():
        raise UsageError(
            f"a grid of {size:,} evaluations needs a confirmation: add --yes, or lower --n_points"
        )
    answer = input(f"{size:,} evaluations take long. Go on? [y/N] ")
    if answer.strip().lower() not in ("y", "yes"):
        raise UsageError("not confirmed; lower --n_points or choose --method bayesian")
