"""What one message or one stream of a broken engine may cost: bounded in memory, and in time that others wait for."""

import struct
import subprocess
import sys
import time
from typing import Any

import msgpack
import pytest
from event_encoding import Removed, Stored, maps
from oracle import query_keys

from kvindex_server._core import Applied, Index, Stream

TOKENS = list(range(16))


def payload(*events: Any) -> bytes:
    packed: bytes = msgpack.packb([1.0, list(events), 0])
    return packed


def applied_within(seconds: float, stream: Stream, payloads: list[bytes]) -> Applied:
    """Of this thread's CPU: a bound that no linear way comes near and no quadratic one keeps."""
    before = time.thread_time()
    applied = stream.apply(payloads)
    assert time.thread_time() - before < seconds
    return applied


def growth(code: str) -> float:
    """MiB that a process of its own takes more for `code` from `# here` on: at its `# peak`, or kept at its `# end`."""
    measure = """
import resource
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
held = lambda: int(open("/proc/self/statm").read().split()[1]) / 256
"""
    code = code.replace("# here", "before = (peak(), held())")
    code = code.replace("# peak", "print(peak() - before[0])").replace("# end", "print(held() - before[1])")
    done = subprocess.run(
        [sys.executable, "-c", measure + code], capture_output=True, text=True, check=True, timeout=60
    )
    return float(done.stdout)


def test_bare_strings_in_many_blocks_are_read_once() -> None:
    """Old vLLM releases send bare ids, one per block of an image."""
    stream = Index(1).add_stream("p", 0)
    n = 40_000
    ids = [[f"image-{i}"] for i in range(n)]
    event = ["BlockStored", list(range(n)), None, [7] * n, 1, None, "GPU", None, ids]
    assert applied_within(1.0, stream, [payload(event)]).reasons == {}


def test_one_adapter_of_many_blocks_is_written_once() -> None:
    """And what the blocks differ by is bounded together."""
    index = Index(1)
    stream = index.add_stream("p", 0)
    n = 20_000
    event = ["BlockStored", list(range(n)), None, [7] * n, 1, None, "GPU", "x" * 4096]
    assert stream.apply([payload(event)]).reasons == {}
    keys = query_keys([7] * 3, 1, lora_name="x" * 4096)
    assert index.score(struct.pack("<3Q", *keys), [], [1.0])[0][2] == 3
    salted = {"type": "BlockStored", "block_hashes": list(range(n, 2 * n)), "token_ids": [7] * n, "block_size": 1}
    salted |= {"lora_name": "x" * 4096, "cache_salt": "t"}
    assert stream.apply([payload(salted)]).reasons == {"unread_extras": n}


def test_a_huge_event_leaves_no_room_behind() -> None:
    code = """
import msgpack
from kvindex_server._core import Index
streams = [Index(16).add_stream("p", 0) for _ in range(8)]
body = msgpack.packb([1.0, [["BlockStored", [1] * 1_000_000, None, [1] * 500_000, 16]], 0])
# here
for stream in streams: stream.apply([body])
# end
"""
    assert growth(code) < 20  # 8 MiB each and more, if it were kept


def test_topologies_of_one_message_do_not_pile_up() -> None:
    """Each clear makes a new one of all pods."""
    code = """
import msgpack
from kvindex_server._core import Index
index = Index(16)
streams = [index.add_stream(f"10.0.0.{i}:8000", 0) for i in range(300)]
for stream in streams: stream.apply([msgpack.packb([1.0, [["BlockStored", [1], None, [1] * 16, 16]], 0])])
body = msgpack.packb([1.0, [["BlockStored", [1], None, [1] * 16, 16], ["AllBlocksCleared"]] * 2000, 0])
# here
assert streams[0].apply([body]).clears == 2000
# peak
"""
    assert growth(code) < 60  # 200 and more, if they did


@pytest.mark.parametrize("removed", [True, False])
def test_a_message_of_many_topologies_is_applied_whole(removed: bool) -> None:
    """It is taken in several steps, which nothing shows."""
    index = Index(16)
    stream = index.add_stream("p", 0)
    events: list[Any] = [["BlockStored", [1], None, TOKENS, 16], ["AllBlocksCleared"]] * 200
    events += [["BlockStored", [n], None, [n] * 16, 16, None, "GPU", None, None, n % 30] for n in range(100)]
    events += [["BlockRemoved", [n], "GPU", n % 30] for n in range(100)] * removed
    applied = stream.apply([payload(*events)])
    assert (applied.messages, applied.events, applied.clears, applied.reasons) == (1, len(events), 200, {})
    assert stream.claims == 100 * (not removed)


def test_orphans_of_one_parent_cost_the_same_each() -> None:
    """The ordinary case of joining late: every prompt goes on behind one system prompt. Copies are told from them."""
    index = Index(16)
    stream = index.add_stream("p", 0)
    events = [["BlockStored", [1000 + n], 7, [n] * 16, 16] for n in range(65_536)]
    payloads = [payload(*events[at : at + 1024]) for at in range(0, len(events), 1024)]
    applied_within(2.0, stream, payloads)
    assert stream.orphans == 65_536
    applied = applied_within(2.0, stream, payloads)
    assert (stream.orphans, applied.reasons) == (65_536, {})
    more = [["BlockStored", [10**6 + n], 7, [n] * 16, 16] for n in range(1000)]
    assert applied_within(1.0, stream, [payload(*more)]).reasons == {"orphan_limit": 1000}
    before = index.bytes
    applied_within(2.0, stream, [payload(["BlockStored", [7], None, TOKENS, 16])])
    assert (stream.orphans, stream.unresolved) == (0, 1000)  # those that had to give way
    assert index.bytes < before


def test_orphans_are_bounded_in_bytes_and_counted_as_memory() -> None:
    index = Index(16)
    stream = index.add_stream("p", 0)
    tokens = msgpack.packb([1] * (1 << 20))
    bodies = [
        payload(["BlockStored", [100 + n], 10**6 + n, "@@", 1 << 20]).replace(msgpack.packb("@@"), tokens)
        for n in range(20)
    ]
    empty = index.bytes
    reasons = [stream.apply([body]).reasons for body in bodies]
    assert stream.orphans == 15
    assert reasons == [{}] * 15 + [{"orphan_limit": 1}] * 5
    assert 15 * 4 << 20 < index.bytes - empty < 80 << 20
    stream.clear()
    assert index.bytes - empty < 1 << 20


def test_a_full_index_keeps_no_orphans() -> None:
    index = Index(16, max_bytes=1)
    stream = index.add_stream("p", 0)
    assert stream.apply([payload(["BlockStored", [1], 9, TOKENS, 16])]).reasons == {"claim_limit": 1, "orphan_limit": 1}
    assert stream.orphans == 0


def test_one_orphan_that_stays_does_not_keep_the_memory_of_others() -> None:
    code = """
import msgpack
from kvindex_server._core import Index
stream = Index(16, max_removals=0).add_stream("p", 0)
tokens = list(range(16))
stream.apply([msgpack.packb([1.0, [["BlockStored", [1], 999, tokens, 16]], 0])])
come, go = ["BlockStored", [10], None, tokens, 16], ["BlockRemoved", [10, 11]]
come_and_go = [["BlockStored", [11], 10, tokens, 16], come, go]
body = msgpack.packb([1.0, come_and_go * 1000, 0])
stream.apply([body])
# here
stream.apply([body] * 500)
assert stream.orphans == 1
# end
"""
    assert growth(code) < 2  # 4, if it did


def test_orphans_that_left_in_another_order_are_adopted() -> None:
    index = Index(16)
    stream = index.add_stream("p", 0)
    stream.apply([maps(*(Stored([100 + n], n % 3, [n] * 16, 16) for n in range(300)))])
    stream.apply([maps(Stored([1], None, TOKENS, 16), Removed([1]), Stored([0], None, TOKENS[::-1], 16))])
    assert stream.orphans == 100
    again = index.add_stream("q", 0)
    assert again.restore(stream.snapshot())
    for each in (stream, again):
        each.apply([maps(Stored([2], None, [2] * 16, 16))])
        assert (each.orphans, each.unresolved) == (0, 0)
