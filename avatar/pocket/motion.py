"""How a drawn presenter moves besides the mouth: head, gaze, brows, blinks. One generator, for training and on air.

The motion is smooth noise plus a little of the speech's energy plus blinks at random times. The network is given these
numbers (the drive), since head motion cannot be told from sound; at run time they come from here, seeded per session.

The stream is made frame by frame from white noise filtered with a finite Gaussian kernel, so a session that is cut
into blocks of any length moves exactly like one made in a single piece.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DRIVE = ("tx", "ty", "zoom", "roll", "yaw", "pitch", "bob", "blink", "brow", "gaze_x", "gaze_y")
"""The numbers of the drive, in their order."""

DRIVE_SCALE = (0.016, 0.012, 0.010, 0.030, 0.42, 0.36, 0.006, 0.5, 0.5, 0.5, 0.4)
"""One over the gain that brings each number near unit variance for the network."""

_SLOW, _FAST, _GAZE = 22.0, 11.0, 9.0
"""Time constants of the noises, in frames of 40 ms (standard deviation of the Gaussian kernel)."""
_CHANNELS = ((_SLOW, 4), (_FAST, 6), (_GAZE, 2))
_REACH = 66
"""Half length of the longest kernel, frames."""
_BLINK = (0.25, 0.75, 1.0, 1.0, 0.7, 0.35, 0.1)
"""How far the lids are closed in the seven frames of a blink."""
_BLINK_RATE = 1 / 75
"""Blinks per frame: twenty a minute."""
_ENERGY_DECAY = 9.0
"""Frames over which the motion remembers how loud the speech was."""

NOISE_CHANNELS = sum(n for _, n in _CHANNELS)


def _kernels() -> Tensor:
    """[NOISE_CHANNELS, 1, 2 * _REACH + 1] Gaussians of unit energy, so that filtered white noise has unit variance."""
    t = torch.arange(-_REACH, _REACH + 1, dtype=torch.float32)
    rows = []
    for tau, count in _CHANNELS:
        k = torch.exp(-0.5 * (t / tau) ** 2)
        rows += [k / k.square().sum().sqrt()] * count
    return torch.stack(rows)[:, None]


def speech_energy(mel: Tensor) -> Tensor:
    """How loud speech is, 0..1, from log10 mel [..., T, 80] at 100 Hz to [..., T / 4] at 25 frames a second."""
    level = torch.logsumexp(mel * math.log(10.0), -1) / math.log(10.0) - math.log10(mel.shape[-1])
    loud = ((level + 2.6) / 2.6).clamp(0.0, 1.0)
    return loud.unflatten(-1, (-1, 4)).mean(-1)


def compose(
    smooth: Tensor, blink: Tensor, energy: Tensor, phase: Tensor, first_frame: int, amplitude: Tensor
) -> Tensor:
    """Put the drive together.

    Args:
        smooth: [B, 12, T] unit-variance noise; blink: [B, T] in 0..1; energy: [B, T] in 0..1, smoothed.
        phase: [B] of the breathing, radians; first_frame: index of the first frame; amplitude: [B, 1].
    Returns: [B, T, 11] in picture units (half the picture's side for shifts, radians for roll), in the order of DRIVE.
    """
    slow, fast, gaze = smooth[:, 0:4], smooth[:, 4:10], smooth[:, 10:12] * 0.5
    lift = energy - 0.4
    frames = first_frame + torch.arange(energy.shape[-1], device=energy.device, dtype=torch.float64)
    breath = torch.sin((frames[None] * 0.075 + phase[:, None].double()) % (2 * math.pi)).to(energy.dtype)
    yaw = amplitude * 0.42 * fast[:, 3]
    pitch = amplitude * 0.34 * fast[:, 4] + 0.25 * lift
    return torch.stack(
        [
            amplitude * (0.016 * slow[:, 0] + 0.004 * fast[:, 0]),
            amplitude * (0.010 * slow[:, 1] + 0.004 * fast[:, 1]) + 0.012 * lift,
            amplitude * 0.010 * slow[:, 2],
            amplitude * (0.028 * slow[:, 3] + 0.010 * fast[:, 2]),
            yaw,
            pitch,
            0.006 * breath,
            blink,
            (0.35 * fast[:, 5] + 0.7 * lift).clamp(-0.7, 1.2),
            (gaze[:, 0] - 0.5 * yaw).clamp(-1.0, 1.0),
            (0.5 * gaze[:, 1] - 0.3 * pitch).clamp(-1.0, 1.0),
        ],
        dim=-1,
    )


def scaled(drive: Tensor) -> Tensor:
    """The drive [..., 11] as the network takes it, each number near unit variance."""
    return drive / torch.tensor(DRIVE_SCALE, device=drive.device, dtype=drive.dtype)


def smooth_energy(energy: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Remember loudness for a while: y[t] = a y[t - 1] + (1 - a) energy[t].

    Args: energy [B, T]; before [B], the last y. Returns: y [B, T] and its last column.
    """
    a = math.exp(-1.0 / _ENERGY_DECAY)
    steps = energy.shape[-1]
    powers = a ** torch.arange(steps + 1, device=energy.device, dtype=energy.dtype)
    lag = torch.arange(steps, device=energy.device)
    lag = lag[:, None] - lag[None]
    weights = torch.where(lag >= 0, powers[lag.clamp_min(0)], torch.zeros((), device=energy.device, dtype=energy.dtype))
    y = (1 - a) * energy @ weights.T + before[:, None] * powers[1:]
    return y, y[:, -1]


@dataclass
class MotionState:
    """One session's motion: the random generator, the white noise still needed, blinks under way, and the position."""

    rng: torch.Generator
    noise: Tensor
    """[1, 12, 2 * _REACH]: the white noise around the last frame made."""
    events: Tensor
    """[1, 6]: blink starts in the last six frames."""
    phase: Tensor
    amplitude: Tensor
    energy: Tensor
    frame: int = 0


def init_motion(seed: int, amplitude: float = 1.0) -> MotionState:
    """The motion of one session; the same seed moves the same way."""
    rng = torch.Generator().manual_seed(seed)
    return MotionState(
        rng=rng,
        noise=torch.randn(1, 2 * _REACH, NOISE_CHANNELS, generator=rng).mT.contiguous(),
        events=torch.zeros(1, len(_BLINK) - 1),
        phase=torch.rand(1, generator=rng) * 2 * math.pi,
        amplitude=torch.full((1, 1), amplitude),
        energy=torch.full((1,), 0.3),
    )


def next_drive(state: MotionState, energy: Tensor) -> Tensor:
    """The drive of the next frames.

    Args:
        state: advanced in place by T frames.
        energy: [1, T] loudness of the speech, 0..1.
    Returns: [1, T, 11] in the order of DRIVE, picture units.
    """
    steps = energy.shape[-1]
    # one draw for each frame: a single larger draw would give other numbers for another block length
    fresh = torch.stack([torch.randn(1, NOISE_CHANNELS + 1, generator=state.rng) for _ in range(steps)], dim=1)
    noise = torch.cat([state.noise, fresh[..., :NOISE_CHANNELS].mT], dim=-1)
    smooth = torch.nn.functional.conv1d(noise, _kernels(), groups=NOISE_CHANNELS)
    # a normal deviate over this threshold happens at the wanted rate
    threshold = math.sqrt(2.0) * torch.erfinv(torch.tensor(1 - 2 * _BLINK_RATE)).item()
    events = torch.cat([state.events, (fresh[..., NOISE_CHANNELS] > threshold).float()], dim=-1)
    loud, state.energy = smooth_energy(energy, state.energy)
    drive = compose(smooth, blink_curve(events), loud, state.phase, state.frame, state.amplitude)
    state.noise = noise[..., steps:].contiguous()
    state.events = events[:, steps:].contiguous()
    state.frame += steps
    return drive


def blink_curve(events: Tensor) -> Tensor:
    """Blink starts [B, T + 6] (0 or 1) to how far the lids are closed [B, T], 0..1."""
    shape = torch.tensor(_BLINK, device=events.device).flip(0)[None, None]
    return torch.nn.functional.conv1d(events[:, None], shape)[:, 0].clamp(0.0, 1.0)


def sample_drive(energy: Tensor, amplitude: Tensor, generator: torch.Generator) -> Tensor:
    """Many clips of motion at once, for training: energy [B, T] (not smoothed), amplitude [B, 1] -> [B, T, 11]."""
    batch, steps = energy.shape
    where = energy.device
    noise = torch.randn(batch, NOISE_CHANNELS, steps + 2 * _REACH, generator=generator, device=where)
    smooth = torch.nn.functional.conv1d(noise, _kernels().to(where), groups=NOISE_CHANNELS)
    events = (torch.rand(batch, steps + len(_BLINK) - 1, generator=generator, device=where) < _BLINK_RATE).float()
    loud, _ = smooth_energy(energy, torch.full((batch,), 0.3, device=where))
    phase = torch.rand(batch, generator=generator, device=where) * 2 * math.pi
    return compose(smooth, blink_curve(events), loud, phase, 0, amplitude)
