"""`avatard fetch`: the weights of a published model into the folder where `run` looks for them."""

from __future__ import annotations

import sys
from pathlib import Path

from service.config import Settings, models_folder
from service.models import ModelError, select_model


def fetch_model(name: str, settings: Settings, folder: Path | None, revision: str | None, verify: bool) -> Path:
    """Download a model, or the rest of it; gives the folder it lies in. Raises: AvatardError."""
    if select_model(name)["embedded"]:
        raise ModelError(f"model {name}: comes with the package; there is nothing to download")
    from avatar.live_avatar.fetch import fetch  # here, since it imports the hub's client

    target = folder or models_folder(settings) / name
    fetch(target, revision=revision, progress=sys.stderr.isatty(), verify=verify)
    return target
