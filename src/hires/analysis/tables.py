"""Scores as tables: what a metric is called, which way is better, and how a value with its interval is written."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hires.analysis.results import BETWEEN, TRUE, named, repository_root, size_name, where
from hires.analysis.statistics import holm, t_interval, t_p_value
from hires.errors import printable
from hires.variants import VARIANTS

COMPONENTS = ("npa", "npa+lfm", "npa+sg", "scalediff")
CONTRASTS = (
    ("npa+lfm", "npa"),
    ("npa+sg", "npa"),
    ("scalediff", "npa"),
    ("scalediff", "npa+lfm"),
    ("scalediff", "npa+sg"),
    ("scalediff", "dense+lfm+sg"),
    ("scalediff", "multidiffusion+lfm+sg"),
    ("scalediff", "diffusehigh"),
    ("scalediff", "direct"),
    ("scalediff", "upsample"),
    ("scale-dit", "upsample"),
    ("scale-dit", "scalediff"),
    ("hybrid", "scalediff"),
)
QUALITY = ("fid", "fid_patch", "kid", "kid_patch", "is", "is_patch", "clip", "clip_iqa", "seconds")  # what papers print
PROTOCOLS = ("fid", "fid_aliased", "kid", "kid_aliased", "fid_patch", "fid_patch_3", "kid_patch", "kid_patch_3")
CONTENT = ("count", "colours", "repetition", "spectrum", "high_band", "low_band", "seams")
FLAG = "†"
HALVES = "½"  # beside FID and KID of the true images: one half of them against the other, so of fewer images
HALVED = ("fid", "fid_aliased", "fid_patch", "fid_patch_3", "kid", "kid_aliased", "kid_patch", "kid_patch_3")
COSTS = ("seconds", "peak_bytes")


@dataclass(frozen=True)
class Metric:
    """How a metric is shown. `better`: "lower", "higher", or "" where neither is. `scale` multiplies what is stored."""

    label: str
    better: str = ""
    unit: str = ""
    scale: float = 1.0

    @property
    def heading(self) -> str:
        """Label with an arrow to the better side."""
        return self.label + {"lower": " ↓", "higher": " ↑", "": ""}[self.better]

    @property
    def title(self) -> str:
        """Heading with unit."""
        return self.heading + self.in_unit

    @property
    def in_unit(self) -> str:
        """The unit in brackets, to stand behind a name; nothing where there is none."""
        return f" ({self.unit})" if self.unit else ""


METRICS = {
    "fid": Metric("FID", "lower"),
    "fid_patch": Metric("FID_p", "lower"),
    "kid": Metric("KID", "lower", "10⁻³", 1e3),
    "kid_patch": Metric("KID_p", "lower", "10⁻³", 1e3),
    "fid_aliased": Metric("FID, not antialiased", "lower"),
    "kid_aliased": Metric("KID, not antialiased", "lower", "10⁻³", 1e3),
    "fid_patch_3": Metric("FID_p, 3 crops", "lower"),
    "kid_patch_3": Metric("KID_p, 3 crops", "lower", "10⁻³", 1e3),
    "is": Metric("IS", "higher"),
    "is_patch": Metric("IS_p", "higher"),
    "clip": Metric("CLIP score", "higher", "0–100"),
    "clip_iqa": Metric("CLIP-IQA", "higher", "0–1"),
    "count": Metric("count right", "higher", "share"),
    "colours": Metric("colours right", "higher", "share"),
    "repetition": Metric("repeated objects", "lower", "per image"),
    "spectrum": Metric("spectral distance", "lower", "log₁₀ power"),
    "high_band": Metric("high band − true", "", "decades"),
    "low_band": Metric("layout − true", "lower", "grey levels"),
    "seams": Metric("seams", "lower", "log₁₀"),
    "spectrum_low": Metric("power, ⅛–¼ Nyquist", "", "log₁₀"),
    "spectrum_mid": Metric("power, ¼–½ Nyquist", "", "log₁₀"),
    "spectrum_high": Metric("power, ½–1 Nyquist", "", "log₁₀"),
    "seconds": Metric("time", "lower", "s per image"),
    "peak_bytes": Metric("peak memory", "lower", "GiB", 2**-30),
}


def metric(name: str) -> Metric:
    """How `name` is shown; a metric this table does not know goes by its own name, without a better side."""
    return METRICS.get(name, Metric(name.replace("_", " ")))


def in_order(names: Iterable[str], order: Iterable[str]) -> list[str]:
    """The distinct `names`, those of `order` first and in its order, then the others by name."""
    present = set(names)
    known = [name for name in order if name in present]
    return known + sorted(present - set(known))


def variants_of(frame: pd.DataFrame) -> list[str]:
    """The distinct variants of a table, true images first; of each its settings (`by_setting`), numbers by value."""
    order = [TRUE, *VARIANTS]
    parts = {name: name.partition(", ") for name in set(frame["variant"])}
    variants = in_order((variant for variant, _, _ in parts.values()), order)

    def place(name: str) -> tuple[int, list[str | int]]:
        variant, _, setting = parts[name]
        return variants.index(variant), [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", setting)]

    return sorted(parts, key=place)


def metrics_of(frame: pd.DataFrame) -> list[str]:
    return in_order(frame["metric"], METRICS)


def sizes_of(frame: pd.DataFrame) -> list[tuple[int, int]]:
    """The distinct (height, width) of a table, smallest area first."""
    sizes = {(int(h), int(w)) for h, w in zip(frame["height"], frame["width"])}
    return sorted(sizes, key=lambda size: (size[0] * size[1], size))


def interval(
    value: float, low: float, high: float, flagged: bool = False, signed: bool = False, digits: int | None = None
) -> str:
    """`value [low, high]` to `digits` decimals; None: to what the interval's width supports."""
    digits = _digits(high - low if high > low else abs(value) / 10) if digits is None else digits

    def written(number: float) -> str:
        return f"{round(number, digits) + 0.0:{'+' if signed else ''}.{digits}f}".replace("-", "−")  # no −0

    text = written(value) + (f" [{written(low)}, {written(high)}]" if high > low else "")
    return text + (FLAG if flagged else "")


def scores(metrics: pd.DataFrame, names: Sequence[str] | None = None) -> pd.DataFrame:
    """The tidy table as people read it: one row per backbone, size and variant, one column per metric.

    A cell is `value [low, high]`, with † where the number of images is too small for the score, and ½ where one half
    of the true images is scored against the other; a score that does not exist is a dash. n also says how many
    reference images survive, where not all do.
    """
    names = [name for name in metrics_of(metrics) if names is None or name in names]
    digits = {name: _decimals(metrics[metrics["metric"] == name], metric(name).scale) for name in names}
    rows = []
    for backbone, size, variant, group in _groups(metrics):
        row = {"backbone": backbone, "size": size, "variant": variant, "n": _amount(group)}
        for name in names:
            cell = group[group["metric"] == name]
            text = _cell(cell.iloc[0], metric(name).scale, digits[name]) if len(cell) else "–"
            row[metric(name).title] = text + f" {HALVES}" * (len(cell) > 0 and variant == TRUE and name in HALVED)
        rows.append(row)
    return pd.DataFrame(rows)


def excludes_zero(low: float, high: float) -> bool:
    """Whether an interval tells its difference from zero; one without width, as of two prompts, tells nothing."""
    return low < high and (low > 0 or high < 0)


def contrasts(paired: pd.DataFrame, pairs: Sequence[tuple[str, str]] = CONTRASTS) -> pd.DataFrame:
    """The rows of `paired` for these pairs (a, b), turned round where the table holds b − a."""
    flipped = paired.assign(
        a=paired["b"], b=paired["a"], difference=-paired["difference"], low=-paired["high"], high=-paired["low"]
    )
    both = pd.concat([paired, flipped])
    return pd.concat([where(both, a=a, b=b) for a, b in pairs], ignore_index=True)


def against(variant: str, settings: Iterable[str], reference: str = "default") -> list[tuple[str, str]]:
    """Pairs for `contrasts`: a variant in the `reference` setting, with itself in each other one of `settings`."""
    return [(named(variant, reference), named(variant, setting)) for setting in settings if setting != reference]


def pair_label(a: str, b: str) -> str:
    """`a − b`; two settings of one variant share its name."""
    (variant, _, setting), (other, _, changed) = a.partition(", "), b.partition(", ")
    return f"{variant}: {setting} − {changed}" if setting and variant == other else f"{a} − {b}"


def differences(paired: pd.DataFrame, names: Sequence[str] | None = None) -> pd.DataFrame:
    """Paired differences a − b, one column per metric; bold where the interval leaves out zero."""
    names = [name for name in metrics_of(paired) if names is None or name in names]
    rows = []
    paired = paired.sort_values(["backbone", "height", "width"], kind="stable")
    for (backbone, height, width, a, b), group in paired.groupby(["backbone", "height", "width", "a", "b"], sort=False):
        row = {"backbone": backbone, "size": size_name(height, width), "a − b": pair_label(a, b)}
        row["n"] = amount(group)
        for name in names:
            cell = where(group, metric=name)
            row[metric(name).title] = _difference(cell.iloc[0], metric(name)) if len(cell) else "–"
        rows.append(row)
    return pd.DataFrame(rows)


def outcomes(paired: pd.DataFrame, expected: Sequence[tuple[str, str, Mapping[str, str]]]) -> pd.DataFrame:
    """What was expected of differences beside what was found, one row per pair, size and metric; dashes if untested.

    Args:
        expected: a, b and, for each metric, on which side of zero a − b should lie: "lower" or "higher".
    """
    rows = []
    for a, b, sides in expected:
        for name, side in sides.items():
            row = {"a − b": pair_label(a, b), "metric": metric(name).title, "expected": side}
            tests = where(contrasts(paired, [(a, b)]), metric=name)
            for test in tests.itertuples():
                place = {"backbone": test.backbone, "size": size_name(test.height, test.width), "n": test.n}
                rows.append({**place, **row, "found": _signed(test, metric(name)), "outcome": _outcome(test, side)})
            if tests.empty:
                rows.append(row)
    columns = ["backbone", "size", "a − b", "n", "metric", "expected", "found", "outcome"]
    return pd.DataFrame(rows, columns=columns).astype(object).fillna("–")


def published(paper: str, table: str) -> pd.DataFrame:
    """Numbers printed in a paper (config/published.csv), tidy, under our names of metrics and variants."""
    rows = where(pd.read_csv(repository_root() / "config" / "published.csv"), paper=paper, table=table)
    names = {"FID": "fid", "FIDp": "fid_patch", "KID": "kid", "KIDp": "kid_patch", "IS": "is", "ISp": "is_patch"}
    names |= {"CLIP": "clip", "CLIP-IQA": "clip_iqa"}
    of_one = (rows["metric"] == "CLIP") & (rows["unit"] == "0-1")
    rows = rows.assign(value=rows["value"].where(~of_one, 100 * rows["value"]))
    methods = rows["method"].str.replace(" ", "").str.lower().replace("npa+lfm+sg", "scalediff")
    return rows.assign(
        metric=rows["metric"].replace(names), variant=methods.where(methods.isin(VARIANTS), rows["method"])
    )


def beside(metrics: pd.DataFrame, printed: pd.DataFrame, paper: str) -> pd.DataFrame:
    """A paper's numbers above ours, for the metrics and variants that the paper printed."""
    names = [name for name in metrics_of(printed) if name in METRICS]
    rows = []
    for (backbone, resolution, variant), group in printed.groupby(["backbone", "resolution", "variant"], sort=False):
        size = size_name(resolution, resolution)
        row = {"source": f"{paper}, printed", "model": backbone, "size": size, "variant": variant, "n": "–"}
        values = dict(zip(group["metric"], group["value"]))
        for name in names:
            row[metric(name).title] = f"{values[name] * metric(name).scale:.4g}" if name in values else "–"
        rows.append(row)
    ours = scores(where(metrics, variant=[*variants_of(printed), TRUE]), names).rename(columns={"backbone": "model"})
    return pd.concat([pd.DataFrame(rows), ours.assign(source="this run")]).fillna("–")


def by_setting(rows: pd.DataFrame) -> pd.DataFrame:
    """Scores of a study whose variants are shown with their setting, where it has several."""
    if rows["setting"].nunique() < 2:
        return rows
    names = [TRUE if v == TRUE else named(v, s) for v, s in zip(rows["variant"], rows["setting"])]
    shown = rows.assign(variant=names)
    return shown.drop_duplicates([name for name in shown.columns if name not in ("setting", "protocol", "study")])


def spread(trials: pd.DataFrame, names: Sequence[str] | None = None) -> pd.DataFrame:
    """Means over trials (seeds) with 95 % of Student's t: a row per backbone, size and variant, a column per metric."""
    names = [name for name in metrics_of(trials) if names is None or name in names]
    rows = []
    for backbone, size, variant, group in _groups(trials):
        row = {"backbone": backbone, "size": size, "variant": variant, "trials": group["trial"].nunique()}
        row["n each"] = _range(group["n"])
        for name in names:
            values = where(group, metric=name)["value"] * metric(name).scale
            row[metric(name).title] = interval(values.mean(), *t_interval(values)) if len(values) > 1 else "–"
        rows.append(row)
    return pd.DataFrame(rows)


def over_trials(trials: pd.DataFrame, pairs: Sequence[tuple[str, str]] = CONTRASTS) -> pd.DataFrame:
    """Differences a − b of each trial's own scores: their mean with 95 % of Student's t, as rows of paired.parquet.

    So this interval is for other noise on the same prompts. n counts trials, `p_holm` is corrected for the pairs of one
    metric.

    Args:
        trials: scores of each trial, of one study and setting.
    """
    rows = []
    keys = ["backbone", "height", "width", "metric"]
    nothing = pd.Series(dtype=float)
    for place, group in trials.groupby(keys, sort=False):
        values = {variant: rows.set_index("trial")["value"] for variant, rows in group.groupby("variant")}
        for a, b in pairs:
            found = (values.get(a, nothing) - values.get(b, nothing)).dropna()
            if len(found) > 1:
                low, high = t_interval(found)
                numbers = {"difference": found.mean(), "low": low, "high": high, "n": len(found)}
                rows.append({**dict(zip(keys, place)), "a": a, "b": b, **numbers, "p": t_p_value(found)})
    table = pd.DataFrame(rows, columns=[*keys, "a", "b", "difference", "low", "high", "n", "p"])
    return table.assign(p_holm=table.groupby(keys)["p"].transform(holm))


def best_setting(scores: pd.DataFrame, paired: pd.DataFrame, name: str, reference: str) -> list[str]:
    """For each backbone and variant of a study one sentence: its best setting by a metric, against the reference."""
    found = []
    shown = metric(name)
    rows = where(scores[scores["variant"] != TRUE], metric=name)
    for (backbone, variant, height, width), group in rows.groupby(["backbone", "variant", "height", "width"]):
        if len(group) < 2 or reference not in set(group["setting"]):
            continue
        best = group.sort_values("value", ascending=shown.better == "lower", kind="stable").iloc[0]
        text = f"{backbone}, {variant}, {size_name(height, width)}: {shown.label} is best in setting {best['setting']}"
        text += f", {_cell(best, shown.scale)}"
        if best["setting"] != reference:
            place = {"backbone": backbone, "height": height, "width": width, "metric": name}
            pair = [(named(variant, best["setting"]), named(variant, reference))]
            for test in contrasts(where(paired, setting=BETWEEN, **place), pair).itertuples():
                text += f"; against {reference} {_signed(test, shown)}, p {p_text(test.p_holm)} after Holm"
        found.append(text + ".")
    return found


def gives_way(scores: pd.DataFrame, column: str, names: Sequence[str]) -> pd.DataFrame:
    """At which value of the numeric `column` a metric is first worse than at the smallest: its interval lies beyond.

    One row per backbone and variant with several values, one column per metric. Flagged scores are left out: with few
    images FID is high and KID low, whatever the images.
    """
    rows = []
    scores = scores[(scores["variant"] != TRUE) & (scores["flag"] == "")].sort_values(column, kind="stable")
    for (backbone, variant), group in scores.groupby(["backbone", "variant"], sort=False):
        if len(set(group[column])) > 1:
            cells = {
                metric(name).title: _first_worse(where(group, metric=name), column, metric(name)) for name in names
            }
            rows.append({"backbone": backbone, "variant": variant, **cells})
    table = pd.DataFrame(rows, columns=["backbone", "variant", *(metric(name).title for name in names)])
    order = variants_of(table)
    return table.sort_values(["backbone", "variant"], key=lambda x: x.map(order.index) if x.name == "variant" else x)


def _first_worse(rows: pd.DataFrame, column: str, shown: Metric) -> str:
    if len(rows) < 2:
        return "–"
    start, others = rows.iloc[0], rows.iloc[1:]
    worse = others["low"] > start["high"] if shown.better == "lower" else others["high"] < start["low"]
    end = others[worse].iloc[0] if worse.any() else others.iloc[-1]
    verdict = f"×{end[column]:g}" if worse.any() else f"not up to ×{end[column]:g}"
    return f"{verdict}: {_cell(start, shown.scale)} → {_cell(end, shown.scale)}"


def protocol_gains(scores: pd.DataFrame, paired: pd.DataFrame, a: str, b: str) -> pd.DataFrame:
    """The same images under two protocols: how far the other one moves a's score, beside how far a is from b by each.

    Where |moved / gain| is above one, the protocol decides more than the method does.
    """
    tests = contrasts(paired, [(a, b)])
    rows = []
    for name, other in zip(PROTOCOLS[::2], PROTOCOLS[1::2]):
        for test in where(tests, metric=name).itertuples():
            place = {"backbone": test.backbone, "height": test.height, "width": test.width}
            usual, moved = (where(scores, variant=a, metric=score, **place)["value"] for score in (name, other))
            twins = [*where(tests, metric=other, **place).itertuples()]
            if usual.empty or moved.empty or not twins:
                continue
            shown = metric(name)
            by = (moved.item() - usual.item()) * shown.scale
            digits = _digits((test.high - test.low) * shown.scale)
            rows.append(
                {
                    "backbone": test.backbone,
                    "size": size_name(test.height, test.width),
                    "score": shown.label + shown.in_unit,
                    f"{a} − {b}": _signed(test, shown),
                    "other protocol": metric(other).label.partition(", ")[2],
                    f"{a} − {b} by it": _signed(twins[0], shown),
                    f"moves {a} by": interval(by, by, by, signed=True, digits=digits),
                    "moved / gain": f"{abs(by / test.difference / shown.scale):.2g}" if test.difference else "–",
                }
            )
    return pd.DataFrame(rows)


def p_text(value: float) -> str:
    return "< .001" if value < 0.001 else f"= {value:.3f}".replace("0.", ".")


def markdown(frame: pd.DataFrame) -> str:
    """A pipe table; numbers are aligned right by their readers' style sheets. No cell is HTML or a link."""
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(map(_cell_text, line)) + " |" for line in lines) + "\n"


def _cell_text(value: Any) -> str:
    text = printable(html.escape(str(value), quote=False))
    return text.replace("|", "\\|").replace("](", "]\\(")


def _inert(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula, marked as text."""
    return f"'{value}" if isinstance(value, str) and value.startswith(tuple("=+-@\t\r")) else value


def write(folder: Path, name: str, tidy: pd.DataFrame, shown: pd.DataFrame) -> str:
    """Write `folder`/tables/`name`.csv (the tidy rows, unrounded) and .md (as shown); returns the Markdown."""
    target = folder / "tables"
    target.mkdir(parents=True, exist_ok=True)
    tidy.map(_inert).to_csv(target / f"{name}.csv", index=False)
    text = markdown(shown)
    (target / f"{name}.md").write_text(text, encoding="utf-8")
    return text


def findings(
    metrics: pd.DataFrame, paired: pd.DataFrame, pairs: Sequence[tuple[str, str]] = (("scalediff", "npa"),)
) -> dict[str, list[str]]:
    """For the largest size of every backbone ("<backbone> at <H>x<W>") sentences read off the tables.

    One per metric that has a better side, tells variants apart and has images enough, with what the paired tests of
    `pairs` say; one names the metrics that have too few.
    """
    found = {}
    for backbone in sorted(set(metrics["backbone"])):
        rows = where(metrics, backbone=backbone)
        height, width = sizes_of(rows)[-1]
        rows = where(rows, height=height, width=width)
        tests = contrasts(where(paired, backbone=backbone, height=height, width=width), pairs)
        sentences, few = [], []
        for name in metrics_of(rows):
            shown, these = metric(name), rows[rows["metric"] == name]
            values = these.loc[these["variant"] != TRUE]
            if not shown.better or name in COSTS or len(set(values["value"])) < 2:
                continue
            if values["flag"].astype(bool).any():
                few.append(shown.label)
                continue
            tested = [_tested(test, shown) for test in where(tests, metric=name).itertuples()]
            sentences.append(" ".join([_best(these, shown), *tested]))
        if few:
            sentences.append(f"Too few images to rank variants by {', '.join(few)}: the tables mark them {FLAG}.")
        found[f"{backbone} at {size_name(height, width)}"] = sentences
    return found


def _best(rows: pd.DataFrame, shown: Metric) -> str:
    truth = rows[rows["variant"] == TRUE]
    rows = rows[rows["variant"] != TRUE].sort_values("value", ascending=shown.better == "lower", kind="stable")
    best, second = rows.iloc[0], rows.iloc[1]
    word = "lowest" if shown.better == "lower" else "highest"
    text = f"{best['variant']} has the {word} {shown.label}, {_cell(best, shown.scale)} (n = {best['n']})"
    text += f"; next is {second['variant']} with {_cell(second, shown.scale)}"
    halves = set(rows["metric"]) <= set(HALVED)
    whose = "one half of the true images has, against the other," if halves else "true images have"
    return text + "".join(f"; {whose} {_cell(row, shown.scale)}" for _, row in truth.iterrows()) + "."


def _tested(test: Any, shown: Metric) -> str:
    text = _signed(test, shown)
    if not excludes_zero(test.low, test.high):
        verdict = "no difference can be told"
    else:
        verdict = "better" if (test.difference < 0) == (shown.better == "lower") else "worse"
    return f"{test.a} − {test.b} on the same images: {text}, {verdict}."


def _outcome(test: Any, side: str) -> str:
    if not excludes_zero(test.low, test.high):
        return "no difference can be told"
    return "as expected" if (test.difference < 0) == (side == "lower") else "the opposite"


def _signed(test: Any, shown: Metric) -> str:
    return interval(test.difference * shown.scale, test.low * shown.scale, test.high * shown.scale, signed=True)


def protocols(metrics: pd.DataFrame) -> pd.DataFrame:
    """How each score was measured: network, crops, resizing, numbers of images, resampling."""
    rows = metrics[metrics["variant"] != TRUE].drop_duplicates(["metric", "height", "width", "protocol"])
    shown = [
        {"metric": metric(name).label, "size": size_name(height, width), "protocol": protocol}
        for name in metrics_of(rows)
        for height, width in sizes_of(rows)
        for protocol in where(rows, metric=name, height=height, width=width)["protocol"]
    ]
    return pd.DataFrame(shown, columns=["metric", "size", "protocol"])


def _groups(metrics: pd.DataFrame):
    for backbone in sorted(set(metrics["backbone"])):
        for height, width in sizes_of(where(metrics, backbone=backbone)):
            rows = where(metrics, backbone=backbone, height=height, width=width)
            for variant in variants_of(rows):
                yield backbone, size_name(height, width), variant, where(rows, variant=variant)


def _difference(row: pd.Series, shown: Metric) -> str:
    text = _signed(row, shown)
    return f"**{text}**" if excludes_zero(row["low"], row["high"]) else text


def _cell(row: pd.Series, scale: float, digits: int | None = None) -> str:
    return interval(row["value"] * scale, row["low"] * scale, row["high"] * scale, bool(row["flag"]), digits=digits)


def _decimals(rows: pd.DataFrame, scale: float) -> int:
    """Decimals of a column: what its median interval supports, those without a width left aside."""
    widths = rows["high"] - rows["low"]
    widths = widths[widths > 0]
    return _digits(scale * (widths.median() if len(widths) else rows["value"].abs().median() / 10))


def _amount(rows: pd.DataFrame) -> str:
    """n, and how many reference images are left where some prompts lost theirs."""
    found = [re.search(r"against (\d+) images.* resamples of (\d+) prompts", text) for text in rows["protocol"]]
    counts = [(int(match[1]), int(match[2])) for match in found if match]
    lost = pd.Series([references for references, prompts in counts if references < prompts])
    return amount(rows) + (f" ({_range(lost)} references)" if len(lost) else "")


def amount(rows: pd.DataFrame) -> str:
    """How many images are behind some rows; time and memory are measured on a few of them, and count if alone."""
    images = rows[~rows["metric"].isin(COSTS)]
    return _range((images if len(images) else rows)["n"])


def _range(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    return str(low) if low == high else f"{low}–{high}"


def _digits(width: float) -> int:
    """Decimals that show two significant digits of `width`."""
    digits = 0
    while digits < 6 and 0 < width < 10:
        width *= 10
        digits += 1
    return digits
