"""The one kind of error that a user can mend."""

from __future__ import annotations


class AvatardError(Exception):
    """Something a person can put right: one line that says what, where, which value, and what to do.

    The command line prints it and ends with exit status 2; a daemon answers it to whoever asked and goes on.
    """
