"""The one error of this package."""


class KernelError(ValueError):
    """Bad input to an operation, in one line: what was given and what is allowed."""
