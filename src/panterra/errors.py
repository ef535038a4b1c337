"""What a person can put right."""


class InputError(ValueError):
    """Input that cannot be used as given.

    The message is one sentence: what came, what was wanted, what to do. The command line prints it and exits with 2.
    """
