"""A daemon that knows nothing but jobs: what tests kill.

python tests/jobs_daemon.py FOLDER COUNT [section.key=value ...]

Submits jobs job-0 ... job-COUNT-1 of FOLDER/place/*.wav in turn (by their ids the same ones in each life), works on all
that there is, and says on stdout, a line each: "accepted ID", "STATE ID", and at the end of all jobs "done".
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from service.commands import SubmitJob
from service.config import Settings, load_settings
from service.hub import Hub
from service.inputs import Inputs
from service.jobs import Jobs
from service.run import engine_settings
from service.store import JobStore
from service.turns import Turns
from streaming.engine import Engine

TOY = str(Path(__file__).parent / "toy_model.py") + ":load"


def settings_in(folder: Path, *assignments: str) -> Settings:
    """Settings of a daemon all of whose files lie in a folder, and that speaks by the toy model."""
    return load_settings(
        None,
        [
            f"daemon.state={folder / 'state'}",
            f"daemon.outputs={folder / 'out'}",
            f"inputs.roots=[{folder / 'place'}]",
            f"model.name={TOY}",
            "encoder.preset=ultrafast",
            "jobs.min_free_gb=0",
            "jobs.segment_s=1",
            *assignments,
        ],
    )


def command(folder: Path, number: int) -> SubmitJob:
    sounds = sorted((folder / "place").glob("*.wav"))
    return SubmitJob.model_validate(
        {
            "id": f"job-{number}",
            "image": str(folder / "place" / "face.png"),
            "audio": str(sounds[number % len(sounds)]),
            "seed": number,
            "priority": "interactive" if number % 3 == 0 else "batch",
            "name": f"{number % 2}/job-{number}",
        }
    )


async def main(folder: Path, count: int, assignments: list[str]) -> None:
    settings, hub = settings_in(folder, *assignments), Hub()
    store = await JobStore.open(folder / "state" / "jobs.sqlite")
    async with await Engine.launch(engine_settings(settings)) as engine:
        jobs = Jobs(store, Inputs(settings), engine, Turns(), hub, settings)
        with hub.listen(10_000) as news:

            async def tell() -> None:
                async for item in news:
                    if item.kind == "job" and item.what != "progress":
                        print(item.what, item.id, flush=True)

            telling, working = asyncio.create_task(tell()), asyncio.create_task(jobs.run())
            for number in range(count):
                job, _ = await jobs.submit(command(folder, number))
                print("accepted", job.id, flush=True)
            for number in range(count):
                waiting = asyncio.create_task(jobs.wait(f"job-{number}", 600))
                await asyncio.wait({waiting, working, telling}, return_when=asyncio.FIRST_COMPLETED)
                for task in working, telling:
                    if task.done():
                        task.result()
            # The last thing that is done about a job, and nobody is told.
            while await store.untidy():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            for task in working, telling:
                task.cancel()
            await asyncio.gather(working, telling, return_exceptions=True)
    await store.close()
    print("done", flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
