"""The read service kvindex.v1.KVIndex on the wire."""

import grpc

from kvindex_server import codec
from kvindex_server.direct import Direct
from kvindex_server.interceptors import Guard, service
from kvindex_server.lookup import Check, Lookup

SERVICE = "kvindex.v1.KVIndex"


def register(
    server: grpc.Server,
    lookup: Lookup,
    direct: Direct,
    guard: Guard,
    limits: codec.Limits,
    placement: codec.PlacementLimits,
) -> None:
    """Serve Score, ScoreStream, GetPodsForBlocks, RecordPlacement and ReportUsage."""

    def place(data: bytes, check: Check) -> bytes:
        return codec.encode_placement(lookup.place(codec.decode_placement(data, limits, placement), check))

    def report(data: bytes, _: Check) -> bytes:
        lookup.report(codec.decode_usage(data))
        return b""  # an empty ReportUsageResponse

    handlers = {
        "Score": guard.read(f"/{SERVICE}/Score", direct.score),
        "ScoreStream": guard.stream(f"/{SERVICE}/ScoreStream", direct.score, codec.encode_score_status),
        "GetPodsForBlocks": guard.read(f"/{SERVICE}/GetPodsForBlocks", direct.blocks),
        "RecordPlacement": guard.read(f"/{SERVICE}/RecordPlacement", place),
        "ReportUsage": guard.read(f"/{SERVICE}/ReportUsage", report),
    }
    server.add_generic_rpc_handlers(service(SERVICE, handlers))
