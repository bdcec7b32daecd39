"""Lists of candidates of any length and make: the native read path and the reference path say the same of each."""

import random
from collections.abc import Callable, Iterator

import pytest
from test_direct import keys_of, outcome, pods_outcome
from test_service import TIER_WEIGHTS, Served

from kvindex_server.config import LimitSettings
from kvindex_server.direct import Direct
from kvindex_server.lookup import Lookup
from kvindex_server.pb.indexer.v1 import indexer_pb2
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.stream import Trust

LIMITS = LimitSettings(max_tokens=1000, max_pods=4096, max_keys=100, max_prompt_bytes=1000)
PROMPT = [0, 1, 2, 0, 1, 1, 1, 1]
STEMS = ["", "p", "10.0.0.", "pod-of-a-fleet-", "n" * 15, "é" * 9, "x" * 127, "y" * 250, "long/" * 60]
REGISTERED = [f"{stem}{number}" for stem in STEMS for number in (0, 7, 10, 255)]
TRUSTED = [Trust.COLD, Trust.PARTIAL, Trust.EXACT, Trust.STALE]


@pytest.fixture(scope="module", params=["positive", "any"])
def paths(request: pytest.FixtureRequest) -> Iterator[Direct]:
    """With weights as they are, and with some below and at 0, by which a match may rank behind none."""
    served = Served()
    dice = random.Random(3)
    for at, pod in enumerate(REGISTERED):
        for rank in range(at % 3):
            held = PROMPT[: dice.choice([4, 8])]
            served.stored(pod, rank, held, dice.choice(["GPU", "CPU", "DISK", "FAR"]))
    assert served.index.place(REGISTERED[4], 0, keys_of(PROMPT).SerializeToString()[-16:], 3600.0)[0] == "recorded"
    # One that has a stream and no block, one that had a stream, and one that is known to the fleet alone.
    served.streams.append(served.index.add_stream("empty", 0))
    served.stored("gone", 0, PROMPT)
    served.streams.pop().close()
    served.fleet.names = [*REGISTERED, "a", "b", "empty", "fleet only"]

    def trust(model: str, pod: str, rank: int | None = None) -> tuple[Trust, str, float]:
        if pod not in served.fleet.names or pod == "fleet only" or (pod in REGISTERED and held_by(pod) == 0):
            return Trust.COLD, "pod is not registered", -1.0
        number = sum(pod.encode())
        return TRUSTED[number % 4], "r" * (number % 150), float(number % 3 - 1)

    served.fleet.trust = trust  # type: ignore[method-assign]
    weights = TIER_WEIGHTS if request.param == "positive" else {"gpu": 1.0, "cpu": -0.5, "disk": 0.0}
    lookup = Lookup(served.models, served.fleet, weights, served.metrics, LIMITS.max_tokens)
    yield Direct(lookup, served.models, served.fleet, weights, served.metrics, LIMITS)
    served.close()


def held_by(pod: str) -> int:
    return REGISTERED.index(pod) % 3


def name(dice: random.Random) -> str:
    kind = dice.randrange(6)
    if kind < 2:
        return dice.choice(REGISTERED)
    if kind == 2:
        return dice.choice(["a", "b", "empty", "gone", "fleet only"])
    if kind == 3:  # nearly a registered one
        near = dice.choice(REGISTERED)
        return near[:-1] or "q" if dice.random() < 0.5 else near + dice.choice("0é")
    return f"{dice.choice(STEMS)}{dice.randrange(10**6)}"


def message(names: list[bytes], top_k: int) -> bytes:
    """Names are bytes, so that they may be what no generated message would send."""
    head = pb.ScoreRequest(model="m", keys=keys_of(PROMPT), top_k=top_k).SerializeToString()
    return head + b"".join(b"\x32" + length(each) + each for each in names)


def length(value: bytes) -> bytes:
    size = len(value)
    return bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])


def natively(direct: Direct, call: Callable[[], object]) -> object:
    """What the native path alone says."""
    direct.reference = direct.pod_scores_reference = None  # type: ignore[assignment,method-assign]
    try:
        return call()
    finally:
        del direct.reference, direct.pod_scores_reference


@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17, 127, 128, 1023, 1024, 1025, 2500])
def test_any_list_of_names(paths: Direct, count: int) -> None:
    """Repeated, unknown, long and short ones, in any order, all of them or the best."""
    dice = random.Random(count)
    for top_k in (0, 1, 7, 2000):
        names = [name(dice) for _ in range(count)]
        names += dice.choices(names, k=count // 4) if names else []
        data = message([each.encode() for each in names], top_k)
        expected = outcome(paths.reference, data)
        assert isinstance(expected, pb.ScoreResponse)
        found = natively(paths, lambda data=data: outcome(paths.score, data))  # type: ignore[misc]
        assert found == expected
        distinct = len(dict.fromkeys(names)) or 40
        assert len(expected.scores) == (min(distinct, top_k) if top_k else distinct)


@pytest.mark.parametrize("count", [0, 1, 16, 1024, 1500])
def test_any_list_of_names_for_hits_only(paths: Direct, count: int) -> None:
    dice = random.Random(count)
    names = [name(dice) for _ in range(count)]
    request = indexer_pb2.GetPodScoresRequest(model_name="m", prompt="\0\1\2\0\1\1\1\1", pod_identifiers=names)
    data = request.SerializeToString()
    expected = pods_outcome(paths.pod_scores_reference, data)
    assert natively(paths, lambda: pods_outcome(paths.pod_scores, data)) == expected


@pytest.mark.parametrize(
    "bad",
    [b"", b"\xff", b"pod-\xc0\x80", b"\xed\xa0\x80 and more", b"sixteen bytes \xe9", b"12345678\x80", b"\xf0\x9f"],
)
def test_one_bad_name_among_many(paths: Direct, bad: bytes) -> None:
    """Empty, or no UTF-8: the same refusal wherever it stands."""
    dice = random.Random(1)
    for count in (0, 5, 1024):
        names = [name(dice).encode() for _ in range(count)]
        names.insert(dice.randrange(count + 1), bad)
        data = message(names, 0)
        expected = outcome(paths.reference, data)
        assert isinstance(expected, tuple)
        assert outcome(paths.score, data) == expected


def test_as_many_names_as_are_allowed(paths: Direct) -> None:
    """Repeated ones count too."""
    for count in (LIMITS.max_pods, LIMITS.max_pods + 1):
        data = message([b"same"] * count, 0)
        assert outcome(paths.score, data) == outcome(paths.reference, data)


def test_a_request_outlives_what_it_was_read_from(paths: Direct) -> None:
    """It refers to the bytes, and so keeps them."""
    names = [f"outlived-{number}" for number in range(1024)]

    def read() -> object:
        return paths.read(bytes(bytearray(message([each.encode() for each in names], 0))))

    request = read()
    again = [bytes([65 + number]) * 30_000 for number in range(26)]  # would take the place of bytes let go
    answer = pb.ScoreResponse.FromString(paths.answer(b"", request, lambda: None))  # type: ignore[arg-type]
    assert [each.pod for each in answer.scores] == names
    del again


def test_registered_pods_at_once_and_none_after(paths: Direct) -> None:
    """A pod that is new to the index is found by the next request, and unknown again after its stream has gone."""
    data = message([b"a stranger", b"newcomer"], 0)
    before = outcome(paths.score, data)
    stream = paths._models.names["m"][0].index.add_stream("newcomer", 0)
    paths._fleet.names.append("newcomer")  # type: ignore[attr-defined]
    known = outcome(paths.score, data)
    assert known == outcome(paths.reference, data) != before
    stream.close()
    paths._fleet.names.remove("newcomer")  # type: ignore[attr-defined]
    assert outcome(paths.score, data) == before
