"""The operator's log: what stands in a line, and what never does."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys

import pytest

from service import log
from service.config import LoggingSection

KEY = "live_4417_aBcDeFgH"


@pytest.fixture(autouse=True)
def _own_logging():
    """Logging belongs to the whole process: as it was, afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in (*log.QUIET, "uvicorn.error")}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)
    log._secrets.clear()


@pytest.fixture
def lines(capsys):
    """Set the daemon's log up, do something, and give the lines of it."""

    def record(do, **settings):
        log.set_up_daemon(LoggingSection(**settings))
        do(logging.getLogger("service.tested"))
        return capsys.readouterr().err.splitlines()

    return record


def test_a_line_says_when_how_bad_who_and_what(lines):
    (line,) = lines(lambda out: out.warning("disk: %d %% free", 3))
    at, level, name, said = line.split(" ", 3)
    assert at[10] == "T"
    assert at.endswith("Z")
    assert (level, name, said) == ("warning", "service.tested:", "disk: 3 % free")


def test_json_is_an_object_a_line_with_the_same(lines):
    (line,) = lines(lambda out: out.error("no %s", "more"), format="json")
    told = json.loads(line)
    assert told["event"] == "no more"
    assert (told["level"], told["logger"]) == ("error", "service.tested")
    assert told["timestamp"].endswith("Z")


@pytest.mark.parametrize("format", ["text", "json"])
def test_what_is_done_for_a_job_or_a_session_says_for_which(lines, format):
    def do(out):
        with log.bound(job="clip-1"):
            out.info("begun")
        out.info("idle")

    begun, idle = lines(do, format=format)
    assert "clip-1" in begun
    assert "clip-1" not in idle


def test_two_tasks_at_once_say_each_its_own(lines):
    async def work(out, id):
        with log.bound(session=id):
            await asyncio.sleep(0)
            out.info("spoke")
            await asyncio.to_thread(out.info, "thought")

    async def both(out):
        await asyncio.gather(work(out, "a"), work(out, "b"))

    told = lines(lambda out: asyncio.run(both(out)))
    assert sorted(line.split("session=")[1] for line in told) == ["a: spoke", "a: thought", "b: spoke", "b: thought"]


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_what_is_below_the_level_is_left_out(lines, level):
    def do(out):
        for name in ("debug", "info", "warning", "error"):
            getattr(out, name)("said")

    levels = ["debug", "info", "warning", "error"]
    assert [line.split()[1] for line in lines(do, level=level)] == levels[levels.index(level) :]


@pytest.mark.parametrize(
    ("said", "hidden"),
    [
        (f"rtmp://a.example/live/{KEY}: no answer", KEY),
        (f"to rtmps://user:pass9word@a.example/app/{KEY}?token=x1.", KEY),
        ("https://user:pass9word@host/sound.wav", "pass9word"),
        ("https://host/sound.wav?X-Amz-Signature=abcdef0123", "abcdef0123"),
        ("mqtts://bot:hunter22@broker:8883", "hunter22"),
        ("GET /v1/jobs?token=abcdefgh", "abcdefgh"),
        ("connect with password=hunter22, please", "hunter22"),
        ('{"user": "bot", "password": "hunter 22"}', "hunter 22"),
        ("Authorization: Bearer 0123456789abcdef0123", "0123456789abcdef"),
        ("headers {'authorization': 'Bearer 0123456789abcdef0123'}", "0123456789abcdef"),
        ("Bearer 0123456789abcdef0123", "0123456789abcdef"),
        ("Sec-WebSocket-Protocol: avatard, bearer.MDEyMzQ1Njc4OWFiY2RlZg", "MDEyMzQ1Njc4OWFiY2RlZg"),
        ("api_key: sk-42424242", "sk-42424242"),
    ],
)
@pytest.mark.parametrize("format", ["text", "json"])
def test_no_secret_is_written(lines, said, hidden, format):
    told = lines(lambda out: out.info("%s", said), format=format)
    assert hidden not in "\n".join(told)
    assert "***" in told[0]


@pytest.mark.parametrize(
    "said",
    [
        "listening on http://127.0.0.1:8000",
        "auth.tokens: front: has no text; name a file or env that holds it",
        "mqtt.password_file: /etc/avatard/mqtt: cannot be read",
        "keyframes every 2 s, key order does not matter",
        "2 tokens, of them 1 with scope admin",
    ],
)
def test_what_is_no_secret_stays(lines, said):
    assert lines(lambda out: out.info("%s", said))[0].endswith(said)


def test_a_secret_that_was_read_is_hidden_wherever_it_turns_up(lines):
    def do(out):
        log.hide("sesame-open")
        try:
            raise ValueError("the server said: bad sesame-open")
        except ValueError:
            out.exception("could not sign in")

    told = "\n".join(lines(do))
    assert "sesame-open" not in told
    assert "ValueError: the server said: bad ***" in told


def test_nobody_can_write_a_line_of_his_own(lines):
    told = lines(lambda out: out.info("name %s", "x\n2026-01-01T00:00:00Z error service.jobs: all is lost\x1b[2J"))
    assert len(told) == 1
    assert "\x1b" not in told[0]


def test_a_traceback_is_below_its_line_and_in_json_inside_it(lines):
    def do(out):
        try:
            raise KeyError("missing")
        except KeyError:
            out.exception("failed")

    told = lines(do)
    assert told[0].endswith("failed")
    assert told[-1] == "KeyError: 'missing'"
    (line,) = lines(do, format="json")
    assert "KeyError: 'missing'" in json.loads(line)["exception"]


def test_what_libraries_say_comes_in_the_same_form(lines):
    def do(out):
        logging.getLogger("uvicorn.error").error("bad request")
        logging.getLogger("aiomqtt").warning("disconnected")
        logging.getLogger("uvicorn.access").info("GET / 200")
        logging.getLogger("httpx").info("GET https://host/?key=1")

    assert [line.split(" ", 1)[1] for line in lines(do)] == [
        "error uvicorn.error: bad request",
        "warning aiomqtt: disconnected",
    ]


def test_a_command_keeps_its_short_lines():
    program = "import logging; from service import log; log.set_up(); logging.getLogger('x').warning('a %s', 1)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.stderr == "avatard: a 1\n"


def test_commands_that_are_no_daemon_do_not_load_what_the_daemon_logs_with():
    program = "import sys; from service import log; log.set_up(); print('structlog' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.stdout == "False\n"


def test_a_secret_of_the_settings_is_hidden_once_it_was_read(lines, tmp_path, monkeypatch):
    from service.secrets import read_secret

    monkeypatch.setenv("AVATARD_TEST_SECRET", "correct horse battery")
    read_secret("mqtt.password", None, "AVATARD_TEST_SECRET")
    (line,) = lines(lambda out: out.info("the broker repeats: correct horse battery"))
    assert line.endswith("the broker repeats: ***")
