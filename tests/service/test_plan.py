"""`avatard plan`: what is asked, what is here, and what is answered."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from avatar.cards import GIB, MIB, CardError, card_key, find_card, store_card
from avatar.placement import DoesNotFit, reserve_bytes
from service import cli
from service.plan import PlanError, Question, answer, host_memory, probe

MODEL = "live-avatar-14b"


def asked(**said):
    return answer(Question(model=MODEL, **said))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose nvidia-smi prints what it is given; nothing without."""

    def says(*rows: str) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.write_text("#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in rows))
        program.chmod(0o755)

    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return says


def test_a_named_card_is_answered_for_without_a_gpu_and_at_once(capsys):
    began = time.perf_counter()
    told = asked(gpu="h200")
    assert time.perf_counter() - began < 2
    assert told.lines[0] == "live-avatar-14b at 704x384, 4 steps; 25 fps live"
    assert told.lines[2] == "25 fps live would hold with one of"
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--model", MODEL, "--gpu", "4090", "--vram", "24GiB", "--ram", "64GiB", "--files", "--json"])
    assert ended.value.code == 0
    table = json.loads(capsys.readouterr().out)[MODEL]
    assert table["placement"]["devices"][0]["card"]["name"] == "RTX 4090"
    assert table["placement"]["fps"] > 0


def test_live_chooses_the_size_where_none_is_said():
    assert "640x384, 4 steps, the last merged" in asked(gpu="h200", live=True).lines[0]
    assert "704x384, 4 steps;" in asked(gpu="h200", live=True, size=(704, 384)).lines[0]
    assert len(asked(gpu="h200", live=True).lines) == 2


def test_without_a_gpu_the_well_known_ones_are_listed(machine):
    told = asked()
    assert "no GPU found here; 704x384, 4 steps on one of these, in a host with 64 GiB:" in told.lines
    assert told.table[MODEL]["cards"][0]["card"] == "H200"
    assert all(card["fits"] for card in told.table[MODEL]["cards"])


def test_without_a_gpu_the_largest_size_that_is_live_is_said_for_each(machine):
    one, two = (asked(live=True, gpus=gpus).table[MODEL]["cards"] for gpus in (1, 2))
    assert {card["card"]: (card["shape"]["width"], card["shape"]["steps"]) for card in one}["L40S"] < (704, 4)
    assert all(card["fps"] >= 25 for card in one if card["card"] != "RTX 3090")
    assert next(card for card in two if card["card"] == "H200")["shape"]["width"] == 704
    assert any(line.startswith("  RTX 3090") and "not live: " in line for line in asked(live=True).lines)


def test_the_gpus_that_are_here_are_planned_for_with_what_is_free_on_them(machine):
    machine("NVIDIA H200, 143771, 30720, 570.1", "NVIDIA H200, 143771, 143000, 570.1")
    cards = probe()
    assert [(card.name, card.memory_bytes, free) for card, free in cards] == [
        ("NVIDIA H200", 143_771 * MIB, 30_720 * MIB),
        ("NVIDIA H200", 143_771 * MIB, 143_000 * MIB),
    ]
    assert cards[0][0].bf16_tflops == find_card("H200").bf16_tflops
    device = asked(ram="128GiB").table[MODEL]["placement"]["devices"][0]
    assert device["limit_bytes"] < 30 * GIB
    with pytest.raises(PlanError, match="--gpus 3: there are 2 here"):
        asked(gpus=3)


def test_a_measurement_counts_more_than_the_table(machine, tmp_path):
    machine("NVIDIA RTX 9999, 98304, 98000, 600.1")
    with pytest.raises(CardError, match=r"GPU NVIDIA RTX 9999: not in the table.*measured with --measure"):
        probe()
    card = replace(find_card("H100"), name="NVIDIA RTX 9999", bf16_tflops=555.5)
    store_card(tmp_path / ".cache/avatard/cards.json", card_key("NVIDIA RTX 9999", "600.1"), card)
    assert probe()[0][0].bf16_tflops == 555.5


@pytest.mark.parametrize("row", ["", "No devices were found", "NVIDIA H200, [N/A], [N/A], 570.1"])
def test_what_nvidia_smi_says_without_a_gpu_is_no_gpu(machine, row):
    machine(row)
    assert probe() == []


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"vram": "24"}, "--vram 24: not an amount of memory, such as 24GiB"),
        ({"ram": "much"}, "--ram much: not an amount of memory, such as 24GiB"),
        ({"weights": "int4"}, "--weights int4: there are bf16, fp8"),
        ({"offload": "disk"}, "--offload disk: there are auto, none, cpu, group, model, block"),
        ({"gpus": 0}, "--gpus 0: must be 1 or more"),
    ],
    ids=str,
)
def test_what_cannot_be_understood_is_said_with_what_can(said, message):
    with pytest.raises(PlanError) as caught:
        asked(**{"gpu": "h200", **said})
    assert str(caught.value) == message


@pytest.mark.parametrize("amount", ["24GiB", "24G", "24 GB", "24576MiB", "24.0g"])
def test_an_amount_of_memory_is_read_as_people_write_it(amount):
    limit = asked(gpu="h200", vram=amount).table[MODEL]["placement"]["devices"][0]["limit_bytes"]
    assert limit == 24 * GIB - reserve_bytes(24 * GIB)


def test_what_does_not_fit_is_one_line_and_exit_status_2(capsys):
    with pytest.raises(DoesNotFit):
        asked(gpu="h200", vram="8GiB")
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", MODEL, "--gpu", "h200", "--vram", "8GiB"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("avatard: H200 is short of 1.7 GiB")


def test_a_model_that_needs_no_gpu_has_nothing_to_place():
    assert (
        answer(Question(model="pocket", gpu="h200")).lines[-1].strip()
        == "no GPU is needed and nothing has to be placed"
    )


@pytest.mark.parametrize(
    ("files", "gib"),
    [
        ({}, 48),
        ({"memory.max": "max", "memory.current": "1"}, 48),
        ({"memory.max": str(32 * GIB), "memory.current": str(2 * GIB)}, 30),
        ({"memory/memory.limit_in_bytes": str(16 * GIB), "memory/memory.usage_in_bytes": "0"}, 16),
        ({"memory/memory.limit_in_bytes": str((1 << 63) - 4096), "memory/memory.usage_in_bytes": "0"}, 48),
        ({"memory.max": str(128 * GIB), "memory.current": str(2 * GIB)}, 128),
    ],
    ids=["no group", "no limit", "limit", "old limit", "old, no limit", "a machine that grows"],
)
def test_what_the_host_has_left_knows_the_limits_of_its_group(tmp_path, files, gib):
    (tmp_path / "proc").mkdir()
    rows = f"MemTotal: {64 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {48 * GIB // 1024} kB\n"
    (tmp_path / "proc/meminfo").write_text(rows)
    for name, content in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert host_memory(tmp_path) == gib * GIB
