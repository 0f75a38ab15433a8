"""Stage: draw the prompts of a configuration."""

from pathlib import Path

from hires import layout
from hires.config import Config
from hires.data.prompts import draw_prompts


def run(config: Config) -> Path:
    """Write results/<name>/prompts.parquet, and before it the embedded source when the prompts come from scenes."""
    settings, target = config.prompts, layout.prompts(config)
    source: str | Path = settings.source
    if source == "scenes":
        source = layout.scenes(config)
        write_scenes(config, source)
    draw_prompts(settings, source, target)
    return target


def write_scenes(config: Config, path: Path) -> None:
    """The embedded source: captions of held-out scenes as a parquet file in LAION's schema."""
    from hires.scenes import scene_ids, write_parquet

    pool = config.prompts.scenes
    ids = scene_ids("held-out", pool.pool)
    write_parquet(path, ids, width=pool.width, height=pool.height, close_ups=pool.close_ups)
