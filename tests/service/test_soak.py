"""Hours on air, by name: `pytest -m slow tests/service/test_soak.py -s`; AVATARD_SOAK_S says how long, if not 600 s.

What it prints goes into docs/reliability.md.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import skew
from live import FLASHING, TOY, Live
from procs import ProcessWatch
from rtmp import RtmpServer
from speech import Speech

SECONDS = float(os.environ.get("AVATARD_SOAK_S", "600"))
PRESENTER = Path(__file__).parent.parent.parent / "examples" / "presenter.png"

SETTLED_S = min(60.0, SECONDS / 5)
"""After which memory is expected to be flat."""

pytestmark = [pytest.mark.slow, pytest.mark.needs("nginx")]


@pytest.mark.parametrize("model", [TOY, FLASHING], ids=["toy", "pocket"])
def test_a_voice_from_stdin_is_on_air_and_in_a_file_for_long(tmp_path: Path, model: str) -> None:
    with RtmpServer(tmp_path / "server") as server:
        targets = [server.url("key"), "show.mp4"]
        # As many threads as it takes by itself: nothing else is tested beside it.
        own = {"OMP_NUM_THREADS": ""}
        preset = "--set=encoder.preset=superfast"
        command = Live(tmp_path / "live", targets, preset, model=model, image=PRESENTER, environment=own)
        with command as live:
            live.wait_for("on air", 60)
            with ProcessWatch(live.pid, every_s=2.0) as processes:
                speaker = live.speak(Speech(click_every_s=2.0), SECONDS)
                speaker.join(SECONDS + 60)
                assert live.end(60) == 0
            ended = live.of("ended")[-1]
            statuses = live.of("status")
        readings = {"show.mp4": skew.read(tmp_path / "live" / "show.mp4")}
        recordings = server.recordings("key")
        for number, path in enumerate(recordings):
            readings[f"rtmp connection {number + 1}"] = skew.read(path)
        report = {
            "seconds": SECONDS,
            "ended": ended.fields,
            "load": {"median": _median([status["load"] for status in statuses]), "most": statuses[-1]["load"]},
            "outputs": statuses[-1]["outputs"],
            "processes": processes.summary(SETTLED_S),
            **{name: reading.summary() for name, reading in readings.items()},
        }
        print(json.dumps(report, indent=1))
        file, sent = readings["show.mp4"], readings["rtmp connection 1"]
        assert len(recordings) == 1
        assert ended["seconds"] >= SECONDS
        assert abs(sent.video.end_s - file.video.end_s) < 2.5, "the stream is shorter than the file"
        for reading in (file, sent):
            assert reading.skew.p95 <= 40
            assert reading.skew.max <= 80
            assert reading.video.backward == reading.audio.backward == 0
            assert reading.black == 0
        assert all(output["dropped_frames"] == 0 for output in statuses[-1]["outputs"])
        assert sent.frames == file.frames == ended["frames"]


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
