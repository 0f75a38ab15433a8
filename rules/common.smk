# The configuration, validated once, and the helpers that let each rule name the keys that it reads.

import sys
from collections.abc import Mapping
from pathlib import Path

from snakemake.exceptions import WorkflowError

from hires import layout
from hires.config import load_config
from hires.data.frozen import load_frozen
from hires.data.sources import is_address, parquet_files
from hires.errors import HiresError
from hires.execution.devices import uses_gpu
from hires.files.storage import claim, not_ahead
from hires.provenance import store_config, stored_config
from hires.stages import VERSIONS
from hires.stages.models import files, folder_files
from hires.stages.notebook import check_all

ENVIRONMENT = "../environment.yml"


def refuse(reason):
    """One line and exit code 2, as on the command line; an exception would come in Snakemake's frame."""
    print(f"snakemake: {reason}", file=sys.stderr)
    sys.exit(2)


def configured():
    """The one --configfile (default: config/config.yaml) with --config on top; a file extends another by itself."""
    paths = [Path(path) for path in workflow.overwrite_configfiles] or [Path("config/config.yaml")]
    if len(paths) > 1:
        refuse("give one --configfile; it may build on another one with its key `extends`")
    try:
        config = load_config(paths[0], workflow.config_settings.config)
        check_all(config)
        return config
    except HiresError as error:
        refuse(error)


def reads(*keys):
    """Params function: what the configuration holds under these keys, wildcards filled in.

    Keys are written with "/", as names may hold dots. A job runs again when one of its values changes.
    """
    return lambda wildcards: {key: plain(lookup(key.format(**wildcards))) for key in keys}


def lookup(key):
    value = CONFIG
    for name in key.split("/"):
        value = value[name] if isinstance(value, Mapping) else getattr(value, name)
    return value


def plain(value):
    if isinstance(value, Mapping):
        return {name: plain(entry) for name, entry in value.items()}
    return value.model_dump(mode="json", exclude_unset=True) if hasattr(value, "model_dump") else value


def log_of(name):
    return str(CONFIG.root / "logs" / f"{name}.log")


def of_study(output, study):
    """Patterns of an output for every setting and variant of a study: what one job makes of it."""
    entry = CONFIG.studies[study]
    return expand(
        layout.pattern(CONFIG, output),
        study=study,
        setting=entry.settings,
        variant=entry.variants,
        allow_missing=True,
    )


def sets_of(study, wildcards):
    """Image sets of a study with the backbone and size of the wildcards."""
    place = (study, wildcards.backbone, int(wildcards.height), int(wildcards.width))
    return [s for s in CONFIG.image_sets() if (s.study, s.backbone, s.height, s.width) == place]


def rows_of(study):
    """Params function: first and last + 1 of the prompts in a shard of images."""

    def rows(wildcards):
        n = CONFIG.studies[study].sizes[f"{wildcards.height}x{wildcards.width}"]
        shard = layout.shard_rows(CONFIG, n, int(wildcards.shard))
        return [shard.start, shard.stop]

    return rows


def base_rows(wildcards):
    """Params function: the prompts in a shard of base latents, and their seeds."""
    name = f"{wildcards.base_height}x{wildcards.base_width}-{wildcards.key}"
    base = layout.base_set(CONFIG, wildcards.backbone, name)
    shard = layout.shard_rows(CONFIG, base.n, int(wildcards.shard))
    return [shard.start, shard.stop, list(base.seeds)]


def base_of(study):
    """Input function: the shards of base latents that a shard of images starts from."""

    def paths(wildcards):
        bases = [layout.base_of(CONFIG, images) for images in sets_of(study, wildcards)]
        return sorted({str(layout.base_shard(CONFIG, base, int(wildcards.shard))) for base in bases if base})

    return paths


def images_of(study):
    """Input function: all manifests of the image sets of a backbone and size."""
    return lambda wildcards: [
        path for images in sets_of(study, wildcards) for path in layout.image_shards(CONFIG, images)
    ]


def variants_of(study):
    """The definitions of a study's variants, built-in ones included."""
    return {name: CONFIG.variants()[name].model_dump() for name in CONFIG.studies[study].variants}


def model_of(wildcards):
    """Input function: the files of a model that lies in a local folder."""
    return files(CONFIG.backbones[wildcards.backbone])


def prompt_source():
    """The local files that prompts are drawn from; none for the embedded scenes, which the stage writes itself."""
    source, frozen = CONFIG.prompts.source, CONFIG.prompts.frozen
    try:
        files = [] if source == "scenes" or is_address(source) else parquet_files(source)
        if frozen:
            load_frozen(frozen)
        return files + ([frozen] if frozen else [])
    except HiresError as error:
        refuse(error)


def reference_scores(wildcards):
    """Input function: the stored scores of the reference results."""
    path = Path("results/reference/metrics.parquet")
    if not path.is_file():
        raise WorkflowError(f"no {path} to draw figures from yet: `hires promote` fills results/reference")
    return path


CONFIG = configured()
MINUTES = CONFIG.compute.job_minutes
LIMIT = f"timeout --foreground --kill-after=5 {MINUTES}m " if MINUTES else ""
KILLED = "killed, as the system does when memory runs out" + (f", or after job_minutes = {MINUTES}" if MINUTES else "")

# Jobs use this checkout's library, also in a conda environment that was made from environment.yml. A prefix takes the
# place of Snakemake's own, without which a failure before `| tee` would go unseen.
shell.prefix(
    "set -euo pipefail; export PYTHONPATH={workflow.basedir}/src:{workflow.basedir}/kernels${{PYTHONPATH:+:$PYTHONPATH}};"
    ' hires() {{ {LIMIT}python -m hires.cli "$@" || ended $? "$1"; }};'
    ' ended() {{ [ $1 != 124 -a $1 != 137 ] || echo "hires $2: {KILLED}; finished work is kept" >&2; return $1; }}; '
)

CONFIG_FILE = str(stored_config(CONFIG))
ENCODERS = sorted({path for name in (CONFIG.metrics.features, CONFIG.metrics.clip) for path in folder_files(name)})
GPUS = int(uses_gpu(CONFIG.compute.device))


claims = []  # held until this process ends


onstart:
    if workflow.is_main_process:
        try:
            claims.append(claim(CONFIG.root))
            not_ahead(layout.made(CONFIG))
            store_config(CONFIG)  # here, as a dry run must leave everything alone
        except HiresError as error:
            raise WorkflowError(str(error))


wildcard_constraints:
    **layout.wildcards(CONFIG),
