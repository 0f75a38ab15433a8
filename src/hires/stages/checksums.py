"""Stage: SHA-256 of everything that a configuration made; `hires verify` and `sha256sum -c` check it."""

from collections.abc import Iterable
from pathlib import Path

from hires import layout, provenance
from hires.config import Config
from hires.errors import HiresError
from hires.files.storage import sha256, write_changed
from hires.stages import collect


def run(config: Config) -> None:
    """Write SHA256SUMS: one line per file, except images, references and latents, which the manifests in it list."""
    files = outputs(config)
    for path in files:
        if not path.is_file():
            raise HiresError(f"{path} does not exist: finish the run first (snakemake, or hires run)")
    write(config.root, files)


def outputs(config: Config) -> list[Path]:
    """All files of a configuration but images, references, latents and their records.

    Where image sets were collected, what stayed on the machines that made them is left out.
    """
    sizes, sets, elsewhere = layout.references(config), config.image_sets(), collect.elsewhere(config)
    made = [
        *(layout.reference_manifest(config, height, width) for height, width, _ in sizes),
        *(path for base in layout.base_sets(config) for path in layout.base_shards(config, base)),
        *(path for images in sets for path in layout.image_shards(config, images)),
        *(layout.features(config, images) for images in sets),
    ]
    kept = [
        *(layout.reference_crops(config, height, width) for height, width, _ in sizes),
        *(place(config, images) for place in (layout.crops, layout.costs) for images in sets),
        layout.collected(config),
    ]
    return [
        provenance.stored_config(config),
        layout.prompts(config),
        *([layout.scenes(config)] if config.prompts.source == "scenes" else []),
        *(path for path in made if path.exists() or not elsewhere),
        *(layout.reference_features(config, height, width) for height, width, _ in sizes),
        *(place(config, images) for place in (layout.scores, layout.image_scores) for images in sets),
        *(path for path in kept if path.exists()),
        layout.metrics(config),
        layout.paired(config),
        *(layout.notebook(config, name) for name in config.notebooks),
        *(path for folder in (layout.tables(config), layout.figures(config)) for path in sorted(folder.glob("*.*"))),
        layout.provenance(config),
        layout.report(config),
    ]


def write(folder: Path, files: Iterable[Path]) -> None:
    """Write <folder>/SHA256SUMS over files in it, in the format of sha256sum."""
    lines = (f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)
    write_changed(folder / "SHA256SUMS", "".join(lines))
