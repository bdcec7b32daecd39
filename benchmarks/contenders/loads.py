"""The loads of the comparison by name, the same in every process."""

from collections.abc import Sequence
from pathlib import Path

from load import Traffic, chats, conversation_trace, serve


def traffic_of(words: Sequence[str]) -> Traffic:
    """`chats SESSIONS`, so many per pod, or `trace PATH REQUESTS`."""
    if words[0] == "chats":
        return serve(chats(sessions=int(words[1])))
    _, path, requests = words
    return serve(conversation_trace(Path(path), int(requests)))
