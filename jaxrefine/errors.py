"""The one exception for bad input: a sentence that a user can act on."""


class InputError(ValueError):
    """Input that cannot be used; the message says what came and what is wanted.

    The command line prints the message alone and exits with code 2.
    """
