"""Many prompts, jobs and images: time and memory stay in proportion. Full size: docs/log.md, "Load"."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from hires import layout, provenance, shards
from hires.analysis.results import METRICS, PAIRED, Results
from hires.config import load_config
from hires.data.prompts import read_prompts
from hires.files import parquet
from hires.files.storage import read_json, sealed, write_json
from hires.provenance.schema import Provenance
from hires.report import write
from hires.stages import images, prompts
from hires.stages import provenance as provenance_stage

ROOT = Path(__file__).parents[1]
GIB = 2**30


MEASURE = """
import json, os, subprocess, sys
child = subprocess.Popen(sys.argv[2:], stdout=open("output", "w"), stderr=subprocess.STDOUT)
_, status, used = os.wait4(child.pid, 0)
found = [os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]
json.dump(found, open(sys.argv[1], "w"))
"""


def run(folder, *command):
    """(output, CPU seconds, peak bytes) of a process and its children.

    Started by a small process: Linux counts the memory of the one that starts it.
    """
    subprocess.run([sys.executable, "-c", MEASURE, "measured", *map(str, command)], cwd=folder, check=True)
    code, seconds, peak = json.loads((folder / "measured").read_text())
    text = (folder / "output").read_text()
    assert code == 0, text
    return text, seconds, peak


def small(path, n, shard_size):
    """config/load.yaml for fewer prompts."""
    text = (ROOT / "config/load.yaml").read_text().replace("105000", str(n + n // 10)).replace("100000", str(n))
    path.write_text(text.replace("shard_size: 500", f"shard_size: {shard_size}, device: cpu"))
    return load_config(path)


def test_prompts_in_bounded_memory(tmp_path):
    small(tmp_path / "load.yaml", 10000, 500)
    _, seconds, peak = run(tmp_path, sys.executable, "-m", "hires.cli", "prompts", "--config", "load.yaml")
    drawn = read_prompts(tmp_path / "results/load/prompts.parquet")
    assert len({prompt.id for prompt in drawn}) == 10000
    assert seconds < 10 and peak < GIB


def test_the_jobs_of_a_hundred_thousand_prompts(tmp_path):
    for name in ("rules", "config", "notebooks", "profiles", "environment.yml"):
        (tmp_path / name).symlink_to(ROOT / name)
    snakemake = Path(sys.executable).parent / "snakemake"
    options = ("--dry-run", "--quiet", "rules", "--cores", "1", "--configfile", "config/load.yaml")
    text, seconds, peak = run(tmp_path, snakemake, "all", "--snakefile", ROOT / "Snakefile", *options)
    jobs = dict(line.split() for line in text.splitlines() if len(line.split()) == 2)
    assert (jobs["base"], jobs["images_main"], jobs["scores_main"]) == ("400", "400", "2")
    assert seconds < 30 and peak < GIB


@pytest.fixture
def config(tmp_path, monkeypatch):
    """2,000 prompts in shards of 1,000, drawn."""
    monkeypatch.chdir(tmp_path)
    config = small(tmp_path / "load.yaml", 2000, 1000)
    prompts.run(config)
    return config


def test_a_folder_of_a_thousand_finished_images_is_gone_through_quickly(config):
    made = config.image_set("main", "default", "tiny-flux", "npa", 256, 256)
    items = images.items(config, made, 0)
    origin = provenance.record(config, model="tiny-flux", revision="random")
    for item in items:
        item.finish(b"an image", seconds=1.0, peak_bytes=1, provenance=origin)
    started = time.process_time()
    assert len(items) == 1000 and shards.batches(items, 1) == []
    shards.write_manifest(layout.image_shard(config, made, 0), images.head(made), "images", items)
    assert time.process_time() - started < 5
    assert len(Results(config.root, config.root).images) == 1000


def fabricate(config):
    """Manifests of 40,000 images, pictures of the first prompts only, and a table of scores."""
    origin = provenance.record(config, model="tiny-flux", revision="random")
    drawn = shards.drawn(config)
    for made in config.image_sets():
        for shard in layout.shards(config, made.n):
            rows = layout.shard_rows(config, made.n, shard)
            entries = [{"id": drawn[i].id, "seed": 0, "file": f"{drawn[i].id}-0.png", "seconds": 1.0} for i in rows]
            entries = [{**entry, "sha256": "0" * 64} for entry in entries]
            path = layout.image_shard(config, made, shard)
            write_json(path, sealed({**images.head(made), "images": entries, "provenance": [origin]}))
        for prompt in drawn[:10]:
            Image.effect_noise((256, 256), 80).save(layout.image(config, made, prompt.id, 0))
    for base in layout.base_sets(config):
        head = {"version": 1, "backbone": base.backbone, "height": base.height, "width": base.width}
        for path in layout.base_shards(config, base):
            write_json(path, sealed({**head, "latents": [], "provenance": [origin]}))
    score = {"trial": "all", "metric": "fid", "value": 1.0, "low": 0.5, "high": 1.5, "n": 2000}
    score |= {"flag": "", "protocol": "", "height": 256, "width": 256, "study": "main", "setting": "default"}
    rows = [{**score, "backbone": s.backbone, "variant": s.variant} for s in config.image_sets()]
    parquet.write_frame(layout.metrics(config), pd.DataFrame(rows)[METRICS])
    parquet.write_frame(layout.paired(config), pd.DataFrame(columns=PAIRED))


def test_provenance_and_report_of_many_images(config):
    fabricate(config)
    started = time.process_time()
    provenance_stage.run(config)
    found = Provenance.of(read_json(layout.provenance(config)), "")
    assert found.images.n == 40000 and len(found.runs) == 1
    results = Results.open(config.root)
    assert len(results.images) == 40000
    write(results, layout.report(config), "load", lossless_prompts=0, max_megabytes=3)
    assert time.process_time() - started < 20
    page = layout.report(config).read_text()
    assert 1e6 < len(page) < 4e6 and "of 2000 prompts" in page
