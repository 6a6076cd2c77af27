"""How much memory this process may use."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path


@cache
def memory_limit(root: Path = Path("/")) -> int:
    """Bytes that this process may use: the machine's, or less where a control group limits it.

    Not what is free now, so that the same choice is made each time.

    Args:
        root: where ``proc`` and ``sys`` lie.
    """
    if not hasattr(os, "sysconf"):  # not a Unix
        return 0
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    listed = root / "proc/self/cgroup"
    for group in listed.read_text().splitlines() if listed.is_file() else []:
        _, controllers, own = group.split(":", 2)  # in version 2 there are no controllers
        if controllers and "memory" not in controllers.split(","):
            continue
        version_2 = (root / "sys/fs/cgroup", "memory.max")
        version_1 = (root / "sys/fs/cgroup/memory", "memory.limit_in_bytes")
        top, name = version_1 if controllers else version_2
        # The groups above limit it, too. In a container its own may be the one at the top.
        place = top / own.strip("/")
        for folder in (place, *place.parents[: len(place.relative_to(top).parts)]):
            try:
                limits.append(int((folder / name).read_text()))
            except (OSError, ValueError):  # no such group, or "max"
                continue
    return min(limits)
