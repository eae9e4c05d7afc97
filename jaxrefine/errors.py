"""The exception for bad input."""


class InputError(ValueError):
    """Raised for input that cannot be used.

    The message is one sentence that names what must be given and what was received, as
    in "angle_spread must be positive, got -1". The command line prints only the
    message, and exits with code 2.
    """
