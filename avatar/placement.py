"""Where the parts of a model live, in which precision and in which order they work; decided before a byte is read.

Pure arithmetic: what a model asks for (`avatar.demand`), what GPUs can do (`avatar.cards`), what is wanted. All
combinations of a few choices are tried, each with its peak of memory and its time for a block; the best that fits is
the plan. docs/placement.md has the model of memory and time, and what of it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import EnumType, StrEnum
from functools import lru_cache
from itertools import product
from typing import Any, TypeVar

from audio.errors import AvatardError
from avatar.cards import GIB, TABLE, Card
from avatar.demand import Demand, Network, Rings, Schedule, When

# What is known of the machine and of our code, beyond the rates of a card. None of it is measured on our code yet but
# where a source is named; `avatard bench` compares plan and measurement.

MATRIX_EFFICIENCY = 0.80
"""Of the rate of 8192-wide products in a first burst: what is left at 3,168 rows, of a card that is warm. Measured."""
CONVOLUTION_SHARE = 0.5
"""Of the rate of bf16 products: the decoder in channels_last_3d, compiled. Measured on an H200."""
ATTENTION8_GAIN = 1.2
"""Attention over keys and values in 8 bits, where a card multiplies such numbers: within a step, of a card at its limit
of power. Measured on H200s."""
NARROW_SLOWDOWN = 1.08
"""A part that works in small pieces. The decoder took 71 to 74 ms a block on an H200, and 67 with a block at once."""
LAUNCH_S = 6e-6
"""Of the host, for a kernel. Assumed; 26,000 of them in 346 ms (the reference) are 13 us each."""
STREAM_EFFICIENCY = 0.92
"""Of the link's rate while kernels run and both directions are in use. Measured on an H200."""
HIDING = 12
"""Copies hide behind kernels, and the other way round, where one of them takes much less time; where both take the
same, each waits now and then: 6 % in all. Fitted to budgets of 12, 24 and 48 GiB on an H200."""
DEQUANTISE_BYTES, DEQUANTISE_KV_BYTES = 5, 3
"""Moved for each weight where a card multiplies no 8-bit matrices (read 1, write 2, read 2); for each key or value."""

CONTEXT_BYTES = int(1.25 * GIB)
"""What CUDA, its libraries and our kernels take of a device. Measured: 0.75 to 1.23."""
ALLOCATOR = 1.05
"""Workspace in the allocator's hands over workspace in tensors, its segments growing as they must."""
PROCESS_BYTES = 4 * GIB
"""What the process itself takes of the host: libraries, and one tensor on its way. Assumed."""
HOST_RESERVE_BYTES = 4 * GIB
"""Left to the system."""
MOST_GPUS = 8
LIVE_MARGIN = 1.1
"""A block that comes late once has to be made up for, and frames leave for another process: on an H200 a broadcast's
blocks took 7 % longer than planned, and 4 % of its frames were held."""
SLOTS = 2
"""Layers on the device for streaming: one at work, one arriving."""
ARRIVING, LEAVING = 3, 2
"""Beside the ring at work: rings on their way to the device, and blocks of rings on their way back, at most."""


def reserve_bytes(memory_bytes: int) -> int:
    """What a plan leaves free: where its peak is too low by a few per cent, it still holds."""
    return max(GIB // 2, memory_bytes * 4 // 100)


class Precision(StrEnum):
    BF16 = "bf16"
    FP8 = "fp8"


class Lives(StrEnum):
    RESIDENT = "resident"
    ON_DEMAND = "on demand"
    STREAMED = "streamed"


class Offload(StrEnum):
    """How far parts may leave the device; by default as far as they must."""

    AUTO = "auto"
    NONE = "none"
    """Everything stays."""
    COMPONENT = "component"
    """Parts that do not work for every block come when they are needed."""
    BLOCK = "block"
    """That, and every layer of the transformer is brought in when it is its turn."""

    @classmethod
    def _missing_(cls, word: object) -> Offload | None:
        return {"cpu": cls.COMPONENT, "model": cls.COMPONENT, "group": cls.BLOCK}.get(str(word))


OFFLOAD_WORDS = ("auto", "none", "cpu", "group", "model", "block")
"""As people know them: MOVA says none, cpu and group, LightX2V model and block."""


@dataclass(frozen=True)
class Host:
    """memory_bytes: that a process may take of this machine."""

    memory_bytes: int


@dataclass(frozen=True)
class Target:
    """What is wanted, and what is not left to the plan.

    live: as fast as it is shown, with as exact numbers and as little delay as that allows; else as fast as it goes.
    vram_bytes: of each GPU, all of it without. weights, cache, schedule: None leaves the choice.
    """

    live: bool = True
    vram_bytes: int | None = None
    weights: Precision | None = None
    cache: Precision | None = None
    schedule: Schedule | None = None
    offload: Offload = Offload.AUTO
    fps: int = 25
    frames_per_block: int = 12


Said = TypeVar("Said")


def understand(name: str, text: str, read: Callable[[str], Said], error: type[AvatardError]) -> Said | None:
    """What a person said of a placement; None where nothing was said.

    Args:
        name: of the setting or option; read: an enumeration of words, or what raises ValueError with what it wants.
    Raises: `error`: the text cannot be understood.
    """
    try:
        return read(text) if text else None
    except ValueError as reason:
        words = OFFLOAD_WORDS if read is Offload else read
        wanted = f"there are {', '.join(words)}" if isinstance(words, tuple | EnumType) else reason
        raise error(f"{name} {text}: {wanted}") from reason


class DoesNotFit(AvatardError):
    """No plan fits. device_short_bytes, host_short_bytes: by how much the nearest misses."""

    def __init__(self, message: str, device_short_bytes: int, host_short_bytes: int) -> None:
        super().__init__(message)
        self.device_short_bytes, self.host_short_bytes = device_short_bytes, host_short_bytes


@dataclass(frozen=True)
class Place:
    """Where one part lives on one device.

    device_bytes, host_bytes: that it takes while a stream runs, slots included; resident_layers: those of its layers
    (for rings: of the network's) that stay on the device; narrow: it works in smaller pieces.
    """

    part: str
    lives: Lives
    precision: Precision
    device_bytes: int
    host_bytes: int = 0
    resident_layers: tuple[int, ...] = ()
    layers: int = 0
    narrow: bool = False

    def __str__(self) -> str:
        """How it lives, in words."""
        if self.lives is Lives.STREAMED and self.resident_layers:
            return f"streamed, {len(self.resident_layers)} of {self.layers} layers stay"
        return f"{self.lives}, works in pieces" if self.narrow else str(self.lives)


@dataclass(frozen=True)
class Seconds:
    """Of one block on one device: matrices, attention and memory of its steps; beside them the link, the busier way;
    afterwards the rest, which is sound and picture."""

    matrices: float
    attention: float
    memory: float
    link: float
    rest: float

    @property
    def steps(self) -> float:
        return self.matrices + self.attention + self.memory

    @property
    def block(self) -> float:
        return (self.steps**HIDING + self.link**HIDING) ** (1 / HIDING) + self.rest

    @property
    def binds(self) -> str:
        if self.link > self.steps:
            return "link"
        return "memory" if self.memory > self.matrices + self.attention + self.rest else "compute"


@dataclass(frozen=True)
class OnDevice:
    """One GPU's share: its steps, its parts, its predicted peak while it works and while a stream begins."""

    card: Card
    steps: int
    places: tuple[Place, ...]
    peak_bytes: int
    start_peak_bytes: int
    limit_bytes: int
    host_bytes: int
    seconds: Seconds


@dataclass(frozen=True)
class Placement:
    """The plan; `place()` carries it out, `explain()` tells it."""

    devices: tuple[OnDevice, ...]
    weights: Precision
    cache: Precision
    schedule: Schedule
    host_limit_bytes: int
    target: Target
    host_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        pinned = sum(device.host_bytes for device in self.devices)
        object.__setattr__(self, "host_bytes", PROCESS_BYTES + pinned)

    @property
    def slowest(self) -> OnDevice:
        return max(self.devices, key=lambda device: device.seconds.block)

    @property
    def fps(self) -> float:
        """Predicted, end to end, once the rings are full."""
        return self.target.frames_per_block / self.slowest.seconds.block

    @property
    def holds(self) -> bool:
        """Whether it is predicted to make frames faster than they are shown, by the margin that live work needs."""
        return self.fps >= self.target.fps * LIVE_MARGIN

    @property
    def binds(self) -> str:
        return self.slowest.seconds.binds

    @property
    def delay_s(self) -> float:
        """From a block's sound to its frames."""
        if self.schedule is Schedule.SEQUENTIAL:
            return sum(device.seconds.block for device in self.devices)
        return self.slowest.seconds.block * max(1, sum(device.steps for device in self.devices))

    @property
    def mode(self) -> str:
        """The plan in a few words."""
        words = [f"{self.weights} weights", f"{self.cache} keys", str(self.schedule)]
        moving = [place for place in self.slowest.places if place.lives is Lives.STREAMED and place.layers]
        words += [f"{place.part} {place}" for place in moving] or ["resident"]
        return ", ".join(words)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **asdict(self),
            "fps": self.fps,
            "holds": self.holds,
            "binds": self.binds,
            "delay_s": self.delay_s,
            "block_s": self.slowest.seconds.block,
        }

    def explain(self) -> str:
        """The plan as a table for people."""
        return "\n".join(_explain(self))


def plan(
    parts: Demand,
    gpus: Sequence[Card],
    host: Host,
    target: Target | None = None,
    otherwise: Iterable[tuple[str, Demand]] = (),
) -> Placement:
    """The best way to run these parts.

    Args:
        gpus: the steps are shared out among them; the last has the other parts too.
        otherwise: what else could be run, by name and in order of preference: to be named where this does not fit.
    Raises: DoesNotFit: says which memory is short by how much, and the nearest that fits.
    """
    target = target or Target()
    fitting, nearest = _search(parts, gpus, host, target)
    if fitting is not None:
        return fitting
    raise _does_not_fit(nearest, gpus, host, target, parts, otherwise)


Name = TypeVar("Name")


def first_live(
    variants: Iterable[tuple[Name, Demand]], gpus: Sequence[Card], host: Host, target: Target
) -> tuple[Name, Placement] | None:
    """The first of these variants that is predicted to be as fast as it is shown."""
    for name, parts in variants:
        found, _ = _search(parts, gpus, host, target)
        if found is not None and found.holds:
            return name, found
    return None


def ways_to_live(
    parts: Demand,
    gpus: Sequence[Card],
    host: Host,
    target: Target,
    lesser: Sequence[Iterable[tuple[str, Demand]]] = (),
) -> list[tuple[str, Placement]]:
    """What would be as fast as it is shown, where a plan is not: one way of each kind, as far as there is one.

    Less of the model, from each of `lesser` the first that will do; more of these GPUs; the least other one.
    """
    found = [first_live(variants, gpus, host, target) for variants in lesser]
    name = gpus[0].name
    several = ((f"{count} x {name}", [gpus[0]] * count) for count in range(len(gpus) + 1, MOST_GPUS + 1))
    others = ((card.name, [card]) for card in reversed(TABLE) if card.name != name)
    free = replace(target, vram_bytes=None)
    for kind, its_target in ((several, target), (others, free)):
        for label, cards in kind:
            if way := first_live([(label, parts)], cards, host, its_target):
                found.append(way)
                break
    return list({way[0]: way for way in found if way is not None}.values())


def step_down(placement: Placement, parts: Demand, host: Host) -> Placement:
    """The best plan whose peak is a GiB lower, for when a device ran out of memory all the same.

    Precision and schedule stay: streams that have begun go on with the same numbers. Raises: DoesNotFit.
    """
    usable = max(device.peak_bytes for device in placement.devices) - GIB
    # the budget of which `usable` is left when its reserve is taken off
    target = replace(
        placement.target,
        vram_bytes=max(usable + GIB // 2, usable * 100 // 96),
        weights=placement.weights,
        cache=placement.cache,
        schedule=placement.schedule,
    )
    return plan(parts, [device.card for device in placement.devices], host, target)


# ---------------------------------------------------------------------------------------------------------------------
# The search


@dataclass(frozen=True)
class _Squeeze:
    """How the smaller parts make room: those of the start of a stream, those of them in layers, those of each block.

    What comes in layers is the text encoder: it is wanted for a new prompt only, and never stays.
    """

    start: Lives = Lives.ON_DEMAND
    layered: Lives = Lives.STREAMED
    block: Lives = Lives.RESIDENT
    narrow: bool = False


_SQUEEZES = (
    _Squeeze(Lives.RESIDENT, Lives.ON_DEMAND),
    _Squeeze(Lives.ON_DEMAND, Lives.ON_DEMAND),
    _Squeeze(),
    _Squeeze(narrow=True),
    _Squeeze(block=Lives.ON_DEMAND, narrow=True),
)
"""In the order of what they cost."""


@dataclass(frozen=True)
class _Rest:
    """All but layers and rings, squeezed: places, and the sums that peaks and times are made of."""

    places: tuple[Place, ...]
    weights: int
    session: int
    pinned: int
    working: int
    starting: int
    seconds: float


@dataclass(frozen=True)
class _Option:
    """One way to use one device. short: bytes that the device and the host lack."""

    case: _Case
    rest: _Rest
    layers: int
    ring_layers: int
    peak: int
    start_peak: int
    pinned: int
    seconds: Seconds
    short: tuple[int, int]

    @property
    def fits(self) -> bool:
        return not any(self.short)

    def on_device(self) -> OnDevice:
        case = self.case
        places = (*self.rest.places, *case.moving_places(self.layers, self.ring_layers))
        return OnDevice(
            case.card, case.steps, places, self.peak, self.start_peak, case.limits[0], self.pinned, self.seconds
        )


class _Case:
    """One device, its share of the work, and one choice of precision and schedule."""

    def __init__(
        self,
        parts: Demand,
        card: Card,
        steps: int,
        has_rest: bool,
        weights: Precision,
        cache: Precision,
        schedule: Schedule,
        limits: tuple[int, int],
    ) -> None:
        self.card, self.steps, self.schedule, self.limits = card, steps, schedule, limits
        self.weights, self.cache = weights, cache
        self.together = max(1, steps) if schedule is Schedule.WAVEFRONT else 1
        networks = [part for part in parts if isinstance(part, Network)]
        self.stepping = [network for network in networks if network.when is When.STEP and steps]
        self.blocks = [network for network in networks if network.when is When.BLOCK and has_rest]
        self.starting = [network for network in networks if network.when is When.START and has_rest]

        # What may be brought in piece by piece: the layers of the steps' network, and rings.
        self.layered = next((network for network in self.stepping if network.layers), None)
        self.layer_bytes: tuple[int, ...] = ()
        if self.layered:
            in_8_bits = weights is Precision.FP8 and self.layered.float8_layers
            self.layer_bytes = self.layered.float8_layers if in_8_bits else self.layered.layers
        self.layers_away = _bytes_away(self.layer_bytes)
        rings = next((part for part in parts if isinstance(part, Rings) and steps), None)
        scale = 0.5 if cache is Precision.FP8 else 1.0
        self.rings = rings
        self.ring_layers = rings.layers if rings else 0
        self.ring_bytes = int(rings.ring_bytes * scale) if rings else 0
        self.conditioning_bytes = int(rings.conditioning_bytes * scale) if rings else 0
        self.kept_bytes = 0
        """Of conditioning as it is kept: keys that are still to be rotated in 16 bits, the rest as rings have it."""
        if rings:
            moving = rings.reference_bytes
            self.kept_bytes = rings.layers * int(moving + (rings.conditioning_bytes - moving) * scale)
        self.step_seconds = self._step_seconds()

    # Memory.

    def network_bytes(self, network: Network) -> int:
        return network.float8_bytes if self.weights is Precision.FP8 and network.float8_bytes else network.weight_bytes

    def layer_room(self, k: int) -> tuple[int, int]:
        """Bytes on the device and on the host with k resident layers."""
        away = self.layers_away[k]
        slots = SLOTS * max(self.layer_bytes) if away else 0
        return self.layers_away[0] - away + slots, away

    def ring_room(self, r: int) -> tuple[int, int]:
        """Bytes on the device and on the host with the rings of r layers on the device.

        A ring there stands behind its own copy of the conditioning; for the others there is one such buffer, and slots
        for what is on its way.
        """
        one, slots = self.ring_bytes + self.conditioning_bytes, 0
        if self.rings and r < self.ring_layers:
            block = self.ring_bytes // self.rings.blocks
            slots = one + (ARRIVING * (self.rings.blocks - 1) + LEAVING) * block
        return self.kept_bytes + slots + r * self.steps * one, (self.ring_layers - r) * self.steps * self.ring_bytes

    def workspace(self, network: Network, narrow: bool) -> int:
        size = network.least_workspace_bytes if narrow and network.least_workspace_bytes else network.workspace_bytes
        if network.when is When.STEP:
            size += (self.together - 1) * network.waiting_bytes
        if network is self.layered and self.together == 1:
            size += self.kept_bytes  # of new conditioning, whose block can still be taken back
        if network is self.layered and self.rings and self.cache is Precision.FP8 and not self.card.float8_tflops:
            size += self.rings.ring_bytes + self.rings.conditioning_bytes  # one ring in 16 bits, to be attended to
        return int(size * ALLOCATOR)

    def rest(self, squeeze: _Squeeze) -> _Rest:
        """What all parts but layers and rings take, and their seconds for each block."""
        # A part makes room while another works. The one with the largest workspace makes none at the peak.
        largest = max(self.blocks, key=lambda network: network.workspace_bytes, default=None)
        link = self.card.link_gb_s * 1e9 * STREAM_EFFICIENCY
        bf16 = self.card.bf16_tflops * 1e12
        places: list[Place] = []
        weights = pinned = working = starting = 0
        # New conditioning begins with a block, and those that are in flight before it still need the old one.
        session = self.kept_bytes if self.together > 1 else 0
        seconds = 0.0
        for network in [*self.starting, *self.blocks, *self.stepping]:
            size = self.network_bytes(network) - (sum(self.layer_bytes) if network is self.layered else 0)
            space = self.workspace(network, squeeze.narrow)
            lives, host, narrow = Lives.RESIDENT, 0, False
            if network.when is When.START:
                lives = squeeze.layered if network.layers else squeeze.start
                between = size - sum(network.layers) + max(network.layers, default=0)
                away = {Lives.ON_DEMAND: size, Lives.STREAMED: between}
                starting = max(starting, space + away.get(lives, 0))
            elif network.when is When.BLOCK:
                narrow = squeeze.narrow and network.least_workspace_bytes > 0
                busy = (network.work.matrices + network.work.convolutions / CONVOLUTION_SHARE) / bf16
                seconds += max(busy * (NARROW_SLOWDOWN if narrow else 1), network.work.launches * LAUNCH_S)
                if network is not largest and squeeze.block is Lives.ON_DEMAND:
                    lives, host = Lives.ON_DEMAND, size
                    space += size
                    seconds += size / link
            if network.when is not When.START:
                working = max(working, space)
            held = size if lives is Lives.RESIDENT else 0
            weights, session, pinned = weights + held, session + network.session_bytes, pinned + host
            if network is not self.layered:
                places.append(
                    Place(network.name, lives, Precision.BF16, held + network.session_bytes, host, narrow=narrow)
                )
        return _Rest(tuple(places), weights, session, pinned, working, starting, seconds)

    def moving_places(self, k: int, r: int) -> Iterator[Place]:
        """Layers and rings."""
        if self.layered:
            held, away = self.layer_room(k)
            held += self.network_bytes(self.layered) - sum(self.layer_bytes) + self.layered.session_bytes
            precision = self.weights if self.layered.float8_bytes else Precision.BF16
            n = len(self.layer_bytes)
            lives = Lives.STREAMED if away else Lives.RESIDENT
            yield Place(self.layered.name, lives, precision, held, away, spread(k, n), n)
        if self.rings:
            held, away = self.ring_room(r)
            n = self.ring_layers
            lives = Lives.STREAMED if away else Lives.RESIDENT
            yield Place(self.rings.name, lives, self.cache, held, away, spread(r, n), n)

    # Time.

    def _step_seconds(self) -> tuple[float, float, float]:
        """Matrices, attention and memory of this device's steps for one block, all parts where they are wanted."""
        card = self.card
        float8 = self.weights is Precision.FP8 and card.float8_tflops > 0
        attend8 = self.cache is Precision.FP8 and card.float8_tflops > 0
        bandwidth = card.memory_gb_s * 1e9
        matrices = attention = memory = 0.0
        for network in self.stepping:
            in_8_bits = float8 and network.float8_bytes
            rate = (card.float8_tflops if in_8_bits else card.bf16_tflops) * 1e12 * MATRIX_EFFICIENCY
            read = self.network_bytes(network) / self.together / bandwidth
            matrices += max(network.work.matrices / rate, read)
            attention += network.work.attention / (card.attention_tflops * (ATTENTION8_GAIN if attend8 else 1) * 1e12)
            memory += network.work.traffic / bandwidth
            if self.weights is Precision.FP8 and not float8:
                memory += DEQUANTISE_BYTES * network.float8_bytes / self.together / bandwidth
        if self.rings and self.cache is Precision.FP8 and not attend8:
            numbers = self.rings.layers * (self.rings.ring_bytes + self.rings.conditioning_bytes) / 2
            memory += DEQUANTISE_KV_BYTES * numbers / bandwidth
        # A device that waits for its kernels to be started counts as waiting for memory.
        launches = sum(network.work.launches for network in self.stepping) / self.together
        memory = max(memory, launches * LAUNCH_S - matrices - attention)
        return matrices * self.steps, attention * self.steps, memory * self.steps

    def seconds(self, rest: _Rest, k: int, r: int) -> Seconds:
        matrices, attention, memory = self.step_seconds
        inward = self.layer_room(k)[1] * self.steps / self.together
        outward = 0.0
        if self.rings:
            # The block being made takes the place of the oldest: that need not come, and this one leaves.
            away = self.ring_room(r)[1]
            outward = away / self.rings.blocks
            inward += away - outward
        # What comes and what leaves passes through the device's memory, rings twice more on their way into place.
        rings = self.ring_room(r)[1]
        memory += (inward + outward + 2 * rings) / (self.card.memory_gb_s * 1e9)
        link = max(inward, outward) / (self.card.link_gb_s * 1e9 * STREAM_EFFICIENCY)
        return Seconds(matrices, attention, memory, link, rest.seconds)

    # Options.

    def option(self, rest: _Rest, k: int, r: int) -> _Option:
        (layers, layers_pinned), (rings, rings_pinned) = self.layer_room(k), self.ring_room(r)
        held = CONTEXT_BYTES + rest.weights + layers
        peak, start_peak = held + rest.session + rings + rest.working, held + rest.starting
        pinned = rest.pinned + layers_pinned + rings_pinned
        short = max(0, max(peak, start_peak) - self.limits[0]), max(0, pinned - self.limits[1])
        return _Option(self, rest, k, r, peak, start_peak, pinned, self.seconds(rest, k, r), short)

    def options(self, offload: Offload) -> Iterator[_Option]:
        """All that are worth a look, the least squeezed first; those that do not fit too."""
        n = len(self.layer_bytes)
        everything, component = offload is Offload.NONE, offload is Offload.COMPONENT
        squeezes = _SQUEEZES[:1] if everything else _SQUEEZES[1:2] if component else _SQUEEZES
        counts = [n] if everything or component else [0] if offload is Offload.BLOCK else range(n, -1, -1)
        for squeeze in squeezes:
            rest = self.rest(squeeze)
            if len(counts) > 1 and self.option(rest, 0, 0).short[0]:
                yield from (self.option(rest, k, 0) for k in (0, n))
                continue
            for k in counts:
                option = self.option(rest, k, self.ring_layers)
                if not option.fits and self.rings and not (everything or component):
                    option = self.option(rest, k, 0)
                    one = self.steps * (self.ring_bytes + self.conditioning_bytes)
                    room = (self.limits[0] - option.peak) // one
                    if room > 0:
                        option = self.option(rest, k, min(room, self.ring_layers - 1))
                yield option
                if option.fits and (k, option.ring_layers) == (n, self.ring_layers):
                    return  # nothing more has to leave, and what comes now costs time


def spread(k: int, n: int) -> tuple[int, ...]:
    """k of n layers, as evenly apart as they can be, so that those that stay cover the arrival of the others."""
    return tuple(i for i in range(n) if (i + 1) * k // n > i * k // n)


@lru_cache(maxsize=64)
def _bytes_away(layers: tuple[int, ...]) -> list[int]:
    """Of the layers that do not stay, by how many do."""
    return [sum(layers) - sum(layers[i] for i in spread(k, len(layers))) for k in range(len(layers) + 1)]


def _search(parts: Demand, gpus: Sequence[Card], host: Host, target: Target) -> tuple[Placement | None, list[_Option]]:
    """The best placement, or None and what lacks least, an option for each device."""
    steps = next((part.steps for part in parts if isinstance(part, Rings)), 1)
    count = len(gpus)
    shares = [steps // count + (i < steps % count) for i in range(count)]
    host_limit = host.memory_bytes - HOST_RESERVE_BYTES
    best: tuple[tuple[float, ...], Placement] | None = None
    nearest: list[_Option] = []
    choices = product(
        [target.weights] if target.weights else Precision,
        [target.cache] if target.cache else Precision,
        [target.schedule] if target.schedule else Schedule,
    )
    for rank, (weights, cache, schedule) in enumerate(choices):
        chosen = []
        for i, (card, share) in enumerate(zip(gpus, shares)):
            memory = min(card.memory_bytes, target.vram_bytes or card.memory_bytes)
            limits = memory - reserve_bytes(memory), (host_limit - PROCESS_BYTES) // count
            case = _Case(parts, card, share, i == count - 1, weights, cache, schedule, limits)
            chosen.append(min(case.options(target.offload), key=lambda option: (_lack([option]), option.seconds.block)))
        if not all(option.fits for option in chosen):
            if not nearest or _lack(chosen) < _lack(nearest):
                nearest = chosen
            continue
        devices = tuple(option.on_device() for option in chosen)
        found = Placement(devices, weights, cache, schedule, host_limit, target)
        block_s = found.slowest.seconds.block
        # Live, whatever is fast enough is as good, and then numbers and delay count.
        key = (0, rank, block_s) if target.live and found.holds else (1, block_s, rank)
        if best is None or key < best[0]:
            best = key, found
    return (best[1] if best else None), nearest


def _lack(options: Sequence[_Option]) -> int:
    """How far from fitting; a device's memory counts more, since a host's is sooner had."""
    return sum(4 * option.short[0] + option.short[1] for option in options)


# ---------------------------------------------------------------------------------------------------------------------
# Words for people


def _does_not_fit(
    nearest: Sequence[_Option],
    gpus: Sequence[Card],
    host: Host,
    target: Target,
    parts: Demand,
    otherwise: Iterable[tuple[str, Demand]],
) -> DoesNotFit:
    worst = max(nearest, key=lambda option: _lack([option]))
    case, places = worst.case, worst.on_device().places
    device, pinned = worst.short
    held = {place.part: place.device_bytes for place in places}
    for network in [*case.blocks, *case.stepping]:
        held[network.name] += case.workspace(network, any(place.narrow for place in places))
    host_held = {place.part: place.host_bytes for place in places}
    shortages = [
        f"{where} is short of {_gib(short)}: "
        f"{_gib(least)} at least ({_largest(sizes)}), {_gib(least - short)} may be used"
        for where, short, least, sizes in (
            (case.card.name, device, max(worst.peak, worst.start_peak), held),
            ("the host", pinned, PROCESS_BYTES + worst.pinned, host_held),
        )
        if short
    ]
    message = "; ".join(shortages)

    free = replace(target, weights=None, cache=None, schedule=None, offload=Offload.AUTO)
    plenty = Host(1 << 50)
    others = [("the rest left to the plan", parts, host), ("more host memory", parts, plenty)]
    for name, other, memory in [*others, *((name, other, host) for name, other in otherwise)]:
        found, _ = _search(other, gpus, memory, free)
        if found is not None:
            if memory is plenty:
                name = f"{_gib(found.host_bytes + HOST_RESERVE_BYTES)} of host memory"
            message += f"; nearest that fits: {name} ({found.mode}), {found.fps:.1f} fps"
            break
    else:
        message += "; nothing smaller fits either"
    return DoesNotFit(message, device, pinned)


def _largest(sizes: dict[str, int]) -> str:
    return ", ".join(
        f"{name} {_gib(size)}" for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:3] if size
    )


def _explain(placement: Placement) -> Iterator[str]:
    for number, device in enumerate(placement.devices):
        card, seconds = device.card, device.seconds
        share = f", {device.steps} of the steps" if len(placement.devices) > 1 else ""
        rates = "measured" if card.measured else "from data sheets"
        yield f"GPU {number}: {card.name}, {_gib(card.memory_bytes)}, rates {rates}{share}"
        yield f"  {'part':20}{'precision':9}{'on the GPU':>12}{'on the host':>13}  lives"
        for place in device.places:
            sizes = (_gib(size) if size > GIB // 100 else "-" for size in (place.device_bytes, place.host_bytes))
            yield f"  {place.part:20}{place.precision:9}{next(sizes):>12}{next(sizes):>13}  {place}"
        work = device.peak_bytes - sum(place.device_bytes for place in device.places)
        yield f"  {'workspace and CUDA':29}{_gib(work):>12}"
        yield (
            f"  {'peak':29}{_gib(device.peak_bytes):>12}  of {_gib(device.limit_bytes)} that may be used; "
            f"{_gib(device.start_peak_bytes)} while a stream begins"
        )
        ms = {name: f"{1e3 * getattr(seconds, name):.0f}" for name in vars(seconds)}
        yield (
            f"  a block in {1e3 * seconds.block:.0f} ms: steps {1e3 * seconds.steps:.0f} (matrices {ms['matrices']}, "
            f"attention {ms['attention']}, memory {ms['memory']}) beside the link's {ms['link']}, then {ms['rest']}"
        )
    yield f"host: peak {_gib(placement.host_bytes)} of {_gib(placement.host_limit_bytes)} that may be used"
    live = "holds" if placement.holds else "does not hold"
    yield (
        f"{placement.schedule}: {placement.fps:.1f} frames/s, bound by {placement.binds}, {placement.delay_s:.2f} s "
        f"from sound to picture; {live} {placement.target.fps} fps live"
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
