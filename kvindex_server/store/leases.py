"""How far streams are believed: what the replica that follows each has told, under which life, and on which primary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgpack  # type: ignore[import-untyped]

Trusted = tuple[int, str, float]
"""How far a stream is trusted: the value of a Trust, the reason, seconds since its last message (-1: none)."""

_DOUBT = (4, 1, 2, 3)


@dataclass(frozen=True, slots=True)
class Lease:
    """What the replica that follows a stream has told, when that was heard, and when it ends (time.monotonic)."""

    ends: float
    told_at: float
    trusted: Trusted
    life: int
    eras: tuple[bytes, ...]
    """Of each partition, the one in which its store was found to have everything."""

    def trusted_now(self, life: int | None, eras: Sequence[bytes], now: float) -> Trusted:
        """By what counts in the store by now."""
        if self.life != life:  # what was told is of a life before
            return 1, "its replica has just begun", -1.0
        if self.eras != tuple(eras):
            return 4, "the shared store has another primary, which may not have everything", -1.0
        if now > self.ends:
            return 4, "the replica that followed it is gone", -1.0
        trust, reason, age = self.trusted
        return trust, reason, age + now - self.told_at if age >= 0 else age


Leases = Mapping[tuple[str, int], Lease]
"""By pod and rank."""


def heard(time_ms: int, leases: Sequence[bytes], now: float) -> dict[tuple[str, int], Lease]:
    """The leases as the store has them, stream and lease in turns; `time_ms` is its time at `now`."""
    found = {}
    for name, lease in zip(leases[::2], leases[1::2], strict=True):
        rank, pod = name.decode().split(" ", 1)
        ends, _, era, told = lease.split(b" ", 3)
        trust, reason, age, life, *eras = msgpack.unpackb(told) if told else (1, "", -1.0, 0)
        left = (int(ends) - time_ms) / 1000
        found[pod, int(rank)] = Lease(now + left, now, (trust, reason, age), life, (era, *eras))
    return found


def standing(
    leases: Leases,
    lives: Mapping[tuple[str, int], int],
    eras: Sequence[bytes],
    pod: str,
    rank: int | None,
    now: float,
) -> Trusted:
    """Of one rank; without, of the pod's least trusted one."""
    ranks = [key for key in leases if key[0] == pod] if rank is None else [(pod, rank)]
    trusted = [leases[key].trusted_now(lives.get(key), eras, now) for key in ranks if key in leases]
    return min(trusted, key=lambda each: _DOUBT.index(each[0]), default=(1, "no replica follows it", -1.0))
