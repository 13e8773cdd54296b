"""The HTTP trigger: one FastAPI application out of its parts, and what concerns none of them in particular."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.resources
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.routing import Match

from audio.errors import AvatardError
from service import VERSION
from service.app import App
from service.http_answers import PROBLEM, Responses, needs, problem, problems, refused, unacceptable
from service.http_door import OPEN, Door
from service.http_jobs import add_job_routes
from service.http_server import serve
from service.http_sessions import add_session_routes
from service.lightx2v import add_lightx2v_routes, is_lightx2v, lightx2v_unacceptable

PAGE_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
        "connect-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Permissions-Policy": "microphone=(self), camera=()",
}


class Alive(BaseModel):
    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """Whether what is sent now is worked on soon."""

    ready: bool
    engine: str = Field(description="loading, ready, restarting or ended")
    intake: str = Field(description="open, or why no job is taken")


class About(BaseModel):
    """What there is at this address."""

    name: str
    version: str
    model: str
    engine: str
    voice: bool = Field(description="whether text can be spoken")
    intake: str
    scopes: list[str] = Field(description="what whoever asks may do")


def make_http(app: App) -> FastAPI:
    """Everything under one roof.

    `state.ending` is to be set when the server goes: streams of events and pictures, which have no end, end then.
    """
    http = FastAPI(
        title="avatard",
        version=VERSION,
        summary="A picture and a voice in, a person who speaks out.",
        # Both load their scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        separate_input_output_schemas=False,
    )
    http.state.ending = asyncio.Event()
    http.add_middleware(Door, app=app)
    _add_error_handlers(http)
    _add_probes(http, app)
    if app.settings.http.page:
        _add_page(http)
    # Before the routes of tasks and jobs by id, which would take their names for ids.
    add_lightx2v_routes(http, app)
    add_job_routes(http, app)
    add_session_routes(http, app)
    _describe(http, app)
    return http


async def serve_http(app: App) -> None:
    """Serve until cancelled. Raises: HttpError: the address cannot be listened on."""
    await serve(app, make_http(app))


# Errors


def _add_error_handlers(http: FastAPI) -> None:
    @http.exception_handler(AvatardError)
    async def on_refusal(request: Request, error: AvatardError) -> Response:
        return refused(error)

    @http.exception_handler(RequestValidationError)
    async def on_unacceptable(request: Request, error: RequestValidationError) -> Response:
        if is_lightx2v(request.scope["path"]):
            return lightx2v_unacceptable(error)
        return unacceptable(error, lambda: _names_known_to(request))

    @http.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(sorted(_methods_of(http, request)))
        return JSONResponse({"detail": error.detail}, error.status_code, headers)

    @http.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        # It rises behind this answer, and its traceback is logged.
        return JSONResponse({"detail": "a bug in the server; its log says more"}, 500)


def _names_known_to(request: Request) -> set[str]:
    """The fields of the body that a route takes."""
    body = getattr(request.scope.get("route"), "body_field", None)
    model = body.field_info.annotation if body is not None else None
    return set(getattr(model, "model_fields", ()))


def _methods_of(http: FastAPI, request: Request) -> set[str]:
    """Every method that an address knows: a router stops looking at the first route that does not."""
    return {
        method
        for route in http.routes
        if route.matches(request.scope)[0] is not Match.NONE
        for method in getattr(route, "methods", None) or ()
    }


# Probes


def _intake(app: App) -> str:
    return app.jobs.paused or "open"


def _add_probes(http: FastAPI, app: App) -> None:
    # Asked by a name that is not this machine's, see the door.
    elsewhere: Responses = {403: problem("Not at this name")}

    @http.get("/livez", tags=["probes"], responses=elsewhere)
    @http.get("/health", tags=["probes"], include_in_schema=False)
    async def livez() -> Alive:
        """The process lives and its loop turns."""
        return Alive()

    @http.get(
        "/readyz",
        tags=["probes"],
        responses={**elsewhere, 503: {"model": Ready, "description": "Not yet, or not now"}},
    )
    async def readyz(response: Response) -> Ready:
        """The model is warm. With intake paused it still is: what was taken is worked on, and live sessions are."""
        ready = app.engine.state == "ready"
        if not ready:
            response.status_code = 503
            response.headers["Retry-After"] = "2"
        return Ready(ready=ready, engine=app.engine.state, intake=_intake(app))

    @http.get(
        "/metrics",
        tags=["probes"],
        dependencies=[needs("read")],
        response_class=Response,
        responses={
            **problems(),
            200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "In Prometheus' format"},
        },
    )
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(app.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @http.get("/v1/status", tags=["probes"], dependencies=[needs("read")], responses=problems())
    async def status(request: Request) -> About:
        """What there is at this address, and what whoever asks may do with it."""
        return About(
            name=app.settings.daemon.metadata_name,
            version=http.version,
            model=app.settings.model.name,
            engine=app.engine.state,
            voice=app.voice is not None,
            intake=_intake(app),
            scopes=sorted(request.state.principal.scopes),
        )


# The page


def _add_page(http: FastAPI) -> None:
    """The files of service/page, read once: they change with the version only."""
    files: dict[str, tuple[bytes, dict[str, str]]] = {}
    folder = importlib.resources.files("service").joinpath("page")
    for file in folder.iterdir() if folder.is_dir() else ():
        kind = PAGE_TYPES.get("." + file.name.rpartition(".")[2])
        if kind is not None and file.is_file():
            data = file.read_bytes()
            etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
            files[file.name] = data, {**PAGE_HEADERS, "Content-Type": kind, "ETag": etag}

    def answer(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "Not Found")
        data, headers = files[name]
        if headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers={k: v for k, v in headers.items() if k != "Content-Type"})
        return Response(data, headers=headers)

    @http.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return answer(request, "index.html")

    @http.get("/page/{name}", include_in_schema=False)
    async def page_file(request: Request, name: str) -> Response:
        return answer(request, name)


# What is told about it


def _describe(http: FastAPI, app: App) -> None:
    """Have /openapi.json say what an error looks like, and what takes a token, where there are tokens."""
    described = http.openapi

    def openapi() -> dict[str, Any]:
        if http.openapi_schema is None:
            schema = described()
            schema["components"]["schemas"]["Problem"] = PROBLEM
            if app.keys.required:
                token = {"type": "http", "scheme": "bearer", "description": "one of auth.tokens"}
                schema["components"]["securitySchemes"] = {"token": token}
                for path, operations in schema["paths"].items():
                    for operation in operations.values():
                        operation["security"] = [] if path in OPEN else [{"token": []}]
        assert http.openapi_schema is not None
        return http.openapi_schema

    http.openapi = openapi  # type: ignore[method-assign]
