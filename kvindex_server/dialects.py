"""What a sample of an engine's messages tells of its release, its hashes, and of what will not be understood."""

from collections.abc import Callable, Iterator, Sequence

from kvindex_server.engine_hashes import recognised
from kvindex_server.stream import Dialect

_NEWEST_ARRAY = 12
_ARRAYS = {6: "before a medium was told", 7: "vLLM 0.10.2, SGLang up to 0.5.18", 8: "vLLM 0.14", 9: "vLLM 0.17"}
_ARRAYS |= {10: "vLLM 0.20", 12: "vLLM 0.22 and 0.23"}
# Fields that a release brought, the newest first.
_RELEASES = (
    ("lookahead", "vLLM 0.33 or later"),
    ("ownership", "vLLM 0.29 or later"),
    ("locality", "vLLM 0.26 or later"),
    ("spec_kind", "vLLM 0.24 or later"),
    ("cache_salt", "SGLang 0.5.20 or later"),
)
_FORMS = {
    "unsigned_hashes": "unsigned ints",
    "signed_hashes": "signed ints",
    "bytes_16": "16 bytes",
    "bytes_32": "32 bytes",
    "other_bytes": "bytes of another length",
    "text_hashes": "text",
}


def encoding(dialect: Dialect) -> str:
    """How events are written, and which releases do so; empty before any."""
    batch = "batch a map" if "map_batch" in dialect.traits else "batch an array"
    if "envelope" in dialect.traits:
        return f"the envelope of RFC 1527, {batch}"
    found = []
    if "map_events" in dialect.traits:
        newest = next((words for trait, words in _RELEASES if trait in dialect.traits), "")
        release = newest or "vLLM 0.24 or later, SGLang 0.5.20 or later"
        found.append(f"maps, {batch}: {release}")
    if "array_events" in dialect.traits:
        lengths = sorted({dialect.shortest, dialect.longest} - {0})
        releases = [f"{length} long ({_ARRAYS.get(length, 'of no release known')})" for length in lengths]
        found.append(f"arrays {' and '.join(releases)}, {batch}" if releases else f"arrays, {batch}")
    return " and ".join(found)


def odd(dialect: Dialect, engine: str) -> Iterator[tuple[bool, str, str]]:
    """(hits are missed for sure, evidence, remedy) of what is not understood, or not what is registered."""
    traits = dialect.traits
    if dialect.odd_tag:
        yield (
            True,
            f"events of a kind that nobody here knows: {dialect.odd_tag!r}",
            "The engine is newer than this server: update it. A sample helps: kvindex capture.",
        )
    if "token_pairs" in traits:
        yield (
            True,
            "token ids are pairs, as SGLang sends them with EAGLE: those blocks have no keys here",
            "Run the engine without EAGLE, or do not route it by this index.",
        )
    if "token_text" in traits or "odd_tokens" in traits:
        yield (
            True,
            "token ids are no integers (TensorRT-LLM may send text): those blocks have no keys here",
            "Configure the engine to publish token ids as integers.",
        )
    if "odd_hashes" in traits:
        yield True, "block hashes are neither integers, bytes nor text", "Is this an events port of a known engine?"
    if dialect.longest > _NEWEST_ARRAY or (dialect.longest and dialect.shortest < min(_ARRAYS)):
        length = dialect.longest if dialect.longest > _NEWEST_ARRAY else dialect.shortest
        yield (
            False,
            f"a BlockStored is an array {length} long, and no release known sends that",
            "What stands behind position 11 is passed over. Compare with the engine's release notes; kvindex capture.",
        )
    if {"array_events", "map_events"} <= set(traits):
        yield (
            False,
            "some events are arrays and some are maps: two releases publish under one name",
            "Is one endpoint shared by two engines? Register each engine as a pod of its own.",
        )
    seen = _engine_of(dialect)
    if engine and seen and engine != seen:
        yield (
            False,
            f"registered as {engine}, but its events and hashes are {seen}'s",
            "Register the right engine; it may be another pod's endpoint.",
        )


def explained(dialect: Dialect) -> set[str]:
    """The reasons of counted decode errors that `odd` has said more about."""
    reasons = {"unknown_event"} if dialect.odd_tag else set()
    if {"token_pairs", "token_text", "odd_tokens"} & set(dialect.traits):
        reasons.add("token_ids")
    return reasons


def _engine_of(dialect: Dialect) -> str:
    """Where only one engine does it so."""
    algorithm = _algorithm(dialect)
    if algorithm.startswith("SGLang") or "signed_hashes" in dialect.traits:
        return "sglang"
    vllm = {"locality", "ownership", "lookahead", "spec_kind", "bytes_16", "bytes_32"}
    return "vllm" if algorithm.startswith("vLLM") or vllm & set(dialect.traits) or dialect.longest > 7 else ""


def hash_form(dialect: Dialect) -> str:
    """Ints or bytes; empty before any."""
    forms = [words for trait, words in _FORMS.items() if trait in dialect.traits]
    if "signed_hashes" in dialect.traits:  # of signed ones half are not negative
        forms.remove("signed ints")
        forms = ["signed ints" if each == "unsigned ints" else each for each in forms] or ["signed ints"]
    return " and ".join(forms)


def mixes_forms(dialect: Dialect) -> bool:
    """One stream, several forms: a removal may not name what was stored."""
    return " and " in hash_form(dialect)


def hash_version(dialect: Dialect) -> str:
    """The form of the hashes, and by which algorithm and seed they were made, as far as a block tells."""
    algorithm = _algorithm(dialect)
    if dialect.root is None:
        algorithm = "algorithm not known, no first block of plain text came yet"
    return f"{hash_form(dialect)}, {algorithm or 'algorithm or seed not known (a random seed, xxhash)'}"


def disagree(dialects: Sequence[Dialect]) -> bool:
    """Two pods would name one block differently: seen of one block, or known of their algorithms."""
    by_tokens: dict[tuple[int, ...], set[int | bytes]] = {}
    for each in dialects:
        if each.root is not None:
            by_tokens.setdefault(tuple(each.root[1]), set()).add(each.root[0])
    algorithms = {algorithm for each in dialects if (algorithm := _algorithm(each))}
    forms = {hash_form(each) for each in dialects}
    return len(algorithms) > 1 or len(forms) > 1 or any(len(hashes) > 1 for hashes in by_tokens.values())


def by_kind(dialects: Sequence[Dialect], kind: Callable[[Dialect], str]) -> str:
    """Each kind there is, with the first pods that have it."""
    pods: dict[str, list[str]] = {}
    for each in dialects:
        named = pods.setdefault(kind(each) or "not told", [])
        if each.pod not in named:
            named.append(each.pod)
    if len(pods) == 1:
        return next(iter(pods))
    return "; ".join(
        f"{', '.join(named[:3])}{f' and {len(named) - 3} more' if len(named) > 3 else ''}: {words}"
        for words, named in pods.items()
    )


def _algorithm(dialect: Dialect) -> str:
    return "" if dialect.root is None else recognised(*dialect.root)
