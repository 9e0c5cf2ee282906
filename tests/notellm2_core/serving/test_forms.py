"""Notes as forms: the routes see the JSON of the same note, or nothing."""

import base64
import json
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from notellm2_core.serving.forms import Forms, form_of
from notellm2_core.serving.guard import MAX_BODY_BYTES, Guard
from notellm2_core.serving.keys import Keys
from notellm2_core.serving.requests import NewNote
from tests.support.released import png


@pytest.fixture(scope="module")
def client() -> TestClient:
    """Of an application that answers what it was sent."""
    app = FastAPI()
    app.add_middleware(Forms)
    app.add_middleware(Guard, keys=Keys())

    @app.post("/notes")
    @app.put("/notes/x")
    @app.post("/recall")
    async def echo(request: Request) -> dict[str, Any]:
        return {"type": request.headers["content-type"], "body": (await request.body()).decode()}

    return TestClient(app, base_url="http://127.0.0.1")


def form(*parts: tuple[str, bytes], end: bytes = b"--B--\r\n") -> dict[str, Any]:
    """The options of a request with these parts: their headers after the name, and their content."""
    head = 'Content-Disposition: form-data; name="'
    body = b"".join(b"--B\r\n" + (head + name).encode() + b"\r\n\r\n" + value + b"\r\n" for name, value in parts)
    return {"content": body + end, "headers": {"Content-Type": "multipart/form-data; boundary=B"}}


def test_a_form_is_the_json_of_its_note(client: TestClient) -> None:
    data = {"note_id": "x", "title": "Grüße", "topics": ["red", "tea"], "version": "3", "exclude": "n1"}
    for answer in (
        client.post("/notes", data=data, files={"image": ("p.png", png(1), "image/png")}),
        client.put("/notes/x", data=data, files={"image": png(1)}),
    ):
        assert answer.json()["type"] == "application/json"
        assert json.loads(answer.json()["body"]) == {
            "note_id": "x", "title": "Grüße", "topics": ["red", "tea"], "version": 3, "exclude": ["n1"],
            "image": base64.b64encode(png(1)).decode(),
        }  # fmt: skip


def test_what_is_not_a_number_stays_a_text(client: TestClient) -> None:
    """The route then refuses it as it does in JSON. A picture that nobody chose is none."""
    answer = client.post("/notes", **form(('k"', b"1e3"), ('min_seq"', "٣".encode()), ('image"; filename=""', b"")))
    assert json.loads(answer.json()["body"]) == {"k": "1e3", "min_seq": "٣"}


def test_other_bodies_pass(client: TestClient) -> None:
    for path, options in (("/notes", {"json": {"a": 1}}), ("/recall", form(('title"', b"x")))):
        sent = client.post(path, **options).json()
        assert sent["type"] == ("application/json" if path == "/notes" else "multipart/form-data; boundary=B")


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (form(('title"', b"\xff")), 422, "title: it is not UTF-8"),
        (
            form(('\xff"', b"x")) | {"content": form(('title"', b"x"))["content"].replace(b"title", b"\xff")},
            422,
            "UTF-8",
        ),
        (form(('title"', b"x"), ('title"', b"y")), 422, "title: it is there twice"),
        (form(('image"', b"x"), ('image"', b"y")), 422, "image: it is there twice"),
        (form(('title"', b"x"), end=b""), 400, "it ends early"),
        (form(('title"', b"x")) | {"headers": {"Content-Type": "multipart/form-data"}}, 400, "No boundary"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=B"}}, 400, "cannot be read"),
        (form(*[('topics"', b"x")] * 11_000), 400, "more than 10200 parts"),
        (form(("", b"x")) | {"content": b"--B\r\n\r\nx\r\n--B--\r\n"}, 400, "Field name not found"),
        (form(('image"', b"x" * MAX_BODY_BYTES)), 413, "too large"),
    ],
)
def test_what_is_no_form_of_a_note_is_refused(
    client: TestClient, options: dict[str, Any], status: int, said: str
) -> None:
    answer = client.post("/notes", **options)
    assert answer.status_code == status and said in answer.json()["detail"], answer.text
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_body_that_does_not_say_how_large_it_is(client: TestClient) -> None:
    head = form(('image"', b""), end=b"")
    parts = iter([head["content"][:-2], *[bytes(1 << 20)] * 25])
    assert client.post("/notes", content=parts, headers=head["headers"]).status_code == 413


def test_the_description_names_the_fields() -> None:
    schema = form_of(NewNote)["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert schema["properties"]["image"]["format"] == "binary" and schema["required"] == ["note_id"]
    assert set(schema["properties"]) == set(NewNote.model_fields)
