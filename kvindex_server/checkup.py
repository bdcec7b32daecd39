"""Gathers what the doctor judges: streams, registrations, tokenizers, a probe, and who answers at silent endpoints."""

from dataclasses import dataclass
from itertools import islice

from kvindex_server import descriptors, listening
from kvindex_server.doctor.examination import examine, unknown_model
from kvindex_server.doctor.facts import Facts, Finding, Probe
from kvindex_server.doctor.streams import NOT_REACHED, unanswered
from kvindex_server.errors import DeadlineExceeded, InvalidArgument, KvindexError, NotFound
from kvindex_server.explain import Explainer, tokens_of
from kvindex_server.fleet import Fleet
from kvindex_server.lookup import Check, Kind, Lookup, Query
from kvindex_server.models import Model, Models
from kvindex_server.pods import PodSpec
from kvindex_server.reach import reach
from kvindex_server.stream import StreamState, StreamStatus
from kvindex_server.tokenize.tokenizer import AnyTokenizer

REACH_SECONDS = 1.0
MAX_REACHED = 256
"""Endpoints that a connection is tried to, all at once; of the others it is not known who is there."""


@dataclass(frozen=True, slots=True)
class CheckQuery:
    """A checked CheckRequest; `kind` is None without a probe, tokens are u32 little-endian."""

    model: str = ""
    pods: tuple[str, ...] = ()
    kind: Kind | None = None
    text: str = ""
    tokens: bytes = b""
    engine_tokens: bytes = b""
    lora_name: str = ""
    cache_salt: str = ""


class Checkup:
    """Answers Check; safe from many threads."""

    def __init__(self, fleet: Fleet, models: Models, lookup: Lookup) -> None:
        self._fleet = fleet
        self._models = models
        self._lookup = lookup
        self._explainer = Explainer(lookup, fleet.statuses, fleet.adapters)

    def examine(self, query: CheckQuery, check: Check) -> list[Finding]:
        """Findings of the model asked for, or of every model. An unknown model is a finding, too."""
        if not query.model:
            if query.kind is not None:
                raise InvalidArgument("model", "must not be empty when a probe is given")
            models = self._models.all()
        else:
            try:
                models = [self._models.get(query.model)]
            except NotFound:
                return [unknown_model(query.model, [each.name for each in self._models.all()])]
        if not models:
            return [unknown_model("", [])]
        registrations = [spec for spec, _ in self._fleet.registrations()]
        names = {model.name for model in models}
        streams = [each for each in self._fleet.statuses() if each.model in names]
        reached = _reached(streams, registrations)
        check()
        found = []
        for model in models:
            of_model = [each for each in streams if each.model == model.name]
            found += examine(self._facts(model, of_model, registrations, reached, query, check))
            check()
        return found

    def _facts(
        self,
        model: Model,
        streams: list[StreamStatus],
        registrations: list[PodSpec],
        reached: dict[str, str],
        query: CheckQuery,
        check: Check,
    ) -> Facts:
        specs = {spec.pod: spec for spec in registrations if spec.model == model.name}
        tokenizer = model.tokenizer
        return Facts(
            model=model.name,
            block_size=model.index.block_size,
            seed=model.index.seed,
            coverage=self._fleet.coverage(model.name),
            streams=streams,
            dialects=self._fleet.dialects(model.name),
            specs=specs,
            loras=self._explainer.adapters(model),
            aliases=model.aliases,
            tokenizer=None if tokenizer is None else (tokenizer.mode, _why(tokenizer), tokenizer.has_chat_template),
            candidates=query.pods,
            pods_of_others={spec.pod: spec.model for spec in registrations if spec.model != model.name},
            reached=reached,
            descriptors=(descriptors.in_use(), descriptors.limit()),
            unclaimed=listening.unclaimed(),
            probe=None if query.kind is None else self._probe(query, query.kind, check),
        )

    def _probe(self, query: CheckQuery, kind: Kind, check: Check) -> Probe:
        asked = Query(query.model, kind, query.text, query.tokens, b"", query.pods, query.lora_name, query.cache_salt)
        engine_tokens = tokens_of(query.engine_tokens, len(query.engine_tokens) // 4)
        try:
            prompt = self._lookup.prompt(asked, check)
            scores = self._lookup.standings(prompt.model, prompt.keys, query.pods)
            others = self._explainer.other_contexts(prompt, asked, check)
        except DeadlineExceeded:
            raise
        except KvindexError as error:
            return Probe(kind, error=error.message, engine_tokens=engine_tokens)
        return Probe(
            kind,
            tokens=tokens_of(prompt.tokens, prompt.total_tokens),
            engine_tokens=engine_tokens,
            total_blocks=len(prompt.keys) // 8,
            blocks={each.pod: each.matched_blocks for each in scores if each.matched_blocks},
            lora_name=prompt.lora_name,
            salted=bool(query.cache_salt),
            other_contexts={label: max(blocks.values(), default=0) for label, blocks in others.items()},
        )


def _why(tokenizer: AnyTokenizer) -> str:
    """Why not natively, and what that means for texts seen before; empty when natively."""
    if tokenizer.mode != "reference":
        return tokenizer.reason
    where = {"added_tokens": "cut only before added tokens", "nowhere": "encoded whole"}
    return f"{tokenizer.reason}; texts are {where.get(tokenizer.cuts, 'cut as before')}"


def _reached(streams: list[StreamStatus], registrations: list[PodSpec]) -> dict[str, str]:
    """A connection is tried only where something is missing; an engine that dials in cannot be called."""
    dial_in = {(spec.model, spec.pod) for spec in registrations if spec.bind}
    endpoints = []
    for stream in streams:
        silent = not stream.messages or stream.state is StreamState.DOWN or NOT_REACHED in stream.trust_reason
        if silent and (stream.model, stream.pod) not in dial_in:
            endpoints.append(stream.endpoint)
        if stream.replay_endpoint and (silent or unanswered(stream)):
            endpoints.append(stream.replay_endpoint)
    return reach(islice(endpoints, MAX_REACHED), REACH_SECONDS)
