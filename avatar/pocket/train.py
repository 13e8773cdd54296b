"""Train the embedded model: `python -m avatar.pocket.train --data DIR --out DIR --stage NAME --seconds N`.

Stages, in order: vae, ear, meter, reader, dit, seams, polish. Each takes a budget of seconds on one GPU, saves a
checkpoint every minute and at its end, and goes on from it when run again, so that a run may be cut anywhere. All data
is drawn on the fly.

vae     pictures to latents and back: weighted Charbonnier, gradients, frame differences, a little KL, noisy latents.
ear     log-mel to the mouth's four numbers.
meter   pictures to what is in them; the instrument of `avatard bench quality`.
reader  latents to what moves in them; a part of the next stage's loss, and never an instrument.
dit     flow matching on whole sequences, each at one noise level, with the attention window that the rings hold when
        streaming; from part of the time on, half of the batches start from what the model itself made of noise. What
        the reader sees in the clean latents is to move as it does in the drawn ones, above all where a latent begins.
seams   the decoder again, on longer windows and on the transformer's latents too, so that pictures do not jump where a
        latent begins; the latents stay what they are.
polish  the last step of the sampler and the decoder together, against the drawn pixels.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from avatar.attention import attention, rotate_pairs
from avatar.live_avatar.audio_encoder import AudioTokens
from avatar.live_avatar.dit import CausalDiT
from avatar.pocket import ear as hearing
from avatar.pocket.ear import MEL_PER_FRAME, Ear, EarConfig
from avatar.pocket.generator import Precision, choose_dtype
from avatar.pocket.meter import MOVES, Meter, truth
from avatar.pocket.motion import sample_drive, speech_energy
from avatar.pocket.muon import Muon, is_matrix
from avatar.pocket.network import (
    FRAMES_PER_LATENT,
    LATENTS_PER_BLOCK,
    REFERENCE_DISTANCE,
    RING_BLOCKS,
    build_dit,
    conditions,
)
from avatar.pocket.reader import Reader
from avatar.pocket.vae import PocketVae, VaeConfig
from avatar.pocket.world import (
    SIZE,
    Motion,
    Person,
    as_frames,
    as_motion,
    detail_weight,
    draw,
    reference_motion,
    sample_person,
)
from avatar.sampling import TRAIN_TIMESTEPS, reference_position

log = logging.getLogger("avatar.pocket.train")

SAVE_EVERY_S = 60.0


# --------------------------------------------------------------------------- data


class SpeechClips:
    """Speech with its mouth, quantised to bytes, kept on the device; clips of it, stretched and disturbed."""

    def __init__(self, path: Path, where: torch.device) -> None:
        stored = np.load(path)
        self.arrays = {}
        self.ranges = {}
        for name in ("mel", "mouth"):
            self.arrays[name] = torch.from_numpy(stored[name]).to(where)
            self.ranges[name] = tuple(float(v) for v in stored[f"{name}_range"])
        self.frames = len(self.arrays["mel"])
        self.where = where

    def at(self, name: str, position: Tensor) -> Tensor:
        """The array at fractional frames, linearly between neighbours, in real units."""
        array, (low, high) = self.arrays[name], self.ranges[name]
        position = position.clamp(0, self.frames - 1.001)
        index = position.long()
        between = (position - index)[..., None]
        a, b = array[index].float(), array[(index + 1).clamp_max(self.frames - 1)].float()
        return (a + (b - a) * between) / 255 * (high - low) + low

    def sample(self, count: int, frames: int, ear: EarConfig, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random clips at 0.85 to 1.2 of their speed, one in seventeen silent.

        Returns: log10 mel [count, past + 4 frames + ahead, 80] and mouth [count, frames, 4].
        """
        speed = 0.85 + 0.35 * torch.rand(count, 1, generator=g, device=self.where)
        room = self.frames - (frames * MEL_PER_FRAME + ear.past + ear.ahead) * 1.25 - 600
        start = 300 + torch.rand(count, 1, generator=g, device=self.where) * room
        ticks = torch.arange(-ear.past, frames * MEL_PER_FRAME + ear.ahead, device=self.where)
        mel = self.at("mel", start + ticks[None] * speed)
        middle = torch.arange(frames, device=self.where) * MEL_PER_FRAME + 1.5
        mouth = self.at("mouth", start + middle[None] * speed)
        silent = torch.rand(count, 1, 1, generator=g, device=self.where) < 0.06
        return torch.where(silent, torch.full_like(mel, -5.0), mel), mouth * ~silent


def disturb(mel: Tensor, g: torch.Generator) -> Tensor:
    """Another throat, level, microphone and room: warped, tilted and noisy log10 mel of the same shape."""
    batch, _, bins = mel.shape
    where = mel.device

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(batch, generator=g, device=where))[:, None, None]

    def tilt(amount: float) -> Tensor:
        return torch.cumsum(torch.randn(batch, 1, bins, generator=g, device=where) * amount, 2)

    position = (torch.arange(bins, device=where)[None] * uniform(0.88, 1.14)[:, 0]).clamp(0, bins - 1.001)
    index = position.long()
    between = (position - index)[:, None]
    index = index[:, None].expand(-1, mel.shape[1], -1)
    mel = mel.gather(2, index) * (1 - between) + mel.gather(2, index + 1) * between
    mel = mel + uniform(-0.8, 0.5) + tilt(0.03)
    quiet = torch.rand(batch, 1, 1, generator=g, device=where) < 0.5
    floor = torch.where(quiet, uniform(-6.0, -4.6), uniform(-4.6, -2.6))
    noise = floor + 0.2 * torch.randn(mel.shape, generator=g, device=where) + tilt(0.04)
    return torch.log10(10**mel + 10**noise).clamp_min(-5)


@dataclass
class Clips:
    """B clips of V frames: who, how they move, what is heard."""

    person: Person
    motion: Motion
    drive: Tensor
    mouth: Tensor
    mel: Tensor

    def __getitem__(self, span: slice) -> Clips:
        return Clips(
            {k: v[span] for k, v in self.person.items()},
            {k: v[span] for k, v in self.motion.items()},
            self.drive[span],
            self.mouth[span],
            self.mel[span],
        )


def make_clips(
    speech: SpeechClips, count: int, frames: int, g: torch.Generator, calm: float = 0.5, wild: float = 1.4
) -> Clips:
    """Draw new clips; head motion between `calm` and `wild` of the usual."""
    ear = EarConfig()
    mel, mouth = speech.sample(count, frames, ear, g)
    energy = speech_energy(mel[:, ear.past : ear.past + frames * MEL_PER_FRAME])
    amplitude = calm + (wild - calm) * torch.rand(count, 1, generator=g, device=mel.device)
    drive = sample_drive(energy, amplitude, g)
    return Clips(sample_person(count, g), as_motion(drive, mouth), drive, mouth, mel)


def in_batches(make: Callable[[], Clips], size: int) -> Iterator[Clips]:
    """Endless batches of `size` out of larger draws: few big kernels instead of many small ones."""
    while True:
        many = make()
        for i in range(0, len(many.drive), size):
            yield many[slice(i, i + size)]


class Painter:
    """`draw`, compiled for one number of frames where that pays (on a GPU)."""

    def __init__(self, frames: int, where: torch.device) -> None:
        self.frames = frames
        self.fast = torch.compile(draw, dynamic=False) if where.type == "cuda" else draw

    def __call__(self, clips: Clips) -> Tensor:
        """[B, V, 3, S, S] in 0..1."""
        person, motion = as_frames(clips.person, clips.motion)
        motion = {k: v.contiguous() for k, v in motion.items()}
        batch, frames = clips.drive.shape[:2]
        paint = self.fast if batch * frames == self.frames else draw
        return paint(person, motion).unflatten(0, (batch, frames))


def weights_of(clips: Clips, size: int) -> Tensor:
    """[B, V, 1, size, size]: where detail matters."""
    person, motion = as_frames(clips.person, clips.motion)
    return detail_weight(person, motion, size).unflatten(0, clips.drive.shape[:2])


def references(clips: Clips, g: torch.Generator) -> Tensor:
    """One reference picture for each clip, [B, 3, S, S] in 0..1, in a pose of its own."""
    person, motion = as_frames(clips.person, reference_motion(len(clips.drive), g))
    return draw(person, motion)


# --------------------------------------------------------------------------- the loop all stages share


class Ema:
    """A slow copy of a module's weights."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.updates = module, decay, 0
        self.slow = {k: v.detach().clone().float() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        now = self.module.state_dict()
        names = [k for k in self.slow if self.slow[k].is_floating_point()]
        torch._foreach_lerp_([self.slow[k] for k in names], [now[k].float() for k in names], 1 - decay)


class Run:
    """One stage's clock, log, checkpoint and divergence guard.

    `modules` are trained; a checkpoint holds their weights, their slow copies, the optimiser's momenta and the seconds
    spent. When the loss stops being finite or grows past 2.5 times its best, weights of some hundred steps ago are put
    back and the rate is halved; after five times the run ends, since it will not get better.
    """

    def __init__(self, name: str, shop: Workshop, modules: dict[str, nn.Module], optimiser: Muon, decay: float) -> None:
        self.name, self.out, self.seconds = name, shop.out, shop.seconds
        self.modules, self.optimiser = modules, optimiser
        self.emas = {k: Ema(m, decay) for k, m in modules.items()}
        self.spent, self.step, self.rate = 0.0, 0, 1.0
        self.stop_at = shop.stop_at
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.good: deque[dict[str, dict[str, Tensor]]] = deque(maxlen=6)
        self.best, self.smooth, self.falls = math.inf, 0.0, 0
        self.path = self.out / f"{name}.checkpoint.safetensors"
        self._resume()

    def _tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for key, module in self.modules.items():
            found |= {f"now/{key}/{n}": v.float() for n, v in module.state_dict().items()}
            found |= {f"slow/{key}/{n}": v for n, v in self.emas[key].slow.items()}
            for n, p in module.named_parameters():
                found |= {f"momentum/{key}/{n}/{b}": v for b, v in self.optimiser.state.get(p, {}).items()}
        return {k: v.detach().contiguous() for k, v in found.items()}

    def _resume(self) -> None:
        if not self.path.exists():
            return
        stored = load_file(self.path)
        facts = json.loads(self.path.with_suffix(".json").read_text())
        self.spent, self.step, self.rate = facts["spent"], facts["step"], facts["rate"]
        self.optimiser.steps = self.step
        for key, module in self.modules.items():
            own = module.state_dict()
            module.load_state_dict({n: stored[f"now/{key}/{n}"].to(v) for n, v in own.items()})
            self.emas[key].slow = {n: stored[f"slow/{key}/{n}"].to(v.device) for n, v in own.items()}
            self.emas[key].updates = self.step
            for n, p in module.named_parameters():
                for b in ("mean", "square"):
                    if (found := stored.get(f"momentum/{key}/{n}/{b}")) is not None:
                        self.optimiser.state[p][b] = found.to(p)
        log.info("%s: goes on at step %d, %.0f s of %.0f s spent", self.name, self.step, self.spent, self.seconds)

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        part = self.path.with_suffix(".part")
        save_file(self._tensors(), part)
        part.replace(self.path)
        facts = {"spent": self.spent, "step": self.step, "rate": self.rate}
        self.path.with_suffix(".json").write_text(json.dumps(facts))
        for key in self.modules:
            store(self.emas[key].slow, self.out / f"{key}.safetensors")

    def steps(self, warm_up: int, decay_from: float) -> Iterator[float]:
        """Yield the fraction of the time spent, with the learning rate set, until the budget is spent."""
        last_save = last_log = started = time.monotonic()
        before = self.spent
        first = self.step
        while self.spent < self.seconds:
            done = self.spent / self.seconds
            ramp = min(1.0, (self.step + 1) / warm_up)
            self.optimiser.schedule(self.rate * ramp * min(1.0, (1 - done) / (1 - decay_from) + 0.003))
            yield done
            self.step += 1
            now = time.monotonic()
            self.spent = before + now - started
            if now - last_log > 20:
                last_log = now
                each = (now - started) / (self.step - first)
                figures = {k: round(float(v) / self.counts[k], 4) for k, v in sorted(self.sums.items())}
                log.info("%s %d %3.0f%% %.1f steps/s %s", self.name, self.step, 100 * done, 1 / each, figures)
                self.sums, self.counts = {}, {}
            if now - last_save > SAVE_EVERY_S:
                last_save = now
                self.save()
            if now > self.stop_at:
                self.save()
                raise SystemExit(f"{self.name}: {self.spent:.0f} s of {self.seconds:.0f} s spent; run again to go on")
        self.save()

    def update(self, total: Tensor, /, clip: float = 1.0, **figures: Tensor) -> None:
        """Backward, clip, step, follow; remember figures for the log."""
        total.backward()
        parameters = [p for m in self.modules.values() for p in m.parameters() if p.requires_grad]
        nn.utils.clip_grad_norm_(parameters, clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        for ema in self.emas.values():
            ema.update()
        for key, value in figures.items():
            self.sums[key] = self.sums.get(key, 0.0) + value.detach()
            self.counts[key] = self.counts.get(key, 0) + 1

    def guard(self, total: Tensor) -> None:
        """Call every 50 steps with a comparable loss, after `update`: goes back after a divergence."""
        value = float(total.detach())
        self.smooth = value if not self.smooth else 0.7 * self.smooth + 0.3 * value
        if math.isfinite(value) and (self.step < 300 or self.smooth < 2.5 * self.best):
            self.best = min(self.best, self.smooth)
            self.good.append({k: {n: v.clone() for n, v in m.state_dict().items()} for k, m in self.modules.items()})
            return
        self.falls += 1
        log.warning("%s: diverged at step %d (loss %.3g); going back, rate halved", self.name, self.step, value)
        if self.falls == 5 or not self.good:
            raise RuntimeError(f"{self.name}: diverged {self.falls} times")
        for key, module in self.modules.items():
            module.load_state_dict(self.good[0][key])
        self.optimiser.forget()
        self.rate *= 0.5
        self.smooth = 0.0

    def finish(self) -> None:
        """Put the slow weights in place; `save` has written them as the stage's result."""
        for key, module in self.modules.items():
            own = module.state_dict()
            module.load_state_dict({n: self.emas[key].slow[n].to(v) for n, v in own.items()})
            module.eval()


def store(weights: dict[str, Tensor], path: Path) -> None:
    """Weights as they are shipped: bf16, safetensors."""
    tensors = {
        k: v.detach().to("cpu", torch.bfloat16 if v.is_floating_point() else v.dtype).contiguous()
        for k, v in weights.items()
    }
    save_file(tensors, path)


def lay_mean(path: Path, *others: Path) -> None:
    """Put the mean of the weights in all these files into the first: runs from one beginning err differently."""
    runs = [load_file(each) for each in (path, *others)]
    store({name: torch.stack([run[name].float() for run in runs]).mean(0) for name in runs[0]}, path)


def recall(module: nn.Module, path: Path) -> nn.Module:
    """A stage's result into a module, in fp32, ready to use."""
    module.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return module.eval()


def psnr(error: Tensor) -> Tensor:
    """Mean squared errors of pictures in -1..1 to decibels."""
    return 10 * torch.log10(4 / error)


def charbonnier(x: Tensor) -> Tensor:
    return torch.sqrt(x * x + 1e-5)


def picture_loss(made: Tensor, wanted: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """made, wanted: [B, V, 3, S, S] in -1..1; weight: [B, V, 1, s, s]. Returns the loss and the plain squared error."""
    error = (made - wanted).flatten(0, 1)
    coarse = weight.flatten(0, 1)
    fine = F.interpolate(coarse, size=error.shape[-1], mode="bilinear")
    sharp = charbonnier(error[..., 1:] - error[..., :-1]).mean()
    sharp = sharp + charbonnier(error[..., 1:, :] - error[..., :-1, :]).mean()
    level = (charbonnier(F.avg_pool2d(error, error.shape[-1] // coarse.shape[-1])) * coarse).mean()
    loss = (charbonnier(error) * fine).mean() + 0.5 * sharp + 0.5 * level
    return loss, error.square().mean()


def wrong_changes(made: Tensor, wanted: Tensor) -> Tensor:
    """How far the changes from frame to frame are from those wanted: [B, V, ...] to [B, V - 1, ...]."""
    error = made - wanted
    return error[:, 1:] - error[:, :-1]


# --------------------------------------------------------------------------- stages


@dataclass
class Workshop:
    """What every stage is given."""

    data: Path
    out: Path
    seconds: float
    where: torch.device
    stop_at: float = math.inf
    """On time.monotonic(): save and leave the stage for another run."""
    further: bool = False
    """Start from the stage's result in `out`, not from nothing."""
    seed: int = 0
    """Runs with other seeds see other people and other noise."""

    def rng(self, seed: int) -> torch.Generator:
        return torch.Generator(device=self.where).manual_seed(seed + 1_000 * self.seed)

    def half(self) -> torch.autocast:
        pays = choose_dtype(Precision.AUTO, self.where) is torch.bfloat16
        return torch.autocast(self.where.type, dtype=torch.bfloat16, enabled=pays)

    def speech(self, which: str = "train") -> SpeechClips:
        return SpeechClips(self.data / f"speech_{which}.npz", self.where)

    def compiled(self, f: Callable) -> Callable:
        return torch.compile(f, dynamic=False) if self.where.type == "cuda" else f

    def vae(self) -> PocketVae:
        vae = recall(PocketVae(), self.out / "vae.safetensors").to(self.where)
        return vae.to(memory_format=torch.channels_last).requires_grad_(False)


FLICKER = 0.25
"""What a wrong change from one frame to the next counts, beside a wrong picture."""


def border_ratio(pictures: Tensor) -> float:
    """Mean change of decoded pictures [B, V, 3, S, S] where a latent begins over that inside latents.

    Of the second half alone: there the decoder remembers as much as it does on air.
    """
    half = pictures.shape[1] // (2 * FRAMES_PER_LATENT) * FRAMES_PER_LATENT
    change = (pictures[:, half + 1 :] - pictures[:, half:-1]).abs().mean((0, 2, 3, 4))
    border = torch.arange(len(change), device=change.device) % FRAMES_PER_LATENT == FRAMES_PER_LATENT - 1
    return float(change[border].mean() / change[~border].mean())


def train_vae(shop: Workshop, batch: int = 10, frames: int = 12, unseen: int = 128) -> None:
    torch.manual_seed(1)
    g = shop.rng(1)
    speech = shop.speech()
    vae = PocketVae().to(shop.where).to(memory_format=torch.channels_last)
    run = Run(
        "vae",
        shop,
        {"vae": vae},
        Muon(vae.parameters(), lr=0.01, adam_lr=1e-3, weight_decay=0.1),
        0.998,
    )
    paint = Painter(batch * frames, shop.where)
    feed = in_batches(lambda: make_clips(speech, batch * 24, frames, g), batch)
    # not compiled: torch 2.11's compiled backward of this network gave gradients ten thousand times too large
    encode, decode = vae.encoder, vae.decoder
    for _ in run.steps(warm_up=300, decay_from=0.4):
        with torch.no_grad():
            clips = next(feed)
            wanted = paint(clips) * 2 - 1
            weight = weights_of(clips, 64)
        with shop.half():
            mean, log_variance = encode(wanted)
            mean, log_variance = mean.float(), log_variance.float()
            latents = mean + torch.exp(0.5 * log_variance) * torch.randn(mean.shape, device=g.device, generator=g)
            # a sampler's latents are never exact: the decoder learns to forgive up to a tenth of their spread
            spread = 0.1 * torch.rand(batch, 1, 1, 1, 1, device=g.device, generator=g) * mean.detach().std()
            latents = latents + spread * torch.randn(mean.shape, device=g.device, generator=g)
            made = decode(latents).float()
            kl = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).mean()
            loss, error = picture_loss(made, wanted, weight)
            loss = loss + FLICKER * charbonnier(wrong_changes(made, wanted)).mean()
        total = loss + 2e-5 * kl
        run.update(total, psnr=psnr(error.detach()), loss=loss, kl=kl)
        if run.step % 50 == 0:
            run.guard(total)
    run.finish()
    with torch.no_grad(), shop.half():
        means, whole, face = [], [], []
        for i in range(unseen // 16):
            clips = make_clips(speech, 16, 16, shop.rng(9000 + i))
            wanted = paint(clips) * 2 - 1
            mean = vae.encoder(wanted)[0].float()
            means.append(mean.transpose(2, 4).flatten(0, 3))
            error = (vae.decoder(mean).float().clamp(-1, 1) - wanted).square()
            close = (F.interpolate(weights_of(clips, 64).flatten(0, 1), size=SIZE) > 3).float().unflatten(0, (16, 16))
            whole.append(psnr(error.mean((1, 2, 3, 4))))
            face.append(psnr((error * close).sum((1, 2, 3, 4)) / (3 * close.sum((1, 2, 3, 4)))))
        flat = torch.cat(means)
        vae.mean.copy_(flat.mean(0)[:, None, None])
        vae.std.copy_(flat.std(0)[:, None, None])
    store(vae.state_dict(), shop.out / "vae.safetensors")
    log.info(
        "vae: PSNR of unseen presenters %.2f dB, mouth and eyes %.2f dB",
        torch.cat(whole).mean(),
        torch.cat(face).mean(),
    )


def train_ear(shop: Workshop, batch: int = 384, frames: int = 24) -> None:
    torch.manual_seed(2)
    g = shop.rng(2)
    speech = shop.speech()
    ear = Ear().to(shop.where)
    run = Run("ear", shop, {"ear": ear}, Muon(ear.parameters(), lr=0.01, adam_lr=1e-3), 0.998)
    for _ in run.steps(warm_up=100, decay_from=0.3):
        mel, mouth = speech.sample(batch, frames, ear.config, g)
        with shop.half():
            clear = torch.rand(batch, 1, 1, generator=g, device=shop.where) < 0.25
            _, guess = ear(hearing.normalise(torch.where(clear, mel, disturb(mel, g))))
        loss = (guess.float() - mouth).square().mean()
        run.update(loss, loss=loss)
    run.finish()
    test = shop.speech("test")
    ticks = torch.arange(-ear.config.past, test.frames // 4 * 4 - 400 + ear.config.ahead, device=shop.where) + 200
    with torch.no_grad():
        _, guess = ear(hearing.normalise(test.at("mel", ticks[None].float())))
    wanted = test.at("mouth", 200 + 1.5 + 4 * torch.arange(guess.shape[1], device=shop.where)[None].float())
    r = [torch.corrcoef(torch.stack([guess[0, :, i], wanted[0, :, i]]))[0, 1].item() for i in range(4)]
    log.info("ear: correlation on unseen speech: opening %.3f width %.3f pucker %.3f tongue %.3f", *r)


def train_meter(shop: Workshop, batch: int = 192) -> None:
    torch.manual_seed(5)
    g = shop.rng(5)
    speech, vae = shop.speech(), shop.vae()
    paint = Painter(batch, shop.where)
    feed = in_batches(lambda: make_clips(speech, batch // 4 * 24, 4, g), batch // 4)
    many = make_clips(speech, 1024, 4, g)
    values = truth(*as_frames(many.person, many.motion))
    meter = Meter(values.shape[1]).to(shop.where).to(memory_format=torch.channels_last)
    meter.mean.copy_(values.mean(0))
    meter.std.copy_(values.std(0) + 1e-6)
    if shop.further:
        recall(meter, shop.out / "meter.safetensors").train()
    run = Run("meter", shop, {"meter": meter}, Muon(meter.parameters(), lr=0.02, adam_lr=1e-3), 0.995)
    importance = torch.ones(values.shape[1], device=shop.where)
    importance[: len(MOVES)] = 4.0
    importance[[0, 2]] = 12.0

    def pictures(clips: Clips, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Drawn pictures, seven in ten through the autoencoder with disturbed latents, and what is in them."""
        drawn = paint(clips)
        with shop.half():
            latents = vae.encode(drawn * 2 - 1)
            noise = torch.randn(latents.shape, generator=g, device=shop.where)
            amount = 0.25 * torch.rand(len(drawn), 1, 1, 1, 1, generator=g, device=shop.where)
            seen = ((vae.decode(latents + amount * noise).float() + 1) / 2).clamp(0, 1)
        plain = torch.rand(len(drawn), 1, 1, 1, 1, generator=g, device=shop.where) < 0.3
        frames = torch.where(plain, drawn, seen).flatten(0, 1)
        return frames, truth(*as_frames(clips.person, clips.motion))

    for _ in run.steps(warm_up=50, decay_from=0.2):
        with torch.no_grad():
            frames, values = pictures(next(feed), g)
        with shop.half():
            readings = meter(frames)
        wrong = (readings.float() - (values - meter.mean) / meter.std).square().clamp_max(25.0)
        loss = (wrong * importance).mean()
        run.update(loss, clip=10.0, loss=loss)
    run.finish()
    with torch.no_grad():
        frames, values = pictures(make_clips(speech, batch // 4, 4, shop.rng(777), 1.0, 1.0), shop.rng(778))
        readings = meter.measure(frames)
    explained = 1 - (readings - values).square().mean(0) / values.var(0).clamp_min(1e-9)
    log.info("meter: R2 %s", {n: round(float(v), 3) for n, v in zip(MOVES, explained, strict=False)})
    log.info("meter: opening error %.2f px", (readings - values)[:, 0].abs().mean())


class Pool:
    """Clips as the transformer sees them, in latents; the oldest are replaced all the time."""

    def __init__(self, shop: Workshop, size: int, latents: int, seed: int) -> None:
        self.speech, self.vae, self.g = shop.speech(), shop.vae(), shop.rng(seed)
        self.half, self.size, self.latents = shop.half, size, latents
        self.paint = Painter(latents * 4, shop.where)
        self.encode = shop.compiled(self.vae.encode)
        self.kept: dict[str, Tensor] = {}
        self.made = 0

    @torch.no_grad()
    def make(self, count: int) -> tuple[Clips, Tensor, dict[str, Tensor]]:
        """New clips, their drawn frames as bytes [count, V, 3, S, S], and what the transformer sees of them."""
        clips = make_clips(self.speech, count, self.latents * 4, self.g)
        weight = weights_of(clips, 16).unflatten(1, (-1, 4)).mean(2)
        # one clip at a time, so that memory does not grow with the number
        drawn = torch.cat([(self.paint(clips[i : i + 1]) * 255).round().byte() for i in range(count)])
        with self.half():
            latents = [self.encode(one[None] / 127.5 - 1) for one in drawn]
            still = _as_bytes(references(clips, self.g)) * 2 - 1
            reference = self.vae.encode(still[:, None].expand(-1, 4, -1, -1, -1))
        moves = truth(*as_frames(clips.person, clips.motion))[:, : len(MOVES)].unflatten(0, (count, -1))
        return (
            clips,
            drawn,
            {
                "latents": torch.cat(latents).bfloat16(),
                "reference": reference.bfloat16(),
                "mel": clips.mel.half(),
                "drive": clips.drive,
                "moves": moves,
                "weight": weight / weight.mean((1, 2, 3, 4), keepdim=True),
            },
        )

    def keep(self, new: dict[str, Tensor]) -> None:
        """Put clips, one tensor for each name, over the oldest."""
        count = len(next(iter(new.values())))
        if not self.kept:
            self.kept = {k: v.new_zeros(self.size, *v.shape[1:]) for k, v in new.items()}
        place = (torch.arange(count, device=self.g.device) + self.made) % self.size
        for name, values in new.items():
            self.kept[name][place] = values
        self.made += count

    def add(self, count: int) -> None:
        """Draw and encode `count` new clips over the oldest."""
        self.keep(self.make(count)[2])

    def pick(self, count: int) -> dict[str, Tensor]:
        """Clips at random, as they are kept."""
        pick = torch.randint(0, min(self.made, self.size), (count,), generator=self.g, device=self.g.device)
        return {name: values[pick] for name, values in self.kept.items()}

    def sample(self, count: int) -> dict[str, Tensor]:
        """A batch of clips, float32, the sound disturbed."""
        batch = {name: values.float() for name, values in self.pick(count).items()}
        return batch | {"mel": hearing.normalise(disturb(batch["mel"], self.g))}


def _as_bytes(pictures: Tensor) -> Tensor:
    """Rounded to the 256 levels of a real picture."""
    return (pictures * 255).round() / 255


def train_reader(shop: Workshop, batch: int = 128, latents: int = 24, pool_size: int = 1024, first: int = 256) -> None:
    """Latents of drawn frames, up to a third of their spread disturbed, to what moves in them."""
    torch.manual_seed(6)
    g = shop.rng(6)
    pool = Pool(shop, pool_size, latents, 161)
    while pool.made < first:
        pool.add(32)
    reader = Reader(SIZE // VaeConfig.pixels_per_latent).to(shop.where)
    known = pool.kept["moves"][: pool.made].flatten(0, 1)
    reader.mean.copy_(known.mean(0))
    reader.std.copy_(known.std(0) + 1e-6)
    run = Run("reader", shop, {"reader": reader}, Muon(reader.parameters(), lr=0.01, adam_lr=1e-3), 0.998)

    def wrong(clips: dict[str, Tensor]) -> Tensor:
        return reader(clips["latents"].transpose(1, 2)) - (clips["moves"] - reader.mean) / reader.std

    for _ in run.steps(warm_up=100, decay_from=0.3):
        if run.step % 4 == 0:
            pool.add(16)
        clips = {name: values.float() for name, values in pool.pick(batch).items()}
        spread = 0.35 * torch.rand(batch, 1, 1, 1, 1, generator=g, device=shop.where)
        disturbed = spread * torch.randn(clips["latents"].shape, generator=g, device=shop.where)
        error = wrong(clips | {"latents": clips["latents"] + disturbed})
        loss = error.square().clamp_max(25.0).mean() + error.diff(dim=1).square().clamp_max(25.0).mean()
        run.update(loss, clip=10.0, loss=loss)
    run.finish()
    new = {name: values.float() for name, values in pool.make(32)[2].items()}
    with torch.no_grad():
        error = wrong(new)
    place, steps = error.square().mean((0, 1)).sqrt(), error.diff(dim=1).square().mean((0, 1)).sqrt()
    log.info(
        "reader: error in deviations, and of the change from frame to frame: %s",
        {name: (round(float(a), 3), round(float(b), 3)) for name, a, b in zip(MOVES, place, steps, strict=True)},
    )


def sequence_velocity(
    dit: CausalDiT, x: Tensor, level: Tensor, reference: Tensor, heard: Tensor, pose: Tensor, ropes: tuple[Tensor, ...]
) -> Tensor:
    """The velocity of whole sequences at once: every block sees what its ring would hold when streaming, at its level.

    Args:
        x: [B, c, F, h, w]; level: [B] in 0..1; reference: [B, c, 1, h, w]; heard, pose: from `conditions`.
        ropes: from `sequence_ropes`.
    Returns: [B, c, F, h, w]; equal to `CausalDiT.step` block by block.
    """
    own, moved = ropes
    batch, _, frames, h, w = x.shape
    tokens_per_frame = h * w // 4
    blocks, span = frames // LATENTS_PER_BLOCK, LATENTS_PER_BLOCK * tokens_per_frame
    conditioning = dit.prefill(reference, None, [])
    by_block = heard.unflatten(-1, (blocks, -1)).movedim(3, 1).flatten(0, 1)
    audio = AudioTokens(*(t.unflatten(0, (batch, blocks)).flatten(1, 2) for t in dit.encode_audio(by_block)))
    e, e0 = dit.modulation(level * TRAIN_TIMESTEPS)
    x = dit.embed(x, pose)
    seen = torch.ones(blocks, RING_BLOCKS * span + tokens_per_frame, dtype=torch.bool, device=x.device)
    for i in range(min(RING_BLOCKS - 1, blocks)):
        seen[i, : (RING_BLOCKS - 1 - i) * span] = False
    mask = seen[None, :, None, None].expand(batch, -1, -1, span, -1).flatten(0, 1)

    def windows(t: Tensor) -> Tensor:
        """[B, N, heads, dim] to the last RING_BLOCKS blocks of each block, [B, blocks, RING_BLOCKS * span, ...]."""
        t = F.pad(t.unflatten(1, (blocks, span)), (0, 0, 0, 0, 0, 0, RING_BLOCKS - 1, 0))
        return torch.cat([t[:, i : i + blocks] for i in range(RING_BLOCKS)], dim=2)

    for i, block in enumerate(dit.blocks):
        m = block.modulate(e0)
        q, k, v = block.qkv(x, m)
        q, k = rotate_pairs(q, own), rotate_pairs(k, own)
        ref_k = rotate_pairs(conditioning.keys[i].repeat(1, blocks, 1, 1), moved).unflatten(1, (blocks, -1))
        ref_v = conditioning.values[i][:, None].expand(-1, blocks, -1, -1, -1)
        keys = torch.cat([windows(k), ref_k], dim=2).flatten(0, 1)
        values = torch.cat([windows(v), ref_v], dim=2).flatten(0, 1)
        attended = attention(q.unflatten(1, (blocks, span)).flatten(0, 1), keys, values, mask)
        x = block.finish(x, attended.unflatten(0, (batch, blocks)).flatten(1, 2), m)
        if (j := dit.injector_of_block.get(i)) is not None:
            x = dit.inject(j, x, audio)
    return dit.head(x, e, h // 2, w // 2)


def sequence_ropes(dit: CausalDiT, frames: int, side: int, where: torch.device) -> tuple[Tensor, Tensor]:
    """Rotations of a sequence's own tokens and of its reference as each block sees it."""
    cells = side // 2
    own = dit.block_rope(0, frames, cells, cells, where)
    distance = REFERENCE_DISTANCE.low
    at = [reference_position(f0, distance) for f0 in range(0, frames, LATENTS_PER_BLOCK)]
    return own, torch.cat([dit.block_rope(p, 1, cells, cells, where) for p in at])


class Sequences:
    """The transformer over whole sequences, with what it is conditioned on prepared once for a batch."""

    def __init__(self, shop: Workshop, dit: CausalDiT, ear: Ear, latents: int, compiled: bool) -> None:
        self.dit, self.ear, self.shop = dit, ear, shop
        self.side = SIZE // VaeConfig.pixels_per_latent
        self.ropes = sequence_ropes(dit, latents, self.side, shop.where)
        self.velocity = shop.compiled(sequence_velocity) if compiled else sequence_velocity
        self.given: tuple[Tensor, Tensor, Tensor]

    def condition(self, mel: Tensor, drive: Tensor, reference: Tensor) -> None:
        """Normalised, disturbed mel; drive in picture units; reference latents [B, 1, c, h, w]."""
        with torch.no_grad(), self.shop.half():
            features, mouth = self.ear(mel)
        heard, pose = conditions(features.float(), mouth.float(), drive, self.side)
        self.given = (reference.transpose(1, 2), heard, pose.contiguous())

    def __call__(self, x: Tensor, level: Tensor) -> Tensor:
        with self.shop.half():
            return self.velocity(self.dit, x, level, *self.given, self.ropes).float()

    @torch.no_grad()
    def roll(self, noise: Tensor, levels: list[float]) -> Tensor:
        """Euler steps from pure noise at levels[0] down to levels[-1]."""
        x = noise
        for high, low in pairwise(levels):
            x = x + (low - high) * self(x, torch.full((len(x),), high, device=x.device))
        return x


def same_gradient(sequences: Sequences, x: Tensor, level: Tensor) -> float:
    """Relative difference of the compiled network's gradient from the plain one's: a compiler is trusted when seen."""
    found = []
    for velocity in (sequences.velocity, sequence_velocity):
        with sequences.shop.half():
            made = velocity(sequences.dit, x, level, *sequences.given, sequences.ropes).float()
        (made - x).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in sequences.dit.parameters() if p.grad is not None]))
        sequences.dit.zero_grad(set_to_none=True)
    return float((found[0] - found[1]).norm() / found[1].norm())


JUMPS = 0.5
"""What a wrong change from one latent to the next counts, beside a wrong latent."""

READ = 0.2
READ_CHANGES = 1.5
"""What counts, beside a wrong latent, where the reader sees another place or another change from frame to frame."""

PATHS = {4: [1.0, 0.9, 0.75, 0.5], 2: [1.0, 0.75], 1: [1.0]}
"""Noise levels of the numbers of steps that are trained."""


def recall_dit(shop: Workshop, name: str = "dit") -> CausalDiT:
    dit = build_dit()
    recall(dit, shop.out / f"{name}.safetensors")
    return dit.to(shop.where)


def train_dit(shop: Workshop, batch: int = 64, latents: int = 24, pool_size: int = 2048, first: int = 512) -> None:
    torch.manual_seed(11)
    g = shop.rng(11)
    dit = build_dit()
    dit.initialize()
    dit = dit.to(shop.where)
    if shop.further:
        recall(dit, shop.out / "dit.safetensors").train()
    ear = recall(Ear(), shop.out / "ear.safetensors").to(shop.where).requires_grad_(False)
    reader = recall(Reader(SIZE // VaeConfig.pixels_per_latent), shop.out / "reader.safetensors")
    reader = reader.to(shop.where).requires_grad_(False)
    ends = {id(p) for m in (dit.patch_embedding, dit.cond_encoder, dit.head) for p in m.parameters()}
    optimiser = Muon(
        dit.parameters(),
        lr=0.01 if shop.further else 0.02,
        adam_lr=6e-4 if shop.further else 1.2e-3,
        weight_decay=0.05,
        matrix=lambda p: is_matrix(p) and id(p) not in ends,
    )
    run = Run("dit", shop, {"dit": dit}, optimiser, 0.9985)
    pool = Pool(shop, pool_size, latents, 111)
    while pool.made < first:
        pool.add(32)
    log.info("dit: %d clips ready, %.2f M parameters", pool.made, sum(p.numel() for p in dit.parameters()) / 1e6)
    sequences = Sequences(shop, dit, ear, latents, compiled=True)
    levels = torch.tensor(PATHS[4], device=shop.where)
    shares = torch.tensor([0.3, 0.15, 0.35, 0.2], device=shop.where)
    borders = torch.ones(latents - 1, device=shop.where)
    borders[LATENTS_PER_BLOCK - 1 :: LATENTS_PER_BLOCK] = 3.0
    # four frames come of one latent and move together; where the next begins nothing but the loss ties them
    begins = torch.ones(latents * FRAMES_PER_LATENT - 1, len(MOVES), device=shop.where)
    begins[FRAMES_PER_LATENT - 1 :: FRAMES_PER_LATENT] = 3.0
    begins[:, MOVES.index("head_x") : MOVES.index("pitch") + 1] *= 3.0
    checked = False
    for done in run.steps(warm_up=200, decay_from=0.15 if shop.further else 0.35):
        if run.step % 6 == 0:
            pool.add(16)
        clips = pool.sample(batch)
        clean = clips["latents"].transpose(1, 2)
        sequences.condition(clips["mel"], clips["drive"], clips["reference"])
        noise = torch.randn(clean.shape, generator=g, device=shop.where)
        if not checked:
            checked = True
            wrong = same_gradient(sequences, 0.5 * clean + 0.5 * noise, torch.full((batch,), 0.5, device=shop.where))
            log.info("dit: compiled gradient differs from the plain one by %.2g", wrong)
            if not wrong < 0.05:
                log.warning("dit: goes on uncompiled")
                sequences.velocity = sequence_velocity
        own = (shop.further or done > 0.3) and float(torch.rand((), generator=g, device=shop.where)) < 0.5
        if own:
            # what the network itself makes of noise; it must lead from there to the truth
            steps = 2 if float(torch.rand((), generator=g, device=shop.where)) < 0.7 else 4
            stop = int(torch.randint(1, steps, (), generator=g, device=shop.where))
            path = PATHS[steps][: stop + 1]
            level = torch.full((batch,), path[-1], device=shop.where)
            x = sequences.roll(noise, path)
        else:
            level = levels[torch.multinomial(shares, batch, replacement=True, generator=g)]
            s = level[:, None, None, None, None]
            x = (1 - s) * clean + s * noise
        s = level[:, None, None, None, None]
        made = x - s * sequences(x, level)
        weight = clips["weight"].transpose(1, 2)
        # the error of the velocity is the error of the clean latents over the level
        each = ((made - clean).square() * weight / s**2).mean((1, 2, 3, 4))
        moves = (made - clean)[:, :, 1:] - (made - clean)[:, :, :-1]
        jumps = (moves.square() * weight[:, :, 1:] * borders[:, None, None]).mean()
        # against what it reads off the drawn latents, not the truth: what it sees wrongly in a person cancels
        with torch.no_grad():
            wanted = reader(clean)
        error = reader(made) - wanted
        # not squared: a head's jump is a tenth of what a mouth misses, and is to count as much
        changes = (charbonnier(error.diff(dim=1)) * begins).mean()
        loss = each.mean() + JUMPS * jumps + READ * error.square().mean() + READ_CHANGES * changes
        kind = "own" if own else "given"
        figures = {kind: each.mean(), "jumps": jumps, f"{kind}_read": error.square().mean(), f"{kind}_changes": changes}
        run.update(loss, **figures)
        if run.step % 50 == 0 and not own:
            run.guard(loss)
    run.finish()
    log.info("dit: %d clips seen", pool.made)


SEAM = 8.0
INSIDE = 1.0
"""What a wrong change counts where a latent begins, and inside a latent, beside a wrong picture."""


def train_seams(
    shop: Workshop,
    batch: int = 8,
    latents: int = 24,
    window: int = 6,
    past: int = 4,
    pool_size: int = 512,
    first: int = 64,
    fresh: int = 8,
) -> None:
    """The decoder alone, on windows of `window` latents that follow `past` others, as on air.

    Half of a batch are latents of drawn frames, which are the picture to make. The others are the transformer's: there
    the picture is what the decoder made of them before, for the drawn one cannot be known from them and would teach a
    blur. In both halves the changes from frame to frame are to be those of the drawn frames.
    """
    torch.manual_seed(31)
    g = shop.rng(31)
    dit = recall_dit(shop).requires_grad_(False)
    ear = recall(Ear(), shop.out / "ear.safetensors").to(shop.where).requires_grad_(False)
    before, vae = shop.vae(), shop.vae()
    if shop.further:
        recall(vae, shop.out / "vae_seams.safetensors")
    vae.decoder.requires_grad_(True)
    # slow and slower: where a jump is half a grey level, the noise of larger steps is all that can be seen
    optimiser = Muon(vae.decoder.parameters(), lr=0.0005, adam_lr=1e-4, weight_decay=0.05)
    run = Run("seams", shop, {"vae_seams": vae}, optimiser, 0.998)
    pool = Pool(shop, pool_size, latents, 131 + run.step)
    sequences = Sequences(shop, dit, ear, latents, compiled=False)

    @torch.no_grad()
    def shown(count: int) -> dict[str, Tensor]:
        """New clips: latents of drawn frames and of the transformer, both in pictures, and where detail matters."""
        clips, drawn, new = pool.make(count)
        mel = hearing.normalise(disturb(new["mel"].float(), g))
        sequences.condition(mel, new["drive"], new["reference"].float())
        noise = torch.randn(new["latents"].shape, generator=g, device=shop.where).transpose(1, 2)
        rolled = sequences.roll(noise, [*PATHS[2], 0.0]).transpose(1, 2)
        with shop.half():
            decoded = torch.cat([before.decode(one[None]) for one in rolled]).float()
        return {
            "clean": new["latents"],
            "rolled": rolled.bfloat16(),
            "drawn": drawn,
            "decoded": ((decoded + 1) * 127.5).round().clamp(0, 255).byte(),
            "weight": weights_of(clips, 64).half(),
        }

    while pool.made < first:
        pool.keep(shown(fresh))
    importance = torch.full((window * FRAMES_PER_LATENT,), INSIDE, device=shop.where)
    importance[::FRAMES_PER_LATENT] = SEAM
    half = batch // 2
    for _ in run.steps(warm_up=200, decay_from=0.0):
        if run.step % (2 * fresh) == 0:
            pool.keep(shown(fresh))
        clips = pool.pick(batch)
        start = int(torch.randint(0, latents - window - past + 1, (), generator=g, device=shop.where))
        span = slice(start, start + past + window)
        frames = slice((start + past) * FRAMES_PER_LATENT - 1, span.stop * FRAMES_PER_LATENT)
        with torch.no_grad():
            # a sampler's latents are never exact: see train_vae
            clean = clips["clean"][:half, span].float()
            spread = 0.1 * torch.rand(half, 1, 1, 1, 1, generator=g, device=shop.where)
            clean = clean + spread * torch.randn(clean.shape, generator=g, device=shop.where)
            given = torch.cat([clean, clips["rolled"][half:, span].float()])
            drawn = clips["drawn"][:, frames] / 127.5 - 1
            wanted = torch.cat([drawn[:half, 1:], clips["decoded"][half:, frames][:, 1:] / 127.5 - 1])
            weight = clips["weight"][:, frames].float()
        state = vae.init_state()
        with shop.half():
            with torch.no_grad():
                last = vae.decode(given[:, :past], state)[:, -1:].float()
            made = vae.decode(given[:, past:], state).float()
        loss, error = picture_loss(made, wanted, weight[:, 1:])
        wrong = wrong_changes(torch.cat([last, made], 1), drawn).flatten(0, 1)
        # the transformer's mouth is its own: how it should have moved cannot be told from a wrong one
        trust = torch.cat([torch.ones_like(weight[:half, 1:]), 1 / weight[half:, 1:]])
        fine = F.interpolate(trust.flatten(0, 1), size=wrong.shape[-1], mode="bilinear")
        coarse = F.avg_pool2d(wrong, wrong.shape[-1] // trust.shape[-1]).abs() * trust.flatten(0, 1)
        each = (wrong.abs() * fine).mean((1, 2, 3)) + coarse.mean((1, 2, 3))
        each = each.unflatten(0, (batch, -1))
        total = loss + (each * importance).mean()
        run.update(
            total,
            loss=loss,
            psnr=psnr(error.detach()),
            seams=each[:, ::FRAMES_PER_LATENT].mean(),
            changes=each.mean(),
        )
        if run.step % 50 == 0:
            run.guard(total)
    run.finish()
    clips = shown(fresh)
    for name in ("clean", "rolled"):
        with torch.no_grad(), shop.half():
            ratios = [border_ratio(v.decode(clips[name].float()).float().clamp(-1, 1)) for v in (before, vae)]
        log.info("seams: change at borders of %s latents over that inside: %.2f, before %.2f", name, *ratios[::-1])


def train_polish(shop: Workshop, batch: int = 6, latents: int = 12) -> None:
    """The last Euler step and the decoder, together, against drawn pixels; the steps before it run without gradient."""
    torch.manual_seed(21)
    g = shop.rng(21)
    speech = shop.speech()
    dit = recall_dit(shop).train()
    vae = shop.vae()
    vae.decoder.requires_grad_(True)
    ear = recall(Ear(), shop.out / "ear.safetensors").to(shop.where).requires_grad_(False)
    trained = [*dit.parameters(), *vae.decoder.parameters()]
    modules = {"dit_polished": dit, "vae_polished": vae}
    run = Run("polish", shop, modules, Muon(trained, lr=0.002, adam_lr=1.5e-4), 0.998)
    frames = latents * FRAMES_PER_LATENT
    paint = Painter(batch * frames, shop.where)
    feed = in_batches(lambda: make_clips(speech, batch * 8, frames, g), batch)
    sequences = Sequences(shop, dit, ear, latents, compiled=False)
    for _ in run.steps(warm_up=100, decay_from=0.3):
        with torch.no_grad():
            clips = next(feed)
            wanted = paint(clips) * 2 - 1
            weight = weights_of(clips, 64)
            still = _as_bytes(references(clips, g)) * 2 - 1
            with shop.half():
                reference = vae.encode(still[:, None].expand(-1, FRAMES_PER_LATENT, -1, -1, -1)).float()
                clean = vae.encode(wanted).float().transpose(1, 2)
            sequences.condition(hearing.normalise(disturb(clips.mel, g)), clips.drive, reference)
            noise = torch.randn(clean.shape, generator=g, device=shop.where)
            draw_steps = float(torch.rand((), generator=g, device=shop.where))
            path = PATHS[2 if draw_steps < 0.6 else 4 if draw_steps < 0.85 else 1]
            x = sequences.roll(noise, path)
        made = x - path[-1] * sequences(x, torch.full((batch,), path[-1], device=shop.where))
        with shop.half():
            pictures = vae.decode(made.transpose(1, 2)).float()
        # the first latent has no past here, and always has one when streaming
        seen = slice(FRAMES_PER_LATENT, None)
        loss, error = picture_loss(pictures[:, seen], wanted[:, seen], weight[:, seen])
        loss = loss + FLICKER * charbonnier(wrong_changes(pictures[:, seen], wanted[:, seen])).mean()
        drift = (made - clean).square().mean()
        total = loss + 0.05 * drift
        run.update(total, loss=loss, drift=drift, psnr=psnr(error.detach()))
        if run.step % 50 == 0:
            run.guard(total)
    run.finish()


STAGES: dict[str, Callable[[Workshop], None]] = {
    "vae": train_vae,
    "ear": train_ear,
    "meter": train_meter,
    "reader": train_reader,
    "dit": train_dit,
    "seams": train_seams,
    "polish": train_polish,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with speech_train.npz and speech_test.npz")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and results")
    parser.add_argument("--stage", choices=list(STAGES), action="append", required=True)
    parser.add_argument("--seconds", type=float, action="append", required=True, help="budget, one for each --stage")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds; then save and exit")
    parser.add_argument("--further", action="store_true", help="start from the stage's earlier result in --out")
    parser.add_argument("--seed", type=int, default=0, help="of the people and the noise that are seen")
    parser.add_argument(
        "--mean-with",
        type=Path,
        metavar="FOLDER",
        action="append",
        default=[],
        help="at the end, the transformer is the mean of it and of FOLDER's; may be given again",
    )
    given = parser.parse_args()
    stop_at = time.monotonic() + given.stop_after
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8d ms %(message)s")
    given.out.mkdir(parents=True, exist_ok=True)
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if where.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    for stage, seconds in zip(given.stage, given.seconds, strict=True):
        STAGES[stage](Workshop(given.data, given.out, seconds, where, stop_at, given.further, given.seed))
    if given.mean_with:
        lay_mean(given.out / "dit.safetensors", *(folder / "dit.safetensors" for folder in given.mean_with))


if __name__ == "__main__":
    main()
