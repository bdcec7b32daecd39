"""`kvindex blocks`: who holds each block of a prompt, or each of these blocks."""

import argparse

from kvindex_server.commands import prompt, screen
from kvindex_server.commands.connection import Connection
from kvindex_server.commands.failure import USAGE, CommandError
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb


def add_options(parser: argparse.ArgumentParser) -> None:
    """Beside those of the connection."""
    parser.add_argument("--model", required=True)
    parser.add_argument("--pod", action="append", default=[], help="only this pod; may be repeated")
    parser.add_argument("--engine-hashes", metavar="HASHES", help="the engine's own names: decimal, 0x..., or @FILE")
    prompt.add_options(parser, needed=False)


def run(args: argparse.Namespace) -> int:
    """One line per block."""
    fields = prompt.fields(args)
    given: list[str] = [name for name in ("prompt", "chat", "tokens", "keys") if name in fields]
    if args.engine_hashes is not None:
        given.append("engine_hashes")
        hashes = prompt.numbers(args.engine_hashes, "--engine-hashes", 64)
        fields["engine_hashes"] = pb.EngineHashes(ints=hashes)
    if len(given) != 1:
        raise CommandError("give one of --prompt, --chat, --tokens, --keys, --engine-hashes", USAGE)
    with Connection(args) as connection:
        request = pb.GetPodsForBlocksRequest(model=args.model, pods=args.pod, **fields)
        answer = connection.call(connection.read.GetPodsForBlocks, request)
    if args.json:
        screen.write_json(answer)
        return 0
    rows = []
    for number, block in enumerate(answer.blocks):
        held = [f"{each.pod}/{each.rank}:{'placed' if each.speculative else each.tier}" for each in block.holders]
        rows.append((str(number), f"{block.key:#018x}" if block.key else "-", " ".join(held) or "-"))
    screen.write(*screen.table(("block", "key ", "held by "), rows, left=0))
    return 0
