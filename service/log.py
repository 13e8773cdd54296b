"""The operator's log: one line for each event on stderr, nothing above warnings unless asked."""

from __future__ import annotations

import logging
import sys


def set_up(level: int = logging.WARNING) -> None:
    """Log to stderr in the form `avatard: text`, warnings and worse."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("avatard: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
