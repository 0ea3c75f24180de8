"""How much memory is left."""

from __future__ import annotations

import sys
from pathlib import Path

# Limit and use of a container: cgroups 2 and 1.
_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def available_memory() -> int:
    """Bytes that a process can still have: of the machine and its container; on systems that do not say
    so, more than there can be."""
    result = sys.maxsize
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                result = int(line.split()[1]) * 1024
    except OSError:
        pass
    for limit, usage in _LIMITS:
        try:
            result = min(result, int(Path(limit).read_text()) - int(Path(usage).read_text()))
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
    return max(result, 0)
