"""The HTML report: one file with everything in it, that needs no network and no server."""

import base64
import html
import io
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment
from PIL import Image

from hires.analysis import tables
from hires.analysis.results import TRUE, Results, read_image, size_name, where
from hires.figures import label

_TABLES = {
    "components": "Components: NPA alone, with LFM, with SG, with both (ScaleDiff)",
    "components-content": "Components: objects and spectra",
    "variants": "All variants",
    "variants-content": "All variants: objects and spectra",
    "paired": "Paired differences on the same prompts and seeds; bold: the interval leaves out zero",
    "paired-content": "Paired differences of objects and spectra",
    "published": "Beside the paper: other models, data and sizes; compare the order of variants, not the numbers",
    "tau": "τ sweep",
    "scale-dit-expected": "Scale-DiT: what was expected before the run, and what came out",
    "scale-dit": "Scale-DiT: variants",
    "scale-dit-paired": "Scale-DiT: paired differences on the same prompts and seeds",
    "scale-dit-ablation": "Scale-DiT: one setting changed at a time",
    "scale-dit-ablation-paired": "Scale-DiT: paired differences between settings",
    "scale-dit-blocks": "Scale-DiT: blocks of 128 queries and 64 keys that hold a visible pair, by token order",
    "protocols": "Protocols: how each score was measured",
}
# prefix of a figure's name -> its caption
_FIGURES = {
    "images-": "The same prompts and seeds across variants, with enlarged crops",
    "tau-images-": "The same prompts along τ, with enlarged crops",
    "scores-": "Scores with 95% intervals",
    "paired-": "Paired differences with 95% intervals",
    "tau-scores": "Scores against τ with 95% intervals",
    "spectra-": "Radial power spectra: mean over images",
    "tau-spectra-": "Radial power spectra along τ",
    "scale-dit-images-": "Scale-DiT: the same prompts and seeds, with enlarged crops",
    "scale-dit-paired-": "Scale-DiT: paired differences with 95% intervals",
    "scale-dit-ablation-paired-": "Scale-DiT: one setting changed at a time, paired differences with 95% intervals",
    "scale-dit-masks": "Scale-DiT: which keys each query sees",
    "scale-dit-keys": "Scale-DiT: the keys of one query",
    "scale-dit-orders": "Scale-DiT: token orders",
    "scale-dit-blocks": "Scale-DiT: blocks that a kernel has to compute, by token order",
    "scale-dit-anchors": "Scale-DiT: positions of the low-resolution tokens",
    "scale-dit-training": "Scale-DiT: loss of the adapter's training",
    "npa-windows": "Query patches of Neighborhood Patch Attention and their key/value windows",
    "cost": "Cost of a model call against the upscale factor",
    "sg-weight": "Weight of Structure Guidance over a stage",
    "lfm-spectra": "Spectra of the latents that Latent Frequency Mixing mixes",
    "sg-residual": "What Structure Guidance changes in a clean estimate, by frequency",
}
_LOSSY = 90  # WebP quality


def write(results: Results, target: Path, name: str, lossless_prompts: int = 2, max_megabytes: float = 40) -> None:
    """Write the report of `results` to `target`.

    Args:
        name: of the configuration, for the title.
        lossless_prompts: the first so many prompts of the gallery are stored without loss, the others as WebP of
            quality 90; all at full resolution.
        max_megabytes: size that the gallery may reach; prompts beyond it are left out, and the report says so.
    """
    folder = files("hires.report")
    page = Environment(autoescape=True).from_string((folder / "template.html").read_text(encoding="utf-8"))
    gallery = _gallery(results, lossless_prompts, max_megabytes * 1e6)
    text = page.render(
        name=name,
        style=(folder / "style.css").read_text(encoding="utf-8"),
        script=(folder / "script.js").read_text(encoding="utf-8"),
        findings={study: _findings(results, study) for study in _studies(results)},
        facts=_facts(results.provenance),
        configuration=yaml.safe_dump(results.provenance.get("configuration", {}), sort_keys=False, allow_unicode=True),
        tables=_tables(results.output),
        figures=_figures(results.output),
        gallery=gallery,
        data=json.dumps(gallery, ensure_ascii=False).replace("<", "\\u003c"),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")


def read_table(markdown: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a pipe table."""
    lines = [
        [_plain(cell.strip()) for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        for line in markdown.strip().splitlines()
    ]
    return lines[0], lines[2:]


def _plain(cell: str) -> str:
    return html.unescape(cell.replace("\\|", "|").replace("]\\(", "]("))


def _studies(results: Results) -> list[str]:
    return list(dict.fromkeys(results.metrics["study"]))


def _findings(results: Results, study: str) -> dict[str, list[str]]:
    """Sentences on a study's default setting, by model and size; none for a study without one."""
    scores = results.scores(study, setting="default")
    return tables.findings(scores, where(results.paired, study=study, setting="default")) if len(scores) else {}


def _facts(record: dict[str, Any]) -> dict[str, str]:
    """What was run, in words."""
    runs = record.get("runs", [])
    machines = dict.fromkeys(str(run.get("gpu") or f"CPU: {run.get('cpu')}, {run.get('cores')} cores") for run in runs)
    facts = {
        "Made": record.get("time"),
        "Commit": (record.get("commit") or "") + " with local changes" * bool(record.get("dirty")),
        "Versions": ", ".join(f"{k} {v}" for k, v in record.get("packages", {}).items()),
        "Python": record.get("python"),
        "Device": "; ".join(machines),
        "Models": "; ".join(f"{k}: {_flat(v)}" for k, v in record.get("models", {}).items()),
        "Prompts": _flat(record.get("prompts", {})),
        "Images": _flat(record.get("images", {})),
    }
    return {name: str(value) for name, value in facts.items() if value}


def _flat(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _tables(folder: Path) -> list[dict[str, Any]]:
    """The tables that notebooks wrote: the known ones first."""
    found = []
    for name in tables.in_order((file.stem for file in (folder / "tables").glob("*.md")), _TABLES):
        header, rows = read_table((folder / "tables" / f"{name}.md").read_text(encoding="utf-8"))
        cells = [[{"text": cell.strip("*"), "strong": cell.startswith("**")} for cell in row] for row in rows]
        found.append({"name": name, "caption": _TABLES.get(name, name), "header": header, "rows": cells})
    return found


def _figures(folder: Path) -> list[dict[str, Any]]:
    """The figures that notebooks wrote, in the order of _FIGURES; plots without loss."""
    found = {}
    names = sorted(file.stem for file in (folder / "figures").glob("*.png"))
    for prefix, caption in _FIGURES.items():
        for name in names:
            if name.startswith(prefix) and name not in found:
                place = re.sub(r"-(\d+x\d+)$", r", \1", name.removeprefix(prefix).strip("-"))
                image = read_image(folder / "figures" / f"{name}.png")
                source, _ = _embed(image, "images-" not in name)
                text = f"{caption}: {place}" if place else caption
                size = {"width": image.width, "height": image.height}
                found[name] = {"name": name, "caption": text, "source": source, **size}
    return list(found.values())


def _gallery(results: Results, lossless_prompts: int, budget: float) -> dict[str, Any]:
    """Prompts, and images with the place that each belongs to; as many whole prompts as the budget holds."""
    order = {variant: i for i, variant in enumerate(tables.variants_of(results.images))}
    images = results.images
    references = results.references
    ids = list(dict.fromkeys(images["id"]))
    entries: list[dict[str, Any]] = []
    prompts: list[str] = []
    used = 0
    for index, identifier in enumerate(ids):
        mine = []
        rows = where(images, id=identifier)
        rows = rows.assign(rank=rows["variant"].map(order)).sort_values(["rank", "setting"], kind="stable")
        for row in rows.itertuples():
            source, size = _embed(read_image(row.path), index < lossless_prompts)
            used += size
            name = ", ".join([label(row.variant), *([row.setting] if row.setting != "default" else [])])
            name += f", seed {row.seed}" if row.seed else ""
            place = {"study": row.study, "model": row.backbone, "size": size_name(row.height, row.width)}
            mine.append({**place, "prompt": index, "name": name, "source": source})
        for row in where(references, id=identifier).itertuples():
            source, size = _embed(read_image(row.path), index < lossless_prompts)
            used += size
            place = {"study": None, "model": None, "size": size_name(row.height, row.width)}
            mine.insert(0, {**place, "prompt": index, "name": TRUE, "source": source})
        if used > budget:
            break
        prompts.append(results.prompt(identifier))
        entries += mine
    return {
        "prompts": prompts,
        "images": entries,
        "all_prompts": len(ids),
        "lossless": min(lossless_prompts, len(prompts)),
        "quality": _LOSSY,
    }


def _embed(image: Image.Image, lossless: bool) -> tuple[str, int]:
    """A data URI of the image as WebP, and its length."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=lossless, quality=60 if lossless else _LOSSY, method=3)
    source = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return source, len(source)
