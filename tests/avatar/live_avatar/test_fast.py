"""The fast modes compute what the plain networks compute. Captured graphs run as they are here, without a compiler."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from audio.chunk import AudioBlock
from avatar.live_avatar import fast
from avatar.live_avatar.dit import DiTConfig
from avatar.live_avatar.generator import Options, random_live_avatar
from avatar.live_avatar.vae import prime
from avatar.model import Reference
from avatar.quantize import Float8Linear

BLOCK = 7_680
CONFIG = DiTConfig(
    dim=64, ffn_dim=96, num_heads=2, num_layers=4, text_dim=32, audio_dim=64, audio_layers=2, audio_inject_layers=(0, 3)
)
OPTIONS = Options(width=64, height=64, clip_blocks=2, ring_blocks=2, motion_frames=9, prime_latents=3)


@pytest.fixture
def graphs(monkeypatch):
    """Counts the graphs that are captured."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=counter, **options))
    yield counter
    torch._dynamo.reset()


def run(*changes, blocks=3, options=OPTIONS):
    """Latents and frames of some blocks of a model that was changed."""
    model = random_live_avatar(options, CONFIG, dtype=torch.float32, vae_width=4, speech_layers=1)
    for change in changes:
        change(model)
    picture = np.random.default_rng(0).integers(0, 256, (90, 160, 3), np.uint8)
    state = model.start(Reference(picture, seed=1))
    out = []
    for i in range(blocks):
        samples = 0.1 * np.random.default_rng(i).standard_normal(BLOCK).astype(np.float32)
        latents = model.denoise(state, AudioBlock(samples, i * BLOCK, BLOCK))
        out += [latents, model.decode(state, latents)]
    return out


def furthest(ours, theirs):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def plain():
    return run()


def test_all_blocks_and_all_injectors_share_their_graphs(graphs, plain):
    compiled = run(lambda model: fast.compile_transformer(model.dit))
    assert graphs.frame_count == 4  # before and after a block's attention, an injector, the head
    assert furthest(compiled, plain) < 1e-5


def test_the_decoder_is_a_graph_for_one_latent_and_one_for_a_block(graphs, plain):
    compiled = run(lambda model: fast.compile_vae(model.vae))
    assert graphs.frame_count == 2  # one latent, as for priming and for pieces, and a block of them
    assert furthest(compiled, plain) < 1e-5


@pytest.mark.slow  # the compiler itself, for a minute
def test_a_compiled_decoder_keeps_no_more_than_its_memory():
    """A compiler left to itself hands out views of what it worked in, and that would live as long."""
    model = random_live_avatar(OPTIONS, CONFIG, vae_width=4, speech_layers=1)
    fast.compile_vae(model.vae)
    with torch.no_grad():
        state = prime(model.vae, torch.zeros(1, 16, 4, 4, 4))
        model.vae.decode(torch.zeros(1, 16, 1, 4, 4), state)
    memory = [slot for slot in state.cache if slot is not None]
    assert sum(slot.untyped_storage().nbytes() for slot in memory) == sum(slot.nbytes for slot in memory)


def test_where_the_room_is_too_little_it_gets_more_and_no_more_than_there_is(monkeypatch):
    given, total = [0.5], 100 << 30
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: given[-1])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: given.append(share))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 << 30)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total))

    def wants(share):
        def call():
            if given[-1] < share:
                raise torch.OutOfMemoryError
            return given[-1]

        return lambda: fast._in_little_room(call, 10 << 30, torch.device("cuda", 0))

    assert wants(0.2)() == pytest.approx(0.2)
    assert wants(0.25)() == pytest.approx(0.1 + 0.1 * 1.25**2)
    with pytest.raises(torch.OutOfMemoryError):
        wants(0.6)()
    assert given[-1] == 0.5


def test_eight_bit_products_stay_near(plain):
    assert furthest(run(lambda model: fast.use_float8(model.dit)), plain) < 0.1


def test_what_is_computed_in_float32_keeps_its_weights():
    model = random_live_avatar(OPTIONS, CONFIG, vae_width=4, speech_layers=1)
    assert fast.use_float8(model.dit) == 4 * 10 + 2 * 5
    kinds = {name.split(".")[0] for name, layer in model.dit.named_modules() if isinstance(layer, Float8Linear)}
    assert kinds == {"blocks", "audio_injector"}


def test_a_convolution_of_groups_is_a_product_for_each():
    torch.manual_seed(0)
    conv = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(32, 48, 8, padding=4, groups=4), dim=2)
    x = torch.randn(2, 32, 19)
    with torch.no_grad():
        torch.testing.assert_close(fast.GroupedProduct(conv)(x), conv(x))
