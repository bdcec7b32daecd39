"""Names for server processes: a file of records stands where the system's resolver would ask DNS."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

_HOOK = """
import json, os, socket

_ask = socket.getaddrinfo


def _getaddrinfo(host, port, *rest, **named):
    with open(os.environ["NAMES_FILE"]) as file:
        records = json.load(file)
    if host not in records:
        return _ask(host, port, *rest, **named)
    with open(os.environ["NAMES_FILE"] + ".asked", "a") as asked:
        print(host, file=asked)
    if not records[host]:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")
    return [found for each in records[host] for found in _ask(each, port, *rest, **named)]


socket.getaddrinfo = _getaddrinfo
"""


class Names:
    """What names resolve to, for processes with `env`; `set` changes it while they run."""

    def __init__(self, directory: Path) -> None:
        hook = directory / "names"
        hook.mkdir()
        (hook / "sitecustomize.py").write_text(_HOOK)  # Python imports it before anything else
        self._file = directory / "names.json"
        self._asked = directory / "names.json.asked"
        self.set({})
        paths = [str(hook), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.env = {"PYTHONPATH": os.pathsep.join(paths), "NAMES_FILE": str(self._file)}

    def set(self, records: Mapping[str, Sequence[str]]) -> None:
        """name -> addresses; none at all is a name that does not exist."""
        made = self._file.with_suffix(".new")
        made.write_text(json.dumps(records))
        made.replace(self._file)

    @property
    def asked(self) -> int:
        """How often a name of ours was asked for."""
        return len(self._asked.read_text().splitlines()) if self._asked.exists() else 0
