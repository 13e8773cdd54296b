"""Networks where a plan says, and a step down when there is no room: the frames stay the same to the bit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import avatar.place
from audio.chunk import AudioBlock
from avatar.cards import GIB, find_card
from avatar.demand import Schedule
from avatar.live_avatar.dit import DiTConfig
from avatar.live_avatar.generator import LiveAvatar, Options, random_live_avatar
from avatar.live_avatar.size import Shape
from avatar.model import Reference
from avatar.offload import StreamedLayers
from avatar.place import Places, Wish, choose
from avatar.placement import DoesNotFit, Host, Lives, Place, Placement, Precision, Target, plan
from avatar.quantize import Float8Linear

LAYERS = 5
ALL = range(LAYERS)
TINY = DiTConfig(
    dim=64,
    ffn_dim=96,
    num_heads=2,
    num_layers=LAYERS,
    text_dim=32,
    text_len=8,
    audio_dim=64,
    audio_layers=3,
    audio_inject_layers=(0, 2, 4),
)
ROOMY, CPU = Host(128 * GIB), torch.device("cpu")
DEMAND = Shape().demand()

pytestmark = pytest.mark.usefixtures("one_thread")


def placed(
    layers: Collection[int] = ALL,
    rings: Collection[int] = ALL,
    bits: Precision = Precision.BF16,
    encoder: Lives = Lives.RESIDENT,
    speech: Lives = Lives.RESIDENT,
) -> Placement:
    """A plan of the full size, changed to say what becomes of the few layers here."""
    placement = plan(DEMAND, [find_card("h200")], ROOMY, Target(weights=bits, cache=bits))
    (device,) = placement.devices

    def streamed(place: Place, staying: Collection[int]) -> Place:
        lives = Lives.RESIDENT if len(staying) == LAYERS else Lives.STREAMED
        return replace(place, lives=lives, layers=LAYERS, resident_layers=tuple(staying))

    changed: dict[str, Callable[[Place], Place]] = {
        "transformer": lambda place: streamed(place, layers),
        "rings": lambda place: streamed(place, rings),
        "VAE encoder": lambda place: replace(place, lives=encoder),
        "speech encoder": lambda place: replace(place, lives=speech),
    }
    places = tuple(changed.get(place.part, lambda same: same)(place) for place in device.places)
    return replace(placement, devices=(replace(device, places=places),))


def made(placement: Placement, **options: Any) -> tuple[LiveAvatar, Places]:
    places = Places(placement, DEMAND, ROOMY, CPU)
    chosen = Options(width=64, height=64, steps=2, motion_frames=9, prime_latents=3, **options)
    model = random_live_avatar(
        chosen, TINY, dtype=torch.float32, device="cpu", vae_width=4, speech_layers=2, places=places
    )
    return model, places


def frames(model: LiveAvatar, blocks: int = 5, before: Callable[[int], None] = lambda block: None) -> np.ndarray:
    """Of a stream over more than a ring and a clip; before: called in front of each block."""
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    state, shown = model.start(Reference(picture, seed=1)), []
    for block in range(blocks):
        before(block)
        sound = 0.1 * np.random.default_rng(block).standard_normal(10_880).astype(np.float32)
        shown += model.step(state, AudioBlock(sound[:7680], block * 7680, 7680, sound[7680:]))
    shown += model.finish(state)
    return np.concatenate([block.frames for block in shown])


@pytest.fixture(scope="module", params=list(Precision), ids=str)
def resident(request: pytest.FixtureRequest) -> tuple[Precision, np.ndarray]:
    return request.param, frames(made(placed(bits=request.param))[0])


@pytest.mark.parametrize(
    ("layers", "rings", "schedule"),
    [
        ((), (), Schedule.SEQUENTIAL),
        ((1, 2), ALL, Schedule.SEQUENTIAL),
        ((0, 3), (1,), Schedule.WAVEFRONT),
    ],
)
def test_wherever_parts_live_the_frames_are_the_same(resident, layers, rings, schedule):
    bits, expected = resident
    away = Lives.ON_DEMAND
    model, _ = made(placed(layers, rings, bits, encoder=away, speech=away), schedule=schedule)
    assert isinstance(model.dit.blocks, StreamedLayers)
    eight = [name for name, layer in model.dit.named_modules() if isinstance(layer, Float8Linear)]
    assert bool(eight) == model.dit.float8_cache == (bits is Precision.FP8)
    np.testing.assert_array_equal(frames(model), expected)


def run_out(model: LiveAvatar, at_pass: int, at_layer: int) -> None:
    """Let the device have no memory once, in the midst of that pass from now on."""
    written, passes = model.dit.step_by_layer, 0

    def failing(*arguments: Any, **options: Any) -> Iterator[Any]:
        nonlocal passes
        passes += 1
        layers = written(*arguments, **options)
        if passes != at_pass:
            return (yield from layers)
        for _ in range(at_layer):
            yield next(layers)
        model.dit.step_by_layer = written  # type: ignore[method-assign]
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB. GPU 0 has others")

    model.dit.step_by_layer = failing  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize(
    ("schedule", "before"),
    [(Schedule.SEQUENTIAL, (ALL, ALL)), (Schedule.WAVEFRONT, ((1, 2, 4), (2, 3)))],
    ids=["sequential, all resident", "wavefront, streamed"],
)
def test_when_memory_runs_out_in_mid_step_the_stream_goes_on_as_if_nothing_had_been(
    resident, schedule, before, monkeypatch, caplog
):
    bits, expected = resident
    model, places = made(placed(*before, bits), schedule=schedule)
    lower = placed((3,), (2,), bits)
    monkeypatch.setattr(avatar.place, "step_down", lambda *_: lower)

    def once(block: int) -> None:
        if block == 3:
            run_out(model, at_pass=2, at_layer=3)

    np.testing.assert_array_equal(frames(model, before=once), expected)
    assert places.placement is lower
    assert isinstance(model.dit.blocks, StreamedLayers)
    # No more than stayed before, however the lower plan spreads them.
    assert len(model.dit.blocks) - len(model.dit.blocks.slabs) == 1
    (line,) = caplog.messages
    assert line.startswith("steps: CUDA out of memory. Tried to allocate 1 GiB; ")


def test_memory_that_runs_out_while_a_picture_is_decoded_costs_no_frame(resident, monkeypatch):
    bits, expected = resident
    model, _ = made(placed(bits=bits))
    monkeypatch.setattr(avatar.place, "step_down", lambda *_: placed((1,), (), bits))
    written, errors = model.vae.decode, [torch.OutOfMemoryError("CUDA out of memory.")]

    def failing(*arguments: Any) -> Any:
        made = written(*arguments)
        for error in [errors.pop()] if errors else []:
            raise error
        return made

    def once(block: int) -> None:
        if block == 2:
            model.vae.decode = failing  # type: ignore[method-assign]

    np.testing.assert_array_equal(frames(model, before=once), expected)


def test_where_nothing_more_can_leave_that_is_an_error_of_one_line():
    model, places = made(placed())
    places.placement = plan(DEMAND, [find_card("h200")], ROOMY, Target(live=False, vram_bytes=int(10.6 * GIB)))
    run_out(model, at_pass=1, at_layer=1)
    with pytest.raises(
        DoesNotFit, match=r"^steps: CUDA out of memory.*; nothing more can leave the device: "
    ) as caught:
        frames(model)
    assert "\n" not in str(caught.value)


def test_without_places_running_out_is_what_it_was():
    model = random_live_avatar(
        Options(width=64, height=64, steps=3), TINY, dtype=torch.float32, vae_width=4, speech_layers=2
    )
    run_out(model, at_pass=1, at_layer=1)
    with pytest.raises(torch.OutOfMemoryError):
        frames(model)


# What is chosen.


@pytest.fixture
def an_h200(monkeypatch):
    monkeypatch.setattr(avatar.place, "card_here", lambda device: (find_card("h200"), 140 * GIB))
    monkeypatch.setattr(avatar.place, "host_memory", lambda: 128 * GIB)


@pytest.mark.usefixtures("an_h200")
def test_for_a_file_it_is_as_fast_as_it_goes_and_for_a_broadcast_in_sequence_and_small_enough():
    options, places = choose(Options(), Wish(), CPU)
    assert options.schedule is places.placement.schedule is Schedule.WAVEFRONT
    options, places = choose(Options(), Wish(), CPU, live=True, any_size=True)
    assert (options.width, options.height, options.merge_last_step) == (640, 384, True)
    assert options.schedule is Schedule.SEQUENTIAL
    assert places.placement.holds


@pytest.mark.usefixtures("an_h200")
def test_what_was_said_is_kept_to():
    wish = Wish(vram="24GiB", weights="fp8", keys="fp8", offload="group")
    options, places = choose(Options(), wish, CPU, any_schedule=False)
    assert options == Options()
    assert places.placement.target.vram_bytes == 24 * GIB
    assert places.place("transformer").resident_layers == ()


@pytest.mark.usefixtures("an_h200")
@pytest.mark.parametrize(
    ("wish", "line"),
    [
        (Wish(vram="plenty"), "vram plenty: not an amount of memory, such as 24GiB"),
        (Wish(weights="fp4"), "weights fp4: there are bf16, fp8"),
        (Wish(offload="some"), "offload some: there are auto, none, cpu, group, model, block"),
    ],
)
def test_a_wish_that_cannot_be_understood_is_one_line(wish, line):
    with pytest.raises(avatar.place.OptionError) as caught:
        choose(Options(), wish, CPU)
    assert str(caught.value) == line
