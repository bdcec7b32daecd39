"""Models by name: a registration does not wait for a tokenizer, and gets it when it is found."""

import threading
import time
from collections.abc import Callable

from event_encoding import Stored, as_map, batch

from kvindex_server._core import Index
from kvindex_server.models import Model, Models


class Found:
    """What a discovery gives."""

    mode = "native"
    cuts = "anywhere"


def eventually(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.005)


def test_a_registered_models_tokenizer_is_found_beside_the_call() -> None:
    go, asked = threading.Event(), []

    def discover(name: str) -> Found | None:
        asked.append(name)
        assert go.wait(10)
        return Found() if name == "org/a" else None

    models = Models([Model("known", Index(4))], discover=discover)  # type: ignore[arg-type]
    model = models.seen("org/a", 16)
    assert models.seen("org/a") is model and models.get("org/a").tokenizer is None
    models.seen("other")
    models.seen("known")
    go.set()
    eventually(lambda: models.get("org/a").tokenizer is not None)
    assert models.get("org/a").index is model.index
    assert models.tokenizers() == {"org/a": (True, False)}
    eventually(lambda: len(asked) == 2)
    assert sorted(asked) == ["org/a", "other"]
    assert [each.name for each in models.all()] == ["known", "org/a", "other"]


def test_a_model_that_is_only_seen_has_the_limits_too() -> None:
    models = Models([], max_claims=3, max_index_bytes=1)
    stored = Stored([1], None, [1, 2, 3, 4], 4)
    applied = models.seen("org/a", 4).index.add_stream("p", 0).apply([batch([as_map(stored)])])
    assert applied.reasons == {"claim_limit": 1}  # an empty index takes more than a byte
