"""The service indexer.v1.IndexerService, for the clients of llm-d's indexer, message for message."""

import grpc

from kvindex_server import codec
from kvindex_server.interceptors import Guard, service
from kvindex_server.lookup import Check, Lookup

SERVICE = "indexer.v1.IndexerService"


def register(server: grpc.Server, lookup: Lookup, guard: Guard, limits: codec.Limits) -> None:
    """Serve GetPodScores."""

    def pod_scores(data: bytes, check: Check) -> bytes:
        return codec.encode_pod_scores(lookup.score(codec.decode_pod_scores(data, limits), check))

    handlers = {"GetPodScores": guard.read(f"/{SERVICE}/GetPodScores", pod_scores)}
    server.add_generic_rpc_handlers(service(SERVICE, handlers))
