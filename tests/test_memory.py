"""Memory that a process may use, by made-up control groups."""

from __future__ import annotations

import os

from var_moe import memory


def test_a_containers_limit_counts(tmp_path):
    """Control groups of version 2 and 1: its own limit, and those of the groups above."""
    machine = memory.memory_limit.__wrapped__(tmp_path)
    assert machine == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for place, value in {
        "proc/self/cgroup": "12:cpu,cpuacct:/a\n4:cpuset,memory:/a/b\n0::/pod/box\n",
        "sys/fs/cgroup/pod/box/memory.max": "max\n",
        "sys/fs/cgroup/pod/memory.max": "5000\n",
        "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "9223372036854771712\n",
    }.items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(value)
    assert memory.memory_limit.__wrapped__(tmp_path) == 5000
    (tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text("4000\n")
    assert memory.memory_limit.__wrapped__(tmp_path) == 4000
    (tmp_path / "sys/fs/cgroup/pod/box/memory.max").write_text("3000\n")
    assert memory.memory_limit.__wrapped__(tmp_path) == 3000
    (tmp_path / "proc/self/cgroup").write_text("0::/../elsewhere\n4:memory:/gone\n")
    assert (
        memory.memory_limit.__wrapped__(tmp_path) == 4000
    )  # the container's own group is at the top
