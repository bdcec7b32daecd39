"""kvindex_client: asks kvindex-server, from threads (`Client`) or from asyncio (`AsyncClient`)."""

from kvindex_client.asynchronous import AsyncClient
from kvindex_client.blocking import Client
from kvindex_client.errors import CallError
from kvindex_client.options import Options, Tls
from kvindex_client.query import MmFeature, Query
from kvindex_client.results import (
    BlockHolders,
    BlockPods,
    Holder,
    Placement,
    PodScore,
    Scores,
    Trust,
)

__all__ = [
    "AsyncClient",
    "BlockHolders",
    "BlockPods",
    "CallError",
    "Client",
    "Holder",
    "MmFeature",
    "Options",
    "Placement",
    "PodScore",
    "Query",
    "Scores",
    "Tls",
    "Trust",
]
