"""Rendered chats equal transformers.apply_chat_template, for every template at hand (needs transformers)."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers_at_hand import real

from kvindex_server.errors import KvindexError
from kvindex_server.tokenize import load_tokenizer, selftest
from kvindex_server.tokenize.chat import ChatTemplates
from kvindex_server.tokenize.conversation import conversation, tools_as_engine_sees
from kvindex_server.tokenize.template import ChatTemplate
from kvindex_server.tokenize.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a <place> & 'time'",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "é"}}},
    },
}
CALL = {"id": "123456789", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": " Hello <|im_end|> 🙂\n"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "é"}],
    "turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
        {"role": "user", "content": "c"},
    ],
    "reasoning": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "because"},
        {"role": "user", "content": "c"},
    ],
    "tools": [
        {"role": "user", "content": "Bonn?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "rain", "tool_call_id": "123456789"},
    ],
}
GOLDEN = Path(__file__).parent / "golden" / "chat_qwen3.jinja"


def templates() -> dict[str, tuple[str, dict[str, str]]]:
    """Source and special tokens by name."""
    found = {"golden_qwen3": (GOLDEN.read_text(encoding="utf-8"), {"eos_token": "<|im_end|>"})}
    for name, path in real().items():
        config = path.parent / "tokenizer_config.json"
        fields = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        special = {}
        for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = fields.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                special[key] = value
        source = fields.get("chat_template")
        if isinstance(source, str):
            found[name] = (source, special)
    return found


TEMPLATES = templates()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat", CONVERSATIONS)
@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": False}, {"enable_thinking": False}])
@pytest.mark.parametrize("with_tools", [False, True])
def test_a_rendered_chat_equals_transformers(name: str, chat: str, options: dict[str, bool], with_tools: bool) -> None:
    source, special = TEMPLATES[name]
    template = ChatTemplate(source)
    messages = conversation(CONVERSATIONS[chat], template.content_format)
    tools = tools_as_engine_sees([TOOL]) if with_tools else None
    variables = {"add_generation_prompt": True, **special, **options, "documents": None}
    try:
        expected = transformers.utils.chat_template_utils.render_jinja_template(
            conversations=[messages], tools=tools, chat_template=source, **variables
        )[0][0]
    except Exception:
        with pytest.raises(KvindexError):
            template.render({**variables, "messages": messages, "tools": tools})
        return
    assert template.render({**variables, "messages": messages, "tools": tools}) == expected


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("final", ["The answer is", " spaced out ", "é 🙂\n", "<think>\nhm\n</think>\n\nSo"])
def test_a_continued_message_equals_transformers(name: str, final: str) -> None:
    source, special = TEMPLATES[name]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": final}]
    body = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True}
    chat = ChatTemplates({"default": source}, special)
    try:
        expected = transformers.utils.chat_template_utils.render_jinja_template(
            conversations=[conversation(messages, ChatTemplate(source).content_format)],
            chat_template=source,
            continue_final_message=True,
            add_generation_prompt=False,
            tools=None,
            documents=None,
            **special,
        )[0][0]
    except Exception:
        with pytest.raises(KvindexError):
            chat.render(json.dumps(body))
        return
    assert chat.render(json.dumps(body)) == expected


@pytest.fixture(scope="module", params=real())
def engine(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Tokenizer]]:
    """A directory's tokenizer as transformers loads it, whatever class it names, and as we do."""
    directory = real()[request.param].parent
    yield transformers.AutoTokenizer.from_pretrained(str(directory)), load_tokenizer(directory)


def ids(raw: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(raw) // 4}I", raw))


def test_prompts_have_the_ids_of_transformers(engine: tuple[Any, Tokenizer]) -> None:
    theirs, ours = engine
    added = [each.content for each in theirs.added_tokens_decoder.values()][:64]
    for text in selftest.texts(500, added, 31):
        assert ids(ours.encode_prompt(text)) == theirs(text).input_ids
        assert ids(ours.encode(text, False)) == theirs(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("chat", CONVERSATIONS)
@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": False}, {"chat_template_kwargs": {"a": 1}}])
@pytest.mark.parametrize("with_tools", [False, True])
def test_chats_have_the_ids_of_transformers(
    engine: tuple[Any, Tokenizer], chat: str, options: dict[str, Any], with_tools: bool
) -> None:
    theirs, ours = engine
    if not isinstance(theirs.chat_template, str):
        pytest.skip("no chat template, or several")
    messages = conversation(CONVERSATIONS[chat], ChatTemplate(theirs.chat_template).content_format)
    body = {"messages": CONVERSATIONS[chat], **options, **({"tools": [TOOL]} if with_tools else {})}
    try:
        expected = theirs.apply_chat_template(
            messages,
            tools=tools_as_engine_sees([TOOL]) if with_tools else None,
            add_generation_prompt=options.get("add_generation_prompt", True),
            return_dict=False,
            **options.get("chat_template_kwargs", {}),
        )
    except Exception:
        with pytest.raises(KvindexError):
            ours.encode_chat(json.dumps(body))
        return
    assert ids(ours.encode_chat(json.dumps(body))) == expected
