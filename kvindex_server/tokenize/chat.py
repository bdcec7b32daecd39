"""Renders an OpenAI chat-completions body to the text that the engine would prefill for it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvindex_server.errors import FailedPrecondition, InvalidArgument
from kvindex_server.tokenize.conversation import conversation, tools_as_engine_sees
from kvindex_server.tokenize.template import ChatTemplate

_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "

# Given by the body itself, or untrusted: a template from a request would run on our side.
_REFUSED_KWARGS = frozenset({"chat_template", "tokenize", "tools", "messages", "conversation"})


@dataclass(frozen=True, slots=True)
class Rendered:
    """A chat as the engine tokenizes it; the template writes the special tokens, unless the body asks for more."""

    text: str
    add_special_tokens: bool


class ChatTemplates:
    """The templates of one model (most have one, `default`) and its special tokens."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._templates = {name: ChatTemplate(source) for name, source in sources.items()}
        self._special_tokens = dict(special_tokens)

    @property
    def available(self) -> bool:
        """Whether there is a template at all."""
        return bool(self._templates)

    def render(self, body: str | bytes, seconds: float = float("inf")) -> str:
        """The prompt text alone, as `rendered`."""
        return self.rendered(body, seconds).text

    def rendered(self, body: str | bytes, seconds: float = float("inf")) -> Rendered:
        """The prompt of a chat-completions body. InvalidArgument never quotes the body.

        DeadlineExceeded when `seconds` pass, which are what the caller's deadline leaves.
        """
        request = _parse(body)
        if request.get("chat_template") is not None:
            raise InvalidArgument("chat", "chat_template in a request is not accepted")
        tools = tools_as_engine_sees(request.get("tools"))
        template = self._choose(has_tools=tools is not None)
        messages = conversation(request.get("messages"), template.content_format)
        documents = _documents(request.get("documents"))
        generate = _flag(request, "add_generation_prompt", default=True)
        resume = _flag(request, "continue_final_message", default=False)
        if generate and resume:
            raise InvalidArgument(
                "chat", "continue_final_message needs add_generation_prompt to be false, as in the engine"
            )
        variables = {
            **self._special_tokens,
            **_template_kwargs(request),
            "messages": messages,
            "tools": tools,
        }
        variables["add_generation_prompt"] = generate
        # The engine gives the template `documents` in any case, and the body's win over the kwargs'.
        variables["documents"] = documents if documents is not None else variables.get("documents")
        special = _flag(request, "add_special_tokens", default=False)
        if not resume:
            return Rendered(template.render(variables, seconds=seconds), special)
        return Rendered(_render_resumed(template, variables, messages[-1], seconds), special)

    def _choose(self, *, has_tools: bool) -> ChatTemplate:
        if not self._templates:
            raise FailedPrecondition(
                "chat: the model's tokenizer directory has no chat template; add chat_template.jinja to it"
            )
        if has_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        try:
            return self._templates["default"]
        except KeyError:
            raise FailedPrecondition("chat: none of the model's chat templates is named default") from None


def _parse(body: str | bytes) -> dict[str, Any]:
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidArgument("chat", "not valid JSON") from None
    if not isinstance(request, dict):
        raise InvalidArgument("chat", "not a JSON object")
    return request


def _flag(request: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = request.get(name, default)
    if not isinstance(value, bool):
        raise InvalidArgument("chat", f"{name} is not true or false")
    return value


def _documents(documents: Any) -> list[dict[str, Any]] | None:
    if documents is None:
        return None
    if not isinstance(documents, list) or not all(isinstance(each, dict) for each in documents):
        raise InvalidArgument("chat", "documents is not a list of objects")
    return documents


def _template_kwargs(request: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = request.get("chat_template_kwargs")
    if kwargs is None:
        kwargs = {}
    if not isinstance(kwargs, dict):
        raise InvalidArgument("chat", "chat_template_kwargs is not an object")
    refused = sorted(_REFUSED_KWARGS & kwargs.keys())
    if refused:
        raise InvalidArgument("chat", f"chat_template_kwargs may not hold {refused[0]}")
    # The flag is not a template variable: the body's own field decides.
    kwargs = {name: value for name, value in kwargs.items() if name != "continue_final_message"}
    if request.get("reasoning_effort") is not None:
        kwargs["reasoning_effort"] = request["reasoning_effort"]
    return kwargs


def _render_resumed(template: ChatTemplate, variables: dict[str, Any], final: dict[str, Any], seconds: float) -> str:
    """The text up to the end of the final message: a tag marks the place, and is cut with what follows."""
    if "content" not in template.source:
        raise InvalidArgument("chat", "the chat template cannot continue a message")
    content = final["content"]
    if isinstance(content, str):
        text = content
        final["content"] = content + _CONTINUE_TAG
    else:
        part = next((each for each in reversed(content) if "text" in each), None)
        if part is None:
            raise InvalidArgument("chat", "the final message has no text to continue")
        text = part["text"]
        part["text"] = text + _CONTINUE_TAG
    rendered = template.render(variables, seconds=seconds)
    at = rendered.rfind(_CONTINUE_TAG.strip())
    if at < 0 or text.strip() not in rendered:
        raise InvalidArgument("chat", "the chat template does not keep the final message to continue")
    if rendered.startswith(_CONTINUE_TAG, at):
        return rendered[:at]
    # The template trims the message, so the blanks before the tag would have been trimmed too.
    return rendered[:at].rstrip()
