"""What a Kubernetes Pod object says about an engine: where it runs, which life it lives, what it tells of itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvindex_server.config import KubernetesSettings
from kvindex_server.discovery.describe import NotDescribed, Told, told_by

DEFAULT_CONTAINER = "kubectl.kubernetes.io/default-container"


@dataclass(frozen=True, slots=True)
class KubePod:
    """The part of a Pod object that matters here, and nothing else of it is kept."""

    uid: str
    version: str
    namespace: str
    name: str
    created: str
    ip: str
    running: bool
    ready: bool
    life: str
    """Another text for another life of the engine: of the pod, or of its container."""
    told: Told
    problem: NotDescribed | None
    """Why the pod cannot be followed, as far as its own object says."""


def read_pod(document: Mapping[str, Any], settings: KubernetesSettings) -> KubePod:
    """Reads a Pod object. KeyError, TypeError or AttributeError when it is none."""
    meta, status = document["metadata"], document.get("status") or {}
    annotations = meta.get("annotations") or {}
    told, problem = Told(), None
    try:
        told = told_by(annotations, settings.annotations)
    except NotDescribed as error:
        problem = error
    container = _container(document, settings.container or told.container or annotations.get(DEFAULT_CONTAINER))
    if container is None:
        problem = problem or NotDescribed("no_container", "the pod has no container of the wanted name")
    uid = str(meta["uid"])
    ready = any(each["type"] == "Ready" and each["status"] == "True" for each in status.get("conditions") or ())
    return KubePod(
        uid=uid,
        version=str(meta.get("resourceVersion", "")),
        namespace=str(meta.get("namespace", "")),
        name=str(meta["name"]),
        created=str(meta.get("creationTimestamp", "")),
        ip=str(status.get("podIP") or ""),
        # A pod that is being deleted gets no new requests, so nothing needs to be known of it any more.
        running=status.get("phase") == "Running" and not meta.get("deletionTimestamp"),
        ready=ready,
        life=f"{uid}/{_container_life(status, container)}",
        told=told,
        problem=problem,
    )


def _container(document: Mapping[str, Any], wanted: str | None) -> str | None:
    spec = document.get("spec") or {}
    names = [str(each["name"]) for each in spec.get("containers") or ()]
    # Sidecars that run beside the engine are listed as init containers.
    known = names + [str(each["name"]) for each in spec.get("initContainers") or ()]
    if wanted:
        return wanted if wanted in known else None
    return names[0] if names else None


def _container_life(status: Mapping[str, Any], container: str | None) -> str:
    for each in (*(status.get("containerStatuses") or ()), *(status.get("initContainerStatuses") or ())):
        if each.get("name") == container:
            return f"{each.get('restartCount', 0)}/{each.get('containerID') or ''}"
    return ""
