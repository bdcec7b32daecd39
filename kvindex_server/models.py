"""The models known to the server: by configuration, or because a pod was registered for one."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvindex_server._core import Index
from kvindex_server.errors import NotFound

if TYPE_CHECKING:
    from kvindex_server.tokenize.registry import Tokenizer


@dataclass(frozen=True, slots=True)
class Model:
    """A namespace of keys: one index, and a tokenizer when text is to be scored."""

    name: str
    index: Index
    tokenizer: "Tokenizer | None" = None
    aliases: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()


class Models:
    """Models by name, alias and LoRA name. Reads take no lock: the table is replaced whole."""

    def __init__(self, models: Sequence[Model], *, hash_seed: int = 1337, max_claims: int = 0) -> None:
        self._lock = threading.Lock()
        self._hash_seed = hash_seed
        self._max_claims = max_claims
        self._models: Mapping[str, Model] = {model.name: model for model in models}
        self._names: Mapping[str, tuple[Model, str]] = _names(models)

    def resolve(self, name: str) -> tuple[Model, str]:
        """The model, and the LoRA name when `name` is an adapter's. NotFound when unknown."""
        try:
            return self._names[name]
        except KeyError:
            raise NotFound(f"model: {name!r} is neither configured nor seen") from None

    def get(self, name: str) -> Model:
        """The model of a name, alias or LoRA name. NotFound when unknown."""
        return self.resolve(name)[0]

    def real_name(self, name: str) -> str:
        """The model's own name behind a name, alias or LoRA name; an unknown name is its own."""
        known = self._names.get(name)
        return known[0].name if known is not None else name

    def seen(self, name: str, block_size: int = 0) -> Model:
        """The model a pod is registered for, made when new; `block_size` 0 is learned from events."""
        with self._lock:
            known = self._names.get(name)
            if known is not None:
                return known[0]
            model = Model(name, Index(block_size, self._hash_seed, self._max_claims))
            models = [*self._models.values(), model]
            self._models = {each.name: each for each in models}
            self._names = _names(models)
            return model

    def all(self) -> list[Model]:
        """Every model, in the order they became known."""
        return list(self._models.values())


def _names(models: Sequence[Model]) -> dict[str, tuple[Model, str]]:
    names: dict[str, tuple[Model, str]] = {}
    for model in models:
        for lora in model.loras:
            names[lora] = (model, lora)
        for alias in model.aliases:
            names[alias] = (model, "")
    for model in models:
        names[model.name] = (model, "")
    return names
