"""Files that are whole or absent, that notice damage, and that others wrote."""

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"  # the embedded models
