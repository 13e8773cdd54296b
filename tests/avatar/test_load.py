"""Models by name or folder: the right family, the size and steps asked for, and a plain line where that cannot be."""

from __future__ import annotations

import os
import re

import pytest
import torch

from audio.errors import AvatardError
from avatar.load import LiveThreads, load_model, thread_count
from avatar.pocket.generator import DEFAULT_STEPS, PocketModel, shipped_weights


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_pocket_comes_with_the_package():
    model = load_model("pocket")
    assert isinstance(model, PocketModel)
    assert (model.spec.width, model.spec.height, model.options.steps) == (256, 256, DEFAULT_STEPS)


def test_a_folder_of_pocket_weights_is_known_by_its_files():
    assert isinstance(load_model(str(shipped_weights())), PocketModel)


def test_steps_and_options_arrive():
    model = load_model("pocket", size=(256, 256), steps=4, options={"motion": 0.5, "precision": "fp32", "steps": 1})
    assert isinstance(model, PocketModel)
    assert (model.options.steps, model.options.motion, model.networks.dtype) == (4, 0.5, torch.float32)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"model": "poket"}, "model poket: no such model or folder; did you mean 'pocket'?"),
        ({"model": "/nowhere/x"}, "model /nowhere/x: no such model or folder; name pocket, or a folder of weights"),
        ({"model": "live_avatar"}, "model live_avatar: name the folder that holds its weights, or live-avatar-14b"),
        ({"size": (512, 384)}, "size 512x384: pocket draws 256x256 only; leave the size out"),
        ({"steps": 3}, "steps: 3; pocket was trained for 1, 2 or 4"),
        ({"options": {"precison": "bf16"}}, "precison: no option of pocket; did you mean 'precision'?"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(given, line):
    with pytest.raises(AvatardError, match=f"^{re.escape(line)}$"):
        load_model(**({"model": "pocket"} | given))


def test_an_unknown_option_of_live_avatar_is_found_before_its_weights_are_read(tmp_path):
    with pytest.raises(AvatardError, match=r"^reanchr: no option of live_avatar; did you mean 'reanchor'\?$"):
        load_model(str(tmp_path), options={"reanchr": "none"})


@pytest.mark.parametrize("given", [{"random_weights": True}, {"vram": "24GiB"}, {"offload": "group"}])
def test_what_is_said_of_a_gpu_is_refused_where_there_is_none(tmp_path, given):
    model = "live_avatar" if "random_weights" in given else str(tmp_path)
    with pytest.raises(AvatardError, match=rf"^{next(iter(given))}: there is no GPU here; leave it out$"):
        load_model(model, options=given)


def test_an_empty_folder_is_no_model(tmp_path):
    with pytest.raises(AvatardError, match=re.escape(str(tmp_path))):
        load_model(str(tmp_path))


def test_omp_num_threads_is_obeyed(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert thread_count() == thread_count(live=True) == 3
    load_model("pocket")
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("given", ["", "many", "0"])
def test_without_a_number_there_is_a_thread_for_each_core(monkeypatch, given):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    cores = len(os.sched_getaffinity(0))
    assert thread_count() == cores
    assert thread_count(live=True) == max(1, cores - 1)


@pytest.mark.parametrize(
    ("taken", "all_of_them"),
    [
        ((3.0, 0.2, 0.2), False),
        ((3.0, 0.4, 0.4), True),
        ((3.0, 0.4, 0.4, 0.6, 0.35, 0.3, 0.1), True),
        ((3.0, 0.4, 0.4, 0.6, 0.5, 0.35), True),
        ((3.0, 0.4, 0.4, 0.3, 0.39, 0.4), False),
        ((3.0, 0.9, 0.2, 0.4, 0.4, 0.4), False),
    ],
    ids=["fast enough", "too slow", "faster with all", "slow at first", "all are no faster", "slow only once"],
)
def test_on_air_a_core_is_left_to_the_encoder_where_the_model_can_spare_it(monkeypatch, taken, all_of_them):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before, threads = torch.get_num_threads(), LiveThreads()
    try:
        for seconds in taken:
            threads.took(seconds, block_seconds=0.48)
        threads.use(live=True)
        assert torch.get_num_threads() == (4 if all_of_them else 3)
        threads.use(live=False)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
