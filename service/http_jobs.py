"""Jobs, uploads and events over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import FastAPI, Header, Path, Query, Request, Response
from pydantic import BaseModel, Field

from service.app import App
from service.auth import Principal
from service.commands import ID, Refusal, SubmitJob
from service.http_answers import (
    LOCATION,
    Events,
    Responses,
    event,
    file_answer,
    needs,
    news_body,
    problems,
    with_signs_of_life,
)
from service.store import Job

JobId = Annotated[str, Path(pattern=ID, examples=["greeting-1"])]
UploadName = Annotated[str, Query(max_length=255, description="as the file was called; for messages only")]


class Video(BaseModel):
    """The file that a job has made."""

    url: str = Field(description="where it is to be had, at this server")
    name: str = Field(description="below the folder of results")
    bytes: int
    sha256: str
    seconds: float
    frames: int
    width: int
    height: int
    fps: int


class JobAnswer(BaseModel):
    """A job as it stands. Times are seconds since 1970."""

    id: str
    state: Literal["queued", "running", "completed", "failed", "cancelled"]
    priority: Literal["interactive", "batch"]
    frames: int = Field(description="made so far")
    total_frames: int | None = Field(description="null until the sound was looked at")
    attempts: int
    seed: int
    prompt: str | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    result: Video | None
    error: str | None
    error_type: str | None


class JobList(BaseModel):
    """Newest first. next: give it as `after` for those that follow; null: there are none."""

    jobs: list[JobAnswer]
    next: str | None


class Upload(BaseModel):
    """Give it as {"upload": ...} for image or audio, until it is deleted as unused (inputs.spool_hours)."""

    upload: str


def job_answer(job: Job) -> JobAnswer:
    result = None
    if job.result is not None:
        made = dict(job.result)
        result = Video(url=result_url(job), name=str(made.pop("path")), **made)
    return JobAnswer(
        id=job.id,
        state=job.state,
        priority=job.priority,
        frames=job.frames,
        total_frames=job.total_frames,
        attempts=job.attempts,
        seed=job.seed,
        prompt=job.request.get("prompt"),
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        result=result,
        error=job.error,
        error_type=job.error_type,
    )


def result_url(job: Job) -> str:
    return f"/v1/jobs/{quote(job.id)}/result"


def add_job_routes(http: FastAPI, app: App) -> None:
    """POST, GET and DELETE below /v1/jobs; /v1/uploads; /v1/events."""
    read, may_submit = needs("read"), needs("jobs")

    @http.post(
        "/v1/jobs",
        tags=["jobs"],
        status_code=201,
        dependencies=[may_submit],
        responses={
            **problems(400, 404, 408, 409, 413, 422),
            200: {"model": JobAnswer, "description": "This very job was there already", "headers": LOCATION},
            201: {"description": "It is taken", "headers": LOCATION},
        },
    )
    async def submit(
        command: SubmitJob,
        response: Response,
        idempotency_key: Annotated[str | None, Header(pattern=ID, description="as `id`")] = None,
    ) -> JobAnswer:
        """Take a job. When this answers the job is on the disk, and outlives whatever happens to the daemon."""
        if idempotency_key is not None:
            if command.id not in (None, idempotency_key):
                raise Refusal("invalid", "id and Idempotency-Key: differ; give one of them")
            command = command.model_copy(update={"id": idempotency_key})
        job, is_new = await app.jobs.submit(command, {"trigger": "http"})
        response.status_code = 201 if is_new else 200
        response.headers["Location"] = f"/v1/jobs/{quote(job.id)}"
        return job_answer(job)

    @http.get("/v1/jobs", tags=["jobs"], dependencies=[read], responses=problems(404, 422))
    async def jobs(
        state: Literal["queued", "running", "completed", "failed", "cancelled"] | None = None,
        limit: Annotated[int, Query(ge=1, le=500)] = 100,
        after: Annotated[str | None, Query(pattern=ID, description="the `next` of the page before")] = None,
    ) -> JobList:
        """The jobs there are, newest first."""
        found = await app.jobs.list(state=state, limit=limit + 1, after=after)
        page = found[:limit]
        return JobList(jobs=[job_answer(job) for job in page], next=page[-1].id if len(found) > limit else None)

    @http.get("/v1/jobs/{id}", tags=["jobs"], dependencies=[read], responses=problems(404, 422))
    async def job(id: JobId) -> JobAnswer:
        """One job."""
        return job_answer(await app.jobs.get(id))

    @http.delete("/v1/jobs/{id}", tags=["jobs"], dependencies=[may_submit], responses=problems(404, 422))
    async def cancel(id: JobId) -> JobAnswer:
        """Stop a job at its next block. One that has ended stays as it is."""
        return job_answer(await app.jobs.cancel(id))

    video: dict[str, Any] = {"content": {"video/mp4": {"schema": {"type": "string", "format": "binary"}}}}
    for add, what in ((http.get, "result"), (http.head, "result_head")):

        @add(
            "/v1/jobs/{id}/result",
            tags=["jobs"],
            dependencies=[read],
            response_class=Response,
            operation_id=what,
            responses={
                **problems(404, 409, 422),
                200: {**video, "description": "The whole file"},
                206: {**video, "description": "The range that was asked for"},
                416: {"content": {"text/plain": {}}, "description": "The file has no such range"},
            },
        )
        async def result(request: Request, id: JobId) -> Response:
            """The video. Range and If-Range are honoured."""
            job = await app.jobs.get(id)
            if job.state != "completed":
                raise Refusal("conflict", f"job {id}: is {job.state}, and has no result")
            return await file_answer(request, app.jobs.result_path(job))

    stream: Responses = {
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Server-sent events"}
    }

    @http.get(
        "/v1/jobs/{id}/events",
        tags=["jobs"],
        dependencies=[read],
        response_class=Events,
        status_code=200,
        responses={**problems(404, 422), **stream},
    )
    async def job_events(id: JobId) -> Events:
        """How a job stands now, and each time that changes, until it has ended.

        `event` is its state, or progress; `data` is the job as GET gives it, of progress only what changed. A line
        that begins with a colon is a sign of life.
        """
        # Asked before the answer begins: for a job that is not there it is 404.
        await app.jobs.get(id)
        return Events(_job_events(app, id, http.state.ending))

    @http.get(
        "/v1/events",
        tags=["jobs"],
        status_code=200,
        dependencies=[read],
        response_class=Events,
        responses={**problems(422), **stream},
    )
    async def events(
        kind: Annotated[list[Literal["job", "session", "engine", "daemon"]] | None, Query(max_length=4)] = None,
    ) -> Events:
        """Whatever happens, from now on. `missed` says how many events were left out: the reader was too slow."""
        return Events(_events(app, set(kind or ()), http.state.ending))

    @http.post(
        "/v1/uploads",
        tags=["jobs"],
        status_code=201,
        responses=problems(400, 404, 408, 413, 422),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            }
        },
    )
    async def upload(request: Request, kind: Literal["image", "audio"], name: UploadName = "") -> Upload:
        """Keep a picture or a sound: the body is the file as it is. Jobs and sessions can name it."""
        principal: Principal = request.state.principal
        if "live" not in principal.scopes:
            principal.require("jobs")
        path = await app.inputs.keep(_body(request), kind, name)
        return Upload(upload=path.name)


async def _body(request: Request) -> AsyncIterator[bytes]:
    async for chunk in request.stream():
        if chunk:
            yield chunk


async def _job_events(app: App, id: str, ending: asyncio.Event) -> AsyncIterator[str]:
    with app.hub.listen() as news:
        job = await app.jobs.get(id)
        yield event(job.state, job_answer(job).model_dump())
        if job.ended:
            return
        async for item in with_signs_of_life(news, ending):
            if item is None:
                yield ": alive\n\n"
            elif item.missed or (item.kind == "job" and item.id == id and item.what != "progress"):
                # What was missed may have been the end of it.
                job = await app.jobs.get(id)
                yield event(job.state, job_answer(job).model_dump())
                if job.ended:
                    return
            elif item.kind == "job" and item.id == id:
                yield event("progress", {"id": id, "state": "running", **item.body})


async def _events(app: App, kinds: set[str], ending: asyncio.Event) -> AsyncIterator[str]:
    with app.hub.listen() as news:
        yield ": hello\n\n"
        missed = 0
        async for item in with_signs_of_life(news, ending):
            if item is None:
                yield ": alive\n\n"
                continue
            missed += item.missed
            if not kinds or item.kind in kinds:
                body = news_body(item)
                if missed:
                    body["missed"] = missed
                missed = 0
                yield event(item.kind, body)
