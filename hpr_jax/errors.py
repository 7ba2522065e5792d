"""Errors that are the user's to mend: `main` prints them as one sentence and exits with code 2."""


class UserError(ValueError):
    """Names the thing that is wrong, and the mend."""


class RunError(RuntimeError):
    """A run that cannot go on, for reasons in the run itself: `main` prints it as one sentence and exits with code 1."""
