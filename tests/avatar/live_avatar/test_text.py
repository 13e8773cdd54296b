"""The prompt's way to features: cleaning, the umT5 encoder against the reference, the store on disk."""

from __future__ import annotations

import pytest
import torch
from published import save_tokenizer

from avatar.live_avatar.text import (
    PromptEncoder,
    build_text_encoder,
    clean_prompt,
    encode_ids,
    load_text_encoder,
    transformers_name,
)
from avatar.live_avatar.weights import FromGenerator, WeightsError


@pytest.fixture(scope="module")
def weights(golden, tmp_path_factory):
    """The golden encoder in its original layout: a .pth of torch.save."""
    path = tmp_path_factory.mktemp("t5") / "models_t5_umt5-xxl-enc-bf16.pth"
    torch.save(golden.tensors("t5.weights.safetensors"), path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


def test_the_full_size_keys_and_shapes_are_those_of_the_released_encoder(golden, tmp_path):
    manifest = {key: tuple(shape) for key, shape in golden.json("manifest_t5_xxl.json").items()}
    model = build_text_encoder(manifest, tmp_path)
    ours = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    del ours["encoder.embed_tokens.weight"]
    assert ours == {transformers_name(key): shape for key, shape in manifest.items()}
    config = model.config
    assert (config.d_model, config.d_kv, config.d_ff, config.num_layers, config.num_heads) == (4096, 64, 10240, 24, 64)
    assert sum(tensor.numel() for tensor in model.parameters()) == 5_680_910_336


def test_the_encoder_gives_the_reference_features(golden, weights):
    cases = golden.tensors("t5_cases.safetensors")
    encoder = load_text_encoder(weights, dtype=torch.float32)
    rows = encode_ids(encoder, cases["ids"], cases["mask"])
    for row, context in zip(rows, (cases[f"context.{n}"] for n in range(3)), strict=True):
        torch.testing.assert_close(row, context, rtol=0, atol=1e-4)
        assert (row - context).pow(2).mean().sqrt() <= 2e-5 * context.pow(2).mean().sqrt()


def test_padding_changes_no_real_token(golden, weights):
    cases = golden.tensors("t5_cases.safetensors")
    encoder = load_text_encoder(weights, dtype=torch.float32)
    row = int(cases["mask"].sum(1).argmin())
    length = int(cases["mask"][row].sum())
    short = encode_ids(encoder, cases["ids"][row : row + 1, :length], cases["mask"][row : row + 1, :length])[0]
    torch.testing.assert_close(short, cases[f"context.{row}"], rtol=0, atol=1e-5)


def test_every_weight_is_bf16_when_bf16_is_asked_for(weights):
    encoder = load_text_encoder(weights)
    assert {tensor.dtype for tensor in encoder.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  A person\n\tspeaks ", "A person speaks"),
        ("caf\u00c3\u00a9 &amp;amp; bar", "caf\u00e9 & bar"),
        ("non\u00a0breaking\u3000wide", "non breaking wide"),
        ("", ""),
    ],
)
def test_prompts_are_cleaned(prompt, cleaned):
    assert clean_prompt(prompt) == cleaned


class CountingLoad:
    def __init__(self):
        self.count = 0

    def __call__(self, path, **options):
        self.count += 1
        return load_text_encoder(path, **options)


def test_the_encoder_is_loaded_for_a_new_prompt_only(weights, tokenizer, tmp_path):
    load = CountingLoad()
    encoder = PromptEncoder(weights, tokenizer, tmp_path / "store", load=load)
    first = encoder.embed("a person speaks")
    again = PromptEncoder(weights, tokenizer, tmp_path / "store", load=load).embed("  a  person speaks")
    assert load.count == 1
    assert first.shape == (4, 64)
    assert first.dtype == torch.bfloat16
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    encoder.embed("a person")
    assert load.count == 2


def test_another_encoder_or_precision_is_another_entry(golden, weights, tokenizer, tmp_path):
    changed = tmp_path / "other.pth"
    torch.save({key: tensor * 0.5 for key, tensor in golden.tensors("t5.weights.safetensors").items()}, changed)
    ours = PromptEncoder(weights, tokenizer, tmp_path / "store").embed("a person")
    other = PromptEncoder(changed, tokenizer, tmp_path / "store").embed("a person")
    assert not torch.equal(ours, other)
    precise = PromptEncoder(weights, tokenizer, tmp_path / "store", dtype=torch.float32).embed("a person")
    assert precise.dtype == torch.float32


def test_a_damaged_entry_is_made_again(weights, tokenizer, tmp_path):
    store = tmp_path / "store"
    first = PromptEncoder(weights, tokenizer, store).embed("a person")
    (entry,) = store.iterdir()
    entry.write_bytes(b"gone")
    torch.testing.assert_close(PromptEncoder(weights, tokenizer, store).embed("a person"), first, rtol=0, atol=0)
    assert entry.stat().st_size > 100


def test_a_store_that_cannot_be_written_is_no_failure(weights, tokenizer, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert PromptEncoder(weights, tokenizer, tmp_path / "file" / "store").embed("a person").shape == (3, 64)
    assert "could not be stored" in caplog.text


def test_a_missing_tokenizer_is_one_line(weights, tmp_path):
    with pytest.raises(WeightsError, match="no tokenizer"):
        PromptEncoder(weights, tmp_path, None).embed("a person")


def test_long_prompts_are_cut_to_512_tokens(weights, tokenizer):
    assert PromptEncoder(weights, tokenizer, None).embed("person " * 600).shape == (512, 64)


def test_a_random_encoder_keeps_its_tied_embedding(golden, tmp_path):
    shapes = {key: tuple(tensor.shape) for key, tensor in golden.tensors("t5.weights.safetensors").items()}
    model = build_text_encoder(shapes, tmp_path)
    FromGenerator(model, seed=1, dtype=torch.float32).give()
    assert model.encoder.embed_tokens.weight.data_ptr() == model.shared.weight.data_ptr()
    assert torch.isfinite(encode_ids(model, torch.tensor([[3, 4, 1]]), torch.ones(1, 3, dtype=torch.int64))[0]).all()
