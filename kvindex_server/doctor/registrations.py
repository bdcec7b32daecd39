"""Checks of who is registered, and whether somebody is heard from there."""

from collections.abc import Iterator

from kvindex_server.doctor.facts import Facts, Finding, Status, of_stream, passed
from kvindex_server.pods import PodSpec, named
from kvindex_server.stream import StreamStatus

DESCRIPTORS_OF_STREAM = 12
DESCRIPTORS_WARN = 0.85


def model(facts: Facts) -> Iterator[Finding]:
    """Somebody is registered for it."""
    if facts.specs:
        yield passed(f"{len(facts.specs)} pods with {len(facts.streams)} streams")
        return
    yield Finding(
        Status.FAIL,
        "no pod is registered for the model, so every prompt scores zero",
        "List pods in the configuration, call RegisterPod, or turn discovery on.",
    )


def candidates(facts: Facts) -> Iterator[Finding]:
    """The router's candidates are registered, by the same names."""
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
    yield passed(f"all {len(facts.candidates)} candidates are registered")


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


def events_heard(facts: Facts) -> Iterator[Finding]:
    """Every stream has been heard; a silent one is called, where that can be done."""
    for stream in facts.streams:
        if stream.messages or stream.last_sequence is not None:
            continue
        refused = facts.reached.get(stream.endpoint)
        if refused:
            yield of_stream(
                stream,
                Status.FAIL,
                f"nothing heard, and {stream.endpoint} does not accept a connection: {refused}",
                "Start the engine with KV events enabled (vLLM: --kv-events-config with enable_kv_cache_events and "
                "publisher zmq) on that port, bound to *; check port, rank and network policies.",
            )
        elif refused is None:
            yield of_stream(
                stream,
                Status.WARN,
                "nothing heard; whether somebody is at the other end is not known",
                "Send the pod a request longer than a block; when still nothing comes, check that the engine dials "
                "this endpoint and publishes KV events.",
            )
        else:
            yield of_stream(
                stream,
                Status.WARN,
                f"nothing heard, though {stream.endpoint} accepts connections: an idle engine is silent",
                "Send the pod a request longer than a block. When still nothing comes: is prefix caching on, are "
                "enable_kv_cache_events and publisher zmq set, is this the events' port?",
            )
    yield passed(f"all {len(facts.streams)} streams have been heard")


def topic(facts: Facts) -> Iterator[Finding]:
    """What a topic tells of pod and model is what is registered."""
    for endpoint, topics in facts.unclaimed.items():
        for told in topics:
            names = named(told)
            if names and names[1] not in (facts.model, *facts.aliases, *facts.loras):
                continue  # another model's
            yield Finding(
                Status.FAIL,
                f"an engine has dialled in at {endpoint} with the topic {told!r}, and no pod is registered for it",
                "Register its pod with bind, this endpoint and this topic, or turn discovery.dial_in on; its events "
                "wait in the engine until then.",
                names[0] if names else "",
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
    naming = [(stream, names) for stream in facts.streams if (names := named(stream.topic))]
    for stream, names in naming:
        yield from _misnamed(facts, stream, *names)
    if filtered:
        yield passed(f"{len(filtered)} pods filter by topic, and all of them have been heard")
    elif naming:
        yield passed(f"{len(naming)} streams name pod and model in their topic, as they are registered")
    else:
        yield passed("no pod filters by topic; pod and model come from the registration")


def _misnamed(facts: Facts, stream: StreamStatus, pod: str, model: str) -> Iterator[Finding]:
    """Of a topic `kv@POD@MODEL`: the registration counts, but the engine may know better."""
    if pod != stream.pod and pod in facts.specs:
        yield of_stream(
            stream,
            Status.FAIL,
            f"the engine calls itself {pod!r} in its topic, which is the name of another registered pod",
            "Correct the endpoint or the port: these are that pod's events, and they are credited to this one.",
        )
    elif _host(pod) != _host(stream.pod):
        yield of_stream(
            stream,
            Status.WARN,
            f"the engine calls itself {pod!r} in its topic",
            "If that is another pod, correct the endpoint. If it is this one, nothing needs to be done: the "
            "registration's name counts, which must be the router's.",
        )
    if model not in (facts.model, *facts.aliases, *facts.loras):
        yield of_stream(
            stream,
            Status.WARN,
            f"the engine serves {model!r} by its topic",
            "If that is another model, register the pod for it. If it is this one, add the name to models[].aliases.",
        )


def coverage(facts: Facts) -> Iterator[Finding]:
    """Share of streams that are synchronised."""
    if facts.coverage < 1:
        yield Finding(
            Status.WARN,
            f"{facts.coverage:.0%} of the streams are synchronised",
            "See events_heard, replay and trust for those that are not.",
        )
    yield passed("every stream is synchronised, or there is none")


def descriptors(facts: Facts) -> Iterator[Finding]:
    """Enough file descriptors are left for the streams there are."""
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
    yield passed(f"{used} of {limit} file descriptors are in use")
