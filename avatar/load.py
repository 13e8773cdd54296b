"""A model by its name or its folder: the one place that knows every family."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from audio.errors import AvatardError
from avatar.model import AvatarModel


class LoadError(AvatardError):
    """No such model, or it cannot be had in this way; names what was asked for."""


Size = tuple[int, int]


def load_model(
    model: str,
    size: Size | None = None,
    steps: int | None = None,
    options: Mapping[str, Any] | None = None,
    live: bool = False,
) -> AvatarModel:
    """The model, ready to stream.

    Args:
        model: `pocket`, or a folder of weights of any family.
        size: width and height in pixels; steps: of denoising; None: the model's own.
        options: the family's own, by name.
        live: it is for a broadcast: steady and soon counts more than as fast as it goes, and where no size is given,
            the largest may be chosen that is fast enough.
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
        use_threads()
    return FAMILIES[family](Request(folder, size, steps, dict(options or {}), device, live))


@dataclass(frozen=True)
class Request:
    """What `load_model` was asked for; folder: None where the family was named."""

    folder: Path | None
    size: Size | None
    steps: int | None
    options: dict[str, Any]
    device: torch.device
    live: bool


def _load_pocket(request: Request) -> AvatarModel:
    from avatar.pocket.generator import SIZE, Options, PocketError, load_pocket

    if request.size not in (None, (SIZE, SIZE)):
        width, height = request.size
        raise PocketError(f"size {width}x{height}: pocket draws {SIZE}x{SIZE} only; leave the size out")
    options = Options.from_settings(_with(request.options, steps=request.steps))
    return load_pocket(request.folder, options, request.device)


RANDOM = "random_weights"
"""An option of live_avatar: weights from a generator instead of files, to see how fast it is."""


def _load_live_avatar(request: Request) -> AvatarModel:
    from avatar.live_avatar.generator import OptionError, Options, load_live_avatar, random_live_avatar
    from avatar.place import Wish, choose

    at_random = request.options.get(RANDOM) is True
    if request.folder is None and not at_random:
        raise LoadError("model live_avatar: name the folder that holds its weights, or live-avatar-14b")
    width, height = request.size or (None, None)
    settings = _with(request.options, width=width, height=height, steps=request.steps)
    own = {option.name for option in fields(Options)}
    wishes = {wish.name for wish in fields(Wish)}
    # What the loader itself takes, besides what is decided here.
    loader = set(inspect.signature(load_live_avatar).parameters) - {
        *("directory", "options", "device", "dtype", "vae_dtype", "places", "text_by_layer"),
    }
    _refuse_unknown("live_avatar", settings, own | wishes | loader | {RANDOM}, OptionError)
    settings.pop(RANDOM, None)
    extras = {name: settings.pop(name) for name in sorted(loader & settings.keys())}
    for name in ("lora", "prompt_store"):
        if name in extras:
            extras[name] = Path(extras[name]).expanduser()
    wish = Wish(**{name: str(settings.pop(name)) for name in sorted(wishes & settings.keys())})
    options, places, device = Options.from_settings(settings), None, request.device
    if device.type == "cuda":
        options, places = choose(
            options,
            wish,
            device,
            live=request.live,
            any_size=request.size is None and not {"width", "height"} & settings.keys(),
            any_schedule="schedule" not in settings,
        )
    elif for_a_gpu := [RANDOM] * at_random + sorted(name for name in wishes if getattr(wish, name)):
        raise OptionError(f"{for_a_gpu[0]}: there is no GPU here; leave it out")
    if at_random:
        return random_live_avatar(options, device=device, places=places)
    assert request.folder is not None
    by_layer = places is not None and places.text_by_layer
    return load_live_avatar(request.folder, options, device=device, places=places, text_by_layer=by_layer, **extras)


FAMILIES: dict[str, Callable[[Request], AvatarModel]] = {
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
    """The accelerator of this machine, with its number, or its CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return torch.empty(0).device
    # Without a number some of torch takes it, and some does not: the allocator's limit wants one.
    return torch.device(found.type, torch.accelerator.current_device_index())


def thread_count(live: bool = False) -> int:
    """Threads of one model: OMP_NUM_THREADS if it is set, else a core each, as far as they may be used.

    live: one core less, where there are several: a broadcast encodes beside its model, and a thread that is put off for
    that holds up all others. On two cores pocket's first frames came after 113 ms (p90 126) on one thread, and after
    141 (158) on two, in a broadcast; beside a process that takes a core after 84, and after 203 on two.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    return max(1, len(os.sched_getaffinity(0)) - live)


def use_threads(live: bool = False) -> None:
    """Let what is computed on the CPU from now on take `thread_count` threads."""
    torch.set_num_threads(thread_count(live))


ENOUGH = 0.6
"""Of its length a block may take on air with one thread less than there are cores: the encoder needs its part too."""


class LiveThreads:
    """How many threads a model takes on air: one less than there are cores where that is fast enough, else all.

    Found from the first blocks that are made on air, which nobody is shown. Of three with one less the last two are
    measured; where those were too slow, three with all follow, and again the last two are measured: with another
    number of threads a library makes its kernels anew. On two cores without AVX-512 a block of pocket took 0.65 s with
    one thread and 0.37 with two.
    """

    FEWER, ALL = 3, 6

    def __init__(self) -> None:
        self._taken: list[float] = []
        self._all = False

    def use(self, live: bool) -> None:
        """Before a block is made."""
        use_threads(live and not self._all)

    def took(self, seconds: float, block_seconds: float) -> None:
        """After one on air."""
        if len(self._taken) == self.ALL:
            return
        self._taken.append(seconds)
        if len(self._taken) == self.FEWER:
            self._all = min(self._taken[-2:]) > ENOUGH * block_seconds
        elif len(self._taken) == self.ALL:
            self._all = self._all and min(self._taken[-2:]) < 0.9 * min(self._taken[self.FEWER - 2 : self.FEWER])
