"""Scores of an image set from its features: values, intervals, flags, and paired differences between sets."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from hires.analysis.results import BETWEEN, named
from hires.analysis.statistics import holm, p_value
from hires.config import Metrics
from hires.metrics import distances
from hires.metrics.bootstrap import centred, draw_prompts, exact_count, exact_share, expanded_interval, interval
from hires.metrics.features import Features
from hires.metrics.networks import QUALITY
from hires.metrics.pixels import BANDS, LOW
from hires.metrics.protocol import Protocol, Samples, samples_of, split_name
from hires.metrics.seams import Borders, seams

FID_REPLICATES = 200  # at most: each takes singular values
ROW = ["metric", "value", "low", "high", "n", "flag", "protocol"]
TIDY = ["study", "setting", "trial", "backbone", "variant", "height", "width", *ROW]
PAIRED = ["study", "setting", "backbone", "height", "width", "metric", "a", "b", "difference", "low", "high", "n"]
PAIRED += ["p", "p_holm"]
PER_IMAGE = {
    "clip": ["clip"],
    "clip_iqa": ["clip_iqa"],
    "count": ["count"],
    "colours": ["colours"],
    "repetition": ["repetition"],
    "spectrum": [f"spectrum_{band}" for band in BANDS],
    "high_band": ["high_band"],
    "low_band": ["low_band"],
    "seams": ["seams"],
    "seconds": ["seconds"],
    "peak_bytes": ["peak_bytes"],
}
EXACT = {"count": exact_share, "colours": exact_share, "repetition": exact_count}  # where all images agree


@dataclass(frozen=True)
class Score:
    """One number with its replicates over resampled `prompts`, or drawn from what is known of its spread (None)."""

    metric: str
    value: float
    replicates: NDArray[np.float64]
    n: int
    flag: str
    protocol: str
    prompts: int | None = None

    def row(self) -> dict:
        if self.prompts is None:
            low, high = interval(self.replicates)
        elif self.metric in EXACT and self.prompts > 2 and np.ptp(self.replicates) == 0:
            low, high = EXACT[self.metric](self.value, self.prompts)
        else:
            low, high = expanded_interval(self.replicates, self.prompts)
        return {**self.__dict__, "low": low, "high": high, "replicates": self.replicates.tolist()}


def per_image(
    images: Features,
    scores: Iterable[str],
    manifest: pd.DataFrame | None = None,
    references: Features | None = None,
    borders: Borders | None = None,
) -> pd.DataFrame:
    """Scores that single images have: columns id, seed, metric, value.

    clip: 100 · cos of image and prompt (Hessel et al. 2021), not cut at 0. clip_iqa: `Clip.quality`, where the encoders
    know photographs. count: 1 where as many objects are found as the scene has. colours: 1 where every colour of the
    scene is found. repetition: objects beyond the scene's. spectrum_low, _mid, _high: log₁₀ band powers
    (`pixels.band_powers`). high_band: spectrum_high less that of the prompt's own reference, in decades: below 0 too
    smooth, above 0 over-textured. low_band: root mean square difference from that reference's coarse layout, in grey
    levels (`pixels.low_band`); a caption leaves the layout free, so that only differences between variants tell
    something. seams: `seams.seams` on `borders`, less that of the reference on the same borders, as layouts have
    lines that objects rarely cross. seconds, peak_bytes: from `manifest` (columns id, seed, seconds, peak_bytes).
    Scores that need a scene, a reference, borders or a manifest are left out where there is none.
    """
    t, values = images.tensors, {}
    cosine = torch.nn.functional.cosine_similarity(t["clip_image"].double(), t["clip_text"].double())
    values["clip"] = 100 * cosine.numpy()
    if "clip_iqa" in t:
        values["clip_iqa"] = t["clip_iqa"].double().numpy()
    values |= {f"spectrum_{band}": t["bands"][:, k].numpy() for k, band in enumerate(BANDS)}
    if "objects" in t:
        found, true = t["objects"], t["true_objects"]
        extra = found.sum(1) - true.sum(1)
        values["count"] = (extra == 0).double().numpy()
        values["colours"] = ((found > 0) | (true == 0)).all(1).double().numpy()
        values["repetition"] = extra.clamp(min=0).double().numpy()
    if manifest is not None:
        rows = manifest.set_index(["id", "seed"]).loc[list(zip(images.ids, images.seeds))]
        measured = rows[["seconds", "peak_bytes"]].astype(float).dropna(axis=1)
        values |= {name: measured[name].to_numpy() for name in measured}
    scores = list(scores)
    wanted = [name for score in scores for name in PER_IMAGE.get(score, []) if name in values]
    place = {"id": images.ids, "seed": images.seeds}
    tables = [pd.DataFrame({**place, "metric": name, "value": values[name]}) for name in wanted]
    if references is not None:
        beside = _beside_references(images, references, borders)
        tables += [rows for name, rows in beside.items() if name in scores]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["id", "seed", "metric", "value"])


def _beside_references(images: Features, references: Features, borders: Borders | None) -> dict[str, pd.DataFrame]:
    """Per-image scores that compare with the reference of the same prompt; images without one are left aside."""
    rows = {name: i for i, name in enumerate(references.ids)}
    images = images.take([i for i, name in enumerate(images.ids) if name in rows])
    true = references.take([rows[name] for name in images.ids])
    high = images.tensors["bands"][:, -1] - true.tensors["bands"][:, -1]
    low = (images.tensors["low"].double() - true.tensors["low"]).square().mean((1, 2, 3)).sqrt()
    values = {"high_band": high.numpy(), "low_band": low.numpy()}
    if borders is not None:
        here, there = (seams(f.tensors["row_steps"], f.tensors["column_steps"], borders) for f in (images, true))
        if here is not None and there is not None:
            values["seams"] = here - there
    place = {"id": images.ids, "seed": images.seeds}
    return {name: pd.DataFrame({**place, "metric": name, "value": found}) for name, found in values.items()}


def score(images: Features, references: Features, settings: Metrics, table: pd.DataFrame) -> list[Score]:
    """All of `settings.scores` that are defined for these images.

    Intervals: 95 % of `settings.bootstrap` resamples of the prompts (at most FID_REPLICATES for FID), drawn alike for
    every image set, expanded (`bootstrap.expanded_interval`); `EXACT` ones where all images agree. FID, KID and
    spectrum compare with the references of the same prompts, resampled with them. So each image meets its own prompt's
    reference, which lowers KID by twice what such pairs are nearer than others, over n: only KID of equal n compare.

    Args:
        references: one image of each prompt, or of most (addresses die); those of other prompts are left aside.
        table: what `per_image` gave.
    """
    names = {name: i for i, name in enumerate(dict.fromkeys(images.ids))}
    rows = {name: i for i, name in enumerate(references.ids)}
    there = [name for name in names if name in rows]
    owners = torch.tensor([names[name] for name in there], dtype=torch.long)
    return _Scorer(images, references.take([rows[name] for name in there]), owners, settings).all(table)


def _measured(images: Features) -> dict[str, str]:
    """How scores that single images have were measured, by metric; seconds say it by their name."""
    meta, cut = images.metadata, int(images.tensors["cut"].sum())
    encoders = f"{meta['clip']}, {meta['clip_view']}"
    power = "log10 of grey-level variance in"
    return {
        "clip": f"{encoders}, {cut} of {len(images)} prompts cut at {meta['clip_length']} tokens",
        "clip_iqa": f"{encoders}, {' against '.join(map(repr, QUALITY))}",
        **dict.fromkeys(EXACT, "objects read by hires.scenes.parse; exact interval where all images agree"),
        "seams": "log10 of gradient energy on patch borders over that on other token borders, less the true image's",
        "high_band": f"{power} .5–1 of Nyquist, less that of the true image",
        "low_band": f"root mean square difference from the true image, both reduced to {LOW}x{LOW} parts",
        **{
            f"spectrum_{name}": f"{power} {low:g}–{high:g} of Nyquist, Hann window"
            for name, (low, high) in BANDS.items()
        },
        "peak_bytes": "highest of all images",
    }


class _Scorer:
    """`owners` (m,): to which prompt of `images`, counted in their order, each reference belongs."""

    def __init__(self, images: Features, references: Features, owners: Tensor, settings: Metrics):
        self.images, self.references, self.reference_prompts, self.settings = images, references, owners, settings
        names = list(dict.fromkeys(images.ids))
        self.place = {name: i for i, name in enumerate(names)}
        self.prompts = torch.tensor([self.place[name] for name in images.ids])
        self.draws = draw_prompts(len(names), settings.bootstrap)
        self.measured = _measured(images)
        self.note = f"interval: {settings.bootstrap} resamples of {len(names)} prompts"

    def all(self, table: pd.DataFrame) -> list[Score]:
        found = [self.mean(str(name), rows) for name, rows in table.groupby("metric", sort=False)]
        makers: dict[str, Callable[[Samples], Score | None]] = {
            "fid": self.fid,
            "kid": self.kid,
            "is": self.inception_score,
        }
        for name in self.settings.scores:
            if (formula := name.partition("_")[0]) in makers and (made := makers[formula](split_name(name)[1])):
                found.append(replace(made, metric=name))
        if "spectrum" in self.settings.scores and "objects" in self.images.tensors:
            found.append(self.spectrum())
        return found

    def mean(self, metric: str, rows: pd.DataFrame) -> Score:
        values = rows["value"].to_numpy()
        weights = self.draws[:, [self.place[name] for name in rows["id"]]].numpy().astype(np.float64)
        if metric == "peak_bytes":
            value, replicates = values.max(), np.where(weights > 0, values, -np.inf).max(1)
        else:
            value, replicates = values.mean(), weights @ values / weights.sum(1)
        measured = [self.measured[metric]] if metric in self.measured else []
        return self.make(metric, float(value), replicates, "", "; ".join([*measured, self.note]))

    def fid(self, samples: Samples) -> Score | None:
        (x, i), (y, j) = self.compared(samples)
        if min(len(x), len(y)) < 2:
            return None
        draws = self.draws[:FID_REPLICATES].double()
        replicates = distances.fid_replicates(x, y, i, j, draws).numpy() if self.several else np.empty(0)
        value = distances.fid(x, y)
        short = min(len(x), len(y))
        few = f"{short} samples for {x.shape[1]} dimensions: biased upwards" if short <= x.shape[1] else ""
        note = self.note.replace(f"{self.settings.bootstrap} resamples", f"{len(draws)} resamples")
        return self.make("fid", value, replicates, few, f"{self.protocol(samples)}; {note}", centre=True)

    def kid(self, samples: Samples) -> Score | None:
        (x, i), (y, j) = self.compared(samples)
        size, subsets = self.settings.kid_subset_size, self.settings.kid_subsets
        if min(len(x), len(y)) < size:
            return None
        value, _ = distances.kid(x, y, size, subsets, torch.Generator().manual_seed(0))
        replicates = distances.kid_replicates(x, y, i, j, self.draws).numpy() if self.several else np.empty(0)
        text = f"{self.protocol(samples)}; cubic kernel, {subsets} subsets of {size}; {self.note}"
        return self.make("kid", value, replicates, "", text, centre=True)

    def inception_score(self, samples: Samples) -> Score | None:
        logits, owners = samples_of(self.images, samples, self.prompts, "logits")
        splits = self.images.metadata["splits"]
        if len(logits) < 2 * splits:
            return None
        value, _ = distances.inception_score(logits, splits, torch.Generator().manual_seed(0))
        replicates = distances.inception_score_replicates(logits, owners, self.draws).numpy()
        how = f"{logits.shape[1]} classes, {splits} split{'s' * (splits > 1)}"
        text = f"{Protocol.of(samples, self.images, None)}; {how}; {self.note}"
        return self.make("is", value, replicates, "", text, centre=True)

    def spectrum(self) -> Score:
        x, y = (f.tensors["bands"].numpy() for f in (self.images, self.references))
        weights = self.draws[:, self.prompts].numpy().astype(np.float64)
        draws = self.draws[:, self.reference_prompts].numpy().astype(np.float64)
        means = weights @ x / weights.sum(1, keepdims=True) - draws @ y / draws.sum(1, keepdims=True)
        value = float(np.abs(x.mean(0) - y.mean(0)).mean())
        text = f"mean over {len(BANDS)} bands of |mean log10 power − that of the true renders|; {self.note}"
        return self.make("spectrum", value, np.abs(means).mean(1), "", text, centre=True)

    @property
    def several(self) -> bool:
        """Whether there is an interval: two prompts give one and the same resample (see `bootstrap.draw_prompts`)."""
        return self.draws.shape[1] > 2

    def compared(self, samples: Samples) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Features and their prompts, of the images and of the references."""
        return (
            samples_of(self.images, samples, self.prompts),
            samples_of(self.references, samples, self.reference_prompts),
        )

    def protocol(self, samples: Samples) -> Protocol:
        return Protocol.of(samples, self.images, self.references)

    def make(
        self,
        metric: str,
        value: float,
        replicates: NDArray[np.float64],
        few: str,
        protocol: str,
        centre: bool = False,
    ) -> Score:
        n = len(self.images)
        least = self.settings.minimum_n or self.images.tensors["features"].shape[1]
        flags = [few] if few else []
        if metric in ("fid", "kid", "is") and n < least:
            flags.insert(0, f"n = {n}, below {least}")
        if not self.several:
            flags.append(f"{('one prompt', 'two prompts')[self.draws.shape[1] - 1]}: no interval")
            replicates = np.array([value])
        elif centre:
            replicates = centred(replicates, value)
        return Score(metric, value, replicates, n, "; ".join(flags), protocol, self.draws.shape[1])


def over_trials(trials: Sequence[Sequence[Score]]) -> list[Score]:
    """Means over trials, the same prompts with other seeds: every score is taken at a trial's own n, as papers do.

    All trials are resampled by the same draws of prompts, so the means of their replicates are those of a bootstrap
    over prompts with all seeds of a prompt together. n counts the images of all trials.
    """
    if len(trials) == 1:
        return list(trials[0])
    found = []
    for same in zip(*trials, strict=True):
        value = float(np.mean([s.value for s in same]))
        replicates = np.mean([s.replicates for s in same], axis=0)
        protocol = f"mean over {len(same)} seeds; {same[0].protocol}"
        n, prompts = sum(s.n for s in same), same[0].prompts
        found.append(Score(same[0].metric, value, replicates, n, same[0].flag, protocol, prompts))
    return found


def ceiling(references: Features, settings: Metrics, borders: Borders | None = None) -> list[Score]:
    """The references scored as if they were an image set, as the best that can be reached.

    Single-image scores, IS and spectrum as they are; FID and KID of every second reference against the others, with
    half the KID subset size.
    """
    table = per_image(references, settings.scores, references=references, borders=borders)
    single = score(references, references, settings, table)
    found = [s for s in single if s.metric.partition("_")[0] not in ("fid", "kid")]
    half = len(references) // 2
    if half:
        even, odd = references.take(range(0, 2 * half, 2)), references.take(range(1, 2 * half, 2))
        only = {
            "scores": [name for name in settings.scores if name.partition("_")[0] in ("fid", "kid")],
            "kid_subset_size": max(2, settings.kid_subset_size // 2),
        }
        halves = _Scorer(even, odd, torch.arange(half), settings.model_copy(update=only))
        empty = pd.DataFrame(columns=["id", "seed", "metric", "value"])
        found += [
            replace(s, protocol=f"every second reference against the others; {s.protocol}") for s in halves.all(empty)
        ]
    return found


def frame(scores: Sequence[Score], **columns) -> pd.DataFrame:
    """Tidy rows of scores, with the given columns before them and their replicates behind."""
    rows = pd.DataFrame([s.row() for s in scores], columns=[*ROW, "replicates"])
    return pd.concat([pd.DataFrame(columns, index=rows.index), rows], axis=1)


MEAN = "mean"  # of a study's settings, where paired.parquet names a setting


def _means(scores: pd.DataFrame) -> pd.DataFrame:
    """Each variant's score over all settings of its study; none where one is missing, or differs in n."""
    settings = scores.groupby("study")["setting"].nunique()
    rows = []
    for key, group in scores.groupby(["study", "backbone", "variant", "height", "width", "metric"], sort=False):
        if len(group) == settings[key[0]] > 1 and (group["n"] == group["n"].iloc[0]).all():
            mean = {"value": group["value"].mean(), "replicates": np.mean(group["replicates"].tolist(), axis=0)}
            rows.append({**group.iloc[0], "setting": MEAN, **mean})
    return pd.DataFrame(rows, columns=scores.columns)


def paired(scores: pd.DataFrame) -> pd.DataFrame:
    """Differences a − b between the image sets of each study, backbone and size, with 95 % intervals.

    Compared are the variants of one setting, and the settings of one variant: these stand under the setting `BETWEEN`,
    with a and b `named` by both. A study of several settings also has the means over them, under the setting `MEAN`.

    Replicates of both sides come from the same resampled prompts (`bootstrap.draw_prompts`), so their differences are
    those of a paired bootstrap: for a mean over images that of the per-image differences, for FID, KID and IS that of
    the sets. Intervals are `bootstrap.expanded_interval`, p is raw (`statistics.p_value`); p_holm is corrected for the
    pairs of one metric that stand together here, of all variants in one setting, or of all settings of one variant.

    Args:
        scores: what `frame` gave for image sets; one trial.
    """
    place = ["study", "setting", "backbone", "height", "width", "metric"]
    within = pd.concat([scores, _means(scores)])
    within = within.assign(name=within["variant"])
    across = scores.assign(setting=BETWEEN, name=[*map(named, scores["variant"], scores["setting"])])
    found = []
    for rows, keys in ((within, place), (across, [*place, "variant"])):
        for key, group in rows.groupby(keys, sort=False):
            family = []
            for a, b in combinations(group.itertuples(), 2):
                if a.n != b.n:
                    continue
                replicates, difference = np.asarray(a.replicates) - np.asarray(b.replicates), a.value - b.value
                test = [difference, *expanded_interval(replicates, a.n), a.n, p_value(difference, replicates, a.n)]
                family.append([*key[: len(place)], a.name, b.name, *test])
            corrected = holm([test[-1] for test in family])
            found += [[*test, p] for test, p in zip(family, corrected)]
    return pd.DataFrame(found, columns=PAIRED)
