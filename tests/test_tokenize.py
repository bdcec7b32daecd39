"""Tokenizer directories load, and text encodes to the ids of the engine, as little-endian u32."""

import json
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from kvindex_server._core import block_keys
from kvindex_server.errors import FailedPrecondition, InvalidArgument
from kvindex_server.tokenize import Tokenizer, load_tokenizer

QWEN3 = Path(__file__).resolve().parents[2] / "shared" / "tokenizers" / "qwen3"
GOLDEN = Path(__file__).parent / "golden" / "chat_qwen3.json"
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


def small_tokenizer() -> FastTokenizer:
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    lines = ["the quick brown fox jumps over the lazy dog", "the cat sat on the mat", "what is the time"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(lines, trainer)
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return fast


@pytest.fixture(scope="module")
def fast() -> FastTokenizer:
    return small_tokenizer()


@pytest.fixture
def directory(tmp_path: Path, fast: FastTokenizer) -> Path:
    fast.save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, chat_template=TEMPLATE, bos_token={"content": "<s>"}, eos_token="</s>")
    return tmp_path


def write_config(directory: Path, **config: Any) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def ids(raw: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(raw) // 4}I", raw))


def chat(text: str = "hi", **fields: Any) -> str:
    return json.dumps({"messages": [{"role": "user", "content": text}], **fields})


def test_prompt_gets_the_special_tokens_of_the_post_processor(directory: Path, fast: FastTokenizer) -> None:
    tokenizer = load_tokenizer(directory)
    text = "the quick fox, naïve 漢字 🙂\n\n"
    assert ids(tokenizer.encode_prompt(text)) == fast.encode(text).ids
    assert ids(tokenizer.encode_prompt(text))[0] == 0
    assert ids(tokenizer.encode(text, False)) == fast.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode("", False) == b""


def test_chat_gets_only_what_the_template_writes(directory: Path, fast: FastTokenizer) -> None:
    tokenizer = load_tokenizer(directory)
    assert tokenizer.render_chat(chat("the cat")) == "<s><|user|>the cat"
    expected = [0, 2, *fast.encode("the cat", add_special_tokens=False).ids]
    assert ids(tokenizer.encode_chat(chat("the cat"))) == expected
    assert ids(tokenizer.encode_chat(chat("the cat").encode())) == expected


def test_a_chat_may_ask_for_the_special_tokens_of_the_post_processor(directory: Path, fast: FastTokenizer) -> None:
    """`add_special_tokens` of the body, which engines take."""
    tokenizer = load_tokenizer(directory)
    body = chat("the cat", add_special_tokens=True)
    expected = [0, 0, 2, *fast.encode("the cat", add_special_tokens=False).ids]
    assert ids(tokenizer.encode_chat(body)) == expected
    keyed = tokenizer.keys("chat", body, 2, 1337)
    assert (keyed.tokens, keyed.keys) == (len(expected), block_keys(tokenizer.encode_chat(body), 2))
    assert ids(tokenizer.encode_chat(chat("the cat", add_special_tokens=False))) == expected[1:]
    with pytest.raises(InvalidArgument, match="add_special_tokens is not true or false"):
        tokenizer.encode_chat(chat("the cat", add_special_tokens=1))


def test_truncation_and_padding_of_the_file_are_off(directory: Path) -> None:
    path = str(directory / "tokenizer.json")
    plain = ids(load_tokenizer(directory).encode_prompt("the quick brown fox " * 20))
    fast = FastTokenizer.from_file(path)
    fast.enable_truncation(5)
    fast.enable_padding(length=4096)
    fast.save(path)
    assert len(fast.encode("the quick brown fox " * 20).ids) == 4096
    assert ids(load_tokenizer(directory).encode_prompt("the quick brown fox " * 20)) == plain


def test_text_that_is_not_unicode_is_refused(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    with pytest.raises(InvalidArgument) as caught:
        tokenizer.encode_prompt("a\ud800b")
    assert (caught.value.field, "Unicode" in caught.value.reason) == ("prompt", True)
    with pytest.raises(InvalidArgument) as caught:
        tokenizer.encode_chat(chat("a\ud800b"))
    assert caught.value.field == "chat"


def test_many_threads_get_the_same_ids(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    expected = tokenizer.encode_chat(chat("the lazy dog " * 50))
    results: list[bytes] = []

    def work() -> None:
        for _ in range(20):
            results.append(tokenizer.encode_chat(chat("the lazy dog " * 50)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [expected] * 80


def rendered(directory: Path, **fields: Any) -> str:
    return load_tokenizer(directory).render_chat(chat(**fields))


def test_template_files_take_precedence_as_in_transformers(directory: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    write_config(directory, chat_template=[{"name": "default", "template": "list"}])
    assert rendered(directory) == "list"
    entries = [{"name": "default", "template": "list"}, {"name": "tool_use", "template": "list tools"}]
    write_config(directory, chat_template=entries)
    assert rendered(directory, tools=tools) == "list tools"
    write_config(directory, chat_template="config")
    (directory / "chat_template.json").write_text('{"chat_template": "processor"}')
    assert rendered(directory) == "processor"
    assert rendered(directory, tools=tools) == "config"
    (directory / "chat_template.jinja").write_text("file")
    assert rendered(directory) == "file"
    assert rendered(directory, tools=tools) == "file"
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("file tools")
    assert rendered(directory) == "file"
    assert rendered(directory, tools=tools) == "file tools"


def test_special_tokens_come_from_either_file(directory: Path) -> None:
    """As in transformers: the map wins, unless the configuration lists the added tokens."""
    (directory / "special_tokens_map.json").write_text('{"pad_token": "<pad>", "eos_token": "old"}')
    source = "{{ bos_token is defined }}{{ eos_token }}{{ pad_token }}"
    write_config(directory, chat_template=source, eos_token="</s>", bos_token=None)
    assert rendered(directory) == "Falseold<pad>"
    write_config(directory, chat_template=source, eos_token="</s>", added_tokens_decoder={})
    assert rendered(directory) == "False</s>"


def test_what_the_configuration_says_of_tokens_reaches_prompts_and_chats(directory: Path) -> None:
    before = load_tokenizer(directory)
    user = {"content": "<|user|>", "rstrip": True, "lstrip": False, "normalized": False, "single_word": False}
    write_config(
        directory,
        chat_template="{{ image_token }}{{ bos_token }}",
        bos_token="<s>",
        image_token="<img>",
        added_tokens_decoder={"2": {**user, "special": True}},
    )
    tokenizer = load_tokenizer(directory)
    assert (before.mode, tokenizer.mode) == ("native", "native")
    text = "the<img><|user|> \n"
    last = ids(before.encode("<|user|> \n", False))
    assert last[0] == 2 and len(last) > 1
    assert ids(tokenizer.encode(text, False)) == [*ids(before.encode("the", False)), first_new_id(directory), 2]
    assert tokenizer.render_chat(chat()) == "<img><s>"


def first_new_id(directory: Path) -> int:
    """The id that the first new token gets."""
    return FastTokenizer.from_file(str(directory / "tokenizer.json")).get_vocab_size()


def test_a_directory_without_config_serves_prompts_only(directory: Path) -> None:
    (directory / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(directory)
    assert tokenizer.encode_prompt("the cat")
    with pytest.raises(FailedPrecondition, match="no chat template"):
        tokenizer.encode_chat(chat())


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", "{}", "cannot be loaded"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "[]", "not a JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": {"content": 5}}}', "cannot be loaded"),
        ("tokenizer_config.json", '{"added_tokens_decoder": ["<s>"]}', "cannot be loaded"),
        ("tokenizer_config.json", '{"chat_template": 3}', "neither text nor named templates"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "neither text nor named templates"),
        ("chat_template.jinja", "{% if %}", "does not compile"),
    ],
)
def test_a_broken_file_is_named(directory: Path, name: str, content: str, reason: str) -> None:
    (directory / name).write_text(content)
    with pytest.raises(InvalidArgument, match=reason) as caught:
        load_tokenizer(directory)
    assert caught.value.field == "tokenizer"


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path / "none")


@pytest.fixture(scope="module")
def qwen3() -> Tokenizer:
    if not QWEN3.is_dir():
        pytest.skip("the Qwen3 tokenizer is not on this machine")
    return load_tokenizer(QWEN3)


def test_qwen3_chat_ids_equal_transformers(qwen3: Tokenizer) -> None:
    for case in json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]:
        body = json.dumps(case["body"])
        assert qwen3.render_chat(body) == case["text"], case["name"]
        assert ids(qwen3.encode_chat(body)) == case["ids"], case["name"]


def test_qwen3_prompt_ids(qwen3: Tokenizer) -> None:
    assert ids(qwen3.encode_prompt("Hello world")) == [9707, 1879]
