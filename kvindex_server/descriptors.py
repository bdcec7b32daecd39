"""File descriptors: as many as the system lets the process have, and how many of them clients' connections may take."""

import os
import resource

_CONNECTIONS = 3, 4
"""Share of all: a crowd of clients must leave enough for engines' sockets, snapshots and the metrics port."""


def raise_limit() -> None:
    """To the system's hard limit: a connection needs one, a stream some ten, and the soft limit is often 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def limit() -> int:
    """How many the process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 1 << 30


def in_use() -> int:
    """How many are open; -1 when there is not even one left to find out by."""
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return -1


def for_connections(wanted: int) -> int:
    """How many connections may be open at once; fewer than wanted when the rest of the process would starve."""
    part, whole = _CONNECTIONS
    return min(wanted, limit() * part // whole)
