"""Jobs, uploads, events, probes, the page, and the door they all lie behind: without a network."""

import asyncio
import json

import pytest
from http_app import BASE, bearer, client_of, make_app, picture, sound
from waiting import until_async

from service.http import make_http

HELLO = {"audio": {"upload": "x"}}


@pytest.fixture
def app(tmp_path):
    return make_app(tmp_path)


@pytest.fixture
async def client(app):
    async with client_of(make_http(app)) as client:
        yield client


async def upload(client, data=None, kind="audio"):
    answer = await client.post("/v1/uploads", params={"kind": kind, "name": "a.wav"}, content=data or sound())
    assert answer.status_code == 201, answer.text
    return answer.json()


async def all_heard(app):
    """Wait until somebody listens, and has taken all that was told."""
    await until_async(lambda: app.hub._listeners and not any(listener._waiting for listener in app.hub._listeners))
    await asyncio.sleep(0)


async def submit(client, **fields):
    answer = await client.post("/v1/jobs", json={"audio": await upload(client), **fields})
    assert answer.status_code == 201, answer.text
    return answer.json()


def events(text):
    """[(event, data)] of server-sent events."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


# Jobs


async def test_a_job_is_taken_and_told_as_it_stands(client, app):
    answer = await client.post(
        "/v1/jobs", json={"id": "one", "audio": await upload(client), "prompt": "smiles", "seed": 7}
    )
    assert (answer.status_code, answer.headers["location"]) == (201, "/v1/jobs/one")
    job = answer.json()
    assert (job["id"], job["state"], job["seed"], job["prompt"]) == ("one", "queued", 7, "smiles")
    assert (await client.get("/v1/jobs/one")).json() == job
    assert app.jobs.jobs["one"].origin == {"trigger": "http"}


async def test_the_same_job_again_is_the_same_job_and_another_of_its_id_is_refused(client):
    body = {"id": "one", "audio": await upload(client)}
    assert (await client.post("/v1/jobs", json=body)).status_code == 201
    assert (await client.post("/v1/jobs", json=body)).status_code == 200
    other = await client.post("/v1/jobs", json={**body, "seed": 5})
    assert (other.status_code, other.json()) == (409, {"detail": "job one: there is another one of this id"})


async def test_an_idempotency_key_is_the_id(client):
    body = {"audio": await upload(client)}
    key = {"Idempotency-Key": "mine"}
    assert (await client.post("/v1/jobs", json=body, headers=key)).json()["id"] == "mine"
    assert (await client.post("/v1/jobs", json=body, headers=key)).status_code == 200
    both = await client.post("/v1/jobs", json={**body, "id": "other"}, headers=key)
    assert (both.status_code, both.json()["detail"]) == (422, "id and Idempotency-Key: differ; give one of them")


async def test_jobs_are_listed_page_by_page_newest_first(client):
    for number in range(5):
        await submit(client, id=f"job-{number}")
    first = (await client.get("/v1/jobs", params={"limit": 3})).json()
    assert [job["id"] for job in first["jobs"]] == ["job-4", "job-3", "job-2"]
    rest = (await client.get("/v1/jobs", params={"limit": 3, "after": first["next"]})).json()
    assert ([job["id"] for job in rest["jobs"]], rest["next"]) == (["job-1", "job-0"], None)
    assert (await client.get("/v1/jobs", params={"state": "failed"})).json() == {"jobs": [], "next": None}


async def test_a_job_is_cancelled_and_stays_so(client):
    await submit(client, id="one")
    assert (await client.delete("/v1/jobs/one")).json()["state"] == "cancelled"
    assert (await client.delete("/v1/jobs/one")).json()["state"] == "cancelled"
    assert (await client.delete("/v1/jobs/two")).status_code == 404


async def test_a_result_is_told_and_given(client, app):
    await submit(client, id="one")
    early = await client.get("/v1/jobs/one/result")
    assert (early.status_code, early.json()["detail"]) == (409, "job one: is queued, and has no result")
    app.jobs.complete("one", b"video", name="folder/a b.mp4")
    told = (await client.get("/v1/jobs/one")).json()["result"]
    assert (told["url"], told["name"], told["bytes"]) == ("/v1/jobs/one/result", "folder/a b.mp4", 5)
    answer = await client.get(told["url"])
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"video", "video/mp4")
    assert answer.headers["content-disposition"] == "attachment; filename*=utf-8''a%20b.mp4"


RANGES = [
    ("bytes=0-3", 206, b"0123", "bytes 0-3/1000"),
    ("bytes=990-", 206, b"0123456789", "bytes 990-999/1000"),
    ("bytes=-5", 206, b"56789", "bytes 995-999/1000"),
    ("bytes=998-5000", 206, b"89", "bytes 998-999/1000"),
    ("bytes=1000-", 416, b"", "bytes */1000"),
    ("bytes=-0", 416, b"", "bytes */1000"),
    ("bytes= 0 - 3", 206, b"0123", "bytes 0-3/1000"),
    # What is no range of bytes counts as none, and several do.
    ("bytes=0-1,5-6", 200, None, None),
    ("bytes=5-3", 200, None, None),
    ("bytes=a-b", 200, None, None),
    ("bytes=", 200, None, None),
    ("items=0-3", 200, None, None),
    ("bytes=" + ",".join(["0-1"] * 200), 200, None, None),
]


async def test_ranges_are_ranges(client, app):
    await submit(client, id="one")
    app.jobs.complete("one")
    for asked, status, body, told in RANGES:
        answer = await client.get("/v1/jobs/one/result", headers={"Range": asked})
        assert (answer.status_code, answer.headers.get("content-range")) == (status, told), asked
        assert answer.content == (body if body is not None else b"0123456789" * 100), asked
        assert int(answer.headers["content-length"]) == len(answer.content), asked


async def test_if_range_gives_the_whole_file_when_it_has_changed(client, app):
    await submit(client, id="one")
    path = app.jobs.complete("one")
    tag = (await client.head("/v1/jobs/one/result")).headers["etag"]
    asked = {"Range": "bytes=0-3", "If-Range": tag}
    assert (await client.get("/v1/jobs/one/result", headers=asked)).status_code == 206
    path.write_bytes(b"another")
    answer = await client.get("/v1/jobs/one/result", headers=asked)
    assert (answer.status_code, answer.content) == (200, b"another")


async def test_head_tells_what_get_would_send(client, app):
    await submit(client, id="one")
    app.jobs.complete("one")
    answer = await client.head("/v1/jobs/one/result", headers={"Range": "bytes=0-3"})
    assert (answer.status_code, answer.content) == (200, b"")
    assert (answer.headers["content-length"], answer.headers["accept-ranges"]) == ("1000", "bytes")


async def test_a_result_that_is_gone_is_not_found(client, app):
    await submit(client, id="one")
    app.jobs.complete("one").unlink()
    assert (await client.get("/v1/jobs/one/result")).status_code == 404


# What is refused, and how


WRONG = [
    ({}, "give audio or text, one of them"),
    ({"audio": "a.wav", "imgae": "b"}, "imgae: unknown; did you mean image?"),
    ({"audio": "a.wav", "zzzzz": "b"}, "zzzzz: unknown; /openapi.json lists what there is"),
    ({"audio": {"path": "a", "url": "http://b"}}, "audio: give one of path, url, data, upload"),
    ({"text": "a", "seed": "secret"}, "seed: input should be a valid integer"),
    ({"text": "a", "seed": 1.5}, "seed: input should be a valid integer"),
    ({"text": "a", "id": "../x"}, "id: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$'"),
    ([], "input should be a valid dictionary or object to extract fields from"),
    ({"text": "\ud800"}, "text: input should be a valid string, unable to parse raw data as a unicode string"),
]

NO_JSON = [
    (b"{", 422),
    (b"\xff\xfe", 422),
    (b"\xff{}", 400),
    (b"[" * 200_000, 400),
    (b'{"text": NaN}', 422),
    (b"", 422),
    (b"null", 422),
]


async def test_what_is_wrong_is_said_in_one_line_without_the_value(client):
    for body, detail in WRONG:
        answer = await client.post("/v1/jobs", content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()) == (422, {"detail": detail})


async def test_a_body_that_is_no_json_is_refused(client):
    for body, status in NO_JSON:
        answer = await client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == status, answer.text
        assert isinstance(answer.json()["detail"], str)


async def test_what_is_not_sent_as_json_is_none(client):
    answer = await client.post("/v1/jobs", content=b'{"text": "a"}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 422


async def test_intake_that_is_paused_says_so_and_when_to_come_back(client, app):
    app.jobs.paused = "the disk is full"
    answer = await client.post("/v1/jobs", json={"audio": await upload(client)})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")
    assert answer.json() == {"detail": "no job is taken: the disk is full"}


async def test_a_path_outside_the_roots_and_a_private_address_are_forbidden(client):
    for source in ("/etc/passwd", "http://127.0.0.1:1/x.wav", "file:///etc/passwd"):
        answer = await client.post("/v1/jobs", json={"audio": source})
        assert answer.status_code == 403, (source, answer.text)


async def test_an_unknown_address_and_an_unknown_method_are_told_as_json(client):
    answer = await client.get("/nothing")
    assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})
    answer = await client.put("/v1/jobs/one")
    assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE, GET")
    answer = await client.patch("/v1/jobs/one/result")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


async def test_a_bug_is_told_without_its_insides_and_rises(app, monkeypatch, caplog):
    async def broken(id):
        raise ZeroDivisionError("insides")

    monkeypatch.setattr(app.jobs, "get", broken)
    async with client_of(make_http(app), raise_app_exceptions=False) as client:
        answer = await client.get("/v1/jobs/one")
    assert (answer.status_code, answer.json()) == (500, {"detail": "a bug in the server; its log says more"})
    async with client_of(make_http(app)) as client:
        with pytest.raises(ZeroDivisionError):
            await client.get("/v1/jobs/one")
    assert app.metrics.requests == [("/v1/jobs/{id}", "GET", 500)] * 2
    assert [record.getMessage() for record in caplog.records if record.exc_info] == [
        "/v1/jobs/{id}: failed by a bug"
    ] * 2


# Uploads


async def test_an_upload_is_kept_and_can_be_named(client, app):
    image, audio = await upload(client, picture(), "image"), await upload(client)
    assert (await client.post("/v1/jobs", json={"image": image, "audio": audio})).status_code == 201
    again = await upload(client)
    assert again == audio


async def test_an_upload_that_is_no_picture_is_refused(client):
    answer = await client.post("/v1/uploads", params={"kind": "image", "name": "a.png"}, content=b"no picture")
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("a.png: ")
    assert (await client.post("/v1/uploads", params={"kind": "film"}, content=b"x")).status_code == 422


async def test_a_body_over_the_limit_is_refused_before_it_is_read(tmp_path):
    app = make_app(tmp_path, "http.max_json_mb=0.1", "http.max_body_mb=0.2")
    read = 0

    async def body():
        nonlocal read
        for _ in range(1000):
            read += 10_000
            yield bytes(10_000)

    async with client_of(make_http(app)) as client:
        told = await client.post("/v1/jobs", content=bytes(100_001), headers={"Content-Type": "application/json"})
        assert told.status_code == 413
        assert told.json()["detail"] == "the body is larger than 0.1 MB; /v1/uploads takes larger pictures and sounds"
        # Not announced.
        answer = await client.post("/v1/jobs", content=body(), headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
        answer = await client.post("/v1/uploads?kind=audio", content=body())
        assert (answer.status_code, answer.json()["detail"]) == (413, "the body is larger than 0.2 MB")


# Events


async def test_events_of_a_job_begin_with_how_it_stands_and_end_with_it(client, app):
    await submit(client, id="one")
    reading = asyncio.create_task(client.get("/v1/jobs/one/events"))
    await all_heard(app)
    app.hub.tell("job", "two", "progress", frames=1)
    app.jobs.change("one", state="running")
    await all_heard(app)
    app.jobs.change("one", "progress", frames=12, total_frames=25)
    await all_heard(app)
    app.jobs.complete("one")
    found = events((await reading).text)
    assert [what for what, _ in found] == ["queued", "running", "progress", "completed"]
    assert found[2][1] == {"id": "one", "state": "running", "frames": 12, "total_frames": 25}
    assert found[3][1]["result"]["url"] == "/v1/jobs/one/result"
    assert not app.hub._listeners


async def test_events_of_a_job_that_has_ended_are_one(client, app):
    await submit(client, id="one")
    app.jobs.complete("one")
    answer = await client.get("/v1/jobs/one/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert [what for what, _ in events(answer.text)] == ["completed"]
    assert (await client.get("/v1/jobs/two/events")).status_code == 404


async def test_a_listener_that_missed_the_end_is_told_of_it(client, app):
    await submit(client, id="one")
    reading = asyncio.create_task(client.get("/v1/jobs/one/events"))
    await all_heard(app)
    app.jobs.complete("one")
    for _ in range(300):
        app.hub.tell("job", "two", "progress")
    assert [what for what, _ in events((await reading).text)] == ["queued", "completed"]


async def test_all_events_are_told_of_the_kinds_that_are_wanted(app):
    http = make_http(app)
    async with client_of(http) as client:
        reading = asyncio.create_task(client.get("/v1/events", params={"kind": ["job", "daemon"]}))
        await all_heard(app)
        for number in range(300):
            app.hub.tell("session" if number % 2 else "job", "a", "progress", frames=number)
        await all_heard(app)
        app.hub.tell("daemon", "", "stopping")
        await asyncio.sleep(0)
        http.state.ending.set()
        found = events((await reading).text)
    assert [what for what, _ in found] == ["job"] * 128 + ["daemon"]
    assert found[0][1]["missed"] == 44
    assert all("missed" not in body for _, body in found[1:])


# Probes and the page


@pytest.mark.parametrize("state", ["loading", "restarting", "ended"])
async def test_it_is_ready_when_the_model_is_warm_and_not_when_it_is_down(client, app, state):
    assert (await client.get("/readyz")).json() == {"ready": True, "engine": "ready", "intake": "open"}
    app.engine.state = state
    answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()["engine"]) == (503, state)
    assert (await client.get("/livez")).json() == {"status": "ok"}


async def test_with_intake_paused_it_is_ready_and_says_so(client, app):
    app.jobs.paused = "the disk is full"
    answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()["intake"]) == (200, "the disk is full")


async def test_what_there_is_is_told(client):
    told = (await client.get("/v1/status")).json()
    assert (told["model"], told["voice"], told["scopes"]) == ("pocket", False, ["admin", "jobs", "live", "read"])
    assert (await client.get("/metrics")).text.startswith("# HELP avatard_up")


async def test_requests_are_measured_by_route_and_not_by_address(client, app):
    await client.get("/v1/jobs/secret-id")
    await client.get("/nothing/secret")
    await client.get("/livez")
    assert app.metrics.requests == [("/v1/jobs/{id}", "GET", 404), ("other", "GET", 404), ("/livez", "GET", 200)]


async def test_the_page_runs_nothing_but_its_own_scripts(client):
    answer = await client.get("/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = await client.get("/", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["../http.py", "..%2fhttp.py", "http.py", "%2e%2e/__init__.py", "", "index.html/"])
async def test_beside_the_page_nothing_is_shown(client, name):
    answer = await client.get(f"/page/{name}")
    assert answer.status_code == (200 if name == "index.html/" else 404)
    assert b"import" not in answer.content or name == "index.html/"


async def test_without_a_page_there_is_none(tmp_path):
    async with client_of(make_http(make_app(tmp_path, "http.page=false"))) as client:
        assert (await client.get("/")).status_code == 404


# The door


async def test_a_slash_at_the_end_makes_no_difference(client):
    assert (await client.get("/v1/jobs/")).status_code == 200


async def test_without_tokens_only_the_names_of_this_machine_are_answered(client):
    for host, status in {
        "localhost:8000": 200,
        "[::1]:8000": 200,
        "127.0.0.5": 200,
        "page.localhost": 200,
        "evil.example": 403,
        "127.0.0.1.evil.example": 403,
        "localhost.evil.example:8000": 403,
        "192.168.0.7": 403,
        "": 403,
    }.items():
        assert (await client.get("/v1/jobs", headers={"Host": host})).status_code == status, host


async def test_the_public_name_is_answered(tmp_path):
    async with client_of(make_http(make_app(tmp_path, "http.public_url=https://avatar.example/"))) as client:
        headers = {"Host": "avatar.example", "Origin": "https://avatar.example"}
        assert (await client.post("/v1/sessions", json={}, headers=headers)).status_code == 201


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:9999", "http://localhost.evil", "x"]
)
async def test_a_page_of_another_site_changes_nothing(client, app, origin):
    answer = await client.post("/v1/sessions", json={}, headers={"Origin": origin})
    assert answer.status_code == 403
    assert not app.sessions.sessions
    own = await client.post("/v1/sessions", json={}, headers={"Origin": BASE})
    assert own.status_code == 201


SCOPES = [
    ("GET", "/v1/jobs", "read"),
    ("GET", "/v1/jobs/one", "read"),
    ("GET", "/v1/jobs/one/result", "read"),
    ("GET", "/v1/jobs/one/events", "read"),
    ("POST", "/v1/jobs", "jobs"),
    ("DELETE", "/v1/jobs/one", "jobs"),
    ("GET", "/v1/sessions", "read"),
    ("POST", "/v1/sessions", "live"),
    ("DELETE", "/v1/sessions/one", "live"),
    ("POST", "/v1/sessions/one/interrupt", "live"),
    ("POST", "/v1/sessions/one/say", "live"),
    ("POST", "/v1/sessions/one/set", "live"),
    ("POST", "/v1/sessions/one/outputs", "live"),
    ("DELETE", "/v1/sessions/one/outputs/x", "live"),
    ("GET", "/v1/sessions/one/view.mp4", "read"),
    ("GET", "/v1/sessions/one/hls/index.m3u8", "read"),
    ("GET", "/v1/tasks/", "read"),
    ("POST", "/v1/tasks/video/", "jobs"),
    ("DELETE", "/v1/tasks/one", "jobs"),
    ("DELETE", "/v1/tasks/all/running", "jobs"),
    ("GET", "/v1/tasks/one/result", "read"),
    ("GET", "/v1/files/download/a.mp4", "read"),
    ("GET", "/v1/service/status", "read"),
    ("GET", "/v1/status", "read"),
    ("GET", "/metrics", "read"),
]
BODIES = {
    "/v1/jobs": {"text": "a"},
    "/v1/sessions/one/say": {"text": "a"},
    "/v1/sessions/one/set": {"prompt": "a"},
    "/v1/sessions/one/outputs": {"target": "rtmp://1.1.1.1/a/b"},
}


async def test_every_route_asks_for_its_scope(tmp_path):
    async with client_of(make_http(make_app(tmp_path, tokens=True))) as client:

        async def status(method, path, headers):
            answer = await client.request(method, path, headers=headers, json=BODIES.get(path, {}))
            return answer.status_code

        for method, path, scope in SCOPES:
            for wrong in ({}, {"Authorization": "Bearer wrong-token-0123456789"}, {"Authorization": "Basic cmVhZDp4"}):
                assert await status(method, path, wrong) == 401, (method, path)
            for name in ("read", "jobs", "live", "admin"):
                allowed = name in (scope, "admin") or scope == "read"
                assert (await status(method, path, bearer(name)) == 403) is not allowed, (method, path, name)


async def test_uploads_are_for_who_makes_jobs_or_goes_on_air(tmp_path):
    async with client_of(make_http(make_app(tmp_path, tokens=True))) as client:
        for name, status in {"read": 403, "jobs": 201, "live": 201, "admin": 201}.items():
            answer = await client.post("/v1/uploads?kind=audio", content=sound(), headers=bearer(name))
            assert answer.status_code == status


async def test_a_stranger_is_turned_away_before_anything_is_read(tmp_path):
    async def body():
        raise AssertionError("read")
        yield b""

    async with client_of(make_http(make_app(tmp_path, tokens=True))) as client:
        answer = await client.post("/v1/jobs", content=body(), headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer realm="avatard"')


async def test_probes_and_the_page_need_no_token(tmp_path):
    async with client_of(make_http(make_app(tmp_path, tokens=True))) as client:
        for path in ("/livez", "/readyz", "/health", "/openapi.json", "/"):
            assert (await client.get(path)).status_code == 200, path


async def test_who_asks_too_often_has_to_wait_and_others_have_not(tmp_path):
    app = make_app(tmp_path, "auth.requests_per_minute=3", tokens=True)
    async with client_of(make_http(app)) as client:
        answers = [await client.get("/v1/jobs", headers=bearer("read")) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
        assert (await client.get("/v1/jobs", headers=bearer("admin"))).status_code == 200
        assert (await client.get("/livez")).status_code == 200


async def test_who_guesses_tokens_has_to_wait(tmp_path):
    app = make_app(tmp_path, "auth.failures_per_minute=2", tokens=True)
    async with client_of(make_http(app)) as client:
        wrong = {"Authorization": "Bearer wrong-token-0123456789"}
        assert [(await client.get("/v1/jobs", headers=wrong)).status_code for _ in range(3)] == [401, 401, 429]
        assert (await client.get("/v1/jobs", headers=bearer("admin"))).status_code == 429


async def test_no_token_is_ever_told(tmp_path, caplog):
    caplog.set_level("DEBUG")
    app = make_app(tmp_path, tokens=True)
    async with client_of(make_http(app)) as client:
        texts = []
        for path in ("/v1/jobs", "/v1/jobs/one", "/v1/status", "/metrics", "/openapi.json"):
            for headers in (bearer("admin"), {"Authorization": "Bearer a-wrong-token-0123456789"}):
                answer = await client.get(path, headers=headers)
                texts.append(answer.text + str(answer.headers))
    told = "".join(texts) + caplog.text + repr(app.metrics.requests) + repr(app.keys)
    assert "token-0123456789" not in told
