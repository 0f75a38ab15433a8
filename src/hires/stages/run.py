"""Every stage of a configuration in one process, in order: what the Snakefile does, where Snakemake is missing.

The unit is the image set: its images, their features, their scores, then the next. So a run that is stopped has scored
all that it has made, and a machine with a GPU can hand back scores, which are small, in place of images.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hires import layout
from hires.config import Config, ImageSet
from hires.errors import unknown
from hires.execution.devices import locked_device
from hires.files.storage import claim, not_ahead
from hires.provenance import other_versions, store_config
from hires.shards import Clock
from hires.stages import (
    VERSIONS,
    base,
    checksums,
    collect,
    crops,
    features,
    images,
    metrics,
    notebook,
    prompts,
    provenance,
    references,
    report,
    scores,
)

HELPERS = 4  # processes that render references, extract features and score, while this one keeps the GPU busy


def run(config: Config, *, seconds: float | None = None, backbones: Sequence[str] | None = None) -> bool:
    """Make everything of a configuration, or what `seconds` allow; whether it is complete.

    Finished files are kept. Tables and pages are made again when they are older than what they are made from, or than
    the last change of the configuration. A run that is cut, or restricted to some `backbones`, collects the scores
    that are there; notebooks and report wait for the others.

    Args:
        seconds: after these no shard of images is begun, nor one that would end later than the last of its kind did.
        backbones: names in the configuration's backbones; all when None.
    """
    for name in backbones or ():
        if name not in config.backbones:
            raise unknown("backbone", name, config.backbones)
    notebook.check_all(config)
    with claim(config.root):
        not_ahead(layout.made(config))
        return _run(config, Clock(seconds), backbones or [*config.backbones])


class _Here(Executor):
    """Runs a job at once, in this process: on a CPU there is nothing to wait for."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _helpers(device: str) -> Executor:
    """Processes beside this one. OpenMP's threads wait there without spinning: that would take the cores of others.

    (Six scorers with two threads each on two cores: 18 s, and more than 600 s where they spin.)
    """
    if device == "cpu":
        return _Here()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read as a process starts
    return ProcessPoolExecutor(HELPERS, mp_context=multiprocessing.get_context("spawn"))


def _run(config: Config, clock: Clock, backbones: Sequence[str]) -> bool:
    collect.check(config)
    changed = store_config(config)
    other = other_versions(config)
    for stage, version in other.items():
        print(f"{stage}: version {version} made it, and is {VERSIONS[stage]} now: made again", file=sys.stderr)
    if _old([layout.prompts(config)], [changed], "prompts" in other):
        prompts.run(config)
    with locked_device(config.compute.device) as device, _helpers(device) as helpers:
        work = _Work(config, clock, changed, "scores" in other, device, helpers)
        work.run([made for made in _in_order(config) if made.backbone in backbones])
    missing = metrics.unscored(config)
    if len(missing) == len(config.image_sets()):
        print(f"{config.name}: no image set is scored yet", file=sys.stderr)
        provenance.run(config, partial=True)  # what another machine collects from
        return False
    tables = [layout.metrics(config), layout.paired(config)]
    scored = [layout.scores(config, made) for made in config.image_sets() if made not in missing]
    measured = [file for made in config.image_sets() if (file := layout.costs(config, made)).is_file()]
    if missing or _old(tables, [changed, *scored, *measured], "metrics" in other):
        metrics.run(config, partial=True)
    provenance.run(config, partial=bool(missing))
    if missing:
        return False
    for name in config.notebooks:
        made_from = [changed, *tables, notebook.NOTEBOOKS / f"{name}.ipynb"]
        if _old([layout.notebook(config, name)], made_from, "notebook" in other):
            notebook.run(config, name)
    report.run(config)
    checksums.run(config)
    return True


def _in_order(config: Config) -> list[ImageSet]:
    """Study by study; within one, the image sets of a backbone together, as a model is loaded for them."""
    order = [*config.studies], [*config.backbones]
    return sorted(config.image_sets(), key=lambda made: (order[0].index(made.study), order[1].index(made.backbone)))


@dataclass
class _Work:
    """The image sets of one run, in their order; `pending` ones wait for their features, or for their references.

    `anew`: scores are made in any case, as another version of the stage made those that are there.
    """

    config: Config
    clock: Clock
    changed: Path
    anew: bool
    device: str
    helpers: Executor
    references: dict[tuple[int, int], Future] = field(default_factory=dict)
    based: set[tuple[str, str, int]] = field(default_factory=set)
    pending: list[tuple[ImageSet, Future]] = field(default_factory=list)
    scoring: list[Future] = field(default_factory=list)

    def run(self, sets: Sequence[ImageSet]) -> None:
        elsewhere = collect.elsewhere(self.config)
        sets = [made for made in sets if made not in elsewhere]
        needed = {(made.height, made.width) for made in sets}
        for height, width, _ in layout.references(self.config):
            if (height, width) in needed:
                job = self.helpers.submit(_references, self.config, height, width, self.device)
                self.references[height, width] = job
        for made in sets:
            if not self._make(made):
                break
            extracted = self.helpers.submit(features.run, self.config, **_names(made), device=self.device)
            self.pending.append((made, extracted))
            self._score(wait=False)
        self._score(wait=True)
        for future in self.scoring:
            future.result()

    def _make(self, made: ImageSet) -> bool:
        """Make the images of a set; whether there was time for all of them."""
        start = layout.base_of(self.config, made)
        latents = start and layout.base_set(self.config, made.backbone, start.name)
        for shard in layout.shards(self.config, made.n):
            kind = made.backbone, made.variant, made.size
            if self.clock.over(kind):
                return False
            with self.clock.timed(kind):
                if latents and (made.backbone, latents.name, shard) not in self.based:
                    base.run(self.config, made.backbone, latents.name, shard, device=self.device)
                    self.based.add((made.backbone, latents.name, shard))
                images.run(self.config, **_names(made), shard=shard, device=self.device)
        return True

    def _score(self, wait: bool) -> None:
        """Score those pending sets whose features and references are there, or all of them where it may `wait`."""
        waiting, self.pending = self.pending, []
        for made, extracted in waiting:
            size = made.height, made.width
            needs = self.references[size], extracted
            if not (wait or all(need.done() for need in needs)):
                self.pending.append((made, extracted))
                continue
            for need in needs:
                need.result()
            if _old([layout.crops(self.config, made)], [layout.features(self.config, made)]):
                crops.run(self.config, made)
            made_from = [self.changed, layout.reference_features(self.config, *size)]
            made_from += [layout.features(self.config, made), *layout.image_shards(self.config, made)]
            targets = [layout.scores(self.config, made), layout.image_scores(self.config, made)]
            if _old(targets, made_from, self.anew):
                self.scoring.append(self.helpers.submit(scores.run, self.config, **_names(made)))


def _references(config: Config, height: int, width: int, device: str) -> None:
    """The references of one size, and their features."""
    references.run(config, height, width)
    features.run_references(config, height, width, device=device)


def _names(made: ImageSet) -> dict[str, Any]:
    """What the stages call one image set."""
    place = {"study": made.study, "backbone": made.backbone, "height": made.height, "width": made.width}
    return {**place, "settings": [made.setting], "variants": [made.variant]}


def _old(targets: Sequence[Path], made_from: Sequence[Path], anew: bool = False) -> bool:
    """Whether targets are to be made `anew`, or one is missing, or older than something that it is made from."""
    if anew or not all(target.exists() for target in targets):
        return True
    oldest = min(target.stat().st_mtime_ns for target in targets)
    return any(path.stat().st_mtime_ns > oldest for path in made_from)
