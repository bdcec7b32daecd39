"""Brings chat messages and tools into the shape in which the engine hands them to a chat template.

The engine does not give the template the body as it came: it keeps known fields, joins or wraps content
parts, parses the arguments of tool calls, and fills the defaults of tools. Templates print some of it as
JSON, so order and nulls count.
"""

import json
from typing import Any

from kvindex_server.errors import InvalidArgument
from kvindex_server.tokenize.template import ContentFormat

_TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
_MEDIA_PARTS = {
    "image_url": "image",
    "input_image": "image",
    "image_embeds": "image",
    "audio_url": "audio",
    "input_audio": "audio",
    "audio_embeds": "audio",
    "video_url": "video",
}


def conversation(messages: Any, form: ContentFormat) -> list[dict[str, Any]]:
    """The messages for the template. InvalidArgument names the position, never the content."""
    if not isinstance(messages, list):
        raise InvalidArgument("chat", "messages is missing or not a list")
    if not messages:
        raise InvalidArgument("chat", "messages is empty")
    return [_message(message, f"messages[{index}]", form) for index, message in enumerate(messages)]


def _message(message: Any, where: str, form: ContentFormat) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidArgument("chat", f"{where} is not an object")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidArgument("chat", f"{where}.role is missing or not a string")
    result: dict[str, Any] = {"role": role, "content": _content(message.get("content"), where, form)}
    if role == "assistant":
        calls = _tool_calls(message.get("tool_calls"), where)
        if calls:
            result["tool_calls"] = calls
        reasoning = message.get("reasoning")
        if reasoning is None:
            reasoning = message.get("reasoning_content")
        if reasoning is not None:
            # Templates read it under any of these names; transformers sets the third.
            result |= {"reasoning": reasoning, "reasoning_content": reasoning, "thinking": reasoning}
    elif role == "tool" and message.get("tool_call_id") is not None:
        result["tool_call_id"] = message["tool_call_id"]
    elif role == "developer" and message.get("tools") is not None:
        result["tools"] = message["tools"]
    if isinstance(message.get("name"), str):
        result["name"] = message["name"]
    return result


def _content(content: Any, where: str, form: ContentFormat) -> str | list[Any]:
    parts: list[Any]
    if content is None:
        parts = []
    elif isinstance(content, str):
        parts = [content] if form == "string" else [{"type": "text", "text": content}]
    elif isinstance(content, list):
        read = (_part(part, f"{where}.content[{i}]", form) for i, part in enumerate(content))
        # Like the engine, leave out null text, and empty text where texts are joined.
        parts = [part for part in read if part]
    else:
        raise InvalidArgument("chat", f"{where}.content is neither a string nor a list")
    return "\n".join(parts) if form == "string" else parts


def _part(part: Any, where: str, form: ContentFormat) -> Any:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise InvalidArgument("chat", f"{where} is neither an object nor a string")
    kind = part.get("type")
    if not isinstance(kind, str):
        raise InvalidArgument("chat", f"{where}.type is missing or not a string")
    if kind in _TEXT_PARTS:
        text = part.get(_TEXT_PARTS[kind])
        if text is None and kind in {"text", "refusal"}:
            return None
        if not isinstance(text, str):
            raise InvalidArgument("chat", f"{where} has no text")
        return {"type": "text", "text": text} if form == "openai" else text
    if kind not in _MEDIA_PARTS:
        raise InvalidArgument("chat", f"{where}.type is not a known kind of content")
    if form == "string":
        raise InvalidArgument("chat", f"{where} is not text, and the model's chat template takes only text")
    return {"type": _MEDIA_PARTS[kind]}


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise InvalidArgument("chat", f"{where}.tool_calls is not a list")
    return [_tool_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        raise InvalidArgument("chat", f"{where}.function is missing or not an object")
    arguments = call["function"].get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise InvalidArgument("chat", f"{where}.function.arguments is not valid JSON") from None
    elif not isinstance(arguments, dict | list):
        raise InvalidArgument("chat", f"{where}.function.arguments is not a JSON string or an object")
    return {**call, "function": {**call["function"], "arguments": arguments}}


def tools_as_engine_sees(tools: Any) -> list[dict[str, Any]] | None:
    """Tools with the engine's field order and its nulls for what is absent; None without tools."""
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise InvalidArgument("chat", "tools is not a list")
    return [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)] or None


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
        raise InvalidArgument("chat", f"{where}.function is missing or not an object")
    function = tool["function"]
    if not isinstance(function.get("name"), str):
        raise InvalidArgument("chat", f"{where}.function.name is missing or not a string")
    known = {"name": function["name"], "description": function.get("description")}
    known["parameters"] = function.get("parameters")
    return {"type": "function", "function": known | function} | _extra_fields(tool)


def _extra_fields(tool: dict[str, Any]) -> dict[str, Any]:
    """Fields beside type and function: the engine keeps them, after its own."""
    return {name: value for name, value in tool.items() if name not in {"type", "function"}}
