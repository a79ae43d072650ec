"""The two ways in which a command ends badly; everything else is a bug and keeps its traceback."""

from __future__ import annotations


class UsageError(Exception):
    """What was asked for cannot be: a wrong name, path, field or combination. One line; exit status 2."""


class RunError(Exception):
    """What was begun could not be finished: bad data, non-finite losses, a full disk. One line; exit status 1."""


class LostProcess(RunError):
    """A collective failed or timed out, because another process died, hangs or failed by itself."""
