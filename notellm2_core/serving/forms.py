"""Notes as forms (multipart/form-data), which `curl -F image=@cat.jpg` sends: their routes see them as JSON.

A part named `image` holds the bytes of the picture; the other parts are texts in UTF-8. Topics and excluded ids are
parts that may be repeated.
"""

import asyncio
import base64
import logging
import re
from typing import Any

import msgspec
from pydantic import BaseModel
from python_multipart import create_form_parser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from notellm2_core.serving.guard import MAX_BODY_BYTES
from notellm2_core.serving.problems import problem
from notellm2_core.serving.requests import MAX_EXCLUDED, MAX_TOPICS

_PATHS = ("/notes", "/similar")
_FORM = b"multipart/form-data"
_LISTS, _NUMBERS, _PICTURE = ("topics", "exclude"), ("version", "k", "min_seq"), "image"
_MOST_PARTS = MAX_EXCLUDED + MAX_TOPICS + 100
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # the caller is told what is wrong with the form


class Forms:
    """An ASGI application that sees JSON in place of a form of a note, with the picture in base64."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = _content_type(scope)
        if kind is None:
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.to_thread(_as_json, kind, await _whole(receive))
        except HTTPException as e:  # of the guard, which counts the bytes
            await problem(e.status_code, e.detail)(scope, receive, send)
            return
        except FormParserError as e:
            await problem(400, f"the form cannot be read: {e}")(scope, receive, send)
            return
        except ValueError as e:
            await problem(422, str(e))(scope, receive, send)
            return
        headers = [(k, v) for k, v in scope["headers"] if k not in (b"content-type", b"content-length")]
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return messages.pop() if messages else await receive()

        headers.append((b"content-type", b"application/json"))
        await self._app({**scope, "headers": headers}, replayed, send)


def form_of(model: type[BaseModel]) -> dict[str, Any]:
    """What a route's description says in addition: its body may also be a form."""
    schema = model.model_json_schema()
    properties = schema["properties"]
    for name in properties.keys() & set(_LISTS):  # one part is a text, several are a list
        properties[name] = {"anyOf": [properties[name], properties[name]["items"]]}
    properties[_PICTURE] = {"type": "string", "format": "binary", "description": "The bytes of the picture."}
    return {"requestBody": {"content": {_FORM.decode(): {"schema": schema}}}}


def _content_type(scope: Scope) -> bytes | None:
    """The content type of a form of a note, with its boundary; None: it is something else."""
    if scope["type"] != "http" or scope["method"] not in ("POST", "PUT") or not scope["path"].startswith(_PATHS):
        return None
    kind: bytes = dict(scope["headers"]).get(b"content-type", b"")
    return kind if kind.partition(b";")[0].strip().lower() == _FORM else None


async def _whole(receive: Receive) -> bytes:
    parts, is_more = [], True
    while is_more:
        message = await receive()
        parts.append(message.get("body", b""))
        is_more = message.get("more_body", False)
    return b"".join(parts)


def _as_json(kind: bytes, body: bytes) -> bytes:
    return msgspec.json.encode(_content(kind, body))


def _content(kind: bytes, body: bytes) -> dict[str, Any]:
    """What JSON of the same note holds.

    Raises FormParserError for what is no form, and ValueError for a part that is not UTF-8 or is there twice.
    """
    parts: list[tuple[bytes, bytes]] = []
    is_whole = False

    def end() -> None:
        nonlocal is_whole
        is_whole = True

    def add(name: bytes | None, value: bytes) -> None:
        if len(parts) == _MOST_PARTS:
            raise FormParserError(f"it has more than {_MOST_PARTS} parts")
        parts.append((name or b"", value))

    def add_field(field: Field) -> None:
        add(field.field_name, field.value or b"")

    def add_file(file: File) -> None:
        file.file_object.seek(0)
        add(file.field_name, file.file_object.read())

    config = {"MAX_MEMORY_FILE_SIZE": MAX_BODY_BYTES}
    parser = create_form_parser({"Content-Type": kind}, add_field, add_file, config=config)
    parser.on_end = end
    parser.write(body)
    parser.finalize()
    if not is_whole:
        raise FormParserError("it ends early")
    return _named(parts)


def _named(parts: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name_bytes, value in parts:
        name = _text(name_bytes, "a name")
        if name in _LISTS:
            content.setdefault(name, []).append(_text(value, name))
        elif name in content:
            raise ValueError(f"{name}: it is there twice")
        elif name == _PICTURE:
            content[name] = base64.b64encode(value).decode()
        else:
            text = _text(value, name)
            is_number = name in _NUMBERS and re.fullmatch("-?[0-9]{1,20}", text)
            content[name] = int(text) if is_number else text
    if content.get(_PICTURE) == "":  # a browser's form in which none was chosen
        del content[_PICTURE]
    return content


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{name}: it is not UTF-8") from None
