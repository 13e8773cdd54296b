"""The embedded model as a model of the house: a picture and blocks of sound in, blocks of frames out.

One block is 12 frames, 480 ms, 3 latent frames. The networks run block by block as they were trained on whole
sequences (`avatar.pocket.train.sequence_velocity`): every step attends to the last blocks at its own noise level.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from audio import mel as spectra
from audio.chunk import AudioBlock
from audio.errors import AvatardError
from avatar.cache import Conditioning, KVCache
from avatar.live_avatar.dit import CausalDiT
from avatar.model import FrameBlock, Part, Reference, StreamSpec
from avatar.picture import cover
from avatar.pocket import ear as hearing
from avatar.pocket.ear import MEL_PER_FRAME, Ear, EarConfig
from avatar.pocket.motion import MotionState, init_motion, next_drive, speech_energy
from avatar.pocket.network import (
    FRAMES_PER_LATENT,
    LATENTS_PER_BLOCK,
    REFERENCE_DISTANCE,
    RING_BLOCKS,
    SHIFT,
    SIZE,
    TRAINED_STEPS,
    build_dit,
    conditions,
)
from avatar.pocket.vae import DecoderState, PocketVae, VaeConfig
from avatar.sampling import denoise_block, shifted_sigmas, step_modulations
from avatar.stateful import state_bytes

DEFAULT_STEPS = 1
FRAMES_PER_BLOCK = LATENTS_PER_BLOCK * FRAMES_PER_LATENT
LATENT_SIDE = SIZE // VaeConfig.pixels_per_latent

QUIET_ROOM = -4.6
"""log10 mel power of the least noise the ear was trained with; digital silence is brought up to it."""

PRIMING_BLOCKS = 2
"""Blocks of the still picture that the decoder sees first. Its temporal convolutions reach back five latent frames."""

META = torch.device("meta")

MOTION_SEED = 0x6D6F7469
"""Keeps the draws of the motion apart from those of the noise, which begin with the same seed."""


class PocketError(AvatardError):
    """An option of the embedded model, or its weights, that do not work; names which and why."""


class Precision(StrEnum):
    """What transformer and autoencoder compute in. The ear is always float32, the modulation too."""

    AUTO = "auto"
    """bf16 where the processor multiplies it (AVX512-BF16, AMX, or any accelerator), else fp32."""
    FP32 = "fp32"
    BF16 = "bf16"


@dataclass(frozen=True)
class Options:
    """What can be chosen.

    steps: of denoising, one of those trained; motion: how far the head moves, 1 as in training, 0 still; precision:
    see `Precision`, may be given by name.
    Raises: PocketError: a value that does not work.
    """

    steps: int = DEFAULT_STEPS
    motion: float = 1.0
    precision: Precision = Precision.AUTO

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps not in TRAINED_STEPS:
            *others, last = TRAINED_STEPS
            raise PocketError(f"steps: {self.steps}; pocket was trained for {', '.join(map(str, others))} or {last}")
        if isinstance(self.motion, bool) or not isinstance(self.motion, int | float) or not 0 <= self.motion <= 2:
            raise PocketError(f"motion: {self.motion}; must be a number from 0 to 2, 1 is as trained")
        try:
            object.__setattr__(self, "precision", Precision(self.precision))
        except ValueError as error:
            raise PocketError(f"precision: {self.precision}; there are {', '.join(Precision)}") from error

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Options:
        """Options by name, as settings files and the command line give them. Raises: PocketError."""
        names = [option.name for option in fields(cls)]
        for name in settings:
            if name not in names:
                close = difflib.get_close_matches(name, names, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"
                raise PocketError(f"{name}: no option of pocket; {hint}")
        return cls(**settings)


@dataclass
class Session:
    """All that one stream remembers.

    noise: the generator of start noise, on the CPU; caches: one for each step; decoder: the decoder's last steps;
    block: index of the next one, which is its position in latent frames and pictures too.
    """

    noise: torch.Generator
    motion: MotionState
    mel: spectra.MelState
    conditioning: Conditioning
    caches: list[KVCache]
    decoder: DecoderState = field(default_factory=dict)
    block: int = 0


@dataclass
class Networks:
    """The weights: transformer and autoencoder in the type they compute in, the ear in float32."""

    dit: CausalDiT
    vae: PocketVae
    ear: Ear

    @property
    def dtype(self) -> torch.dtype:
        return self.dit.dtype

    @property
    def device(self) -> torch.device:
        return self.dit.patch_embedding.weight.device


class PocketModel:
    """The family behind the four calls of `AvatarModel`.

    Sessions live where the transformer's weights are; random numbers, motion and mel are made on the CPU, so that a
    seed means the same everywhere.
    """

    def __init__(self, networks: Networks, options: Options | None = None) -> None:
        self.networks, self.options = networks, options or Options()
        self.levels = shifted_sigmas(self.options.steps, SHIFT)
        self.spec = StreamSpec(
            SIZE,
            SIZE,
            frames_per_block=FRAMES_PER_BLOCK,
            sample_rate=spectra.SAMPLE_RATE,
            lookahead_samples=spectra.lookahead_samples(EarConfig().ahead),
            half_rate=True,
        )
        with torch.no_grad():
            self.times = step_modulations(networks.dit, self.levels, networks.device)

    def parts(self) -> list[Part]:
        """What there is to place, in bytes; works on the meta device. A session's bytes are those of a running one."""
        networks = self.networks
        planned = PocketModel(build_networks(networks.dtype, META), self.options)
        latent = torch.empty(1, 1, *_latent_shape(), dtype=networks.dtype, device=planned.networks.device)
        with torch.no_grad():
            session = planned.begin(latent, seed=0)
            next_drive(session.motion, torch.zeros(1, FRAMES_PER_BLOCK))
        heard = (EarConfig().past * spectra.HOP + spectra.LEAD) * np.dtype(np.float32).itemsize
        vae = networks.vae
        # Both halves of the autoencoder read the statistics; they count once.
        statistics = vae.mean.nbytes + vae.std.nbytes
        return [
            Part("dit", _bytes(networks.dit), state_bytes([session.conditioning, session.caches]), self.options.steps),
            Part("vae.decoder", _bytes(vae.decoder) + statistics, state_bytes(session.decoder), 1),
            Part("vae.encoder", _bytes(vae.encoder), 0, 0),
            Part("ear", _bytes(networks.ear), heard + state_bytes(session.motion), 1),
        ]

    # The four calls. Not in inference mode: what is made there cannot be written to by `avatar.stateful.restore`.

    @torch.no_grad()
    def start(self, reference: Reference) -> Session:
        """A session: picture encoded, conditioning prefilled, decoder primed with the picture held still."""
        picture = torch.from_numpy(cover(reference.image, SIZE, SIZE)).to(self.networks.device)
        still = (picture.permute(2, 0, 1).float() / 127.5 - 1).to(self.networks.dtype)
        latent = self.networks.vae.encode(still.expand(1, FRAMES_PER_LATENT, -1, -1, -1))
        return self.begin(latent, reference.seed)

    def step(self, state: Session, audio: AudioBlock) -> list[FrameBlock]:
        """Advance `state` in place by one block of sound; its frames. An empty list for a block without sound."""
        return list(self._speak(state, audio, LATENTS_PER_BLOCK))

    def step_in_pieces(self, state: Session, audio: AudioBlock) -> Iterator[FrameBlock]:
        """As `step`, four frames at a time: the first after half the time of a block, all of them 5 % later."""
        return self._speak(state, audio, 1)

    def step_at_half_rate(self, state: Session, audio: AudioBlock) -> list[FrameBlock]:
        """As `step`, each second picture alone, and twice: three quarters of the time on a CPU without bfloat16."""
        return list(self._speak(state, audio, LATENTS_PER_BLOCK, every=2))

    @torch.no_grad()
    def _speak(self, state: Session, audio: AudioBlock, latents_at_once: int, every: int = 1) -> Iterator[FrameBlock]:
        start = FRAMES_PER_BLOCK * state.block
        sounds, samples = audio.samples[: audio.valid], self.spec.samples_per_frame
        latents = self.denoise(state, *self.listen(state, audio))
        for part in latents.split(latents_at_once, dim=1):
            frames = to_uint8(self.decode(state, part, every)).repeat(every, axis=0)
            sound, sounds = sounds[: len(frames) * samples], sounds[len(frames) * samples :]
            if shown := math.ceil(len(sound) / samples):
                yield FrameBlock(frames[:shown], sound, start)
            start += len(frames)

    def finish(self, state: Session) -> list[FrameBlock]:
        """Nothing is in flight: steps run in sequence."""
        return []

    # The parts of `start` and `step`, in their order.

    def begin(self, latent: Tensor, seed: int) -> Session:
        """A session from the reference's latent, [1, 1, 32, 16, 16]."""
        dit = self.networks.dit
        conditioning = dit.prefill(latent.transpose(1, 2), None, [])
        ring = RING_BLOCKS * LATENTS_PER_BLOCK
        session = Session(
            noise=torch.Generator().manual_seed(seed),
            motion=init_motion(seed ^ MOTION_SEED, float(self.options.motion)),
            mel=spectra.init_state(),
            conditioning=conditioning,
            caches=[dit.new_cache(conditioning, ring) for _ in range(self.options.steps)],
        )
        still = latent.expand(-1, LATENTS_PER_BLOCK, -1, -1, -1)
        for _ in range(PRIMING_BLOCKS):
            self.networks.vae.decode(still, session.decoder)
        return session

    def listen(self, state: Session, audio: AudioBlock) -> tuple[Tensor, Tensor]:
        """What the transformer is told of the next block (see `conditions`); advances mel and motion of `state`."""
        ear = EarConfig()
        mel = spectra.block_mel(audio, state.mel, ear.past, ear.ahead)[None]
        own = mel[:, ear.past : ear.past + FRAMES_PER_BLOCK * MEL_PER_FRAME]
        drive = next_drive(state.motion, speech_energy(own))
        device = self.networks.device
        features, mouth = self.networks.ear(hearing.normalise(in_quiet_room(mel)).to(device))
        return conditions(features, mouth, drive.to(device), LATENT_SIDE)

    def denoise(self, state: Session, heard: Tensor, pose: Tensor) -> Tensor:
        """Latents [1, 3, 32, 16, 16] of the next block, float32; advances noise, caches and position of `state`."""
        dit = self.networks.dit
        channels, *sides = _latent_shape()
        noise = torch.randn(1, channels, LATENTS_PER_BLOCK, *sides, generator=state.noise)
        f0 = LATENTS_PER_BLOCK * state.block
        latents = denoise_block(
            dit,
            noise.to(self.networks.device),
            state.conditioning,
            state.caches,
            self.levels,
            self.times,
            [],
            dit.prepare_audio(dit.encode_audio(heard)),
            f0,
            self.reference_positions(f0, state.noise),
            pose=pose,
        )
        state.block += 1
        return latents.transpose(1, 2)

    def reference_positions(self, f0: int, generator: torch.Generator) -> list[int]:
        """Where each step of the block at latent frame f0 sees the reference; `generator` stays as it is."""
        return REFERENCE_DISTANCE.positions(f0, self.options.steps, generator)

    def decode(self, state: Session, latents: Tensor, every: int = 1) -> Tensor:
        """Frames [1, 4 T / every, 3, 256, 256] in about -1..1 of T latents; advances the decoder of `state`."""
        return self.networks.vae.decode(latents.to(self.networks.dtype), state.decoder, every)


def in_quiet_room(mel: Tensor) -> Tensor:
    """log10 mel with the noise of a quiet room added: the ear has never heard digital silence."""
    return torch.log10(10**mel + 10**QUIET_ROOM)


def to_uint8(frames: Tensor) -> NDArray[np.uint8]:
    """[1, F, 3, H, W] in about -1..1 to uint8 [F, H, W, 3]."""
    levels = (frames[0].float() + 1).mul_(127.5).round_().clamp_(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _latent_shape() -> tuple[int, int, int]:
    return VaeConfig().channels, LATENT_SIDE, LATENT_SIDE


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


# ---------------------------------------------------------------------------------------------------------------------
# the ready model


def build_networks(dtype: torch.dtype, device: torch.device | None = None) -> Networks:
    """The networks without weights to speak of; on the meta device they take no memory."""
    # what modules draw when they are made must not move the caller's random numbers
    with torch.random.fork_rng(devices=[]), device or nullcontext():
        networks = Networks(build_dit().to(dtype), PocketVae().to(dtype), Ear())
    for module in (networks.dit, networks.vae, networks.ear):
        module.eval().requires_grad_(False)
    return networks


def shipped_weights() -> Path:
    """The folder of weights that comes with the package."""
    return Path(str(resources.files("avatar.pocket").joinpath("weights")))


def load_networks(folder: Path, dtype: torch.dtype, device: torch.device | None = None) -> Networks:
    """Networks from `dit`, `vae` and `ear` (.safetensors) in a folder.

    Raises: PocketError: a file is missing, damaged, or of another network.
    """
    # on the CPU: the first thing made on the meta device costs a process a second of imports
    networks = build_networks(torch.float32)
    for name, module, wanted in (
        ("dit", networks.dit, dtype),
        ("vae", networks.vae, dtype),
        ("ear", networks.ear, torch.float32),
    ):
        path = folder / f"{name}.safetensors"
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise PocketError(
                f"{path}: cannot be read ({error}); install the package or copy the file again"
            ) from error
        typed = {key: value.to(device, wanted) for key, value in weights.items()}
        try:
            module.load_state_dict(typed, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise PocketError(f"{path}: is not the pocket {name} of this version ({reason[:200]})") from error
        module.requires_grad_(False)
    networks.vae.to(memory_format=torch.channels_last)
    return networks


def choose_dtype(precision: Precision, device: torch.device | None = None) -> torch.dtype:
    """The type that a precision means on this device; None is the CPU."""
    if precision is Precision.AUTO:
        on_cpu = device is None or device.type == torch.empty(0).device.type
        return torch.bfloat16 if not on_cpu or _multiplies_bf16() else torch.float32
    return torch.float32 if precision is Precision.FP32 else torch.bfloat16


def _multiplies_bf16() -> bool:
    """Whether this processor has instructions for it; without them bf16 is slower than float32."""
    # private names: where a version of torch has none of them, float32 is always right
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def load_pocket(
    folder: Path | None = None, options: Options | None = None, device: torch.device | None = None
) -> PocketModel:
    """The embedded model, ready to stream.

    Args:
        folder: of the weights; those of the package without it.
    Raises: PocketError.
    """
    options = options or Options()
    networks = load_networks(folder or shipped_weights(), choose_dtype(options.precision, device), device)
    return PocketModel(networks, options)
