"""The transformer against the reference implementation, and the properties that others build on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from avatar.attention import apply_rope, attention
from avatar.cache import Conditioning
from avatar.live_avatar.dit import CausalDiT, ConfigMismatch, DiTConfig
from avatar.sampling import denoise_block, reference_position, sigmas, step_modulations
from avatar.stateful import clone

POCKET = DiTConfig(
    dim=32,
    ffn_dim=64,
    freq_dim=32,
    in_dim=8,
    out_dim=8,
    num_heads=2,
    num_layers=3,
    text_dim=0,
    cond_dim=0,
    audio_dim=12,
    audio_layers=1,
    audio_inject_layers=(0, 2),
    enable_framepack=False,
)


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def close(got: Tensor, wanted: Tensor, absolute: float = 1e-4, relative_rms: float = 2e-5) -> None:
    """The limits that the golden README suggests for single passes."""
    difference = (got - wanted).double()
    assert got.shape == wanted.shape
    assert difference.abs().max() <= absolute
    assert difference.square().mean().sqrt() <= relative_rms * wanted.double().square().mean().sqrt()


def check_conditioning(dit: CausalDiT, ours: Conditioning, keys: Tensor, values: Tensor, *limits: float) -> None:
    """keys: [layers, C, heads, dim] of the reference implementation, which rotates them later; values likewise."""
    n = ours.tokens_per_frame
    motion = apply_rope(keys[:, n:], dit.conditioning_rope(30, ours.rows, ours.columns)[n:])
    close(torch.cat(ours.keys), keys[:, :n], *limits)
    close(torch.cat(ours.motion_keys), motion, *limits)
    close(torch.cat(ours.values), values, *limits)


def load(golden: Any, name: str) -> CausalDiT:
    dit = CausalDiT(DiTConfig.from_dict(golden.json(f"{name}.config.json")))
    dit.load_state_dict(golden.tensors(f"{name}.weights.safetensors"))
    return dit


@pytest.fixture(scope="module")
def main(golden: Any) -> CausalDiT:
    return load(golden, "dit_main")


@pytest.fixture(scope="module")
def trace(golden: Any) -> dict[str, Tensor]:
    return golden.tensors("dit_main_trace.safetensors")


def random_pocket(seed: int = 0, **changes: Any) -> CausalDiT:
    torch.manual_seed(seed)
    dit = CausalDiT(replace(POCKET, **changes))
    for parameter in dit.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return dit


def at(t: float) -> Tensor:
    return torch.tensor([t])


# Names and shapes.


def test_parameters_are_those_of_the_released_checkpoint(golden: Any) -> None:
    with torch.device("meta"):
        dit = CausalDiT(DiTConfig())
    shapes = {name: list(tensor.shape) for name, tensor in dit.state_dict().items()}
    assert shapes == golden.json("manifest_dit_14b.json")
    assert sum(parameter.numel() for parameter in dit.parameters()) == 16_295_755_609


def test_what_a_config_turns_off_has_no_parameters() -> None:
    names = set(random_pocket().state_dict())
    absent = ("text_embedding", "cond_encoder", "frame_packer", "casual_audio_encoder.weights")
    assert not [name for name in names if name.startswith(absent) or "cross_attn" in name or "norm3" in name]


def test_a_config_file_may_hold_unknown_keys(golden: Any) -> None:
    fields = golden.json("dit_main.config.json") | {"_class_name": "WanModel_S2V", "something_new": 7}
    assert DiTConfig.from_dict(fields).audio_inject_layers == (0, 2, 4)


@pytest.mark.parametrize("change", [{"qk_norm": False}, {"patch_size": [1, 4, 4]}, {"adain_mode": "none"}])
def test_another_architecture_is_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigMismatch, match=next(iter(change))):
        DiTConfig.from_dict(change)


@pytest.mark.parametrize(
    "change", [{"num_heads": 7}, {"audio_inject_layers": (0, 99)}, {"audio_inject_layers": (2, 1)}]
)
def test_sizes_that_contradict_each_other_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigMismatch, match=next(iter(change))):
        replace(POCKET, **change)


# Every layer of one prefill and one streaming pass.


class Recorder:
    """Outputs of named modules, in order of the calls."""

    def __init__(self, dit: CausalDiT, *names: str) -> None:
        self.outputs: dict[str, list[Tensor]] = {name: [] for name in names}
        self.hooks = [
            dit.get_submodule(name).register_forward_hook(lambda _, __, output, n=name: self.outputs[n].append(output))
            for name in names
        ]

    def take(self, name: str) -> Tensor:
        return self.outputs[name].pop(0)

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


def test_prefill_follows_the_reference_layer_by_layer(main: CausalDiT, trace: dict[str, Tensor]) -> None:
    blocks = [f"blocks.{i}" for i in range(5)]
    first = {"self_attn": "blocks.0.self_attn.o", "cross_attn": "blocks.0.cross_attn", "ffn": "blocks.0.ffn"}
    recorder = Recorder(main, "text_embedding", *blocks, *first.values())
    text = main.encode_text(trace["context"][None])
    # All of the padding is one token here.
    embedded, theirs = recorder.take("text_embedding"), trace["prefill.text_embedding"]
    length = min(embedded.shape[1], theirs.shape[1])
    close(embedded[:, :length], theirs[:, :length])
    close(embedded[:, -1:].expand(-1, theirs.shape[1] - length, -1), theirs[:, length:])
    main.prefill(trace["ref_latents"], trace["motion_latents"], text)
    # The last block ends with its keys and values: nothing else of it is ever used.
    for i in range(5):
        close(recorder.take(f"blocks.{i}"), trace[f"prefill.block{i}"])
    for name, module in first.items():
        close(recorder.take(module), trace[f"prefill.block0.{name}"])
    recorder.close()


def test_a_streaming_pass_follows_the_reference_layer_by_layer(main: CausalDiT, trace: dict[str, Tensor]) -> None:
    text = main.encode_text(trace["context"][None])
    conditioning = main.prefill(trace["ref_latents"], trace["motion_latents"], text)
    cache = main.new_cache(conditioning, ring_frames=6)
    audio = main.prepare_audio(main.encode_audio(trace["audio"]))
    e, e0 = main.modulation(torch.tensor([937.5, 0.0]))
    close(e, trace["call0.time_embedding"][[0, 3]])
    close(e0.flatten(1), trace["call0.time_projection"][[0, 3]])

    modules = [f"blocks.{i}" for i in range(6)] + [f"audio_injector.injector.{j}" for j in range(3)]
    parts = {
        f"call0.block{i}.{name}": f"blocks.{i}.{module}"
        for i in (0, 1)
        for name, module in (("self_attn", "self_attn.o"), ("cross_attn", "cross_attn"), ("ffn", "ffn"))
        if f"call0.block{i}.{name}" in trace
    }
    assert parts
    recorder = Recorder(main, *modules, *parts.values())
    velocity = main.step(
        trace["x_in"][None], main.modulation(at(937.5)), conditioning, text, audio, cache, 0, 30, trace["cond_states"]
    )
    recorder.close()
    for i in range(6):
        close(recorder.take(f"blocks.{i}"), trace[f"call0.block{i}"])
    for j in range(3):
        close(recorder.take(f"audio_injector.injector.{j}"), trace[f"call0.injector{j}"])
    for name, module in parts.items():
        close(recorder.take(module), trace[name])
    close(velocity[0], trace["v_out.call0"])

    pose, position = trace["cond_states"], reference_position(3, 30)
    time = main.modulation(at(500.0))
    velocity = main.step(trace["x_in.call1"][None], time, conditioning, text, audio, cache, 3, position, pose)
    close(velocity[0], trace["v_out.call1"])

    # Two speakers, each driving a part of the picture; the ring wraps.
    audio = main.prepare_audio(main.encode_audio(trace["two_speakers.audio"]))
    velocity = main.step(
        trace["two_speakers.x_in"][None],
        main.modulation(at(750.0)),
        conditioning,
        text,
        audio,
        cache,
        6,
        reference_position(6, 17),
        trace["cond_states"],
        mask=trace["two_speakers.mask"],
    )
    close(velocity[0], trace["two_speakers.v_out"])


def test_two_actors_without_a_mask_are_an_error(main: CausalDiT, trace: dict[str, Tensor]) -> None:
    tokens = main.encode_audio(trace["two_speakers.audio"])
    with pytest.raises(ValueError, match="mask"):
        main.inject(0, torch.zeros(1, 48, 96), tokens)


# Whole streams: prefills, rings that wrap, a reference that moves, conditioning replaced at the second clip.


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("dit_main", "dit_main_stream_nopose"),
        ("dit_main", "dit_main_stream_pose"),
        ("dit_hd128", "dit_hd128_stream"),
    ],
)
def test_a_stream_is_that_of_the_reference(golden: Any, model: str, name: str) -> None:
    dit, facts, tensors = load(golden, model), golden.json(f"{name}.json"), golden.tensors(f"{name}.safetensors")
    frames, steps = facts["frames_per_block"], facts["steps"]
    ring_frames = facts["ring_blocks"] * frames
    levels = sigmas(steps)
    times = step_modulations(dit, levels)
    text = dit.encode_text(tensors["context"][None])
    distances = iter(tensors["relative_dist"].tolist())
    caches = []
    for clip in range(facts["clips"]):
        conditioning = dit.prefill(tensors[f"ref_latents.clip{clip}"], tensors[f"motion_latents.clip{clip}"], text)
        check_conditioning(dit, conditioning, tensors[f"cond_k.clip{clip}"], tensors[f"cond_v.clip{clip}"])
        if not caches:
            caches = [dit.new_cache(conditioning, ring_frames) for _ in range(steps)]
        for cache in caches:
            dit.condition(cache, conditioning)
        latents = []
        for block in range(facts["blocks_per_clip"]):
            f0 = (clip * facts["blocks_per_clip"] + block) * frames
            here = slice(block * frames, (block + 1) * frames)
            tokens = dit.encode_audio(tensors[f"audio.clip{clip}"][..., 12 * block : 12 * block + 12])
            audio = dit.prepare_audio(tokens)
            pose = tensors[f"cond_states.clip{clip}"][:, :, here] if facts["pose"] else None
            positions = [reference_position(f0, next(distances)) for _ in range(steps)]

            # Each pass alone, from the recorded input; then, on copies of the caches, the block in one go.
            copies = clone(caches)
            noise = tensors[f"noise.clip{clip}"][None, :, here]
            for s in range(steps):
                call = f"c{clip}.b{block}.s{s}"
                velocity = dit.step(
                    tensors[f"x_in.{call}"][None],
                    times[s],
                    conditioning,
                    text,
                    audio,
                    caches[s],
                    f0,
                    positions[s],
                    pose,
                )
                close(velocity[0], tensors[f"v_out.{call}"])
            args = (dit, noise, conditioning, copies, levels, times, text, audio, f0, positions)
            latents.append(denoise_block(*args, pose=pose))
        close(torch.cat(latents, dim=2)[0], tensors[f"x_out.clip{clip}"], absolute=3e-4, relative_rms=5e-5)
        if (k := tensors.get(f"kv_k.after_clip{clip}.s0")) is not None:
            ring = slice(caches[0].conditioning_tokens, None)
            close(torch.cat(caches[0].keys)[:, ring], k)
            close(torch.cat(caches[0].values)[:, ring], tensors[f"kv_v.after_clip{clip}.s0"])


def numerics(golden: Any, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Seven blocks through one ring with the bf16-exact weights, run in `dtype`."""
    tensors = golden.tensors("dit_numerics_bf16.safetensors")
    config = DiTConfig(
        dim=128, ffn_dim=192, num_heads=1, num_layers=3, text_dim=64, audio_dim=32, audio_inject_layers=(0, 2)
    )
    dit = CausalDiT(config)
    dit.load_state_dict({name[2:]: tensor for name, tensor in tensors.items() if name.startswith("w.")})
    dit.to(dtype)
    if dtype == torch.float32:
        # That run kept the cast to bfloat16 in front of norm3, and so the norm's result was rounded too.
        for block in dit.blocks:
            block.norm3.register_forward_pre_hook(lambda _, args: (args[0].bfloat16().float(),))
            block.norm3.register_forward_hook(lambda _, args, output: output.bfloat16().float())
    text = dit.encode_text(tensors["in.text"][None])
    conditioning = dit.prefill(tensors["in.ref_latent"][None], tensors["in.motion_latents"][None], text)
    cache = dit.new_cache(conditioning, ring_frames=12)
    velocities = []
    for b in range(7):
        f0, mask, pose = 3 * b, None, None
        features = tensors["in.audio"][:1, ..., 12 * b : 12 * b + 12]
        if b == 3:
            pose = tensors["in.pose_latent_block3"][None]
        if b == 6:
            features, mask = tensors["in.audio"][..., 12 * b : 12 * b + 12], tensors["in.actor_mask_block6"]
        audio = dit.prepare_audio(dit.encode_audio(features))
        x = tensors["in.noisy"][None, :, f0 : f0 + 3].to(dtype)
        time = dit.modulation(tensors["in.timesteps"][b : b + 1])
        position = reference_position(f0, int(tensors["in.ref_distance"][b]))
        velocities.append(dit.step(x, time, conditioning, text, audio, cache, f0, position, pose, mask)[0])
    if dtype == torch.float32:
        keys, values = (
            torch.stack([tensors[f"out.prefill.cond_{name}.{layer}"] for layer in range(3)]) for name in "kv"
        )
        check_conditioning(dit, conditioning, keys, values, 2e-4, 1e-3)
    return velocities, tensors


def test_float32_agrees_with_the_reference_and_all_its_casts(golden: Any) -> None:
    velocities, tensors = numerics(golden, torch.float32)
    for b, velocity in enumerate(velocities):
        assert (velocity - tensors[f"out.block.{b}"]).abs().max() <= 2e-4


def test_bfloat16_stays_near_float32(golden: Any) -> None:
    velocities, tensors = numerics(golden, torch.bfloat16)
    for b, velocity in enumerate(velocities):
        wanted = tensors[f"out.block.{b}"]
        assert velocity.dtype == torch.bfloat16
        assert (velocity.float() - wanted).norm() <= 0.02 * wanted.norm()


# Parts.


@pytest.mark.parametrize("frames", [1, 5, 12, 85])
def test_the_audio_encoder_is_that_of_the_reference(main: CausalDiT, golden: Any, frames: int) -> None:
    tensors = golden.tensors("audio_encoder.safetensors")
    global_, local = main.casual_audio_encoder(tensors[f"in.T{frames}"])
    close(global_, tensors[f"global.T{frames}"])
    close(local, tensors[f"local.T{frames}"])


def test_one_copy_of_the_first_audio_frame_does_for_73(main: CausalDiT, golden: Any) -> None:
    features = golden.tensors("audio_encoder.safetensors")["in.T12"]
    padded = torch.cat([features[..., :1].expand(-1, -1, -1, 73), features], dim=-1)
    whole = main.casual_audio_encoder(padded)
    for short, long in zip(main.encode_audio(features), whole):
        torch.testing.assert_close(short, long[:, 19:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("case", "zeroed"), [("m19", 0), ("m24", 0), ("m5", 0), ("m19_add1", 1), ("m19_add0", 3)])
def test_motion_frames_are_packed_as_in_the_reference(main: CausalDiT, golden: Any, case: str, zeroed: int) -> None:
    tensors = golden.tensors("frame_packer.safetensors")
    motion = tensors[f"{case}.in"][None].clone()
    if zeroed:
        motion[:, :, -zeroed:] = 0
    close(main.frame_packer(motion), tensors[f"{case}.tokens"])
    rows, columns = motion.shape[-2] // 2, motion.shape[-1] // 2
    table = main.conditioning_rope(30, rows, columns)[rows * columns :]
    assert torch.equal(table, tensors[f"{case}.rope"])


@pytest.mark.parametrize(
    "name", [f"4x8.roll{roll}" for roll in (0, 1, 7, 40, 1000, 44969)] + ["8x4.roll0", "8x4.roll5"]
)
def test_only_the_reference_frame_moves(main: CausalDiT, golden: Any, name: str) -> None:
    grid, roll = name.split(".roll")
    rows, columns = map(int, grid.split("x"))
    wanted = golden.tensors("rope.safetensors")[f"cond.{name}"]
    assert torch.equal(main.conditioning_rope(30 + int(roll), rows, columns), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_pose_is_a_pose_of_zeros(golden: Any, dtype: torch.dtype) -> None:
    dit = load(golden, "dit_main").to(dtype)
    x = torch.randn(2, 16, 3, 8, 8)
    assert torch.equal(dit.embed(x), dit.embed(x, torch.zeros_like(x)))


@pytest.mark.parametrize(("width", "height"), [(64, 64), (128, 192), (192, 64), (704, 384)])
def test_any_size_in_multiples_of_64_pixels_has_its_tokens(width: int, height: int) -> None:
    with torch.device("meta"):
        dit = CausalDiT(DiTConfig(dim=64, num_heads=2, ffn_dim=8, num_layers=2, audio_inject_layers=()))
        reference = torch.empty(1, 16, 1, height // 8, width // 8)
        motion = torch.empty(1, 16, 19, height // 8, width // 8)
        text = dit.encode_text(torch.empty(1, 3, 4096))
    conditioning = dit.prefill(reference, motion, text)
    n = height * width // 256
    assert conditioning.tokens == n * 5 // 2
    assert len(dit.conditioning_rope(30, height // 16, width // 16)) == conditioning.tokens
    cache = dit.new_cache(conditioning, ring_frames=12)
    x = torch.empty(1, 16, 3, height // 8, width // 8, device="meta")
    time = dit.modulation(torch.empty(1, device="meta"))
    assert dit.step(x, time, conditioning, text, [], cache, 12, 42).shape == x.shape


# What training and the embedded model build on.


def stream(dit: CausalDiT, x: Tensor, features: Tensor, t: float, reference: Tensor, ring_frames: int) -> Tensor:
    """Block by block with a cache: x [B, c, blocks * 3, h, w], features [B, 1, C, blocks * 12]."""
    conditioning = dit.prefill(reference, None, [])
    cache = dit.new_cache(conditioning, ring_frames)
    velocities = []
    for f0 in range(0, x.shape[2], 3):
        audio = dit.prepare_audio(dit.encode_audio(features[..., 4 * f0 : 4 * f0 + 12]))
        args = (dit.modulation(at(t)), conditioning, [], audio, cache, f0, f0 + 30)
        velocities.append(dit.step(x[:, :, f0 : f0 + 3], *args))
    return torch.cat(velocities, dim=2)


def test_a_masked_sequence_in_parallel_equals_the_stream() -> None:
    """As training computes it, from the public pieces: all blocks of a sequence at once at one noise level."""
    dit = random_pocket()
    batch, blocks, window, h, w, n = 2, 6, 4, 4, 4, 4
    x = torch.randn(batch, 8, 3 * blocks, h, w)
    features, reference = torch.randn(batch, 1, 12, 12 * blocks), torch.randn(batch, 8, 1, h, w)
    streamed = stream(dit, x, features, 700.0, reference, ring_frames=3 * window)

    conditioning: Conditioning = dit.prefill(reference, None, [])
    tokens = dit.encode_audio(features.unflatten(-1, (blocks, 12)).movedim(3, 1).flatten(0, 1))
    tokens = tokens._replace(
        global_=tokens.global_.unflatten(0, (batch, blocks)).flatten(1, 2),
        local=tokens.local.unflatten(0, (batch, blocks)).flatten(1, 2),
    )
    of_block = torch.arange(3 * blocks * n) // (3 * n)
    distance = of_block[:, None] - of_block[None]
    # Each block has the reference at a fixed distance, so it brings the reference's keys at its own position.
    mask = torch.cat(
        [distance.new_zeros(len(of_block), blocks * n).bool(), (distance >= 0) & (distance < window)], dim=1
    )
    for b in range(blocks):
        mask[of_block == b, b * n : (b + 1) * n] = True
    rope = dit.block_rope(0, 3 * blocks, 2, 2)
    moved = [dit.block_rope(3 * b + 30, 1, 2, 2) for b in range(blocks)]

    e, e0 = dit.modulation(torch.tensor([700.0, 700.0]))
    y = dit.embed(x)
    for i, block in enumerate(dit.blocks):
        m = block.modulate(e0)
        q, k, v = block.qkv(y, m)
        keys = [apply_rope(conditioning.keys[i], table) for table in moved]
        k = torch.cat([*keys, apply_rope(k, rope)], dim=1)
        v = torch.cat([conditioning.values[i]] * blocks + [v], dim=1)
        y = block.finish(y, attention(apply_rope(q, rope), k, v, mask), m)
        if i in dit.injector_of_block:
            y = dit.inject(dit.injector_of_block[i], y, tokens)
    torch.testing.assert_close(dit.head(y, e, 2, 2), streamed, rtol=1e-4, atol=2e-5)


def test_sessions_in_one_batch_are_as_each_alone() -> None:
    dit = random_pocket()
    x, features, reference = torch.randn(3, 8, 9, 4, 8), torch.randn(3, 1, 12, 36), torch.randn(3, 8, 1, 4, 8)
    together = stream(dit, x, features, 300.0, reference, ring_frames=6)
    for b in range(3):
        one = slice(b, b + 1)
        alone = stream(dit, x[one], features[one], 300.0, reference[one], ring_frames=6)
        torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)


def test_each_of_a_batch_may_have_its_own_timestep() -> None:
    dit = random_pocket()
    e, e0 = dit.modulation(torch.tensor([900.0, 100.0]))
    x, attended = torch.randn(2, 12, 32), torch.randn(2, 12, 2, 16)
    block = dit.blocks[0]
    together = block.finish(x, attended, block.modulate(e0))
    for b, t in enumerate((900.0, 100.0)):
        alone = block.finish(x[b : b + 1], attended[b : b + 1], block.modulate(dit.modulation(at(t))[1]))
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-5, atol=1e-5)
    assert e.shape == (2, 32)


def test_a_block_computed_again_gives_the_same_and_leaves_the_same() -> None:
    dit = random_pocket()
    conditioning = dit.prefill(torch.randn(1, 8, 1, 4, 4), None, [])
    cache = dit.new_cache(conditioning, ring_frames=6)
    audio = dit.prepare_audio(dit.encode_audio(torch.randn(1, 1, 12, 12)))
    x = torch.randn(1, 8, 3, 4, 4)
    results = [dit.step(x, dit.modulation(at(500.0)), conditioning, [], audio, cache, 9, 39) for _ in range(2)]
    assert torch.equal(*results)


def test_training_begins_without_velocity_and_without_audio() -> None:
    dit = CausalDiT(POCKET)
    dit.initialize()
    x = torch.randn(1, 12, 32)
    tokens = dit.encode_audio(torch.randn(1, 1, 12, 12))
    assert torch.equal(dit.inject(1, x, tokens), x)
    assert not dit.head(x, dit.modulation(at(500.0))[0], 2, 2).any()
    assert all(parameter.isfinite().all() for parameter in dit.parameters())


def test_every_parameter_of_the_embedded_shape_learns() -> None:
    with torch.enable_grad():
        dit = random_pocket()
        x = torch.randn(1, 8, 3, 4, 4)
        e, e0 = dit.modulation(at(500.0))
        y = torch.cat([dit.embed(x), dit.reference_tokens(x[:, :, :1])], dim=1)
        y = dit.inject(0, y[:, :12], dit.encode_audio(torch.randn(1, 1, 12, 12)))
        y = dit.inject(1, y, dit.encode_audio(torch.randn(1, 1, 12, 12)))
        for block in dit.blocks:
            m = block.modulate(e0)
            y = block.finish(y, attention(*block.qkv(y, m)), m)
        dit.head(y, e, 2, 2).square().mean().backward()
    assert not [name for name, parameter in dit.named_parameters() if parameter.grad is None]
