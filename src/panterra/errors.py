"""What a person can put right."""


class InputError(ValueError):
    """Input that cannot be used as given.

    The message is one sentence: what came, what was wanted, what to do. The command line prints it and exits with 2.
    """


class RunError(RuntimeError):
    """A run that could not go on, for a reason that is not in its input.

    The message is one sentence: what happened, and how to go on. The command line prints it and exits with 1.
    """
