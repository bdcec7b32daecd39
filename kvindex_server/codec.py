"""Decodes and checks what clients send to the read path, and encodes what they get back."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol, TypedDict, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from kvindex_server import _core
from kvindex_server.checkup import CheckQuery
from kvindex_server.doctor.examination import worst
from kvindex_server.doctor.facts import Finding
from kvindex_server.errors import InvalidArgument
from kvindex_server.explain import Explanation, tokens_of
from kvindex_server.lookup import (
    BlocksAnswer,
    BlocksQuery,
    Kind,
    PlacementAnswer,
    PlacementQuery,
    Query,
    ScoreAnswer,
    ScoreQuery,
    UsageQuery,
)
from kvindex_server.pb.indexer.v1 import indexer_pb2
from kvindex_server.pb.kvindex.v1 import kvindex_pb2
from kvindex_server.score import PodScore

M = TypeVar("M", bound=Message)
_WithMedia = (
    kvindex_pb2.ScoreRequest
    | kvindex_pb2.GetPodsForBlocksRequest
    | kvindex_pb2.RecordPlacementRequest
    | kvindex_pb2.ExplainRequest
)
_Request = _WithMedia | kvindex_pb2.CheckRequest

MAX_MM_FEATURES = 1024
"""Each block asks every feature whether it touches it."""
MAX_NAME = 1024
"""Characters of a model, pod or LoRA name, a salt or a hash; they are copied into keys and messages."""
EXPLAINED_TOKENS = 4096
EXPLAINED_KEYS = 1024
"""So many of a prompt's tokens and keys are in the answer to Explain."""

_U32 = 0xFFFFFFFF
_SCORE_INPUTS: dict[int, Kind] = {2: "prompt", 3: "chat", 4: "tokens", 5: "keys"}  # and of a placement
_PROBES: dict[int, Kind] = {3: "prompt", 4: "chat", 5: "tokens"}
_BLOCKS_INPUTS: dict[int, Kind] = {2: "keys", 3: "engine_hashes", 4: "tokens", 5: "prompt", 6: "chat"}


class Limits(Protocol):
    """Bounds on one request."""

    @property
    def max_tokens(self) -> int: ...
    @property
    def max_pods(self) -> int: ...
    @property
    def max_keys(self) -> int: ...
    @property
    def max_prompt_bytes(self) -> int: ...


class PlacementLimits(Protocol):
    """How long a placement holds, in seconds."""

    @property
    def default_ttl_seconds(self) -> float: ...
    @property
    def max_ttl_seconds(self) -> float: ...


def decode(of: type[M], data: bytes) -> M:
    """The message, or InvalidArgument when these bytes are none."""
    try:
        return of.FromString(data)
    except DecodeError:
        _malformed(of)


class _Given(TypedDict):
    """What every request has that is about a prompt."""

    kind: Kind
    text: str
    tokens: bytes
    keys: bytes
    lora_name: str
    cache_salt: str
    mm_features: tuple[tuple[str, int, int], ...]


def _given(data: bytes, message: _WithMedia, inputs: Mapping[int, Kind], limits: Limits) -> _Given:
    kind = _only_input(data, message, inputs)
    keys_field = next(number for number, each in inputs.items() if each == "keys")
    return {
        "kind": kind,
        "text": _text(message, kind, limits),
        "tokens": _tokens(data, kind, limits),
        "keys": _keys(data, kind, keys_field, limits),
        "lora_name": message.lora_name,
        "cache_salt": message.cache_salt,
        "mm_features": _mm_features(data, message),
    }


def decode_score(data: bytes, limits: Limits) -> ScoreQuery:
    """A checked ScoreRequest."""
    message = decode(kvindex_pb2.ScoreRequest, data)
    _check_common(message)
    _check_pods("pods", message.pods, limits)
    given = _given(data, message, _SCORE_INPUTS, limits)
    return ScoreQuery(message.model, **given, pods=tuple(message.pods), top_k=message.top_k)


def decode_blocks(data: bytes, limits: Limits) -> BlocksQuery:
    """A checked GetPodsForBlocksRequest."""
    message = decode(kvindex_pb2.GetPodsForBlocksRequest, data)
    _check_common(message)
    _check_pods("pods", message.pods, limits)
    given = _given(data, message, _BLOCKS_INPUTS, limits)
    ints = b""
    strings: tuple[bytes, ...] = ()
    if given["kind"] == "engine_hashes":
        hashes = message.engine_hashes
        if hashes.ints and hashes.bytes:
            raise InvalidArgument("engine_hashes", "only one of ints, bytes may be filled")
        if hashes.bytes:
            _check_count("engine_hashes.bytes", len(hashes.bytes), limits.max_keys, "hashes")
            strings = tuple(hashes.bytes)
        else:
            name = "engine_hashes.ints" if hashes.ints else "engine_hashes"
            ints = _packed(data, 3, 8, name, limits.max_keys, "hashes")
    return BlocksQuery(message.model, **given, pods=tuple(message.pods), engine_ints=ints, engine_bytes=strings)


def decode_placement(data: bytes, limits: Limits, placement: PlacementLimits) -> PlacementQuery:
    """A checked RecordPlacementRequest."""
    message = decode(kvindex_pb2.RecordPlacementRequest, data)
    _check_common(message)
    _check_name("pod", message.pod)
    given = _given(data, message, _SCORE_INPUTS, limits)
    ttl = message.ttl_seconds if message.HasField("ttl_seconds") else placement.default_ttl_seconds
    if not 0 < ttl <= placement.max_ttl_seconds:  # a NaN is not, either
        raise InvalidArgument("ttl_seconds", f"must be above 0 and at most {placement.max_ttl_seconds:g}")
    rank = message.rank if message.HasField("rank") else None
    return PlacementQuery(message.model, **given, pod=message.pod, rank=rank, ttl=ttl)


def decode_explain(data: bytes, limits: Limits) -> Query:
    """A checked ExplainRequest."""
    message = decode(kvindex_pb2.ExplainRequest, data)
    _check_common(message)
    _check_pods("pods", message.pods, limits)
    return Query(message.model, **_given(data, message, _SCORE_INPUTS, limits), pods=tuple(message.pods))


def decode_check(data: bytes, limits: Limits) -> CheckQuery:
    """A checked CheckRequest."""
    message = decode(kvindex_pb2.CheckRequest, data)
    present = _check_wires(data, kvindex_pb2.CheckRequest)
    if message.model:
        _check_common(message)
    _check_pods("pods", message.pods, limits)
    kind = _only_input(data, message, _PROBES) if present & _PROBES.keys() else None
    tokens = _packed(data, 5, 4, "tokens.ids", limits.max_tokens, "tokens") if kind == "tokens" else b""
    engine_tokens = b""
    if 6 in present:
        if kind not in ("prompt", "chat"):
            raise InvalidArgument("engine_tokens", "must come with the prompt or chat that they were made of")
        engine_tokens = _packed(data, 6, 4, "engine_tokens.ids", limits.max_tokens, "tokens")
    return CheckQuery(
        message.model,
        tuple(message.pods),
        kind,
        text="" if kind is None else _text(message, kind, limits),
        tokens=tokens,
        engine_tokens=engine_tokens,
        lora_name=message.lora_name,
        cache_salt=message.cache_salt,
    )


def decode_usage(data: bytes) -> UsageQuery:
    """A checked ReportUsageRequest."""
    message = decode(kvindex_pb2.ReportUsageRequest, data)
    _check_wires(data, kvindex_pb2.ReportUsageRequest)
    _check_name("model", message.model)
    _check_name("pod", message.pod)
    for field in ("predicted_tokens", "cached_tokens"):
        if message.prompt_tokens and getattr(message, field) > message.prompt_tokens:
            raise InvalidArgument(field, f"is above prompt_tokens, which is {message.prompt_tokens}")
    return UsageQuery(
        message.model, message.pod, message.predicted_tokens, message.cached_tokens, message.prompt_tokens
    )


def decode_pod_scores(data: bytes, limits: Limits) -> ScoreQuery:
    """A checked indexer.v1 GetPodScoresRequest."""
    message = decode(indexer_pb2.GetPodScoresRequest, data)
    _check_wires(data, indexer_pb2.GetPodScoresRequest)
    _check_name("model_name", message.model_name)
    _check_pods("pod_identifiers", message.pod_identifiers, limits)
    _check_prompt("prompt", message.prompt, limits)
    return ScoreQuery(message.model_name, "prompt", text=message.prompt, pods=tuple(message.pod_identifiers))


def encode_score(answer: ScoreAnswer) -> bytes:
    """A ScoreResponse."""
    response = kvindex_pb2.ScoreResponse(
        total_blocks=answer.total_blocks,
        block_size=answer.block_size,
        total_tokens=min(answer.total_tokens, _U32),
    )
    add = response.scores.add
    for each in answer.scores:
        fill_score(add(), each, answer.block_size)
    return response.SerializeToString()


def fill_score(score: kvindex_pb2.PodScore, each: PodScore, block_size: int) -> None:
    """One candidate's line of an answer."""
    score.pod = each.pod
    score.trust = kvindex_pb2.Trust.ValueType(each.trust)
    score.trust_reason = each.trust_reason
    score.age_seconds = each.age_seconds
    if each.hit:  # of many candidates most have none, and a zero needs no setting
        score.score = each.score
        score.matched_blocks = each.matched_blocks
        score.matched_tokens = min(each.matched_blocks * block_size, _U32)
        score.rank = each.rank
        score.tier_blocks.update(each.tier_blocks)
        score.speculative_blocks = each.speculative_blocks


def encode_score_status(code: int, message: str) -> bytes:
    """A ScoreResponse that only says why there is no answer."""
    status = kvindex_pb2.Status(code=code, message=message)
    return kvindex_pb2.ScoreResponse(status=status).SerializeToString()


def encode_blocks(answer: BlocksAnswer) -> bytes:
    """A GetPodsForBlocksResponse."""
    response = kvindex_pb2.GetPodsForBlocksResponse(block_size=answer.block_size)
    for key, holders in answer.blocks:
        block = response.blocks.add(key=key)
        for pod, rank, tier, group, speculative in holders:
            block.holders.add(pod=pod, rank=rank, tier=answer.tiers[tier], group=group, speculative=speculative)
    return response.SerializeToString()


def encode_placement(answer: PlacementAnswer) -> bytes:
    """A RecordPlacementResponse."""
    return kvindex_pb2.RecordPlacementResponse(
        total_blocks=answer.total_blocks,
        held_blocks=answer.held_blocks,
        rank=answer.rank,
        ttl_seconds=answer.ttl,
    ).SerializeToString()


def encode_check(findings: Sequence[Finding]) -> bytes:
    """A CheckResponse."""
    response = kvindex_pb2.CheckResponse(status=kvindex_pb2.CheckStatus.ValueType(worst(findings)))
    for each in findings:
        response.checks.add(
            name=each.name,
            status=kvindex_pb2.CheckStatus.ValueType(each.status),
            model=each.model,
            pod=each.pod,
            rank=each.rank,
            evidence=each.evidence,
            remedy=each.remedy,
        )
    return response.SerializeToString()


def encode_explanation(explanation: Explanation) -> bytes:
    """An ExplainResponse."""
    prompt = explanation.prompt
    response = kvindex_pb2.ExplainResponse(
        model=prompt.model.name,
        lora_name=prompt.lora_name,
        block_size=prompt.block_size,
        total_blocks=len(prompt.keys) // 8,
        total_tokens=min(prompt.total_tokens, _U32),
        tokens=tokens_of(prompt.tokens, EXPLAINED_TOKENS),
        keys=memoryview(prompt.keys[: EXPLAINED_KEYS * 8]).cast("Q"),
        more_pods=explanation.more_pods,
    )
    for each in explanation.pods:
        pod = response.pods.add(end=kvindex_pb2.MatchEnd.ValueType(each.end), why=each.why)
        fill_score(pod.score, each.score, prompt.block_size)
        for tier, blocks in each.runs:
            pod.runs.add(tier=tier, blocks=blocks)
        for departure, tier in each.left:
            pod.left.add(
                how=kvindex_pb2.BlockLeft.ValueType(departure.how.value + 1),
                tier=tier,
                group=departure.group,
                sequence=departure.at.sequence,
                time=departure.at.time,
                earlier_life=departure.earlier,
            )
        if each.memory is not None:
            since = each.memory.since
            pod.remembered.reach = kvindex_pb2.RemovalReach.ValueType(each.memory.reach)
            if since.sequence is not None:
                pod.remembered.sequence = since.sequence
            pod.remembered.time = since.time
        if each.stale_since:
            pod.stale_since = each.stale_since
    return response.SerializeToString()


def encode_pod_scores(answer: ScoreAnswer) -> bytes:
    """An indexer.v1 GetPodScoresResponse: pods with no hit are absent."""
    response = indexer_pb2.GetPodScoresResponse()
    for each in answer.scores:
        if each.hit:
            response.scores.add(pod=each.pod, score=each.score)
    return response.SerializeToString()


def _malformed(of: type[Message]) -> NoReturn:
    raise InvalidArgument("request", f"not a valid {of.DESCRIPTOR.name}")


def _check_common(message: _Request) -> None:
    _check_name("model", message.model)
    for field, value in (("lora_name", message.lora_name), ("cache_salt", message.cache_salt)):
        if len(value) > MAX_NAME:
            raise InvalidArgument(field, f"is longer than {MAX_NAME} characters")


def _check_name(field: str, value: str) -> None:
    if not value:
        raise InvalidArgument(field, "must not be empty")
    if len(value) > MAX_NAME:
        raise InvalidArgument(field, f"is longer than {MAX_NAME} characters")


def _check_count(field: str, count: int, limit: int, what: str) -> None:
    if not count:
        raise InvalidArgument(field, "must not be empty")
    if count > limit:
        raise InvalidArgument(field, f"{count} {what} exceed the limit of {limit}")


def _check_pods(field: str, pods: Sequence[str], limits: Limits) -> None:
    if pods:
        _check_count(field, len(pods), limits.max_pods, "pods")
    for index, pod in enumerate(pods):
        if not pod:
            raise InvalidArgument(field, f"the name at position {index} is empty")


def _check_prompt(field: str, text: str, limits: Limits) -> None:
    # A character takes up to 4 bytes; the exact length is worked out only when it can matter.
    if len(text) * 4 > limits.max_prompt_bytes:
        _check_count(field, len(text.encode()), limits.max_prompt_bytes, "bytes")
    elif not text:
        raise InvalidArgument(field, "must not be empty")


def _only_input(data: bytes, message: _Request, inputs: Mapping[int, Kind]) -> Kind:
    # A parser keeps the last member of a oneof without a word; only the bytes tell that there were two.
    present = {inputs[number] for number in _check_wires(data, type(message)) if number in inputs}
    if not present:
        raise InvalidArgument("input", f"one of {', '.join(inputs.values())} is required")
    if len(present) > 1:
        raise InvalidArgument("input", f"only one of {', '.join(inputs.values())} may be given")
    return present.pop()


def _check_wires(data: bytes, of: type[Message], inside: int = 0) -> set[int]:
    """The fields that occur; one of a known number with another wire type than its own is malformed.

    A parser would pass over such a field as if it were not there, and answer another question than was asked.
    """
    descriptor: Any = of.DESCRIPTOR
    try:
        tags = _core.scan_tags(data, inside)
    except ValueError:
        _malformed(of)
    if inside:
        descriptor = descriptor.fields_by_number[inside].message_type
    for tag in tags:
        field = descriptor.fields_by_number.get(tag >> 3)
        if field is not None and tag & 7 != _WIRES[field.type]:
            _malformed(of)
    return {tag >> 3 for tag in tags}


_WIRES = {
    FieldDescriptor.TYPE_STRING: 2,
    FieldDescriptor.TYPE_MESSAGE: 2,
    FieldDescriptor.TYPE_UINT32: 0,
    FieldDescriptor.TYPE_DOUBLE: 1,
}


def _text(message: _Request, kind: Kind, limits: Limits) -> str:
    if kind not in ("prompt", "chat"):
        return ""
    text = message.chat if kind == "chat" else message.prompt
    _check_prompt(kind, text, limits)
    return text


def _tokens(data: bytes, kind: Kind, limits: Limits) -> bytes:
    # tokens is field 4 of every request.
    return _packed(data, 4, 4, "tokens.ids", limits.max_tokens, "tokens") if kind == "tokens" else b""


def _keys(data: bytes, kind: Kind, field: int, limits: Limits) -> bytes:
    return _packed(data, field, 8, "keys.values", limits.max_keys, "keys") if kind == "keys" else b""


def _packed(data: bytes, field: int, width: int, name: str, limit: int, what: str) -> bytes:
    """Values straight from the request's bytes: no Python number is made of any of them."""
    try:
        values = _core.scan_packed(data, field, 1, width) or b""
    except ValueError as error:
        if "malformed" in str(error):  # by its wire type: all else a parser has accepted
            raise InvalidArgument(name, "has another wire type than its own") from None
        raise InvalidArgument(name, "value above 2^32-1") from None
    _check_count(name, len(values) // width, limit, what)
    return values


def _mm_features(data: bytes, message: _WithMedia) -> tuple[tuple[str, int, int], ...]:
    if not message.mm_features:
        return ()
    _check_wires(data, type(message), message.DESCRIPTOR.fields_by_name["mm_features"].number)
    _check_count("mm_features", len(message.mm_features), MAX_MM_FEATURES, "features")
    for index, feature in enumerate(message.mm_features):
        _check_name(f"mm_features[{index}].hash", feature.hash)
        if not feature.length:
            raise InvalidArgument(f"mm_features[{index}].length", "must not be 0")
    return tuple((each.hash, each.offset, each.length) for each in message.mm_features)
