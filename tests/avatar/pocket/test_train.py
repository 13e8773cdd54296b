"""Training: every stage makes a step on the CPU, and a run that was cut goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from avatar.pocket import train
from avatar.pocket.ear import Ear
from avatar.pocket.network import build_dit
from avatar.pocket.reader import Reader
from avatar.pocket.vae import PocketVae, VaeConfig
from avatar.pocket.world import SIZE, draw

SIDE = 32
"""Of the pictures that are drawn here, pixels."""

pytestmark = pytest.mark.usefixtures("one_thread")

A_STEP_S = 1e-6
"""A budget that the first step exceeds."""

SIZES: dict[str, dict[str, int]] = {
    "vae": {"batch": 1, "frames": 4, "unseen": 16},
    "ear": {"batch": 2, "frames": 4},
    "meter": {"batch": 4},
    "reader": {"batch": 2, "latents": 6, "pool_size": 4, "first": 1},
    "dit": {"batch": 2, "latents": 6, "pool_size": 4, "first": 1},
    "seams": {"batch": 2, "latents": 6, "window": 2, "past": 1, "pool_size": 4, "first": 1, "fresh": 2},
    "polish": {"batch": 1, "latents": 3},
}


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> train.Workshop:
    """Twenty seconds of made-up speech, pictures of 32x32, small pools."""
    rng = np.random.default_rng(0)
    for which in ("train", "test"):
        np.savez(
            tmp_path / f"speech_{which}.npz",
            mel=rng.integers(0, 256, (2000, 80), dtype=np.uint8),
            mouth=rng.integers(0, 256, (2000, 4), dtype=np.uint8),
            mel_range=np.array([-5.0, 2.0]),
            mouth_range=np.array([0.0, 1.0]),
        )
    make, weights_of = train.Pool.make, train.weights_of
    monkeypatch.setattr(train.Pool, "make", lambda pool, count: make(pool, 2))
    monkeypatch.setattr(train, "SIZE", SIDE)
    monkeypatch.setattr(train, "draw", lambda person, motion: draw(person, motion, SIDE))
    monkeypatch.setattr(train, "weights_of", lambda clips, size: weights_of(clips, size * SIDE // SIZE))
    return train.Workshop(tmp_path, tmp_path, A_STEP_S, torch.device("cpu"))


@pytest.fixture
def trained_before(shop: train.Workshop) -> None:
    """Stages read what the stages before them wrote."""
    torch.manual_seed(0)
    dit = build_dit()
    dit.initialize()
    reader = Reader(SIDE // VaeConfig.pixels_per_latent)
    for name, module in {"vae": PocketVae(), "ear": Ear(), "reader": reader, "dit": dit}.items():
        train.store(module.state_dict(), shop.out / f"{name}.safetensors")


def facts(shop: train.Workshop, stage: str) -> dict[str, Any]:
    return json.loads((shop.out / f"{stage}.checkpoint.json").read_text())


def step_and_go_on(shop: train.Workshop, stage: str, results: list[str]) -> None:
    """Run a stage for one step, then with a little more time for a second one; look at what is left each time."""
    run: Callable[..., None] = train.STAGES[stage]
    run(shop, **SIZES[stage])
    assert facts(shop, stage)["step"] == 1
    shop.seconds = facts(shop, stage)["spent"] + A_STEP_S
    run(shop, **SIZES[stage])
    assert facts(shop, stage)["step"] == 2
    for name in results:
        weights = load_file(shop.out / f"{name}.safetensors")
        assert all(w.dtype == torch.bfloat16 and w.isfinite().all() for w in weights.values())


def test_the_autoencoder_trains_and_goes_on(shop):
    step_and_go_on(shop, "vae", ["vae"])
    std = load_file(shop.out / "vae.safetensors")["std"]
    assert (std != 1).all()


def test_the_ear_trains_and_goes_on(shop):
    step_and_go_on(shop, "ear", ["ear"])


@pytest.mark.usefixtures("trained_before")
def test_the_reader_trains_and_goes_on(shop):
    step_and_go_on(shop, "reader", ["reader"])


def test_a_reading_is_of_its_own_latent_alone():
    torch.manual_seed(0)
    latents = torch.randn(2, VaeConfig.channels, 3, 16, 16)
    reader = Reader(16)
    before = reader(latents)
    assert before.shape == (2, 3 * train.FRAMES_PER_LATENT, len(train.MOVES))
    latents[1, :, 2] += 1
    changed = (reader(latents) != before).any(2)
    assert changed.tolist() == [[False] * 12, [False] * 8 + [True] * 4]


@pytest.mark.usefixtures("trained_before")
@pytest.mark.parametrize(("stage", "results"), [("dit", ["dit"]), ("polish", ["dit_polished", "vae_polished"])])
def test_the_transformer_trains_and_goes_on(shop, stage, results):
    step_and_go_on(shop, stage, results)


def test_the_mean_of_runs_is_that_of_their_weights(tmp_path):
    for name, value in ("a", 1.0), ("b", 2.0), ("c", 1.5):
        train.store({"weight": torch.full((2, 3), value), "bias": torch.tensor([value, -value])}, tmp_path / name)
    train.lay_mean(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    mean = load_file(tmp_path / "a")
    assert (mean["weight"] == 1.5).all()
    assert mean["bias"].tolist() == [1.5, -1.5]
    assert mean["bias"].dtype == torch.bfloat16


@pytest.mark.usefixtures("trained_before")
def test_the_decoder_learns_its_seams_and_leaves_the_latents_alone(shop):
    step_and_go_on(shop, "seams", ["vae_seams"])
    before, after = (load_file(shop.out / f"{name}.safetensors") for name in ("vae", "vae_seams"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)


def test_the_border_ratio_tells_a_jump_where_a_latent_begins_from_even_motion():
    even = torch.arange(32.0)[None, :, None, None, None].expand(1, -1, 3, 2, 2)
    latent = even // train.FRAMES_PER_LATENT
    assert train.border_ratio(even) == pytest.approx(1)
    assert train.border_ratio(even + latent) == pytest.approx(2)


@pytest.mark.usefixtures("trained_before")
def test_the_meter_trains_and_goes_on(shop, monkeypatch):
    monkeypatch.setattr(train, "draw", draw)  # it reads pictures of the full size only
    step_and_go_on(shop, "meter", ["meter"])


def test_a_run_that_was_cut_goes_on_with_its_weights_and_momenta(shop):
    torch.manual_seed(0)

    def make() -> tuple[Ear, train.Run]:
        ear = Ear()
        return ear, train.Run("ear", shop, {"ear": ear}, train.Muon(ear.parameters(), lr=0.01, adam_lr=1e-3), 0.9)

    shop.seconds, shop.stop_at = 1000.0, 0.0
    ear, run = make()
    steps = run.steps(warm_up=1, decay_from=0.5)
    next(steps)
    run.update(ear(torch.ones(1, 32, 80))[1].square().mean())
    with pytest.raises(SystemExit, match="run again to go on"):
        next(steps)
    other, again = make()
    assert again.step == 1
    torch.testing.assert_close(other.state_dict(), ear.state_dict())
    for p, q in zip(ear.parameters(), other.parameters()):
        assert run.optimiser.state[p].keys() == again.optimiser.state[q].keys()
        torch.testing.assert_close(dict(run.optimiser.state[p]), dict(again.optimiser.state[q]))


def test_weights_of_some_hundred_steps_ago_come_back_after_a_divergence(shop):
    ear = Ear()
    run = train.Run("ear", shop, {"ear": ear}, train.Muon(ear.parameters(), lr=0.01, adam_lr=1e-3), 0.9)
    run.guard(torch.tensor(1.0))
    before = {name: value.clone() for name, value in ear.state_dict().items()}
    with torch.no_grad():
        for p in ear.parameters():
            p.fill_(torch.nan)
    run.guard(torch.tensor(torch.nan))
    torch.testing.assert_close(dict(ear.state_dict()), before)
    assert run.rate == 0.5
