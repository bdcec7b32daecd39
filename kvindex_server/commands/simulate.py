"""`kvindex simulate`: a fleet of simulated engines under chat traffic, optionally registered at a server."""

import argparse
import contextlib
import time

from kvindex_server.commands import screen
from kvindex_server.commands.connection import Connection
from kvindex_server.commands.failure import USAGE, CommandError
from kvindex_server.commands.usage import above_zero, not_negative
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.simulate.events import Encoding
from kvindex_server.simulate.pod import SimulatedPod
from kvindex_server.simulate.workload import Shape, Traffic, Workload, by_session

STEP_SECONDS = 0.005
TURN_SECONDS = 0.01
SETTLE_SECONDS = 5.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Beside those of the connection, which only --register needs."""
    parser.add_argument("--model", default="simulated")
    parser.add_argument("--pods", type=int, default=4, metavar="N", help="default 4")
    parser.add_argument("--blocks", type=int, default=1024, help="blocks of each pod's cache (default 1024)")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--rate", type=float, default=20.0, help="requests per second (default 20)")
    parser.add_argument("--seconds", type=above_zero, default=float("inf"), help="end after so long (default: Ctrl-C)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--restart-every", type=not_negative, default=0.0, metavar="SECONDS", help="restart a pod so often"
    )
    parser.add_argument("--register", action="store_true", help="register the pods at the server while they run")


def run(args: argparse.Namespace) -> int:
    """Start the engines, send them chats, and say what they found in their caches."""
    if not 1 <= args.pods <= 256 or not args.rate > 0 or args.blocks < 64 or not 1 <= args.block_size <= 1024:
        raise CommandError(
            "--pods must be in 1..256, --rate above 0, --blocks at least 64, --block-size in 1..1024", USAGE
        )
    with contextlib.ExitStack() as stack:
        pods: dict[str, SimulatedPod] = {}
        for number in range(args.pods):
            pod = SimulatedPod(
                f"sim-{number}",
                args.model,
                blocks=args.blocks,
                block_size=args.block_size,
                encoding=Encoding.ARRAY if number % 2 == 0 else Encoding.MAP,
                step_seconds=STEP_SECONDS,
                seed=number,
            )
            stack.callback(pod.stop)
            pod.start()
            pods[pod.pod] = pod
            where = {"pod": pod.pod, "endpoint": pod.endpoint, "replay_endpoint": pod.replay_endpoint}
            if args.json:
                screen.write_json(where)
            else:
                screen.write(" ".join(where.values()))
        if args.register:
            _register(stack.enter_context(Connection(args)), stack, args.model, pods)
        shape = Shape(sessions=max(24, 6 * len(pods)))
        traffic = Traffic(Workload(args.seed, shape), pods, by_session(list(pods)))
        with contextlib.suppress(KeyboardInterrupt):
            _drive(args, traffic)
        messages = sum(pod.published() for pod in pods.values())
        total = traffic.total
        if args.json:
            screen.write_json({"requests": total.requests, "hit_ratio": total.hit_ratio, "messages": messages})
        else:
            screen.write(f"{total.requests} requests, hit ratio {total.hit_ratio:.3f}, {messages} messages published")
    return 0


def _register(connection: Connection, stack: contextlib.ExitStack, model: str, pods: dict[str, SimulatedPod]) -> None:
    for pod in pods.values():
        request = pb.RegisterPodRequest(
            pod=pod.pod, model=model, endpoint=pod.endpoint, replay_endpoint=pod.replay_endpoint
        )
        connection.call(connection.admin.RegisterPod, request)
        gone = pb.UnregisterPodRequest(pod=pod.pod, model=model)
        stack.callback(_unregister, connection, gone)


def _unregister(connection: Connection, request: pb.UnregisterPodRequest) -> None:
    try:
        connection.call(connection.admin.UnregisterPod, request)
    except CommandError as error:  # the server may have gone first
        screen.note(f"kvindex: {request.pod} stays registered: {error.message}")


def _drive(args: argparse.Namespace, traffic: Traffic) -> None:
    started = now = time.monotonic()
    next_send, next_restart, victim = started, started + args.restart_every, 0
    progress = screen.Progress("simulate", args.seconds)
    try:
        while (now := time.monotonic()) < started + args.seconds:
            if now >= next_send:
                next_send = max(next_send + 1 / args.rate, now - 1)
                traffic.send()
            traffic.collect()
            if args.restart_every and now >= next_restart:
                next_restart = now + args.restart_every
                list(traffic.pods.values())[victim % len(traffic.pods)].restart()
                victim += 1
            progress.show(now - started, f"{traffic.total.requests} requests, hit ratio {traffic.total.hit_ratio:.2f}")
            time.sleep(max(0.0, min(next_send - time.monotonic(), TURN_SECONDS)))
        while traffic.under_way and time.monotonic() < now + SETTLE_SECONDS:
            traffic.collect()
            time.sleep(TURN_SECONDS)
    finally:
        progress.end()
