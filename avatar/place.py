"""The full-size model where a plan says: read layer by layer, each part in its precision and its place, and a step down
when the device has no room for it after all."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from avatar.cards import GIB, Card, CardError, cache_file, card_key, find_card, load_cards, measure
from avatar.compile import replay
from avatar.demand import Demand, Network, Rings
from avatar.float8 import has_float8_products
from avatar.live_avatar.dit import CausalDiT
from avatar.live_avatar.fast import compile_vae, fuse, joined, regroup, replay_steps, use_float8_attention
from avatar.live_avatar.generator import LATENTS_PER_BLOCK, OptionError, Options
from avatar.live_avatar.size import Shape
from avatar.live_avatar.vae import WanVae
from avatar.live_avatar.weights import Source
from avatar.machine import bytes_of, host_memory
from avatar.offload import RingStream, bring_for, stream_layers, stream_rings
from avatar.placement import (
    CONTEXT_BYTES,
    DoesNotFit,
    Host,
    Lives,
    Offload,
    Place,
    Placement,
    Precision,
    Target,
    first_live,
    plan,
    spread,
    step_down,
    understand,
)
from avatar.quantize import quantize_linears

if TYPE_CHECKING:
    from avatar.live_avatar.replayed import ReplayedStep

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wish:
    """What settings say of the placement; what they leave out is chosen.

    vram, ram: the most that may be taken, such as 24GiB; weights, keys: bf16 or fp8; offload: none, cpu, group, model
    or block.
    """

    vram: str = ""
    ram: str = ""
    weights: str = ""
    keys: str = ""
    offload: str = ""


def choose(
    options: Options,
    wish: Wish,
    device: torch.device,
    *,
    live: bool = False,
    any_size: bool = False,
    any_schedule: bool = True,
) -> tuple[Options, Places]:
    """Where the parts of the model are to live on that GPU.

    Args:
        live: steady and soon rather than as fast as it goes; steps then run in sequence.
        any_size: the largest that is fast enough for a broadcast may be chosen; any_schedule: and a wavefront.
    Returns: the options, with what was chosen.
    Raises: DoesNotFit; OptionError: a wish that cannot be understood.
    """
    card, free = card_here(device)
    host = Host(understand("ram", wish.ram, bytes_of, OptionError) or host_memory())
    schedule = None if any_schedule and not live else options.schedule
    target = Target(
        live=live,
        vram_bytes=min(understand("vram", wish.vram, bytes_of, OptionError) or free, free),
        weights=understand("weights", wish.weights, Precision, OptionError),
        cache=understand("keys", wish.keys, Precision, OptionError),
        schedule=schedule,
        offload=understand("offload", wish.offload, Offload, OptionError) or Offload.AUTO,
    )
    shape = Shape(options.width, options.height, options.steps, options.merge_last_step, options.ring_blocks)
    chosen = None
    if live and any_size:
        chosen = first_live(((less, less.demand()) for less in [shape, *shape.lesser()]), [card], host, target)
    shape, placement = chosen or (shape, plan(shape.demand(), [card], host, target))
    log.info("%s on %s\n%s", shape, card.name, placement.explain())
    if live and not placement.holds:
        log.warning("%s: %.1f frames a second are expected, fewer than are shown", shape, placement.fps)
    chosen_options = replace(
        options,
        width=shape.width,
        height=shape.height,
        merge_last_step=shape.merge_last_step,
        schedule=placement.schedule,
    )
    return chosen_options, Places(placement, shape.demand(), host, device)


def card_here(device: torch.device) -> tuple[Card, int]:
    """The GPU as it was measured, as the table has it, or measured now (2 s); and the bytes that are free on it."""
    name = torch.cuda.get_device_name(device)
    free, total = torch.cuda.mem_get_info(device)
    known = [card for key, card in load_cards(cache_file()).items() if key.startswith(card_key(name, ""))]
    try:
        card = known[0] if known else find_card(name)
    except CardError:
        card = measure(device.index or 0)
    return replace(card, name=name, memory_bytes=total), free


class Places:
    """A placement of the full-size model on one device, being carried out.

    The allocator is held to the plan's budget, so that other programs keep the rest.

    Args:
        placement: for `demand` on this device and host; it changes when room has to be made.
    """

    def __init__(self, placement: Placement, demand: Demand, host: Host, device: torch.device) -> None:
        self.placement, self.demand, self.host, self.device = placement, demand, host, device
        self._stay = {part: set(_resident(self.place(part))) for part in ("transformer", "rings")}
        """Of which layers weights and rings are on the device."""
        self._dit: CausalDiT | None = None
        self._vae: WanVae | None = None
        self._rings: RingStream | None = None
        self._replayed: ReplayedStep | None = None
        budget = placement.target.vram_bytes
        if device.type == "cuda" and budget:
            # Layers come and go in several sizes: without this, 10 of 24 GiB were lost between them.
            torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, (budget - CONTEXT_BYTES) / total), device)

    def place(self, part: str) -> Place:
        """Where that part of the demand lives."""
        return next(place for place in self.placement.devices[0].places if place.part == part)

    @property
    def text_by_layer(self) -> bool:
        return self.place("text encoder").lives is Lives.STREAMED

    # As `avatar.live_avatar.generator.Places` says.

    def settle(self, dit: CausalDiT, source: Source) -> None:
        """Give the transformer, which has no weights yet, those of the source, each where it shall live."""
        self._dit = dit
        of_layer = {
            id(parameter): i
            for i in range(len(dit.blocks))
            for module in dit.modules_of_layer(i)
            for parameter in module.parameters()
        }
        # By name and before the first is given: a tensor that arrives takes the parameter's place.
        layers = {name: of_layer.get(id(parameter)) for name, parameter in dit.named_parameters()}
        fast = self.device.type == "cuda"

        def ready(i: int) -> None:
            source.give(lambda name: layers.get(name) == i)
            if self.placement.weights is Precision.FP8:
                for module in dit.modules_of_layer(i):
                    quantize_linears(module)
            if fast:
                dit.joined.append(joined(dit.blocks[i]))

        source.give(lambda name: layers.get(name) is None)
        if self.placement.cache is Precision.FP8:
            use_float8_attention(dit)
        stream_layers(dit, self._stay["transformer"], self.device, ready=ready)
        self._stream_rings()
        if fast:
            if self._fusible:
                fuse(dit)
                if all(len(staying) == len(dit.blocks) for staying in self._stay.values()):
                    self._replayed = replay_steps(dit)
            replay(dit, "hear")

    def settle_rest(self, vae: WanVae, speech: nn.Module) -> None:
        """The same for two networks whose weights are on the device."""
        self._vae = vae
        if self.device.type == "cuda":
            (decoder,) = (part for part in self.demand if isinstance(part, Network) and part.name == "VAE decoder")
            room = {LATENTS_PER_BLOCK: decoder.workspace_bytes, 1: decoder.least_workspace_bytes}
            compile_vae(vae, 1 if self.place("VAE decoder").narrow else LATENTS_PER_BLOCK, room.__getitem__)
        if self.place("VAE encoder").lives is not Lives.RESIDENT:
            bring_for(vae, "encode", [vae.model.encoder, vae.model.quant_conv], self.device)
        regroup(speech)
        if self.place("speech encoder").lives is not Lives.RESIDENT:
            bring_for(speech, "forward", [speech], self.device)
        elif self.device.type == "cuda":
            replay(speech, "forward")

    def make_room(self, what: str, reason: str) -> None:
        """Let more of the parts live elsewhere; streams go on with the same numbers.

        Raises: DoesNotFit: nothing more can leave.
        """
        before, dit = self.placement, self._dit
        assert dit is not None
        try:
            self.placement = step_down(before, self.demand, self.host)
        except DoesNotFit as error:
            raise DoesNotFit(
                f"{what}: {reason}; nothing more can leave the device: {error}",
                error.device_short_bytes,
                error.host_short_bytes,
            ) from error
        log.warning(
            "%s: %s; %s from [%s, %.1f GiB] to [%s, %.1f GiB]",
            what,
            reason,
            _memory(self.device),
            before.mode,
            before.devices[0].peak_bytes / GIB,
            self.placement.mode,
            self.placement.devices[0].peak_bytes / GIB,
        )
        if self._rings is not None:
            self._rings.leave()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # no copy is under way into what is let go of, or out of it
        if self._replayed is not None:
            dit.step_by_layer = self._replayed.step  # type: ignore[method-assign]
            self._replayed.forget()
            self._replayed = None
        for part, staying in self._stay.items():
            # As many as the new plan says, and of those that are there: nothing comes back where room is short.
            there = sorted(staying)
            count = min(len(there), len(_resident(self.place(part))))
            self._stay[part] = {there[i] for i in spread(count, len(there))}
        stream_layers(dit, self._stay["transformer"], self.device)
        self._stream_rings()
        if self._vae is not None and self.place("VAE decoder").narrow:
            self._vae.latents_per_call = 1
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # Inside.

    @property
    def _fusible(self) -> bool:
        """Whether the fused kernels run here: before compute capability 8.9 Triton has no e4m3."""
        in_8_bits = Precision.FP8 in (self.placement.weights, self.placement.cache)
        return not in_8_bits or has_float8_products(torch.empty(0, device=self.device))

    def _stream_rings(self) -> None:
        assert self._dit is not None
        (blocks,) = (part.blocks for part in self.demand if isinstance(part, Rings))
        self._rings = stream_rings(self._dit, self._stay["rings"], blocks, self.device, before=self._rings)


def _memory(device: torch.device) -> str:
    """What is in use of a device, in words."""
    if device.type != "cuda":
        return "on the host;"
    allocated, reserved = torch.cuda.memory_allocated(device) / GIB, torch.cuda.memory_reserved(device) / GIB
    return f"{allocated:.1f} GiB in use of {reserved:.1f} GiB reserved;"


def _resident(place: Place) -> Collection[int]:
    return range(place.layers) if place.lives is Lives.RESIDENT else place.resident_layers
