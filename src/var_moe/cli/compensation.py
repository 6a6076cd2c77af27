"""``--compensation``: what stands in for experts that do not run, by name or folder."""

from __future__ import annotations

from pathlib import Path

from var_moe.errors import UsageError

NAMES = ("none", "means", "learned")


def parse_compensation(value: str | None) -> tuple[str | None, Path | None]:
    """The name that a policy is made with, and the folder that it comes from.

    Args:
        value: ``none``, ``means``, ``learned`` (the profile's own), or a folder that
            `var-moe fit-compensation` left; None leaves it to the policy.

    Raises:
        UsageError: it is neither.
    """
    if value is None or value in NAMES:
        return value, None
    if not Path(value).is_dir():
        raise UsageError(
            f"--compensation {value}: expected {', '.join(NAMES)}, or the folder of a fitted one"
        )
    return "learned", Path(value)
