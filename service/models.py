"""The names of the models, and what each of them needs. A table, not the models: it answers without loading them."""

from __future__ import annotations

import difflib
import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from audio.errors import AvatardError
from service.config import Settings, models_folder

OWN_MODEL = re.compile(r".+\.py:\w+")
"""FILE.py:FUNCTION, called as function(size, steps, options)."""


FAMILY_AT_RANDOM = "live_avatar"
"""What `load_model` takes for a model without files, with the option random_weights."""


class ModelError(AvatardError):
    """There is no such model, or it is not here yet."""


def known_models() -> dict[str, Any]:
    """Parts and bytes of every family, from configs/models.yaml."""
    table: dict[str, Any] = yaml.safe_load(resources.files("configs").joinpath("models.yaml").read_text("utf-8"))
    for name, model in table.items():
        if model["embedded"]:
            model["parts"] = _shipped_parts(name)
    return table


def _shipped_parts(family: str) -> list[dict[str, Any]]:
    """The weights that lie in the package, each file a part."""
    folder = Path(str(resources.files("avatar").joinpath(family)))
    files = sorted(folder.rglob("*.safetensors"))
    return [{"name": file.stem, "weight_bytes": file.stat().st_size, "session_bytes": 0, "note": ""} for file in files]


def resolve_model(name: str, settings: Settings) -> str:
    """What `load_model` takes for a name: the name itself, or the folder that holds its weights.

    Raises: ModelError: unknown, or not downloaded.
    """
    table = known_models()
    if name in table:
        if table[name]["embedded"]:
            return name
        if settings.model.options.get("random_weights") is True:
            return FAMILY_AT_RANDOM
        folder = models_folder(settings) / name
        if not folder.is_dir():
            raise ModelError(f"model {name}: not in {folder}; download it with: avatard fetch {name}")
        return str(folder)
    if OWN_MODEL.fullmatch(name) or Path(name).is_dir():
        return name
    close = difflib.get_close_matches(name, table, 1, 0.5)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(table)}, or a folder of weights"
    raise ModelError(f"model {name}: no such model or folder; {hint}")


def select_model(name: str) -> Any:
    """One family's entry. Raises: ModelError: unknown."""
    table = known_models()
    if name not in table:
        close = difflib.get_close_matches(name, table, 1, 0.5)
        raise ModelError(f"model {name}: unknown; " + (f"did you mean {close[0]}?" if close else ", ".join(table)))
    return table[name]


def plan_lines(table: dict[str, Any]) -> list[str]:
    """The table for people: a line for each part, in GB of 10^9 bytes."""
    lines = []
    for name, model in table.items():
        lines.append(f"{name}: {model['about']}")
        parts = model["parts"]
        for part in [*parts, _sum(parts)]:
            weights, session = part["weight_bytes"] / 1e9, part["session_bytes"] / 1e9
            lines.append(
                f"  {part['name']:26} {weights:8.3f} GB  + {session:7.3f} GB a session  {part['note']}".rstrip()
            )
    return lines


def _sum(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": "together",
        "weight_bytes": sum(part["weight_bytes"] for part in parts),
        "session_bytes": sum(part["session_bytes"] for part in parts),
        "note": "",
    }
