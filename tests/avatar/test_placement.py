"""The plan: figures that follow from shapes, modes that follow from budgets, and what is said where nothing fits."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avatar.cards import GIB, TABLE, Card, CardError, card_key, find_card, load_cards, measured
from avatar.demand import Network, Rings
from avatar.live_avatar import size as sizes
from avatar.live_avatar.size import Shape, SizeError, decoder_operations
from avatar.placement import (
    OFFLOAD_WORDS,
    STREAM_EFFICIENCY,
    DoesNotFit,
    Host,
    Lives,
    Offload,
    Placement,
    Precision,
    Schedule,
    Target,
    first_live,
    plan,
    reserve_bytes,
    spread,
    step_down,
    ways_to_live,
)

H200 = find_card("H200")
ROOMY = Host(128 * GIB)
BF16, FP8 = Precision.BF16, Precision.FP8
SEQUENTIAL, WAVEFRONT = Schedule.SEQUENTIAL, Schedule.WAVEFRONT
MERGED = Shape(merge_last_step=True)


FULL = Shape()


def planned(shape: Shape = FULL, card: Card = H200, gib: float | None = None, host: Host = ROOMY, **target):
    wanted = Target(vram_bytes=None if gib is None else int(gib * GIB), **target)
    return plan(shape.demand(), [card], host, wanted, [(str(less), less.demand()) for less in shape.lesser()])


def part(placement: Placement, name: str):
    return next(place for place in placement.devices[0].places if place.part == name)


def asked(shape: Shape, name: str) -> Network | Rings:
    return next(demanded for demanded in shape.demand() if demanded.name == name)


# What follows from shapes.


@pytest.mark.parametrize(
    ("shape", "keys", "matrices", "attention", "ring", "conditioning", "decode"),
    [
        (Shape(704, 384), 15_312, 79.77, 41.07, 10.38, 2.16, 9.16),
        (Shape(640, 384), 13_920, 72.52, 34.05, 9.44, 1.97, 8.32),
    ],
    ids=str,
)
def test_operations_and_bytes_are_those_of_the_specification(
    shape, keys, matrices, attention, ring, conditioning, decode
):
    transformer, rings = asked(shape, "transformer"), asked(shape, "rings")
    assert shape.keys == keys
    assert transformer.work.matrices / 1e12 == pytest.approx(matrices, rel=2e-3)
    assert transformer.work.attention / 1e12 == pytest.approx(attention, rel=1e-3)
    assert rings.layers * rings.ring_bytes / 1e9 == pytest.approx(ring, rel=1e-3)
    assert rings.layers * rings.conditioning_bytes / 1e9 == pytest.approx(conditioning, rel=3e-3)
    assert decoder_operations(shape.width, shape.height) / 1e12 == pytest.approx(decode, rel=1e-3)


def test_the_floors_of_a_step_on_an_h200_come_out():
    work = asked(Shape(), "transformer").work
    attention = work.attention / 1e12 / H200.attention_tflops
    assert 1e3 * (work.matrices / 1e12 / H200.bf16_tflops + attention) == pytest.approx(168, abs=1)
    assert 1e3 * (work.matrices / 1e12 / H200.float8_tflops + attention) == pytest.approx(123, abs=2)


def test_8_bit_weights_take_what_the_specification_says():
    whole = asked(Shape(), "transformer").float8_bytes + asked(Shape(), "embeddings").weight_bytes
    assert whole / 1e9 == pytest.approx(16.65, abs=0.02)


@pytest.mark.parametrize("shape", [Shape(), Shape(384, 640, 3, merge_last_step=True)], ids=str)
def test_planned_bytes_are_those_of_the_networks(shape):
    from avatar.live_avatar.generator import Options, random_live_avatar

    options = Options(width=shape.width, height=shape.height, steps=shape.steps, merge_last_step=shape.merge_last_step)
    model = random_live_avatar(options, device="meta")
    parts = {part.name: part for part in model.parts()}
    rings = asked(shape, "rings")
    kept = rings.layers * (rings.steps * (rings.ring_bytes + rings.conditioning_bytes) + rings.conditioning_bytes)
    in_8_bits = (kept + rings.layers * rings.reference_bytes) / 2
    for name, ours in (
        ("text", ["text encoder"]),
        ("vae.encoder", ["VAE encoder"]),
        ("vae.decoder", ["VAE decoder"]),
        ("speech", ["speech encoder"]),
        ("dit", ["transformer", "embeddings"]),
    ):
        networks = [asked(shape, our) for our in ours]
        assert sum(network.weight_bytes for network in networks) == parts[name].weight_bytes, name
        session = sum(network.session_bytes for network in networks) + (kept if name == "dit" else 0)
        assert session == pytest.approx(parts[name].session_bytes, rel=1e-4, abs=1e6), name
    model.dit.float8_cache = True
    less = parts["dit"].session_bytes - next(part for part in model.parts() if part.name == "dit").session_bytes
    assert less == pytest.approx(kept - in_8_bits, rel=1e-2)


def test_the_shapes_here_are_those_of_the_transformer():
    from avatar.live_avatar.dit import DiTConfig

    config = DiTConfig()
    assert (config.dim, config.ffn_dim, config.num_layers, config.head_dim) == (
        sizes.DIM,
        sizes.FFN,
        sizes.LAYERS,
        sizes.HEAD_DIM,
    )
    assert (config.audio_inject_layers, config.text_len) == (sizes.INJECTED, sizes.TEXT_TOKENS)


def test_8_bit_layers_take_what_quantised_blocks_take():
    from avatar.live_avatar.dit import DiTConfig
    from avatar.live_avatar.fast import use_float8
    from avatar.live_avatar.generator import build_dit

    dit = build_dit(DiTConfig(num_layers=2, audio_inject_layers=(0,))).to(torch.bfloat16)
    use_float8(dit)
    stored = [sum(tensor.nbytes for tensor in block.parameters()) for block in dit.blocks]
    injector = sum(tensor.nbytes for tensor in dit.audio_injector.parameters())
    assert [sizes.block_float8_bytes(True), sizes.block_float8_bytes(False)] == [stored[0] + injector, stored[1]]


def test_a_size_that_cannot_be_made_is_refused_with_the_nearest():
    with pytest.raises(SizeError, match="size 720x400: both sides must be multiples of 64; the nearest is 704x384"):
        Shape(720, 400)
    with pytest.raises(SizeError, match="steps: 9; must be 1 to 8"):
        Shape(steps=9)


def test_lesser_shapes_ask_for_less_each():
    asked_for = [shape.width * shape.height * shape.passes for shape in [Shape(), *Shape().lesser()]]
    assert asked_for[0] == max(asked_for)
    assert all(shape.passes > 0 for shape in Shape(steps=1).lesser())
    assert all(shape.height > shape.width for shape in Shape(384, 704).lesser())


# Modes that follow from budgets.


def test_with_all_of_an_h200_everything_is_resident():
    for weights, schedule in ((BF16, SEQUENTIAL), (FP8, SEQUENTIAL), (FP8, WAVEFRONT)):
        placement = planned(weights=weights, schedule=schedule)
        away = [place.part for place in placement.devices[0].places if place.lives is not Lives.RESIDENT]
        assert away == ["text encoder"]
        assert placement.devices[0].seconds.link == 0


def test_with_80_gib_the_text_encoder_makes_room():
    placement = planned(gib=80)
    assert part(placement, "text encoder").lives is Lives.ON_DEMAND
    assert part(placement, "transformer").lives is part(placement, "rings").lives is Lives.RESIDENT


def test_with_48_gib_in_bf16_a_wavefront_streams_weights_or_rings():
    placement = planned(gib=48, weights=BF16)
    assert placement.schedule is WAVEFRONT
    assert Lives.STREAMED in (part(placement, "transformer").lives, part(placement, "rings").lives)
    assert placement.fps > 8


def test_with_24_gib_a_wavefront_streams_at_more_than_four_fifths_of_the_resident_speed():
    placement, resident = planned(gib=24), planned(weights=FP8, schedule=WAVEFRONT)
    assert (placement.weights, placement.schedule) == (FP8, WAVEFRONT)
    assert placement.fps >= 0.8 * resident.fps
    assert placement.devices[0].peak_bytes <= 24 * GIB - reserve_bytes(24 * GIB)


def test_with_12_gib_nearly_everything_streams():
    placement = planned(gib=12)
    assert (placement.weights, placement.cache) == (FP8, FP8)
    assert len(part(placement, "transformer").resident_layers) < 8
    assert part(placement, "VAE decoder").narrow
    assert placement.fps >= 4
    assert placement.devices[0].peak_bytes < 11.6 * GIB


def test_little_host_memory_keeps_more_on_the_device():
    little, much = planned(gib=24, host=Host(32 * GIB)), planned(gib=24)
    assert little.host_bytes <= 28 * GIB
    assert little.fps <= much.fps


def test_live_takes_the_most_exact_and_promptest_that_is_fast_enough():
    fast = replace(H200, bf16_tflops=8000, float8_tflops=16_000, attention_tflops=6000)
    live, files = planned(card=fast), planned(card=fast, live=False)
    assert (live.weights, live.cache, live.schedule) == (BF16, BF16, SEQUENTIAL)
    assert live.holds
    assert files.fps > live.fps


def test_a_card_without_8_bit_products_still_saves_memory_with_8_bit_weights():
    a100 = find_card("A100")
    assert planned(card=a100, gib=48, weights=FP8).devices[0].peak_bytes < 46.1 * GIB
    assert planned(card=a100).fps >= planned(card=a100, weights=FP8).fps


def test_rings_on_the_host_give_back_only_the_new_block():
    placement = planned(gib=10.7, schedule=SEQUENTIAL, offload=Offload.BLOCK)
    rings, device = part(placement, "rings"), placement.devices[0]
    assert rings.resident_layers == ()
    weights = 4 * part(placement, "transformer").host_bytes
    inward = weights + rings.host_bytes * 3 / 4
    assert device.seconds.link == pytest.approx(inward / (H200.link_gb_s * 1e9 * STREAM_EFFICIENCY), rel=1e-3)


def test_in_a_wavefront_weights_come_once_for_all_steps():
    one, other = (
        planned(gib=24, schedule=schedule, weights=FP8, cache=FP8, offload=Offload.BLOCK)
        for schedule in (SEQUENTIAL, WAVEFRONT)
    )
    assert other.devices[0].seconds.link < 0.6 * one.devices[0].seconds.link


@pytest.mark.parametrize(
    ("word", "offload"),
    list(
        zip(
            OFFLOAD_WORDS,
            [Offload.AUTO, Offload.NONE, Offload.COMPONENT, Offload.BLOCK, Offload.COMPONENT, Offload.BLOCK],
            strict=True,
        )
    ),
)
def test_the_words_of_mova_and_lightx2v_are_understood(word, offload):
    assert Offload(word) is offload


def test_an_override_is_kept_to():
    assert part(planned(offload=Offload.COMPONENT), "text encoder").lives is Lives.ON_DEMAND
    assert part(planned(offload=Offload.BLOCK), "transformer").resident_layers == ()
    with pytest.raises(DoesNotFit, match="nearest that fits: the rest left to the plan"):
        planned(gib=24, offload=Offload.NONE)


def test_gpus_share_the_steps_and_the_last_makes_the_picture():
    placement = plan(Shape().demand(), [H200, H200], ROOMY, Target())
    assert [device.steps for device in placement.devices] == [2, 2]
    assert {place.part for place in placement.devices[0].places} == {"embeddings", "transformer", "rings"}
    assert placement.fps == pytest.approx(12 / placement.devices[1].seconds.block)
    five = plan(Shape().demand(), [H200] * 5, ROOMY, Target())
    assert [device.steps for device in five.devices] == [1, 1, 1, 1, 0]
    assert "rings" not in {place.part for place in five.devices[4].places}
    assert five.fps > placement.fps > planned().fps


def test_layers_that_stay_are_spread():
    assert spread(0, 40) == ()
    assert spread(40, 40) == tuple(range(40))
    assert spread(4, 40) == (9, 19, 29, 39)
    for k in range(41):
        assert len(spread(k, 40)) == k


# What holds for every plan.

BUDGETS = st.floats(9.5, 141).map(lambda gib: int(gib * GIB))
TARGETS = st.builds(
    Target,
    live=st.booleans(),
    weights=st.sampled_from([None, BF16, FP8]),
    cache=st.sampled_from([None, BF16, FP8]),
    schedule=st.sampled_from([None, SEQUENTIAL, WAVEFRONT]),
)
SHAPES = st.sampled_from([Shape(), MERGED, Shape(448, 256), Shape(256, 128)])


def speed(shape: Shape, card: Card, host: Host, target: Target) -> float:
    """Frames a second; 0 where nothing fits. Live, more than is shown is of no use."""
    try:
        fps = plan(shape.demand(), [card], host, target).fps
    except DoesNotFit:
        return 0.0
    return min(fps, target.fps) if target.live else fps


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(TABLE), SHAPES, TARGETS, BUDGETS, st.floats(0, 20), st.floats(0, 40))
def test_more_memory_never_gives_a_slower_plan(card, shape, target, vram, more_gib, more_host_gib):
    card = replace(card, memory_bytes=1 << 40)
    host = Host(48 * GIB)
    less = speed(shape, card, host, replace(target, vram_bytes=vram))
    more = replace(target, vram_bytes=vram + int(more_gib * GIB))
    assert speed(shape, card, host, more) >= less
    assert speed(shape, card, Host(host.memory_bytes + int(more_host_gib * GIB)), more) >= less


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(TABLE), SHAPES, TARGETS, BUDGETS, st.floats(16, 128))
def test_every_plan_keeps_to_its_limits(card, shape, target, vram, host_gib):
    host = Host(int(host_gib * GIB))
    try:
        placement = plan(shape.demand(), [card], host, replace(target, vram_bytes=vram))
    except DoesNotFit:
        return
    device = placement.devices[0]
    budget = min(vram, card.memory_bytes)
    assert max(device.peak_bytes, device.start_peak_bytes) <= device.limit_bytes == budget - reserve_bytes(budget)
    assert placement.host_bytes <= placement.host_limit_bytes < host.memory_bytes
    assert sum(place.device_bytes for place in device.places) < device.peak_bytes
    assert sum(place.host_bytes for place in device.places) == device.host_bytes
    assert json.loads(json.dumps(placement.as_dict()))["fps"] == placement.fps


def test_a_step_down_takes_a_gib_less_and_keeps_the_weights():
    placement, host = planned(gib=24), ROOMY
    for _ in range(4):
        lower = step_down(placement, Shape().demand(), host)
        assert lower.devices[0].peak_bytes <= placement.devices[0].peak_bytes - GIB
        assert lower.weights is placement.weights
        assert lower.fps <= placement.fps
        placement = lower


# What is said.


def test_what_does_not_fit_says_what_is_short_and_what_would_fit():
    with pytest.raises(DoesNotFit) as caught:
        planned(gib=8)
    assert str(caught.value) == (
        "H200 is short of 1.7 GiB: 9.2 GiB at least (VAE decoder 4.2 GiB, transformer 3.0 GiB, rings 1.7 "
        "GiB), 7.5 GiB may be used; nearest that fits: 576x320, 4 steps (fp8 weights, fp8 keys, sequential, "
        "transformer streamed, rings streamed), 7.8 fps"
    )
    assert caught.value.device_short_bytes == pytest.approx(1.7 * GIB, rel=0.03)
    assert caught.value.host_short_bytes == 0


def test_a_short_host_is_named_and_how_much_would_do():
    with pytest.raises(DoesNotFit, match=r"^the host is short of .*nearest that fits: \d+\.\d GiB of host memory"):
        planned(gib=16, host=Host(24 * GIB))


def test_where_nothing_fits_that_is_said():
    with pytest.raises(DoesNotFit, match="nothing smaller fits either"):
        planned(gib=2)


def test_live_is_looked_for_in_the_order_of_what_is_missed_least():
    variants = [(shape, shape.demand()) for shape in [Shape(), *Shape().lesser()]]
    found = first_live(variants, [H200], ROOMY, Target())
    assert found is not None
    shape, placement = found
    assert placement.holds
    assert (shape.width, shape.height, shape.merge_last_step) == (640, 384, True)
    assert first_live(variants[:1], [H200], ROOMY, Target()) is None


def test_what_would_be_live_names_size_steps_gpus_and_cards():
    lesser = [(str(shape), shape.demand()) for shape in Shape().lesser()]
    ways = dict(ways_to_live(Shape().demand(), [H200], ROOMY, Target(), [lesser]))
    assert set(ways) == {"640x384, 4 steps, the last merged", "2 x H200"}
    small = Shape(384, 192)
    ways = dict(ways_to_live(small.demand(), [find_card("3090")], ROOMY, Target()))
    assert "L40S" in ways
    assert all(way.holds for way in ways.values())


def test_the_table_for_people():
    assert planned(gib=24, live=False).explain() == GOLDEN


GOLDEN = """\
GPU 0: H200, 140.4 GiB, rates measured
  part                precision  on the GPU  on the host  lives
  text encoder        bf16                -            -  streamed
  VAE encoder         bf16                -            -  on demand
  speech encoder      bf16          0.6 GiB            -  resident
  VAE decoder         bf16          1.3 GiB            -  resident, works in pieces
  embeddings          bf16          0.7 GiB            -  resident
  transformer         fp8           7.5 GiB      8.7 GiB  streamed, 17 of 40 layers stay
  rings               fp8           7.5 GiB     14.5 GiB  streamed, 10 of 40 layers stay
  workspace and CUDA                5.4 GiB
  peak                             23.0 GiB  of 23.0 GiB that may be used; 13.6 GiB while a stream begins
  a block in 634 ms: steps 552 (matrices 275, attention 223, memory 54) beside the link's 416, then 80
host: peak 27.2 GiB of 124.0 GiB that may be used
wavefront: 18.9 frames/s, bound by compute, 2.53 s from sound to picture; does not hold 25 fps live"""


# Cards.


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("h200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("rtx 5090", "RTX 5090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("3090", "RTX 3090"),
    ],
)
def test_a_card_is_found_by_the_names_it_goes_by(name, card):
    assert find_card(name).name == card


@pytest.mark.parametrize("name", ["B200", "NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 D", ""])
def test_a_card_that_is_another_is_not_taken_for_it(name):
    with pytest.raises(CardError, match="not in the table, which has H200"):
        find_card(name)


def test_a_card_is_measured_once(tmp_path):
    path, count = tmp_path / "cache" / "cards.json", []

    def measure() -> Card:
        count.append(1)
        return replace(H200, bf16_tflops=777.5)

    key = card_key("NVIDIA H200", "570.1")
    assert measured(path, key, measure) == measured(path, key, measure) == load_cards(path)[key]
    assert len(count) == 1
    measured(path, card_key("NVIDIA H200", "580.2"), measure)
    assert len(count) == len(load_cards(path)) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', '{"x": {"name": "H200"}}', '{"x": null}'])
def test_a_damaged_cache_is_as_good_as_none(tmp_path, content):
    path = tmp_path / "cards.json"
    path.write_text(content)
    assert load_cards(path) == {}
    assert measured(path, "x", lambda: H200) == H200 == load_cards(path)["x"]
