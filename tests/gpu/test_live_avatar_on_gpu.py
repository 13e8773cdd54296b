"""Live Avatar on a CUDA device: the reference's numbers, and the fast modes beside the plain one. Run with -m gpu."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from audio.chunk import AudioBlock
from avatar.attention import attention
from avatar.cache import Conditioning, KVCache
from avatar.compile import replay
from avatar.demand import Schedule
from avatar.float8 import FLOAT8
from avatar.live_avatar import fast
from avatar.live_avatar.dit import CausalDiT, DiTConfig
from avatar.live_avatar.generator import LiveAvatar, Options, random_live_avatar
from avatar.model import Reference
from avatar.quantize import Float8Linear
from avatar.sampling import denoise_block, reference_position, sigmas, step_modulations
from avatar.stateful import clone, restore

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CONFIG = DiTConfig(
    dim=256,
    ffn_dim=512,
    num_heads=2,
    num_layers=4,
    text_dim=64,
    audio_dim=64,
    audio_layers=2,
    audio_inject_layers=(0, 2),
)
OPTIONS = Options(width=128, height=64, clip_blocks=2, ring_blocks=2, motion_frames=25, prime_latents=3)


@pytest.fixture(autouse=True)
def exact_float32() -> Any:
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def test_a_stream_is_that_of_the_reference(golden: Any) -> None:
    facts = golden.json("dit_main_stream_nopose.json")
    tensors = {name: tensor.cuda() for name, tensor in golden.tensors("dit_main_stream_nopose.safetensors").items()}
    dit = CausalDiT(DiTConfig.from_dict(golden.json("dit_main.config.json")))
    dit.load_state_dict(golden.tensors("dit_main.weights.safetensors"))
    dit.cuda()
    levels = sigmas(facts["steps"]).cuda()
    times = step_modulations(dit, levels, levels.device)
    text = dit.encode_text(tensors["context"][None])
    distances = iter(tensors["relative_dist"].tolist())
    caches: list[KVCache] = []
    for clip in range(facts["clips"]):
        conditioning = dit.prefill(tensors[f"ref_latents.clip{clip}"], tensors[f"motion_latents.clip{clip}"], text)
        caches = caches or [dit.new_cache(conditioning, 3 * facts["ring_blocks"]) for _ in times]
        for cache in caches:
            dit.condition(cache, conditioning)
        for block in range(facts["blocks_per_clip"]):
            f0, here = 3 * (clip * facts["blocks_per_clip"] + block), slice(3 * block, 3 * block + 3)
            features = tensors[f"audio.clip{clip}"][..., 12 * block : 12 * block + 12]
            audio = dit.prepare_audio(dit.encode_audio(features))
            positions = [reference_position(f0, next(distances)) for _ in times]
            noise = tensors[f"noise.clip{clip}"][None, :, here]
            x = denoise_block(dit, noise, conditioning, caches, levels, times, text, audio, f0, positions)
            torch.testing.assert_close(x[0], tensors[f"x_out.clip{clip}"][:, here], rtol=0, atol=5e-4)


PICTURE = np.random.default_rng(0).integers(0, 256, (90, 160, 3), np.uint8)


def made(*changes: Any, dtype: torch.dtype = torch.bfloat16, schedule: Schedule = Schedule.SEQUENTIAL) -> LiveAvatar:
    options = replace(OPTIONS, schedule=schedule, clip_blocks=4)
    model = random_live_avatar(options, CONFIG, dtype=torch.bfloat16, device="cuda", vae_width=16, speech_layers=1)
    model.dit.to(dtype)
    for change in changes:
        change(model)
    return model


def run(*changes: Any, dtype: torch.dtype = torch.bfloat16, blocks: int = 4, **how: Any) -> list[Tensor]:
    """Latents of some blocks."""
    model = made(*changes, dtype=dtype, **how)
    state = model.start(Reference(PICTURE, seed=1))
    latents = [model.denoise(state, sound(i)) for i in range(blocks)]
    return [latent for latent in latents if latent is not None]


def sound(i: int) -> AudioBlock:
    return AudioBlock(0.1 * np.random.default_rng(i).standard_normal(7_680).astype(np.float32), i * 7_680, 7_680)


def float8(model: LiveAvatar) -> None:
    fast.use_float8(model.dit)


def attention8(model: LiveAvatar) -> None:
    fast.use_float8_attention(model.dit)


def fused(model: LiveAvatar) -> None:
    fast.fuse(model.dit)


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ((), 0.02),
        ((fused,), 0.02),
        ((float8,), 0.1),
        ((float8, fused), 0.1),
        ((attention8, fused), 0.1),
        ((float8, attention8, fused), 0.15),
    ],
)
def test_every_mode_stays_near_float32(changes: Any, limit: float) -> None:
    exact = run(dtype=torch.float32)
    assert max(map(apart, run(*changes), exact)) < limit


@pytest.mark.parametrize("changes", [(), (float8,), (attention8,)])
def test_the_fused_step_is_as_near_as_the_plain_one(changes: Any) -> None:
    exact = run(dtype=torch.float32)
    plain, fast_ = (max(map(apart, run(*both), exact)) for both in (changes, (*changes, fused)))
    assert fast_ < 1.2 * plain


def replayed(model: LiveAvatar) -> None:
    fast.replay_steps(model.dit)


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("changes", [(fused,), (float8, attention8, fused)])
def test_a_replayed_step_is_the_fused_one_to_the_bit(changes: Any, schedule: Schedule) -> None:
    plain, ours = (run(*both, blocks=12, schedule=schedule) for both in (changes, (*changes, replayed)))
    assert len(plain) == len(ours)
    assert all(map(torch.equal, plain, ours))


def test_streams_beside_each_other_and_rewound_ones_are_replayed_right() -> None:
    wanted = [run(fused, blocks=10)]
    model = made(fused, replayed)
    streams = [model.start(Reference(PICTURE, seed=1)) for _ in range(2)]
    ours = [[model.denoise(state, sound(i)) for state in streams] for i in range(10)]
    assert all(torch.equal(one, alone) and torch.equal(other, alone) for (one, other), alone in zip(ours, *wanted))
    saved = clone(streams[0])
    # A copy: what a stream remembers of its blocks is what it gave.
    once = [model.denoise(streams[0], sound(i)).clone() for i in range(10, 14)]
    restore(streams[0], saved)
    assert all(torch.equal(model.denoise(streams[0], sound(i)), once[i - 10]) for i in range(10, 14))
    graphs = model.dit.step_by_layer._kept
    assert sum(map(len, graphs.values())) >= 2 * OPTIONS.ring_blocks * OPTIONS.passes
    model.dit.step_by_layer.forget()
    assert torch.equal(model.denoise(streams[1], sound(10)), once[0])


@pytest.mark.parametrize(
    ("batch", "keys", "repeats"), [(1, 65, 448), (1, 512, 1), (3, 5, 1), (1, 64, 2), (1, 200, 313)]
)
def test_attention_to_few_keys_counts_the_last_as_often_as_it_stands_for(batch: int, keys: int, repeats: int) -> None:
    from avatar.kernels import attend_few  # it takes Triton

    torch.manual_seed(0)
    q = torch.randn(batch, 100, 4, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch, keys, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k_all, v_all = (torch.cat([x, x[:, -1:].expand(-1, repeats - 1, -1, -1)], 1).float() for x in (k, v))
    assert apart(attend_few(q, k, v, repeats), attention(q.float(), k_all, v_all)) < 0.006


@pytest.mark.parametrize(("queries", "blocks"), [(96, 1), (96, 2), (96, 5), (64, 3), (100, 2)])
def test_attention_in_eight_bits_is_that_of_the_rounded_numbers(queries: int, blocks: int) -> None:
    torch.manual_seed(0)
    given_by = [torch.randn(1, 40, 3, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    n = 4 * (queries // 12)
    given = Conditioning([given_by[0][:, :n]], [given_by[0][:, n:]], [given_by[1]], 4, queries // 12)
    cache = KVCache.empty(given, 6, float8=True)
    cache.keys[0].copy_(torch.full_like(cache.keys[0], 100, dtype=torch.bfloat16))
    for block in range(blocks):
        tokens = 3 * given.tokens_per_frame
        k, v = (torch.randn(1, tokens, 3, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        keys, values = cache.append(0, k, v, block * tokens)
    cache.keys[0][:, :40], cache.values[0][:, :40] = given_by[0].to(FLOAT8), given_by[1].to(FLOAT8)
    q = torch.randn(1, queries, 3, 128, device="cuda", dtype=torch.bfloat16)
    exact = attention(q.to(FLOAT8).float(), keys.float(), values.float())
    assert apart(attention(q, keys, values), exact) < 0.04


@pytest.mark.parametrize("keys", [512, 4176, 4096, 15_312])
def test_attention_in_bfloat16_is_softmax_attention(keys: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 200, 2, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 2, keys, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    k[:, -9:] *= 3
    assert apart(attention(q, k, v), attention(q.float(), k.float(), v.float())) < 0.006


def test_a_product_in_eight_bits_is_that_of_the_rounded_numbers() -> None:
    torch.manual_seed(0)
    layer = Float8Linear.of(torch.nn.Linear(512, 256, dtype=torch.bfloat16, device="cuda"))
    x = torch.randn(7, 512, dtype=torch.bfloat16, device="cuda")
    assert apart(layer(x), layer.cpu()(x.cpu()).cuda()) < 0.01


def test_the_compiled_decoder_gives_the_plain_ones_frames() -> None:
    model = random_live_avatar(OPTIONS, CONFIG, device="cuda", vae_width=32, speech_layers=1)
    state = model.start(Reference(np.random.default_rng(0).integers(0, 256, (90, 160, 3), np.uint8)))
    latents = [torch.randn(1, 16, 3, 8, 16, device="cuda") for _ in range(3)]
    plain = [model.decode(state, x) for x in latents]
    state = model.start(Reference(np.random.default_rng(0).integers(0, 256, (90, 160, 3), np.uint8)))
    fast.compile_vae(model.vae)
    for ours, theirs in zip([model.decode(state, x) for x in latents], plain):
        assert apart(ours, theirs) < 0.03


def test_a_replayed_module_gives_what_it_gave() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8)).cuda()
    inputs = [torch.randn(n, 8, device="cuda") for n in (3, 3, 3, 5, 3, 3, 3)]
    wanted = [module(x) for x in inputs]
    replay(module, "forward")
    for x, y in zip(inputs, wanted):
        torch.testing.assert_close(module(x).clone(), y, rtol=1e-5, atol=1e-5)
