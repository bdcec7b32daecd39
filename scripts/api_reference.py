"""Writes docs/api.md from the proto files and their comments; with --write in place, else to stdout."""

import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2 as descriptors
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
FILES = ("kvindex/v1/kvindex.proto", "indexer/v1/indexer.proto")
PAGE = ROOT / "docs" / "api.md"
HEAD = """# API reference

Made from the comments in the proto files by `python scripts/api_reference.py --write`; do not edit.

The server answers gRPC reflection, so `grpcurl -plaintext HOST:PORT describe` shows the same of a running server.
`INVALID_ARGUMENT` names the field and the reason, `NOT_FOUND` means a model that nobody configured or registered,
`UNAVAILABLE` a server that is not ready, `RESOURCE_EXHAUSTED` a limit that was met (with the time after which to try
again), and `DEADLINE_EXCEEDED` is answered as soon as the deadline has passed.
"""

Field = descriptors.FieldDescriptorProto
SERVICE, MESSAGE, ENUM, METHOD, FIELD, VALUE = 6, 4, 5, 2, 2, 2
"""Numbers by which a descriptor names the path to a comment."""


def page() -> str:
    """The whole page."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "set.pb"
        arguments = ["", f"-I{ROOT / 'proto'}", "--include_source_info", f"--descriptor_set_out={out}", *FILES]
        if protoc.main(arguments):
            raise SystemExit("protoc failed")
        found = descriptors.FileDescriptorSet.FromString(out.read_bytes())
    return "\n".join([HEAD, *(line for file in found.file for line in _file(file))]).rstrip() + "\n"


def _file(file: Any) -> Iterator[str]:
    comments = {tuple(place.path): " ".join(place.leading_comments.split()) for place in file.source_code_info.location}
    yield f"## {file.package}\n"
    for number, service in enumerate(file.service):
        yield f"### {file.package}.{service.name}\n"
        yield from _comment(comments, SERVICE, number)
        yield "| RPC | request | response | what |\n| --- | --- | --- | --- |"
        for place, method in enumerate(service.method):
            what = comments.get((SERVICE, number, METHOD, place), "")
            asked = ("stream of " if method.client_streaming else "") + _link(method.input_type, file.package)
            given = ("stream of " if method.server_streaming else "") + _link(method.output_type, file.package)
            yield f"| `{method.name}` | {asked} | {given} | {_cell(what)} |"
        yield ""
    for number, message in enumerate(file.message_type):
        yield f"### {file.package}.{message.name}\n"
        yield from _comment(comments, MESSAGE, number)
        if not message.field:
            yield "No fields.\n"
            continue
        yield "| no. | field | type | what |\n| --- | --- | --- | --- |"
        entries = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
        for place, field in enumerate(message.field):
            what = comments.get((MESSAGE, number, FIELD, place), "")
            if field.HasField("oneof_index") and not field.proto3_optional:
                what = f"One of `{message.oneof_decl[field.oneof_index].name}`. {what}".strip()
            yield f"| {field.number} | `{field.name}` | {_type(field, entries, file.package)} | {_cell(what)} |"
        yield ""
    for number, enum in enumerate(file.enum_type):
        yield f"### {file.package}.{enum.name}\n"
        yield from _comment(comments, ENUM, number)
        yield "| no. | value | what |\n| --- | --- | --- |"
        for place, value in enumerate(enum.value):
            what = comments.get((ENUM, number, VALUE, place), "")
            yield f"| {value.number} | `{value.name}` | {_cell(what)} |"
        yield ""


def _comment(comments: Mapping[tuple[int, ...], str], *path: int) -> Iterator[str]:
    if comments.get(path):
        yield comments[path] + "\n"


def _type(field: Any, entries: Mapping[str, Any], package: str) -> str:
    entry = entries.get(field.type_name.rsplit(".", 1)[-1])
    if entry is not None:
        key, value = (_type(each, {}, package) for each in entry.field)
        return f"map of {key} to {value}"
    if field.type in (Field.TYPE_MESSAGE, Field.TYPE_ENUM):
        name = _link(field.type_name, package)
    else:
        name = Field.Type.Name(field.type).removeprefix("TYPE_").lower()
    if field.label == Field.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def _link(type_name: str, package: str) -> str:
    name = type_name.rsplit(".", 1)[-1]
    return f"[{name}](#{_anchor(package, name)})"


def _anchor(package: str, name: str) -> str:
    return f"{package}{name}".replace(".", "").lower()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
