"""Small checkpoints in the layouts in which Live Avatar is published."""

from __future__ import annotations

import json
import re
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
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=24, num_attention_heads=2, intermediate_size=64, conv_dim=(24,) * 7,
        do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True, num_conv_pos_embeddings=32,
        num_conv_pos_embedding_groups=4, vocab_size=33,
    )  # fmt: skip
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
    for key, tensor in dit.items():
        layer = key.removesuffix(".weight")
        if key.endswith(".weight") and re.search(r"\.(q|k|v|o|ffn\.0|ffn\.2)$", layer):
            out, inside = tensor.shape
            lora[f"base_model.model.{layer}.lora_A.default.weight"] = torch.randn(4, inside, generator=generator)
            lora[f"base_model.model.{layer}.lora_B.default.weight"] = 0.1 * torch.randn(out, 4, generator=generator)
    save_file(lora, root / "Live-Avatar" / "liveavatar.safetensors")
