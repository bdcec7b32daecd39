"""What the configuration says of tokens changes the tokenizer as transformers lets it; nothing else changes."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers_at_hand import byte_level

from kvindex_server.tokenize import declared
from kvindex_server.tokenize.chat import ChatTemplates
from kvindex_server.tokenize.tokenizer import Tokenizer

SOURCE = byte_level().to_str()
FIRST_NEW = FastTokenizer.from_str(SOURCE).get_vocab_size()
END = FastTokenizer.from_str(SOURCE).token_to_id("<|end|>")
PLAIN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
TEXT = "a <A> <B>  the quick old <C> <D> x <s>  <|end|> \n b"


def completed(
    config: dict[str, Any],
    special_tokens_map: dict[str, Any] | None = None,
    added_tokens: dict[str, int] | None = None,
) -> FastTokenizer:
    fast = FastTokenizer.from_str(SOURCE)
    declared.complete(fast, declared.merged(config, special_tokens_map or {}, added_tokens))
    return fast


def added(fast: FastTokenizer) -> dict[int, str]:
    return {number: repr(token) for number, token in fast.get_added_tokens_decoder().items()}


def named(config: dict[str, Any], special_tokens_map: dict[str, Any] | None = None) -> dict[str, str]:
    return declared.named_tokens(declared.merged(config, special_tokens_map or {}))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken", **PLAIN}, "pad_token": None},
        {"added_tokens_decoder": {str(END): {"content": "<|end|>", **PLAIN}}, "extra_special_tokens": ["<|user|>"]},
        {"add_bos_token": True, "model_max_length": 5, "extra_special_tokens": None},
    ],
)
def test_what_the_file_has_already_changes_nothing(config: dict[str, Any]) -> None:
    assert completed(config).to_str() == SOURCE


def test_flags_of_the_configuration_count() -> None:
    fast = completed({"added_tokens_decoder": {str(END): {"content": "<|end|>", **PLAIN, "rstrip": True}}})
    assert fast.encode("a<|end|> \n b").ids == [*fast.encode("a").ids, END, *fast.encode("b").ids]


def test_missing_tokens_get_ids_in_the_order_that_transformers_adds_them() -> None:
    fast = completed(
        {
            "image_token": "<img>",
            "pad_token": "<pad>",
            "additional_special_tokens": ["<x>", "<s>", "<y>"],
            "added_tokens_decoder": {"1000": {"content": "<b>", **PLAIN}, "999": {"content": "<a>", **PLAIN}},
        }
    )
    order = ("<a>", "<b>", "<pad>", "<img>", "<x>", "<y>")
    assert [fast.token_to_id(each) for each in order] == list(range(FIRST_NEW, FIRST_NEW + len(order)))
    assert all(fast.get_added_tokens_decoder()[fast.token_to_id(each)].special for each in order)


def test_templates_get_every_named_token() -> None:
    config = {
        "bos_token": None,
        "eos_token": {"content": "</s>"},
        "image_token": "<img>",
        "add_bos_token": True,
        "extra_special_tokens": {"video_token": "<video>"},
    }
    assert named(config) == {"eos_token": "</s>", "image_token": "<img>", "video_token": "<video>"}
    assert named({"extra_special_tokens": ["<x>"], "model_specific_special_tokens": {"boi_token": "<b>"}}) == {
        "boi_token": "<b>"
    }


def test_the_map_counts_only_where_no_added_tokens_are_listed() -> None:
    special = {"eos_token": {"content": "<map>", "rstrip": True}, "image_token": "<other>"}
    config = {"eos_token": "</s>", "image_token": "<img>"}
    assert named(config, special) == {"eos_token": "<map>", "image_token": "<img>"}
    token = completed(config, special).get_added_tokens_decoder()[FIRST_NEW]
    assert (token.content, token.rstrip, token.special) == ("<map>", True, True)
    assert named({**config, "added_tokens_decoder": {}}, special) == config


def test_a_list_apart_counts_where_the_configuration_has_none() -> None:
    listed = {"<late>": 2000, "<pad>": 1000, "<other end>": END}
    fast = completed({"pad_token": "<pad>"}, None, listed)
    tokens = fast.get_added_tokens_decoder()
    assert [tokens[FIRST_NEW + at].content for at in range(2)] == ["<pad>", "<late>"]
    assert [(tokens[FIRST_NEW + at].special, tokens[FIRST_NEW + at].normalized) for at in range(2)] == [
        (True, False),
        (False, True),
    ]
    assert tokens[END].content == "<|end|>"
    assert completed({"added_tokens_decoder": {}}, None, listed).to_str() == SOURCE


def test_special_tokens_may_be_split_like_text() -> None:
    plain, split = completed({}), completed({"split_special_tokens": True})
    assert split.encode("a<s>b").ids != plain.encode("a<s>b").ids
    tested = Tokenizer(split, ChatTemplates({}, {}), self_test_texts=50)
    assert (tested.mode, tested.cuts) == ("reference", "nowhere")
    assert tested.reason == "special tokens that are split like text"
    text = "a<s>b<|user|> c<|end|>"
    for special in (False, True):
        ids = split.encode(text, add_special_tokens=special).ids
        assert tested.encode(text, special) == struct.pack(f"<{len(ids)}I", *ids)


CONTENTS = ("<s>", "</s>", "<|user|>", "<|end|>", "<A>", "<B>", "the", "quick", "<C>", "old", "<D> x")
TEMPLATE = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ image_token }}|{{ boi_token }}"


def random_config(rng: random.Random) -> tuple[dict[str, Any], dict[str, Any] | None]:
    def token(content: str, **more: str) -> dict[str, Any]:
        return {"content": content, **{name: rng.random() < 0.3 for name in PLAIN}, **more}

    def value() -> Any:
        content = rng.choice(CONTENTS)
        return rng.choice((content, content, None, token(content, __type="AddedToken")))

    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    names = ["bos_token", "eos_token", "pad_token", "unk_token", "image_token", "boi_token"]
    config |= {name: value() for name in rng.sample(names, rng.randrange(5))}
    if rng.random() < 0.5:
        listed = rng.sample(CONTENTS, rng.randrange(5))
        known = FastTokenizer.from_str(SOURCE).token_to_id
        numbers = [known(each) or rng.randrange(900, 1000) for each in listed]
        config["added_tokens_decoder"] = {str(at): token(each) for at, each in zip(numbers, listed, strict=True)}
    config |= rng.choice(
        (
            {},
            {"extra_special_tokens": rng.sample(CONTENTS, 2)},
            {"additional_special_tokens": rng.sample(CONTENTS, 2)},
            {"extra_special_tokens": {"boi_token": rng.choice(CONTENTS), "zz_token": rng.choice(CONTENTS)}},
            {"model_specific_special_tokens": {"boi_token": rng.choice(CONTENTS)}},
        )
    )
    if rng.random() < 0.6:
        return config, None
    special: dict[str, Any] = {"eos_token": rng.choice(CONTENTS), "image_token": rng.choice(CONTENTS)}
    special["pad_token"] = {name: each for name, each in token("<A>").items() if name != "special"}
    return config, special | rng.choice(({}, {"additional_special_tokens": rng.sample(CONTENTS, 2)}))


def random_list(rng: random.Random) -> dict[str, int] | None:
    """added_tokens.json, which few have."""
    if rng.random() < 0.5:
        return None
    numbers = rng.sample([*range(FIRST_NEW - 8, FIRST_NEW + 8), 990, END], 3)
    return dict(zip(rng.sample(CONTENTS, 3), numbers, strict=True))


def test_all_of_it_equals_transformers(tmp_path: Path) -> None:
    """Added tokens with their ids and flags, the ids of a text, and what a template sees, for random configurations."""
    transformers = pytest.importorskip("transformers")
    rng = random.Random(1)
    (tmp_path / "tokenizer.json").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    for _ in range(80):
        config, special = random_config(rng)
        config |= rng.choice(({}, {}, {"split_special_tokens": True}))
        listed = random_list(rng)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
        if special is not None:
            (tmp_path / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
        (tmp_path / "added_tokens.json").unlink(missing_ok=True)
        if listed is not None:
            (tmp_path / "added_tokens.json").write_text(json.dumps(listed), encoding="utf-8")
        engine = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
        fast = completed(config, special, listed)
        assert added(fast) == {number: repr(token) for number, token in engine.added_tokens_decoder.items()}
        assert fast.encode(TEXT).ids == engine(TEXT).input_ids
        messages = [{"role": "user", "content": "hi"}]
        templates = ChatTemplates({"default": TEMPLATE}, named(config, special))
        body = {"messages": messages, "add_generation_prompt": False}
        assert templates.render(json.dumps(body)) == engine.apply_chat_template(messages, tokenize=False)
