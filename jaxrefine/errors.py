"""The exceptions for bad input, and for the loss of another process; their words."""

from collections.abc import Sequence


class InputError(ValueError):
    """Raised for input that cannot be used.

    The message is one sentence that names what must be given and what was received, as
    in "angle_spread must be positive, got -1": without a capital, unless it begins with
    a name, and without a full stop. The command line prints only the command and the
    message, and exits with code 2.
    """


class UnusableImage(InputError):
    """Raised for an image that cannot be used, while others of its source can."""


class LostProcess(RuntimeError):
    """Raised when another process has ended, or cannot be reached any more."""


def some(texts: Sequence[str], most: int, separator: str) -> str:
    """Return the first of several texts, and how many more there are."""
    told = list(texts[:most])
    if len(texts) > most:
        told.append(f"and {len(texts) - most} more")
    return separator.join(told)
