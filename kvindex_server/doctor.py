"""The doctor: judges every known reason for which a cache hit is missed without an error; facts in, findings out."""

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kvindex_server import dialects
from kvindex_server.pods import PodSpec
from kvindex_server.stream import LAG_BOUNDS, Cause, Dialect, StreamState, StreamStatus, Trust

NO_SALT = "no salt"
"""Among `Probe.other_contexts`: the same prompt without its salt."""
NOR_SALT = " and no salt"
"""At the end of one of them: another adapter, and without the salt."""
MAX_FINDINGS = 64
"""Of one check, the worst ones, beside PASS; a last finding counts the rest."""
CONVENTIONAL_SEED = 1337
LATE_SECONDS = 1.0
SKEW_SECONDS = 5.0
DESCRIPTORS_OF_STREAM = 12
DESCRIPTORS_WARN = 0.85
NOT_REACHED = "event socket not reached"
"""In the reason of a stream whose engine has answered a replay, but whose events cannot be heard."""
DEAF = "The replay port answers and the events' port does not: correct the port, or the network policy."
GONE = "Does the pod live? If it is gone for good, UnregisterPod, or see why discovery keeps it."


class Status(enum.IntEnum):
    """The values are those of the proto."""

    PASS = 1
    WARN = 2
    FAIL = 3
    SKIP = 4


@dataclass(frozen=True, slots=True)
class Finding:
    """One judgement; without pod or rank it is about the model as a whole."""

    status: Status
    evidence: str
    remedy: str = ""
    pod: str = ""
    rank: int | None = None
    name: str = ""
    model: str = ""


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt looked up as the router would; `blocks` are per pod, of the match."""

    kind: str
    error: str = ""
    tokens: Sequence[int] = ()
    engine_tokens: Sequence[int] = ()
    total_blocks: int = 0
    blocks: Mapping[str, int] = field(default_factory=dict)
    lora_name: str = ""
    salted: bool = False
    other_contexts: Mapping[str, int] = field(default_factory=dict)
    """Best match of any pod for the same tokens under another adapter, without the salt, or both."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one model."""

    model: str
    block_size: int
    seed: int
    coverage: float
    streams: Sequence[StreamStatus]
    specs: Mapping[str, PodSpec]
    dialects: Sequence[Dialect] = ()
    loras: Sequence[str] = ()
    aliases: Sequence[str] = ()
    tokenizer: tuple[str, str, bool] | None = None  # mode, reason, has a chat template
    candidates: Sequence[str] = ()
    pods_of_others: Mapping[str, str] = field(default_factory=dict)  # pod -> another model it is registered for
    reached: Mapping[str, str] = field(default_factory=dict)  # endpoint -> "" or why not; of streams not heard
    probe: Probe | None = None
    descriptors: tuple[int, int] = (0, 0)  # in use (-1: none is left), and how many there may be
    unclaimed: Mapping[str, Sequence[str]] = field(default_factory=dict)  # endpoint -> topics of engines of no pod


def examine(facts: Facts) -> list[Finding]:
    """Findings of every check, in the order of CHECKS, at least one each."""
    found: list[Finding] = []
    for name, check in CHECKS.items():
        judged = list(check(facts))
        problems = sorted((each for each in judged if each.status is not Status.PASS), key=_gravity, reverse=True)
        more = len(problems) - MAX_FINDINGS
        if more > 0:
            problems[MAX_FINDINGS:] = [Finding(problems[MAX_FINDINGS].status, f"{more} more")]
        for each in problems or judged[:1]:
            found.append(_named(each, name, facts.model))
    return found


def unknown_model(name: str, known: Sequence[str]) -> Finding:
    """The one finding for a model that is neither configured nor seen."""
    shown = ", ".join(sorted(known)[:16])
    if not name:
        evidence = "no model is configured or seen"
    else:
        evidence = f"model {name!r} is neither configured nor seen; known are: {shown or 'none'}"
    return Finding(
        Status.FAIL,
        evidence,
        "Register a pod for it, or ask by the name that the engines serve; models[].aliases gives a model more names.",
        name="model",
        model=name,
    )


def worst(findings: Iterable[Finding]) -> Status:
    """The worst status, SKIP aside; PASS when there is none."""
    return max((each.status for each in findings if each.status is not Status.SKIP), default=Status.PASS)


def _gravity(finding: Finding) -> int:
    return 0 if finding.status is Status.SKIP else finding.status


def _named(finding: Finding, name: str, model: str) -> Finding:
    return Finding(finding.status, finding.evidence, finding.remedy, finding.pod, finding.rank, name, model)


def _of(stream: StreamStatus, status: Status, evidence: str, remedy: str = "") -> Finding:
    return Finding(status, evidence, remedy, stream.pod, stream.rank)


def _pass(evidence: str) -> Finding:
    return Finding(Status.PASS, evidence)


def _model(facts: Facts) -> Iterator[Finding]:
    if facts.specs:
        yield _pass(f"{len(facts.specs)} pods with {len(facts.streams)} streams")
        return
    yield Finding(
        Status.FAIL,
        "no pod is registered for the model, so every prompt scores zero",
        "List pods in the configuration, call RegisterPod, or turn discovery on.",
    )


def _candidates(facts: Facts) -> Iterator[Finding]:
    if not facts.candidates:
        yield Finding(Status.SKIP, "no candidates were given", "Give the pod names that the router uses: --pod NAME.")
        return
    by_host = {host: pod for pod, spec in facts.specs.items() for host in (pod, _endpoint_host(spec), _host(pod))}
    for candidate in facts.candidates:
        if candidate not in facts.specs:
            yield _stranger(facts, candidate, by_host.get(_host(candidate), ""))
    for pod in facts.specs:
        if pod not in facts.candidates:
            yield Finding(
                Status.WARN,
                "it is followed, but the router does not have it as a candidate",
                "Compare the names: a pod must be registered under the string that the router uses, often ip:port.",
                pod,
            )
    yield _pass(f"all {len(facts.candidates)} candidates are registered")


def _stranger(facts: Facts, candidate: str, alike: str) -> Finding:
    if candidate in facts.pods_of_others:
        return Finding(
            Status.FAIL,
            f"this candidate is registered for model {facts.pods_of_others[candidate]!r} only",
            "Register it for this model, or ask with that model's name or an alias.",
            candidate,
        )
    evidence = "nobody publishes for this candidate: no such pod is registered"
    if alike:
        evidence += f"; {alike!r} has the same host"
    return Finding(
        Status.FAIL,
        evidence,
        "Register the pod under exactly the name that the router uses.",
        candidate,
    )


def _host(name: str) -> str:
    return name.rpartition(":")[0] or name


def _endpoint_host(spec: PodSpec) -> str:
    return _host(spec.endpoint.removeprefix("tcp://"))


def _events(facts: Facts) -> Iterator[Finding]:
    for stream in facts.streams:
        if stream.messages or stream.last_sequence is not None:
            continue
        refused = facts.reached.get(stream.endpoint)
        if refused:
            yield _of(
                stream,
                Status.FAIL,
                f"nothing heard, and {stream.endpoint} does not accept a connection: {refused}",
                "Start the engine with KV events enabled (vLLM: --kv-events-config with enable_kv_cache_events and "
                "publisher zmq) on that port, bound to *; check port, rank and network policies.",
            )
        elif refused is None:
            yield _of(
                stream,
                Status.WARN,
                "nothing heard; whether somebody is at the other end is not known",
                "Send the pod a request longer than a block; when still nothing comes, check that the engine dials "
                "this endpoint and publishes KV events.",
            )
        else:
            yield _of(
                stream,
                Status.WARN,
                f"nothing heard, though {stream.endpoint} accepts connections: an idle engine is silent",
                "Send the pod a request longer than a block. When still nothing comes: is prefix caching on, are "
                "enable_kv_cache_events and publisher zmq set, is this the events' port?",
            )
    yield _pass(f"all {len(facts.streams)} streams have been heard")


def _topic(facts: Facts) -> Iterator[Finding]:
    for endpoint, topics in facts.unclaimed.items():
        for topic in topics:
            kind, _, rest = topic.partition("@")
            pod, at, model = rest.partition("@")
            if kind == "kv" and at and model not in (facts.model, *facts.aliases, *facts.loras):
                continue  # another model's
            yield Finding(
                Status.FAIL,
                f"an engine has dialled in at {endpoint} with the topic {topic!r}, and no pod is registered for it",
                "Register its pod with bind, this endpoint and this topic, or turn discovery.dial_in on; its events "
                "wait in the engine until then.",
                pod,
            )
    silent = {each.pod for each in facts.streams if not each.messages and each.last_sequence is None}
    filtered = [spec for spec in facts.specs.values() if spec.topic]
    for spec in filtered:
        if spec.pod in silent:
            yield Finding(
                Status.WARN,
                f"nothing heard with the topic prefix {spec.topic!r}",
                "Compare it with the topic that the engine is started with: it tells which engine is whose."
                if spec.bind
                else "Register the pod with an empty topic: the registration names it, the topic is only a filter.",
                spec.pod,
            )
    named = 0
    for stream in facts.streams:
        kind, _, rest = stream.topic.partition("@")
        pod, at, model = rest.partition("@")
        if kind == "kv" and at:
            named += 1
            yield from _misnamed(facts, stream, pod, model)
    if filtered:
        yield _pass(f"{len(filtered)} pods filter by topic, and all of them have been heard")
    elif named:
        yield _pass(f"{named} streams name pod and model in their topic, as they are registered")
    else:
        yield _pass("no pod filters by topic; pod and model come from the registration")


def _misnamed(facts: Facts, stream: StreamStatus, pod: str, model: str) -> Iterator[Finding]:
    """Of a topic `kv@POD@MODEL`: the registration counts, but the engine may know better."""
    if pod != stream.pod and pod in facts.specs:
        yield _of(
            stream,
            Status.FAIL,
            f"the engine calls itself {pod!r} in its topic, which is the name of another registered pod",
            "Correct the endpoint or the port: these are that pod's events, and they are credited to this one.",
        )
    elif _host(pod) != _host(stream.pod):
        yield _of(
            stream,
            Status.WARN,
            f"the engine calls itself {pod!r} in its topic",
            "If that is another pod, correct the endpoint. If it is this one, nothing needs to be done: the "
            "registration's name counts, which must be the router's.",
        )
    if model not in (facts.model, *facts.aliases, *facts.loras):
        yield _of(
            stream,
            Status.WARN,
            f"the engine serves {model!r} by its topic",
            "If that is another model, register the pod for it. If it is this one, add the name to models[].aliases.",
        )


def _block_size(facts: Facts) -> Iterator[Finding]:
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
            yield _of(
                stream,
                Status.FAIL,
                f"{count} events had a block size that does not fit the model's {facts.block_size}",
                "Run every pod of a model with one block size, or with multiples of it; correct models[].block_size.",
            )
    yield _pass(f"{facts.block_size} tokens, and no stream disagrees")


def _seed(facts: Facts) -> Iterator[Finding]:
    if facts.seed == CONVENTIONAL_SEED:
        yield _pass(f"seed {facts.seed}, keys by XXH3-64")
        return
    yield Finding(
        Status.WARN,
        f"the seed is {facts.seed}, not the conventional {CONVENTIONAL_SEED}",
        "Clients that send keys must use the same seed; those that send tokens or text need nothing.",
    )


def _event_encoding(facts: Facts) -> Iterator[Finding]:
    for dialect in facts.dialects:
        spec = facts.specs.get(dialect.pod)
        for fails, evidence, remedy in dialects.odd(dialect, spec.engine if spec is not None else ""):
            yield Finding(Status.FAIL if fails else Status.WARN, evidence, remedy, dialect.pod, dialect.rank)
    heard = [each for each in facts.dialects if each.looked]
    if not heard:
        yield Finding(Status.SKIP, "no event has been seen yet")
    yield _pass(f"{dialects.by_kind(heard, dialects.encoding)}; seen in {sum(each.looked for each in heard)} messages")


def _hash_version(facts: Facts) -> Iterator[Finding]:
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
    yield _pass(f"{kinds}; block keys here are computed from tokens and depend on none of it")


def _engine_hashes(facts: Facts) -> Iterator[Finding]:
    waiting = [each for each in facts.streams if each.unresolved or each.orphans]
    for stream in waiting:
        yield _of(
            stream,
            Status.WARN,
            f"{stream.orphans} blocks wait for a parent, {stream.unresolved} claims for their tokens; none scores",
            "After joining late this is the unknown past. Give the pod a replay endpoint, or ClearPod once it has one.",
        )
    unknown = [each for each in facts.streams if each.dropped.get("unknown_removal")]
    for stream in unknown:
        if stream.trust is Trust.EXACT:
            yield _of(
                stream,
                Status.WARN,
                f"{stream.dropped['unknown_removal']} removals named a hash that was never stored, on an EXACT stream",
                "The engine's own hashes do not agree with themselves: report the engine's version, then ClearPod.",
            )
    yield _pass("every stored hash has its tokens and its parent; the hashes themselves are opaque and never computed")


def _replay(facts: Facts) -> Iterator[Finding]:
    for stream in facts.streams:
        if not stream.replay_endpoint:
            yield _of(
                stream,
                Status.WARN,
                "no replay endpoint: what was published before the server came, or was lost, stays unknown",
                "Start the engine with a replay_endpoint and register it.",
            )
        elif refused := facts.reached.get(stream.replay_endpoint):
            yield _of(
                stream,
                Status.FAIL,
                f"{stream.replay_endpoint} does not accept a connection: {refused}",
                "Check the port (rank r is at port + r) and network policies.",
            )
        elif unanswered(stream):
            yield _of(
                stream,
                Status.FAIL,
                f"{stream.replays} replays were asked for at {stream.replay_endpoint}, and the last was not answered; "
                f"{stream.trust.name}: {stream.trust_reason}",
                "Check that it is the replay port and not the events' port; a busy engine may be slow. Until it "
                "answers, what is missed stays missing.",
            )
    yield _pass(f"no replay of {len(facts.streams)} streams is known to fail")


def unanswered(stream: StreamStatus) -> bool:
    """A replay that was asked for got no answer; also when nothing is missing, for the next loss cannot be mended."""
    return stream.replay_unanswered or "replay was not answered" in stream.trust_reason


def _ranks(facts: Facts) -> Iterator[Finding]:
    heard: dict[str, list[bool]] = {}
    for stream in facts.streams:
        heard.setdefault(stream.pod, []).append(bool(stream.messages or stream.last_sequence is not None))
    for stream in facts.streams:
        others = heard[stream.pod]
        if any(others) and not stream.messages and stream.last_sequence is None:
            yield _of(
                stream,
                Status.WARN,
                f"rank {stream.rank} never spoke at {stream.endpoint}, {sum(others)} of {len(others)} ranks did",
                "Set ranks to the engine's data-parallel size; rank r publishes at port + r.",
            )
        if count := stream.dropped.get("rank_mismatch", 0):
            yield _of(
                stream,
                Status.FAIL,
                f"{count} batches said they are of another rank",
                "Two ranks' ports are mixed up: register the endpoint of rank 0, and no other.",
            )
    yield _pass(f"all ranks of {len(heard)} pods speak for themselves")


def _tokenizer(facts: Facts) -> Iterator[Finding]:
    if facts.tokenizer is None:
        needed = facts.probe is not None and facts.probe.kind in ("prompt", "chat")
        yield Finding(
            Status.FAIL if needed else Status.WARN,
            "the model has no tokenizer: prompts and chats are refused, tokens and keys are answered",
            "Start the server with --tokenizer MODEL=DIR, or set text.tokenizer_dirs or the model's tokenize_url.",
        )
        return
    mode, reason, _ = facts.tokenizer
    if mode == "native":
        yield _pass("native, and its self-test against the reference has passed")
    elif mode == "remote":
        yield _pass(f"remote: {reason}")
    elif "self-test" in reason or "differ" in reason:
        yield Finding(Status.WARN, f"reference: {reason}", "Answers are right but slower; report the tokenizer.")
    else:
        yield _pass(f"reference: {reason}")


def _tokens_agree(facts: Facts) -> Iterator[Finding]:
    probe = facts.probe
    if probe is None or not probe.engine_tokens:
        yield Finding(
            Status.SKIP,
            "no tokens of the engine were given to compare with",
            "Give a probe text, and --engine URL or what its POST /tokenize makes of the probe: --engine-tokens FILE.",
        )
        return
    if probe.error:
        yield Finding(Status.FAIL, f"the probe cannot be tokenized: {probe.error}", "Mend what the message names.")
        return
    ours, theirs = probe.tokens, probe.engine_tokens
    if list(ours) == list(theirs):
        yield _pass(f"all {len(ours)} tokens of the probe are equal")
        return
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    remedy = "Give the server the engine's own tokenizer directory"
    remedy += " and chat template." if probe.kind == "chat" else "; a first difference at 0 is often the BOS token."
    yield Finding(
        Status.FAIL,
        f"the server makes {len(ours)} tokens of the probe, the engine {len(theirs)}; they differ from {at} on",
        remedy,
    )


def _template(facts: Facts) -> Iterator[Finding]:
    if facts.tokenizer is None:
        yield Finding(Status.SKIP, "no tokenizer, so no chat template")
    elif facts.tokenizer[2]:
        yield _template_compared(facts.probe)
    else:
        needed = facts.probe is not None and facts.probe.kind == "chat"
        yield Finding(
            Status.FAIL if needed else Status.WARN,
            "the tokenizer has no chat template: chats are refused",
            "Put the engine's chat_template.jinja into the tokenizer directory, or send prompts or tokens.",
        )


def _template_compared(probe: Probe | None) -> Finding:
    """A template is there: a chat that the engine has tokenized, too, tells whether it is the engine's."""
    if probe is None or probe.kind != "chat" or not probe.engine_tokens or probe.error:
        return Finding(
            Status.SKIP,
            "present; whether it equals the engine's only a chat and the engine's tokens of it can tell",
            "Give both: --chat FILE, and --engine URL or what its POST /tokenize makes of it: --engine-tokens FILE.",
        )
    if list(probe.tokens) == list(probe.engine_tokens):
        return _pass("the chat becomes the engine's tokens, its template included")
    return Finding(
        Status.FAIL,
        "the chat does not become the engine's tokens, so its template differs, or the tokenizer",
        "Compare a plain prompt the same way: if that agrees, give the server the engine's chat_template.jinja, and "
        "the engine's /tokenize the request's tools, chat_template_kwargs and add_generation_prompt.",
    )


def _lora(facts: Facts) -> Iterator[Finding]:
    probe = facts.probe
    if probe is None:
        known = ", ".join(facts.loras[:16]) or "none"
        yield Finding(
            Status.SKIP, f"no probe; adapters known by name: {known}", "Give a probe: --prompt, --chat, --tokens."
        )
        return
    best = max(probe.blocks.values(), default=0)
    others = probe.other_contexts
    for name, blocks in others.items():
        least, adapter = best, name.removesuffix(NOR_SALT)
        if adapter != name:  # told only where it holds more than either difference by itself
            least = max(best, others.get(adapter, 0), others.get(NO_SALT, 0))
        if name != NO_SALT and blocks > least:
            yield Finding(
                Status.FAIL,
                f"{blocks} blocks of the probe are held with {name}, {best} as it was asked",
                "Ask with the adapter that serves the request, its own name in lora_name or as the model"
                + (", and with the engine's cache_salt." if adapter != name else "."),
            )
    yield _pass(f"no adapter known by name holds more of the probe than the {best} blocks found")


def _salt(facts: Facts) -> Iterator[Finding]:
    probe = facts.probe
    if probe is None or not probe.salted:
        yield _unsalted(facts)
        return
    best, bare = max(probe.blocks.values(), default=0), probe.other_contexts.get(NO_SALT, 0)
    if bare > best:
        yield Finding(
            Status.FAIL,
            f"{bare} blocks of the probe are held without the salt, {best} with it",
            "Send the same cache_salt to the index as to the engine.",
        )
    elif not best:
        yield Finding(Status.SKIP, "no block of the probe is held, with the salt or without it: it cannot be told")
    yield _pass(f"the salt is not in the way: {best} blocks with it, {bare} without")


def _unsalted(facts: Facts) -> Finding:
    """Salts that engines used are not kept; that they used some is, and a prompt that nobody holds may lack one."""
    beginnings, salted = (sum(each.beginnings[at] for each in facts.dialects) for at in (0, 1))
    evidence = f"no salt was asked with; {salted} of {beginnings} prompts that engines began to store had one"
    missed = facts.probe is not None and facts.probe.total_blocks and not max(facts.probe.blocks.values(), default=0)
    if salted and missed:
        remedy = "Send the request's cache_salt to the index as it is sent to the engine, and give it to the probe."
        return Finding(Status.WARN, f"nothing of the probe is held, and {evidence}", remedy)
    return Finding(Status.SKIP, evidence)


def _probe(facts: Facts) -> Iterator[Finding]:
    probe = facts.probe
    if probe is None:
        yield Finding(Status.SKIP, "no probe was given", "Give a prompt that a pod has just served.")
    elif probe.error:
        yield Finding(Status.FAIL, f"the probe cannot be looked up: {probe.error}", "Mend what the message names.")
    elif not probe.total_blocks:
        yield Finding(Status.FAIL, f"the probe's {len(probe.tokens)} tokens fill no block", "Give a longer prompt.")
    elif best := max(probe.blocks.values(), default=0):
        pod = next(pod for pod, blocks in probe.blocks.items() if blocks == best)
        yield _pass(f"{best} of {probe.total_blocks} blocks are held by {pod}")
    else:
        yield Finding(
            Status.WARN,
            f"no pod holds the first of the probe's {probe.total_blocks} blocks",
            "When a pod has served it: compare tokens (tokens_agree), adapter and salt; `kvindex explain` shows more.",
        )


def _clocks(facts: Facts) -> Iterator[Finding]:
    timed = 0
    for stream in facts.streams:
        count = stream.lag_buckets[-1]
        if not count:
            continue
        timed += 1
        within = next((i for i, n in enumerate(stream.lag_buckets) if n), len(LAG_BOUNDS))
        least = LAG_BOUNDS[within - 1] if within else 0.0
        if stream.lag_sum == 0.0:
            yield _of(
                stream,
                Status.WARN,
                f"none of {count} batches was ever late at all: the engine's clock is ahead of the server's",
                "Synchronise the clocks (NTP). Scores do not depend on them, lag metrics do.",
            )
        elif least >= SKEW_SECONDS:
            yield _of(
                stream,
                Status.WARN,
                f"each of {count} batches was over {least:g} s late: its clock is behind, or all was replayed",
                "Synchronise the clocks (NTP). Scores do not depend on them, lag metrics do.",
            )
    if not timed:
        yield Finding(Status.SKIP, "no batch had a time yet")
    yield _pass(f"nothing odd in the times of {timed} streams")


def _lag(facts: Facts) -> Iterator[Finding]:
    for stream in facts.streams:
        if stream.state is StreamState.LIVE and stream.lag_seconds > LATE_SECONDS:
            yield _of(
                stream,
                Status.WARN,
                f"the last batch was applied {stream.lag_seconds:.1f} s after the engine made it",
                "Look at the server's CPU and the network; replayed batches and skewed clocks look the same.",
            )
    latest = max((each.lag_seconds for each in facts.streams), default=0.0)
    yield _pass(f"at most {latest * 1000:.0f} ms, of the last batches")


def _decode_errors(facts: Facts) -> Iterator[Finding]:
    told = {(each.pod, each.rank): dialects.explained(each) for each in facts.dialects}
    for stream in facts.streams:
        own_check = told.get((stream.pod, stream.rank), ())
        errors = {reason: count for reason, count in stream.decode_errors.items() if reason not in own_check}
        if errors:
            yield _of(
                stream,
                Status.FAIL,
                "not understood: " + _counts(errors),
                "Is this an events port of a supported engine release? Keep a sample: kvindex capture.",
            )
    yield _pass("every message and event was understood, but for what event_encoding tells")


def _dropped(facts: Facts) -> Iterator[Finding]:
    own_check = ("block_size_mismatch", "rank_mismatch", "unknown_removal")
    for stream in facts.streams:
        dropped = {reason: count for reason, count in stream.dropped.items() if reason not in own_check}
        if dropped:
            yield _of(
                stream,
                Status.WARN,
                "dropped or left open: " + _counts(dropped),
                "A limit is reached (see limits.*), or the engine's events are of a kind that is not taken in.",
            )
    yield _pass("nothing was dropped")


def _trust(facts: Facts) -> Iterator[Finding]:
    for stream in facts.streams:
        evidence = f"{stream.trust.name} ({stream.trust_cause}): {stream.trust_reason}"
        if stream.trust is Trust.STALE:
            remedy = "Claims may be wrong. If it stays so, call ClearPod."
            if stream.trust_cause is Cause.CONNECTION_LOST:
                evidence += _at_the_end(facts, stream)
                remedy = DEAF if NOT_REACHED in stream.trust_reason else GONE
            yield _of(stream, Status.FAIL, evidence, remedy)
        elif stream.trust is Trust.PARTIAL:
            yield _of(stream, Status.WARN, evidence, "Hits may be missed. A replay buffer that reaches back cures it.")
        elif stream.trust is Trust.COLD:
            remedy = "" if stream.trust_cause is Cause.NOTHING_HEARD else "It fills with the engine's next requests."
            yield _of(stream, Status.WARN, evidence, remedy)
    yield _pass(f"all {len(facts.streams)} streams are EXACT")


def _state(facts: Facts) -> Iterator[Finding]:
    for stream in facts.streams:
        so_far = f"{stream.gaps} holes, {stream.restarts} restarts so far"
        if stream.state is StreamState.DOWN:
            yield _of(stream, Status.FAIL, f"DOWN{_at_the_end(facts, stream)}, {so_far}", GONE)
        elif stream.state is StreamState.GAP:
            remedy = "Messages were lost and could not be replayed. The server asks again by itself; see replay."
            yield _of(stream, Status.FAIL, f"GAP, {so_far}", remedy)
        elif stream.state is StreamState.SYNCING:
            yield _of(stream, Status.WARN, "a replay is under way", "Wait for its end.")
    yield _pass("no stream has an open hole or a lost connection")


def _at_the_end(facts: Facts, stream: StreamStatus) -> str:
    """Whether somebody is at the stream's endpoint now."""
    refused = facts.reached.get(stream.endpoint)
    if refused is None:
        return ""
    if refused:
        return f": {stream.endpoint} does not accept a connection ({refused})"
    return f", though {stream.endpoint} accepts connections"


def _coverage(facts: Facts) -> Iterator[Finding]:
    if facts.coverage < 1:
        yield Finding(
            Status.WARN,
            f"{facts.coverage:.0%} of the streams are synchronised",
            "See events_heard, replay and trust for those that are not.",
        )
    yield _pass("every stream is synchronised, or there is none")


def _descriptors(facts: Facts) -> Iterator[Finding]:
    used, limit = facts.descriptors
    needed = used if used < 0 else used + DESCRIPTORS_OF_STREAM
    if used < 0 or needed > limit:
        yield Finding(
            Status.FAIL,
            f"{limit if used < 0 else used} of {limit} file descriptors are in use: too few are left for a new stream",
            "Raise the process's hard limit (LimitNOFILE, ulimits), or lower limits.max_connections.",
        )
    elif used > limit * DESCRIPTORS_WARN:
        yield Finding(
            Status.WARN,
            f"{used} of {limit} file descriptors are in use",
            "Who holds so many connections? Raise the process's hard limit (LimitNOFILE, ulimits).",
        )
    yield _pass(f"{used} of {limit} file descriptors are in use")


def _counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))


CHECKS: Mapping[str, Callable[[Facts], Iterator[Finding]]] = {
    "model": _model,
    "candidates": _candidates,
    "events_heard": _events,
    "topic": _topic,
    "block_size": _block_size,
    "hash_seed": _seed,
    "event_encoding": _event_encoding,
    "hash_version": _hash_version,
    "engine_hashes": _engine_hashes,
    "replay": _replay,
    "rank_ports": _ranks,
    "tokenizer": _tokenizer,
    "tokens_agree": _tokens_agree,
    "chat_template": _template,
    "lora": _lora,
    "salt": _salt,
    "probe": _probe,
    "clock_skew": _clocks,
    "lag": _lag,
    "decode_errors": _decode_errors,
    "dropped": _dropped,
    "trust": _trust,
    "stream_state": _state,
    "coverage": _coverage,
    "descriptors": _descriptors,
}
"""By name, in the order of the answer. The PASS that a check yields counts only when it found nothing else."""
