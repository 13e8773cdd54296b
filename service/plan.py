"""`avatard plan`: whether a model runs on a GPU, how, and how fast; answered from numbers, without loading anything."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from audio.errors import AvatardError
from avatar.cards import GIB, MIB, TABLE, Card, CardError, cache_file, card_key, find_card, load_cards
from avatar.live_avatar.size import Shape
from avatar.machine import bytes_of, host_memory
from avatar.placement import (
    DoesNotFit,
    Host,
    Offload,
    Placement,
    Precision,
    Schedule,
    Target,
    first_live,
    plan,
    understand,
    ways_to_live,
)
from service.models import known_models, plan_lines, select_model

USUAL_MEMORY = 64 * GIB
"""Of the host, for GPUs that are not here."""
PROBE_TIMEOUT_S, MEASURE_TIMEOUT_S = 5.0, 180.0


class PlanError(AvatardError):
    """A question that cannot be answered as it was put; names option and value."""


@dataclass(frozen=True)
class Question:
    """What the command line asks, in its words; None and "" are what was not said.

    live: None plans for live speed at the model's own size; True chooses size and last step where they were not said.
    """

    model: str | None = None
    size: tuple[int | None, int | None] = (None, None)
    steps: int | None = None
    merge_last_step: bool = False
    live: bool | None = None
    vram: str = ""
    ram: str = ""
    gpus: int = 1
    gpu: str = ""
    weights: str = ""
    keys: str = ""
    schedule: str = ""
    offload: str = ""
    measure: bool = False


@dataclass(frozen=True)
class Answer:
    """lines: for people; table: for programs, by the names of the models."""

    lines: list[str]
    table: dict[str, Any]


def answer(question: Question) -> Answer:
    """Raises: AvatardError: what is asked for does not exist, does not fit, or cannot be understood."""
    if question.model is None:
        table = known_models()
        return Answer(plan_lines(table), table)
    entry = select_model(question.model)
    if entry["embedded"]:
        table = {question.model: entry}
        return Answer([*plan_lines(table), "  no GPU is needed and nothing has to be placed"], table)

    shape, target = _shape(question), _target(question)
    ram = understand("--ram", question.ram, bytes_of, PlanError)
    host = Host(USUAL_MEMORY if ram is None else ram)
    if question.gpus < 1:
        raise PlanError(f"--gpus {question.gpus}: must be 1 or more")
    if question.gpu:
        gpus = [find_card(question.gpu)] * question.gpus
    else:
        found = probe(measure=question.measure)
        if not found:
            return _on_well_known(question, entry, shape, host, target)
        if len(found) < question.gpus:
            raise PlanError(f"--gpus {question.gpus}: there are {len(found)} here; name others with --gpu")
        gpus = [card for card, _ in found[: question.gpus]]
        host = host if question.ram else Host(host_memory())
        if target.vram_bytes is None:
            target = replace(target, vram_bytes=min(free for _, free in found[: question.gpus]))

    shape, placement = _choose(question, shape, gpus, host, target)
    ways = [] if placement.holds else _ways(shape, gpus, host, target)
    wish = f"{target.fps} fps live" if target.live else "as fast as it goes"
    lines = [f"{question.model} at {shape}; {wish}", placement.explain()]
    if ways:
        lines.append(f"{target.fps} fps live would hold with one of")
        lines += [f"  {name}: {way.fps:.1f} frames/s" for name, way in ways]
    told = {
        "shape": vars(shape),
        "placement": placement.as_dict(),
        "would_hold": [{"with": name, "fps": way.fps, "mode": way.mode} for name, way in ways],
    }
    return Answer(lines, {question.model: {**entry, **told}})


def _shape(question: Question) -> Shape:
    said = {"width": question.size[0], "height": question.size[1], "steps": question.steps}
    return Shape(
        **{name: value for name, value in said.items() if value is not None},
        merge_last_step=question.merge_last_step,
    )


def _target(question: Question) -> Target:
    return Target(
        live=question.live is not False,
        vram_bytes=understand("--vram", question.vram, bytes_of, PlanError),
        weights=understand("--weights", question.weights, Precision, PlanError),
        cache=understand("--keys", question.keys, Precision, PlanError),
        schedule=understand("--schedule", question.schedule, Schedule, PlanError),
        offload=understand("--offload", question.offload, Offload, PlanError) or Offload.AUTO,
    )


def _choose(question: Question, shape: Shape, gpus: list[Card], host: Host, target: Target) -> tuple[Shape, Placement]:
    """The shape asked for; where live speed is asked for and no shape, the largest that is fast enough."""
    if question.live and question.size[0] is None and question.steps is None:
        variants = ((lesser, lesser.demand()) for lesser in [shape, *shape.lesser()])
        if chosen := first_live(variants, gpus, host, target):
            return chosen
    otherwise = ((str(lesser), lesser.demand()) for lesser in shape.lesser())
    return shape, plan(shape.demand(), gpus, host, target, otherwise)


def _ways(shape: Shape, gpus: list[Card], host: Host, target: Target) -> list[tuple[str, Placement]]:
    lesser = [(str(less), less) for less in shape.lesser()]
    any_less = ((name, less.demand()) for name, less in lesser)
    all_steps = ((name, less.demand()) for name, less in lesser if less.passes == shape.passes)
    return ways_to_live(shape.demand(), gpus, host, target, [any_less, all_steps])


def _on_well_known(question: Question, entry: dict[str, Any], asked: Shape, host: Host, target: Target) -> Answer:
    """One line for each card of the table, for machines without a GPU."""
    assert question.model is not None
    memory = f"a host with {host.memory_bytes / GIB:.0f} GiB"
    wish = f", or as large as {target.fps} fps live holds," if question.live else ""
    which = f"{question.gpus} of these" if question.gpus > 1 else "one of these"
    lines = [*plan_lines({question.model: entry}), f"no GPU found here; {asked}{wish} on {which}, in {memory}:"]
    cards = []
    for card in TABLE:
        try:
            shape, placement = _choose(question, asked, [card] * question.gpus, host, target)
        except DoesNotFit as error:
            lines.append(f"  {card.name:10} does not fit: {error}")
            cards.append({"card": card.name, "fits": False, "why": str(error)})
            continue
        peak = max(device.peak_bytes for device in placement.devices)
        size = f"{shape}: " if shape != asked else "" if placement.holds or not question.live else "not live: "
        lines.append(f"  {card.name:10} {placement.fps:5.1f} frames/s  {peak / GIB:5.1f} GiB  {size}{placement.mode}")
        cards.append(
            {
                "card": card.name,
                "fits": True,
                "shape": vars(shape),
                "fps": placement.fps,
                "peak_bytes": peak,
                "mode": placement.mode,
            }
        )
    lines.append("more with --gpu NAME")
    return Answer(lines, {question.model: {**entry, "shape": vars(asked), "cards": cards}})


# ---------------------------------------------------------------------------------------------------------------------
# What is here


def probe(*, measure: bool = False, cache: Path | None = None) -> list[tuple[Card, int]]:
    """The GPUs of this machine and their free bytes, in the order of nvidia-smi; rates as measured, or of the table.

    measure: those without a measurement are measured now, in a process of its own.
    Raises: CardError: a GPU that the table does not know and nobody has measured, or measuring failed.
    """
    cache = cache or cache_file()
    seen = _nvidia_smi()
    if measure and any(card_key(name, driver) not in load_cards(cache) for name, *_, driver in seen):
        _measure(cache, seen[0][3])
    known = load_cards(cache)
    found = []
    for name, total_mib, free_mib, driver in seen:
        card = known.get(card_key(name, driver))
        if card is None:
            try:
                card = find_card(name)
            except CardError as error:
                raise CardError(f"{error}; its rates can be measured with --measure") from error
        found.append((replace(card, name=name, memory_bytes=total_mib * MIB), free_mib * MIB))
    return found


def _nvidia_smi() -> list[tuple[str, int, int, str]]:
    """Name, total and free MiB, and driver version of each GPU; none where there is no driver."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines()]
    return [(row[0], int(row[1]), int(row[2]), row[3]) for row in rows if len(row) == 4 and (row[1] + row[2]).isdigit()]


def _measure(cache: Path, driver: str) -> None:
    command = [sys.executable, "-m", "avatar.cards", "--cache", str(cache), "--driver", driver]
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=MEASURE_TIMEOUT_S, check=True)
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines()[-1:] or [f"exit status {error.returncode}"]
        raise CardError(f"measuring the GPU failed: {reason[0]}") from error
    except subprocess.TimeoutExpired as error:
        raise CardError(f"measuring the GPU took more than {MEASURE_TIMEOUT_S:g} s") from error
