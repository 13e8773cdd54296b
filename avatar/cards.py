"""What GPUs can do: a table of well-known ones, the measurement of the one that is there, and where that is kept.

    python -m avatar.cards [--driver VERSION]      every GPU of this machine, 2 s each if unknown; a JSON line each

The measurement needs torch and a GPU; nothing else here does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from audio.errors import AvatardError

MIB, GIB = 1 << 20, 1 << 30


class CardError(AvatardError):
    """No such GPU in the table, or none that can be measured; names it and what there is."""


@dataclass(frozen=True)
class Card:
    """One GPU: its memory and its rates.

    bf16_tflops, float8_tflops (0: it multiplies no 8-bit matrices): large matrix products; attention_tflops: softmax
    attention in bf16 at the lengths of a stream; link_gb_s: to and from page-locked host memory, each way; memory_gb_s:
    its own memory, read and written; measured: on a card, or reckoned from its data sheet.
    """

    name: str
    memory_bytes: int
    bf16_tflops: float
    float8_tflops: float
    attention_tflops: float
    link_gb_s: float
    memory_gb_s: float
    measured: bool = False


MATRIX_SHARE, FLOAT8_SHARE, ATTENTION_SHARE, LINK_SHARE, MEMORY_SHARE = 0.80, 0.73, 0.62, 0.86, 0.90
"""What of its data sheet the measured H200 reaches (790 of 989, 1450 of 1979, attention 614 of 989, 55 of 64, 4300 of
4800). Other cards of the table are taken to reach as much of theirs."""


def _from_sheet(
    name: str, memory_mib: int, bf16_tflops: float, float8_tflops: float, link_gb_s: float, memory_gb_s: float
) -> Card:
    return Card(
        name,
        memory_mib * MIB,
        round(bf16_tflops * MATRIX_SHARE, 1),
        round(float8_tflops * FLOAT8_SHARE, 1),
        round(bf16_tflops * ATTENTION_SHARE, 1),
        round(link_gb_s * LINK_SHARE, 1),
        round(memory_gb_s * MEMORY_SHARE),
    )


TABLE = (
    Card("H200", 143_771 * MIB, 790, 1450, 614, 55, 4300, measured=True),
    # memory as nvidia-smi tells it; products dense and accumulated in float32; PCIe 4.0 or 5.0 with 16 lanes
    _from_sheet("H100", 81_559, 989, 1979, 64, 3350),
    _from_sheet("A100", 81_920, 312, 0, 32, 2039),
    _from_sheet("L40S", 46_068, 362, 733, 32, 864),
    _from_sheet("RTX 5090", 32_607, 209.5, 419, 64, 1792),
    _from_sheet("RTX 4090", 24_564, 165.2, 330.3, 32, 1008),
    _from_sheet("RTX 3090", 24_576, 71, 0, 32, 936),
)
"""SXM modules where a card comes in several forms; of the A100 the one with 80 GB."""


def find_card(name: str) -> Card:
    """The card of the table that is meant: `h200`, `4090`, `NVIDIA GeForce RTX 4090`. Raises: CardError."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    for card in TABLE:
        if words & {card.name.lower().removeprefix("rtx ")} and not words & {"laptop", "d"}:
            return card
    raise CardError(f"GPU {name}: not in the table, which has {', '.join(card.name for card in TABLE)}")


# ---------------------------------------------------------------------------------------------------------------------
# Measured cards, kept in a file


def cache_file() -> Path:
    """Where measurements are kept."""
    return Path.home() / ".cache" / "avatard" / "cards.json"


def card_key(name: str, driver: str) -> str:
    """Under which a measurement is kept: another driver may have other kernels."""
    return f"{name}, driver {driver}"


def load_cards(path: Path) -> dict[str, Card]:
    """Cards by their keys. A file that is missing, or not ours, is as good as an empty one: measuring mends it."""
    try:
        rows = json.loads(path.read_text("utf-8"))
        return {key: Card(**row) for key, row in rows.items() if _is_card(row)}
    except (OSError, ValueError, AttributeError):
        return {}


def _is_card(row: Any) -> bool:
    numbers = {field.name for field in fields(Card)} - {"name"}
    if not isinstance(row, dict) or set(row) != numbers | {"name"} or not isinstance(row["name"], str):
        return False
    return all(isinstance(row[name], int | float) for name in numbers)


def store_card(path: Path, key: str, card: Card) -> None:
    """Keep a card beside those that are there. The file is whole at every moment."""
    cards = {**load_cards(path), key: card}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump({key: asdict(card) for key, card in cards.items()}, file, indent=1)
    os.replace(name, path)


def measured(path: Path, key: str, measure: Callable[[], Card]) -> Card:
    """The card kept under that key; measured now, and kept, where there is none."""
    known = load_cards(path).get(key)
    if known is None:
        known = measure()
        store_card(path, key, known)
    return known


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def device_seconds(call: Callable[[], Any], repeats: int, warmup: int = 2) -> float:
    """Seconds of one call on the present CUDA device, the median of several, each between two of its events."""
    import statistics

    import torch

    for _ in range(warmup):
        call()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in pairs:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


def measure(index: int) -> Card:
    """The rates of a CUDA device, about 2 s; takes 1.5 GiB of its memory meanwhile."""
    import torch

    from avatar.attention import attention
    from avatar.quantize import quantize

    device = torch.device("cuda", index)
    with torch.no_grad(), torch.cuda.device(device):
        # products that a card of 20 TFLOP/s does in 50 ms, and that fill the largest
        side = 8192
        a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        operations = 2 * side**3 / 1e12
        bf16 = operations / device_seconds(lambda: a @ b, 10)
        float8 = 0.0
        if torch.cuda.get_device_capability(device) >= (8, 9):
            (x, scale_x), (y, scale_y) = quantize(a), quantize(b)

            def product() -> Any:
                return torch._scaled_mm(
                    x, y.t(), scale_a=scale_x, scale_b=scale_y.t(), out_dtype=torch.bfloat16, use_fast_accum=True
                )

            float8 = operations / device_seconds(product, 10)
        # one layer of the full-size transformer at 704x384
        queries, keys, heads, dim = 3168, 15312, 40, 128
        q = torch.randn(1, queries, heads, dim, device=device, dtype=torch.bfloat16)
        k, v = (torch.randn(1, heads, keys, dim, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
        attended = 4 * queries * keys * heads * dim / 1e12 / device_seconds(lambda: attention(q, k, v), 10)
        memory = 2 * a.nbytes / 1e9 / device_seconds(lambda: b.copy_(a), 10)
        pinned = torch.empty(256 * MIB, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(pinned, device=device)
        inward = device_seconds(lambda: there.copy_(pinned, non_blocking=True), 5)
        outward = device_seconds(lambda: pinned.copy_(there, non_blocking=True), 5)
    properties = torch.cuda.get_device_properties(device)
    return Card(
        properties.name,
        properties.total_memory,
        round(bf16, 1),
        round(float8, 1),
        round(attended, 1),
        round(pinned.nbytes / 1e9 / max(inward, outward), 1),
        round(memory),
        measured=True,
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Measure the GPUs of this machine and keep the results.")
    parser.add_argument("--cache", type=Path, default=cache_file())
    parser.add_argument("--driver", default="unknown", help="part of the key under which a result is kept")
    chosen = parser.parse_args(arguments)
    import torch

    try:
        if not torch.cuda.is_available():
            raise CardError(f"no GPU to measure: this torch ({torch.__version__}) sees none")
        for index in range(torch.cuda.device_count()):
            key = card_key(torch.cuda.get_device_name(index), chosen.driver)
            card = measured(chosen.cache, key, partial(measure, index))
            print(json.dumps(asdict(card)), flush=True)
    except CardError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
