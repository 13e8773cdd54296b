"""URLs as they may be shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio.urls import blanked, redacted


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rtmp://a.example/live/key", "rtmp://a.example/live/***"),
        ("rtmps://a.example:443/app/instance/key?token=t", "rtmps://a.example:443/app/instance/***?***"),
        ("rtmp://a.example/live/key/", "rtmp://a.example/live/***"),
        ("rtmp://user:word@[::1]:1935/live/key", "rtmp://***@[::1]:1935/live/***"),
        ("rtmp://a.example", "rtmp://a.example"),
        ("rtmp://a.example:port/key", "rtmp://a.example:port/***"),
        ("srt://a.example:9000?streamid=key", "srt://a.example:9000?***"),
        ("http://user@a.example/radio.mp3#t", "http://***@a.example/radio.mp3?***"),
        ("http://a.example/radio.mp3", "http://a.example/radio.mp3"),
    ],
)
def test_what_only_the_other_end_may_know_is_not_shown(url, shown):
    assert redacted(url) == shown


def test_a_servers_answer_is_shown_without_the_key_it_quotes():
    url = "rtmp://user:word@host/live/k-1%20x?token=abc&q=a"
    answer = f"{url}: 'k-1%20x' (k-1 x, k-1%20x?token=abc&q=a, abc, word) is already a stream of the app"
    assert blanked(answer, url) == (
        "rtmp://***@host/live/***?***: '***' (***, ***, ***, ***) is already *** stream of the app"
    )


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rtmp://SECRET:SEC@RET@a.example/app/SECRET", "rtmp://***@a.example/app/***"),
        ("rtmp://SECRET:SEC/RET@a.example/app/SECRET", "rtmp://***"),
        ("rtmp://SECRET:12/SECRET@a.example/app/SECRET", "rtmp://***"),
        ("rtmp://SECRET:SEC?RET@a.example/app/SECRET", "rtmp://***"),
        ("rtmp://SECRET:SEC#RET@a.example/app/SECRET", "rtmp://***"),
        ("http://SECRET:SEC/RET@a.example/radio.mp3", "http://***"),
        ("http://a.example:80/@presenter/live", "http://a.example:80/@presenter/live"),
        ("rtmp://a.example/app playpath=SECRET live=1", "rtmp://a.example/***?***"),
        ("RTMP://a.example/app/SECRET", "RTMP://a.example/app/***"),
        ("rtmp://[half/SECRET", "rtmp://***"),
        ("http://a.example/a\nb\x1b[2J", "http://a.example/a?***"),
        ("speech.wav", "speech.wav"),
        ("/tmp/a?b=c", "/tmp/a?b=c"),
        ("-", "-"),
        ("alsa:hw:0,0", "alsa:hw:0,0"),
    ],
)
def test_a_url_that_is_not_in_order_shows_no_secret_either(url, shown):
    assert redacted(url) == shown


WORD = st.text(st.sampled_from("kKyY0189-_.~%@:/?#[] &="), max_size=12)


@given(scheme=st.sampled_from(["rtmp", "rtmps"]), user=WORD, password=WORD, query=WORD)
def test_whatever_is_in_them_neither_key_nor_password_is_shown(scheme, user, password, query):
    url = f"{scheme}://{user}ZZZ:{password}ZZZ@host.example/app/ZZZkeyZZZ?{query}=ZZZ"
    assert "ZZZ" not in redacted(url)


@given(st.text())
def test_anything_at_all_is_shown_in_one_line(text):
    assert "\n" not in redacted(text)
    assert "\n" not in redacted(f"rtmp://{text}")
