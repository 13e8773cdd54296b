"""The prompt: cleaned, through the umT5 encoder once, and kept on disk: 11 GB are loaded for a new prompt only."""

from __future__ import annotations

import gc
import hashlib
import html
import logging
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from avatar.live_avatar.weights import FromFile, WeightsError, open_checkpoint

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

log = logging.getLogger(__name__)

TEXT_LENGTH = 512
TIED = ("encoder.embed_tokens.weight",)


def clean_prompt(prompt: str) -> str:
    """The prompt as the encoder's training saw text: mended Unicode, no HTML entities, single spaces. Case is kept."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return re.sub(r"\s+", " ", text).strip()


def load_text_encoder(
    path: Path,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    device: torch.device | str | None = None,
    by_layer: bool = False,
) -> UMT5EncoderModel:
    """The umT5 encoder of `models_t5_umt5-xxl-enc-bf16.pth`; its sizes are read from the file.

    by_layer: each layer is read when it is its turn, and let go of afterwards: 2.5 GB on the device instead of 11.
    """
    checkpoint = open_checkpoint(path)
    model = build_text_encoder(checkpoint.shapes, path)
    source = FromFile(model, checkpoint, rename=transformers_name, dtype=dtype, device=device, tied=TIED)
    if by_layer:
        source.give(lambda name: not name.startswith("encoder.block."))
        for i, layer in enumerate(model.encoder.block):
            _come_and_go(layer, source, f"encoder.block.{i}.")
    else:
        source.give()
    model.encoder.embed_tokens.weight = model.shared.weight
    return model


def _come_and_go(layer: nn.Module, source: FromFile, prefix: str) -> None:
    layer.register_forward_pre_hook(lambda *_: source.give(lambda name: name.startswith(prefix)))
    layer.register_forward_hook(lambda layer, *_: (layer.to("meta"), None)[1])


class PromptEncoder:
    """Prompts to features, through a store on disk.

    The encoder is loaded when the store does not know a prompt, used once, and let go again. A stored embedding is
    found by its content: the cleaned prompt, and what identifies encoder, tokenizer and precision.

    Args:
        weights: the encoder's file in its original layout.
        tokenizer: a folder for AutoTokenizer.
        store: where embeddings are kept, made when missing; None keeps none.
        dtype, device: of the encoder while it works; by_layer: see `load_text_encoder`.
        load: makes the encoder from `weights`.
    """

    def __init__(
        self,
        weights: Path,
        tokenizer: Path,
        store: Path | None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        by_layer: bool = False,
        load: Callable[..., UMT5EncoderModel] = load_text_encoder,
    ) -> None:
        self.weights, self.tokenizer, self.store = weights, tokenizer, store
        self.dtype, self.device, self._load = dtype, device, partial(load, by_layer=True) if by_layer else load

    def embed(self, prompt: str) -> Tensor:
        """Features of the real tokens, [n <= 512, C] on the CPU.

        Raises: WeightsError: encoder or tokenizer cannot be loaded.
        """
        text = clean_prompt(prompt)
        path = None if self.store is None else self.store / f"{self._key(text)}.safetensors"
        if path is not None and path.is_file():
            try:
                return load_file(path)["context"]
            except (SafetensorError, KeyError, OSError) as error:
                log.warning("%s: stored prompt is damaged, made again (%s)", path, error)
        ids, mask = self._tokenise(text)
        encoder = self._load(self.weights, dtype=self.dtype, device=self.device)
        context = encode_ids(encoder, ids, mask)[0].cpu()
        del encoder
        gc.collect()
        if path is not None:
            _store(path, context)
        return context

    def weight_bytes(self) -> int:
        """Bytes of the encoder's weights as they are used."""
        shapes = open_checkpoint(self.weights).shapes
        return sum(torch.Size(shape).numel() for shape in shapes.values()) * self.dtype.itemsize

    def _tokenise(self, text: str) -> tuple[Tensor, Tensor]:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(self.tokenizer), local_files_only=True)
        except Exception as error:  # transformers raises whatever a missing or damaged file leads it to
            reason = str(error).strip().partition("\n")[0]
            raise WeightsError(f"{self.tokenizer}: no tokenizer: {reason}") from error
        # Padding changes no valid row, so none is made.
        tokens: Any = tokenizer(text, truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
        return tokens["input_ids"], tokens["attention_mask"]

    def _key(self, text: str) -> str:
        identity = [_fingerprint(self.weights), str(self.dtype), str(TEXT_LENGTH)]
        identity += [_fingerprint(path) for path in sorted(self.tokenizer.glob("*")) if path.is_file()]
        return hashlib.sha256("\0".join([text, *identity]).encode()).hexdigest()


def encode_ids(encoder: UMT5EncoderModel, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Encoder output of each row's real tokens: [n, C] for each row of ids, mask [B, N]."""
    where = encoder.shared.weight.device
    with torch.no_grad():
        hidden = encoder(input_ids=ids.to(where), attention_mask=mask.to(where)).last_hidden_state
    return [row[: int(length)] for row, length in zip(hidden, mask.sum(1), strict=True)]


def _fingerprint(path: Path) -> str:
    """What tells two files apart without reading 11 GB: the length, and a hash of the first and the last MiB.

    The end of a .pth holds the checksum of every tensor in it.
    """
    size, mebibyte = path.stat().st_size, 1 << 20
    with path.open("rb") as file:
        head = file.read(mebibyte)
        file.seek(max(0, size - mebibyte))
        return f"{path.suffix}:{size}:{hashlib.sha256(head + file.read()).hexdigest()}"


def _store(path: Path, context: Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        os.close(handle)
        save_file({"context": context.contiguous()}, name)
        os.replace(name, path)
    except OSError as error:
        log.warning("%s: the prompt's embedding could not be stored, it will be made again: %s", path, error)


def build_text_encoder(shapes: Mapping[str, tuple[int, ...]], path: Path) -> UMT5EncoderModel:
    """The network without weights (meta device), its sizes read from the shapes of an original checkpoint.

    Raises: WeightsError: the tensors that say the sizes are missing.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    try:
        vocabulary, width = shapes["token_embedding.weight"]
        buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        inner = shapes["blocks.0.attn.q.weight"][0]
        hidden = shapes["blocks.0.ffn.fc1.weight"][0]
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path}: not a umT5 encoder in its original layout ({error})") from error
    layers = len({key.split(".")[1] for key in shapes if key.startswith("blocks.")})
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=inner // heads,
        d_ff=hidden,
        num_layers=layers,
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        layer_norm_epsilon=1e-6,
    )
    with torch.device("meta"):
        model = UMT5EncoderModel(config).eval().requires_grad_(False)
    model.encoder.embed_tokens.weight = model.shared.weight
    return model


_LAYER = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}
_TOP = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}


def transformers_name(key: str) -> str:
    """The transformers name of a tensor of the original umT5 file; a key that fits no rule comes back unchanged."""
    if match := re.match(r"^blocks\.(\d+)\.(.+)$", key):
        return f"encoder.block.{match[1]}.{_LAYER.get(match[2], match[2])}"
    return _TOP.get(key, key)
