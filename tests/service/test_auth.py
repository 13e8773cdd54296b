"""Tokens, scopes and limits, tried by whoever has none, a wrong one, or one too many."""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import Any

import pytest

from service import auth
from service.auth import MOST_COUNTED, Keys, is_loopback
from service.commands import Refusal
from service.config import ConfigError, Settings
from service.log import without_secrets
from service.secrets import read_secret

BOT, ROOT, EYE = "b" * 24, "r" * 24, "e" * 24
HERE = "192.0.2.7"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def secret(folder: Path, name: str, text: str, mode: int = 0o600) -> Path:
    path = folder / name
    path.write_text(text)
    path.chmod(mode)
    return path


def settings(*tokens: dict[str, Any], host: str = "127.0.0.1", **limits: int) -> Settings:
    return Settings.model_validate({"http": {"host": host}, "auth": {"tokens": tokens, **limits}})


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Keys:
    monkeypatch.setenv("AVATARD_TEST_ROOT", ROOT)
    return Keys.load(
        settings(
            {"name": "bot", "scopes": ["jobs"], "file": secret(tmp_path, "bot", f"{BOT}\n")},
            {"name": "root", "scopes": ["admin"], "env": "AVATARD_TEST_ROOT"},
            {"name": "eye", "scopes": ["read"], "file": secret(tmp_path, "eye", EYE)},
            requests_per_minute=10,
            failures_per_minute=3,
        ),
        clock,
    )


def refusal(work: Any, *arguments: object) -> Refusal:
    with pytest.raises(Refusal) as caught:
        work(*arguments)
    assert "\n" not in str(caught.value)
    return caught.value


# Tokens


def test_a_token_is_who_it_says(keys):
    assert keys.required
    assert keys.identify(BOT, HERE).name == "bot"
    assert keys.identify(ROOT, HERE).scopes == {"read", "jobs", "live", "admin"}


@pytest.mark.parametrize(
    "token", [None, "", "x", BOT[:-1], BOT + "b", BOT.upper(), f" {BOT}", f"{BOT}\n", "\ud800", "\0" * 24, "b" * 10**6]
)
def test_a_wrong_token_is_nobody(keys, token):
    assert refusal(keys.identify, token, HERE).reason == "unauthorised"


def test_a_refusal_does_not_say_the_token(keys):
    assert "almost-the-token" not in str(refusal(keys.identify, "almost-the-token", HERE))
    assert all(text not in repr(keys._tokens) for text in (BOT, ROOT, EYE))


def test_all_tokens_are_compared_in_constant_time_as_digests_of_one_length(keys, monkeypatch):
    class Comparing:
        def __init__(self) -> None:
            self.lengths: list[tuple[int, int]] = []

        def compare_digest(self, one: bytes, other: bytes) -> bool:
            self.lengths.append((len(one), len(other)))
            return hmac.compare_digest(one, other)

    for token in (BOT, "x"):
        comparing = Comparing()
        monkeypatch.setattr(auth, "hmac", comparing)
        keys._find(token)
        assert comparing.lengths == [(32, 32)] * 3, "the first may be right, the others are looked at all the same"


# Scopes


@pytest.mark.parametrize(
    ("token", "may"), [(BOT, {"read", "jobs"}), (ROOT, {"read", "jobs", "live", "admin"}), (EYE, {"read"})]
)
def test_a_scope_allows_what_it_says_and_no_more(keys, token, may):
    principal = keys.identify(token, HERE)
    for scope in ("read", "jobs", "live", "admin"):
        if scope in may:
            principal.require(scope)
        else:
            error = refusal(principal.require, scope)
            assert error.reason == "forbidden"
            assert scope in str(error)


# Where tokens come from


def broken(*tokens: dict[str, Any], host: str = "127.0.0.1") -> str:
    with pytest.raises(ConfigError) as caught:
        Keys.load(settings(*tokens, host=host))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        ("", 0o600, "is empty"),
        (" \n", 0o600, "is empty"),
        ("short", 0o600, "has 5 characters, at least 16"),
        (BOT, 0o644, "everybody on this machine can read"),
        (BOT, 0o602, "everybody on this machine can read or change it"),
        (f"{BOT}\n{BOT}", 0o600, "more than one line"),
        (None, 0o600, "cannot be read"),
    ],
)
def test_a_token_file_that_is_not_in_order_ends_the_start(tmp_path, text, mode, says):
    path = tmp_path / "token" if text is None else secret(tmp_path, "token", text, mode)
    message = broken({"name": "bot", "scopes": ["jobs"], "file": path})
    assert says in message
    assert "bot" in message
    assert BOT not in message


@pytest.mark.parametrize(
    ("value", "says"), [(None, "no environment variable"), ("", "is empty"), ("x" * 15, "15 characters")]
)
def test_a_token_variable_that_is_not_in_order_ends_the_start(monkeypatch, value, says):
    monkeypatch.delenv("AVATARD_TEST_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("AVATARD_TEST_TOKEN", value)
    message = broken({"name": "bot", "scopes": ["jobs"], "env": "AVATARD_TEST_TOKEN"})
    assert says in message
    assert not value or value not in message


def test_tokens_that_contradict_each_other_end_the_start(tmp_path):
    one = {"name": "one", "scopes": ["jobs"], "file": secret(tmp_path, "one", BOT)}
    assert "stands there twice" in broken(one, one)
    assert "is the same token as one" in broken(one, {**one, "name": "two"})
    assert "not both" in broken({**one, "env": "HOME"})
    assert "has no text" in broken({"name": "one", "scopes": ["jobs"]})
    assert "has no scopes" in broken({**one, "scopes": []})


def test_a_folder_or_a_device_is_no_token(tmp_path):
    assert "cannot be read" in broken({"name": "bot", "scopes": ["jobs"], "file": tmp_path})
    assert "everybody" in broken({"name": "bot", "scopes": ["jobs"], "file": Path("/dev/zero")})


def test_a_secret_is_named_by_file_or_variable_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("AVATARD_TEST_TOKEN", "  pass word ")
    assert read_secret("mqtt.password", None, "AVATARD_TEST_TOKEN") == "pass word"
    assert read_secret("mqtt.password", secret(tmp_path, "p", "geheim\n"), "") == "geheim"
    assert read_secret("mqtt.password", None, "") == ""


def test_a_secret_that_was_read_is_blanked_in_the_log_from_then_on(tmp_path):
    text = "never-to-be-seen-again"
    assert text in without_secrets(f"somebody sent {text}")
    read_secret("mqtt.password", secret(tmp_path, "p", text), "")
    assert text not in without_secrets(f"somebody sent {text}")


# Without tokens


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.0.4", "example.org", "::ffff:127.0.0.1", "127.1", "*"])
def test_listening_for_other_machines_needs_a_token(host, tmp_path):
    assert "there is no token" in broken(host=host)
    Keys.load(settings({"name": "a", "scopes": ["read"], "file": secret(tmp_path, "a", BOT)}, host=host))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.2"])
def test_on_loopback_everybody_may_do_everything(host):
    keys = Keys.load(settings(host=host))
    assert is_loopback(host)
    assert not keys.required
    keys.identify(None, "127.0.0.1").require("admin")


# Limits


def test_who_asks_too_often_has_to_wait_and_nobody_else(keys, clock):
    for _ in range(10):
        keys.identify(BOT, HERE)
    error = refusal(keys.identify, BOT, "192.0.2.8")
    assert error.reason == "busy"
    assert error.retry_s == pytest.approx(60)
    keys.identify(ROOT, HERE)
    clock.now += 59
    assert refusal(keys.identify, BOT, HERE).retry_s == pytest.approx(1)
    clock.now += 2
    keys.identify(BOT, HERE)


def test_who_guesses_has_to_wait_even_with_the_right_token(keys, clock):
    for _ in range(3):
        assert refusal(keys.identify, "guess", HERE).reason == "unauthorised"
    for token in ("guess", BOT):
        assert refusal(keys.identify, token, HERE).reason == "busy"
    keys.identify(BOT, "192.0.2.8")
    clock.now += 61
    keys.identify(BOT, HERE)


def test_a_page_that_has_no_token_yet_is_no_guesser(keys):
    for _ in range(9):
        assert refusal(keys.identify, None, HERE).reason == "unauthorised"
    keys.identify(BOT, HERE)


def test_the_addresses_of_one_ipv6_customer_are_one(keys):
    for last in range(3):
        refusal(keys.identify, "guess", f"2001:db8:1:2::{last}")
    assert refusal(keys.identify, BOT, "2001:db8:1:2:ffff::9").reason == "busy"
    keys.identify(BOT, "2001:db8:1:3::1")


def test_an_address_is_itself_also_when_written_as_ipv6(keys):
    for _ in range(3):
        refusal(keys.identify, "guess", f"::ffff:{HERE}")
    assert refusal(keys.identify, BOT, HERE).reason == "busy"


def test_without_tokens_each_address_is_limited():
    keys = Keys.load(settings(requests_per_minute=2), Clock())
    for _ in range(2):
        keys.identify(None, "127.0.0.1")
    assert refusal(keys.identify, None, "127.0.0.1").reason == "busy"
    keys.identify(None, "127.0.0.2")


def test_a_crowd_of_guessers_takes_bounded_memory(keys):
    for number in range(MOST_COUNTED + 500):
        refusal(keys.identify, "guess", f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(keys._failures._counts._counts) == MOST_COUNTED


def test_what_has_passed_is_forgotten(keys, clock):
    for number in range(100):
        refusal(keys.identify, "guess", f"10.0.0.{number}")
    clock.now += 61
    refusal(keys.identify, "guess", HERE)
    assert len(keys._failures._counts._counts) == 1
