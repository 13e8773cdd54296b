"""Live Avatar as a model of the house: a picture, a prompt and blocks of sound in, blocks of frames out.

The loop is that of the reference's real-time pipeline (its pipeline over timesteps, "TPP"), with the steps of a block
in sequence: streaming VAE, static motion frames, and the first generated frame as reference from the second clip on.
Where its single-process pipeline does otherwise, `Options` has a policy for each difference.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from audio.chunk import AudioBlock
from audio.errors import AvatardError
from audio.wav2vec import SpeechState, SpeechStream
from avatar.cache import Conditioning, KVCache
from avatar.demand import Schedule
from avatar.live_avatar.audio_encoder import AudioTokens
from avatar.live_avatar.dit import MOTION_FRAMES, CausalDiT, DiTConfig, Injection, TextKV
from avatar.live_avatar.size import MULTIPLE
from avatar.live_avatar.text import PromptEncoder
from avatar.live_avatar.vae import (
    LATENT_CHANNELS,
    SPATIAL_FACTOR,
    TEMPORAL_FACTOR,
    VaeState,
    WanVae,
    build_vae,
    decoder_state_bytes,
    from_uint8,
    prime,
    to_host,
    to_uint8,
)
from avatar.live_avatar.weights import (
    FromFile,
    FromGenerator,
    Lora,
    Source,
    WeightsError,
    find_files,
    load_speech_encoder,
    load_vae,
    open_checkpoint,
    read_json,
    width_of,
)
from avatar.model import FrameBlock, Part, Reference, StreamSpec
from avatar.picture import cover
from avatar.sampling import Flight, Reanchor, ReferenceDistance, advance, sigmas, step_modulations
from avatar.stateful import clone, state_bytes

LATENTS_PER_BLOCK = 3
FRAMES_PER_BLOCK = LATENTS_PER_BLOCK * TEMPORAL_FACTOR
REFERENCE_LEAD = 3
"""Frames at the start of a stream that the reference throws away. They are delivered here (docs/live_avatar.md), but
stay out of the history that re-anchoring encodes, as they do there."""

STILL_GROUPS = 31
"""Groups of four equal frames after which the encoder is at rest: a latent depends on at most 28 before it, and what
the encoder remembers on a little more."""


SEAM_BLOCKS = 2
"""Blocks beyond the ring that `resume` computes again.

What the first of them looked at is gone, so they come out a little otherwise, and less so from block to block. Without
them the next block's pixels differ by 0.2 of 255 levels in the mean and 10 at most, with two by 0.04 and 0.9, with four
by 0.006 and 0.15 (golden networks, 6 layers, 4 steps, ring of 4).
"""


class OptionError(AvatardError):
    """An option of the live_avatar family that does not work; names option and value."""


class ReferenceLatent(StrEnum):
    """Which latent stands for the picture."""

    SINGLE_FRAME = "single-frame"
    """The picture encoded as one frame; the real-time pipeline's."""
    SECOND_OF_FIVE = "second-of-five"
    """The second latent of five equal frames; the single-process pipeline's."""


class Decoding(StrEnum):
    STREAM = "stream"
    """One decoder from the first block to the last."""
    PER_CLIP = "per-clip"
    """Each clip by a decoder primed with the encoded frames before it; for parity with the single-process pipeline."""


class Crop(StrEnum):
    COVER = "cover"
    """Scaled to cover the size, and cut."""
    REFERENCE = "reference"
    """The short side scaled to the smaller of width and height, then cut or padded with black."""


@dataclass(frozen=True)
class Options:
    """What can be chosen; the defaults are the reference's real-time pipeline.

    A policy may be given by its name, a fixed reference distance as a number: settings files have nothing else.
    Raises: OptionError: a value that does not work.

    width, height: in pixels, multiples of 64. steps: denoising steps, 1 to 8; merge_last_step: leave out the last one,
    which moves the latents by under 1 %. ring_blocks: blocks a block can look at, itself included. clip_blocks: blocks
    in a clip, the unit of noise seeds and of re-anchoring. reference_distance: see `ReferenceDistance`. motion_frames:
    equal frames encoded as the motion before the stream, 1 + 4k (73, which are 19 latents; 365 in the single-process
    pipeline, of whose latents the last 19 count), and how far back re-encoding looks. prime_latents: still latents the
    decoder has seen before the first block (7; the decoder remembers 37). schedule: the order of the steps; the frames
    are the same.
    """

    width: int = 704
    height: int = 384
    steps: int = 4
    merge_last_step: bool = False
    ring_blocks: int = 4
    clip_blocks: int = 4
    reference_distance: ReferenceDistance = field(default_factory=ReferenceDistance)
    reanchor: Reanchor = Reanchor.REFERENCE
    reference_latent: ReferenceLatent = ReferenceLatent.SINGLE_FRAME
    motion_frames: int = 73
    prime_latents: int = 7
    decoding: Decoding = Decoding.STREAM
    crop: Crop = Crop.COVER
    schedule: Schedule = Schedule.SEQUENTIAL

    def __post_init__(self) -> None:
        for name, kind in _POLICIES.items():
            try:
                object.__setattr__(self, name, kind(getattr(self, name)))
            except ValueError as error:
                raise OptionError(f"{name}: {getattr(self, name)}; there are {', '.join(kind)}") from error
        if isinstance(self.reference_distance, int):
            try:
                object.__setattr__(self, "reference_distance", ReferenceDistance.fixed(self.reference_distance))
            except ValueError as error:
                raise OptionError(f"reference_distance: {error}") from error
        for name in ("width", "height"):
            value = getattr(self, name)
            if value < MULTIPLE or value % MULTIPLE:
                raise OptionError(f"{name}: {value} is not a multiple of {MULTIPLE}")
        for name in ("ring_blocks", "clip_blocks", "prime_latents"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}: {getattr(self, name)}; must be 1 or more")
        if self.motion_frames < 1 or self.motion_frames % TEMPORAL_FACTOR != 1:
            raise OptionError(f"motion_frames: {self.motion_frames}; must be 1 + 4k, such as 73")
        try:
            sigmas(self.steps, merge_last_step=self.merge_last_step)
        except ValueError as error:
            raise OptionError(str(error)) from error
        if self.schedule is Schedule.WAVEFRONT:
            if self.keeps_history:
                what = "decoding" if self.decoding is Decoding.PER_CLIP else "reanchor"
                raise OptionError(
                    f"{what}: {getattr(self, what)} needs the frames of a clip before the next one begins, and "
                    "schedule: wavefront makes them later; take the sequential one"
                )
            if self.clip_blocks < self.passes and self.reanchor is not Reanchor.NONE:
                raise OptionError(
                    f"clip_blocks: {self.clip_blocks} are over before a wavefront of {self.passes} steps has made the "
                    f"first block; set {self.passes} or more"
                )

    @classmethod
    def single_process(cls, **changes: object) -> Options:
        """The reference's single-process pipeline (its `reanchor` is off unless online decoding is asked for).

        It primes the decoder with 92 latents; 38 give the same frames, since the decoder reaches back 37.
        """
        base = cls(
            reanchor=Reanchor.NONE,
            reference_latent=ReferenceLatent.SECOND_OF_FIVE,
            motion_frames=365,
            prime_latents=38,
            decoding=Decoding.PER_CLIP,
            crop=Crop.REFERENCE,
        )
        return replace(base, **changes)  # type: ignore[arg-type]

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Options:
        """Options by name, as settings files and the command line give them.

        Raises: OptionError: an unknown option, or a value that does not work.
        """
        types = {option.name: option.type for option in fields(cls)}
        for name, value in settings.items():
            if name not in types:
                close = difflib.get_close_matches(name, types, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(types)}"
                raise OptionError(f"{name}: no option of live_avatar; {hint}")
            wanted = {"int": int, "bool": bool}.get(str(types[name]))
            if wanted is not None and type(value) is not wanted:
                raise OptionError(f"{name}: {value!r} is no {'whole number' if wanted is int else 'true or false'}")
        return cls(**settings)

    @property
    def passes(self) -> int:
        """Through the transformer for each block."""
        return self.steps - self.merge_last_step

    @property
    def keeps_history(self) -> bool:
        """Whether generated frames are remembered to be encoded again."""
        return self.decoding is Decoding.PER_CLIP or self.reanchor is Reanchor.REFERENCE_MOTION


_POLICIES: dict[str, type[StrEnum]] = {
    "reanchor": Reanchor,
    "reference_latent": ReferenceLatent,
    "decoding": Decoding,
    "crop": Crop,
    "schedule": Schedule,
}


@dataclass
class Made:
    """How a block came to be, so that its keys and values can be computed again.

    features: of its speech, [1, layers, C, 12]; references: the reference's frame position at each step; latents: after
    each step, [1, 16, 3, h, w], the clean ones last. Those before the first step are the clip's noise.
    """

    features: Tensor
    references: list[int]
    latents: list[Tensor]


@dataclass
class Coming:
    """A block on its way: where it is in its steps, the features of its speech, and the sound it is of."""

    flight: Flight
    features: Tensor
    sound: NDArray[np.float32]


@dataclass
class Session:
    """All that one stream remembers.

    block: the next one to begin; coming: those that are begun and not made, the oldest first; distances: the generator
    of reference distances; levels, times: the steps' noise levels and time modulations; motion: latents
    [1, 16, M, h, w]; anchor: the first generated latent frame; noise: of the present clip; pose: latents of the whole
    stream, where there is a pose video; still: the picture [1, 3, 1, H, W]; shown: the last generated frames, where
    they are needed again; recent: the last blocks, for `LiveAvatar.resume`.
    """

    seed: int
    distances: torch.Generator
    levels: Tensor
    times: list[tuple[Tensor, Tensor]]
    text: TextKV
    conditioning: Conditioning
    caches: list[KVCache]
    motion: Tensor
    vae: VaeState
    speech: SpeechState
    still: Tensor
    shown: list[Tensor] = field(default_factory=list)
    recent: list[Made] = field(default_factory=list)
    coming: list[Coming] = field(default_factory=list)
    anchor: Tensor | None = None
    noise: Tensor | None = None
    pose: Tensor | None = None
    block: int = 0
    decoded: int = 0


class Prompts(Protocol):
    """Where prompt embeddings come from; see `PromptEncoder`."""

    def embed(self, prompt: str) -> Tensor: ...

    def weight_bytes(self) -> int: ...


class Speech(Protocol):
    """Where speech features come from; see `SpeechStream`."""

    lookahead_samples: int
    past_samples: int
    model: torch.nn.Module

    def init_state(self) -> SpeechState: ...

    def features(self, state: SpeechState, block: AudioBlock) -> Tensor: ...


class Places(Protocol):
    """Where parts live, for networks that do not all fit beside each other; see `avatar.place`."""

    def settle(self, dit: CausalDiT, source: Source) -> None:
        """Give the transformer, which has no weights yet, those of the source, each where it shall live."""
        ...

    def settle_rest(self, vae: WanVae, speech: nn.Module) -> None:
        """The same for two networks whose weights are on the device."""
        ...

    def make_room(self, what: str, reason: str) -> None:
        """The device had no memory for that part of the work: let more of the parts live elsewhere.

        Raises: AvatardError: nothing more can leave.
        """
        ...


Result = TypeVar("Result")

Noise = Callable[[int, int, tuple[int, ...], torch.dtype, torch.device], Tensor]
"""Start noise of one clip, from (session seed, clip, shape, dtype, device)."""


def clip_noise(seed: int, clip: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The reference's noise: one draw for the clip from a generator on the device, seeded with seed + clip.

    On a GPU the numbers depend on its class, and neighbouring seeds share clips; so it is there.
    """
    generator = torch.Generator(device=device).manual_seed(seed + clip)
    return torch.randn(shape, generator=generator, dtype=dtype, device=device)


class LiveAvatar:
    """The family behind the four calls of `AvatarModel`.

    Args:
        dit, vae, speech, prompts: the networks; none of them keeps anything of a session.
        options: sizes and policies.
        device: where sessions live and work; that of the transformer's weights without it.
        noise: another source of start noise, for parity runs.
        places: makes room when the device runs out of memory; the stream then goes on. Without it, that is an error.
    """

    def __init__(
        self,
        dit: CausalDiT,
        vae: WanVae,
        speech: Speech,
        prompts: Prompts,
        options: Options | None = None,
        *,
        device: torch.device | str | None = None,
        noise: Noise = clip_noise,
        places: Places | None = None,
    ) -> None:
        self.dit, self.vae, self.speech, self.prompts = dit, vae, speech, prompts
        self.options = options or Options()
        self.device = torch.device(device) if device is not None else dit.patch_embedding.weight.device
        self.noise = noise
        self.places = places
        self.spec = StreamSpec(
            self.options.width,
            self.options.height,
            frames_per_block=FRAMES_PER_BLOCK,
            lookahead_samples=speech.lookahead_samples,
        )
        # Until its window is full the speech encoder has another shape for each block, and no graph. A step has one
        # for each place in the ring, from the second time on that it comes there.
        window = math.ceil(speech.past_samples / self.spec.samples_per_block)
        settled = max(2 * self.options.ring_blocks + 1, window) + self.options.passes
        self.spec = replace(self.spec, settled_after=settled)

    # What it takes.

    @property
    def _latent_size(self) -> tuple[int, int]:
        return self.options.height // SPATIAL_FACTOR, self.options.width // SPATIAL_FACTOR

    def parts(self) -> list[Part]:
        """What there is to place, in bytes; works on the meta device. A session's bytes are those of a running one."""
        options = self.options
        h, w = self._latent_size
        latent = LATENT_CHANNELS * h * w
        # Motion latents are float32, as the encoder gives them; noise and anchor have the transformer's type.
        kept = latent * min(MOTION_FRAMES, self._motion_latents()) * 4
        kept += latent * (LATENTS_PER_BLOCK * options.clip_blocks + 1) * self.dit.dtype.itemsize
        config = self.dit.config
        features = config.audio_layers * config.audio_dim * FRAMES_PER_BLOCK
        made = options.passes * LATENTS_PER_BLOCK * latent + features
        kept += self._kept_blocks * made * self.dit.dtype.itemsize
        if options.schedule is Schedule.WAVEFRONT:
            # On their way between two calls are blocks with one step behind them, with two, and so on.
            ahead = options.passes - 1
            steps = ahead * (ahead + 1) // 2
            kept += (steps * LATENTS_PER_BLOCK * latent + ahead * features) * self.dit.dtype.itemsize
            kept += ahead * self.spec.samples_per_block * np.dtype(np.float32).itemsize
        frame = 3 * options.height * options.width * self.vae.dtype.itemsize
        history = frame * self._history_frames()
        decoder = decoder_state_bytes(self.vae, options.height, options.width)
        vae = self.vae.model
        return [
            Part("dit", _bytes(self.dit), self._transformer_bytes() + kept, self.options.passes),
            Part("vae.decoder", _bytes(vae.decoder, vae.post_quant_conv), decoder + history, 1),
            Part("vae.encoder", _bytes(vae.encoder, vae.quant_conv), frame, 0),
            Part("speech", _bytes(self.speech.model), self.speech.past_samples * 4, 1),
            Part("text", self.prompts.weight_bytes(), 0, 0),
        ]

    @torch.no_grad()
    def _transformer_bytes(self) -> int:
        """What prompt, conditioning, rings and modulations take, found by making them on the meta device."""
        h, w = self._latent_size
        config = self.dit.config
        with torch.device("meta"):
            dit = build_dit(config).to(self.dit.dtype)
            dit.float8_cache = self.dit.float8_cache
            latent = torch.empty(1, LATENT_CHANNELS, 1, h, w)
            # Of the longest prompt: which it will be is not known.
            text = dit.encode_text(torch.empty(1, config.text_len, config.text_dim))
            conditioning = dit.prefill(latent, latent if config.enable_framepack else None, text)
            ring_frames = LATENTS_PER_BLOCK * self.options.ring_blocks
            caches = [dit.new_cache(conditioning, ring_frames) for _ in range(self.options.passes)]
            levels = sigmas(self.options.steps, merge_last_step=self.options.merge_last_step)
            times = step_modulations(dit, levels, latent.device)
            heard: list[Injection | AudioTokens] = []
            if self.options.schedule is Schedule.WAVEFRONT:
                heard = clone(dit.hear(torch.empty(1, config.audio_layers, config.audio_dim, FRAMES_PER_BLOCK)))
        coming = (self.options.passes - 1) * state_bytes(heard)
        return state_bytes([text, conditioning, caches, times]) + levels.nbytes + coming

    @property
    def _kept_blocks(self) -> int:
        return self.options.ring_blocks + SEAM_BLOCKS

    def _motion_latents(self) -> int:
        return 1 + (self.options.motion_frames - 1) // TEMPORAL_FACTOR

    def _history_frames(self) -> int:
        """Generated frames that are kept once the stream runs; after re-anchoring nobody asks for them again."""
        if self.options.decoding is not Decoding.PER_CLIP:
            return 0
        whole = math.ceil(self.options.motion_frames / FRAMES_PER_BLOCK)
        return whole * FRAMES_PER_BLOCK

    # The four calls.

    @torch.no_grad()
    def start(self, reference: Reference) -> Session:
        """A session: picture and prompt encoded, conditioning prefilled, decoder primed."""
        return self._with_room("a beginning stream", lambda: self._start(reference))

    def _start(self, reference: Reference) -> Session:
        options = self.options
        picture = torch.from_numpy(np.ascontiguousarray(self._fit(reference.image)))
        still = from_uint8(picture.to(self.device))[None, :, None].to(self.vae.dtype)
        latent = self._reference_latent(still)
        motion = latents_after_still(self.vae, still, options.motion_frames)
        # A stream begins as a video of the still picture begins; a clip goes on where such a video has come to rest.
        count = options.prime_latents
        primer = motion[:, :, :count] if options.decoding is Decoding.STREAM else motion[:, :, -count:]
        # Before the conditioning is there: nothing at the beginning of a stream works in as much memory.
        decoder = prime(self.vae, primer)
        text = self.dit.encode_text(self.prompts.embed(reference.prompt)[None].to(self.device))
        conditioning = self.dit.prefill(latent, motion, text)
        ring_frames = LATENTS_PER_BLOCK * options.ring_blocks
        levels = sigmas(options.steps, merge_last_step=options.merge_last_step).to(self.device)
        return Session(
            seed=reference.seed,
            distances=torch.Generator().manual_seed(reference.seed),
            levels=levels,
            times=step_modulations(self.dit, levels, self.device),
            text=text,
            conditioning=conditioning,
            caches=[self.dit.new_cache(conditioning, ring_frames) for _ in range(self.options.passes)],
            motion=motion[:, :, -MOTION_FRAMES:].clone(),
            vae=decoder,
            speech=self.speech.init_state(),
            still=still,
        )

    def step(self, state: Session, audio: AudioBlock) -> list[FrameBlock]:
        """Advance `state` in place by one block of sound; its frames. An empty list for a block without sound."""
        return list(self._speak(state, audio, LATENTS_PER_BLOCK))

    def step_in_pieces(self, state: Session, audio: AudioBlock) -> Iterator[FrameBlock]:
        """As `step`, four frames at a time: the first come before the rest is decoded."""
        return self._speak(state, audio, 1)

    @torch.no_grad()
    def finish(self, state: Session) -> list[FrameBlock]:
        """The blocks that a wavefront has not made yet; none where the steps run in sequence."""
        frames: list[FrameBlock] = []
        while state.coming:
            if made := self._with_room("steps", lambda: self._advance(state), state):
                frames += self._show(state, made, LATENTS_PER_BLOCK)
        return frames

    @torch.no_grad()
    def _speak(self, state: Session, audio: AudioBlock, latents_at_once: int) -> Iterator[FrameBlock]:
        if made := self._with_room("steps", lambda: self._denoise(state, audio), state):
            yield from self._show(state, made, latents_at_once)

    def _show(self, state: Session, made: Coming, latents_at_once: int) -> Iterator[FrameBlock]:
        start, rest = made.flight.f0 * TEMPORAL_FACTOR, made.sound
        samples = self.spec.samples_per_frame
        for video in self._decoded(state, made.flight.x, latents_at_once):
            length = video.shape[2]
            sound, rest = rest[: length * samples], rest[length * samples :]
            if shown := math.ceil(len(sound) / samples):
                yield FrameBlock(to_host(to_uint8(video[0])).numpy()[:shown], sound, start)
            start += length

    # The two halves of a step.

    @torch.no_grad()
    def denoise(self, state: Session, audio: AudioBlock) -> Tensor | None:
        """Latents [1, 16, 3, h, w] of the next block; advances all of `state` but the decoder.

        With a wavefront those of a block before, or None while there is none.
        """
        made = self._denoise(state, audio)
        return made.flight.x if made else None

    def _denoise(self, state: Session, audio: AudioBlock) -> Coming | None:
        state.coming.append(self._begin(state, audio))
        made = self._advance(state)
        while not made and self.options.schedule is Schedule.SEQUENTIAL:
            made = self._advance(state)
        return made

    def _begin(self, state: Session, audio: AudioBlock) -> Coming:
        """The next block before its first step; all that is drawn and heard is drawn and heard here."""
        clip, place = divmod(state.block, self.options.clip_blocks)
        f0 = LATENTS_PER_BLOCK * state.block
        if place == 0:
            self._begin_clip(state, clip)
        features = self.speech.features(state.speech, audio).to(self.device)
        references = self.options.reference_distance.positions(f0, self.options.passes, state.distances)
        state.block += 1
        flight = Flight(
            self._noise(state, place),
            state.conditioning,
            self._hear(features),
            f0,
            references,
            self._pose(state, f0),
        )
        return Coming(flight, features, audio.samples[: audio.valid].copy())

    def _hear(self, features: Tensor) -> list[Injection | AudioTokens]:
        heard = list(self.dit.hear(features))
        # What a captured graph gives is overwritten by the next block's; in a wavefront both are needed.
        return heard if self.options.schedule is Schedule.SEQUENTIAL else clone(heard)

    def _advance(self, state: Session) -> Coming | None:
        """One step of each block that is coming; the oldest, if that made it."""
        flights = [coming.flight for coming in state.coming]
        for cache in state.caches:
            self.dit.adopt(cache)
        if not advance(self.dit, flights, state.caches, state.levels, state.times, state.text):
            return None
        made = state.coming.pop(0)
        flight = made.flight
        state.recent.append(Made(made.features, list(flight.reference_positions), flight.trace))
        del state.recent[: -self._kept_blocks]
        if flight.f0 == 0:
            state.anchor = flight.x[:, :, :1].clone()
        return made

    @torch.no_grad()
    def decode(self, state: Session, latents: Tensor) -> Tensor:
        """Pixels [1, 3, 12, H, W] in [-1, 1] of a block's latents; advances the decoder of `state`."""
        (video,) = self._decoded(state, latents, LATENTS_PER_BLOCK)
        return video

    def _decoded(self, state: Session, latents: Tensor, latents_at_once: int) -> Iterator[Tensor]:
        """What `decode` gives, in parts."""
        options = self.options
        per_clip = options.decoding is Decoding.PER_CLIP
        if per_clip and state.decoded and state.decoded % options.clip_blocks == 0:
            state.vae = prime(self.vae, self._encode_history(state)[:, :, -options.prime_latents :])
        parts: list[Tensor] = []
        for part in latents.split(latents_at_once, dim=2):
            # What may have to be taken back is kept: of the decoder's memory no more than it works with at once.
            pieces = part.split(self.vae.latents_per_call, dim=2)
            videos = [self._with_room("decoding", partial(self._pixels, piece, state), state) for piece in pieces]
            parts.append(torch.cat(videos, 2))
            yield parts[-1]
        state.decoded += 1
        if options.keeps_history and (per_clip or state.decoded <= options.clip_blocks):
            state.shown.append(torch.cat(parts, 2).to(self.vae.dtype))
            del state.shown[: -math.ceil(options.motion_frames / FRAMES_PER_BLOCK)]

    def _pixels(self, latents: Tensor, state: Session) -> Tensor:
        return self.vae.decode(latents, state.vae)

    @torch.no_grad()
    def set_pose(self, state: Session, video: Tensor) -> None:
        """Let a pose video lead the stream from its first block on, in place.

        Args:
            video: [3, T, H, W] in [-1, 1], at 25 frames a second; filled up with black to whole clips. After its end
                the stream goes on without.
        """
        clip_frames = FRAMES_PER_BLOCK * self.options.clip_blocks
        missing = -video.shape[1] % clip_frames
        black = video.new_full((1,), -1.0).expand(3, missing, *video.shape[2:])
        clips = torch.cat([video, black], 1)[None].to(self.device).split(clip_frames, dim=2)
        # One frame more in front makes 1 + 4k of them; its latent is dropped again.
        encoded = [self.vae.encode(torch.cat([clip[:, :, :1], clip], 2))[:, :, 1:] for clip in clips]
        state.pose = torch.cat(encoded, 2)

    # A session in few bytes: 20 MB at full size, where all of it is 55 GB.

    def snapshot(self, state: Session) -> Session:
        """`state` without what `resume` makes again: prompt, conditioning, rings, noise and the decoder's memory."""
        streams = self.options.decoding is Decoding.STREAM
        nothing = Conditioning([], [], [], 0, 0)
        return replace(
            state,
            times=[],
            text=[],
            conditioning=nothing,
            caches=[],
            noise=None,
            vae=VaeState([]) if streams else state.vae,
            coming=[replace(c, flight=replace(c.flight, conditioning=nothing, audio=[])) for c in state.coming],
        )

    @torch.no_grad()
    def resume(self, reference: Reference, saved: Session) -> Session:
        """A session that goes on where the snapshot was taken; exact while that has all blocks since the beginning.

        The kept blocks go through the transformer again, step by step as they did then, so the rings hold what they
        held but for what the first of them saw of blocks before; and through a decoder that begins with them.
        """
        new = self.start(reference)
        state = replace(saved, times=new.times, text=new.text, conditioning=new.conditioning, caches=new.caches)
        first = saved.block - len(saved.coming) - len(saved.recent)
        streams = self.options.decoding is Decoding.STREAM
        if streams:
            state.vae = self.vae.init_decoder() if first else new.vae
        anchored = False
        begun = [Made(c.features, list(c.flight.reference_positions), c.flight.trace) for c in saved.coming]
        for block, made in enumerate([*saved.recent, *begun], first):
            clip, place = divmod(block, self.options.clip_blocks)
            if place == 0 or block == first:
                self._draw_noise(state, clip)
            if clip and not anchored and self.options.reanchor is not Reanchor.NONE:
                self._condition(state)
                anchored = True
            audio = self._hear(made.features)
            self._fill_rings(state, block, made, audio)
            if (index := block - first - len(saved.recent)) >= 0:
                flight = state.coming[index].flight
                flight.conditioning, flight.audio = state.conditioning, audio
            elif streams:
                self.vae.decode(made.latents[-1], state.vae)
        return state

    def _fill_rings(self, state: Session, block: int, made: Made, audio: list[Injection | AudioTokens]) -> None:
        """A block's keys and values once more, in place, of the steps that it has behind it."""
        f0, given = LATENTS_PER_BLOCK * block, state.conditioning
        before = [self._noise(state, block % self.options.clip_blocks), *made.latents][: len(made.latents)]
        for x, time, cache, position in zip(before, state.times, state.caches, made.references):
            if cache.version != given.version:
                self.dit.condition(cache, given)
            self.dit.step(x, time, given, state.text, audio, cache, f0, position, pose=self._pose(state, f0))

    # Inside.

    def _with_room(self, what: str, work: Callable[[], Result], state: Session | None = None) -> Result:
        """What `work` gives; where the device has no memory for it, room is made, and it begins anew.

        What it did to `state` is taken back before that: its rings are in place, and are written as they were.
        """
        while True:
            before = _marked(state) if state else None
            try:
                return work()
            except torch.OutOfMemoryError as error:
                if self.places is None:
                    raise
                reason = ". ".join(str(error).split(". ")[:2])
            # Not in the handler: as long as the error is known, so are the tensors of all that it came through.
            if state and before:
                vars(state).update(vars(before))
            self.places.make_room(what, reason)

    def _fit(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        fit = cover if self.options.crop is Crop.COVER else centre_crop
        return fit(image, self.options.width, self.options.height)

    def _reference_latent(self, still: Tensor) -> Tensor:
        if self.options.reference_latent is ReferenceLatent.SINGLE_FRAME:
            return self.vae.encode(still)
        return self.vae.encode(still.expand(-1, -1, 1 + TEMPORAL_FACTOR, -1, -1))[:, :, 1:]

    def _noise(self, state: Session, place: int) -> Tensor:
        """Start noise of the block at that place in the present clip."""
        assert state.noise is not None
        return state.noise[:, :, LATENTS_PER_BLOCK * place : LATENTS_PER_BLOCK * (place + 1)]

    def _draw_noise(self, state: Session, clip: int) -> None:
        h, w = self._latent_size
        shape = (LATENT_CHANNELS, LATENTS_PER_BLOCK * self.options.clip_blocks, h, w)
        state.noise = self.noise(state.seed, clip, shape, self.dit.dtype, self.device)[None]

    def _begin_clip(self, state: Session, clip: int) -> None:
        self._draw_noise(state, clip)
        if clip == 1 and self.options.reanchor is not Reanchor.NONE:
            self._reanchor(state)

    def _reanchor(self, state: Session) -> None:
        """New conditioning, in place; the rings stay."""
        if self.options.reanchor is Reanchor.REFERENCE_MOTION:
            state.motion = self._encode_history(state)[:, :, -MOTION_FRAMES:].clone()
            if self.options.decoding is Decoding.STREAM:
                state.shown.clear()
        self._condition(state)

    def _condition(self, state: Session) -> None:
        """The first generated frame and the motion frames as conditioning."""
        assert state.anchor is not None
        before = state.conditioning.version
        state.conditioning = self.dit.prefill(state.anchor, state.motion, state.text)
        state.conditioning.version = before + 1

    def _encode_history(self, state: Session) -> Tensor:
        """Latents of the last `motion_frames` frames: the still picture, then what was generated."""
        shown = torch.cat(state.shown, 2)
        if state.decoded == len(state.shown):
            shown = shown[:, :, REFERENCE_LEAD:]
        still = self.options.motion_frames - shown.shape[2]
        if still > 0:
            return latents_after_still(self.vae, state.still, still, shown)
        return self.vae.encode(shown[:, :, -self.options.motion_frames :])

    def _pose(self, state: Session, f0: int) -> Tensor | None:
        if state.pose is None or f0 >= state.pose.shape[2]:
            return None
        return state.pose[:, :, f0 : f0 + LATENTS_PER_BLOCK]


def _marked(state: Session) -> Session:
    """A session to go back to, as long as its caches are only written where they will be written again."""
    distances = torch.Generator()
    distances.set_state(state.distances.get_state())
    return replace(
        state,
        distances=distances,
        vae=replace(state.vae, cache=list(state.vae.cache)),
        speech=replace(state.speech),
        shown=list(state.shown),
        recent=list(state.recent),
        coming=[replace(c, flight=replace(c.flight, trace=list(c.flight.trace))) for c in state.coming],
    )


def latents_after_still(vae: WanVae, still: Tensor, frames: int, shown: Tensor | None = None) -> Tensor:
    """Latents [1, 16, M, h, w] of a video that holds still and then moves.

    Args:
        still: [1, 3, 1, H, W], shown for `frames` frames, 1 or more; only as long as it matters is it computed.
        shown: [1, 3, N, H, W], the frames after that; frames + N = 4 M - 3.
    """
    state = vae.init_encoder()
    latents = [vae.encode(still, state)]
    groups, rest = divmod(frames - 1, TEMPORAL_FACTOR)
    for _ in range(min(groups, STILL_GROUPS)):
        latents.append(vae.encode(still.expand(-1, -1, TEMPORAL_FACTOR, -1, -1), state))
    latents.append(latents[-1].expand(-1, -1, max(0, groups - STILL_GROUPS), -1, -1))
    if shown is not None:
        latents.append(vae.encode(torch.cat([still.expand(-1, -1, rest, -1, -1), shown], 2), state))
    return torch.cat(latents, 2)


def centre_crop(image: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """The reference's fit: short side to min(width, height), bilinear; then the middle, black where it is short."""
    from PIL import Image

    rows, columns = image.shape[:2]
    side = min(width, height)
    short, long = sorted((rows, columns))
    scaled = int(side * long / short)
    size = (side, scaled) if columns <= rows else (scaled, side)
    picture = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    pad_x, pad_y = max(0, width - size[0]), max(0, height - size[1])
    picture = np.pad(picture, ((pad_y // 2, (pad_y + 1) // 2), (pad_x // 2, (pad_x + 1) // 2), (0, 0)))
    top = round((picture.shape[0] - height) / 2)
    left = round((picture.shape[1] - width) / 2)
    return picture[top : top + height, left : left + width]


def _bytes(*modules: torch.nn.Module) -> int:
    seen: dict[int, int] = {}
    for module in modules:
        for tensor in [*module.parameters(), *module.buffers()]:
            seen[id(tensor)] = tensor.nbytes
    return sum(seen.values())


# ---------------------------------------------------------------------------------------------------------------------
# the ready model


def build_dit(config: DiTConfig) -> CausalDiT:
    """The transformer without weights (meta device)."""
    with torch.device("meta"):
        return CausalDiT(config).eval().requires_grad_(False)


def load_dit(
    weights: Path,
    config: Path,
    lora: Path | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    lora_alpha: float = 64.0,
    lora_rank: int = 128,
    places: Places | None = None,
) -> CausalDiT:
    """The transformer from its original layout, a LoRA merged into it tensor by tensor; places: where they go.

    Raises: WeightsError: files damaged, keys or shapes that do not fit; ConfigMismatch: another architecture.
    """
    checkpoint = open_checkpoint(weights)
    try:
        dit = build_dit(DiTConfig.from_dict(read_json(config)))
    except (TypeError, ValueError) as error:  # numbers that are none, or make no network
        raise WeightsError(f"{config}: {error}") from error
    change = None
    if lora is not None:
        change = Lora(open_checkpoint(lora), alpha=lora_alpha, rank=lora_rank)
        change.check(checkpoint.shapes)
    source = FromFile(dit, checkpoint, change=change, dtype=dtype, device=device)
    if places is None:
        source.give()
    else:
        places.settle(dit, source)
    return dit


def load_live_avatar(
    directory: Path,
    options: Options | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    vae_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    lora: Path | None = None,
    need_lora: bool = True,
    lora_alpha: float = 64.0,
    lora_rank: int = 128,
    prompt_store: Path | None = None,
    past_samples: int | None = None,
    lookahead_samples: int | None = None,
    places: Places | None = None,
    text_by_layer: bool = False,
) -> LiveAvatar:
    """The model in a folder of the original layouts, on one device.

    Args:
        directory: `Wan2.2-S2V-14B`, or the folder that holds it and `Live-Avatar` (`avatard fetch` makes the latter).
        dtype: of transformer, speech and text encoder; vae_dtype: of the VAE, the same without it.
        lora: the LoRA's file, where it lies elsewhere; need_lora: see `find_files`.
        prompt_store: where prompt embeddings are kept; ~/.cache/avatard/prompts without it.
        past_samples, lookahead_samples: of the speech window; `SpeechStream`'s own defaults without them.
        places: where parts live, if not all on the device; text_by_layer: the text encoder too comes piece by piece.
    Raises: WeightsError, ConfigMismatch, OptionError.
    """
    files = find_files(directory, lora, need_lora=need_lora)
    # Opened before the long load, though it is read for a new prompt only: a damaged file is found now.
    text_width = width_of(open_checkpoint(files.text), "token_embedding.weight", 1)
    window = {"past_samples": past_samples, "lookahead_samples": lookahead_samples}
    # The largest first: what the others need comes after its last temporary is gone.
    dit = load_dit(
        files.dit,
        files.config,
        files.lora,
        dtype=dtype,
        device=device,
        lora_alpha=lora_alpha,
        lora_rank=lora_rank,
        places=places,
    )
    vae = load_vae(files.vae, dtype=vae_dtype or dtype, device=device)
    model, normalised = load_speech_encoder(files.speech, dtype=dtype, device=device)
    wanted, found = (
        (dit.config.audio_dim, dit.config.audio_layers),
        (
            model.config.hidden_size,
            model.config.num_hidden_layers + 1,
        ),
    )
    if wanted != found:
        raise WeightsError(f"{files.speech}: {found[1]} states of {found[0]}, the transformer wants {wanted}")
    if text_width != dit.config.text_dim:
        raise WeightsError(f"{files.text}: width {text_width}, the transformer wants {dit.config.text_dim}")
    speech = SpeechStream(
        model, normalised=normalised, **{key: value for key, value in window.items() if value is not None}
    )
    store = prompt_store or Path.home() / ".cache" / "avatard" / "prompts"
    prompts = PromptEncoder(files.text, files.tokenizer, store, dtype=dtype, device=device, by_layer=text_by_layer)
    if places is not None:
        places.settle_rest(vae, model)
    return LiveAvatar(dit, vae, speech, prompts, options, device=device, places=places)


class GivenPrompt:
    """One embedding for all prompts, for models that have no text encoder."""

    def __init__(self, context: Tensor, weight_bytes: int = 0) -> None:
        self.context = context
        self._weight_bytes = weight_bytes

    def embed(self, prompt: str) -> Tensor:
        return self.context

    def weight_bytes(self) -> int:
        return self._weight_bytes


TEXT_ENCODER_PARAMETERS = 5_680_910_336


def random_live_avatar(
    options: Options | None = None,
    config: DiTConfig | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    seed: int = 0,
    vae_width: int = 96,
    speech_layers: int = 24,
    places: Places | None = None,
) -> LiveAvatar:
    """The model with random weights: its speed and its memory without a download; its pictures are noise.

    On the meta device it takes no memory and still knows its `parts`. Prompts are one random embedding,
    and the text encoder counts in `parts` with the bytes of the full size.
    """
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = config or DiTConfig()
    heads = max(1, config.audio_dim // 64)
    sound = Wav2Vec2Config(
        hidden_size=config.audio_dim,
        num_hidden_layers=speech_layers,
        num_attention_heads=heads,
        intermediate_size=4 * config.audio_dim,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
        conv_bias=True,
        mask_time_prob=0.0,
    )
    dit = build_dit(config)
    vae = build_vae(vae_width)
    with torch.device("meta"):
        speech = Wav2Vec2Model(sound).eval().requires_grad_(False)
    source, *others = (
        FromGenerator(module, seed=seed + number, dtype=dtype, device=device)
        for number, module in enumerate((dit, vae, speech))
    )
    if places is None:
        source.give()
    else:
        places.settle(dit, source)
    for other in others:
        other.give()
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(64, config.text_dim, generator=generator).to(dtype)
    decoder = WanVae(vae).to(device)
    if places is not None:
        places.settle_rest(decoder, speech)
    return LiveAvatar(
        dit,
        decoder,
        SpeechStream(speech),
        GivenPrompt(context, TEXT_ENCODER_PARAMETERS * dtype.itemsize),
        options,
        device=device,
        places=places,
    )
