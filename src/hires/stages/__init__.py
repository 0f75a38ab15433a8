"""The stages of a reproduction. Each is a function of a configuration, a subcommand of `hires` and a Snakemake rule."""

# Raise a number when a change to the library changes what the stage writes: it is then made again.
VERSIONS = {
    "prompts": 1,
    "references": 1,
    "base": 2,  # 1: all prompts of a trial shared their noise
    "images": 2,
    "features": 2,
    "scores": 5,
    "metrics": 4,
    "notebook": 1,
    "report": 1,
    "provenance": 1,
    "checksums": 1,
    "speed": 2,
}
