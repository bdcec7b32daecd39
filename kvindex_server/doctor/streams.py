"""Checks of how well streams are followed."""

from collections.abc import Iterator

from kvindex_server.doctor.facts import Facts, Finding, Status, of_stream, passed
from kvindex_server.stream import LAG_BOUNDS, Cause, StreamState, StreamStatus, Trust

LATE_SECONDS = 1.0
SKEW_SECONDS = 5.0
NOT_REACHED = "event socket not reached"
"""In the reason of a stream whose engine has answered a replay, but whose events cannot be heard."""
DEAF = "The replay port answers and the events' port does not: correct the port, or the network policy."
GONE = "Does the pod live? If it is gone for good, UnregisterPod, or see why discovery keeps it."


def replay(facts: Facts) -> Iterator[Finding]:
    """Replays can be asked for, and are answered."""
    for stream in facts.streams:
        if not stream.replay_endpoint:
            yield of_stream(
                stream,
                Status.WARN,
                "no replay endpoint: what was published before the server came, or was lost, stays unknown",
                "Start the engine with a replay_endpoint and register it.",
            )
        elif refused := facts.reached.get(stream.replay_endpoint):
            yield of_stream(
                stream,
                Status.FAIL,
                f"{stream.replay_endpoint} does not accept a connection: {refused}",
                "Check the port (rank r is at port + r) and network policies.",
            )
        elif unanswered(stream):
            yield of_stream(
                stream,
                Status.FAIL,
                f"{stream.replays} replays were asked for at {stream.replay_endpoint}, and the last was not answered; "
                f"{stream.trust.name}: {stream.trust_reason}",
                "Check that it is the replay port and not the events' port; a busy engine may be slow. Until it "
                "answers, what is missed stays missing.",
            )
    yield passed(f"no replay of {len(facts.streams)} streams is known to fail")


def unanswered(stream: StreamStatus) -> bool:
    """A replay that was asked for got no answer; also when nothing is missing, for the next loss cannot be mended."""
    return stream.replay_unanswered or "replay was not answered" in stream.trust_reason


def rank_ports(facts: Facts) -> Iterator[Finding]:
    """Each rank speaks for itself."""
    heard: dict[str, list[bool]] = {}
    for stream in facts.streams:
        heard.setdefault(stream.pod, []).append(bool(stream.messages or stream.last_sequence is not None))
    for stream in facts.streams:
        others = heard[stream.pod]
        if any(others) and not stream.messages and stream.last_sequence is None:
            yield of_stream(
                stream,
                Status.WARN,
                f"rank {stream.rank} never spoke at {stream.endpoint}, {sum(others)} of {len(others)} ranks did",
                "Set ranks to the engine's data-parallel size; rank r publishes at port + r.",
            )
        if count := stream.dropped.get("rank_mismatch", 0):
            yield of_stream(
                stream,
                Status.FAIL,
                f"{count} batches said they are of another rank",
                "Two ranks' ports are mixed up: register the endpoint of rank 0, and no other.",
            )
    yield passed(f"all ranks of {len(heard)} pods speak for themselves")


def clock_skew(facts: Facts) -> Iterator[Finding]:
    """The engines' clocks agree with this one."""
    timed = 0
    for stream in facts.streams:
        count = stream.lag_buckets[-1]
        if not count:
            continue
        timed += 1
        within = next((i for i, n in enumerate(stream.lag_buckets) if n), len(LAG_BOUNDS))
        least = LAG_BOUNDS[within - 1] if within else 0.0
        if stream.lag_sum == 0.0:
            yield of_stream(
                stream,
                Status.WARN,
                f"none of {count} batches was ever late at all: the engine's clock is ahead of the server's",
                "Synchronise the clocks (NTP). Scores do not depend on them, lag metrics do.",
            )
        elif least >= SKEW_SECONDS:
            yield of_stream(
                stream,
                Status.WARN,
                f"each of {count} batches was over {least:g} s late: its clock is behind, or all was replayed",
                "Synchronise the clocks (NTP). Scores do not depend on them, lag metrics do.",
            )
    if not timed:
        yield Finding(Status.SKIP, "no batch had a time yet")
    yield passed(f"nothing odd in the times of {timed} streams")


def lag(facts: Facts) -> Iterator[Finding]:
    """Events come soon after they were made."""
    for stream in facts.streams:
        if stream.state is StreamState.LIVE and stream.lag_seconds > LATE_SECONDS:
            yield of_stream(
                stream,
                Status.WARN,
                f"the last batch was applied {stream.lag_seconds:.1f} s after the engine made it",
                "Look at the server's CPU and the network; replayed batches and skewed clocks look the same.",
            )
    latest = max((each.lag_seconds for each in facts.streams), default=0.0)
    yield passed(f"at most {latest * 1000:.0f} ms, of the last batches")


def trust(facts: Facts) -> Iterator[Finding]:
    """Streams are EXACT, or why not."""
    for stream in facts.streams:
        evidence = f"{stream.trust.name} ({stream.trust_cause}): {stream.trust_reason}"
        if stream.trust is Trust.STALE:
            remedy = "Claims may be wrong. If it stays so, call ClearPod."
            if stream.trust_cause is Cause.CONNECTION_LOST:
                evidence += _at_the_end(facts, stream)
                remedy = DEAF if NOT_REACHED in stream.trust_reason else GONE
            yield of_stream(stream, Status.FAIL, evidence, remedy)
        elif stream.trust is Trust.PARTIAL:
            yield of_stream(
                stream, Status.WARN, evidence, "Hits may be missed. A replay buffer that reaches back cures it."
            )
        elif stream.trust is Trust.COLD:
            remedy = "" if stream.trust_cause is Cause.NOTHING_HEARD else "It fills with the engine's next requests."
            yield of_stream(stream, Status.WARN, evidence, remedy)
    yield passed(f"all {len(facts.streams)} streams are EXACT")


def stream_state(facts: Facts) -> Iterator[Finding]:
    """Streams have no open hole and no lost connection."""
    for stream in facts.streams:
        so_far = f"{stream.gaps} holes, {stream.restarts} restarts so far"
        if stream.state is StreamState.DOWN:
            yield of_stream(stream, Status.FAIL, f"DOWN{_at_the_end(facts, stream)}, {so_far}", GONE)
        elif stream.state is StreamState.GAP:
            remedy = "Messages were lost and could not be replayed. The server asks again by itself; see replay."
            yield of_stream(stream, Status.FAIL, f"GAP, {so_far}", remedy)
        elif stream.state is StreamState.SYNCING:
            yield of_stream(stream, Status.WARN, "a replay is under way", "Wait for its end.")
    yield passed("no stream has an open hole or a lost connection")


def _at_the_end(facts: Facts, stream: StreamStatus) -> str:
    """Whether somebody is at the stream's endpoint now."""
    refused = facts.reached.get(stream.endpoint)
    if refused is None:
        return ""
    if refused:
        return f": {stream.endpoint} does not accept a connection ({refused})"
    return f", though {stream.endpoint} accepts connections"
