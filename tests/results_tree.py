"""A small results folder as the stages leave it, with procedural pictures."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from hires.metrics import paired

BACKBONES = ("tiny-flux", "tiny-sdxl")
VARIANTS = ("upsample", "direct", "npa", "npa+lfm", "npa+sg", "scalediff")
SCORES = {"fid": 60.0, "kid": 0.004, "clip": 30.0, "repetition": 0.5, "kid_patch": 0.008, "count": 0.7, "seconds": 3.0}


def picture(side: int, seed: int, detail: float) -> Image.Image:
    """A disc on a textured ground; `detail` is the weight of the finest octaves."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    waves = sum(
        (1.0 if k < 4 else detail) * np.sin(2 * np.pi * 2**k * (x * np.cos(a) + y * np.sin(a)) + a) / 2 ** (k / 2)
        for k, a in enumerate(rng.uniform(0, 6, 7))
    )
    ground = 0.55 + 0.12 * waves[..., None] * rng.uniform(0.6, 1, 3)
    cx, cy = rng.uniform(0.3, 0.7, 2)
    disc = np.hypot(x - cx, y - cy) < 0.2
    ground[disc] *= rng.uniform(0.2, 1, 3)
    return Image.fromarray((ground.clip(0, 1) * 255).astype(np.uint8))


def build(
    folder: Path,
    sizes=((64, 3),),
    backbones=BACKBONES,
    variants=VARIANTS,
    taus=(300, 500),
    prompts=("a red disc on wood", 'a <script>alert("x")</script> disc & wool', "two discs"),
) -> Path:
    """Write a results folder for a study `main` with these (side, n) and a study `tau`; returns the folder."""
    rng = np.random.default_rng(0)
    ids = [f"{i:08x}" for i in range(len(prompts))]
    rows, pairs = [], []
    sets = [("main", "default", b, v, side, n) for b in backbones for v in variants for side, n in sizes]
    sets += [
        ("tau", f"tau-{tau}", b, v, sizes[0][0], 2) for tau in taus for b in backbones for v in ("npa", "scalediff")
    ]
    for study, setting, backbone, variant, side, n in sets:
        place = {
            "study": study,
            "setting": setting,
            "backbone": backbone,
            "variant": variant,
            "height": side,
            "width": side,
        }
        shard = folder / "images" / study / setting / backbone / variant / f"{side}x{side}"
        shard.mkdir(parents=True)
        images = [{"id": identifier, "seed": 0, "file": f"{identifier}-0.png"} for identifier in ids[:n]]
        for i, image in enumerate(images):
            detail = 0.1 + 0.15 * (list(VARIANTS).index(variant) if variant in VARIANTS else 0)
            picture(side, i, detail).save(shard / image["file"])
        (shard / "shard-000.json").write_text(json.dumps({"version": 1, **place, "sampling": {}, "images": images}))
        for name, value in SCORES.items():
            value *= rng.uniform(0.8, 1.2)
            flag = "n below the feature dimension" if name == "fid" else ""
            bounds = {"value": value, "low": value * 0.9, "high": value * 1.1}
            rows.append({**place, "trial": "all", "metric": name, **bounds, "n": n, "flag": flag, "protocol": "test"})
    for study, side, n in [("main", *size) for size in sizes] + [("tau", sizes[0][0], 2)]:
        place = {
            "study": study,
            "height": side,
            "width": side,
            **dict.fromkeys(("setting", "backbone", "variant"), "reference"),
        }
        for name, value in SCORES.items():
            bounds = {"value": value / 2, "low": value / 2.2, "high": value / 1.8}
            rows.append({**place, "trial": "all", "metric": name, **bounds, "n": n, "flag": "", "protocol": "test"})
    for backbone in backbones:
        for side, n in sizes:
            for metric, difference in {"repetition": 0.2, "clip": -0.1}.items():
                place = {"study": "main", "setting": "default", "backbone": backbone, "height": side, "width": side}
                low = difference - 0.15
                bounds = {"difference": difference, "low": low, "high": difference + 0.15, "n": n}
                pairs.append({**place, "metric": metric, "a": "npa", "b": "scalediff", **bounds})
    pd.DataFrame(rows).to_parquet(folder / "metrics.parquet")
    pd.DataFrame(pairs).to_parquet(folder / "paired.parquet")
    table = {"index": range(len(ids)), "id": ids, "prompt": list(prompts)}
    pd.DataFrame(table).to_parquet(folder / "prompts.parquet")
    for side, n in sizes:
        target = folder / "references" / f"{side}x{side}"
        target.mkdir(parents=True)
        for i, identifier in enumerate(ids[:n]):
            picture(side, i, 1.0).save(target / f"{identifier}.png")
    (folder / "provenance.json").write_text(json.dumps({"commit": "0" * 40, "versions": {"torch": "2.13.0"}}))
    return folder


def add_scale_dit(folder: Path, side: int = 64, n: int = 2) -> Path:
    """Add what config/scale-dit-evaluation.yaml makes, some settings left out: two studies with their paired tests."""
    rng = np.random.default_rng(1)
    ids = pd.read_parquet(folder / "prompts.parquet")["id"][:n]
    late = ["tau-643", "tau-643-no-lr-keys", "tau-643-no-adapter"]
    sets = [("scale-dit", "default", v) for v in ("upsample", "scalediff", "scale-dit", "hybrid")]
    sets += [("scale-dit-ablation", s, "scale-dit") for s in ("default", "no-lr-keys", "no-adapter", "radius-2", *late)]
    rows = []
    for i, (study, setting, variant) in enumerate(sets):
        place = {"study": study, "setting": setting, "backbone": "tiny-flux", "variant": variant}
        place |= {"height": side, "width": side}
        shard = folder / "images" / study / setting / "tiny-flux" / variant / f"{side}x{side}"
        shard.mkdir(parents=True)
        images = [{"id": name, "seed": 0, "file": f"{name}-0.png"} for name in ids]
        for k, image in enumerate(images):
            picture(side, k, 0.1 * i).save(shard / image["file"])
        (shard / "shard-000.json").write_text(json.dumps({"version": 1, **place, "sampling": {}, "images": images}))
        for name, value in SCORES.items():
            replicates = value * rng.normal(1 + 0.1 * (i % 4), 0.02, 200)
            low, high = np.quantile(replicates, [0.025, 0.975])
            bounds = {"value": replicates.mean(), "low": low, "high": high, "n": n, "flag": "", "protocol": "test"}
            rows.append({**place, "trial": "all", "metric": name, **bounds, "replicates": replicates})
    made = pd.DataFrame(rows)
    for name, fresh in (("metrics", made.drop(columns="replicates")), ("paired", paired(made))):
        file = folder / f"{name}.parquet"
        pd.concat([pd.read_parquet(file), fresh], ignore_index=True).to_parquet(file)
    return folder


def add_studies(folder: Path, side: int = 64, n: int = 2) -> Path:
    """Add parts of config/studies: trials of the components, two settings of the failures, with crops and tests."""
    rng = np.random.default_rng(2)
    sets = [
        ("components", "default", v, seed) for v in ("npa", "npa+lfm", "scalediff") for seed in ("all", "0", "1", "2")
    ]
    sets += [("failures", s, v, "all") for s in ("default", "tau-800", "overlap-0") for v in ("npa", "npa+sg")]
    rows = []
    for i, (study, setting, variant, trial) in enumerate(sets):
        place = {"study": study, "setting": setting, "backbone": "tiny-flux", "variant": variant}
        place |= {"height": side, "width": side}
        target = folder / "crops" / study / setting / "tiny-flux" / variant / f"{side}x{side}.webp"
        target.parent.mkdir(parents=True, exist_ok=True)
        picture(side, i, 0.3).save(target)
        for name, value in {**SCORES, "fid_patch": 40.0, "high_band": -0.2, "seams": 0.1}.items():
            replicates = value * rng.normal(1 + 0.1 * (i % 5), 0.02, 200)
            low, high = np.quantile(replicates, [0.025, 0.975])
            bounds = {"value": replicates.mean(), "low": low, "high": high, "n": n, "flag": "", "protocol": "test"}
            rows.append({**place, "trial": trial, "metric": name, **bounds, "replicates": replicates})
    made = pd.DataFrame(rows)
    tests = paired(made[made["trial"] == "all"])
    for name, fresh in (("metrics", made.drop(columns="replicates")), ("paired", tests)):
        file = folder / f"{name}.parquet"
        pd.concat([pd.read_parquet(file), fresh], ignore_index=True).to_parquet(file)
    return folder
