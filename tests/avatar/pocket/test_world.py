"""The drawn world and its motion: what is painted is what the numbers say, and a seed says all of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from avatar.pocket.motion import DRIVE, init_motion, next_drive, sample_drive, speech_energy
from avatar.pocket.world import (
    MOUTH,
    SIZE,
    Motion,
    Person,
    as_frames,
    as_motion,
    detail_weight,
    draw,
    mouth_opening_pixels,
    reference_motion,
    sample_person,
)

FRAMES_PER_MINUTE = 25 * 60


pytestmark = pytest.mark.usefixtures("one_thread")


def people(count: int, seed: int = 50_000) -> Person:
    return sample_person(count, torch.Generator().manual_seed(seed))


def at_rest(count: int, **moved: float) -> Motion:
    return {name: torch.full((count,), moved.get(name, 0.0)) for name in DRIVE + MOUTH}


def quiet_drive(seed: int, frames: int, blocks: int | None = None) -> Tensor:
    """The drive [1, frames, 11] of a session that hears silence, made in blocks of that many frames."""
    state = init_motion(seed)
    parts = torch.zeros(1, frames).split(blocks or frames, dim=1)
    return torch.cat([next_drive(state, energy) for energy in parts], dim=1)


@pytest.mark.parametrize("size", [64, SIZE])
def test_pictures_are_rgb_between_0_and_1(size):
    g = torch.Generator().manual_seed(1)
    person = people(3)
    motion = {name: value[:, 0] for name, value in reference_motion(3, g).items()}
    pictures = draw(person, motion, size)
    assert pictures.shape == (3, 3, size, size)
    assert pictures.isfinite().all()
    assert pictures.min() >= 0
    assert pictures.max() <= 1


def test_a_seed_draws_one_person_and_no_two_are_alike():
    torch.testing.assert_close(draw(people(4), at_rest(4), 64), draw(people(4), at_rest(4), 64), rtol=0, atol=0)
    pictures = draw(people(12), at_rest(12), 64).flatten(1)
    distance = torch.cdist(pictures, pictures) + torch.eye(12) * 1e9
    assert distance.min() / pictures.shape[1] ** 0.5 > 0.03


def test_people_are_drawn_alike_alone_and_in_a_batch():
    many = people(3)
    one = {name: trait[1:2] for name, trait in many.items()}
    torch.testing.assert_close(draw(one, at_rest(1), 64)[0], draw(many, at_rest(3), 64)[1], rtol=0, atol=1e-6)


def test_the_mouth_gets_darker_inside_the_more_it_opens():
    openings = [0.0, 0.25, 0.5, 0.75, 1.0]
    person = people(4)
    person |= {name: torch.zeros(4) for name in ("beard", "moustache")}
    heights, areas = [], []
    closed = draw(person, at_rest(4))
    for opening in openings:
        motion = at_rest(4, opening=opening)
        heights.append(mouth_opening_pixels(person, motion)[0])
        areas.append((draw(person, motion) - closed).abs().amax(1).gt(0.1).sum((1, 2)).float())
    height, area = torch.stack(heights), torch.stack(areas)
    assert (height[0] == 0).all()
    assert (height.diff(dim=0) > 0).all()
    assert (area.diff(dim=0) > 0).all()
    assert torch.corrcoef(torch.stack([height.flatten(), area.flatten()]))[0, 1] > 0.9


def test_the_gap_that_is_drawn_is_as_high_as_the_number_says():
    person = people(4)
    motion = at_rest(4, opening=1.0)
    hollow = torch.tensor([0.29, 0.07, 0.09])[None, :, None, None]
    tongue = torch.tensor([0.80, 0.37, 0.41])[None, :, None, None]
    teeth = torch.tensor([0.96, 0.95, 0.92])[None, :, None, None]
    picture = draw(person, motion)
    inside = torch.stack([(picture - colour).abs().amax(1) < 0.01 for colour in (hollow, tongue, teeth)]).any(0)
    row, column = [torch.arange(SIZE)] * 2
    scale = person["head_scale"] * SIZE / 2
    x, y = SIZE / 2 * (1 + person["head_x"]), SIZE / 2 * (1 + person["head_y"]) + person["mouth_y"] * scale
    wanted = mouth_opening_pixels(person, motion)[0]
    for i in range(4):
        near = (row[:, None] - y[i]).abs().lt(30) & (column[None] - x[i]).abs().lt(3)
        measured = (inside[i] & near).sum(0).max()
        # the lips' edge is soft and lined, two pixels on either side
        assert wanted[i] - 6 < measured < wanted[i] + 1


def test_a_blink_closes_the_eyes():
    person = people(2) | {"glasses": torch.zeros(2)}
    changed = (draw(person, at_rest(2, blink=1.0)) - draw(person, at_rest(2))).abs().amax(1) > 0.2
    rows = changed.any(2).nonzero()
    assert (changed.sum((1, 2)) > 50).all()
    assert rows[:, 1].max() < SIZE * 0.6  # nothing below the eyes moves


def test_detail_counts_most_at_the_mouth():
    person, motion = people(1), at_rest(1)
    weight = detail_weight(person, motion)[0, 0]
    y, _ = divmod(int(weight.argmax()), 64)
    mouth = 32 * (1 + person["head_y"] + person["head_scale"] * person["mouth_y"])
    assert y == pytest.approx(float(mouth), abs=1.5)
    assert 4.5 < weight.max() <= 7
    assert weight.min() < 1.1


def test_clips_become_single_frames_in_order():
    person = people(2)
    drive = torch.arange(2 * 3 * 11.0).view(2, 3, 11)
    who, how = as_frames(person, as_motion(drive, torch.zeros(2, 3, 4)))
    torch.testing.assert_close(who["head_x"], person["head_x"].repeat_interleave(3))
    torch.testing.assert_close(how["tx"], drive[..., 0].flatten())


@pytest.mark.parametrize("block", [1, 5, 12, 48])
def test_motion_made_in_blocks_equals_motion_made_whole(block):
    torch.testing.assert_close(quiet_drive(7, 96, block), quiet_drive(7, 96), rtol=0, atol=2e-5)


def test_a_seed_moves_one_way():
    torch.testing.assert_close(quiet_drive(3, 100), quiet_drive(3, 100), rtol=0, atol=0)
    assert (quiet_drive(3, 100) - quiet_drive(4, 100)).abs().max() > 0.05


def test_sessions_blink_about_twenty_times_a_minute():
    minutes = 6
    blinks = []
    for seed in range(3):
        closed = quiet_drive(seed, minutes * FRAMES_PER_MINUTE, 500)[0, :, DRIVE.index("blink")] > 0.9
        blinks.append(float((closed[1:] & ~closed[:-1]).sum()) / minutes)
    assert 14 < sum(blinks) / len(blinks) < 25


def test_training_blinks_as_often_as_a_session():
    g = torch.Generator().manual_seed(0)
    drive = sample_drive(torch.zeros(4, 4 * FRAMES_PER_MINUTE), torch.ones(4, 1), g)
    closed = drive[..., DRIVE.index("blink")] > 0.9
    assert 15 < float((closed[:, 1:] & ~closed[:, :-1]).sum()) / 16 < 24


def test_a_person_moves_in_silence_and_never_jumps():
    drive = quiet_drive(11, FRAMES_PER_MINUTE)[0]
    for name, least, most in (("tx", 0.008, 0.03), ("roll", 0.014, 0.06), ("yaw", 0.2, 0.8)):
        values = drive[:, DRIVE.index(name)]
        assert least < values.std() < most
        assert values.diff().abs().max() < 0.35 * values.std()


def test_silence_has_no_energy_and_speech_has():
    assert speech_energy(torch.full((1, 8, 80), -5.0)).abs().max() == 0
    assert speech_energy(torch.full((1, 8, 80), -0.5)).min() > 0.7
