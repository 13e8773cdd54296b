"""The renders of a batch on a Ray cluster: actors that have an engine each, wherever Ray puts them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import AsyncFileLock, Timeout

from audio.errors import AvatardError
from service import VERSION
from service.batch import Halted, Workers, attempt
from service.batch_plan import OWN_FOLDER, BatchError
from service.run import Stopped, engine_settings
from streaming.engine import Engine
from streaming.engine_process import import_path

if TYPE_CHECKING:
    from service.config import Settings
    from service.render import RenderRequest

log = logging.getLogger(__name__)

DEATHS = 3
"""So often may an actor, or its whole machine, be lost over one item."""

LOST_S = 60.0
"""Seconds that an actor which was lost gets to end."""

LOOK_S = 0.5
"""From one look at how far an actor is to the next."""

PLACE_S = 300.0
"""Seconds that a cluster gets to find a place for one actor; it may have to start a machine first."""

CLOSE_S = 10.0
"""Seconds that actors get to end by themselves."""

SHARED = "sounds, pictures and results have to lie where every machine finds them under the same path"

ANSWER_S = 5.0
"""Seconds that a cluster gets to answer."""

NO_CLUSTER, START_ONE = "no cluster answers there", "start one with: ray start --head"

PATHS = ("image", "audio", "target", "folder")


def ray_workers(
    address: str, actors: int | None, out: Path
) -> Callable[[Settings], AbstractAsyncContextManager[Workers]]:
    """What `batch` takes to work on a cluster.

    Args:
        address: of the cluster, as HOST:PORT, ray://HOST:PORT or auto; local: one that is started here and ends with
            the batch.
        actors: side by side; None: as many as the cluster has GPUs, or half as many as it has cores.
        out: the folder of results, which every machine has to see under the same path; as the sounds and pictures.
    Raises: BatchError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise BatchError("--ray: Ray is not installed; pip install 'avatard[ray]'") from error

    out = out.absolute()

    @contextlib.asynccontextmanager
    async def connect(settings: Settings) -> AsyncIterator[Workers]:
        # Ray prints; what is asked of this command on stdout is not Ray's.
        with contextlib.redirect_stdout(sys.stderr):
            await asyncio.to_thread(_connect, address)
            try:
                places = _Cluster(settings, out, actors)
                try:
                    await places.start()
                    yield places
                finally:
                    await places.close()
            finally:
                await asyncio.to_thread(ray.shutdown)

    return connect


class Actor:
    """One engine in a process of Ray's. What goes in and out is plain data."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from service.config import Settings

        self._settings = Settings.model_validate(settings)
        self._engine: Engine | None = None
        self._loading = asyncio.Lock()
        self._stop = asyncio.Event()
        self._progress: tuple[int, int | None] | None = None

    async def unfit(self, token: str, version: str) -> str:
        """Why this machine cannot do it, where it cannot: it does not see that file, or has another avatard."""
        machine = os.uname().nodename
        if version != VERSION:
            return f"machine {machine} has avatard {VERSION}, and this is {version}; install the same on all"
        if not await asyncio.to_thread(os.path.exists, token):
            return f"machine {machine} does not see {token}; {SHARED}"
        return ""

    async def ready(self) -> str:
        """Load the model; why that cannot be, where it cannot."""
        try:
            await (await self._loaded()).ready()
        except AvatardError as error:
            return str(error)
        return ""

    async def make(self, request: dict[str, Any]) -> dict[str, Any]:
        """What `attempt` gives, or why it gave nothing."""
        from service.render import RenderRequest

        whole = RenderRequest(**{**request, **{name: Path(request[name]) for name in PATHS}})
        self._progress = None
        try:
            # An actor that was lost, perhaps with its network only, may be at work on it still.
            async with AsyncFileLock(f"{whole.folder}.lock", timeout=LOST_S):
                return await attempt(whole, await self._loaded(), self._settings, self._advanced, self._stop)
        except Stopped:
            return {"state": "stopped"}
        except Halted as error:
            return {"state": "halted", "error": str(error)}
        except Timeout:
            return {"state": "failed", "error": f"{whole.target}: is being made by a process that was given up"}

    async def progress(self) -> tuple[int, int | None] | None:
        return self._progress

    async def stop(self) -> None:
        """End what is being made, so that it can be gone on with."""
        self._stop.set()

    async def close(self) -> None:
        """End the engine."""
        if self._engine is not None:
            await self._engine.close()

    async def _loaded(self) -> Engine:
        async with self._loading:
            if self._engine is None:
                self._engine = await Engine.launch(engine_settings(self._settings))
            return self._engine

    def _advanced(self, frames: int, total: int | None) -> None:
        self._progress = frames, total


class _Cluster:
    """The actors, each a place; one that is lost is replaced, and its item gone on with from the last checkpoint."""

    def __init__(self, settings: Settings, out: Path, actors: int | None) -> None:
        import ray

        resources = ray.cluster_resources()
        gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        self.slots = actors or gpus or max(1, cores // 2)
        # A share of what there is, so that as many as were asked for have a place.
        each = {"num_gpus": min(1.0, gpus / self.slots)} if gpus else {"num_cpus": min(2.0, cores / self.slots)}
        self._ray, self._settings, self._out = ray, settings, out
        # Whatever waits beside a render has to be answered meanwhile.
        self._kind = ray.remote(Actor).options(max_concurrency=8, **{"num_cpus": 0, **each})
        self._actors: dict[int, Any] = {}

    async def start(self) -> None:
        """Find a place for each actor, or for as many as there is one for, and make sure that they see our files.

        Raises: BatchError.
        """
        token = self._out / OWN_FOLDER / f"seen-{secrets.token_hex(8)}"
        token.touch()
        errors = self._ray.exceptions
        try:
            for slot in range(self.slots):
                try:
                    looking = _awaited(self._actor(slot).unfit.remote(str(token), VERSION))
                    reason = await asyncio.wait_for(looking, PLACE_S)
                except TimeoutError as error:
                    self._ray.kill(self._actors.pop(slot))
                    if slot == 0:
                        raise BatchError(f"--ray: the cluster had no place for an actor in {PLACE_S:g} s") from error
                    log.warning("--ray: there are places for %d of %d actors; going on with these", slot, self.slots)
                    self.slots = slot
                    break
                except (errors.RayActorError, errors.RayTaskError) as error:
                    what = " ".join(str(error).split())[-300:]
                    raise BatchError(
                        f"--ray: an actor cannot be started ({what}); is avatard {VERSION} installed on each machine?"
                    ) from error
                if reason:
                    raise BatchError(f"--ray: {reason}")
        finally:
            token.unlink()

    async def ready(self) -> None:
        for reason in await asyncio.gather(*(_awaited(self._actor(slot).ready.remote()) for slot in range(self.slots))):
            if reason:
                raise AvatardError(reason)

    async def make(
        self, slot: int, request: RenderRequest, on_progress: Callable[[int, int | None], None], stop: asyncio.Event
    ) -> dict[str, Any]:
        plain = asdict(request) | {name: str(getattr(request, name)) for name in PATHS}
        for _ in range(DEATHS):
            try:
                made = await self._watched(self._actor(slot), plain, on_progress, stop)
            except self._ray.exceptions.RayActorError as error:
                self._actors.pop(slot)
                reason = " ".join(str(error).split())
                continue
            except self._ray.exceptions.RayTaskError:
                raise  # a bug, told with its traceback there
            except self._ray.exceptions.RayError as error:
                raise Halted(f"--ray: the cluster was lost ({' '.join(str(error).split())[:200]})") from error
            if made["state"] == "stopped":
                raise Stopped
            if made["state"] == "halted":
                raise Halted(made["error"])
            return made
        return {"state": "failed", "error": f"its actor was lost {DEATHS} times: {reason}"}

    async def close(self) -> None:
        """End the actors, and what they are at."""
        ending = [asyncio.ensure_future(_awaited(actor.close.remote())) for actor in self._actors.values()]
        if ending:
            await asyncio.wait(ending, timeout=CLOSE_S)
        for actor in self._actors.values():
            self._ray.kill(actor)

    def _actor(self, slot: int) -> Any:
        if slot not in self._actors:
            self._actors[slot] = self._kind.remote(self._settings.model_dump(mode="json"))
        return self._actors[slot]

    async def _watched(
        self, actor: Any, plain: dict[str, Any], on_progress: Callable[[int, int | None], None], stop: asyncio.Event
    ) -> dict[str, Any]:
        """What the actor makes, looking after it meanwhile."""
        making = asyncio.ensure_future(_awaited(actor.make.remote(plain)))
        stopping = asyncio.ensure_future(stop.wait())
        try:
            while not making.done():
                await asyncio.wait([making, stopping], timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                if stop.is_set() and not making.done():
                    await actor.stop.remote()
                    await asyncio.wait([making])
                elif not making.done() and (progress := await actor.progress.remote()) is not None:
                    on_progress(*progress)
            return dict(making.result())
        finally:
            making.cancel()
            stopping.cancel()
            await asyncio.gather(making, stopping, return_exceptions=True)


async def _awaited(reference: Any) -> Any:
    """What a reference stands for, as a coroutine."""
    return await reference


def _check_answers(address: str) -> None:
    """Ray itself would look for minutes for what is not there. Raises: BatchError."""
    host, separator, port = address.rpartition("://")[2].rpartition(":")
    if separator and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
        except (OSError, OverflowError) as error:
            reason = (getattr(error, "strerror", None) or str(error)).lower()
            raise BatchError(f"--ray {address}: {NO_CLUSTER} ({reason}); {START_ONE}") from error


def _connect(address: str) -> None:
    """Blocking. Raises: BatchError."""
    import ray

    _check_answers(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    try:
        if address == "local":
            environment = {"env_vars": {"PYTHONPATH": import_path()}}
            ray.init("local", include_dashboard=False, runtime_env=environment, **options)
        else:
            ray.init(address, **options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BatchError(f"--ray {address}: {NO_CLUSTER} ({reason}); {START_ONE}") from error
