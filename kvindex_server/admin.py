"""The operating service kvindex.v1.KVIndexAdmin: which pods are followed, and how that goes."""

import time

import grpc

from kvindex_server import __version__, codec, pull, siblings
from kvindex_server.checkup import Checkup
from kvindex_server.codec import decode
from kvindex_server.errors import InvalidArgument
from kvindex_server.explain import Explainer
from kvindex_server.fleet import Fleet
from kvindex_server.interceptors import Guard, service
from kvindex_server.keeper import Keeper
from kvindex_server.lookup import Check, Lookup
from kvindex_server.models import Models
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pods import PodSpec
from kvindex_server.stream import StreamStatus

SERVICE = "kvindex.v1.KVIndexAdmin"


class Admin:
    """The service's methods: request bytes in, answer bytes out."""

    def __init__(self, fleet: Fleet, models: Models, lookup: Lookup, limits: codec.Limits) -> None:
        self._fleet = fleet
        self._models = models
        self._limits = limits
        self._checkup = Checkup(fleet, models, lookup)
        self._explainer = Explainer(lookup, fleet.statuses, fleet.adapters)
        self._started = time.monotonic()

    def list_pods(self, data: bytes, _: Check) -> bytes:
        """One entry per stream."""
        request = decode(pb.ListPodsRequest, data)
        statuses = self._fleet.statuses(request.model or None)
        return pb.ListPodsResponse(streams=[_stream_info(each) for each in statuses]).SerializeToString()

    def register_pod(self, data: bytes, _: Check) -> bytes:
        """Follow a pod."""
        request = decode(pb.RegisterPodRequest, data)
        spec = PodSpec(
            pod=request.pod,
            model=request.model,
            endpoint=request.endpoint,
            replay_endpoint=request.replay_endpoint,
            ranks=request.ranks or 1,
            topic=request.topic,
            engine=request.engine,
            block_size=request.block_size,
            bind=request.bind,
            incarnation=request.incarnation,
        )
        changed = self._fleet.register(spec.validate())
        return pb.RegisterPodResponse(changed=changed).SerializeToString()

    def unregister_pod(self, data: bytes, _: Check) -> bytes:
        """Follow a pod no longer."""
        request = decode(pb.UnregisterPodRequest, data)
        claims = self._fleet.unregister(*_named(request.pod, request.model))
        return pb.UnregisterPodResponse(claims=claims).SerializeToString()

    def clear_pod(self, data: bytes, _: Check) -> bytes:
        """Forget a pod's claims and synchronise again."""
        request = decode(pb.ClearPodRequest, data)
        claims = self._fleet.clear(*_named(request.pod, request.model))
        return pb.ClearPodResponse(claims=claims).SerializeToString()

    def get_stats(self, data: bytes, _: Check) -> bytes:
        """The size of the index."""
        decode(pb.GetStatsRequest, data)
        response = pb.GetStatsResponse(version=__version__, uptime_seconds=time.monotonic() - self._started)
        statuses = self._fleet.statuses(None)
        for model in self._models.all():
            response.models.add(
                model=model.name,
                block_size=model.index.block_size,
                blocks=model.index.blocks,
                claims=model.index.claims,
                bytes=model.index.bytes,
                pods=len(self._fleet.pods(model.name)),
                streams=sum(each.model == model.name for each in statuses),
                has_tokenizer=model.tokenizer is not None,
                coverage=self._fleet.coverage(model.name),
            )
        return response.SerializeToString()

    def check(self, data: bytes, check: Check) -> bytes:
        """The doctor's findings."""
        return codec.encode_check(self._checkup.examine(codec.decode_check(data, self._limits), check))

    def explain(self, data: bytes, check: Check) -> bytes:
        """Why each pod's match ends where it does."""
        return codec.encode_explanation(self._explainer.explain(codec.decode_explain(data, self._limits), check))


def register(
    server: grpc.Server,
    fleet: Fleet,
    models: Models,
    lookup: Lookup,
    limits: codec.Limits,
    keeper: Keeper,
    instance: str,
    guard: Guard,
) -> None:
    """Serve ListPods, RegisterPod, UnregisterPod, ClearPod, GetStats, Check, Explain, PullSnapshot and PullDigests."""
    admin = Admin(fleet, models, lookup, limits)
    methods = {
        "ListPods": admin.list_pods,
        "RegisterPod": admin.register_pod,
        "UnregisterPod": admin.unregister_pod,
        "ClearPod": admin.clear_pod,
        "GetStats": admin.get_stats,
        "Check": admin.check,
        "Explain": admin.explain,
    }
    handlers = {name: guard.admin(f"/{SERVICE}/{name}", method) for name, method in methods.items()}
    handlers["PullSnapshot"] = pull.arrival(keeper, fleet, guard)
    handlers["PullDigests"] = siblings.arrival(fleet, instance, guard)
    server.add_generic_rpc_handlers(service(SERVICE, handlers))


def _named(pod: str, model: str) -> tuple[str, str]:
    for field, value in (("pod", pod), ("model", model)):
        if not value:
            raise InvalidArgument(field, "must not be empty")
    return pod, model


def _stream_info(status: StreamStatus) -> pb.StreamInfo:
    # The dictionaries are copied first: the stream's own thread may be adding to them meanwhile.
    return pb.StreamInfo(
        pod=status.pod,
        rank=status.rank,
        model=status.model,
        state=pb.StreamState.ValueType(status.state),
        trust=pb.Trust.ValueType(status.trust),
        trust_reason=status.trust_reason,
        endpoint=status.endpoint,
        replay_endpoint=status.replay_endpoint,
        last_sequence=status.last_sequence,
        lag_seconds=status.lag_seconds,
        age_seconds=status.age_seconds,
        blocks=status.blocks,
        blocks_by_tier=dict(status.blocks_by_tier),
        gaps=status.gaps,
        restarts=status.restarts,
        replays=status.replays,
        orphans=status.orphans,
        decode_errors=dict(status.decode_errors),
        duplicates=status.duplicates,
        messages=status.messages,
        events=status.events,
        epoch=status.epoch,
        dropped=dict(status.dropped),
    )
