"""The two ways in which a command ends badly; everything else is a bug and keeps its traceback."""

from __future__ import annotations


class UsageError(Exception):
    """What was asked for cannot be: a wrong name, path, field or combination. One line; exit status 2."""


class RunError(Exception):
    """What was begun could not be finished: bad data, non-finite losses, a full disk. One line; exit status 1."""


class LostProcess(RunError):
    """A collective failed or timed out, because another process died, hangs or failed by itself."""


_LONGEST = 200


def first_line(error: Exception) -> str:
    """What another library's error says, as a line that is not endless."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:_LONGEST]


def named_line(error: Exception) -> str:
    """The same behind the error's kind, without which some say little: "KeyError: 'width'"."""
    line = first_line(error)
    return line if line == type(error).__name__ else f"{type(error).__name__}: {line}"
