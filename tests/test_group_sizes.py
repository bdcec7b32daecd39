"""Groups and tiers whose blocks differ in size share engine hashes, and each is held for what it is."""

import itertools
from dataclasses import replace

import pytest
from event_encoding import Event, Removed, Stored, as_map, batch

from kvindex_server._core import Index, Stream

TOKENS = list(range(1, 65))
WINDOW = 1024


def ids(tokens: list[int]) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in tokens)


def apply(stream: Stream, *events: Event) -> dict[str, int]:
    """One batch."""
    return stream.apply([batch([as_map(event) for event in events])]).reasons


def stored(size: int, group: int = 0, kind: str = "full_attention", **other: object) -> Stored:
    """All of TOKENS in blocks of one size; the hash of a block is where it ends."""
    window = WINDOW if kind == "sliding_window" else None
    event = Stored(list(range(size, 65, size)), None, TOKENS, size, group=group, kind=kind, window=window)
    return replace(event, **other)  # type: ignore[arg-type]


def match(index: Index, tokens: list[int] = TOKENS) -> int:
    """Leading blocks of the prompt that are held."""
    found = index.score_tokens(ids(tokens), [], [1.0, 0.8, 0.5])
    return found[0][2] if found else 0


@pytest.mark.parametrize("sizes", [(8, 16), (16, 32), (32, 64), (16, 16), (8, 32)])
@pytest.mark.parametrize("canonical", [0, 4, 8, 16, 32])
def test_all_is_matched_where_every_group_holds_all(sizes: tuple[int, int], canonical: int) -> None:
    """Whatever the sizes of the groups' blocks, the model's, and the order in which they are told."""
    kinds = ("full_attention", "sliding_window"), ("full_attention", "full_attention"), ("full_attention", "mamba")
    for (first, second), kind, back in itertools.product((sizes, sizes[::-1]), kinds, (False, True)):
        index = Index(canonical)
        stream = index.add_stream("p", 0)
        events = [stored(first, 0, kind[0]), stored(second, 1, kind[1])]
        assert apply(stream, *(events[::-1] if back else events)) == {}
        assert match(index) == 64 // index.block_size, (sizes, kind, canonical, back)
        for size, group in ((first, 0), (second, 1)):
            assert apply(stream, Removed(list(range(size, 65, size)), "GPU", group)) == {}
        assert (index.claims, index.blocks) == (0, 0)


@pytest.mark.parametrize("back", [False, True])
def test_a_block_stands_for_no_more_than_its_own_size(back: bool) -> None:
    """A wider block of another group under the same hash adds nothing to what a group holds."""
    index = Index(16)
    stream = index.add_stream("p", 0)
    events = [stored(32), stored(64, 1, "sliding_window")]
    apply(stream, *(events[::-1] if back else events))
    assert match(index) == 4
    assert apply(stream, Removed([32], "GPU", 0)) == {}
    assert match(index) == 0


@pytest.mark.parametrize("back", [False, True])
def test_a_window_of_wide_blocks_that_names_only_what_it_keeps(back: bool) -> None:
    """All tokens but few hashes: how much a hash stands for follows from the tokens, its key from the other group."""
    index = Index(16)
    stream = index.add_stream("p", 0)
    events = [stored(16), stored(32, 1, "sliding_window", hashes=[64], window=33)]
    assert apply(stream, *(events[::-1] if back else events)) == {}
    assert (match(index), stream.unresolved) == (4, 0)


def test_a_wide_block_that_cannot_be_told_is_counted() -> None:
    """No tokens say what comes before the hash in its block, so it stays unresolved, and not in silence."""
    index = Index(16)
    stream = index.add_stream("p", 0)
    reasons = apply(stream, stored(16), stored(32, 1, "sliding_window", hashes=[64], tokens=[], window=33))
    assert reasons == {"block_size_mismatch": 1}
    assert (match(index), stream.unresolved) == (0, 1)


def test_a_tier_of_larger_chunks_outlives_the_blocks_of_the_gpu() -> None:
    """A chunk of 64 on the CPU and blocks of 16 on the GPU under one hash and group."""
    chunk = Stored([64], None, TOKENS, 64, "CPU", group=0)
    for events in ([stored(16), chunk], [chunk, stored(16)]):
        index = Index(16)
        stream = index.add_stream("p", 0)
        assert apply(stream, *events) == {}
        assert apply(stream, Removed([16, 32, 48], "GPU", 0)) == {}
        assert match(index) == 4
        assert apply(stream, Removed([64], "CPU", 0)) == {}
        assert match(index) == 0


def test_one_name_for_blocks_of_two_sizes_counts_as_the_smaller() -> None:
    """Nobody knows which of two copies a removal meant, so only what both hold is sure; and that is counted."""
    index = Index(16)
    stream = index.add_stream("p", 0)
    assert apply(stream, Stored([64], None, TOKENS, 64)) == {}
    assert match(index) == 4
    assert apply(stream, Stored([64], None, TOKENS, 64), stored(16))["block_size_mismatch"] == 1
    apply(stream, Removed([16, 32, 48]), Removed([64]), Removed([64]))
    assert (match(index), index.blocks, stream.claims) == (0, 1, 1)
    apply(stream, Removed([64]))
    assert (index.claims, index.blocks) == (0, 0)


def test_a_partial_block_first_teaches_nothing() -> None:
    """One odd block that comes alone may be a partial one; the block size comes from what follows."""
    index = Index()
    partial, whole = index.add_stream("a", 0), index.add_stream("b", 0)
    assert apply(partial, Stored([9], None, TOKENS[:5], 5)) == {}
    assert index.block_size == 0
    assert apply(partial, stored(16)) == {}
    assert apply(whole, stored(16)) == {}
    assert index.block_size == 16
    assert [score[2] for score in index.score_tokens(ids(TOKENS), [], [1.0])] == [4, 4]
    assert (partial.orphans, partial.unresolved) == (0, 1)


def test_a_block_of_odd_size_waits_until_another_builds_on_it() -> None:
    """Then it was a whole one: nothing of the chain is lost."""
    index = Index()
    stream = index.add_stream("p", 0)
    assert apply(stream, Stored([1], None, TOKENS[:12], 12)) == {}
    assert (index.block_size, stream.orphans) == (0, 1)
    assert apply(stream, Stored([2], 1, TOKENS[12:24], 12)) == {}
    assert (index.block_size, stream.orphans, match(index)) == (12, 0, 2)


def test_what_waits_for_the_block_size_is_saved() -> None:
    """A snapshot taken meanwhile has it, and the restored stream goes on."""
    index, other = Index(), Index()
    stream, restored = index.add_stream("p", 0), other.add_stream("p", 0)
    apply(stream, Stored([1], None, TOKENS[:12], 12))
    assert restored.restore(stream.snapshot())
    assert apply(restored, Stored([2, 3], 1, TOKENS[12:36], 12)) == {}
    assert (match(other), restored.unresolved) == (3, 0)


def test_groups_of_several_sizes_are_saved() -> None:
    """A restored stream stands for the same, and lets go of the same."""
    index, other = Index(16), Index(16)
    stream, restored = index.add_stream("p", 0), other.add_stream("p", 0)
    apply(stream, stored(32), stored(8, 1), stored(64, 2, "sliding_window"), Stored([64], None, TOKENS, 64, "CPU"))
    assert restored.restore(stream.snapshot())
    assert (match(other), restored.digest) == (4, stream.digest)
    for size, group in ((32, 0), (8, 1), (64, 2)):
        assert apply(restored, Removed(list(range(size, 65, size)), "GPU", group)) == {}
    assert apply(restored, Removed([64], "CPU", 0)) == {}
    assert (other.claims, other.blocks) == (0, 0)


def test_an_image_inside_a_wide_block_is_counted() -> None:
    """Nobody can tell which of its canonical blocks the image touches: it is not held, and not in silence."""
    index = Index(16)
    stream = index.add_stream("p", 0)
    image = Stored([32, 64], None, TOKENS, 32, extra_keys=[None, [["image", 8]]])
    assert apply(stream, image) == {"block_size_mismatch": 1}
    assert match(index) == 2


@pytest.mark.parametrize("size", [8, 16, 32])
def test_a_block_that_moves_within_one_batch_keeps_its_key(size: int) -> None:
    """Removed from the GPU, then told without tokens to be on the CPU."""
    index = Index(16)
    stream = index.add_stream("p", 0)
    names = list(range(size, 65, size))
    apply(stream, stored(size))
    assert apply(stream, Removed(names), Stored(names, None, [], 0, "CPU")) == {}
    assert [score[2:4] for score in index.score_tokens(ids(TOKENS), [], [1.0, 0.75, 0.5])] == [(4, 3.0)]
    assert apply(stream, Removed(names, "CPU")) == {}
    apply(stream, Stored(names, None, [], 0, "CPU"))  # another batch: it may come back as anything
    assert match(index) == 0


def test_the_limit_of_claims_counts_every_block_of_a_wide_one() -> None:
    """One claim on 64 tokens takes the room of the blocks it stands for, and gives all of it back."""
    index = Index(16, max_claims=4)
    stream = index.add_stream("p", 0)
    wide = Stored([64], None, TOKENS, 64)
    assert apply(stream, wide) == {}
    assert (index.claims, index.blocks) == (1, 4)
    assert apply(stream, Stored([1], None, TOKENS[::-1], 64)) == {"claim_limit": 1}
    assert (index.claims, index.blocks) == (1, 4)
    assert apply(stream, Removed([64]), wide) == {}
    assert match(index) == 4
    stream.clear()
    narrow = Index(16, max_claims=3).add_stream("p", 0)
    assert apply(narrow, wide) == {"claim_limit": 1}


def test_a_window_of_no_tokens_is_an_unknown_kind() -> None:
    """It would match every prompt whole; nobody knows what is meant, so it fails closed and is counted."""
    index = Index(16)
    stream = index.add_stream("p", 0)
    event = stored(16, 0, "sliding_window", window=0)
    assert apply(stream, event)["unknown_group_kind"] == 1
    assert match(index) == match(index, TOKENS[::-1]) == 0


def test_a_window_of_one_token_needs_a_block_at_the_end() -> None:
    """Engines look for one held block from the right, also where the window reaches no other token."""
    index = Index(16)
    stream = index.add_stream("p", 0)
    apply(stream, stored(16, 0, "sliding_window", window=1))
    assert (match(index), match(index, TOKENS[:40]), match(index, TOKENS[::-1])) == (4, 2, 0)
    apply(stream, Removed([48, 64], "GPU", 0))
    assert match(index) == 2


def test_a_block_size_may_be_set_anew_while_nothing_is_claimed() -> None:
    """Not one that was given from the start, nor one by which something is held."""
    index = Index()
    stream = index.add_stream("p", 0)
    assert (index.set_block_size(64), index.set_block_size(16)) == (64, 16)
    apply(stream, stored(16))
    assert index.set_block_size(24) == 16
    assert Index(16).set_block_size(24) == 16


@pytest.mark.parametrize("size", [2**63, 2**40, 2**32, 96])
def test_a_block_larger_than_its_tokens_costs_nothing(size: int) -> None:
    """However many tokens an event pretends to have, only those that it brings are looked at."""
    index = Index(16)
    stream = index.add_stream("p", 0)
    assert "bad_event" not in apply(stream, stored(16), stored(16, 1, hashes=[64], block_size=size))
    assert (stream.claims, index.blocks) == (5, 4)


def test_keys_told_before_the_first_list_of_extra_keys_are_dropped_whatever_their_size() -> None:
    """Wide blocks, parts and what waits for a parent: every claim waits for its key, and for what it is made of."""
    index = Index(16)
    stream = index.add_stream("p", 0)
    late = Stored([96], 80, TOKENS[:16], 16)
    assert apply(stream, stored(32), stored(8, 1), stored(64, 2), late) == {}
    assert (match(index), stream.orphans) == (4, 1)
    listed = stored(16, 3, extra_keys=[None] * 4)
    assert apply(stream, Removed([32], "GPU", 0), Stored([32], None, [], 0, "CPU", group=0), listed) == {
        "block_size_mismatch": 7  # where a block ends is known again, but not what comes before it
    }
    assert (match(index), stream.orphans, index.blocks) == (0, 0, 4)
    again = [stored(size, group, extra_keys=[None] * (64 // size)) for size, group in ((32, 0), (8, 1), (64, 2))]
    assert apply(stream, *again) == {}
    assert (match(index), stream.unresolved) == (4, 1)  # of what never came again, the orphan
    assert stream.clear() > 0
    assert (index.claims, index.blocks) == (0, 0)


def test_a_connector_without_extra_keys_tells_what_its_chunks_are_made_of() -> None:
    """Of which tokens a wide block consists is told by its key; the list only decides which key that is."""
    index = Index(16)
    stream = index.add_stream("p", 0)
    chunk = Stored([64], None, TOKENS, 64, "CPU", group=0)
    assert apply(stream, stored(16, extra_keys=[None] * 4), chunk) == {}
    assert apply(stream, Removed([16, 32, 48, 64], "GPU", 0)) == {}
    assert (match(index), stream.unresolved) == (4, 0)
    salted = Stored([164], None, TOKENS, 64, "CPU", group=0)
    keys = [["tenant"], None, None, None]
    assert apply(stream, Removed([64], "CPU", 0), stored(16, hashes=[116, 132, 148, 164], extra_keys=keys), salted) == {
        "block_size_mismatch": 1
    }
    assert match(index) == 0


def test_a_block_that_moves_within_one_batch_keeps_its_key_without_a_list() -> None:
    """A connector's tokens do not tell it then, but its hash does."""
    index = Index(16)
    stream = index.add_stream("p", 0)
    names = [16, 32, 48, 64]
    apply(stream, stored(16, extra_keys=[None] * 4))
    assert apply(stream, Removed(names), stored(16, medium="CPU")) == {}
    assert match(index) == 4


def test_few_hashes_of_wide_blocks_of_an_adapter() -> None:
    """What a window's event with fewer hashes than blocks says of them all is taken into account."""
    index = Index(16)
    stream = index.add_stream("p", 0)
    window = Stored([64], None, TOKENS, 32, "GPU", lora_name="sql", group=1, kind="sliding_window", window=32)
    assert apply(stream, stored(16, lora_name="sql"), window) == {}
    assert stream.unresolved == 0


def test_the_limit_of_a_stream_counts_every_block_of_a_wide_one() -> None:
    """Exactly as many blocks as the stream may have, and the room comes back."""
    wide = Stored([64], None, TOKENS, 64)
    assert apply(Index(16, max_claims_per_stream=3).add_stream("p", 0), wide) == {"claim_limit": 1}
    index = Index(16, max_claims_per_stream=4)
    stream = index.add_stream("p", 0)
    assert apply(stream, wide) == {}
    assert apply(stream, Stored([1], None, TOKENS[::-1], 64)) == {"claim_limit": 1}
    assert apply(index.add_stream("q", 0), wide) == {}
    assert apply(stream, Removed([64]), wide) == {}
    assert index.blocks == 4
