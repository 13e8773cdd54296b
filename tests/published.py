"""Checkpoints in the layouts in which Live Avatar is published: small ones, and one at full size.

python tests/published.py FOLDER      # 47 GB of random numbers; to measure loading, on a GPU
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Wav2Vec2Config, Wav2Vec2ForCTC


def save_shards(folder, tensors, stem="diffusion_pytorch_model", shards=3):
    """The layout of a sharded release: `stem-0000i-of-0000n.safetensors` and an index."""
    keys = list(tensors)
    weight_map = {}
    for i in range(shards):
        name = f"{stem}-{i + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key].contiguous() for key in keys[i::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = folder / f"{stem}.safetensors.index.json"
    size = sum(tensor.nbytes for tensor in tensors.values())
    index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    return index


def save_tokenizer(folder):
    """A tokenizer of a few words, in the files AutoTokenizer reads."""
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "person": 4, "speaks": 5}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)


def speech_like(samples: int) -> np.ndarray:
    """Noise that swells and fades four times a second: float32 [samples]."""
    noise = np.random.default_rng(0).standard_normal(samples)
    swell = 0.55 + 0.45 * np.sin(np.arange(samples) * (2 * np.pi * 4 / 16_000))
    return (0.1 * swell * noise).astype(np.float32)


def write_speech(folder: Path) -> None:
    """A small wav2vec2 folder with random weights under their published names: 24 layers, 32 wide."""
    write_speech_of(folder, Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=24, num_attention_heads=2, intermediate_size=64, conv_dim=(24,) * 7,
        do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True, num_conv_pos_embeddings=32,
        num_conv_pos_embedding_groups=4, vocab_size=33,
    ))  # fmt: skip


def write_speech_of(folder: Path, config: Wav2Vec2Config) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = Wav2Vec2ForCTC(config).state_dict()
    tensors = {}
    for key, tensor in state.items():
        key = key.replace("parametrizations.weight.original0", "weight_g")
        tensors[key.replace("parametrizations.weight.original1", "weight_v")] = tensor.clone()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True}))
    torch.save(tensors, folder / "pytorch_model.bin")


def write_checkpoint(golden, root: Path) -> None:
    """The golden networks in one folder, with a LoRA of rank 4 beside them."""
    base = root / "Wan2.2-S2V-14B"
    base.mkdir()
    config = golden.json("dit_main.config.json")
    (base / "config.json").write_text(json.dumps(config | {"_class_name": "WanModel_S2V", "something_new": 1}))
    dit = golden.tensors("dit_main.weights.safetensors")
    save_shards(base, dit)
    torch.save(golden.tensors("t5.weights.safetensors"), base / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(golden.tensors("vae.weights.safetensors"), base / "Wan2.1_VAE.pth")
    save_tokenizer(base / "google" / "umt5-xxl")
    write_speech(base / "wav2vec2-large-xlsr-53-english")
    (root / "Live-Avatar").mkdir()
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for layer, (out, inside) in _low_rank({key: list(tensor.shape) for key, tensor in dit.items()}):
        lora[f"base_model.model.{layer}.lora_A.default.weight"] = torch.randn(4, inside, generator=generator)
        lora[f"base_model.model.{layer}.lora_B.default.weight"] = 0.1 * torch.randn(out, 4, generator=generator)
    save_file(lora, root / "Live-Avatar" / "liveavatar.safetensors")


# At full size


DATA = Path(__file__).parent / "data" / "golden"


def write_full_size(root: Path) -> None:
    """All published files but the tokenizer's vocabulary, with random numbers: bfloat16, the VAE float32."""
    base = root / "Wan2.2-S2V-14B"
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps({"_class_name": "WanModel_S2V", "model_type": "s2v"}))
    save_tokenizer(base / "google" / "umt5-xxl")
    (root / "Live-Avatar").mkdir()
    dit = json.loads((DATA / "manifest_dit_14b.json").read_text())
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-00004.safetensors" for i in range(4)]
    size = sum(2 * int(np.prod(shape)) for shape in dit.values())
    weight_map = {key: names[i * 4 // len(dit)] for i, key in enumerate(dit)}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (base / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    lora = {
        f"base_model.model.{layer}.lora_{side}.default.weight": shape
        for layer, (out, inside) in _low_rank(dit)
        for side, shape in (("A", [128, inside]), ("B", [out, 128]))
    }

    def shard(name: str) -> None:
        part = {key: dit[key] for key in dit if weight_map[key] == name}
        save_file(_random(part, torch.bfloat16), base / name, metadata={"format": "pt"})

    def others() -> None:
        save_file(_random(lora, torch.bfloat16), root / "Live-Avatar" / "liveavatar.safetensors")
        vae = json.loads((DATA / "manifest_vae.json").read_text())
        torch.save(_random(vae, torch.float32), base / "Wan2.1_VAE.pth")
        large = Wav2Vec2Config(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
            do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True, vocab_size=33,
        )  # fmt: skip
        write_speech_of(base / "wav2vec2-large-xlsr-53-english", large)

    def text() -> None:
        shapes = json.loads((DATA / "manifest_t5_xxl.json").read_text())
        torch.save(_random(shapes, torch.bfloat16), base / "models_t5_umt5-xxl-enc-bf16.pth")

    with ThreadPoolExecutor() as pool:
        for done in [*(pool.submit(shard, name) for name in names), pool.submit(others), pool.submit(text)]:
            done.result()


def _low_rank(shapes: dict[str, list[int]]) -> Iterator[tuple[str, list[int]]]:
    """The layers that the published LoRA changes."""
    for key, shape in shapes.items():
        layer = key.removesuffix(".weight")
        if layer != key and re.search(r"\.(q|k|v|o|ffn\.0|ffn\.2)$", layer):
            yield layer, shape


def _random(shapes: dict[str, list[int]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = {}
    for key, shape in shapes.items():
        spread = 1.0 if len(shape) < 2 else float(np.prod(shape[1:])) ** -0.5
        made[key] = (torch.randn(shape, device=device) * (0.1 if "lora" in key else 1) * spread).to(dtype).cpu()
    return made


if __name__ == "__main__":
    write_full_size(Path(sys.argv[1]))
