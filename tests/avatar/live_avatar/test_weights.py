"""Loading the published layouts: what is accepted, what one line says of the rest, and how much memory it takes."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from published import save_shards
from safetensors.torch import save_file
from torch import nn

from avatar.live_avatar.weights import (
    Checkpoint,
    FromFile,
    FromGenerator,
    Lora,
    WeightsError,
    find_files,
    load_vae,
    open_checkpoint,
)


def tiny() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(tensor.shape, generator=generator).bfloat16() for key, tensor in tiny().state_dict().items()
    }


def save(kind, folder, tensors):
    if kind == "shards":
        return save_shards(folder, tensors)
    path = folder / f"model.{kind}"
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind != "bin")
    return path


KINDS = ["shards", "safetensors", "pth", "bin"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_comes_back_as_it_was_saved(kind, tmp_path, tensors):
    module = tiny()
    FromFile(module, open_checkpoint(save(kind, tmp_path, tensors))).give()
    for key, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, tensors[key], rtol=0, atol=0)


def test_the_wanted_precision_is_stored(tmp_path, tensors):
    module = tiny()
    FromFile(module, open_checkpoint(save("safetensors", tmp_path, tensors)), dtype=torch.float32).give()
    assert {tensor.dtype for tensor in module.parameters()} == {torch.float32}


def one_line(error: pytest.ExceptionInfo[WeightsError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda t: t.pop("2.weight"), r"2\.weight: missing"),
        (lambda t: t.update({"3.weight": torch.zeros(1)}), r"3\.weight: the network has no such tensor"),
        (lambda t: t.update({"0.bias": torch.zeros(7)}), r"0\.bias: shape \[7\], wanted \[6\]"),
    ],
)
def test_missing_foreign_and_misshapen_tensors_are_named(kind, spoil, says, tmp_path, tensors):
    spoil(tensors)
    path = save(kind, tmp_path, tensors)
    with pytest.raises(WeightsError, match=says) as error:
        FromFile(tiny(), open_checkpoint(path))
    assert one_line(error).startswith(str(path))


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_file_cut_off_anywhere_is_named(kind, keep, tmp_path, tensors):
    path = save(kind, tmp_path, tensors)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=re.escape(str(path))) as error:
        open_checkpoint(path)
    assert "fetch it again" in one_line(error)


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        '{"a": 1}',
        '{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        '{"a": {"dtype": "F32", "shape": [1]}}',
        "{",
    ],
)
def test_a_header_that_makes_no_sense_is_refused(header, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    with pytest.raises(WeightsError, match=re.escape(str(path))) as error:
        open_checkpoint(path)
    one_line(error)


def test_a_cut_off_shard_is_named(tmp_path, tensors):
    index = save_shards(tmp_path, tensors)
    shard = tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(WeightsError, match=r"00002-of-00003.*where its header speaks of"):
        open_checkpoint(index)


def test_a_missing_shard_is_named(tmp_path, tensors):
    index = save_shards(tmp_path, tensors)
    (tmp_path / "diffusion_pytorch_model-00003-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"00003-of-00003\.safetensors is missing"):
        open_checkpoint(index)


def test_an_index_and_its_shards_must_agree(tmp_path, tensors):
    index = save_shards(tmp_path, tensors)
    value = json.loads(index.read_text())
    value["weight_map"]["9.weight"] = "diffusion_pytorch_model-00001-of-00003.safetensors"
    index.write_text(json.dumps(value))
    with pytest.raises(WeightsError, match=r"9\.weight: the index names this tensor, the shard lacks it"):
        open_checkpoint(index)
    del value["weight_map"]["9.weight"], value["weight_map"]["2.weight"]
    index.write_text(json.dumps(value))
    with pytest.raises(WeightsError, match=r"2\.weight: a tensor that the index does not name"):
        open_checkpoint(index)


def test_a_pickle_with_code_in_it_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"0.weight": Evil()}, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match="holds more than tensors"):
        open_checkpoint(tmp_path / "model.pth")
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("name", ["missing.safetensors", "model.gguf"])
def test_missing_files_and_unknown_kinds_are_named(name, tmp_path):
    if name != "missing.safetensors":
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(WeightsError, match=name):
        open_checkpoint(tmp_path / name)


def test_the_vae_of_a_pth_takes_its_width_from_the_file(golden, tmp_path):
    torch.save(golden.tensors("vae.weights.safetensors"), tmp_path / "Wan2.1_VAE.pth")
    vae = load_vae(tmp_path / "Wan2.1_VAE.pth", dtype=torch.float32)
    assert vae.model.config.base_dim == golden.json("vae.config.json")["dim"]
    assert not any(tensor.is_meta for tensor in [*vae.parameters(), *vae.buffers()])


# LoRA


@pytest.fixture
def lora_case(golden):
    config = golden.json("lora.config.json")
    return golden.tensors("lora_base.weights.safetensors"), {"alpha": config["alpha"], "rank": config["rank"]}


def spell(tensors, prefix, default):
    """The same LoRA in another of the spellings that are about."""
    return {
        (prefix + key) if default else (prefix + key).replace(".default.", "."): tensor
        for key, tensor in tensors.items()
    }


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("name", ["lora", "lora_partial"])
def test_a_lora_merges_as_in_the_reference_however_its_keys_are_spelt(
    name, prefix, default, golden, lora_case, tmp_path
):
    base, options = lora_case
    save_file(spell(golden.tensors(f"{name}.safetensors"), prefix, default), tmp_path / "lora.safetensors")
    lora = Lora(open_checkpoint(tmp_path / "lora.safetensors"), **options)
    lora.check({key: tuple(tensor.shape) for key, tensor in base.items()})
    wanted = base | golden.tensors(f"{name}_merged.safetensors")
    for key, tensor in base.items():
        torch.testing.assert_close(lora(key, tensor), wanted[key], rtol=0, atol=1e-6)


class Shapes(Checkpoint):
    """A checkpoint of which only the header is there."""

    def __init__(self, shapes):
        self.path, self.shapes = Path("shapes"), shapes


def test_the_released_lora_fits_the_full_size_network(golden):
    """896 tensors of rank 128 on 448 layers, 676,331,520 numbers, is what is said of the released file."""
    base = {key: tuple(shape) for key, shape in golden.json("manifest_dit_14b.json").items()}
    shapes = {}
    for key, shape in base.items():
        layer = key.removesuffix(".weight")
        if key.startswith(("blocks.", "audio_injector.")) and re.search(r"\.([qkvo]|ffn\.[02])\.weight$", key):
            shapes[f"base_model.model.{layer}.lora_A.default.weight"] = (128, shape[1])
            shapes[f"base_model.model.{layer}.lora_B.default.weight"] = (shape[0], 128)
    assert len(shapes) == 896
    assert sum(math.prod(shape) for shape in shapes.values()) == 676_331_520
    Lora(Shapes(shapes)).check(base)


def test_a_lora_is_merged_in_float32_with_one_rounding(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weight, up, down = (torch.randn(s, generator=generator).bfloat16() for s in [(64, 48), (64, 8), (8, 48)])
    save_file({"x.lora_A.weight": down, "x.lora_B.weight": up}, tmp_path / "l.safetensors")
    merged = Lora(open_checkpoint(tmp_path / "l.safetensors"), alpha=4, rank=8)("x.weight", weight)
    exact = (weight.double() + 0.5 * (up.double() @ down.double())).bfloat16()
    assert merged.dtype == torch.bfloat16
    assert (merged != exact).float().mean() < 1e-3  # a float32 sum may fall on the other side of a tie


def test_replaced_tensors_come_before_the_merge_and_biases_can_be_replaced(tmp_path):
    save_file(
        {
            "base_model.model.x.base_layer.weight": torch.full((2, 2), 3.0),
            "base_model.model.x.base_layer.bias": torch.full((2,), 5.0),
            "base_model.model.x.lora_A.default.weight": torch.ones(1, 2),
            "base_model.model.x.lora_B.default.weight": torch.ones(2, 1),
        },
        tmp_path / "l.safetensors",
    )
    lora = Lora(open_checkpoint(tmp_path / "l.safetensors"), alpha=1, rank=1)
    assert lora("x.weight", torch.zeros(2, 2)).unique().tolist() == [4.0]
    assert lora("x.bias", torch.zeros(2)).unique().tolist() == [5.0]
    assert lora("y.bias", torch.zeros(2)).unique().tolist() == [0.0]


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"y.lora_A.weight": (1, 2), "y.lora_B.weight": (2, 1)}, "the network has no tensor y.weight"),
        ({"x.lora_A.weight": (1, 2)}, "its other half"),
        ({"x.lora_A.weight": (3, 2), "x.lora_B.weight": (2, 3)}, r"shape \[3, 2\], wanted \[1, 2\]"),
        ({"x.lora_magnitude_vector": (2,)}, "the network has no tensor x.lora_magnitude_vector"),
        ({"x.bias": (3,)}, r"shape \[3\], wanted \[2\]"),
        ({"x.bias": (2,), "base_model.model.x.bias": (2,)}, "the same tensor as"),
    ],
)
def test_a_lora_key_that_fits_nothing_is_named(tensors, says, tmp_path):
    save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, tmp_path / "l.safetensors")
    with pytest.raises(WeightsError, match=says) as error:
        Lora(open_checkpoint(tmp_path / "l.safetensors"), alpha=1, rank=1).check({"x.weight": (2, 2), "x.bias": (2,)})
    assert "l.safetensors" in one_line(error)


# folders


def make_folder(root, *, without=()):
    files = [
        "config.json",
        "diffusion_pytorch_model.safetensors.index.json",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "Wan2.1_VAE.pth",
        "google/umt5-xxl/tokenizer.json",
        "wav2vec2-large-xlsr-53-english/config.json",
    ]
    for name in files:
        if name not in without:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")


def test_the_base_folder_itself_and_its_parent_are_both_recognised(tmp_path):
    make_folder(tmp_path / "Wan2.2-S2V-14B")
    (tmp_path / "Live-Avatar").mkdir()
    (tmp_path / "Live-Avatar" / "liveavatar.safetensors").write_text("")
    above = find_files(tmp_path)
    assert above == find_files(tmp_path / "Wan2.2-S2V-14B")
    assert above.lora == tmp_path / "Live-Avatar" / "liveavatar.safetensors"


def test_what_is_missing_in_a_folder_is_listed_in_one_line(tmp_path):
    make_folder(tmp_path, without=("Wan2.1_VAE.pth", "google/umt5-xxl/tokenizer.json"))
    with pytest.raises(WeightsError) as error:
        find_files(tmp_path)
    assert one_line(error).endswith("missing: google/umt5-xxl/, Wan2.1_VAE.pth")


def test_a_folder_without_its_lora_is_refused_unless_it_is_merged_already(tmp_path):
    make_folder(tmp_path)
    with pytest.raises(WeightsError, match=r"liveavatar\.safetensors is missing"):
        find_files(tmp_path)
    assert find_files(tmp_path, need_lora=False).lora is None


def test_a_folder_that_is_not_there_says_how_to_get_one(tmp_path):
    with pytest.raises(WeightsError, match="avatard fetch"):
        find_files(tmp_path / "nothing")


# memory and random weights


def test_random_weights_are_finite_and_seeded():
    one, other = tiny(), tiny()
    FromGenerator(one, seed=3, dtype=torch.bfloat16).give()
    FromGenerator(other, seed=3, dtype=torch.bfloat16).give()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert torch.isfinite(one(torch.randn(3, 4).bfloat16())).all()


LOAD = """
    import resource, sys, psutil, torch
    from pathlib import Path
    from torch import nn
    from avatar.live_avatar.weights import FromFile, Lora, open_checkpoint

    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.ones(64, 64) @ torch.ones(64, 64)             # the matrix library's own buffers are no part of a load
    with torch.device("meta"):
        module = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(60)])
    process = psutil.Process()
    open("/proc/self/clear_refs", "w").write("5")       # the high-water mark starts anew
    before = process.memory_info().rss
    lora = Lora(open_checkpoint(folder / "lora.safetensors"), rank=8)
    FromFile(module, open_checkpoint(folder / "diffusion_pytorch_model.safetensors.index.json"), change=lora).give()
    peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(peak - before, sum(tensor.nbytes for tensor in module.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_with_a_lora_takes_less_than_a_fifth_more_than_the_network(tmp_path):
    weight = torch.zeros(1024, 1024, dtype=torch.bfloat16)
    save_shards(tmp_path, {f"{i}.weight": weight.clone() for i in range(60)})
    save_file(
        {f"{i}.lora_{side}.weight": torch.ones(shape) for i in range(60) for side, shape in
         (("A", (8, 1024)), ("B", (1024, 8)))},
        tmp_path / "lora.safetensors",
    )  # fmt: skip
    # Full-size tensors are over 32 MiB and always mapped one by one; these small ones would leave holes in the heap.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", textwrap.dedent(LOAD), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split())
    assert size == 60 * weight.nbytes
    assert peak < 1.2 * size
