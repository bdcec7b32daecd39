"""What is asked: one prompt in one of its forms, and what identifies its blocks besides the tokens."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb


@dataclass(frozen=True, slots=True)
class MmFeature:
    """A multimodal item: the engine's content hash, and the placeholder range it covers, in tokens."""

    hash: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Query:
    """A model and exactly one of `prompt`, `chat`, `tokens`, `keys`, `engine_hashes`; else ValueError.

    `chat` is an OpenAI chat-completions body, as JSON text or as the object itself. `keys` and integer
    `engine_hashes` are unsigned 64-bit. `engine_hashes` are for `pods_for_blocks` only. `pods` are the candidates,
    empty for all of the model; `top_k` (0 = all) counts in `score` only. A placement uses neither.
    """

    model: str
    prompt: str | None = None
    chat: str | Mapping[str, Any] | None = None
    tokens: Sequence[int] | None = None
    keys: Sequence[int] | None = None
    engine_hashes: Sequence[int] | Sequence[bytes] | None = None
    pods: Sequence[str] = ()
    lora_name: str = ""
    cache_salt: str = ""
    mm_features: Sequence[MmFeature] = ()
    top_k: int = 0

    def __post_init__(self) -> None:
        inputs = (self.prompt, self.chat, self.tokens, self.keys, self.engine_hashes)
        if sum(each is not None for each in inputs) != 1:
            raise ValueError("query: exactly one of prompt, chat, tokens, keys, engine_hashes is needed")

    def score_request(self) -> pb.ScoreRequest:
        """As a message; ValueError for a value that does not fit its field."""
        return pb.ScoreRequest(**self._identity("score"), pods=self.pods, top_k=self.top_k)

    def blocks_request(self) -> pb.GetPodsForBlocksRequest:
        """As a message; ValueError for a value that does not fit its field."""
        if self.engine_hashes is None:
            return pb.GetPodsForBlocksRequest(**self._identity("pods_for_blocks"), pods=self.pods)
        named: dict[str, Any] = {
            "bytes" if any(isinstance(each, bytes) for each in self.engine_hashes[:1]) else "ints": self.engine_hashes
        }
        return pb.GetPodsForBlocksRequest(
            model=self.model,
            engine_hashes=pb.EngineHashes(**named),
            pods=self.pods,
            lora_name=self.lora_name,
            cache_salt=self.cache_salt,
        )

    def placement_request(self, pod: str, rank: int | None, ttl_seconds: float | None) -> pb.RecordPlacementRequest:
        """As a message; ValueError for a value that does not fit its field."""
        return pb.RecordPlacementRequest(
            **self._identity("record_placement"), pod=pod, rank=rank, ttl_seconds=ttl_seconds
        )

    def _identity(self, call: str) -> dict[str, Any]:
        fields: dict[str, Any] = {"model": self.model, "lora_name": self.lora_name, "cache_salt": self.cache_salt}
        if self.mm_features:
            fields["mm_features"] = [
                pb.MmFeature(hash=each.hash, offset=each.offset, length=each.length) for each in self.mm_features
            ]
        if self.prompt is not None:
            fields["prompt"] = self.prompt
        elif self.chat is not None:
            chat = self.chat
            fields["chat"] = chat if isinstance(chat, str) else json.dumps(chat, ensure_ascii=False)
        elif self.tokens is not None:
            fields["tokens"] = pb.Tokens(ids=self.tokens)
        elif self.keys is not None:
            fields["keys"] = pb.Keys(values=self.keys)
        else:
            raise ValueError(f"query: engine_hashes cannot be asked by {call}")
        return fields


def usage_request(model: str, pod: str, predicted: int, cached: int, prompt: int) -> pb.ReportUsageRequest:
    """As a message; ValueError for a value that does not fit its field."""
    return pb.ReportUsageRequest(
        model=model, pod=pod, predicted_tokens=predicted, cached_tokens=cached, prompt_tokens=prompt
    )
