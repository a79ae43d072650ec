"""Small text files with an entry on each line: class names and prompt templates, as CLIP_benchmark keeps them."""

from __future__ import annotations

from pathlib import Path

from triscale.errors import UsageError

CLASS_MARK = "{c}"
MAX_LIST_BYTES = 16 * 2**20
LONGEST_QUOTE = 300


def read_classnames(path: Path) -> tuple[str, ...]:
    """The names of classes 0, 1, ..., one a line. Raises UsageError where it cannot be read or a line is empty."""
    names = read_lines(path)
    if not names:
        raise UsageError(f"{quote(str(path))}: there are no class names in it")
    if "" in names:
        raise UsageError(f"{quote(str(path))}: line {names.index('') + 1} holds no class name")
    return tuple(names)


def read_templates(path: Path) -> tuple[str, ...]:
    """Prompt templates with `{c}`, one a line. Raises UsageError where there are none, or one lacks the mark."""
    templates = [line for line in read_lines(path) if line]
    if not templates:
        raise UsageError(f"{quote(str(path))}: there are no prompt templates in it")
    for template in templates:
        if CLASS_MARK not in template:
            raise UsageError(f"{quote(str(path))}: {quote(template)} lacks {CLASS_MARK}, the place of the class name")
    return tuple(templates)


def read_lines(path: Path) -> list[str]:
    """The lines of a small text file, without white space around them and without empty lines at the end.

    Raises:
        UsageError: the file cannot be read, is larger than 16 MiB or not UTF-8.
    """
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise UsageError(f"{quote(str(path))}: larger than {MAX_LIST_BYTES >> 20} MiB")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{quote(str(path))}: {error.strerror or 'cannot be read'}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{quote(str(path))}: it is not UTF-8 text") from error
    # Not splitlines(): that also breaks lines at separators that names may hold, and labels are line numbers.
    return [line.strip() for line in text.rstrip().split("\n")] if text.strip() else []


def quote(text: str | bytes) -> str:
    """A name for a message: one line of printable characters, whatever it holds, and not endless."""
    return repr(text if len(text) <= LONGEST_QUOTE else text[:LONGEST_QUOTE])
