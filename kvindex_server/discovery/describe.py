"""Makes a registration of what is known of a found pod: its address, what it tells, what its engine tells, defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from kvindex_server.config import DiscoveryDefaults
from kvindex_server.discovery.engine import EventSources
from kvindex_server.errors import InvalidArgument
from kvindex_server.pods import PodSpec, host

T = TypeVar("T")

NUMBERS = {
    "serving-port": (1, 65_535),
    "events-port": (1, 65_535),
    "replay-port": (0, 65_535),
    "ranks": (1, 1024),
    "block-size": (0, 65_536),
}
TEXTS = ("model", "topic", "engine", "container")


class NotDescribed(Exception):
    """A pod cannot be followed: `reason` is a metric's label, `detail` says what to correct."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Told:
    """What a pod tells of itself; None where it tells nothing."""

    serving_port: int | None = None
    events_port: int | None = None
    replay_port: int | None = None
    ranks: int | None = None
    block_size: int | None = None
    model: str | None = None
    topic: str | None = None
    engine: str | None = None
    container: str | None = None


def told_by(annotations: Mapping[str, object], prefix: str) -> Told:
    """Reads a pod's annotations. NotDescribed when one of ours is unknown or has a wrong value."""
    values: dict[str, int | str] = {}
    for key, value in annotations.items():
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix)
        text = str(value)
        if name in NUMBERS:
            low, high = NUMBERS[name]
            if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
                raise NotDescribed("annotation", f"{key} must be a number in {low}..{high}")
            values[name.replace("-", "_")] = int(text)
        elif name in TEXTS:
            values[name] = text
        else:
            raise NotDescribed("annotation", f"{key} is not known")
    return Told(**values)  # type: ignore[arg-type]


def describe(
    name: str,
    ip: str,
    told: Told,
    sources: EventSources | None,
    defaults: DiscoveryDefaults,
    incarnation: str = "",
) -> PodSpec:
    """The registration of the pod at `ip`: its annotations first, then its engine's answer, then the defaults."""
    model = told.model or defaults.model
    if not model:
        raise NotDescribed("no_model", "neither the pod nor discovery.defaults.model names its model")
    if sources is None:
        sources = EventSources(defaults.events_port, defaults.replay_port, defaults.ranks, defaults.topic)
    replay = _first(told.replay_port, sources.replay_port)
    spec = PodSpec(
        pod=name,
        model=model,
        endpoint=f"tcp://{host(ip)}:{_first(told.events_port, sources.events_port)}",
        replay_endpoint=f"tcp://{host(ip)}:{replay}" if replay else "",
        ranks=_first(told.ranks, sources.ranks),
        topic=_first(told.topic, sources.topic),
        engine=_first(told.engine, defaults.engine),
        block_size=_first(told.block_size, defaults.block_size),
        incarnation=incarnation,
    )
    try:
        return spec.validate()
    except InvalidArgument as error:
        raise NotDescribed("invalid", str(error)) from None


def _first(*values: T | None) -> T:
    for value in values:
        if value is not None:
            return value
    raise AssertionError("the last value is a default")
