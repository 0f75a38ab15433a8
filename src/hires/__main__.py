"""`python -m hires`: the command line, where `hires` is not on the PATH."""

from hires.cli import __main__  # noqa: F401
