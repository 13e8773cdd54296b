"""The description at /openapi.json is true: whatever may be sent by it is answered as it says."""

import asyncio
import json

import pytest
import schemathesis
from http_app import client_of, make_app, picture, sound
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import positive_data_acceptance

from service.commands import OpenSession, SubmitJob
from service.http import make_http

ENDLESS = ("/v1/events", "/v1/jobs/{id}/events", "/v1/sessions/{id}/view.mp4")
"""Their answers have no end; they have tests of their own."""

NEED_FILES = (
    "/v1/tasks",
    "/v1/tasks/video",
    "/v1/tasks/video/form",
    "/v1/jobs",
    "/v1/uploads",
    "/v1/sessions",
    "/v1/sessions/{id}/set",
    "/v1/sessions/{id}/outputs",
)
"""What is sent there may be worded well and be refused: it names a file that is not there, or a place not allowed."""

KNOWN = {"/v1/jobs": ("waits", "done"), "/v1/tasks": ("waits", "done"), "/v1/sessions": ("one",)}


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


def found_wrong(http, examples):
    """What does not keep to the description, out of so many examples for each operation, good ones and bad ones."""
    schema = schemathesis.openapi.from_dict(http.openapi())
    schema.app = http
    wrong = {}
    for operation in [found.ok() for found in schema.get_all_operations()]:
        if operation.path not in ENDLESS:
            takes = [operation.body, operation.path_parameters, operation.query, operation.headers]
            modes = GenerationMode if any(len(list(each)) for each in takes) else (GenerationMode.POSITIVE,)
            for mode in modes:
                look_at(operation, mode, examples, wrong)
    return wrong


def look_at(operation, mode, examples, wrong):
    known = next((ids for start, ids in KNOWN.items() if operation.path.startswith(f"{start}/{{id}}")), ())
    # "Not now" is no error of a server.
    without = [schemathesis.checks.not_a_server_error]
    if operation.path in NEED_FILES:
        without.append(positive_data_acceptance)

    @seed(20)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    @given(operation.as_strategy(generation_mode=mode), st.data())
    def keeps_to_it(case, data):
        if known and mode is GenerationMode.POSITIVE and data.draw(st.booleans()):
            case.path_parameters["id"] = data.draw(st.sampled_from(known))
        answer = case.call(headers={"Host": "localhost"})
        assert answer.status_code < 500 or answer.status_code == 503, answer.text
        try:
            case.validate_response(answer, excluded_checks=without)
        except FailureGroup as failures:
            for failure in failures.exceptions:
                told = f"{failure}\n{case.as_curl_command()}\n{answer.status_code} {answer.text[:500]}"
                wrong.setdefault((operation.label, type(failure).__name__), told)

    keeps_to_it()


async def test_nothing_is_otherwise_than_described(app):
    """A few examples of each."""
    await check(app, 3)


@pytest.mark.slow
async def test_nothing_out_of_many_is_otherwise_than_described(app):
    """Five minutes."""
    await check(app, 150)


async def check(app, examples):
    await with_something_in_it(app)
    # It brings loops of its own.
    wrong = await asyncio.to_thread(found_wrong, make_http(app), examples)
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
