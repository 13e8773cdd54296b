"""Track: packets as they came, from memory and from the disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from av.packet import Packet

from avatar.model import FrameBlock
from streaming.encoder import Encoder, EncoderSettings
from streaming.packets import Track

Told = list[tuple[int | None, int | None, int | None, bool, bytes]]


def told(packets: list[Packet]) -> Told:
    return [(p.pts, p.dts, p.duration, p.is_keyframe, bytes(p)) for p in packets]


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(64, 64, 25, 1, EncoderSettings(keyframe_interval_s=0.4))


def pictures(encoder: Encoder, blocks: int) -> list[Packet]:
    frames = np.random.default_rng(0).integers(0, 255, (12 * blocks, 64, 64, 3)).astype(np.uint8)
    made = encoder.encode(FrameBlock(frames, np.zeros(0, np.float32), 0), np.zeros((0, 1), np.float32))
    return made + encoder.flush()


@pytest.mark.parametrize("kept", [0, 7, 24])
def test_packets_are_what_they_were_wherever_they_lie(tmp_path, encoder, kept):
    packets = pictures(encoder, 2)
    track = Track(tmp_path / "video", encoder.streams[0])
    track.add(packets[:kept])
    if kept:
        track.keep(flush=True)
    track.add(packets[kept:])
    for _ in range(2):
        assert told(list(track)) == told(packets)
    assert track.held_bytes == sum(packet.size for packet in packets[kept:])


def test_sound_from_before_the_first_sample_is_kept_too(tmp_path, encoder):
    sound = np.random.default_rng(0).normal(0, 0.1, (20_000, 1)).astype(np.float32)
    packets = encoder.encode(FrameBlock(np.zeros((0, 64, 64, 3), np.uint8), sound[:0, 0], 0), sound) + encoder.flush()
    assert packets[0].pts == -1024
    track = Track(tmp_path / "sound", encoder.streams[1])
    track.add(packets)
    track.keep(flush=False)
    assert told(list(track)) == told(packets)


def test_what_lies_behind_the_kept_bytes_is_cut_off(tmp_path, encoder):
    packets, path = pictures(encoder, 2), tmp_path / "video"
    first = Track(path, encoder.streams[0])
    first.add(packets[:12])
    first.keep(flush=True)
    kept = first.kept_bytes
    with Path(path).open("ab") as file:
        file.write(b"what a kill left half written")
    second = Track(path, encoder.streams[0], kept)
    assert told(list(second)) == told(packets[:12])
    second.add(packets[12:])
    second.keep(flush=True)
    assert told(list(second)) == told(packets)
    assert path.stat().st_size == second.kept_bytes
