"""Stage: what made the results of a configuration, in one file."""

from hires import layout, provenance
from hires.config import Config
from hires.shards import drawn, read_manifest
from hires.stages import models
from hires.storage import write_json


def run(config: Config) -> None:
    """Write `layout.provenance`: this process's own record, the configuration, and the records of all shards.

    Keys beside those of `hires.provenance.record`: `configuration` (as stated), `models` (backbone -> what tells its
    model from others, and the revision), `prompts` (n and the digest of their ids), `images` (n, seconds, seeds), and
    `runs` (every different record that a manifest holds).
    """
    base = [
        read_manifest(path, "base") for item in layout.base_sets(config) for path in layout.base_shards(config, item)
    ]
    images = [
        read_manifest(path, "images") for item in config.image_sets() for path in layout.image_shards(config, item)
    ]
    made = [image for manifest in images for image in manifest["images"]]
    ids = [prompt.id for prompt in drawn(config)]
    revisions = {manifest["backbone"]: manifest["provenance"][-1]["revision"] for manifest in images}
    facts = {
        "configuration": provenance.config_data(config),
        "models": {
            name: {**models.identity(config.backbones[name]), "revision": revision}
            for name, revision in revisions.items()
        },
        "prompts": {"n": len(ids), "digest": provenance.digest(ids)},
        "images": {
            "n": len(made),
            "seconds": round(sum(image["seconds"] for image in made), 1),
            "seeds": sorted({image["seed"] for image in made}),
        },
        "runs": provenance.distinct([record for manifest in base + images for record in manifest["provenance"]]),
    }
    write_json(layout.provenance(config), provenance.record(config, **facts))
