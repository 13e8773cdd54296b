"""Weights from the layouts they were published in, tensor by tensor, strictly.

A network is built on the meta device and each tensor goes from its file to its place, so that host memory never holds
more than the network and a few tensors. Every key has to find its place, every place its key, with the right shape; all
of that is known from the headers before the first byte of weights is read.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from audio.errors import AvatardError

if TYPE_CHECKING:
    from transformers import Wav2Vec2Model

    from avatar.live_avatar.vae import WanVae

DIT_STEM = "diffusion_pytorch_model"
TEXT_STEM = "models_t5_umt5-xxl-enc-bf16"
VAE_STEM = "Wan2.1_VAE"
TOKENIZER_FOLDER = "google/umt5-xxl"
SPEECH_FOLDER = "wav2vec2-large-xlsr-53-english"
LORA_NAME = "liveavatar.safetensors"
BASE_FOLDERS = ("Wan2.2-S2V-14B",)
LORA_FOLDERS = ("Live-Avatar", "LiveAvatar")

Rename = Callable[[str], str | None]
"""From a key in a file to a name in the network; None for a tensor the network has no use for."""

Change = Callable[[str, Tensor], Tensor]
"""From a file's key and tensor to the tensor that is stored: a LoRA, for instance."""


class WeightsError(AvatardError):
    """A checkpoint that cannot be loaded; names the file and the key."""


# ---------------------------------------------------------------------------------------------------------------------
# files


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Checkpoint:
    """Named tensors in one file or in shards; `shapes` is known at once, `read` fetches one tensor."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def read(self, key: str) -> Tensor:
        """That tensor, on the CPU, as stored."""
        raise NotImplementedError


class SafetensorsFile(Checkpoint):
    """One .safetensors file, read with plain reads.

    Not by the library's memory map: its pages stay counted to the process as long as one tensor of the file lives,
    which doubles the memory of a load that changes tensors on the way.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 0 < length <= size - 8:
                    raise WeightsError(f"{path}: not a safetensors file, or cut off in its header; fetch it again")
                header = json.loads(file.read(length))
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise WeightsError(f"{path}: not a safetensors file: its header is no JSON; fetch it again") from error
        self._entries: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
        end = 8 + length
        try:
            for key, entry in header.items():
                if key == "__metadata__":
                    continue
                dtype = _DTYPES[entry["dtype"]]
                shape, (start, stop) = tuple(int(side) for side in entry["shape"]), entry["data_offsets"]
                if start < 0 or stop - start != math.prod(shape) * dtype.itemsize:
                    raise WeightsError(
                        f"{path}: {key}: {stop - start} bytes do not hold {list(shape)} of {entry['dtype']}"
                    )
                self._entries[key] = (dtype, shape, 8 + length + start)
                end = max(end, 8 + length + stop)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"{path}: a header that is not understood ({_first_line(error)})") from error
        if size != end:
            raise WeightsError(f"{path}: {size} bytes long where its header speaks of {end}; fetch it again")
        self.shapes = {key: shape for key, (_, shape, _) in self._entries.items()}

    def read(self, key: str) -> Tensor:
        dtype, shape, offset = self._entries[key]
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            with self.path.open("rb", buffering=0) as file:
                file.seek(offset)
                buffer = memoryview(tensor.view(-1).view(torch.uint8).numpy())
                while buffer:
                    count = file.readinto(buffer)
                    if not count:
                        raise WeightsError(f"{self.path}: {key}: the file ends inside this tensor; fetch it again")
                    buffer = buffer[count:]
        return tensor


class SafetensorsShards(Checkpoint):
    """A `*.safetensors.index.json` and the shards it names."""

    def __init__(self, index: Path) -> None:
        self.path = index
        try:
            names = json.loads(index.read_text())["weight_map"]
        except OSError as error:
            raise WeightsError(f"{index}: cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{index}: not an index of shards (no weight_map)") from error
        missing = sorted({name for name in names.values() if not (index.parent / name).is_file()})
        if missing:
            raise WeightsError(f"{index}: shard {missing[0]} is missing ({len(missing)} in all); fetch it again")
        files = {name: SafetensorsFile(index.parent / name) for name in sorted(set(names.values()))}
        self._file = {}
        for key, name in names.items():
            if key not in files[name].shapes:
                raise WeightsError(f"{index.parent / name}: {key}: the index names this tensor, the shard lacks it")
            self._file[key] = files[name]
        for name, file in files.items():
            extra = [key for key in file.shapes if names.get(key) != name]
            if extra:
                raise WeightsError(f"{index.parent / name}: {extra[0]}: a tensor that the index does not name")
        self.shapes = {key: file.shapes[key] for key, file in self._file.items()}

    def read(self, key: str) -> Tensor:
        return self._file[key].read(key)


class TorchFile(Checkpoint):
    """A flat state dict written by torch.save; read with weights_only, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            state = _torch_load(path)
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from error
        except pickle.UnpicklingError as error:
            raise WeightsError(f"{path}: holds more than tensors, or is damaged; fetch it again") from error
        except (RuntimeError, EOFError, ValueError, KeyError) as error:
            raise WeightsError(f"{path}: damaged or cut off; fetch it again ({_first_line(error)})") from error
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise WeightsError(f"{path}: not a flat table of tensors")
        self._state: dict[str, Tensor] = state
        self.shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}

    def read(self, key: str) -> Tensor:
        return self._state[key]


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # torch.save before 1.6 was no zip file


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:160]


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at that path: a .safetensors file, an index of shards, or a .pth/.bin of torch.save.

    Raises: WeightsError: missing, damaged, cut off, or of no known kind.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    if path.name.endswith(".index.json"):
        return SafetensorsShards(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in (".pth", ".pt", ".bin"):
        return TorchFile(path)
    raise WeightsError(f"{path}: unknown kind of checkpoint; want .safetensors, .safetensors.index.json, .pth or .bin")


# ---------------------------------------------------------------------------------------------------------------------
# from file to network


READERS = 4
"""Tensors that are read at a time: a card takes them in faster than one thread copies them into fresh memory."""


class Source(Protocol):
    """Where a network's tensors come from, a few at a time."""

    def give(self, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Fill in the network's tensors of these names, in place; each name once."""
        ...


class FromFile:
    """A network's tensors out of a checkpoint, one after the other, while the next few are read.

    Args:
        module: its tensors may be on the meta device, and are replaced, not copied into.
        dtype: of the stored floating point tensors; as in the file without it.
        device: where they go, before `change` and the change of type; the CPU without it.
        tied: names in the network that share another's tensor and have none of their own in the file.
    Raises: WeightsError: a key without place, a place without key, a wrong shape.
    """

    def __init__(
        self,
        module: nn.Module,
        checkpoint: Checkpoint,
        *,
        rename: Rename = lambda key: key,
        change: Change | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        tied: Iterable[str] = (),
    ) -> None:
        self._module, self._checkpoint = module, checkpoint
        self._change, self._dtype, self._device = change, dtype, device
        wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict(keep_vars=True).items()}
        for shared in tied:
            wanted.pop(shared)
        self._keys: dict[str, str] = {}
        for key, shape in checkpoint.shapes.items():
            name = rename(key)
            if name is None:
                continue
            if name not in wanted:
                raise WeightsError(f"{checkpoint.path}: {key}: the network has no such tensor")
            if name in self._keys:
                raise WeightsError(f"{checkpoint.path}: {key}: the same tensor as {self._keys[name]}")
            if wanted[name] != shape:
                raise WeightsError(f"{checkpoint.path}: {key}: shape {list(shape)}, wanted {list(wanted[name])}")
            self._keys[name] = key
        missing = [name for name in wanted if name not in self._keys]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise WeightsError(f"{checkpoint.path}: {missing[0]}{more}: missing")

    def give(self, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """See `Source.give`. Raises: WeightsError: a damaged file."""
        named = [(name, key) for name, key in self._keys.items() if wanted(name)]
        with ThreadPoolExecutor(READERS, thread_name_prefix="weights") as pool:
            ahead: deque[Future[Tensor]] = deque(pool.submit(self._read, key) for _, key in named[:READERS])
            for i, (name, key) in enumerate(named):
                tensor = ahead.popleft().result()
                if i + READERS < len(named):
                    ahead.append(pool.submit(self._read, named[i + READERS][1]))
                if self._change is not None:
                    tensor = self._change(key, tensor)
                _assign(self._module, name, tensor.to(dtype=self._dtype if tensor.is_floating_point() else None))

    def _read(self, key: str) -> Tensor:
        return self._checkpoint.read(key).to(device=self._device)


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


class FromGenerator:
    """A network's tensors out of a generator: its speed and its memory, not its pictures.

    Matrices and kernels are normal with variance 1 / fan-in, gains 1, biases 0, so that activations stay finite at any
    depth. Tensors are made on `device`; one tensor that two names share stays shared.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        place = torch.device(device or "cpu")
        self._module, self._device = module, device
        self._generator = None if place.type == "meta" else torch.Generator(device=place).manual_seed(seed)
        self._tied = dict(getattr(module, "_tied_weights_keys", None) or {})
        self._like = {
            name: (tensor.shape, (dtype or tensor.dtype) if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in module.state_dict().items()
            if name not in self._tied
        }

    def give(self, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """See `Source.give`; the numbers depend on the order in which names are wanted."""
        for name in filter(wanted, self._like):
            shape, kind = self._like[name]
            new = torch.empty(shape, dtype=kind, device=self._device)
            if not kind.is_floating_point or name.endswith("bias"):
                new.zero_()
            elif sum(side > 1 for side in shape) < 2:
                new.fill_(1)
            else:
                new.normal_(0, (new.numel() / shape[0]) ** -0.5, generator=self._generator)
            _assign(self._module, name, new)
        for name, source in self._tied.items():
            if wanted(source):
                _assign(self._module, name, self._module.get_parameter(source))


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


_ADAPTER = re.compile(r"^(?P<layer>.+)\.lora_(?P<side>[AB])(\.default)?\.weight$")
_PREFIX = "base_model.model."


@dataclass
class Lora:
    """Low-rank changes to linear layers, and whole tensors that replace the base's; a `Change` for `FromFile`.

    W becomes W + (alpha / rank) B A, computed in float32 and rounded once to W's dtype; biases stay. Replacements come
    first, so a layer may have both. Keys may carry the prefix `base_model.model.` and the adapter's name `.default`, or
    not (spec 1.4); a key that fits nothing is an error, where the reference passes over it.
    """

    checkpoint: Checkpoint
    alpha: float = 64.0
    rank: int = 128
    down: dict[str, str] = field(init=False, default_factory=dict)
    up: dict[str, str] = field(init=False, default_factory=dict)
    replaced: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for key in self.checkpoint.shapes:
            name = key.removeprefix(_PREFIX)
            if match := _ADAPTER.match(name):
                table, name = (self.down if match["side"] == "A" else self.up), f"{match['layer']}.weight"
            else:
                table, name = self.replaced, re.sub(r"\.base_layer\.(weight|bias)$", r".\1", name)
            if name in table:
                raise WeightsError(f"{self.checkpoint.path}: {key}: the same tensor as {table[name]}")
            table[name] = key
        for one, other in ((self.down, self.up), (self.up, self.down)):
            if alone := sorted(one.keys() - other.keys()):
                raise WeightsError(
                    f"{self.checkpoint.path}: {one[alone[0]]}: its other half (lora_A, lora_B) is missing"
                )

    def check(self, base: dict[str, tuple[int, ...]]) -> None:
        """Every key must have its place among the base's tensors (name -> shape).

        Raises: WeightsError: a key without place, a wrong shape or rank.
        """
        path, shapes = self.checkpoint.path, self.checkpoint.shapes
        for table in (self.down, self.up, self.replaced):
            for name, key in table.items():
                if name not in base:
                    raise WeightsError(f"{path}: {key}: the network has no tensor {name}")
                if table is self.replaced:
                    want: tuple[int, ...] = base[name]
                elif len(base[name]) != 2:
                    raise WeightsError(f"{path}: {key}: {name} is not a matrix")
                else:
                    want = (self.rank, base[name][1]) if table is self.down else (base[name][0], self.rank)
                if shapes[key] != want:
                    raise WeightsError(f"{path}: {key}: shape {list(shapes[key])}, wanted {list(want)}")

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        if name in self.replaced:
            tensor = self.checkpoint.read(self.replaced[name]).to(tensor)
        if name in self.down:
            up, down = (self.checkpoint.read(side[name]).to(tensor.device).float() for side in (self.up, self.down))
            delta = up @ down
            tensor = tensor.float().add(delta.mul_(self.alpha / self.rank)).to(tensor.dtype)
        return tensor


# ---------------------------------------------------------------------------------------------------------------------
# the folder a user names


@dataclass(frozen=True)
class ModelFiles:
    """Where the pieces of one downloaded model lie."""

    dit: Path
    config: Path
    text: Path
    tokenizer: Path
    vae: Path
    speech: Path
    lora: Path | None


def find_files(directory: Path, lora: Path | None = None, *, need_lora: bool = True) -> ModelFiles:
    """Recognise a model folder: `Wan2.2-S2V-14B` itself, or the folder that holds it and the LoRA.

    Args:
        lora: the LoRA's file, where it lies elsewhere.
        need_lora: without it the base model alone is accepted, for weights into which the LoRA is merged already.
    Raises: WeightsError: no such folder, or what is missing in it, all of it in one line.
    """
    if not directory.is_dir():
        raise WeightsError(f"{directory}: no such folder; `avatard fetch live-avatar-14b` downloads one")
    base = directory
    if not (base / "config.json").is_file():
        base = next((directory / name for name in BASE_FOLDERS if (directory / name).is_dir()), directory)
    missing: list[str] = []

    def one_of(*names: str, folder: bool = False) -> Path:
        for name in names:
            path = base / name
            if path.is_dir() if folder else path.is_file():
                return path
        missing.append(names[0] + ("/" if folder else ""))
        return base / names[0]

    files = ModelFiles(
        config=one_of("config.json"),
        dit=one_of(f"{DIT_STEM}.safetensors.index.json", f"{DIT_STEM}.safetensors"),
        text=one_of(f"{TEXT_STEM}.pth", f"{TEXT_STEM}.safetensors"),
        tokenizer=one_of(TOKENIZER_FOLDER, folder=True),
        vae=one_of(f"{VAE_STEM}.pth", f"{VAE_STEM}.safetensors"),
        speech=one_of(SPEECH_FOLDER, folder=True),
        lora=_find_lora(directory, base, lora),
    )
    if missing:
        raise WeightsError(f"{base}: not a complete live_avatar model, missing: {', '.join(missing)}")
    if lora is not None and files.lora is None:
        raise WeightsError(f"{lora}: no such file")
    if need_lora and files.lora is None:
        raise WeightsError(f"{directory}: {LORA_NAME} is missing; the base model alone does not speak in four steps")
    return files


def _find_lora(directory: Path, base: Path, given: Path | None) -> Path | None:
    if given is not None:
        return given if given.is_file() else None
    folders = [directory, base, *(folder / name for folder in (directory, base.parent) for name in LORA_FOLDERS)]
    return next((folder / LORA_NAME for folder in folders if (folder / LORA_NAME).is_file()), None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises: WeightsError."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise WeightsError(f"{path}: not JSON: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: not a JSON object")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# the networks around the transformer


def load_vae(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    bf16_constants: bool = False,
) -> WanVae:
    """The VAE of `Wan2.1_VAE.pth`; its width is read from the file."""
    from avatar.live_avatar.vae import WanVae, build_vae, diffusers_name

    checkpoint = open_checkpoint(path)
    model = build_vae(width_of(checkpoint, "encoder.conv1.weight"))
    FromFile(model, checkpoint, rename=diffusers_name, dtype=dtype, device=device).give()
    return WanVae(model, bf16_constants=bf16_constants).to(device)


def load_speech_encoder(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[Wav2Vec2Model, bool]:
    """The wav2vec2 encoder of a published CTC folder, and whether its sound is to be normalised."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    described = read_json(folder / "config.json")
    # The vector that stands for masked sound is for training only; without it in the config the model has none.
    described |= {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    try:
        with torch.device("meta"):
            model = Wav2Vec2Model(Wav2Vec2Config.from_dict(described)).eval().requires_grad_(False)
    except Exception as error:  # transformers raises whatever a wrong value leads it to
        raise WeightsError(f"{folder / 'config.json'}: describes no wav2vec2 model: {_first_line(error)}") from error
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise WeightsError(f"{folder}: no weights; want one of {', '.join(names)}")
    FromFile(model, open_checkpoint(path), rename=speech_name, dtype=dtype, device=device).give()
    preprocessor = folder / "preprocessor_config.json"
    normalise = bool(read_json(preprocessor).get("do_normalize", True)) if preprocessor.is_file() else True
    return model, normalise


_NOT_SPEECH = re.compile(r"^(lm_head|quantizer|project_hid|project_q|masked_spec_embed)(\.|$)")


def speech_name(key: str) -> str | None:
    """The transformers 5 name of a wav2vec2 tensor: no prefix, weight norm as a parametrization."""
    name = key.removeprefix("wav2vec2.")
    if _NOT_SPEECH.match(name):
        return None
    name = name.replace(".conv.weight_g", ".conv.parametrizations.weight.original0")
    return name.replace(".conv.weight_v", ".conv.parametrizations.weight.original1")


def width_of(checkpoint: Checkpoint, key: str, side: int = 0) -> int:
    """One side of that tensor. Raises: WeightsError: no such tensor."""
    if len(checkpoint.shapes.get(key, ())) <= side:
        raise WeightsError(f"{checkpoint.path}: {key}: missing")
    return checkpoint.shapes[key][side]
