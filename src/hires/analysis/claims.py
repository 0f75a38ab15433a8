"""The papers' claims as data (config/claims.yaml), and a verdict on each by rule.

A test is a claim on one backbone and size: the paired difference a − b of one metric over the same prompts and seeds.
Expected "lower" or "higher": p is corrected by Holm over all such tests that are judged together; reproduced where
p < .05 on that side, not reproduced where p < .05 on the other, undecided at this n otherwise. Expected "same":
reproduced where the 95% interval lies within the margin, not reproduced where it lies outside, else undecided.

A difference has to hold over other prompts and over other noise. Every image has noise of its own, drawn from prompt
and trial, so p over prompts is one over noise too, and of one seed enough; a test of one seed says that it is. Where
there are several seeds, p is the larger of that over prompts and that of Student's t over the seeds' own differences,
and the interval spans both: a claim passes only if both tests do (Berger 1982), a rule whose error rates stay near
their level for crossed samples (Forster and Dickinson 1976), and which stayed when images got noise of their own: it
costs power, not validity.
"""

from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import Any, Literal, Self

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hires.analysis import tables
from hires.analysis.results import BETWEEN, Results, named, repository_root, size_name, where
from hires.analysis.statistics import LEVEL, holm, t_interval, t_p_value
from hires.errors import HiresError, first_mistake
from hires.files.untrusted import read_yaml

REPRODUCED, NOT_REPRODUCED, UNDECIDED, MISSING = "reproduced", "not reproduced", "undecided", "missing"


class Claim(BaseModel):
    """What a paper says, in our words, and the differences that would show it.

    Attributes:
        id: short name.
        says: one sentence.
        paper, section: where it stands; "open question" where the paper asks and doesn't answer.
        study: whose images test it; a, b: variants, or settings of `variant` where that is given.
        setting: in which the variants are compared.
        tests: metric → the side of zero on which a − b should lie: lower, higher or same.
        within, within_share: what counts as the same, in the metric's own unit, or as a share of b's score.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    says: str
    paper: str
    section: str
    study: str
    a: str
    b: str
    variant: str | None = None
    setting: str = "default"
    tests: dict[str, Literal["lower", "higher", "same"]] = Field(min_length=1)
    within: float | None = Field(None, gt=0)
    within_share: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _margin(self) -> Self:
        margins = [margin for margin in (self.within, self.within_share) if margin is not None]
        if len(margins) != ("same" in self.tests.values()):
            raise ValueError(
                f"claim {self.id}: `within` or `within_share` goes with the expectation `same`, and only with it"
            )
        return self

    def sets(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """(setting, variant) of a and of b."""
        if self.variant is None:
            return (self.setting, self.a), (self.setting, self.b)
        return (self.a, self.variant), (self.b, self.variant)

    @property
    def pair(self) -> tuple[str, str]:
        """a and b as paired.parquet names them."""
        if self.variant is None:
            return self.a, self.b
        return named(self.variant, self.a), named(self.variant, self.b)


def load_claims(path: Path | None = None) -> list[Claim]:
    """The claims of a YAML file, config/claims.yaml when None; HiresError names the first mistake."""
    path = path or repository_root() / "config" / "claims.yaml"
    entries = read_yaml(path)
    if not isinstance(entries, list):
        raise HiresError(f"{path.name}: must be a list of claims")
    claims = []
    for number, entry in enumerate(entries, 1):
        try:
            claims.append(Claim.model_validate(entry))
        except ValidationError as error:
            place, _, reason = first_mistake(error)
            raise HiresError(f"{path.name}, claim {number}: {f'{place} {reason}'.strip()}") from None
    ids = [claim.id for claim in claims]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise HiresError(f"{path.name}: claims named twice: {', '.join(twice)}")
    return claims


COLUMNS = [
    "claim", "backbone", "height", "width", "a", "b", "metric", "expected", "margin", "difference", "low", "high", "n",
    "p", "p_holm", "trials", "trial_low", "trial_high", "verdict",
]  # fmt: skip


def judge(claims: Sequence[Claim], results: Results, planned: pd.DataFrame | None = None) -> pd.DataFrame:
    """A row for each test of each claim, and one with verdict "missing" for a test that these results can't make.

    Columns: claim, backbone, height, width, a, b, metric, expected, margin (for "same"), difference, low, high (95 %,
    paired bootstrap over prompts), n, p (the larger of prompts' and seeds'), p_holm (NaN for "same"), trials,
    trial_low, trial_high (95 % of Student's t over the seeds' own differences, NaN below two), verdict.

    Args:
        planned: image sets, columns `SET`. What is missing of these has a row for each backbone and size; a claim of
            which they hold nothing has one row without a place.
    """
    rows = []
    for claim in claims:
        setting = claim.setting if claim.variant is None else BETWEEN
        paired = tables.contrasts(where(results.paired, study=claim.study, setting=setting), [claim.pair])
        for metric, expected in claim.tests.items():
            found = where(paired, metric=metric)
            base: dict[str, Any] = {
                "claim": claim.id,
                "a": claim.pair[0],
                "b": claim.pair[1],
                "metric": metric,
                "expected": expected,
            }
            there = list(found[_PLACE].itertuples(index=False, name=None))
            absent = [place for place in _places(claim, planned) if place not in there]
            rows += [{**base, **dict(zip(_PLACE, place)), "verdict": MISSING} for place in absent]
            if not there and not absent:
                rows.append({**base, "verdict": MISSING})
            for test in found.itertuples():
                place = {name: getattr(test, name) for name in _PLACE}
                differences = _trials(results.trials, claim, metric, **place)
                mean_low, mean_high = t_interval(differences)
                numbers = {name: getattr(test, name) for name in ("difference", "low", "high", "n", "p")}
                if len(differences) > 1:
                    numbers["p"] = max(test.p, t_p_value(differences))
                spread = {"trials": len(differences), "trial_low": mean_low, "trial_high": mean_high}
                margin = _margin(claim, results, metric, place) if expected == "same" else nan
                rows.append({**base, **place, "margin": margin, **numbers, **spread, "verdict": ""})
    table = pd.DataFrame(rows, columns=COLUMNS)
    tested = table["verdict"] != MISSING
    directed = tested & (table["expected"] != "same")
    table.loc[directed, "p_holm"] = holm(table.loc[directed, "p"].to_numpy(dtype=float))
    table.loc[tested, "verdict"] = [_verdict(row) for row in table[tested].assign(**span(table[tested])).itertuples()]
    return table


_PLACE = ["backbone", "height", "width"]


def _places(claim: Claim, planned: pd.DataFrame | None) -> list[tuple]:
    """(backbone, height, width) where both sides of a claim are planned."""
    if planned is None:
        return []
    sides = [where(planned, study=claim.study, setting=setting, variant=variant) for setting, variant in claim.sets()]
    a, b = ([*side[_PLACE].itertuples(index=False, name=None)] for side in sides)
    return [place for place in a if place in b]


def _margin(claim: Claim, results: Results, metric: str, place: dict[str, Any]) -> float:
    if claim.within_share is None:
        return claim.within or nan
    setting, variant = claim.sets()[1]
    b = where(results.metrics, study=claim.study, setting=setting, variant=variant, metric=metric, **place)
    return claim.within_share * b["value"].item()


def span(judged: pd.DataFrame) -> pd.DataFrame:
    """Columns low and high: where the intervals over prompts and over seeds, if there are several, begin and end."""
    low, high = (judged[[end, f"trial_{end}"]] for end in ("low", "high"))
    return pd.DataFrame({"low": low.min(axis=1), "high": high.max(axis=1)})


def _verdict(row) -> str:
    if row.expected == "same":
        if -row.margin < row.low and row.high < row.margin:
            return REPRODUCED
        return NOT_REPRODUCED if row.low > row.margin or row.high < -row.margin else UNDECIDED
    if row.p_holm >= LEVEL:
        return UNDECIDED
    return REPRODUCED if (row.difference < 0) == (row.expected == "lower") else NOT_REPRODUCED


def _trials(trials: pd.DataFrame, claim: Claim, metric: str, **place) -> list[float]:
    """a − b of each seed."""
    rows = where(trials, study=claim.study, metric=metric, **place)
    sides = [where(rows, setting=setting, variant=variant) for setting, variant in claim.sets()]
    a, b = (side.set_index("trial")["value"] for side in sides)
    return (a - b).dropna().tolist()


def summary(judged: pd.DataFrame) -> str:
    """One sentence: how many tests there are, and how they came out."""
    counts = judged["verdict"].value_counts()
    told = [f"{counts[name]} {name}" for name in (REPRODUCED, NOT_REPRODUCED, UNDECIDED) if name in counts]
    made = len(judged) - counts.get(MISSING, 0)
    return f"Of {len(judged)} tests {made} could be made" + (f": {', '.join(told)}." if told else ".")


def sentences(claims: Sequence[Claim], judged: pd.DataFrame) -> dict[str, list[str]]:
    """What came of each claim, by its id: a sentence per test, and what is missing at the end."""
    found = {}
    for claim in claims:
        rows = where(judged, claim=claim.id)
        made = [_sentence(row) for row in rows[rows["verdict"] != MISSING].itertuples()]
        found[claim.id] = made + _absences(claim, where(rows, verdict=MISSING))
    return found


def _label(row) -> str:
    return f"{tables.metric(row.metric).label}, {tables.pair_label(row.a, row.b)}"


def _absences(claim: Claim, rows: pd.DataFrame) -> list[str]:
    """One sentence for all metrics that are missing at the same places."""
    metrics: dict[str, list[str]] = {}
    for metric, group in rows.groupby("metric", sort=False):
        there = group.dropna(subset=_PLACE)
        places = [f"{row.backbone} {size_name(int(row.height), int(row.width))}" for row in there.itertuples()]
        metrics.setdefault(", ".join(places), []).append(tables.metric(metric).label)
    pair = tables.pair_label(*claim.pair)
    return [
        f"{', '.join(labels)}, {pair}{f' ({at})' if at else ''}: **missing**, these results don't hold both sides."
        for at, labels in metrics.items()
    ]


def _sentence(row) -> str:
    shown = tables.metric(row.metric)

    def written(low: float, high: float) -> str:
        return tables.interval(row.difference * shown.scale, low * shown.scale, high * shown.scale, signed=True)

    unit = f" {shown.unit}" if shown.unit else ""
    told = [f"{row.backbone}, {size_name(int(row.height), int(row.width))}, n = {int(row.n)}"]
    if row.trials > 1:
        told.append(f"over {int(row.trials)} seeds {written(row.trial_low, row.trial_high)}")
    elif row.metric not in tables.COSTS:
        told.append("one seed")
    if row.expected == "same":
        told.append(f"margin ±{row.margin * shown.scale:.3g}")
    else:
        told.append(f"p {tables.p_text(row.p_holm)} after Holm")
    verdict = UNDECIDED + " at this n" if row.verdict == UNDECIDED else row.verdict
    return f"{_label(row)}: {written(row.low, row.high)}{unit} ({'; '.join(told)}): **{verdict}**."


def overview(claims: Sequence[Claim], judged: pd.DataFrame) -> pd.DataFrame:
    """One row per claim: what it says, where, and how many of its tests came out how."""
    rows = []
    for claim in claims:
        counts = where(judged, claim=claim.id)["verdict"].value_counts()
        tally = {name: int(counts.get(name, 0)) for name in (REPRODUCED, NOT_REPRODUCED, UNDECIDED, MISSING)}
        rows.append({"claim": claim.says, "source": f"{claim.paper}, {claim.section}", "study": claim.study, **tally})
    return pd.DataFrame(rows)


def directions(printed: pd.DataFrame, paired: pd.DataFrame) -> pd.DataFrame:
    """Signs of a paper's differences between variants beside ours, for the metrics that both have; none where it is 0.

    Args:
        printed: of one table, from `tables.published`.
        paired: of one study and setting.
    """
    rows = []
    chosen = printed[printed["variant"].isin({*paired["a"], *paired["b"]})]
    for (model, resolution, metric), group in chosen.groupby(["backbone", "resolution", "metric"], sort=False):
        values = dict(zip(group["variant"], group["value"]))
        names = tables.variants_of(group)
        for i, a in enumerate(names):
            for b in (name for name in names[:i] if values[name] != values[a]):
                for test in where(tables.contrasts(paired, [(a, b)]), metric=metric).itertuples():
                    rows.append(
                        {
                            "a": a,
                            "b": b,
                            "metric": metric,
                            "printed model": model,
                            "printed side": resolution,
                            "printed difference": values[a] - values[b],
                            "backbone": test.backbone,
                            "size": size_name(test.height, test.width),
                            "difference": test.difference,
                            "low": test.low,
                            "high": test.high,
                            "same direction": _same(values[a] - values[b], test),
                        }
                    )
    return pd.DataFrame(rows)


def _same(printed: float, test) -> str:
    if not tables.excludes_zero(test.low, test.high):
        return "no difference can be told"
    return "yes" if (printed < 0) == (test.difference < 0) else "no"
