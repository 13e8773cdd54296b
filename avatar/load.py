"""A model by its name or its folder: the one place that knows every family."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from audio.errors import AvatardError
from avatar.model import AvatarModel


class LoadError(AvatardError):
    """No such model, or it cannot be had in this way; names what was asked for."""


Size = tuple[int, int]


def load_model(
    model: str, size: Size | None = None, steps: int | None = None, options: Mapping[str, Any] | None = None
) -> AvatarModel:
    """The model, ready to stream.

    Args:
        model: `pocket`, or a folder of weights of any family.
        size: width and height in pixels; steps: of denoising; None: the model's own.
        options: the family's own, by name.
    Raises: AvatardError: no such model, an unknown option, or a value that does not work.
    """
    folder = None if model in FAMILIES else Path(model)
    if folder is not None and not folder.is_dir():
        close = difflib.get_close_matches(model, FAMILIES, 1)
        hint = f"did you mean {close[0]!r}?" if close else "name pocket, or a folder of weights"
        raise LoadError(f"model {model}: no such model or folder; {hint}")
    family = model if folder is None else _family_of(folder)
    device = _device()
    if device.type == "cpu":
        torch.set_num_threads(thread_count())
    return FAMILIES[family](folder, size, steps, dict(options or {}), device)


def _load_pocket(
    folder: Path | None, size: Size | None, steps: int | None, options: dict[str, Any], device: torch.device
) -> AvatarModel:
    from avatar.pocket.generator import SIZE, Options, PocketError, load_pocket

    if size not in (None, (SIZE, SIZE)):
        assert size is not None
        raise PocketError(f"size {size[0]}x{size[1]}: pocket draws {SIZE}x{SIZE} only; leave the size out")
    return load_pocket(folder, Options.from_settings(_with(options, steps=steps)), device)


def _load_live_avatar(
    folder: Path | None, size: Size | None, steps: int | None, options: dict[str, Any], device: torch.device
) -> AvatarModel:
    from avatar.live_avatar.generator import OptionError, Options, load_live_avatar

    if folder is None:
        raise LoadError("model live_avatar: name the folder that holds its weights, or live-avatar-14b")
    width, height = size or (None, None)
    options = _with(options, width=width, height=height, steps=steps)
    own = {option.name for option in fields(Options)}
    # What the loader itself takes, besides where and in which type.
    loader = set(inspect.signature(load_live_avatar).parameters) - {
        "directory",
        "options",
        "device",
        "dtype",
        "vae_dtype",
    }
    _refuse_unknown("live_avatar", options, own | loader, OptionError)
    extras = {name: options.pop(name) for name in sorted(loader & options.keys())}
    for name in ("lora", "prompt_store"):
        if name in extras:
            extras[name] = Path(extras[name]).expanduser()
    return load_live_avatar(folder, Options.from_settings(options), device=device, **extras)


FAMILIES: dict[str, Callable[[Path | None, Size | None, int | None, dict[str, Any], torch.device], AvatarModel]] = {
    "pocket": _load_pocket,
    "live_avatar": _load_live_avatar,
}
"""Loaders by family; a folder's family is told from the files in it."""


def _family_of(folder: Path) -> str:
    return "pocket" if (folder / "dit.safetensors").is_file() else "live_avatar"


def _with(options: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """Options with what was given besides them, which counts more."""
    return {**options, **{name: value for name, value in given.items() if value is not None}}


def _refuse_unknown(family: str, options: Mapping[str, Any], known: set[str], error: type[AvatardError]) -> None:
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), 1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(known))}"
            raise error(f"{name}: no option of {family}; {hint}")


def _device() -> torch.device:
    """The accelerator of this machine, or its CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None else torch.empty(0).device


def thread_count() -> int:
    """Threads of one model: OMP_NUM_THREADS if it is set, else a core each, as far as they may be used."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) > 0 else max(1, len(os.sched_getaffinity(0)))
