"""Jobs in the shape of LightX2V, so that its clients need another address and nothing else.

Facts of its interface, and where this one differs on purpose since the original is unsafe: docs/http.md.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import random
import secrets
import string
import wave
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path as FilePath
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Path, Request, Response
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException

from audio.urls import redacted
from service import isolated
from service.app import App
from service.commands import ID, Refusal, Source, SubmitJob, complaint
from service.config import LimitsSection
from service.http_answers import Responses, file_answer, needs, problems
from service.http_form import Part, form_parts, text_of
from service.store import Job

TRIGGER = "lightx2v"
"""In a job's origin: it came this way, and belongs to the clients that do."""

LISTED = 1000
"""Tasks that a list holds at most; the original forgets what is older."""
FRAMES, FPS = 81, 16
"""How long a task without sound is where its client does not say: the defaults of the original."""
LONGEST_S = 600.0
"""Of a task without sound, and up to which a sound is shortened: longer ones come as their client has cut them."""
RATE = 48_000

FORMS = 8
"""That are read at once; whoever is too much is refused."""
FORM_TEXT_BYTES = 80_000
"""Of one text in a form: the longest prompt, of the longest characters."""

STATUS: dict[str, Literal["pending", "processing", "completed", "failed", "cancelled"]] = {
    "queued": "pending",
    "running": "processing",
    "completed": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
}


# What is told


class Submission(BaseModel):
    task_id: str
    task_status: Literal["pending"] = "pending"
    save_result_path: str


class TaskStatus(BaseModel):
    """A task as it stands. Times are local, without a zone, as in the original; progress, in percent, is ours."""

    task_id: str
    status: Literal["pending", "processing", "completed", "failed", "cancelled"]
    start_time: str
    end_time: str | None
    error: str | None
    error_type: str
    save_result_path: str
    progress: int


class QueueStatus(BaseModel):
    is_processing: bool
    current_task: str | None
    pending_count: int
    active_count: int
    queue_size: int
    queue_available: int


class ServiceStatus(BaseModel):
    service_status: Literal["idle", "busy"]
    current_task: str | None
    active_tasks: list[str]
    pending_tasks: int
    queue_size: int
    total_tasks: int
    completed_tasks: int
    failed_tasks: int


class Metadata(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    nproc_per_node: int
    model_cls: str
    model_path: str


class Stopped(BaseModel):
    stop_status: Literal["success", "do_nothing", "error"]
    reason: str


class FieldProblem(BaseModel):
    """One of a list, as FastAPI words it."""

    model_config = ConfigDict(extra="allow")

    type: str
    loc: list[str | int]
    msg: str


class Unacceptable(BaseModel):
    detail: list[FieldProblem] | str


TASK_STOPPED = Stopped(stop_status="success", reason="Task stopped successfully.")
ALL_STOPPED = Stopped(stop_status="success", reason="All tasks stopped successfully.")
NOTHING_TO_STOP = Stopped(stop_status="do_nothing", reason="Task not found or already completed.")


# What is said


def _whole_number(value: Any) -> Any:
    """Some clients send whole numbers as texts; nothing else is taken for one."""
    if isinstance(value, str) and value.removeprefix("-").isascii() and value.removeprefix("-").isdecimal():
        return int(value[:30])
    if isinstance(value, bool | float):
        raise ValueError("a whole number is needed")
    return value


WholeSeed = Annotated[
    int,
    BeforeValidator(_whole_number, json_schema_input_type=int | Annotated[str, Field(pattern=r"^-?[0-9]{1,18}$")]),
    Field(ge=-1, lt=2**63),
]
FileText = Annotated[str, Field(description="http(s) address, base64, data URL, or a path below inputs.roots")]
Idle = Annotated[Any, Field(description="accepted, and without effect here")]
Absent = Annotated[Literal[""] | None, Field(description="this server's model has no use for one")]


class VideoTask(BaseModel):
    """What LightX2V calls a task. Fields that nobody knows are ignored, as there.

    A task without sound makes a person who idles, for video_duration seconds or target_video_length frames at
    target_fps; one with sound lasts as long as the sound, and no longer than a video_duration that is sent.
    """

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={
            "examples": [
                {"prompt": "A woman speaks", "image_path": "https://example.org/anna.jpg", "seed": 42},
                {"audio_path": "https://example.org/greeting.wav", "save_result_path": "./greeting.mp4"},
            ]
        },
    )

    task_id: str | None = Field(None, pattern=ID, description="names the task; one is made up where there is none")
    prompt: str = Field("", max_length=20_000)
    image_path: FileText = ""
    audio_path: FileText = ""
    save_result_path: str = Field("", max_length=512, description="below the folder of results; empty: the task's id")
    seed: WholeSeed = Field(-1, description="-1: any")
    video_duration: float | None = Field(None, gt=0, le=86_400, strict=True, description="seconds")
    target_video_length: int = Field(FRAMES, ge=1, le=1_000_000, strict=True, description="frames")
    target_fps: int | None = Field(FPS, ge=1, le=1000, strict=True)

    negative_prompt: Idle = None
    use_prompt_enhancer: Idle = None
    infer_steps: Idle = None
    target_shape: Idle = None
    resize_mode: Idle = None
    reuse: Idle = None

    lora_name: Absent = None
    last_frame_path: Absent = None
    image_mask_path: Absent = None
    video_path: Absent = None
    talk_objects: Absent = None

    @property
    def seconds(self) -> float:
        """Of a task without sound."""
        return self.video_duration or self.target_video_length / (self.target_fps or FPS)


class FormTask(BaseModel):
    """The texts of a task that comes as a form; numbers are texts there."""

    prompt: str = Field("", max_length=20_000)
    save_result_path: str = Field("", max_length=512)
    seed: int = Field(42, ge=-1, lt=2**63)
    video_duration: float | None = Field(None, gt=0, le=86_400)
    target_video_length: int = Field(FRAMES, ge=1, le=1_000_000)
    target_fps: int = Field(FPS, ge=1, le=1000)


FORM_FILES: dict[str, Literal["image", "audio"]] = {"image_file": "image", "audio_file": "audio"}


def _form_schema() -> dict[str, Any]:
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    schema = FormTask.model_json_schema()
    schema["properties"] |= dict.fromkeys(FORM_FILES, file)
    return schema | {"required": ["image_file"]}


TaskId = Annotated[str, Path(pattern=ID, examples=["F0XK-2Q8T-ZZ91-07AB-LM3D"])]


def is_lightx2v(path: str) -> bool:
    """Whether errors of that address are worded as there."""
    return path.startswith("/v1/tasks")


def lightx2v_unacceptable(error: RequestValidationError) -> Response:
    """As FastAPI does it, but without what was sent: it may be megabytes of base64, and no valid text."""
    problems = [{key: item[key] for key in ("type", "loc", "msg")} for item in error.errors()]
    return JSONResponse({"detail": jsonable_encoder(problems)}, 422)


def add_lightx2v_routes(http: FastAPI, app: App) -> None:
    """/v1/tasks, /v1/service and /v1/files, with or without a slash at the end."""
    read, jobs = needs("read"), needs("jobs")
    unacceptable: Responses = {422: {"model": Unacceptable, "description": "What is wrong with it"}}
    submitted = {**problems(400, 404, 408, 409, 413), **unacceptable}
    asked = {**problems(404), **unacceptable}

    @http.post("/v1/tasks/video", tags=["LightX2V"], dependencies=[jobs], responses=submitted)
    @http.post("/v1/tasks", tags=["LightX2V"], dependencies=[jobs], responses=submitted, deprecated=True)
    async def submit(task: VideoTask) -> Submission:
        """Take a task."""
        await _check(app, task)
        image = await _fetched(app, task.image_path, "image") if task.image_path else None
        sound = await _fetched(app, task.audio_path, "audio") if task.audio_path else None
        return await _submit(app, task, image, sound)

    forms = 0

    @http.post(
        "/v1/tasks/video/form",
        tags=["LightX2V"],
        dependencies=[jobs],
        responses=submitted,
        openapi_extra={
            "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _form_schema()}}}
        },
    )
    async def submit_form(request: Request) -> Submission:
        """Take a task whose files come with it. What is not sent counts as not sent."""
        # Read here, and not by FastAPI: that reads a form before it asks who sent it, into memory and /tmp.
        nonlocal forms
        if forms >= FORMS:
            raise Refusal("full", f"{FORMS} forms are under way, which is the limit; try again later", 5.0)
        forms += 1
        try:
            task, image, sound = await _read_form(app, request)
        finally:
            forms -= 1
        return await _submit(app, task, image, sound)

    @http.get("/v1/tasks", tags=["LightX2V"], dependencies=[read], responses=problems())
    async def tasks() -> dict[str, TaskStatus]:
        """The newest tasks, by their ids."""
        return {job.id: _status(job) for job in await app.jobs.list(limit=LISTED) if _is_task(job)}

    @http.get("/v1/tasks/queue/status", tags=["LightX2V"], dependencies=[read], responses=problems())
    async def queue() -> QueueStatus:
        """How much waits."""
        counts, current = await app.jobs.counts(), await _running(app)
        size = app.settings.jobs.queue
        return QueueStatus(
            is_processing=bool(current),
            current_task=current[0] if current else None,
            pending_count=counts.get("queued", 0),
            active_count=counts.get("running", 0),
            queue_size=size,
            queue_available=max(0, size - counts.get("queued", 0)),
        )

    @http.get("/v1/tasks/{id}/status", tags=["LightX2V"], dependencies=[read], responses=asked)
    async def status(id: TaskId) -> TaskStatus:
        """How a task stands."""
        return _status(await _task(app, id))

    video: dict[str, Any] = {"content": {"video/mp4": {"schema": {"type": "string", "format": "binary"}}}}
    files: Responses = {
        **asked,
        200: {**video, "description": "The whole file"},
        206: {**video, "description": "The range that was asked for"},
        416: {"content": {"text/plain": {}}, "description": "The file has no such range"},
    }

    @http.get("/v1/tasks/{id}/result", tags=["LightX2V"], dependencies=[read], response_class=Response, responses=files)
    async def result(request: Request, id: TaskId) -> Response:
        """The video."""
        job = await _task(app, id)
        if job.state != "completed":
            raise HTTPException(404, "Task not completed")
        return await file_answer(request, app.jobs.result_path(job), missing="Task result file does not exist")

    @http.delete("/v1/tasks/all/running", tags=["LightX2V"], dependencies=[jobs], responses=problems())
    @http.delete("/v1/tasks/running", dependencies=[jobs], include_in_schema=False)
    async def stop_all() -> Stopped:
        """Stop every task that waits or is worked on. Jobs that came another way are none of its business."""
        for state in ("running", "queued"):
            for job in await app.jobs.list(state=state, limit=app.settings.jobs.queue):
                if _is_task(job):
                    await app.jobs.cancel(job.id)
        return ALL_STOPPED

    @http.delete("/v1/tasks/{id}", tags=["LightX2V"], dependencies=[jobs], responses={**problems(), **unacceptable})
    async def stop(id: TaskId) -> Stopped:
        """Stop a task, at its next block if it is worked on. It stays cancelled."""
        try:
            job = await app.jobs.get(id)
        except Refusal:
            return NOTHING_TO_STOP
        if job.state in ("completed", "failed"):
            return NOTHING_TO_STOP
        await app.jobs.cancel(id)
        return TASK_STOPPED

    @http.post("/v1/tasks/image", dependencies=[jobs], include_in_schema=False)
    @http.post("/v1/tasks/image/{kind}", dependencies=[jobs], include_in_schema=False)
    async def image_task() -> None:
        raise HTTPException(409, "this server's model makes videos of a person who speaks, and no images")

    @http.get("/v1/service/status", tags=["LightX2V"], dependencies=[read], responses=problems())
    async def service() -> ServiceStatus:
        """Whether there is anything to do."""
        counts, current = await app.jobs.counts(), await _running(app)
        return ServiceStatus(
            service_status="busy" if current or counts.get("queued", 0) else "idle",
            current_task=current[0] if current else None,
            active_tasks=current,
            pending_tasks=counts.get("queued", 0),
            queue_size=app.settings.jobs.queue,
            total_tasks=sum(counts.values()),
            completed_tasks=counts.get("completed", 0),
            failed_tasks=counts.get("failed", 0),
        )

    @http.get("/v1/service/metadata", tags=["LightX2V"], dependencies=[read], responses=problems())
    async def metadata() -> Metadata:
        """Which model this is; not where it lies."""
        name = app.settings.model.name
        return Metadata(nproc_per_node=1, model_cls=name.rpartition("/")[2], model_path=name.rpartition("/")[2])

    @http.get(
        "/v1/files/download/{path:path}",
        tags=["LightX2V"],
        dependencies=[read],
        response_class=Response,
        responses=files,
    )
    async def download(request: Request, path: Annotated[str, Path(max_length=1024)]) -> Response:
        """A file below the folder of results."""
        try:
            file = app.inputs.allowed_output(path)
        except Refusal:
            raise HTTPException(403, "Access to this file is not allowed") from None
        return await file_answer(request, file, missing=f"File not found: {path}")


# Tasks as forms


async def _read_form(app: App, request: Request) -> tuple[VideoTask, FilePath, FilePath | None]:
    """A task, its picture and its sound, which go into the spool while they come; fields that nobody knows are ignored.

    Raises: HTTPException; RequestValidationError: what FastAPI would complain of; Refusal: as of an upload.
    """
    texts: dict[str, str] = {}
    files: dict[str, FilePath] = {}
    wrong: list[dict[str, Any]] = []
    most_mb, came = app.settings.inputs.max_mb, 0

    async def counted(part: Part) -> AsyncIterator[bytes]:
        nonlocal came
        async for piece in part:
            came += len(piece)
            if came > most_mb * 1e6:
                raise Refusal("too large", f"the files are over {most_mb:g} MB together, which is the limit")
            yield piece

    async for part in form_parts(request):
        kind = FORM_FILES.get(part.name)
        if kind is not None and part.filename is not None:
            files[part.name] = await app.inputs.keep(counted(part), kind, part.filename)
        elif kind is not None:
            if await _text(part):
                wrong.append(_problem(part.name, "value_error", "a file is needed, and this is a text"))
        elif part.name in FormTask.model_fields:
            if part.filename is not None:
                wrong.append(_problem(part.name, "string_type", "a text is needed, and this is a file"))
            elif text := await _text(part):
                texts[part.name] = text
    if "image_file" not in files:
        wrong.append(_problem("image_file", "missing", "Field required"))
    try:
        form = FormTask.model_validate(texts)
    except ValidationError as error:
        wrong += [_problem(str(item["loc"][0]), item["type"], item["msg"]) for item in error.errors()]
    if wrong:
        raise RequestValidationError(wrong)
    task = VideoTask.model_validate(form.model_dump())
    await _check(app, task)
    return task, files["image_file"], files.get("audio_file")


async def _text(part: Part) -> str:
    gathered = bytearray()
    async for piece in part:
        gathered += piece
        if len(gathered) > FORM_TEXT_BYTES:
            raise HTTPException(413, f"{part.name}: is over {FORM_TEXT_BYTES // 1000} kB, which is the limit")
    return text_of(bytes(gathered))


def _problem(name: str, type: str, message: str) -> dict[str, Any]:
    return {"type": type, "loc": ("body", name), "msg": message}


# Tasks as jobs


async def _check(app: App, task: VideoTask) -> None:
    """What can be refused before anything is fetched. Raises: HTTPException."""
    if task.task_id is not None and await _is_known(app, task.task_id):
        raise _known(task.task_id)
    if task.save_result_path:
        try:
            app.inputs.allowed_output(task.save_result_path)
        except Refusal as error:
            raise HTTPException(422, f"save_result_path: {error}") from error


async def _submit(app: App, task: VideoTask, image: FilePath | None, sound: FilePath | None) -> Submission:
    """Make a task a job. image, sound: in the spool.

    Raises: HTTPException, Refusal: worded as LightX2V words them, where it has words for it.
    """
    id = task.task_id or _made_up_id()
    if sound is None:
        if task.seconds > LONGEST_S:
            raise HTTPException(422, f"without sound a task lasts at most {LONGEST_S:g} s, not {task.seconds:g}")
        sound = await app.inputs.keep(_silence(task.seconds), "audio", "silence")
    elif task.video_duration is not None and task.video_duration <= LONGEST_S:
        sound = await _shortened(app, sound, task.video_duration)
    job = {
        "id": id,
        "image": {"upload": image.name} if image is not None else None,
        "audio": {"upload": sound.name},
        "prompt": task.prompt or None,
        "seed": random.randrange(2**32) if task.seed == -1 else task.seed,
    }
    shown = task.save_result_path or id
    origin = {"trigger": TRIGGER, "save_result_path": shown}
    for name in _names(task.save_result_path.removeprefix("./"), id):
        try:
            _, is_new = await app.jobs.submit(SubmitJob.model_validate({**job, "name": name}), origin)
        except Refusal as error:
            if error.reason == "full":
                size = app.settings.jobs.queue
                raise Refusal("full", f"Task queue is full (max {size} tasks)", error.retry_s) from error
            if error.reason != "conflict":
                raise
            if await _is_known(app, id):
                raise _known(id) from error
            taken = error
        else:
            if not is_new:
                raise _known(id)
            return Submission(task_id=id, save_result_path=shown)
    raise taken


def _names(wanted: str, id: str) -> list[str | None]:
    """For the result: as wanted; and another where that is some job's already.

    There the older file would be overwritten, and clients rely on being able to send the same thing twice.
    """
    if not wanted:
        return [None]
    path = PurePosixPath(wanted)
    return [wanted, str(path.with_name(f"{path.stem}-{id}{path.suffix}"))]


def _known(id: str) -> HTTPException:
    return HTTPException(503, f"Task ID {id} already exists")


async def _is_known(app: App, id: str) -> bool:
    try:
        await app.jobs.get(id)
    except Refusal:
        return False
    return True


async def _task(app: App, id: str) -> Job:
    try:
        return await app.jobs.get(id)
    except Refusal as error:
        raise HTTPException(404, "Task not found") from error


def _is_task(job: Job) -> bool:
    return job.origin.get("trigger") == TRIGGER


async def _running(app: App) -> list[str]:
    return [job.id for job in await app.jobs.list(state="running", limit=100)]


def _status(job: Job) -> TaskStatus:
    shown = str(job.origin.get("save_result_path", job.id))
    if job.state == "completed" and job.result is not None:
        # Whole, not the bare name as there: a result in a folder is found again.
        shown = str(job.result["path"])
    part = job.frames / job.total_frames if job.total_frames else 0.0
    began = job.started_at if job.started_at is not None else job.created_at
    return TaskStatus(
        task_id=job.id,
        status=STATUS[job.state],
        start_time=_local(began),
        end_time=_local(job.finished_at) if job.finished_at is not None else None,
        error=job.error,
        error_type=job.error_type or "",
        save_result_path=shown,
        progress=100 if job.state == "completed" else min(99, round(100 * part)),
    )


def _local(at: float) -> str:
    return datetime.fromtimestamp(at).isoformat(timespec="microseconds")


def _made_up_id() -> str:
    letters = string.ascii_uppercase + string.digits
    return "-".join("".join(secrets.choice(letters) for _ in range(4)) for _ in range(5))


# Their pictures and sounds

_BEGINNINGS = {
    "image": (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM"),
    "audio": (b"RIFF", b"OggS", b"fLaC", b"ID3", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2"),
}


def _source(text: str, kind: Literal["image", "audio"]) -> Source:
    """What a text refers to. Bare base64 is known by what it begins with once it is decoded.

    Raises: HTTPException: a path or an address that is too long for one.
    """
    if _is_base64(text, _BEGINNINGS[kind]):
        return Source.model_validate({"data": text})
    try:
        return Source.model_validate(text)
    except ValidationError as error:
        raise HTTPException(422, f"{kind}_path: {complaint(error)}") from error


def _is_base64(text: str, beginnings: tuple[bytes, ...]) -> bool:
    try:
        head = base64.b64decode(text[:64], validate=True)
    except (binascii.Error, ValueError):
        return False
    return len(head) > 32 and (head.startswith(beginnings) or head[4:8] == b"ftyp")


async def _fetched(app: App, text: str, kind: Literal["image", "audio"]) -> FilePath:
    source = _source(text, kind)
    try:
        return await app.inputs.fetch(source, kind)
    except Refusal as error:
        if source.url is not None and error.reason == "invalid":
            raise HTTPException(400, f"{kind.capitalize()} URL is not accessible: {redacted(source.url)}") from error
        raise


async def _silence(seconds: float) -> AsyncIterator[bytes]:
    yield _wav([np.zeros(round(seconds * 16_000), "<i2")], 16_000)


async def _shortened(app: App, path: FilePath, seconds: float) -> FilePath:
    """The beginning of a sound, in the spool; the sound itself where it is no longer than that."""
    beginning = await asyncio.to_thread(_beginning, path, seconds, app.settings.limits)
    if beginning is None:
        return path

    async def parts() -> AsyncIterator[bytes]:
        yield beginning

    return await app.inputs.keep(parts(), "audio", f"the first {seconds:g} s")


def _beginning(path: FilePath, seconds: float, limits: LimitsSection) -> bytes | None:
    """As WAV; None where that is all of it. Blocks."""
    left = round(seconds * RATE)
    taken = []
    for chunk in isolated.sound(path, limits).chunks(RATE):
        taken.append(_sixteen_bits(chunk.samples[:left]))
        left -= taken[-1].size
        if taken[-1].size < chunk.samples.size:
            return _wav(taken, RATE)
    return None


def _sixteen_bits(samples: NDArray[np.float32]) -> NDArray[np.int16]:
    return (samples * 32767).astype("<i2")


def _wav(pieces: list[NDArray[np.int16]], rate: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, rate, 0, "NONE", ""))
        for samples in pieces:
            out.writeframes(samples.tobytes())
    return file.getvalue()
