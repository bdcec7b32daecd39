"""Every known reason for which a cache hit is missed without an error, by name, and their findings."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from kvindex_server.doctor import events, registrations, requests, streams
from kvindex_server.doctor.facts import Facts, Finding, Status

MAX_FINDINGS = 64
"""Of one check, the worst ones, beside PASS; a last finding counts the rest."""
CHECKS: Mapping[str, Callable[[Facts], Iterator[Finding]]] = {
    "model": registrations.model,
    "candidates": registrations.candidates,
    "events_heard": registrations.events_heard,
    "topic": registrations.topic,
    "block_size": events.block_size,
    "hash_seed": events.hash_seed,
    "event_encoding": events.event_encoding,
    "hash_version": events.hash_version,
    "engine_hashes": events.engine_hashes,
    "replay": streams.replay,
    "rank_ports": streams.rank_ports,
    "tokenizer": requests.tokenizer,
    "tokens_agree": requests.tokens_agree,
    "chat_template": requests.chat_template,
    "lora": requests.lora,
    "salt": requests.salt,
    "probe": requests.probe,
    "clock_skew": streams.clock_skew,
    "lag": streams.lag,
    "decode_errors": events.decode_errors,
    "dropped": events.dropped,
    "trust": streams.trust,
    "stream_state": streams.stream_state,
    "coverage": registrations.coverage,
    "descriptors": registrations.descriptors,
}
"""By name, in the order of the answer. The PASS that a check yields counts only when it found nothing else."""


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
