"""Whether a server is as /openapi.json describes it, by many examples of what may be sent, and of what may not."""

from contextlib import contextmanager
from unittest import mock

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture.providers import HypothesisProvider
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import positive_data_acceptance

ENDLESS = ("/v1/events", "/v1/jobs/{id}/events", "/v1/sessions/{id}/view.mp4")
"""Their answers have no end; they have tests of their own."""

REFERRING = (
    "/v1/tasks",
    "/v1/tasks/video",
    "/v1/tasks/video/form",
    "/v1/jobs",
    "/v1/uploads",
    "/v1/sessions",
    "/v1/sessions/{id}/say",
    "/v1/sessions/{id}/set",
    "/v1/sessions/{id}/outputs",
)
"""What is sent there may be worded well and be refused: it names a file or a voice that is not there, or a place that
is not allowed."""

KNOWN = {"/v1/jobs": ("waits", "done"), "/v1/tasks": ("waits", "done"), "/v1/sessions": ("one",)}


def of_application(http):
    """The description of an application, to be called without a network."""
    schema = schemathesis.openapi.from_dict(http.openapi())
    schema.app = http
    return schema


def of_server(url):
    """That of a server."""
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


@contextmanager
def the_same_each_time():
    """Without what Hypothesis reads from the modules that happen to be loaded: they are others in each run."""
    with mock.patch.object(HypothesisProvider, "_maybe_draw_constant", return_value=None):
        yield


def found_wrong(schema, examples):
    """What does not keep to a description, out of so many examples for each operation, good ones and bad ones.

    Jobs "waits" and "done" and a session "one" should be there to be met.
    """
    wrong = {}
    operations = [found.ok() for found in schema.get_all_operations()]
    # What is deleted can be met no more.
    for operation in sorted(operations, key=lambda operation: operation.method == "delete"):
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
    if operation.path in REFERRING:
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
