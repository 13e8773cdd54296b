"""The embedded model as it streams: it keeps the contract, and does block by block what it was trained to do."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from contracts import check_model

from audio.chunk import AudioBlock
from avatar.model import FrameBlock, Reference
from avatar.pocket.generator import (
    FRAMES_PER_BLOCK,
    LATENT_SIDE,
    META,
    Networks,
    Options,
    PocketError,
    PocketModel,
    Precision,
    Session,
    build_networks,
    load_networks,
    load_pocket,
    shipped_weights,
    to_uint8,
)
from avatar.pocket.motion import DRIVE
from avatar.pocket.network import CONTROLS, LATENTS_PER_BLOCK, RING_BLOCKS
from avatar.pocket.train import sequence_ropes, sequence_velocity
from avatar.sampling import TRAIN_TIMESTEPS
from avatar.stateful import clone, restore, state_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model() -> PocketModel:
    return load_pocket(options=Options(steps=2))


@pytest.fixture(scope="module")
def exact() -> Networks:
    return load_networks(shipped_weights(), torch.float32)


def picture(grey: int = 120) -> np.ndarray:
    image = np.full((256, 256, 3), grey, np.uint8)
    image[60:180, 80:176] = (220, 180, 150)
    return image


def sound_block(model: PocketModel, index: int, valid: int | None = None) -> AudioBlock:
    size = model.spec.samples_per_block
    rng = np.random.default_rng(index)
    samples = (0.2 * rng.standard_normal(size)).astype(np.float32)
    ahead = np.zeros(model.spec.lookahead_samples, np.float32)
    return AudioBlock(samples, index * size, size if valid is None else valid, ahead)


def steps(model: PocketModel, state: Session, *indices: int) -> list[FrameBlock]:
    return [made for index in indices for made in model.step(state, sound_block(model, index))]


def same(left: list[FrameBlock], right: list[FrameBlock]) -> bool:
    return len(left) == len(right) and all(np.array_equal(a.frames, b.frames) for a, b in zip(left, right))


def test_the_contract_of_a_model_is_kept(model):
    check_model(model, blocks=1)


def test_another_seed_moves_otherwise(model):
    states = [model.start(Reference(picture(), seed=seed)) for seed in (1, 2)]
    first, second = (steps(model, state, 0) for state in states)
    assert not same(first, second)


def test_a_session_rolled_back_in_place_goes_on_as_before(model):
    state = model.start(Reference(picture(), seed=3))
    steps(model, state, 0)
    saved = clone(state)
    once = steps(model, state, 1)
    restore(state, saved)
    assert same(steps(model, state, 1), once)


@pytest.mark.parametrize("count", [1, 4])
def test_planned_bytes_are_the_bytes_of_a_running_session(model, count):
    model = PocketModel(model.networks, Options(steps=count))
    state = model.start(Reference(picture()))
    steps(model, state, 0)
    assert sum(part.session_bytes for part in model.parts()) == state_bytes(state)


def test_a_plan_needs_no_weights(model):
    assert (
        PocketModel(build_networks(torch.bfloat16, META), model.options).parts()
        == load_pocket(options=Options(steps=model.options.steps, precision=Precision.BF16)).parts()
    )


def test_memory_does_not_grow(model):
    state = model.start(Reference(picture()))
    sizes = []
    for index in range(RING_BLOCKS + 2):
        steps(model, state, index)
        sizes.append(state_bytes(state))
    assert len(set(sizes)) == 1


@torch.no_grad()
def test_streaming_is_what_the_training_of_whole_sequences_computes(exact):
    """At one noise level, over more blocks than the ring holds and past the point where the reference moves along."""
    blocks = 10
    latents = blocks * LATENTS_PER_BLOCK
    g = torch.Generator().manual_seed(0)
    dit = exact.dit
    channels = dit.config.in_dim
    x = torch.randn(1, channels, latents, LATENT_SIDE, LATENT_SIDE, generator=g)
    reference = torch.randn(1, channels, 1, LATENT_SIDE, LATENT_SIDE, generator=g)
    heard = torch.randn(1, 1, dit.config.audio_dim, 4 * latents, generator=g)
    pose = torch.randn(1, dit.config.cond_dim, latents, LATENT_SIDE, LATENT_SIDE, generator=g)
    level = torch.tensor([0.75])
    whole = sequence_velocity(
        dit, x, level, reference, heard, pose, sequence_ropes(dit, latents, LATENT_SIDE, x.device)
    )

    model = PocketModel(exact, Options(steps=1))
    conditioning = dit.prefill(reference, None, [])
    cache = dit.new_cache(conditioning, RING_BLOCKS * LATENTS_PER_BLOCK)
    made = []
    for f0 in range(0, latents, LATENTS_PER_BLOCK):
        span = slice(f0, f0 + LATENTS_PER_BLOCK)
        audio = dit.prepare_audio(dit.encode_audio(heard[..., 4 * f0 : 4 * (f0 + LATENTS_PER_BLOCK)]))
        time = dit.modulation(level * TRAIN_TIMESTEPS)
        (position,) = model.reference_positions(f0, g)
        made.append(dit.step(x[:, :, span], time, conditioning, [], audio, cache, f0, position, pose=pose[:, :, span]))
    torch.testing.assert_close(torch.cat(made, 2), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_decoding_in_chunks_equals_decoding_whole(exact, chunk):
    latents = torch.randn(1, 6, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = exact.vae.decode(latents, exact.vae.init_state())
    state = exact.vae.init_state()
    chunked = torch.cat([exact.vae.decode(part, state) for part in latents.split(chunk, dim=1)], 1)
    torch.testing.assert_close(chunked, whole, atol=2e-5, rtol=0)


@torch.no_grad()
def test_the_decoder_is_at_rest_when_a_session_begins(exact):
    """Decoding the picture once more after priming changes nothing: the first block has a whole past."""
    latent = torch.randn(1, 1, 32, LATENT_SIDE, LATENT_SIDE, generator=torch.Generator().manual_seed(0))
    session = PocketModel(exact).begin(latent, seed=0)
    before = clone(session.decoder)
    exact.vae.decode(latent, session.decoder)
    for name, values in session.decoder.items():
        torch.testing.assert_close(values, before[name], atol=1e-5, rtol=1e-4)


def test_half_precision_stays_close_to_single(exact):
    made = []
    for networks in (exact, load_networks(shipped_weights(), torch.bfloat16)):
        model = PocketModel(networks, Options(steps=2))
        state = model.start(Reference(picture(), seed=1))
        made.append(np.concatenate([block.frames for block in steps(model, state, 0, 1)]).astype(np.float32))
    assert np.abs(made[0] - made[1]).mean() < 3.0, "levels of 255"


def test_motion_nought_holds_the_head_still(model):
    still = PocketModel(model.networks, Options(motion=0.0))
    states = [m.start(Reference(picture(), seed=4)) for m in (still, model)]
    silence = AudioBlock(
        np.zeros(model.spec.samples_per_block, np.float32),
        0,
        model.spec.samples_per_block,
        np.zeros(model.spec.lookahead_samples, np.float32),
    )
    with torch.no_grad():
        poses = [m.listen(state, silence)[1] for m, state in zip((still, model), states)]
    yaw = [pose[0, DRIVE.index("yaw") :: CONTROLS].abs().max() for pose in poses]
    assert yaw[0] == 0 < yaw[1]


def test_the_tail_of_a_stream_is_as_long_as_its_sound(model):
    state = model.start(Reference(picture()))
    (block,) = model.step(state, sound_block(model, 0, valid=1281))
    assert block.frames.shape == (3, 256, 256, 3)
    assert len(block.audio) == 1281


def test_pictures_become_bytes():
    frames = torch.tensor([-1.2, -1.0, 0.0, 1.0, 1.5])[None, None, None, None].expand(1, 2, 3, 1, 5)
    made = to_uint8(frames)
    assert made.shape == (2, 1, 5, 3)
    assert made[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_a_block_is_twelve_frames(model):
    assert model.spec.frames_per_block == FRAMES_PER_BLOCK == 12


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"steps": 3}, "steps: 3; pocket was trained for 1, 2 or 4"),
        ({"motion": -1}, "motion: -1; must be a number from 0 to 2, 1 is as trained"),
        ({"motion": "much"}, "motion: much; must be a number from 0 to 2, 1 is as trained"),
        ({"precision": "fp8"}, "precision: fp8; there are auto, fp32, bf16"),
        ({"motoin": 1.0}, "motoin: no option of pocket; did you mean 'motion'?"),
        ({"seed": 1}, "seed: no option of pocket; there are steps, motion, precision"),
    ],
)
def test_an_option_that_does_not_work_is_named(options, line):
    with pytest.raises(PocketError, match=f"^{re.escape(line)}$"):
        Options.from_settings(options)


@pytest.mark.parametrize("damage", ["missing", "cut", "foreign"])
def test_weights_that_do_not_work_are_named(tmp_path, damage):
    for file in shipped_weights().glob("*.safetensors"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    dit = tmp_path / "dit.safetensors"
    if damage == "missing":
        dit.unlink()
    elif damage == "cut":
        dit.write_bytes(dit.read_bytes()[:1000])
    else:
        dit.write_bytes((tmp_path / "ear.safetensors").read_bytes())
    with pytest.raises(PocketError, match=re.escape(str(dit))) as raised:
        load_networks(tmp_path, torch.float32)
    assert "\n" not in str(raised.value)


def test_the_embedded_model_needs_neither_diffusers_nor_transformers():
    code = (
        "import sys; from avatar.load import load_model; load_model('pocket');"
        "print([n for n in ('diffusers', 'transformers', 'librosa', 'accelerate') if n in sys.modules])"
    )
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "[]"
