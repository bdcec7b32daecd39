"""Checks of what engines publish: sizes, encodings, hashes, and what was not understood."""

from collections.abc import Iterator

from kvindex_server import dialects
from kvindex_server.doctor.facts import Facts, Finding, Status, counts, of_stream, passed
from kvindex_server.stream import Trust

CONVENTIONAL_SEED = 1337


def block_size(facts: Facts) -> Iterator[Finding]:
    """The engines' block sizes fit the model's."""
    if not facts.block_size:
        yield Finding(
            Status.FAIL,
            "the block size is not known yet, so every prompt scores zero",
            "It comes with the first event. Set models[].block_size to the engine's block size to have it at once.",
        )
        return
    for stream in facts.streams:
        count = stream.dropped.get("block_size_mismatch", 0)
        if count:
            yield of_stream(
                stream,
                Status.FAIL,
                f"{count} events had a block size that does not fit the model's {facts.block_size}",
                "Run every pod of a model with one block size, or with multiples of it; correct models[].block_size.",
            )
    yield passed(f"{facts.block_size} tokens, and no stream disagrees")


def hash_seed(facts: Facts) -> Iterator[Finding]:
    """Callers that compute keys by themselves need the seed."""
    if facts.seed == CONVENTIONAL_SEED:
        yield passed(f"seed {facts.seed}, keys by XXH3-64")
        return
    yield Finding(
        Status.WARN,
        f"the seed is {facts.seed}, not the conventional {CONVENTIONAL_SEED}",
        "Clients that send keys must use the same seed; those that send tokens or text need nothing.",
    )


def event_encoding(facts: Facts) -> Iterator[Finding]:
    """Events are of a kind that is understood."""
    for dialect in facts.dialects:
        spec = facts.specs.get(dialect.pod)
        for fails, evidence, remedy in dialects.odd(dialect, spec.engine if spec is not None else ""):
            yield Finding(Status.FAIL if fails else Status.WARN, evidence, remedy, dialect.pod, dialect.rank)
    heard = [each for each in facts.dialects if each.looked]
    if not heard:
        yield Finding(Status.SKIP, "no event has been seen yet")
    yield passed(f"{dialects.by_kind(heard, dialects.encoding)}; seen in {sum(each.looked for each in heard)} messages")


def hash_version(facts: Facts) -> Iterator[Finding]:
    """What forms and algorithms engine hashes have."""
    heard = [each for each in facts.dialects if dialects.hash_form(each)]
    for dialect in heard:
        if dialects.mixes_forms(dialect):
            yield Finding(
                Status.FAIL,
                f"the engine names its blocks in several ways: {dialects.hash_form(dialect)}",
                "A block stored under one form and removed under another stays here. Set one "
                "VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES for the engine and its connectors, then ClearPod.",
                dialect.pod,
                dialect.rank,
            )
    if not heard:
        yield Finding(Status.SKIP, "no stored block has been seen yet")
        return
    kinds = dialects.by_kind(heard, dialects.hash_version)
    if dialects.disagree(heard):
        yield Finding(
            Status.WARN,
            f"the pods name equal blocks differently: {kinds}",
            "Scores do not depend on it; GetPodsForBlocks by engine hash does, and engines that fetch blocks from each "
            "other. Run every pod with one release, one prefix_caching_hash_algo and one PYTHONHASHSEED.",
        )
    yield passed(f"{kinds}; block keys here are computed from tokens and depend on none of it")


def engine_hashes(facts: Facts) -> Iterator[Finding]:
    """Every stored hash has its tokens and its parent."""
    waiting = [each for each in facts.streams if each.unresolved or each.orphans]
    for stream in waiting:
        yield of_stream(
            stream,
            Status.WARN,
            f"{stream.orphans} blocks wait for a parent, {stream.unresolved} claims for their tokens; none scores",
            "After joining late this is the unknown past. Give the pod a replay endpoint, or ClearPod once it has one.",
        )
    unknown = [each for each in facts.streams if each.dropped.get("unknown_removal")]
    for stream in unknown:
        if stream.trust is Trust.EXACT:
            yield of_stream(
                stream,
                Status.WARN,
                f"{stream.dropped['unknown_removal']} removals named a hash that was never stored, on an EXACT stream",
                "The engine's own hashes do not agree with themselves: report the engine's version, then ClearPod.",
            )
    yield passed("every stored hash has its tokens and its parent; the hashes themselves are opaque and never computed")


def decode_errors(facts: Facts) -> Iterator[Finding]:
    """Messages and events that were not understood."""
    told = {(each.pod, each.rank): dialects.explained(each) for each in facts.dialects}
    for stream in facts.streams:
        own_check = told.get((stream.pod, stream.rank), ())
        errors = {reason: count for reason, count in stream.decode_errors.items() if reason not in own_check}
        if errors:
            yield of_stream(
                stream,
                Status.FAIL,
                "not understood: " + counts(errors),
                "Is this an events port of a supported engine release? Keep a sample: kvindex capture.",
            )
    yield passed("every message and event was understood, but for what event_encoding tells")


def dropped(facts: Facts) -> Iterator[Finding]:
    """What was dropped, by reason."""
    own_check = ("block_size_mismatch", "rank_mismatch", "unknown_removal")
    for stream in facts.streams:
        dropped = {reason: count for reason, count in stream.dropped.items() if reason not in own_check}
        if dropped:
            yield of_stream(
                stream,
                Status.WARN,
                "dropped or left open: " + counts(dropped),
                "A limit is reached (see limits.*), or the engine's events are of a kind that is not taken in.",
            )
    yield passed("nothing was dropped")
