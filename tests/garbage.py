"""How much of a process a full collection of garbage walks through, told by the process itself."""

from __future__ import annotations

import os
from pathlib import Path

from live import ROOT

TELL = """\
import gc, os, threading, time

def tell(most=0):
    while True:
        if (kept := gc.get_freeze_count()) > most:
            most = kept
            with open(f"{__file__}.{os.getpid()}", "w") as file:
                print(len(gc.get_objects()), kept, file=file)
        time.sleep(0.1)

threading.Thread(target=tell, daemon=True).start()
"""


def watched(folder: Path) -> dict[str, str]:
    """An environment for `Live` and `Serve`, in which a process and those that it starts will tell."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(TELL)
    return {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}


def share_walked(folder: Path, pid: int) -> float:
    """Of all objects of the process `pid`, those that a collection walked through when it had the least to do.

    Raises: FileNotFoundError: it always walked through all of them.
    """
    walked, kept = map(int, (folder / f"sitecustomize.py.{pid}").read_text().split())
    return walked / (walked + kept)
