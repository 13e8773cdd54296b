"""Everything that the triggers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.auth import Keys
    from service.config import Settings
    from service.hub import Hub
    from service.inputs import Inputs
    from service.jobs import Jobs
    from service.metrics import Metrics
    from service.sessions import Sessions
    from service.turns import Turns
    from service.voice import Voice
    from streaming.engine import Engine


@dataclass
class App:
    """The daemon as its triggers see it.

    engine: launched, and perhaps not ready yet; voice: None where no text can be spoken; keys: who may do what.
    """

    settings: Settings
    hub: Hub
    metrics: Metrics
    inputs: Inputs
    engine: Engine
    turns: Turns
    jobs: Jobs
    sessions: Sessions
    voice: Voice | None
    keys: Keys

    def use(self, settings: Settings, keys: Keys) -> None:
        """Go on with other values in the sections that are read again on SIGHUP, and with these tokens."""
        self.settings, self.keys = settings, keys
        for part in (self.inputs, self.jobs, self.sessions):
            part.use(settings)
