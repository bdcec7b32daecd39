"""The models known to the server: by configuration, or because a pod was registered for one."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvindex_server._core import Index
from kvindex_server.errors import NotFound

if TYPE_CHECKING:
    from kvindex_server.tokenize.tokenizer import AnyTokenizer


@dataclass(frozen=True, slots=True)
class Model:
    """A namespace of keys: one index, and a tokenizer when text is to be scored."""

    name: str
    index: Index
    tokenizer: "AnyTokenizer | None" = None
    aliases: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()


class Models:
    """Models by name, alias and LoRA name. Reads take no lock: the table is replaced whole."""

    def __init__(
        self,
        models: Sequence[Model],
        *,
        hash_seed: int = 1337,
        max_claims: int = 0,
        max_placements: int = 1_048_576,
        max_index_bytes: int = 0,
        make_index: "Callable[[str, int], Index] | None" = None,
        discover: "Callable[[str], AnyTokenizer | None] | None" = None,
    ) -> None:
        """`discover` finds the tokenizer of a model that is known only by name; it may take seconds.

        `make_index` gives the index of a model by name and block size; without it, one of this process is made.
        """
        self._lock = threading.Lock()
        self._discover = discover
        self._make_index = make_index or (
            lambda _, size: Index(size, hash_seed, max_claims, max_placements, max_index_bytes)
        )
        self._models: Mapping[str, Model] = {model.name: model for model in models}
        self._names: Mapping[str, tuple[Model, str]] = _names(models)

    def resolve(self, name: str) -> tuple[Model, str]:
        """The model, and the LoRA name when `name` is an adapter's. NotFound when unknown."""
        try:
            return self._names[name]
        except KeyError:
            raise NotFound(f"model: {name!r} is neither configured nor seen") from None

    @property
    def names(self) -> Mapping[str, tuple[Model, str]]:
        """What `resolve` finds, by name; another object after every change, and never changed itself."""
        return self._names

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
            model = Model(name, self._make_index(name, block_size))
            self._put(model)
        if self._discover is not None:
            # The registration must not wait for it.
            threading.Thread(target=self._find_tokenizer, args=(name,), name="tokenizer", daemon=True).start()
        return model

    def _find_tokenizer(self, name: str) -> None:
        assert self._discover is not None
        tokenizer = self._discover(name)
        if tokenizer is not None:
            with self._lock:
                self._put(replace(self._models[name], tokenizer=tokenizer))

    def _put(self, model: Model) -> None:
        models = {**self._models, model.name: model}
        self._models = models
        self._names = _names(list(models.values()))

    def all(self) -> list[Model]:
        """Every model, in the order they became known."""
        return list(self._models.values())

    def tokenizers(self) -> dict[str, tuple[bool, bool]]:
        """Of every model with a tokenizer: whether it is encoded natively, and whether its texts are never cut."""
        return {
            each.name: (each.tokenizer.mode == "native", each.tokenizer.cuts == "nowhere")
            for each in self.all()
            if each.tokenizer is not None
        }


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
