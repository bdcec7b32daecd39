"""Compiles and renders chat templates in the sandbox that transformers defines for them.

The Jinja settings, filters and globals are those of `apply_chat_template`: a byte of difference in the text
is a different prompt, hence no match.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any, Literal, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from kvindex_server.errors import DeadlineExceeded, InvalidArgument, KvindexError

MAX_RENDERED_CHARS = 16 * 1024 * 1024
MAX_RENDER_SECONDS = 5.0

ContentFormat = Literal["string", "openai"]

_DICT_ATTRIBUTES = frozenset(dir(dict))
_TEMPLATE_OBJECTS = (LoopContext, Namespace)

_deadline = threading.local()


class _Refused(Exception):
    """`raise_exception` was called: the template itself refuses the conversation."""


class _Generation(Extension):
    """Accepts `{% generation %}…{% endgeneration %}`, which only marks text for training."""

    tags = {"generation"}  # noqa: RUF012 - the type that Jinja declares

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a deadline: loops that write nothing still call, or read attributes."""

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check_deadline()
        return super().call(context, obj, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        _check_deadline()
        # What the sandbox comes to for these after a long search; they are nearly all that a template reads.
        kind = type(obj)
        if kind is dict and attribute not in _DICT_ATTRIBUTES and attribute in obj:
            return obj[attribute]
        if kind in _TEMPLATE_OBJECTS and not attribute.startswith("_"):
            try:
                return getattr(obj, attribute)
            except AttributeError:
                pass
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _check_deadline()
        return super().getitem(obj, argument)


def _check_deadline() -> None:
    if time.monotonic() > getattr(_deadline, "at", float("inf")):
        if _deadline.is_callers:
            raise DeadlineExceeded("the deadline passed while the chat template was rendered")
        raise InvalidArgument("chat", "the chat template takes too long to render")


def _raise_exception(_message: object) -> NoReturn:
    # The message may quote the conversation, so it goes nowhere.
    raise _Refused


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Not Jinja's own filter, which escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], autoescape=False
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One compiled template; rendering is safe from many threads."""

    def __init__(self, source: str) -> None:
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self.content_format: ContentFormat = content_format(environment.parse(source))
        except TemplateError as error:
            raise InvalidArgument("tokenizer", f"the chat template does not compile: {error}") from None
        self.source = source

    def render(
        self,
        variables: Mapping[str, Any],
        *,
        max_chars: int = MAX_RENDERED_CHARS,
        max_seconds: float = MAX_RENDER_SECONDS,
        seconds: float = float("inf"),
    ) -> str:
        """The text, or InvalidArgument that names the cause but nothing of the conversation.

        `seconds` is what the caller's deadline leaves; DeadlineExceeded when they pass first.
        """
        chunks: list[str] = []
        size = 0
        _deadline.at = time.monotonic() + min(max_seconds, seconds)
        _deadline.is_callers = seconds < max_seconds
        try:
            for chunk in self._template.generate(dict(variables)):
                _check_deadline()
                size += len(chunk)
                if size > max_chars:
                    raise InvalidArgument("chat", f"the rendered text is longer than {max_chars} characters")
                chunks.append(chunk)
        except KvindexError:
            raise
        except _Refused:
            raise InvalidArgument("chat", "the chat template refuses this conversation") from None
        except Exception as error:  # noqa: BLE001 - a template can raise anything, and it is the request's fault
            reason = f"the chat template fails on this conversation ({type(error).__name__})"
            raise InvalidArgument("chat", reason) from None
        finally:
            del _deadline.at
        return "".join(chunks)


class _Unclear(Exception):
    """The template binds names in a way that the detection does not follow."""


def content_format(root: nodes.Template) -> ContentFormat:
    """Whether the template wants `message.content` as text, or loops over it as a list of parts.

    Follows the engine's rule: a `for` over the content of a message, where messages are what a `for` over
    `messages`, or over a variable assigned from it, yields. Anything else means text.
    """
    try:
        messages = _aliases(root, "messages")
        message_names = _loop_names(root, lambda node: any(_reads(node, name, None) for name in messages))
        parts = _loop_names(root, lambda node: any(_reads(node, name, "content") for name in message_names))
    except _Unclear:
        return "string"
    return "openai" if parts else "string"


def _aliases(root: nodes.Template, name: str) -> set[str]:
    names = {name}
    pending = [name]
    while pending:
        current = pending.pop()
        for assign in root.find_all(nodes.Assign):
            if not _reads(assign.node, current, None):
                continue
            alias = _bound_name(assign.target)
            if alias not in names:
                names.add(alias)
                pending.append(alias)
    return names


def _loop_names(root: nodes.Template, matches: Callable[[nodes.Node], bool]) -> set[str]:
    found: Iterator[nodes.For] = (loop for loop in root.find_all(nodes.For) if matches(loop.iter))
    return {_bound_name(loop.target) for loop in found}


def _bound_name(target: nodes.Node) -> str:
    if not isinstance(target, nodes.Name):
        raise _Unclear
    return target.name


def _reads(node: nodes.Node | None, name: str, key: str | None) -> bool:
    """Whether `node` is the variable (or its `key`), perhaps filtered, tested or sliced."""
    if isinstance(node, nodes.Filter | nodes.Test):
        return _reads(node.node, name, key)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _reads(node.node, name, key)
    if key is None:
        return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == key and _reads_name(node.node, name)
    return isinstance(node, nodes.Getattr) and node.attr == key and _reads_name(node.node, name)


def _reads_name(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name
