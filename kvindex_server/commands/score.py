"""`kvindex score`: how much of a prompt each pod holds."""

import argparse

from kvindex_server.commands import prompt, screen
from kvindex_server.commands.connection import Connection
from kvindex_server.commands.failure import USAGE, CommandError
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb

BAR = 32


def add_options(parser: argparse.ArgumentParser) -> None:
    """Beside those of the connection."""
    parser.add_argument("--model", required=True)
    parser.add_argument("--pod", action="append", default=[], help="candidate; may be repeated (default: all)")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="only the best N")
    prompt.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Ask, and show a table with a bar per pod."""
    if not 0 <= args.top < 1 << 32:
        raise CommandError("--top must be in 0..2^32-1", USAGE)
    with Connection(args) as connection:
        request = pb.ScoreRequest(model=args.model, pods=args.pod, top_k=args.top, **prompt.fields(args))
        answer = connection.call(connection.read.Score, request)
    if args.json:
        screen.write_json(answer)
        return 0
    size = answer.block_size
    screen.write(f"{answer.total_tokens} tokens, {answer.total_blocks} full blocks of {size or 'unknown size'}")
    rows = [row(each, answer.total_blocks) for each in answer.scores]
    screen.write(*screen.table(("pod", "rank", "score", "match", "blocks ", "trust "), rows), screen.LEGEND)
    if not answer.scores:
        screen.note("no pod is registered for this model: `kvindex check` says more")
    elif not answer.total_blocks:
        screen.note("a prompt has no full block here: `kvindex check` says why")
    return 0


def row(score: pb.PodScore, total: int) -> tuple[str, ...]:
    """One pod's cells: name, rank, score, match, bar, trust."""
    matched = score.matched_blocks
    share = f" {matched / total:4.0%}" if total else ""
    return (
        score.pod,
        str(score.rank) if matched else "-",
        f"{score.score:.1f}",
        f"{matched}/{total}{share}",
        screen.bar(score.tier_blocks, total, BAR, score.speculative_blocks),
        trust(score.trust),
    )


def trust(value: "pb.Trust.ValueType") -> str:
    """Without its prefix."""
    return pb.Trust.Name(value).removeprefix("TRUST_")
