"""Coverage and size of the intervals and tests of differences, by simulation: `python tests/simulate_statistics.py`.

Prompts have effects that variants share, and features those that true renders share too; every image has noise of its
own. Two variants are alike (the size of a test), a third is a little better (power). Minutes on one core.
`… noise` instead paints base images of both small models, with one noise for all prompts of a trial and with their own.
"""

import sys
from collections import defaultdict

import numpy as np
import pandas as pd
import torch
from scipy import stats

import hires
from hires.analysis.results import Results, where
from hires.analysis.statistics import LEVEL, holm, p_value, t_p_value
from hires.cascade import base_latents
from hires.config import Metrics
from hires.metrics import distances, paired, score
from hires.metrics.bootstrap import draw_prompts, expanded_interval, interval
from hires.metrics.features import Features
from hires.metrics.scores import Score, frame, over_trials
from hires.scenes import caption, scene, scene_ids
from hires.settings import Sampling
from hires.shards import noise_seed

D = 128
SPECTRUM = 1 / np.sqrt(np.arange(1, D + 1))
META = {"network": "none", "view": "whole", "clip": "none", "clip_view": "whole", "clip_length": 77, "crops": None}
PLACE = {"study": "s", "setting": "default", "backbone": "b", "height": 64, "width": 64}


def normal(rng, tails, *shape):
    """Gaussian rows with a decaying spectrum; with `tails` their scale varies as that of Student's t of five."""
    scale = np.sqrt(3 / rng.chisquare(5, (*shape, 1))) if tails else 1
    return scale * SPECTRUM * rng.standard_normal((*shape, D))


def scored(rng, n, trials, settings, tails):
    """Scores of a, b (alike) and c (better) with their replicates."""
    ids = [f"{i:06}" for i in range(n)]

    def features(x):
        x = torch.from_numpy(x).float()
        return Features(ids, [0] * n, {"features": x, "logits": 2 * x, "cut": torch.zeros(n)}, {**META, "splits": 1})

    prompts, ease = normal(rng, tails, n), rng.standard_normal(n)
    references = features(prompts + 0.5 * normal(rng, tails, n))
    rows = []
    for variant, better in (("a", 0), ("b", 0), ("c", 1)):
        found = []
        for _ in range(trials):
            images = 0.9 * prompts + 0.6 * normal(rng, tails, n) + (0.25 - 0.05 * better) * SPECTRUM
            skill = 0.8 * ease + 0.6 * rng.standard_normal(n) + 0.15 * better
            values = {"count": skill > -0.3, "repetition": np.floor(np.exp(-1.2 * skill - 1.5)), "high_band": skill}
            tables = [pd.DataFrame({"id": ids, "metric": m, "value": v}) for m, v in values.items()]
            table = pd.concat(tables).astype({"value": float})
            found.append(score(features(images), references, settings, table))
        rows.append(frame(over_trials(found), trial="all", variant=variant, **PLACE))
    return pd.concat(rows)


def scores_and_differences(n, trials=1, tails=False, simulations=100, subsets=(128, 100)):
    settings = Metrics(kid_subset_size=min(n, subsets[0]), kid_subsets=subsets[1], scores=["fid", "kid", "is"])
    single, double = [], []
    for seed in range(simulations):
        made = scored(np.random.default_rng([n, trials, seed]), n, trials, settings, tails)
        single.append(made.drop(columns="replicates"))
        tests = paired(made)
        double.append(tests[tests["setting"] == "default"])
    scores, tests = pd.concat(single), pd.concat(double)
    for metric, rows in scores.groupby("metric", sort=False):
        truth = rows.groupby("variant")["value"].transform("mean")
        differences = tests[tests["metric"] == metric]
        null, effect = (differences[(differences["a"] == "a") & (differences["b"] == b)] for b in "bc")
        told = {
            "score covered": ((rows["low"] <= truth) & (truth <= rows["high"])).mean(),
            "difference covered": ((null["low"] <= 0) & (null["high"] >= 0)).mean(),
            "p < .05": (null["p"] < LEVEL).mean(),
            "power": (effect["p"] < LEVEL).mean(),
        }
        name = f"{metric}{', heavy tails' if tails else ''}"
        print(f"{name:24} n {n:5} x {trials}  " + "  ".join(f"{k} {v:.3f}" for k, v in told.items()), flush=True)


def means(n, simulations=4000):
    """Differences of per-image scores alone, as there may be many of these."""
    rng = np.random.default_rng(n)
    draws = draw_prompts(n, 1000).double().numpy() / n
    kinds = {
        "normal": lambda x: x,
        "count": lambda x: (x > -0.3) * 1.0,
        "rare": lambda x: (x > 2) * 1.0,
        "repetition": lambda x: np.floor(np.exp(1.2 * x - 1.5)),
        "heavy tails": lambda x: x**3,
    }
    for kind, of in kinds.items():
        tally = defaultdict(list)
        for _ in range(simulations):
            a, b = of(0.8 * rng.standard_normal(n) + 0.6 * rng.standard_normal((2, n)))
            replicates, difference = draws @ (a - b), float((a - b).mean())
            (low, high), p = expanded_interval(replicates, n), p_value(difference, replicates, n)
            plain = np.quantile(replicates, [0.025, 0.975])
            z = 2 * stats.norm.sf(abs(difference) / max(replicates.std(), 1e-12))
            tally["covered"].append(low <= 0 <= high)
            tally["p < .05"].append(p < LEVEL)
            tally["plain percentiles"].append(plain[0] <= 0 <= plain[1])
            tally["normal p < .05"].append(z < LEVEL)
        print(f"{kind:24} n {n:5}  " + "  ".join(f"{k} {np.mean(v):.3f}" for k, v in tally.items()), flush=True)


def own_intervals(n, simulations=2000):
    """Own intervals of means: plain percentiles, expanded ones, and with exact ones where all images agree."""
    rng = np.random.default_rng(n)
    draws = draw_prompts(n, 1000).double().numpy() / n
    kinds = {
        "count 2%": ("count", lambda x: x < stats.norm.ppf(0.02)),
        "count 10%": ("count", lambda x: x < stats.norm.ppf(0.1)),
        "count 50%": ("count", lambda x: x < 0),
        "repetition": ("repetition", lambda x: np.floor(np.exp(1.2 * x - 1.5))),
        "rare repetition": ("repetition", lambda x: np.floor(np.exp(1.2 * x - 2.5))),
        "normal": ("high_band", lambda x: x),
    }
    for kind, (metric, of) in kinds.items():
        truth, tally, same = of(stats.norm.ppf((np.arange(10**6) + 0.5) / 10**6)).mean(), defaultdict(list), 0
        for _ in range(simulations):
            values = of(rng.standard_normal(n)) * 1.0
            replicates = draws @ values
            row = Score(metric, values.mean(), replicates, n, "", "", n).row()
            same += np.ptp(values) == 0
            for how, (low, high) in (
                ("plain", interval(replicates)),
                ("expanded", expanded_interval(replicates, n)),
                ("now", (row["low"], row["high"])),
            ):
                tally[how].append(low <= truth <= high)
        told = "  ".join(f"{how} {np.mean(v):.3f}" for how, v in tally.items())
        print(f"own interval of {kind:16} n {n:5}  {told}  all agree {same / simulations:.3f}", flush=True)


def seeds(shared, trials=5, n=1000, simulations=10_000, family=137):
    """Tests of a mean over prompts and seeds: noise of a seed, `shared` times the standard error over prompts."""
    rng = np.random.default_rng(0)
    of_prompts, of_images = 1 / np.sqrt(n), 1 / np.sqrt(n)
    error = np.sqrt(of_prompts**2 + of_images**2 / trials)
    values = of_prompts * rng.standard_normal((simulations, 1)) + of_images * rng.standard_normal((simulations, trials))
    values += shared * error * np.sqrt(trials) * rng.standard_normal((simulations, trials))
    prompts = 2 * stats.norm.sf(abs(values.mean(1)) / error)
    over = np.array([t_p_value(v) for v in values])
    variance = values.var(1, ddof=1) / trials
    freedom = (variance + error**2) ** 2 / (variance**2 / (trials - 1))  # Satterthwaite's
    added = 2 * stats.t.sf(abs(values.mean(1)) / np.sqrt(variance + error**2), freedom)
    told = []
    for name, p in (("prompts", prompts), ("seeds", over), ("both", np.maximum(prompts, over)), ("added", added)):
        families = p[: simulations // family * family].reshape(-1, family)
        wrong = np.mean([(holm(each) < LEVEL).any() for each in families])
        told.append(f"{name} p < .05 {(p < LEVEL).mean():.3f}, any of {family} by Holm {wrong:.2f}")
    print(f"shared noise {shared:g}  " + "  ".join(told), flush=True)


def noise_of_seeds():
    """Standard error over the seeds of `components` by that over prompts, in the median over its differences."""
    results = Results.open("results/reference")
    keys = ["backbone", "variant", "metric", "height"]
    trials = where(results.trials, study="components").pivot_table("value", keys, "trial")
    ratios = []
    for row in where(results.paired, study="components", setting="default").itertuples():
        a, b = (trials.loc[(row.backbone, v, row.metric, row.height)] for v in (row.a, row.b))
        if row.high > row.low:
            ratios.append((a - b).std(ddof=1) / np.sqrt(len(a)) / ((row.high - row.low) / 3.92))
    print(f"noise of seeds ÷ error over prompts: median {np.median(ratios):.2f} of {len(ratios)} differences")


def noise_of_trials(model, prompts=32, trials=10):
    """Spread of a trial's mean over prompts by what noise of each prompt's own would give: 1 where it has its own.

    Of base images: brightness, red less blue, log₁₀ of the grey variance, log₁₀ of the energy of its horizontal steps.
    """
    backbone = hires.load(model, device="cpu")
    texts = [caption(scene(i)) for i in scene_ids("held-out", prompts)]
    side, sampling = backbone.base_resolution, Sampling().over(backbone.defaults)
    for how, seed_of in (("one noise a trial", lambda text, trial: trial), ("noise of its own", noise_seed)):
        rows = []
        for trial in range(trials):
            made = []
            for start in range(0, prompts, 8):
                some = texts[start : start + 8]
                seeds = [seed_of(text, trial) for text in some]
                made.append(backbone.decode(base_latents(backbone, some, seeds, side, side, sampling)).numpy())
            pixels = np.concatenate(made)
            grey = pixels.mean(1)
            steps = np.square(np.diff(grey, axis=2)).mean((1, 2))
            red = (pixels[:, 0] - pixels[:, 2]).mean((1, 2))
            rows.append([grey.mean((1, 2)), red, np.log10(grey.var((1, 2))), np.log10(steps)])
        values = np.array(rows)  # trials, measures, prompts
        own = np.sqrt(values.var(0, ddof=1).mean(1) / prompts)
        ratios = values.mean(2).std(0, ddof=1) / own
        print(f"{model}, {how}: " + " ".join(f"{ratio:.2f}" for ratio in ratios), flush=True)


def seconds(simulations=3000):
    """Differences of seconds of three batches each, nothing there: resampled medians and Student's t."""
    rng, tally = np.random.default_rng(0), defaultdict(list)
    for _ in range(simulations):
        a, b = rng.normal(1, 0.01, (2, 3))
        medians = [np.median(x[rng.integers(3, size=(1000, 3))], axis=1) for x in (a, b)]
        drawn = [np.median(x) + x.std(ddof=1) / np.sqrt(3) * rng.standard_t(2, 1000) for x in (a, b)]
        for how, (first, second) in (("medians", medians), ("Student's t", drawn)):
            (low, high), (under, over) = interval(first), interval(first - second)
            p = p_value(float(np.median(a) - np.median(b)), first - second, 96)
            for name, value in (
                ("score", low <= 1 <= high),
                ("difference", under <= 0 <= over),
                ("p < .0004", p < 4e-4),
            ):
                tally[f"{how}: {name}"].append(value)
    print("seconds  " + "  ".join(f"{name} {np.mean(v):.4f}" for name, v in tally.items()), flush=True)


def kid_subsets(n, size, subsets, crops=1):
    """Variance of KID and of a difference by the choice of subsets, by that over prompts."""
    rng = np.random.default_rng(3)
    own = 0.3 if crops > 1 else 1.0  # share of a prompt in the variance of its crops
    prompts, places = (np.sqrt(s) * normal(rng, False, n, k) for s, k in ((own, 1), (0.5 * (1 - own), crops)))

    def features(near, shift):
        noise = np.sqrt(0.5 * (1 - own)) * normal(rng, False, n, crops) + 0.5 * np.sqrt(own) * normal(rng, False, n, 1)
        return torch.from_numpy((near * prompts + places + noise + shift * SPECTRUM).reshape(n * crops, D)).float()

    true, a, b = features(1, 0), features(0.9, 0.25), features(0.9, 0.25)
    owners, draws = torch.arange(n).repeat_interleave(crops), draw_prompts(n, 200)
    error = [distances.kid_replicates(x, true, owners, owners, draws).numpy() for x in (a, b)]
    made = [
        [distances.kid(x, true, size, subsets, torch.Generator().manual_seed(s))[0] for x in (a, b)] for s in range(30)
    ]
    chance = np.array(made).T
    ratios = chance[0].var(ddof=1) / error[0].var(), (chance[0] - chance[1]).var(ddof=1) / (error[0] - error[1]).var()
    print(
        f"{subsets} subsets of {size} from {n} x {crops}: of a KID {ratios[0]:.3f}, of a difference {ratios[1]:.3f}",
        flush=True,
    )


def kid_by_n(n, simulations=200):
    rng, found = np.random.default_rng(n), []
    for _ in range(simulations):
        prompts = normal(rng, False, n)
        true = prompts + 0.5 * normal(rng, False, n)
        images = 0.9 * prompts + 0.6 * normal(rng, False, n) + 0.25 * SPECTRUM
        pair = (torch.from_numpy(x) for x in (images, true))
        found.append(distances.kid(*pair, n, 1, torch.Generator().manual_seed(0))[0])
    print(f"KID of {n} images {np.mean(found):.4f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:] == ["noise"]:
        for model in ("tiny-flux", "tiny-sdxl"):
            noise_of_trials(model)
        sys.exit()
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    for n in (8, 16, 50, 200, 1000):
        means(n, 40 * times if n < 1000 else 10 * times)
    for n in (8, 16, 50, 256, 1000):
        own_intervals(n, 20 * times)
    noise_of_seeds()
    for shared in (0, 1, 1.6, 3):
        seeds(shared)
    seconds()
    for given in ((200, 16, 100), (200, 16, 2000), *((1000, 128, k, crops) for k in (100, 1000) for crops in (1, 4))):
        kid_subsets(*given)
    for n in (16, 50, 256):
        kid_by_n(n)
    for subsets in ((16, 100), (16, 2000)):
        print("KID subsets", subsets)
        scores_and_differences(200, simulations=times, subsets=subsets)
    scores_and_differences(16, simulations=times)
    scores_and_differences(50, simulations=times)
    scores_and_differences(256, simulations=times)
    scores_and_differences(256, tails=True, simulations=times)
    scores_and_differences(256, trials=5, simulations=times // 2)
    scores_and_differences(1000, simulations=times // 2)
