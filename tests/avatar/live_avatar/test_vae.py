"""The VAE against what the reference computed, and its stream against itself."""

from __future__ import annotations

import pytest
import torch

from avatar.live_avatar.vae import (
    WanVae,
    build_vae,
    decoder_state_bytes,
    diffusers_name,
    from_uint8,
    prime,
    to_uint8,
)
from avatar.stateful import clone, state_bytes


@pytest.fixture(scope="module")
def vae(golden):
    model = build_vae(golden.json("vae.config.json")["dim"])
    weights = {diffusers_name(key): tensor for key, tensor in golden.tensors("vae.weights.safetensors").items()}
    model.load_state_dict(weights, strict=True, assign=True)
    return WanVae(model.eval())


@pytest.fixture(scope="module")
def cases(golden):
    return golden.tensors("vae_cases.safetensors")


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (ours - theirs).pow(2).mean().sqrt() <= 2e-5 * theirs.pow(2).mean().sqrt()


def test_every_key_of_the_released_vae_has_its_place(golden):
    model = build_vae()
    ours = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert ours == {diffusers_name(key): shape for key, shape in golden.json("manifest_vae.json").items()}
    assert sum(tensor.numel() for tensor in model.parameters()) == 126_892_531


@pytest.mark.parametrize(("frames", "name"), [(17, "latents"), (1, "single.latents"), (13, "F16.latents")])
def test_encoding_gives_the_reference_latents(vae, cases, frames, name):
    close(vae.encode(cases["video"][None, :, :frames])[0], cases[name])


def test_encoding_a_still_of_five_frames_gives_the_reference_latents(vae, cases):
    still = cases["video"][None, :, :1].expand(-1, -1, 5, -1, -1)
    close(vae.encode(still)[0], cases["repeat5.latents"])


@pytest.mark.parametrize(("latents", "frames"), [("latents", "decoded"), ("random_latents", "random_decoded")])
def test_decoding_gives_the_reference_frames(vae, cases, latents, frames):
    close(vae.decode(cases[latents][None])[0], cases[frames])


def test_decoding_before_the_clamp_gives_the_reference_frames(vae, cases):
    close(vae.decode_unclamped(cases["latents"][None, :, :2])[0], cases["decoded_unclamped.first2"])


@pytest.mark.parametrize("chunks", [[1, 1, 1, 1, 1], [2, 3], [3, 2], [5]])
def test_decoding_in_chunks_equals_decoding_whole(vae, cases, chunks):
    state = vae.init_decoder()
    parts = [vae.decode(part, state) for part in cases["random_latents"][None].split(chunks, dim=2)]
    assert [part.shape[2] for part in parts] == [4 * chunk - 3 * (i == 0) for i, chunk in enumerate(chunks)]
    chunked = torch.cat(parts, 2)
    torch.testing.assert_close(chunked, vae.decode(cases["random_latents"][None]), rtol=0, atol=0)
    close(chunked[0], cases["stream_2+3"])


def test_a_stream_goes_on_from_its_own_memory(vae, cases):
    state = vae.init_decoder()
    vae.decode(cases["latents"][None], state)
    close(vae.decode(cases["random_latents"][None, :, :1], state)[0], cases["continue_after_latents.random0"])


def test_encoding_in_chunks_equals_encoding_whole(vae, cases):
    state = vae.init_encoder()
    chunked = torch.cat([vae.encode(part, state) for part in cases["video"][None].split([9, 8], dim=2)], 2)
    torch.testing.assert_close(chunked, vae.encode(cases["video"][None]), rtol=0, atol=0)
    close(chunked[0], cases["stream_encode_9+8"])


@pytest.mark.parametrize("frames", [2, 4, 16])
def test_frames_that_fill_no_group_are_refused(vae, cases, frames):
    with pytest.raises(ValueError, match=r"want 1 \+ 4k"):
        vae.encode(cases["video"][None, :, :frames])


def test_two_streams_and_an_encode_between_do_not_touch_each_other(vae, cases):
    ours, other = vae.init_decoder(), vae.init_decoder()
    first = vae.decode(cases["random_latents"][None, :, :2], ours)
    vae.decode(cases["latents"][None], other)
    vae.encode(cases["video"][None])
    second = vae.decode(cases["random_latents"][None, :, 2:], ours)
    torch.testing.assert_close(torch.cat([first, second], 2)[0], cases["random_decoded"], rtol=0, atol=1e-4)


def test_a_snapshot_of_the_memory_can_be_returned_to(vae, cases):
    state = vae.init_decoder()
    vae.decode(cases["random_latents"][None, :, :2], state)
    snapshot = clone(state)
    once = vae.decode(cases["random_latents"][None, :, 2:], state)
    again = vae.decode(cases["random_latents"][None, :, 2:], snapshot)
    torch.testing.assert_close(once, again, rtol=0, atol=0)


def test_after_priming_three_latents_are_twelve_frames_and_the_memory_is_flat(vae, cases):
    state = prime(vae, cases["latents"][None])
    size = state_bytes(state)
    for _ in range(2):
        assert vae.decode(cases["random_latents"][None, :, :3], state).shape[2] == 12
        assert state_bytes(state) == size


def test_the_planned_bytes_of_the_decoder_memory_are_the_allocated_ones(vae, cases):
    assert decoder_state_bytes(vae, 40, 56) == state_bytes(prime(vae, cases["latents"][None]))


def test_a_bf16_vae_stores_bf16_caches_also_under_autocast(golden, vae, cases):
    model = build_vae(golden.json("vae.config.json")["dim"])
    model.load_state_dict({k: v.bfloat16() for k, v in vae.model.state_dict().items()}, assign=True)
    half = WanVae(model, bf16_constants=True)
    state = half.init_decoder()
    with torch.autocast("cpu", torch.bfloat16):
        out = half.decode(cases["random_latents"][None], state)
    assert {slot.dtype for slot in state.cache if isinstance(slot, torch.Tensor)} == {torch.bfloat16}
    assert (out[0] - cases["random_decoded"]).abs().mean() < 0.02


def test_pixels_are_truncated_to_eight_bits_and_come_back():
    image = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(-1, -1, 3)
    video = from_uint8(image)[:, None]
    assert (to_uint8(video)[0].int() - image.int()).abs().max() <= 1
    assert to_uint8(torch.full((3, 1, 2, 2), 0.999)).unique().tolist() == [254]
