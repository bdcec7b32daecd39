"""Chat bodies render to the text of transformers and the engine, and bad ones fail without an echo."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from kvindex_server.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument
from kvindex_server.tokenize.chat import ChatTemplates
from kvindex_server.tokenize.template import ChatTemplate

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "chat_qwen3.json").read_text(encoding="utf-8"))["cases"]
QWEN3 = (GOLDEN / "chat_qwen3.jinja").read_text(encoding="utf-8")

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
PARTS = (
    "{% for m in messages %}[{{ m['role'] }}]{% for p in m['content'] %}"
    "{% if p.type == 'text' %}{{ p.text }}{% else %}<{{ p.type }}>{% endif %}{% endfor %}{% endfor %}"
)
SECRET = "hunter2"


def render(source: str, body: dict[str, Any], **special: str) -> str:
    return ChatTemplates({"default": source}, special).render(json.dumps(body))


def user(content: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **fields}


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_qwen3_text_equals_transformers(case: dict[str, Any]) -> None:
    templates = ChatTemplates({"default": QWEN3}, {"eos_token": "<|im_end|>"})
    assert templates.render(json.dumps(case["body"])) == case["text"]
    assert templates.render(json.dumps(case["body"]).encode()) == case["text"]


def test_blocks_are_trimmed_as_transformers_does() -> None:
    source = "{% for m in messages %}\n    {% if m.content %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n"
    assert render(source, user("a")) == "a\n"


def test_tojson_neither_escapes_html_nor_unicode() -> None:
    source = "{{ documents | tojson }} {{ documents | tojson(indent=1) }}"
    body = user(documents=[{"t": "<é & 'ü'>"}])
    assert render(source, body) == '[{"t": "<é & \'ü\'>"}] [\n {\n  "t": "<é & \'ü\'>"\n }\n]'


def test_generation_tag_and_loop_controls_are_known() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    body = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}
    assert render(source, body) == "a"


def test_strftime_now_gives_the_date() -> None:
    assert render("{{ strftime_now('%Y') }}", user()) in {
        time.strftime("%Y"),
        str(int(time.strftime("%Y")) - 1),
    }


def test_special_tokens_and_kwargs_reach_the_template() -> None:
    source = "{{ bos_token }}{{ color }}{{ reasoning_effort }}{{ pad_token is defined }}"
    body = user(chat_template_kwargs={"color": "red", "reasoning_effort": "low"}, reasoning_effort="high")
    assert render(source, body, bos_token="<s>") == "<s>redhighFalse"
    assert render("{{ bos_token }}", user(chat_template_kwargs={"bos_token": "!"}), bos_token="<s>") == "!"


def test_generation_prompt_is_on_unless_switched_off() -> None:
    assert render(PLAIN, user()) == "[user]hi>"
    assert render(PLAIN, user(add_generation_prompt=False)) == "[user]hi"
    assert render(PLAIN, user(chat_template_kwargs={"add_generation_prompt": False})) == "[user]hi>"


def test_tools_and_documents_are_none_when_absent_or_empty() -> None:
    source = "{{ tools is none }} {{ documents is none }}"
    assert render(source, user()) == "True True"
    assert render(source, user(tools=[], documents=None)) == "True True"


def test_tools_have_the_order_and_the_nulls_of_the_engine() -> None:
    tool = {"function": {"strict": True, "name": "f"}, "type": "function"}
    assert json.loads(render("{{ tools | tojson }}", user(tools=[tool]))) == [
        {
            "type": "function",
            "function": {"name": "f", "description": None, "parameters": None, "strict": True},
        }
    ]
    assert render("{{ tools | tojson }}", user(tools=[tool])).startswith(
        '[{"type": "function", "function": {"name": "f", "description": null, "parameters": null'
    )


def test_tools_choose_the_tool_use_template() -> None:
    templates = ChatTemplates({"default": "plain", "tool_use": "tools"}, {})
    assert templates.render(json.dumps(user())) == "plain"
    assert templates.render(json.dumps(user(tools=[{"function": {"name": "f"}}]))) == "tools"


def test_arguments_of_tool_calls_are_parsed() -> None:
    source = "{% for c in messages[0].tool_calls %}{{ c.function.arguments | tojson }};{% endfor %}"
    calls = [{"function": {"name": "f", "arguments": value}} for value in ('{"b":1,"a":2}', "", None, {"x": 1})]
    body = {"messages": [{"role": "assistant", "tool_calls": calls}]}
    assert render(source, body) == '{"b": 1, "a": 2};{};{};{"x": 1};'
    empty = {"messages": [{"role": "assistant", "content": "", "tool_calls": []}]}
    assert render("{{ messages[0].tool_calls is defined }}", empty) == "False"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (PLAIN, "string"),
        (QWEN3, "string"),
        (PARTS, "openai"),
        ("{% for m in messages %}{% for p in m.content %}{% endfor %}{% endfor %}", "openai"),
        ("{% for m in messages[1:] %}{% for p in m.content | list %}{% endfor %}{% endfor %}", "openai"),
        ("{% set x = messages %}{% for m in x %}{% for p in m.content %}{% endfor %}{% endfor %}", "openai"),
        ("{% set a = messages %}{% set b = a %}{% set a = b %}{% for m in b %}{% endfor %}", "string"),
        ("{% for m in messages %}{% for p in m.other %}{% endfor %}{% endfor %}", "string"),
        ("{% for i, m in messages %}{% for p in m.content %}{% endfor %}{% endfor %}", "string"),
    ],
)
def test_content_format_is_read_off_the_template(source: str, expected: str) -> None:
    assert ChatTemplate(source).content_format == expected


def test_parts_stay_a_list_for_a_template_that_loops_over_them() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": SECRET}}]
    assert render(PARTS, user(parts)) == "[user]a<image>"
    assert render(PARTS, user("text")) == "[user]text"
    assert render(PARTS, {"messages": [{"role": "assistant", "content": None}]}) == "[assistant]"


def test_continue_final_message_cuts_inside_the_last_part() -> None:
    body = user([{"type": "text", "text": "a"}], add_generation_prompt=False, continue_final_message=True)
    assert render(PARTS + "<end>", body) == "[user]a"


BAD_BODIES: list[tuple[Any, str]] = [
    ("{", "not valid JSON"),
    (b"\xff\xfe\x00", "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ([], "not a JSON object"),
    ({}, "messages is missing"),
    ({"messages": {}}, "messages is missing"),
    ({"messages": []}, "messages is empty"),
    ({"messages": [SECRET]}, "messages[0] is not an object"),
    ({"messages": [{"content": SECRET}]}, "messages[0].role"),
    ({"messages": [{"role": 3, "content": SECRET}]}, "messages[0].role"),
    (user(3), "messages[0].content is neither"),
    (user([3]), "messages[0].content[0] is neither"),
    (user([{"text": SECRET}]), "messages[0].content[0].type"),
    (user([{"type": "text", "text": 3}]), "messages[0].content[0] has no text"),
    (user([{"type": SECRET}]), "not a known kind"),
    (user([{"type": "image_url", "image_url": {"url": SECRET}}]), "takes only text"),
    (user(tools={}), "tools is not a list"),
    (user(tools=[SECRET]), "tools[0].function"),
    (user(tools=[{"function": {"name": 1}}]), "tools[0].function.name"),
    (user(documents=[SECRET]), "documents is not"),
    (user(add_generation_prompt="yes"), "add_generation_prompt is not"),
    (user(continue_final_message=1), "continue_final_message is not"),
    (user(continue_final_message=True), "needs add_generation_prompt to be false"),
    (user(chat_template="{{ messages }}"), "chat_template in a request"),
    (user(chat_template_kwargs={"chat_template": SECRET}), "may not hold chat_template"),
    (user(chat_template_kwargs=[]), "chat_template_kwargs is not"),
    ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "tool_calls is not a list"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "tool_calls[0].function"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": SECRET}}]}]},
        "arguments is not valid JSON",
    ),
]


@pytest.mark.parametrize(("body", "reason"), BAD_BODIES)
def test_bad_bodies_are_named_without_their_content(body: Any, reason: str) -> None:
    raw = body if isinstance(body, str | bytes) else json.dumps(body)
    with pytest.raises(InvalidArgument) as caught:
        ChatTemplates({"default": PLAIN}, {}).render(raw)
    assert caught.value.field == "chat"
    assert reason in caught.value.reason
    assert SECRET not in caught.value.message


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('no ' + messages[0].content) }}", "refuses"),
        ("{{ messages[0].content.nothing.at_all }}", "UndefinedError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(messages) }}", "RecursionError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ range(10000000) | list }}", "OverflowError"),
    ],
)
def test_what_a_template_raises_is_told_without_the_content(source: str, reason: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        render(source, user(SECRET))
    assert caught.value.field == "chat"
    assert reason in caught.value.reason
    assert SECRET not in caught.value.message
    assert caught.value.__cause__ is None


def test_a_template_that_drops_the_final_message_cannot_continue_it() -> None:
    body = user(SECRET, add_generation_prompt=False, continue_final_message=True)
    for source in ("{{ messages[0].role }} content", "{{ messages[0].role }}"):
        with pytest.raises(InvalidArgument, match="continue") as caught:
            render(source, body)
        assert SECRET not in caught.value.message


def test_rendered_text_is_bounded() -> None:
    template = ChatTemplate("{% for i in range(99999) %}{{ text }}{% endfor %}")
    with pytest.raises(InvalidArgument, match="longer than 1000"):
        template.render({"text": "x" * 100}, max_chars=1000)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}",
    ],
)
def test_endless_templates_meet_a_deadline(source: str) -> None:
    template = ChatTemplate(source)
    start = time.monotonic()
    with pytest.raises(InvalidArgument, match="too long"):
        template.render({}, max_seconds=0.05, max_chars=10**12)
    assert time.monotonic() - start < 5
    with pytest.raises(InvalidArgument, match="too long"):
        template.render({}, max_seconds=0.01, max_chars=10**12)
    assert ChatTemplate("{{ x.y }}").render({"x": {"y": 1}}) == "1"


def test_without_a_template_the_remedy_is_told() -> None:
    with pytest.raises(FailedPrecondition, match=r"chat_template\.jinja"):
        ChatTemplates({}, {}).render(json.dumps(user()))
    with pytest.raises(FailedPrecondition, match="default"):
        ChatTemplates({"rag": "x"}, {}).render(json.dumps(user()))


def test_a_template_that_does_not_compile_fails_at_load() -> None:
    with pytest.raises(InvalidArgument, match="does not compile") as caught:
        ChatTemplates({"default": "{% for %}"}, {})
    assert caught.value.field == "tokenizer"


def test_cheap_attribute_reads_are_those_of_the_sandbox() -> None:
    """Loop and namespace variables, and keys that are also methods of dict, come as the sandbox gives them."""
    source = (
        "{% set ns = namespace(last='', n=0) %}"
        "{% for m in messages %}{{ loop.index0 }}{{ loop.first }}{{ loop.nextitem is defined }}{{ loop.nosuch }}"
        "{% set ns.last = m.role %}{% set ns.n = ns.n + 1 %}{{ m.nosuch is defined }}{{ m.items is callable }}"
        "{% endfor %}{{ ns.last }}{{ ns.n }}{{ ns.nosuch is defined }}"
    )
    body = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert render(source, body) == "0TrueTrueFalseTrue1FalseFalseFalseTrueassistant2False"
    for private in ("loop._iterable", "loop.__class__", "ns.__class__", "m.__class__", "loop.cycle.__globals__"):
        hidden = "{% set ns = namespace(n=0) %}{% for m in messages %}{{ " + private + ".x }}{% endfor %}"
        with pytest.raises(InvalidArgument, match=r"SecurityError|UndefinedError"):
            render(hidden, body)


def test_the_callers_deadline_ends_rendering() -> None:
    loops = "{% for a in range(9999) %}{% for b in range(9999) %}{{ a.real }}{% endfor %}{% endfor %}"
    templates = ChatTemplates({"default": loops}, {})
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        templates.render(json.dumps(user()), 0.05)
    assert time.monotonic() - started < 2
