"""Weights and rings that live on the host and come to the device for their turn.

Weights are only read: one copy of each layer lies in page-locked memory, and two places on the device hold the layer at
work and the one that is arriving. A ring is read whole and written in one place: a few are on their way at a time, and
only the block that was made goes back. All copies run beside the computation, in streams of their own; who computes
waits for them on the device, never on the host.

The networks do not know of it. `stream_layers` puts a list in the place of a network's list of layers that brings in
what is asked for; `stream_rings` is told by the passes which layer they are about to enter.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from audio.errors import AvatardError
from avatar.cache import Conditioning, KVCache, Turn, empty_keys, empty_values
from avatar.float8 import FLOAT8
from avatar.placement import ARRIVING, LEAVING, SLOTS
from avatar.sampling import Enter

ALIGNMENT = 256
"""Bytes; kernels load faster from multiples of it, and some load from nothing else."""

PIECE = 32 << 20
"""Bytes of a layer that are copied at a time: between them rings have their turn on the link."""


class Link(Protocol):
    """Copies between host and device, in the order in which they are asked for, beside the computation."""

    def pinned(self, bytes_: int) -> Tensor:
        """Memory of the host that copies can reach: zeros, uint8 [bytes_]."""
        ...

    def mark(self) -> Any:
        """The point that the computation has been told to reach so far."""
        ...

    def copy(self, copies: Callable[[], None], after: Sequence[Any]) -> Any:
        """Run `copies` once all of these marks and arrivals are behind; the arrival of this one."""
        ...

    def wait(self, arrival: Any) -> None:
        """The computation goes on from here only when that has happened."""
        ...

    def finish(self, arrival: Any) -> None:
        """The caller goes on only when that has happened."""
        ...


class NotLocked(AvatardError):
    """The host does not give as much page-locked memory as was planned with."""


class _Pages(mmap.mmap):
    """Memory of the host that is page-locked until nobody refers to it any more.

    Not PyTorch's own: that rounds up to a power of two, half as much again for a layer of this family.
    """

    address = 0

    @classmethod
    def locked(cls, bytes_: int) -> Tensor:
        """uint8 [bytes_], zeros. Raises: NotLocked."""
        # Private: pages that processes share would be small ones.
        pages = cls(-1, bytes_, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError, AttributeError):
            pages.madvise(mmap.MADV_HUGEPAGE)  # locking is work for each page
        memory = torch.frombuffer(pages, dtype=torch.uint8)
        memory.zero_()  # by all threads: locking would bring in one page after the other
        failure = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), bytes_, 0))
        if failure:
            raise NotLocked(
                f"{bytes_ / 2**30:.1f} GiB of the host could not be page-locked (CUDA error {failure}); allow more "
                "(ulimit -l), or plan with less: model.options.ram"
            )
        pages.address = memory.data_ptr()
        return memory

    def __del__(self) -> None:
        if self.address:
            with contextlib.suppress(Exception):  # at the end of the process CUDA may have gone before
                torch.cuda.cudart().cudaHostUnregister(self.address)


class CudaLink:
    """One direction of the link to a GPU: a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._device = device

    def pinned(self, bytes_: int) -> Tensor:
        return _Pages.locked(bytes_)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def copy(self, copies: Callable[[], None], after: Sequence[torch.cuda.Event]) -> torch.cuda.Event:
        for event in after:
            self._stream.wait_event(event)
        arrival = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            copies()
            arrival.record(self._stream)
        return arrival

    def wait(self, arrival: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(arrival)

    def finish(self, arrival: torch.cuda.Event) -> None:
        arrival.synchronize()


class HostLink:
    """Where the device is the host: copies are made when they are asked for."""

    def pinned(self, bytes_: int) -> Tensor:
        return torch.zeros(bytes_, dtype=torch.uint8)

    def mark(self) -> None:
        return None

    def copy(self, copies: Callable[[], None], after: Sequence[None]) -> None:
        copies()

    def wait(self, arrival: None) -> None:
        pass

    def finish(self, arrival: None) -> None:
        pass


def link_to(device: torch.device) -> Link:
    """A new one, with its own order of copies."""
    return CudaLink(device) if device.type == "cuda" else HostLink()


class Layered(Protocol):
    """What a network offers to whoever places it; see `CausalDiT`."""

    blocks: nn.ModuleList
    enter: Enter | None
    adopt: Callable[[KVCache], None]
    float8_cache: bool
    hear: Any
    hear_later: Any
    new_cache: Any

    def modules_of_layer(self, i: int) -> list[nn.Module]: ...

    def condition(self, cache: KVCache, conditioning: Conditioning) -> None: ...


# ---------------------------------------------------------------------------------------------------------------------
# Weights


@dataclass(frozen=True)
class _Place:
    """Of a tensor in a slab; offset and strides in elements."""

    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor, storage_bytes: int) -> _Place:
        offset = storage_bytes // tensor.element_size() + tensor.storage_offset()
        return cls(tensor.dtype, tensor.shape, tensor.stride(), offset)


class _Slab:
    """The weights of one layer, side by side in memory of the host."""

    def __init__(self, modules: Sequence[nn.Module], link: Link) -> None:
        self._parameters = list({id(p): p for module in modules for p in module.parameters()}.values())
        self.bytes = 0
        storages: dict[int, tuple[int, torch.UntypedStorage]] = {}
        for parameter in self._parameters:
            storage = parameter.data.untyped_storage()
            if storage.data_ptr() not in storages:
                storages[storage.data_ptr()] = (self.bytes, storage)
                self.bytes += -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT
        self.memory = link.pinned(self.bytes)
        for offset, storage in storages.values():
            whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            self.memory[offset : offset + len(whole)].copy_(whole)
        # Views of one storage, as a joined matrix and its parts, stay views of one.
        self._places = [_Place.of(p.data, storages[p.data.untyped_storage().data_ptr()][0]) for p in self._parameters]

    def views(self, memory: Tensor) -> list[Tensor]:
        """The parameters as they lie in a copy of the slab."""
        return [
            memory[: self.bytes].view(place.dtype).as_strided(place.shape, place.strides, place.offset)
            for place in self._places
        ]

    def point_to(self, views: Sequence[Tensor]) -> None:
        for parameter, view in zip(self._parameters, views):
            parameter.data = view


class StreamedLayers(nn.ModuleList):
    """A list of layers, some of which are brought to the device when they are asked for, in their order.

    A layer that was asked for stays until the next but one is; whoever asks has by then given all work on the ones
    before to the device. Names of parameters stay as they are.
    """

    def __init__(self, layers: nn.ModuleList, slabs: dict[int, _Slab], device: torch.device, link: Link) -> None:
        super().__init__(layers)
        self.slabs, self._link = slabs, link
        self._order = sorted(slabs)
        room = max((slab.bytes for slab in slabs.values()), default=0)
        self._places = [torch.empty(room, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._views = {i: [slab.views(place) for place in self._places] for i, slab in slabs.items()}
        self._there: dict[int, tuple[int, Any]] = {}
        """Layers on the device or on their way: in which place, and what to wait for."""
        self._latest: int | None = None

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) and index in self.slabs and index != self._latest:
            self._arrive(index)
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[index] for index in range(len(self)))

    def _arrive(self, index: int) -> None:
        if index not in self._there:
            self._fetch(index)
        place, arrival = self._there[index]
        self._link.wait(arrival)
        self.slabs[index].point_to(self._views[index][place])
        self._latest = index
        following = self._order[(self._order.index(index) + 1) % len(self._order)]
        if following not in self._there:
            self._fetch(following)

    def _fetch(self, index: int) -> None:
        """Begin to copy a layer into the place that is not at work."""
        at_work = self._there[self._latest][0] if self._latest is not None else 1
        place = 1 - at_work
        self._there = {other: there for other, there in self._there.items() if there[0] == at_work}
        memory, slab = self._places[place], self.slabs[index]

        def copies() -> None:
            for there, home in zip(memory[: slab.bytes].split(PIECE), slab.memory.split(PIECE)):
                there.copy_(home, non_blocking=True)

        # All work on what was in that place has been given to the device by now.
        self._there[index] = (place, self._link.copy(copies, [self._link.mark()]))


def stream_layers(
    network: Layered,
    resident: Collection[int],
    device: torch.device,
    link: Link | None = None,
    ready: Callable[[int], None] = lambda i: None,
) -> None:
    """Put the weights of the network's layers where they shall live, in place: resident ones on the device.

    Args:
        ready: makes the weights of a layer what they are to be (read, 8 bits, joined), anywhere. It is called for
            layer after layer, so the device never needs room for more than one that will not stay.
    Called again with fewer resident layers, it lets the others go.
    """
    link = link or link_to(device)
    known = network.blocks.slabs if isinstance(network.blocks, StreamedLayers) else {}
    network.blocks = nn.ModuleList(network.blocks._modules.values())
    slabs = {}
    for i in range(len(network.blocks)):
        ready(i)
        modules = network.modules_of_layer(i)
        if i not in resident:
            slabs[i] = known.get(i) or _Slab(modules, link)
            slabs[i].point_to(slabs[i].views(slabs[i].memory))
        elif any(p.device != device for module in modules for p in module.parameters()):
            slab = known.get(i) or _Slab(modules, HostLink())
            slab.point_to(slab.views(slab.memory.to(device)))
    if slabs:
        network.blocks = StreamedLayers(network.blocks, slabs, device, link)
        network.hear = network.hear_later


# ---------------------------------------------------------------------------------------------------------------------
# Rings


@dataclass
class _Slot:
    """Room for keys and values on their way, in the order in which they lie on the host."""

    keys: Tensor
    values: Tensor
    free: Any
    """What has to happen before something else may come here."""


@dataclass
class _Busy:
    """The ring at work: of which pass, and what stands for it while it is away."""

    turn: Turn
    layer: int
    keys: Tensor
    values: Tensor


class RingStream:
    """Brings the ring of a step and layer to the device before a pass enters it, and what was made back afterwards.

    Rings arrive as they lie on the host, so that copies are few, large and wait for no kernel; the pass that is about
    to begin lays its ring behind the conditioning, in the one buffer that attention reads. The conditioning is made
    anew for each layer, from the one that all steps share, and for each pass the reference, which each may see
    elsewhere.

    Memory of the host is kept when a stream has ended, and given to the next one as zeros: to lock it takes seconds.

    Args:
        away: layers whose rings live on the host; blocks: that a ring holds.
        device: where they work; inward, outward: the link's two directions; before: what it takes the place of.
    """

    def __init__(
        self,
        away: Collection[int],
        blocks: int,
        device: torch.device,
        inward: Link | None = None,
        outward: Link | None = None,
        before: RingStream | None = None,
    ) -> None:
        self._away, self._blocks = sorted(away), blocks
        self._inward, self._outward = inward or link_to(device), outward or link_to(device)
        self._buffer: tuple[Tensor, Tensor] | None = None
        self._conditioned: tuple[int | None, Conditioning | None, int | None] = (None, None, None)
        """Of which layer the buffer has which conditioning, and for which position of the reference."""
        self._arriving: deque[_Slot] = deque()
        """Free ones, that for the next ring first."""
        self._leaving: deque[_Slot] = deque()
        self._there: dict[tuple[int, int], tuple[_Slot, Any]] = {}
        """Rings on the device or on their way, by pass and layer: in which slot, and what to wait for."""
        self._busy: _Busy | None = None
        self._home: list[Any] = []
        """When all that passes before these have made is on the host."""
        self._spare: dict[Any, list[tuple[Tensor, Tensor]]] = before._spare if before else defaultdict(list)
        """Rings on the host whose stream has ended, by what fits there."""

    def new_cache(self, conditioning: Conditioning, ring_frames: int, float8: bool) -> KVCache:
        """An empty cache whose rings live where they should."""
        cache = KVCache.empty(conditioning, ring_frames, float8, self._away)
        for layer in self._away:
            self._make_room(cache, layer)
        return cache

    def adopt(self, cache: KVCache) -> None:
        """Let the rings of a cache live where they should, in place; they may be on the device."""
        for layer in self._away:
            if layer in cache.away:
                continue
            keys, values = cache.keys[layer], cache.values[layer]
            self._make_room(cache, layer)
            for block in range(self._blocks):
                span = self._span(cache, block)
                for on_device, on_host in zip((keys, values), cache.away[layer]):
                    region = _as_it_lies(on_device[:, span])
                    on_host[block].view(region.shape).copy_(region)
            cache.keys[layer], cache.values[layer] = keys[:, :0].clone(), values[:, :0].clone()

    def _make_room(self, cache: KVCache, layer: int) -> None:
        """For the ring of a layer, on the host."""
        keys = cache.keys[layer]
        batch, _, heads, dim = keys.shape
        sizes = (self._blocks, batch, heads, cache.ring_tokens // self._blocks * dim)
        spare = self._spare[sizes, keys.dtype]
        if spare:
            ring = spare.pop()
            for slot in self._leaving:
                self._outward.finish(slot.free)  # with what the stream before has made
            for memory in ring:
                memory.view(torch.uint8).zero_()  # a ring that is filled again in part is looked at as a whole
        else:
            ring = self._on_host(sizes, keys.dtype), self._on_host(sizes, keys.dtype)
        cache.away[layer] = ring
        weakref.finalize(cache, spare.append, ring).atexit = False

    def _on_host(self, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._inward.pinned(math.prod(sizes) * dtype.itemsize).view(dtype).view(sizes)

    def _span(self, cache: KVCache, block: int) -> slice:
        """Where a block of the ring lies in a buffer, in tokens."""
        tokens, first = cache.ring_tokens // self._blocks, cache.conditioning_tokens
        return slice(first + block * tokens, first + (block + 1) * tokens)

    def _made(self, turn: Turn) -> int:
        """The block of the ring that a pass makes, in the place of the oldest."""
        return turn.start // turn.tokens % self._blocks

    def leave(self) -> None:
        """Passes were broken off: what they left on the device counts no more. Their block is to be made again."""
        self._end()

    def enter(self, turns: Sequence[Turn], number: int) -> None:
        """Pass `number` of these is about to enter its layer; what went before, layer by layer and in this order, is
        done. With number len(turns): all passes are through their last layer."""
        self._put_back()
        if number == len(turns):
            self._end()
            return
        turn = turns[number]
        if turn.layer not in turn.cache.away:
            return
        wanted = self._from_here(turns, number)
        first = next(wanted)
        if first not in self._there:
            self._fetch(first, turn)
        self._lay_in(turn, *self._there.pop(first))
        for key in wanted:
            if not self._arriving:
                break
            if key not in self._there:
                self._fetch(key, turns[key[0]])

    def _end(self) -> None:
        self._put_back()
        for slot, arrival in self._there.values():
            slot.free = arrival
            self._arriving.append(slot)
        self._there.clear()
        self._conditioned = (None, None, None)
        self._home = [slot.free for slot in self._leaving]

    def _from_here(self, turns: Sequence[Turn], number: int) -> Iterator[tuple[int, int]]:
        """This pass's ring, and those that will be needed after it, by pass and layer."""
        layer = turns[number].layer
        yield from ((other, layer) for other in range(number, len(turns)))
        later = (following for following in self._away if following > layer)
        yield from ((other, following) for following in later for other in range(len(turns)))

    def _fetch(self, key: tuple[int, int], turn: Turn) -> None:
        """Begin to copy a ring into a free slot."""
        host = turn.cache.away[key[1]]
        if self._buffer is None:
            self._make_slots(turn, host)
        slot, made = self._arriving.popleft(), self._made(turn)

        def copies() -> None:
            for there, home in zip((slot.keys, slot.values), host):
                for place, block in enumerate(self._others(made)):
                    there[place].copy_(home[block], non_blocking=True)

        self._there[key] = (slot, self._inward.copy(copies, [slot.free, *self._home]))

    def _others(self, made: int) -> list[int]:
        """All blocks of a ring but the oldest, which is about to be written over."""
        return [block for block in range(self._blocks) if block != made]

    def _make_slots(self, turn: Turn, host: tuple[Tensor, Tensor]) -> None:
        like, room = turn.cache.keys[turn.layer], turn.cache.conditioning_tokens + turn.cache.ring_tokens
        float8 = like.dtype == FLOAT8
        self._buffer = empty_keys(like, room, float8), empty_values(like, room, float8)
        for slots, count, blocks in ((self._arriving, ARRIVING, self._blocks - 1), (self._leaving, LEAVING, 1)):
            for _ in range(count):
                keys, values = (torch.empty_like(home[:blocks], device=like.device) for home in host)
                slots.append(_Slot(keys, values, self._inward.mark()))

    def _lay_in(self, turn: Turn, slot: _Slot, arrival: Any) -> None:
        """Make the buffer the ring of that pass and layer, conditioning in front."""
        assert self._buffer is not None
        assert turn.table is not None
        cache, layer = turn.cache, turn.layer
        self._busy = _Busy(turn, layer, cache.keys[layer], cache.values[layer])
        cache.keys[layer], cache.values[layer] = self._buffer
        there_of, given, position = self._conditioned
        if there_of != layer or given is not turn.conditioning:
            cache.condition_layer(layer, turn.conditioning, turn.table)
        elif position != cache.reference_position:
            cache.turn_reference(layer, turn.conditioning, turn.table)
        self._conditioned = (layer, turn.conditioning, cache.reference_position)
        self._inward.wait(arrival)
        for buffer, there in zip(self._buffer, (slot.keys, slot.values)):
            for place, block in enumerate(self._others(self._made(turn))):
                region = _as_it_lies(buffer[:, self._span(cache, block)])
                _copy(there[place].view(region.shape), region)
        slot.free = self._inward.mark()
        self._arriving.append(slot)

    def _put_back(self) -> None:
        """What was made in the ring at work to the host."""
        if self._busy is None:
            return
        busy, self._busy = self._busy, None
        turn, cache = busy.turn, busy.turn.cache
        made, slot = self._made(turn), self._leaving.popleft()
        if slot.free is not None:
            self._outward.wait(slot.free)
        homes = [home[made] for home in cache.away[busy.layer]]
        for on_device, there in zip((cache.keys[busy.layer], cache.values[busy.layer]), (slot.keys, slot.values)):
            region = _as_it_lies(on_device[:, self._span(cache, made)])
            _copy(region, there.view(region.shape))

        def copies() -> None:
            for there, home in zip((slot.keys, slot.values), homes):
                home.copy_(there[0], non_blocking=True)

        slot.free = self._outward.copy(copies, [self._outward.mark()])
        self._leaving.append(slot)
        cache.keys[busy.layer], cache.values[busy.layer] = busy.keys, busy.values


def _as_it_lies(x: Tensor) -> Tensor:
    """x [B, N, heads, dim] with its axes in the order in which they follow each other in memory."""
    order = sorted(range(4), key=lambda axis: -x.stride(axis))
    return x.permute(order)


def _copy(x: Tensor, into: Tensor) -> None:
    """Between regions of one shape whose last sides are dense; eight bytes at a time, if they allow it.

    A kernel that copies single bytes between rows that are apart reaches a fraction of the memory's rate.
    """
    many = 8 // x.element_size()
    sides = [number for y in (x, into) for number in (y.shape[-1], y.storage_offset(), *y.stride()[:-1])]
    if not any(number % many for number in sides):
        x, into = x.view(torch.int64), into.view(torch.int64)
    into.copy_(x)


def stream_rings(
    network: Layered,
    resident: Collection[int],
    blocks: int,
    device: torch.device,
    inward: Link | None = None,
    outward: Link | None = None,
    before: RingStream | None = None,
) -> RingStream | None:
    """Let the rings of layers that are not resident live on the host; blocks: that a ring holds.

    It may be called again with fewer resident layers, and with what it gave before; `network.adopt` then brings caches
    that are there already.
    """
    away = [i for i in range(len(network.blocks)) if i not in resident]
    if not away:
        return None
    rings = RingStream(away, blocks, device, inward, outward, before)

    def new_cache(conditioning: Conditioning, ring_frames: int) -> KVCache:
        cache = rings.new_cache(conditioning, ring_frames, network.float8_cache)
        network.condition(cache, conditioning)
        return cache

    network.new_cache = new_cache
    network.enter = rings.enter
    network.adopt = rings.adopt
    return rings


# ---------------------------------------------------------------------------------------------------------------------
# Whole networks


def bring_for(owner: Any, name: str, modules: Sequence[nn.Module], device: torch.device) -> None:
    """Let modules live on the host and come to the device for each call of that method, in place.

    Tensors that it is given come along: who looks at the modules to see where they belong finds the host.
    """
    slab = _Slab(modules, link_to(device))
    at_home = slab.views(slab.memory)
    slab.point_to(at_home)
    written = getattr(owner, name)

    def brought(*arguments: Any, **options: Any) -> Any:
        slab.point_to(slab.views(slab.memory.to(device, non_blocking=True)))
        try:
            return written(*(x.to(device) if isinstance(x, Tensor) else x for x in arguments), **options)
        finally:
            slab.point_to(at_home)

    setattr(owner, name, brought)
