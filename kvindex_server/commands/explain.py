"""`kvindex explain`: for one prompt, where each pod's match ends and why."""

import argparse

from kvindex_server.commands import prompt, screen
from kvindex_server.commands.connection import Connection
from kvindex_server.commands.score import row
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb

SHOWN_TOKENS = 16
SHOWN_KEYS = 4


def add_options(parser: argparse.ArgumentParser) -> None:
    """Beside those of the connection."""
    parser.add_argument("--model", required=True)
    parser.add_argument("--pod", action="append", default=[], help="only this pod; may be repeated")
    prompt.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """The table of `score`, and a sentence per pod."""
    with Connection(args) as connection:
        request = pb.ExplainRequest(model=args.model, pods=args.pod, **prompt.fields(args))
        answer = connection.call(connection.admin.Explain, request)
    if args.json:
        screen.write_json(answer)
        return 0
    adapter = f", adapter {answer.lora_name}" if answer.lora_name else ""
    screen.write(
        f"model {answer.model}{adapter}: {answer.total_tokens} tokens, {answer.total_blocks} full blocks of "
        f"{answer.block_size or 'unknown size'}"
    )
    _list("tokens", [str(each) for each in answer.tokens[:SHOWN_TOKENS]], answer.total_tokens)
    _list("keys", [f"{each:#018x}" for each in answer.keys[:SHOWN_KEYS]], answer.total_blocks)
    rows = [row(each.score, answer.total_blocks) for each in answer.pods]
    screen.write(*screen.table(("pod", "rank", "score", "match", "blocks ", "trust "), rows), screen.LEGEND)
    for each in answer.pods:
        end = pb.MatchEnd.Name(each.end).removeprefix("MATCH_END_")
        screen.write(*screen.wrapped(f"{each.score.pod}: {end}: {each.why}", 4))
    if answer.more_pods:
        screen.write(f"{answer.more_pods} more pods match less")
    return 0


def _list(what: str, shown: list[str], total: int) -> None:
    if shown:
        screen.write(f"{what} {' '.join(shown)}{' ...' if total > len(shown) else ''}")
