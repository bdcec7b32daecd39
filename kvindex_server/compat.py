"""The service indexer.v1.IndexerService, for the clients of llm-d's indexer, message for message."""

import grpc

from kvindex_server.direct import Direct
from kvindex_server.interceptors import Guard, service

SERVICE = "indexer.v1.IndexerService"


def register(server: grpc.Server, direct: Direct, guard: Guard) -> None:
    """Serve GetPodScores."""
    handlers = {"GetPodScores": guard.read(f"/{SERVICE}/GetPodScores", direct.pod_scores)}
    server.add_generic_rpc_handlers(service(SERVICE, handlers))
