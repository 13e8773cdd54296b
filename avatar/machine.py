"""Amounts of memory: as people write them, and what this machine has."""

from __future__ import annotations

import re
from pathlib import Path

from avatar.cards import GIB, MIB


def bytes_of(text: str) -> int:
    """24GiB, 24G or 24000MiB; GB are taken for GiB, as GPU makers do. Raises: ValueError: no amount of memory."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM])(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError("not an amount of memory, such as 24GiB")
    return int(float(match[1]) * (GIB if match[2] in "gG" else MIB))


def host_memory(root: Path = Path("/")) -> int:
    """Bytes that a process may still take of this machine's memory, limits of its control group included."""
    rows = (root / "proc/meminfo").read_text("ascii").splitlines()
    info = {name: int(rest.split()[0]) * 1024 for name, _, rest in (row.partition(":") for row in rows)}
    available = info["MemAvailable"]
    group = root / "sys/fs/cgroup"
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = int((group / limit).read_text("ascii")), int((group / used).read_text("ascii"))
        except (OSError, ValueError):  # no such group, or "max"
            continue
        # Above all there is at present: a machine that is given more as it asks for it.
        return most if info["MemTotal"] < most < 1 << 50 else min(available, most - now)
    return available
