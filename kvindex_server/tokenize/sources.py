"""Where a model's tokenizer comes from: a directory, a hub cache, the hub itself, or the engine that serves it."""

import logging
import os
import re
import threading
from pathlib import Path

from kvindex_server import _core, logs
from kvindex_server.errors import InvalidArgument
from kvindex_server.tokenize.registry import load_tokenizer
from kvindex_server.tokenize.remote import RemoteTokenizer
from kvindex_server.tokenize.tokenizer import UNLIMITED, AnyTokenizer

logger = logging.getLogger(__name__)

# A model's name comes from whoever registers a pod: it must not lead out of the directories.
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?\Z")
_FILES = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "additional_chat_templates/*"),
)


class Sources:
    """Loads tokenizers, all before one cache of texts."""

    def __init__(
        self,
        cache: _core.TextCache,
        *,
        directories: tuple[Path, ...] = (),
        download: bool = False,
        word_slots: int = 1 << 17,
        max_reference_bytes: int = UNLIMITED,
        engines_at_once: int = 2,
    ) -> None:
        """At most `engines_at_once` calls wait for engines that are asked over HTTP."""
        self._cache = cache
        self._directories = (*directories, hub_cache())
        self._download = download
        self._word_slots = word_slots
        self._max_reference_bytes = max_reference_bytes
        self._places = threading.Semaphore(engines_at_once)

    def configured(self, name: str, directory: str | None, url: str | None) -> AnyTokenizer | None:
        """The tokenizer of a configured model. InvalidArgument when its directory is no tokenizer's."""
        if directory is not None:
            return self._load(snapshot(Path(directory)))
        if url is not None:
            return RemoteTokenizer(url, name, self._cache, places=self._places)
        return self.discover(name)

    def discover(self, name: str) -> AnyTokenizer | None:
        """The tokenizer that the model's name leads to; None when there is none or it is broken."""
        directory = self.find(name)
        if directory is None:
            return None
        try:
            return self._load(directory)
        except InvalidArgument as error:
            logs.event(logger, logging.WARNING, "tokenizer cannot be loaded", model=name, reason=error.reason)
            return None

    def find(self, name: str) -> Path | None:
        """The directory of a model's tokenizer, by its name alone."""
        if not _HUB_NAME.match(name):
            return None
        for directory in self._directories:
            hub = directory / f"models--{name.replace('/', '--')}"
            for candidate in (directory / name, directory / name.rpartition("/")[2], hub):
                found = snapshot(candidate)
                if (found / "tokenizer.json").is_file():
                    return found
        return _downloaded(name) if self._download else None

    def _load(self, directory: Path) -> AnyTokenizer:
        tokenizer = load_tokenizer(
            directory,
            self._cache,
            word_slots=self._word_slots,
            max_reference_bytes=self._max_reference_bytes,
        )
        mode, cuts, reason = tokenizer.mode, tokenizer.cuts, tokenizer.reason
        logs.event(logger, logging.INFO, "tokenizer", directory=str(directory), mode=mode, cuts=cuts, reason=reason)
        return tokenizer


def hub_cache() -> Path:
    """Where the hub's own tools keep what they have fetched."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


def snapshot(directory: Path) -> Path:
    """The files of a model in a hub cache (`snapshots/<commit>`, of `main` when it has one); else the directory."""
    snapshots = directory / "snapshots"
    if not snapshots.is_dir():
        return directory
    main = directory / "refs" / "main"
    if main.is_file():
        commit = main.read_text(encoding="utf-8").strip()
        if commit and (snapshots / commit).is_dir():
            return snapshots / commit
    found = [each for each in snapshots.iterdir() if (each / "tokenizer.json").is_file()]
    return max(found, key=lambda each: each.stat().st_mtime, default=directory)


def _downloaded(name: str) -> Path | None:
    import huggingface_hub  # noqa: PLC0415 - only when the operator turned it on

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:  # noqa: BLE001 - no network, no such model, no permission: all mean no tokenizer
        logs.event(logger, logging.WARNING, "tokenizer not downloaded", model=name, error=type(error).__name__)
        return None
