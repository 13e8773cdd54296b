"""The description at /openapi.json is true: whatever may be sent by it is answered as it says."""

import asyncio
import json

import pytest
from described import found_wrong, of_application, the_same_each_time
from http_app import client_of, make_app, picture, sound

from service.commands import OpenSession, SubmitJob
from service.http import make_http


@pytest.fixture
def app(tmp_path):
    return make_app(tmp_path, "sessions.limit=64", "jobs.queue=1000000")


async def with_something_in_it(app):
    """Jobs, a session and files that can be met."""
    audio = await app.inputs.keep(parts(sound()), "audio")
    await app.inputs.keep(parts(picture()), "image")
    for id in ("waits", "done"):
        await app.jobs.submit(SubmitJob.model_validate({"id": id, "audio": {"upload": audio.name}}))
    app.jobs.complete("done")
    await app.sessions.open(OpenSession.model_validate({"id": "one"}))


async def parts(data):
    yield data


async def test_nothing_is_otherwise_than_described(app):
    """A few examples of each, the same in every run."""
    with the_same_each_time():
        await check(app, 3)


@pytest.mark.slow
async def test_nothing_out_of_many_is_otherwise_than_described(app):
    """Five minutes."""
    await check(app, 150)


async def check(app, examples):
    await with_something_in_it(app)
    # It brings loops of its own.
    wrong = await asyncio.to_thread(found_wrong, of_application(make_http(app)), examples)
    assert not wrong, "\n\n".join(f"{place}: {told}" for place, told in wrong.items())
    assert not any(status == 500 for _, _, status in app.metrics.requests)


async def test_every_route_is_described_with_what_it_may_answer(app):
    described = make_http(app).openapi()
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], path
            assert operation["tags"], path
            assert operation.get("description"), f"{method} {path} says nothing of itself"
            if path in ("/livez", "/readyz"):
                continue
            assert {"401", "403", "429", "503"} <= set(operation["responses"]), path
            for status, answer in operation["responses"].items():
                assert answer["description"], (path, status)
                assert "HTTPValidationError" not in json.dumps(answer), (path, status)


async def test_tokens_are_described_where_there_are_some(app, tmp_path):
    assert "securitySchemes" not in make_http(app).openapi()["components"]
    described = make_http(make_app(tmp_path, tokens=True)).openapi()
    assert described["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    assert described["paths"]["/livez"]["get"]["security"] == []
    assert described["paths"]["/v1/jobs"]["post"]["security"] == [{"token": []}]


async def test_the_description_is_served(app):
    async with client_of(make_http(app)) as client:
        answer = await client.get("/openapi.json")
        assert answer.status_code == 200
        assert "/v1/tasks/video" in answer.json()["paths"]
