"""Weights and rings that come from the host: the same numbers, and nothing read before it is there."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from avatar.cache import Conditioning
from avatar.live_avatar.dit import CausalDiT, DiTConfig
from avatar.live_avatar.fast import use_float8, use_float8_attention
from avatar.offload import bring_for, stream_layers, stream_rings
from avatar.quantize import join
from avatar.sampling import Flight, advance, sigmas, step_modulations

CPU = torch.device("cpu")
TINY = DiTConfig(
    dim=64,
    ffn_dim=96,
    num_heads=2,
    num_layers=5,
    text_dim=32,
    text_len=8,
    audio_dim=16,
    audio_layers=3,
    audio_inject_layers=(0, 2, 4),
)


@dataclass(eq=False)
class Copy:
    """One that was asked for."""

    link: LateLink
    copies: Callable[[], None]
    after: Sequence[Any]
    done: bool = False


@dataclass
class LateLink:
    """A link that copies nothing before it has to: who forgets to wait reads what is not there yet.

    What is not done when it is waited for, is done then, with all that had to be before it. Memory of the host is full
    of NaN until something is written there.
    """

    order: list[Copy] = field(default_factory=list)
    bytes: int = 0

    def pinned(self, bytes_: int) -> Tensor:
        self.bytes += bytes_
        return torch.full((bytes_,), 255, dtype=torch.uint8)

    def mark(self) -> None:
        return None

    def copy(self, copies: Callable[[], None], after: Sequence[Any]) -> Copy:
        self.order.append(Copy(self, copies, after))
        return self.order[-1]

    def wait(self, arrival: Copy) -> None:
        if not arrival.done:
            order = arrival.link.order
            for before in [*order[: order.index(arrival)], *filter(None, arrival.after)]:
                self.wait(before)
            arrival.copies()
            arrival.done = True
            order.remove(arrival)

    def finish(self, arrival: Copy | None) -> None:
        if arrival is not None:
            self.wait(arrival)


@dataclass
class HastyLink(LateLink):
    """A link that copies at once: who gives a place away too early finds something else there."""

    def copy(self, copies: Callable[[], None], after: Sequence[Any]) -> Copy:
        made = super().copy(copies, after)
        self.wait(made)
        return made


def transformer(dtype: torch.dtype = torch.float32) -> CausalDiT:
    torch.manual_seed(0)
    dit = CausalDiT(TINY).to(dtype).eval().requires_grad_(False)
    dit.initialize()
    for parameter in dit.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    return dit


@torch.no_grad()
def speak(dit: CausalDiT, blocks: int, wavefront: bool) -> list[Tensor]:
    """Latents of blocks one after the other, over more than a ring."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dit.dtype)

    text = dit.encode_text(draw(1, 5, TINY.text_dim))
    first = dit.prefill(draw(1, 16, 1, 8, 8), draw(1, 16, 19, 8, 8), text)
    levels = sigmas(3)
    times = step_modulations(dit, levels)
    caches = [dit.new_cache(first, 6) for _ in range(3)]
    second = dit.prefill(draw(1, 16, 1, 8, 8), draw(1, 16, 19, 8, 8), text)
    second.version = 1
    made: list[Tensor] = []
    flights: list[Flight] = []
    for block in range(blocks + 2 * wavefront):
        if block < blocks:
            conditioning: Conditioning = first if block < 3 else second
            audio = dit.hear(draw(1, TINY.audio_layers, TINY.audio_dim, 12))
            positions = [30 + block + s for s in range(3)]
            flights.append(Flight(draw(1, 16, 3, 8, 8), conditioning, audio, 3 * block, positions))
        clean = advance(dit, flights, caches, levels, times, text)
        while not wavefront and not clean:
            clean = advance(dit, flights, caches, levels, times, text)
        if clean:
            made.append(flights.pop(0).x)
    assert not flights
    return made


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    return speak(transformer(), 5, wavefront=False)


@pytest.mark.parametrize("wavefront", [False, True])
@pytest.mark.parametrize("link", [LateLink, HastyLink])
@pytest.mark.parametrize("resident", [(), (1, 3), (0, 1, 2, 3)])
def test_streamed_weights_give_the_same_numbers(expected, resident, link, wavefront):
    dit = transformer()
    stream_layers(dit, resident, CPU, link())
    for ours, theirs in zip(speak(dit, 5, wavefront), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("wavefront", [False, True])
@pytest.mark.parametrize("link", [LateLink, HastyLink])
@pytest.mark.parametrize("resident", [(), (1, 3), (0, 1, 2, 3)])
def test_streamed_rings_give_the_same_numbers(expected, resident, link, wavefront):
    dit = transformer()
    stream_rings(dit, resident, 2, CPU, link(), link())
    for ours, theirs in zip(speak(dit, 5, wavefront), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_both_at_once_in_8_bits():
    made = []
    for streamed in (False, True):
        dit = transformer(torch.bfloat16)
        use_float8(dit)
        use_float8_attention(dit)
        if streamed:
            stream_layers(dit, (1,), CPU, LateLink())
            stream_rings(dit, (2,), 2, CPU, LateLink(), LateLink())
        made.append(speak(dit, 5, wavefront=True))
    for ours, theirs in zip(*made, strict=True):
        assert torch.equal(ours, theirs)


def test_only_what_is_streamed_lies_on_the_host_and_only_once():
    dit, link = transformer(), LateLink()
    layer = sum(parameter.nbytes for parameter in dit.blocks[1].parameters())
    stream_layers(dit, (0, 2, 4), CPU, link)
    assert 2 * layer <= link.bytes < 2.2 * layer
    assert list(dit.state_dict()) == list(transformer().state_dict())
    for name, tensor in transformer().state_dict().items():
        assert torch.equal(dit.state_dict()[name], tensor)


@pytest.mark.parametrize("resident", [(), (1,)])
def test_joined_matrices_and_their_parts_stay_one(resident):
    dit, link = transformer(), LateLink()
    dit.joined = [join([block.self_attn.q, block.self_attn.k, block.self_attn.v]) for block in dit.blocks]
    streamed = [i for i in range(5) if i not in resident]
    weights = sum(p.nbytes for i in streamed for part in dit.modules_of_layer(i) for p in part.parameters())
    joined = sum(p.nbytes for i in streamed for p in dit.joined[i].parameters())
    stream_layers(dit, resident, CPU, link)
    assert link.bytes < 1.1 * (weights - joined)
    for i in range(5):
        attention = dit.blocks[i].self_attn
        dit.joined[i].weight[64] = 7
        assert (attention.k.weight[0] == 7).all()


def test_after_a_pass_was_broken_off_the_next_one_is_right(expected):
    dit = transformer()
    stream_layers(dit, (), CPU, LateLink())
    dit.blocks[3]
    for ours, theirs in zip(speak(dit, 5, wavefront=False), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_stream_takes_over_the_memory_of_one_that_has_ended(expected):
    dit, link = transformer(), LateLink()

    def spoken() -> int:
        for ours, theirs in zip(speak(dit, 5, wavefront=False), expected, strict=True):
            assert torch.equal(ours, theirs)
        gc.collect()
        return link.bytes

    rings = stream_rings(dit, (2,), 2, CPU, link, LateLink())
    taken = spoken()
    assert spoken() == taken > 0
    # Placed anew, all of them away: of five rings four are there.
    stream_rings(dit, (), 2, CPU, link, LateLink(), before=rings)
    assert spoken() == taken * 5 / 4


def test_memory_of_a_stream_that_has_ended_is_zeros_for_the_next():
    dit, link = transformer(), LateLink()
    rings = stream_rings(dit, (), 2, CPU, link, LateLink())
    speak(dit, 5, wavefront=False)
    gc.collect()
    given = {id(ring): ring for spare in rings._spare.values() for ring in spare}
    assert all(ring[0].view(torch.uint8).any() for ring in given.values())
    text = dit.encode_text(torch.zeros(1, 5, TINY.text_dim))
    cache = dit.new_cache(dit.prefill(torch.zeros(1, 16, 1, 8, 8), torch.zeros(1, 16, 19, 8, 8), text), 6)
    assert all(id(ring) in given for ring in cache.away.values())
    assert not any(memory.view(torch.uint8).any() for ring in cache.away.values() for memory in ring)


def test_what_comes_for_a_call_finds_there_what_it_is_given(monkeypatch):
    """Who calls looks at the weights to see where they are, which is the host."""
    layer, brought = nn.Linear(3, 2), []
    bring_for(layer, "forward", [layer], CPU)
    to = Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda x, *where, **how: brought.append((x.shape, where)) or to(x, *where, **how))
    layer.forward(torch.zeros(1, 3))
    assert ((1, 3), (CPU,)) in brought
