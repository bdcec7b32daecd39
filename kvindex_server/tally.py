"""Metrics that the native core adds to without the GIL: prometheus_client only shows them."""

import threading
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvindex_server._core import Counter, Histogram


class Counters(Collector):
    """One counter per set of label values."""

    def __init__(self, name: str, meaning: str, labels: Sequence[str]) -> None:
        self._family = (name, meaning, tuple(labels))
        self._of: dict[tuple[str, ...], Counter] = {}
        self._lock = threading.Lock()

    def of(self, *values: str) -> Counter:
        """The counter of these label values, made when new; to be kept by who adds to it often."""
        with self._lock:
            return self._of.setdefault(values, Counter())

    def totals(self) -> dict[tuple[str, ...], int]:
        """By label values."""
        with self._lock:
            found = list(self._of.items())
        return {values: counter.total for values, counter in found}

    def describe(self) -> list[Metric]:
        """The family without samples."""
        name, meaning, labels = self._family
        return [CounterMetricFamily(name, meaning, labels=labels)]

    def collect(self) -> Iterator[Metric]:
        """The family with this moment's samples."""
        name, meaning, labels = self._family
        family = CounterMetricFamily(name, meaning, labels=labels)
        for values, total in self.totals().items():
            family.add_metric(values, total)
        yield family


class Histograms(Collector):
    """One histogram per set of label values."""

    def __init__(self, name: str, meaning: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        self._family = (name, meaning, tuple(labels))
        self._bounds = [float(each) for each in bounds]
        self._of: dict[tuple[str, ...], Histogram] = {}
        self._lock = threading.Lock()

    def of(self, *values: str) -> Histogram:
        """The histogram of these label values, made when new; to be kept by who adds to it often."""
        with self._lock:
            return self._of.setdefault(values, Histogram(self._bounds))

    def describe(self) -> list[Metric]:
        """The family without samples."""
        name, meaning, labels = self._family
        return [HistogramMetricFamily(name, meaning, labels=labels)]

    def collect(self) -> Iterator[Metric]:
        """The family with this moment's samples."""
        name, meaning, labels = self._family
        family = HistogramMetricFamily(name, meaning, labels=labels)
        with self._lock:
            found = list(self._of.items())
        bounds = [*(str(bound) for bound in self._bounds), "+Inf"]
        for values, histogram in found:
            so_far = 0
            buckets = []
            for bound, count in zip(bounds, histogram.counts, strict=True):
                so_far += count
                buckets.append((bound, so_far))
            family.add_metric(values, buckets=buckets, sum_value=histogram.sum)
        yield family
