"""LightX2V's clients find what they know: its codes and texts, and the differences that are meant."""

import asyncio
import base64
import http.server
import json
import re
import threading
import tracemalloc
import wave

import pytest
from http_app import bearer, client_of, make_app, picture, sound
from waiting import until_async

from service import lightx2v
from service.http import make_http

CATS = {
    "prompt": "Two cats in boxing gear",
    "negative_prompt": "blurred, 静态",
    "image_path": "",
    "seed": 42,
    "save_result_path": "./cat_boxing_seed42.mp4",
}
"""As the published clients send it: the same fields, and values of the same kinds."""

WAV = base64.b64encode(sound()).decode()
PNG = base64.b64encode(picture()).decode()


@pytest.fixture
def app(tmp_path):
    return make_app(tmp_path)


@pytest.fixture
async def client(app):
    async with client_of(make_http(app)) as client:
        yield client


async def submit(client, **task):
    answer = await client.post("/v1/tasks/video/", json=task)
    assert answer.status_code == 200, answer.text
    return answer.json()


def length_s(app, id):
    """Of the sound that a job was given."""
    file = app.inputs._spool.find(app.jobs.commands[id].audio.upload)
    with wave.open(str(file)) as sound:
        return sound.getnframes() / sound.getframerate()


# What clients send


@pytest.mark.parametrize("path", ["/v1/tasks/video/", "/v1/tasks/video", "/v1/tasks/", "/v1/tasks"])
async def test_the_published_message_makes_a_task(client, app, path):
    answer = await client.post(path, json=CATS)
    assert answer.status_code == 200
    told = answer.json()
    assert told == {"task_id": told["task_id"], "task_status": "pending", "save_result_path": "./cat_boxing_seed42.mp4"}
    assert re.fullmatch(r"([A-Z0-9]{4}-){4}[A-Z0-9]{4}", told["task_id"])
    command = app.jobs.commands[told["task_id"]]
    assert (command.name, command.seed, command.prompt) == ("cat_boxing_seed42.mp4", 42, CATS["prompt"])
    # 81 frames at 16 a second, as there.
    assert length_s(app, told["task_id"]) == pytest.approx(81 / 16, abs=0.001)


async def test_a_task_of_nothing_is_one(client, app):
    id = (await submit(client))["task_id"]
    assert app.jobs.commands[id].image is None
    assert (await client.get(f"/v1/tasks/{id}/status")).json()["save_result_path"] == id


async def test_picture_and_sound_come_as_base64_or_data_url(client, app):
    for task in (
        {"image_path": PNG, "audio_path": WAV},
        {"image_path": f"data:image/png;base64,{PNG}", "audio_path": f"data:audio/wav;base64,{WAV}"},
    ):
        id = (await submit(client, **task))["task_id"]
        assert length_s(app, id) == pytest.approx(0.1)


async def test_picture_and_sound_come_as_paths(client, app, tmp_path):
    (tmp_path / "pictures" / "a.png").write_bytes(picture())
    await submit(client, image_path=str(tmp_path / "pictures" / "a.png"))
    refused = await client.post("/v1/tasks/video/", json={"image_path": "/etc/passwd"})
    assert refused.status_code == 403


async def test_a_sound_is_as_long_as_is_asked_at_most(client, app):
    long = base64.b64encode(sound(2.0)).decode()
    id = (await submit(client, audio_path=long, video_duration=1))["task_id"]
    assert length_s(app, id) == pytest.approx(1.0)
    id = (await submit(client, audio_path=long, video_duration=5))["task_id"]
    assert length_s(app, id) == pytest.approx(2.0)
    id = (await submit(client, audio_path=long))["task_id"]
    assert length_s(app, id) == pytest.approx(2.0)


async def test_without_sound_the_client_says_how_long(client, app):
    id = (await submit(client, target_video_length=33, target_fps=None))["task_id"]
    assert length_s(app, id) == pytest.approx(33 / 16, abs=0.001)
    id = (await submit(client, video_duration=3))["task_id"]
    assert length_s(app, id) == pytest.approx(3.0)
    answer = await client.post("/v1/tasks/video/", json={"target_video_length": 100_000})
    assert (answer.status_code, answer.json()["detail"]) == (422, "without sound a task lasts at most 600 s, not 6250")


async def test_the_same_message_twice_makes_two_files(client, app):
    ids = [(await submit(client, **CATS))["task_id"] for _ in range(2)]
    names = [app.jobs.commands[id].name for id in ids]
    assert names == ["cat_boxing_seed42.mp4", f"cat_boxing_seed42-{ids[1]}.mp4"]


async def test_options_of_one_task_stay_with_it(client, app):
    await submit(client, task_id="one", infer_steps=1, target_video_length=17, prompt="a", seed=1)
    await submit(client, task_id="two")
    assert length_s(app, "two") == pytest.approx(81 / 16, abs=0.001)
    assert app.jobs.commands["two"].prompt is None


@pytest.mark.parametrize(("seed", "kept"), [(0, 0), (2**32, 2**32), ("17", 17)])
async def test_a_seed_is_kept(client, app, seed, kept):
    assert app.jobs.commands[(await submit(client, seed=seed))["task_id"]].seed == kept


@pytest.mark.parametrize("task", [{}, {"seed": -1}, {"seed": "-1"}])
async def test_any_seed_is_another_each_time(client, app, task):
    seeds = {app.jobs.commands[(await submit(client, **task))["task_id"]].seed for _ in range(3)}
    assert len(seeds) == 3
    assert all(0 <= seed < 2**32 for seed in seeds)


async def test_fields_that_nobody_knows_are_ignored(client):
    await submit(client, colour="red", infer_steps=4, resize_mode="adaptive", data_bootstrap_room=None, sr_ratio=2.0)


async def test_files_come_with_a_form(client, app):
    files = {"image_file": ("a.png", picture(), "image/png"), "audio_file": ("a.wav", sound(), "audio/wav")}
    answer = await client.post("/v1/tasks/video/form", files=files, data={"prompt": "smiles", "infer_steps": "5"})
    assert answer.status_code == 200, answer.text
    command = app.jobs.commands[answer.json()["task_id"]]
    assert (command.prompt, command.seed) == ("smiles", 42)
    without = await client.post("/v1/tasks/video/form", data={"prompt": "smiles"})
    assert (without.status_code, without.json()["detail"][0]["loc"]) == (422, ["body", "image_file"])


# Forms, which may be of any size

FORM = {"Content-Type": "multipart/form-data; boundary=XX"}


def part(name, data=b"", filename=None):
    file = f'; filename="{filename}"' if filename else ""
    return f'--XX\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + data + b"\r\n"


async def test_a_form_is_not_read_before_its_scope_is_asked(tmp_path):
    read = []

    async def body():
        read.append(True)
        yield part("image_file", picture(), "a.png")

    async with client_of(make_http(make_app(tmp_path, tokens=True))) as client:
        headers = {**FORM, **bearer("read")}
        answer = await client.post("/v1/tasks/video/form", content=body(), headers=headers)
    assert (answer.status_code, read) == (403, [])


async def test_a_form_takes_bounded_memory_however_much_is_in_it(tmp_path):
    app = make_app(tmp_path)

    async def body(count, name, mb):
        for _ in range(count):
            yield part(name, filename="a")[:-2]
            for _ in range(mb * 16):
                yield bytes(65_536)
            yield b"\r\n"
        yield b"--XX--\r\n"

    # Many files that nobody asked for, one large one, and one that is asked for and is no picture.
    bodies = {(30, "f", 1): 422, (1, "f", 40): 422, (190, "f", 1): 400, (1, "image_file", 40): 422}
    async with client_of(make_http(app)) as client:
        await client.post("/v1/tasks/video/form", content=body(1, "f", 1), headers=FORM)
        for what, status in bodies.items():
            tracemalloc.start()
            answer = await client.post("/v1/tasks/video/form", content=body(*what), headers=FORM)
            _, most = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert answer.status_code == status, answer.text
            assert most < 4e6, what
    await until_async(lambda: app.inputs.spool_bytes == 0)


async def test_the_files_of_a_form_are_bounded_together(tmp_path):
    files = {
        "image_file": ("a.png", picture() + bytes(600_000), "image/png"),
        "audio_file": ("a.wav", sound(19.0), "audio/wav"),
    }
    async with client_of(make_http(make_app(tmp_path, "inputs.max_mb=1"))) as client:
        answer = await client.post("/v1/tasks/video/form", files=files)
        assert answer.status_code == 413
        assert answer.json()["detail"] == "the files are over 1 MB together, which is the limit"
        files["audio_file"] = ("a.wav", sound(), "audio/wav")
        assert (await client.post("/v1/tasks/video/form", files=files)).status_code == 200


async def test_more_forms_than_are_read_at_once_are_refused_with_a_time(client, monkeypatch):
    monkeypatch.setattr(lightx2v, "FORMS", 2)
    begun, let_go = [], asyncio.Event()

    async def body():
        begun.append(True)
        yield part("image_file", picture(), "a.png")
        await let_go.wait()
        yield b"--XX--\r\n"

    async def post():
        return await client.post("/v1/tasks/video/form", content=body(), headers=FORM)

    waiting = [asyncio.create_task(post()) for _ in range(2)]
    await until_async(lambda: len(begun) == 2)
    answer = await post()
    assert (answer.status_code, answer.headers["retry-after"], len(begun)) == (503, "5", 2)
    let_go.set()
    assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200, 200]
    assert (await post()).status_code == 200


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (part("image_file", picture(), "a.png")[:-9], "it is broken off"),
        (b"no form", "it is no multipart/form-data"),
        (part("a").replace(b"; name=", b"; title="), "one of its parts has no name"),
        (part("a").replace(b"form-data", b"x" * 9000), "it is no multipart/form-data"),
    ],
)
async def test_a_form_that_is_none_is_one_line(client, body, why):
    answer = await client.post("/v1/tasks/video/form", content=body, headers=FORM)
    assert (answer.status_code, answer.json()) == (400, {"detail": f"the form cannot be read: {why}"})
    without = await client.post("/v1/tasks/video/form", content=body, headers={"Content-Type": "multipart/form-data"})
    assert without.status_code == 400


async def test_what_is_wrong_with_a_form_is_a_list(client):
    image, end = part("image_file", picture(), "a.png"), b"--XX--\r\n"
    for body, type, name in (
        (image + part("seed", b"x"), "int_parsing", "seed"),
        (image + part("video_duration", b"-1"), "greater_than", "video_duration"),
        (image + part("prompt", b"a" * 20_001), "string_too_long", "prompt"),
        (image + part("prompt", b"a", "a.txt"), "string_type", "prompt"),
        (part("image_file", b"a.png"), "value_error", "image_file"),
        (part("image_file"), "missing", "image_file"),
    ):
        answer = await client.post("/v1/tasks/video/form", content=body + end, headers=FORM)
        assert answer.status_code == 422, (type, name)
        first = answer.json()["detail"][0]
        assert (first["type"], first["loc"]) == (type, ["body", name])
    long = await client.post("/v1/tasks/video/form", content=part("prompt", b"a" * 100_000) + end, headers=FORM)
    assert (long.status_code, long.json()["detail"]) == (413, "prompt: is over 80 kB, which is the limit")


async def test_the_texts_of_a_form_may_come_after_its_files_and_be_empty(client, app):
    body = part("audio_file", sound(2.0), "a.wav") + part("image_file", picture(), "a.png")
    body += part("audio_file") + part("seed", b"7") + part("video_duration", b"1") + part("prompt") + part("lora_name")
    body += (
        part("negative_prompt", "静态".encode() * 100_000) + part("save_result_path", "grüße.mp4".encode()) + b"--XX--"
    )
    answer = await client.post("/v1/tasks/video/form", content=body, headers=FORM)
    assert answer.status_code == 200, answer.text
    id = answer.json()["task_id"]
    command = app.jobs.commands[id]
    assert (command.seed, command.prompt, command.name) == (7, None, "grüße.mp4")
    assert length_s(app, id) == pytest.approx(1.0)


# What they are told


async def test_a_task_is_followed_to_its_file(client, app):
    id = (await submit(client, save_result_path="sub/dir/cat"))["task_id"]
    status = (await client.get(f"/v1/tasks/{id}/status")).json()
    assert status == {
        "task_id": id,
        "status": "pending",
        "start_time": status["start_time"],
        "end_time": None,
        "error": None,
        "error_type": "",
        "save_result_path": "sub/dir/cat",
        "progress": 0,
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}", status["start_time"])
    app.jobs.change(id, state="running", started_at=1_700_000_050.25, frames=10, total_frames=40)
    status = (await client.get(f"/v1/tasks/{id}/status")).json()
    assert (status["status"], status["progress"], status["start_time"][-9:]) == ("processing", 25, "10.250000")
    app.jobs.complete(id, b"video", name="sub/dir/cat.mp4")
    status = (await client.get(f"/v1/tasks/{id}/status")).json()
    assert (status["status"], status["progress"]) == ("completed", 100)
    # There only "cat.mp4" is remembered, and the result is not found.
    assert status["save_result_path"] == "sub/dir/cat.mp4"
    result = await client.get(f"/v1/tasks/{id}/result")
    assert (result.status_code, result.content, result.headers["content-type"]) == (200, b"video", "video/mp4")
    assert result.headers["content-disposition"] == 'attachment; filename="cat.mp4"'
    assert result.headers["accept-ranges"] == "bytes"
    # There a range is answered with the whole file.
    part = await client.get(f"/v1/tasks/{id}/result", headers={"Range": "bytes=1-2"})
    assert (part.status_code, part.content) == (206, b"id")
    assert (await client.get("/v1/files/download/sub/dir/cat.mp4")).content == b"video"


async def test_a_failed_task_says_why(client, app):
    id = (await submit(client, save_result_path="a.mp4"))["task_id"]
    app.jobs.change(id, state="failed", error="no face", error_type="PictureError", finished_at=1_700_000_100.0)
    status = (await client.get(f"/v1/tasks/{id}/status")).json()
    assert [status[key] for key in ("status", "error", "error_type", "save_result_path")] == [
        "failed",
        "no face",
        "PictureError",
        "a.mp4",
    ]


async def test_tasks_are_listed_by_id_and_other_jobs_are_not_among_them(client):
    await submit(client, task_id="mine")
    await client.post("/v1/jobs", json={"id": "other", "text": "a"})
    assert list((await client.get("/v1/tasks/")).json()) == ["mine"]


async def test_the_queue_and_the_service_say_how_busy_they_are(client, app):
    idle = (await client.get("/v1/service/status/")).json()
    assert idle == {
        "service_status": "idle",
        "current_task": None,
        "active_tasks": [],
        "pending_tasks": 0,
        "queue_size": 10_000,
        "total_tasks": 0,
        "completed_tasks": 0,
        "failed_tasks": 0,
    }
    await submit(client, task_id="one")
    await submit(client, task_id="two")
    app.jobs.change("one", state="running")
    busy = (await client.get("/v1/service/status")).json()
    assert (busy["service_status"], busy["current_task"], busy["active_tasks"]) == ("busy", "one", ["one"])
    assert (await client.get("/v1/tasks/queue/status")).json() == {
        "is_processing": True,
        "current_task": "one",
        "pending_count": 1,
        "active_count": 1,
        "queue_size": 10_000,
        "queue_available": 9_999,
    }
    metadata = (await client.get("/v1/service/metadata")).json()
    assert metadata == {"nproc_per_node": 1, "model_cls": "pocket", "model_path": "pocket"}


SUCCESS = {"stop_status": "success", "reason": "Task stopped successfully."}
NOTHING = {"stop_status": "do_nothing", "reason": "Task not found or already completed."}


async def test_a_task_that_is_stopped_stays_stopped(client, app):
    for id in ("waits", "works", "done"):
        await submit(client, task_id=id)
    app.jobs.change("works", state="running")
    app.jobs.complete("done")
    for id, told in {"waits": SUCCESS, "works": SUCCESS, "done": NOTHING, "none": NOTHING}.items():
        answer = await client.delete(f"/v1/tasks/{id}")
        assert (answer.status_code, answer.json()) == (200, told)
    # As there: of a cancelled one it is told again.
    assert (await client.delete("/v1/tasks/works")).json() == SUCCESS
    assert (await client.get("/v1/tasks/works/status")).json()["status"] == "cancelled"


@pytest.mark.parametrize("path", ["/v1/tasks/all/running", "/v1/tasks/running"])
async def test_all_tasks_are_stopped_and_no_other_job(client, app, path):
    for id in ("one", "two"):
        await submit(client, task_id=id)
    await client.post("/v1/jobs", json={"id": "other", "text": "a"})
    app.jobs.change("one", state="running")
    told = (await client.delete(path)).json()
    assert told == {"stop_status": "success", "reason": "All tasks stopped successfully."}
    assert {job.id: job.state for job in app.jobs.jobs.values()} == {
        "one": "cancelled",
        "two": "cancelled",
        "other": "queued",
    }


# Codes and texts

GOLDEN = [
    ("GET", "/v1/tasks/none/status", None, 404, "Task not found"),
    ("GET", "/v1/tasks/none/result", None, 404, "Task not found"),
    ("GET", "/v1/tasks/waits/result", None, 404, "Task not completed"),
    ("GET", "/v1/tasks/gone/result", None, 404, "Task result file does not exist"),
    ("POST", "/v1/tasks/video/", {"task_id": "waits"}, 503, "Task ID waits already exists"),
    ("GET", "/v1/files/download/none.mp4", None, 404, "File not found: none.mp4"),
    ("GET", "/v1/files/download/..%2f..%2fetc%2fpasswd", None, 403, "Access to this file is not allowed"),
    ("GET", "/v1/files/download/%2fetc%2fpasswd", None, 403, "Access to this file is not allowed"),
    ("PUT", "/v1/tasks/video/", {}, 405, "Method Not Allowed"),
    # Otherwise than there, on purpose: 400 for an address that cannot be reached, in place of 500.
    (
        "POST",
        "/v1/tasks/video/",
        {"image_path": "http://{server}/none.png"},
        400,
        "Image URL is not accessible: http://{server}/none.png",
    ),
]


@pytest.fixture
def server():
    """Answers 404 to everybody."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()


async def test_codes_and_texts_are_those_of_lightx2v(tmp_path, server):
    app = make_app(tmp_path, "inputs.private_addresses=true")
    async with client_of(make_http(app)) as client:
        await submit(client, task_id="waits")
        await submit(client, task_id="gone")
        app.jobs.complete("gone").unlink()
        for method, path, body, status, detail in GOLDEN:
            sent = json.loads(json.dumps(body).replace("{server}", server))
            answer = await client.request(method, path, json=sent)
            assert (answer.status_code, answer.json()) == (status, {"detail": detail.replace("{server}", server)}), path


async def test_a_full_queue_says_so_and_when_to_come_back(tmp_path):
    async with client_of(make_http(make_app(tmp_path, "jobs.queue=1"))) as client:
        await submit(client)
        answer = await client.post("/v1/tasks/video/", json=CATS)
        assert (answer.status_code, answer.json()["detail"]) == (503, "Task queue is full (max 1 tasks)")
        assert answer.headers["retry-after"] == "7"


INVALID = [
    ({"seed": None}, ["body", "seed"]),
    ({"seed": 1.5}, ["body", "seed"]),
    ({"seed": True}, ["body", "seed"]),
    ({"seed": "a"}, ["body", "seed"]),
    ({"prompt": 7}, ["body", "prompt"]),
    ({"target_video_length": "x"}, ["body", "target_video_length"]),
    # Otherwise than there: these were accepted, and went wrong.
    ({"task_id": ""}, ["body", "task_id"]),
    ({"task_id": "../x"}, ["body", "task_id"]),
    ({"lora_name": "style"}, ["body", "lora_name"]),
    ({"last_frame_path": "/a.png"}, ["body", "last_frame_path"]),
]


async def test_what_the_schema_refuses_is_a_list(client):
    for task, place in INVALID:
        answer = await client.post("/v1/tasks/video/", json=task)
        assert answer.status_code == 422, task
        assert [error["loc"] for error in answer.json()["detail"]] == [place]
        assert set(answer.json()["detail"][0]) == {"type", "loc", "msg"}


@pytest.mark.parametrize("name", ["/etc/x.mp4", "../x.mp4", "a/../../x.mp4", "~/x.mp4", ".hidden.mp4", "a\x00.mp4"])
async def test_no_result_leaves_its_folder(client, app, name):
    answer = await client.post("/v1/tasks/video/", json={"save_result_path": name})
    assert answer.status_code == 422
    assert not app.jobs.jobs


async def test_secrets_of_an_address_are_not_told(client):
    answer = await client.post("/v1/tasks/video/", json={"image_path": "http://user:secret@127.0.0.1:1/a?key=secret"})
    assert answer.status_code in (400, 403)
    assert "secret" not in answer.text


async def test_images_are_made_elsewhere(client):
    for path in ("/v1/tasks/image/", "/v1/tasks/image/form", "/v1/tasks/image/sync"):
        assert (await client.post(path, json={})).status_code == 409
