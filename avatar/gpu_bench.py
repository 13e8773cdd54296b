"""How fast the full-size model is on this machine, and how far its fast modes are from float32: docs/performance.md.

    python -m avatar.gpu_bench same   [--modes bf16+fused,float8+attention8+fused]
    python -m avatar.gpu_bench plans  [--cases bf16,float8-24GiB] [--seconds 600] [--ram 110GiB]
    python -m avatar.gpu_bench speed  [--modes bf16,float8+fused] [--size 704x384] [--merge] [--profile]
    python -m avatar.gpu_bench errors [--modes bf16,float8+fused] [--layers 8]

`plans` runs what `avatar.place` plans, each case in a process of its own, with the allocator held to the budget: what
was predicted beside what was measured. `speed` and `errors` apply single optimisations to a model that is all resident.

Weights are random: speed and memory do not depend on their values. Each case is printed as one JSON line, with the
machine's own ceilings and the time that the case would take at these ceilings (its floor).
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audio.chunk import AudioBlock
from audio.errors import AvatardError
from avatar.attention import attention
from avatar.cache import empty_keys, empty_values, store
from avatar.cards import device_seconds
from avatar.demand import Schedule
from avatar.live_avatar import fast
from avatar.live_avatar.dit import CausalDiT, DiTConfig
from avatar.live_avatar.generator import FRAMES_PER_BLOCK, LATENTS_PER_BLOCK, LiveAvatar, Options, random_live_avatar
from avatar.model import Reference
from avatar.offload import stream_layers, stream_rings
from avatar.place import Wish, choose
from avatar.placement import Precision
from avatar.quantize import quantize
from avatar.sampling import denoise_block, sigmas, step_modulations

SAMPLES = 7_680

PROMPT = 65
"""Tokens of the random prompt, the padding counted as the one that it is."""


MODES: dict[str, Callable[[LiveAvatar], Any]] = {
    "float8": lambda model: fast.use_float8(model.dit),
    "attention8": lambda model: fast.use_float8_attention(model.dit),
    "fused": lambda model: fast.fuse(model.dit),
    "replayed": lambda model: fast.replay_steps(model.dit),
    "compiled": lambda model: fast.compile_transformer(model.dit),
    "vae": lambda model: fast.compile_vae(model.vae),
    "audio": lambda model: fast.replay_audio(model),
}
"""The optimisations by name, in the order in which they are applied; a mode is some of them with + between, or bf16."""


def apply(mode: str, model: LiveAvatar) -> None:
    wanted = set(mode.split("+")) - {"bf16"}
    for name, change in MODES.items():
        if name in wanted:
            change(model)
    if unknown := wanted - set(MODES):
        raise SystemExit(f"no optimisation {', '.join(sorted(unknown))}; there are {', '.join(MODES)}")


# What the machine can do, and what a block asks of it.


@dataclass(frozen=True)
class Ceilings:
    """Rates that this machine holds, in TFLOP/s: large matrix products, attention at the sizes of the case.

    Each is kept up for a second: a card at its power limit runs slower than in a first burst.
    """

    bf16: float
    float8: float
    attention: float
    attention8: float


@dataclass(frozen=True)
class Work:
    """Operations of one denoising step with full rings, in TFLOP (multiply-add = 2)."""

    matrices: float
    attention: float

    @classmethod
    def of(cls, config: DiTConfig, options: Options) -> Work:
        _, queries, keys = tokens(options)
        dim, layers, injectors = config.dim, config.num_layers, len(config.audio_inject_layers)
        block = 12 * dim**2 + 4 * dim * config.ffn_dim
        matrices = queries * (layers * block + injectors * 4 * dim**2)
        attended = 4 * queries * dim * (layers * (keys + PROMPT) + injectors * (config.num_audio_token + 1))
        return cls(matrices / 1e12, attended / 1e12)

    def floor_ms(self, ceilings: Ceilings, float8: bool, attention8: bool) -> float:
        matrices = self.matrices / (ceilings.float8 if float8 else ceilings.bf16)
        return 1e3 * (matrices + self.attention / (ceilings.attention8 if attention8 else ceilings.attention))


def tokens(options: Options) -> tuple[int, int, int]:
    """Tokens of a latent frame, of a block, and keys with full rings."""
    rows, columns = options.height // 16, options.width // 16
    n = rows * columns
    conditioning = 2 * n + (rows // 2) * (columns // 2) + 4 * (rows // 4) * (columns // 4)
    return n, LATENTS_PER_BLOCK * n, LATENTS_PER_BLOCK * options.ring_blocks * n + conditioning


def measure_ceilings(config: DiTConfig, options: Options) -> Ceilings:
    _, queries, keys = tokens(options)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    work = 2 * 8192**3 / 1e12
    bf16 = work / held(lambda: a @ b)
    (qa, sa), (qb, sb) = quantize(a), quantize(b)
    float8 = work / held(
        lambda: torch._scaled_mm(qa, qb.t(), scale_a=sa, scale_b=sb.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
    )
    heads, work = config.num_heads, 4 * queries * keys * config.dim / 1e12
    q = torch.randn(1, queries, heads, config.head_dim, device="cuda", dtype=torch.bfloat16)
    rates = []
    with torch.no_grad():
        for in_8_bits in (False, True):
            given = torch.randn(1, keys, heads, config.head_dim, device="cuda", dtype=torch.bfloat16)
            k, v = empty_keys(given, keys, in_8_bits), empty_values(given, keys, in_8_bits)
            store(given, k)
            store(given.flip(1), v)
            rates.append(work / held(partial(attention, q.to(k.dtype), k, v)))
    return Ceilings(bf16, float8, *rates)


def held(call: Callable[[], Any], seconds: float = 1.0) -> float:
    """Seconds of one call, over a stretch in which the device does nothing else."""
    count = max(1, round(seconds / device_seconds(call, 3)))
    for _ in range(count):
        call()
    return device_seconds(call, count // 3 + 1, warmup=0)


# Speed.


@contextmanager
def stopwatch(*calls: tuple[Any, str]) -> Iterator[dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]]]:
    """Device times of some methods while the block runs, by name."""
    times: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for _, name in calls}

    own = {(id(owner), name): vars(owner).get(name) for owner, name in calls}

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = original(*args, **options)
            end.record()
            times[name].append((begin, end))
            return result

        setattr(owner, name, watched)

    for owner, name in calls:
        watch(owner, name)
    try:
        yield times
    finally:
        for owner, name in calls:
            delattr(owner, name)
            if (before := own[id(owner), name]) is not None:
                setattr(owner, name, before)


def sound(block: int, lookahead: int) -> AudioBlock:
    samples = 0.1 * np.random.default_rng(block).standard_normal(SAMPLES + lookahead).astype(np.float32)
    return AudioBlock(samples[:SAMPLES], block * SAMPLES, SAMPLES, samples[SAMPLES:])


def speed(model: LiveAvatar, blocks: int, profiled: bool = False) -> dict[str, Any]:
    """Times of steady blocks, rings full, sound in and uint8 frames out: medians in ms, and frames a second."""
    picture = np.random.default_rng(0).integers(0, 256, (model.spec.height, model.spec.width, 3), np.uint8)
    memory = {"loaded": torch.cuda.memory_allocated(), "loading": torch.cuda.max_memory_allocated()}
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    state = model.start(Reference(picture, seed=1))
    torch.cuda.synchronize()
    started = time.perf_counter()
    memory |= {"started": torch.cuda.memory_allocated(), "starting": torch.cuda.max_memory_allocated()}
    warmup = model.spec.settled_after
    for i in range(warmup):
        model.step(state, sound(i, model.spec.lookahead_samples))
        if i == 0:
            first = time.perf_counter()
    walls = []
    held_bytes, held_on_host = torch.cuda.memory_allocated(), host_bytes()
    memory |= {"steady": held_bytes, "warming": torch.cuda.max_memory_allocated()}
    torch.cuda.reset_peak_memory_stats()
    with stopwatch((model, "_advance"), (model.vae, "decode"), (model.speech, "features")) as times:
        for i in range(warmup, warmup + blocks):
            begin = time.perf_counter()
            model.step(state, sound(i, model.spec.lookahead_samples))
            walls.append(1e3 * (time.perf_counter() - begin))
    medians = {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in times.items()}
    steps = [a.elapsed_time(b) for a, b in times["_advance"]]
    result = {
        "block_ms": round(statistics.median(walls), 1),
        "fps": round(1e3 * FRAMES_PER_BLOCK / statistics.median(walls), 2),
        "step_ms": round(medians["_advance"], 2),
        "step_max_ms": round(max(steps), 2),
        "block_max_ms": round(max(walls), 1),
        "slow": {"steps": _slow(steps), "blocks": _slow(walls)},
        "vae_ms": round(medians["decode"], 2),
        "speech_ms": round(medians["features"], 2),
        "start_s": round(started - began, 2),
        "first_block_s": round(first - started, 2),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "memory_gib": {name: round(value / 2**30, 2) for name, value in memory.items()},
        "growth_mb": round((torch.cuda.memory_allocated() - held_bytes) / 1e6, 2),
        "host_growth_mb": round((host_bytes() - held_on_host) / 1e6, 2),
        "blocks": blocks,
    }
    if profiled:
        result |= profile(lambda: model.step(state, sound(warmup + blocks, model.spec.lookahead_samples)))
    return result


SLOW = 1.15
"""Times the median: a step that takes longer is slow."""


def _slow(times: Sequence[float]) -> list[tuple[int, float]]:
    """Which were slow, and by how much; the first twenty."""
    median = statistics.median(times)
    return [(i, round(time / median, 2)) for i, time in enumerate(times) if time > SLOW * median][:20]


def profile(call: Callable[[], Any], top: int = 45) -> dict[str, Any]:
    """Device time of one call: in all, and by kernel, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as record:
        call()
        torch.cuda.synchronize()
    rows = sorted(record.key_averages(), key=lambda row: -row.self_device_time_total)
    busy = sum(row.self_device_time_total for row in rows) / 1e3
    kernels = [
        {"ms": round(row.self_device_time_total / 1e3, 3), "count": row.count, "kernel": row.key[:140]}
        for row in rows[:top]
    ]
    return {"busy_ms": round(busy, 1), "kernels": kernels}


def speed_case(mode: str, options: Options, blocks: int, profiled: bool) -> dict[str, Any]:
    began = time.perf_counter()
    model = random_live_avatar(options, device="cuda")
    torch.cuda.synchronize()
    loaded = time.perf_counter()
    apply(mode, model)
    with torch.no_grad():
        result = speed(model, blocks, profiled)
    config = model.dit.config
    del model
    forget()
    beside = beside_floor(result["step_ms"], config, options, "float8" in mode, "attention8" in mode)
    return {**result, "load_s": round(loaded - began, 2), **beside}


def beside_floor(step_ms: float, config: DiTConfig, options: Options, float8: bool, attention8: bool) -> dict[str, Any]:
    """A step beside what its operations take at the rates that this card holds now."""
    ceilings = measure_ceilings(config, options)
    floor = Work.of(config, options).floor_ms(ceilings, float8, attention8)
    return {
        "floor_step_ms": round(floor, 1),
        "step_over_floor": round(step_ms / floor, 3),
        "ceilings_tflops": {name: round(value) for name, value in vars(ceilings).items()},
    }


# Plans.


@dataclass(frozen=True)
class Case:
    """One to be planned, carried out and measured; goal: frames a second that are wanted."""

    options: dict[str, Any]
    wish: dict[str, str]
    goal: float = 0.0


BF16, FLOAT8, ALL8 = (
    {"weights": "bf16", "keys": "bf16"},
    {"weights": "fp8", "keys": "bf16"},
    {"weights": "fp8", "keys": "fp8"},
)
SEQUENTIAL, WAVEFRONT = {"schedule": "sequential"}, {"schedule": "wavefront"}

CASES = {
    "bf16": Case(SEQUENTIAL, BF16, 13.5),
    "float8": Case(SEQUENTIAL, FLOAT8),
    "all8": Case(SEQUENTIAL, ALL8, 18),
    "all8-wavefront": Case(WAVEFRONT, ALL8, 19.5),
    "all8-merged": Case({**SEQUENTIAL, "merge_last_step": True}, ALL8, 24),
    "all8-merged-640": Case({**SEQUENTIAL, "merge_last_step": True, "width": 640}, ALL8, 25),
    "all8-24GiB": Case(WAVEFRONT, {**ALL8, "vram": "24GiB"}),
    "all8-12GiB": Case(WAVEFRONT, {**ALL8, "vram": "12GiB"}, 4),
    "bf16-48GiB": Case(WAVEFRONT, {**BF16, "vram": "48GiB"}, 8),
    "all8-24GiB-sequential": Case(SEQUENTIAL, {**ALL8, "vram": "24GiB"}),
}


class Usage:
    """The most that the whole device, and this process on the host, held while it was watched; bytes."""

    def __init__(self) -> None:
        self.device = self.host = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Usage:
        self.before = self._used()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    @staticmethod
    def _used() -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free

    def _watch(self) -> None:
        while not self._end.wait(0.02):
            self.device = max(self.device, self._used())
            self.host = max(self.host, host_bytes())


def host_bytes() -> int:
    """Resident in the host's memory, of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def planned_case(name: str, seconds: float, ram: str = "", profiled: bool = False) -> dict[str, Any]:
    """The case as `avatar.place` would run it: what it planned, and what happened."""
    case, began = CASES[name], time.perf_counter()
    device = torch.device("cuda", 0)
    with Usage() as usage:
        options, places = choose(
            Options.from_settings(case.options),
            Wish(**case.wish, ram=ram),
            device,
            any_schedule="schedule" not in case.options,
        )
        model = random_live_avatar(options, device=device, places=places)
        torch.cuda.synchronize()
        load_s = time.perf_counter() - began
        result = speed(model, max(6, round(seconds / 0.48)), profiled)
    plan, config = places.placement, model.dit.config
    planned = max(plan.devices[0].peak_bytes, plan.devices[0].start_peak_bytes)
    peak, reserved = usage.device, torch.cuda.max_memory_reserved()
    del model, places
    forget()
    in_8_bits = plan.weights is Precision.FP8, plan.cache is Precision.FP8
    together = options.passes if options.schedule is Schedule.WAVEFRONT else 1
    return {
        "mode": plan.mode,
        **result,
        **beside_floor(result["step_ms"] / together, config, options, *in_8_bits),
        "load_s": round(load_s, 2),
        "goal_fps": case.goal,
        "plan_fps": round(plan.fps, 2),
        "plan_fps_over_measured": round(plan.fps / result["fps"], 3),
        "plan_peak_gib": round(planned / 2**30, 2),
        "peak_gib": round(peak / 2**30, 2),
        "plan_peak_over_measured": round(planned / peak, 3),
        "reserved_gib": round(reserved / 2**30, 2),
        "used_before_gib": round(usage.before / 2**30, 2),
        "host_peak_gib": round(usage.host / 2**30, 2),
        "seconds_planned": {key: round(value, 4) for key, value in vars(plan.devices[0].seconds).items()},
    }


# Sameness.


def same(modes: list[str], layers: int = 8, blocks: int = 12) -> dict[str, Any]:
    """Whether other schedules and places give the latents of the resident, sequential model to the bit; full width.

    What stays on the device is replayed as graphs, but for that model.
    """
    inject = tuple(i for i in DiTConfig().audio_inject_layers if i < layers)
    config = replace(DiTConfig(), num_layers=layers, audio_inject_layers=inject, audio_layers=2)
    device = torch.device("cuda", 0)
    picture = np.random.default_rng(0).integers(0, 256, (384, 704, 3), np.uint8)

    def latents(mode: str, schedule: Schedule, away: int | None) -> list[Tensor]:
        """away: from which block on layers and rings live on the host; None: never."""
        options = Options(schedule=schedule)
        model = random_live_avatar(options, config, device=device, vae_width=16, speech_layers=1)
        apply(mode, model)

        def leave() -> None:
            torch.cuda.synchronize()
            stream_layers(model.dit, {1, 4}, device)
            stream_rings(model.dit, {2, 6}, options.ring_blocks, device)

        if away == 0:
            leave()
        state = model.start(Reference(picture, seed=1))
        made = []
        for block in range(blocks + (options.passes - 1) * (schedule is Schedule.WAVEFRONT)):
            if away and block == away:
                leave()
            latent = model.denoise(state, sound(block, model.spec.lookahead_samples))
            made += [] if latent is None else [latent.cpu()]
        return made

    found: dict[str, Any] = {}
    for mode in modes:
        plain = latents(mode, Schedule.SEQUENTIAL, None)
        for schedule in Schedule:
            for away in (None, 0, 4):
                ours = latents(mode if away is not None else f"{mode}+replayed", schedule, away)
                found[f"{mode} {schedule} {away}"] = [bool(torch.equal(a, b)) for a, b in zip(ours, plain, strict=True)]
                forget()
    return found


# Errors.


def errors(modes: list[str], options: Options, layers: int, blocks: int = 3) -> dict[str, Any]:
    """Relative error of the latents of some blocks against float32, on the same weights, by mode.

    Full width and few layers, so that the float32 model fits; weights are rounded to bfloat16 first, so that what is
    measured is the arithmetic and not the storage of the weights.
    """
    inject = tuple(i for i in DiTConfig().audio_inject_layers if i < layers)
    config = replace(DiTConfig(), num_layers=layers, audio_inject_layers=inject)
    exact: list[Tensor] = []
    result: dict[str, Any] = {}
    for name in ["float32", *modes]:
        model = random_live_avatar(options, config, device="cuda", dtype=torch.bfloat16, vae_width=16, speech_layers=1)
        if name == "float32":
            model.dit.float()
        else:
            apply(name, model)
        with torch.no_grad():
            latents, velocities = stream(model.dit, options, blocks)
        if name == "float32":
            exact = [*latents, *velocities]
        else:
            apart = [relative(ours, theirs) for ours, theirs in zip([*latents, *velocities], exact)]
            result[name] = {"latents": apart[:blocks], "velocities": apart[blocks:]}
        del model
        forget()
    return result


def stream(dit: CausalDiT, options: Options, blocks: int) -> tuple[list[Tensor], list[Tensor]]:
    """Latents of some blocks from fixed inputs, and the velocity of each first step, in float32."""
    generator = torch.Generator("cuda").manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(torch.bfloat16).to(dit.dtype)

    h, w = options.height // 8, options.width // 8
    text = dit.encode_text(draw(1, 64, dit.config.text_dim))
    conditioning = dit.prefill(draw(1, 16, 1, h, w), draw(1, 16, 19, h, w), text)
    levels = sigmas(options.steps, merge_last_step=options.merge_last_step).to("cuda")
    times = step_modulations(dit, levels, levels.device)
    caches = [dit.new_cache(conditioning, LATENTS_PER_BLOCK * options.ring_blocks) for _ in times]
    latents, velocities = [], []
    for b in range(blocks):
        audio = dit.prepare_audio(dit.encode_audio(draw(1, dit.config.audio_layers, dit.config.audio_dim, 12)))
        noise, f0 = draw(1, 16, LATENTS_PER_BLOCK, h, w), LATENTS_PER_BLOCK * b
        velocity = dit.step(noise, times[0], conditioning, text, audio, caches[0], f0, 30 + f0)
        velocities.append(velocity.float().cpu())
        positions = [30 + f0] * len(times)
        x = denoise_block(dit, noise, conditioning, caches, levels, times, text, audio, f0, positions)
        latents.append(x.float().cpu())
    return latents, velocities


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float(f"{float((ours - theirs).norm() / theirs.norm()):.2e}")


def forget() -> None:
    """Let go of the last model. Its compiled methods refer to it in circles."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def facts() -> dict[str, Any]:
    device = torch.cuda.get_device_properties(0)
    return {
        "gpu": device.name,
        "memory_gb": round(device.total_memory / 1e9, 1),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "errors", "same", "plans", "plan"])
    parser.add_argument("--cases", default=",".join(CASES), help="of: " + ", ".join(CASES))
    parser.add_argument("--seconds", type=float, default=0.0, help="of video that a plan's case makes, at least")
    parser.add_argument("--ram", default="", help="the most of the host's memory that plans may take, as 110GiB")
    parser.add_argument("--modes", default="bf16,bf16+fused+vae+audio,float8+fused+vae+audio")
    parser.add_argument("--size", default="704x384")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--merge", action="store_true", help="leave out the last denoising step")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--profile", action="store_true")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not torch.cuda.is_available():
        raise AvatardError(f"no GPU to measure: this torch ({torch.__version__}) sees none")
    width, height = map(int, chosen.size.split("x"))
    options = Options(width=width, height=height, steps=chosen.steps, merge_last_step=chosen.merge)
    if chosen.what == "plan":
        found = planned_case(chosen.cases, chosen.seconds, chosen.ram, chosen.profile)
        print(json.dumps({"case": chosen.cases, **found}), flush=True)
        return
    if chosen.what == "same":
        with torch.no_grad():
            print(json.dumps({"case": "same", **same(chosen.modes.split(","))}), flush=True)
        return
    if chosen.what == "plans":
        for name in chosen.cases.split(","):
            # A process each: what one leaves behind, in memory and in caches, is nothing to the next.
            command = [sys.executable, "-m", "avatar.gpu_bench", "plan", "--cases", name]
            command += ["--seconds", str(chosen.seconds), "--ram", chosen.ram, *["--profile"] * chosen.profile]
            subprocess.run(command, check=False)
        return
    modes = chosen.modes.split(",")
    case = {"size": chosen.size, "steps": chosen.steps - chosen.merge}
    if chosen.what == "errors":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        found = errors(modes, options, chosen.layers)
        print(json.dumps({"case": "errors", "layers": chosen.layers, **case, **found, "machine": facts()}), flush=True)
        return
    for mode in modes:
        result = speed_case(mode, options, chosen.blocks, chosen.profile)
        print(json.dumps({"case": "speed", "mode": mode, **case, **result, "machine": facts()}), flush=True)
        forget()


if __name__ == "__main__":
    main(sys.argv[1:])
