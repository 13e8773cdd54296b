"""URLs as they may be shown."""

from __future__ import annotations

import pytest

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
