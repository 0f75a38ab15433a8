"""The papers' claims as data (config/claims.yaml), and a verdict on each by rule.

A test is a claim on one backbone and size: the paired difference a − b of one metric over the same prompts and seeds.
p is corrected by Holm over all tests that are judged together. Expected "lower" or "higher": reproduced where
p < .05 on that side, not reproduced where p < .05 on the other, undecided at this n otherwise. Expected "same":
reproduced where the 95% interval lies within ± `within`, not reproduced where it lies outside, else undecided.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hires.analysis import tables
from hires.analysis.results import BETWEEN, Results, named, repository_root, size_name, where
from hires.analysis.statistics import LEVEL, holm, t_interval
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
        within: what counts as the same, in the metric's own unit.
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

    @model_validator(mode="after")
    def _margin(self) -> Self:
        if ("same" in self.tests.values()) != (self.within is not None):
            raise ValueError(f"claim {self.id}: `within` goes with the expectation `same`, and only with it")
        return self

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
    "claim", "backbone", "height", "width", "a", "b", "metric", "expected", "difference", "low", "high", "n",
    "p", "p_holm", "trials", "trial_low", "trial_high", "verdict",
]  # fmt: skip


def judge(claims: Sequence[Claim], results: Results) -> pd.DataFrame:
    """A row for each test of each claim, and one with verdict "missing" for a test that these results can't make.

    Columns: claim, backbone, height, width, a, b, metric, expected, difference, low, high (95 %, paired bootstrap over
    prompts), n, p, p_holm, trials, trial_low, trial_high (95 % of Student's t over the seeds' own differences, NaN
    below two), verdict.
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
            if found.empty:
                rows.append({**base, "verdict": MISSING})
            for test in found.itertuples():
                place = {name: getattr(test, name) for name in ("backbone", "height", "width")}
                differences = _trials(results.trials, claim, metric, **place)
                mean_low, mean_high = t_interval(differences)
                numbers = {name: getattr(test, name) for name in ("difference", "low", "high", "n", "p")}
                spread = {"trials": len(differences), "trial_low": mean_low, "trial_high": mean_high}
                rows.append({**base, **place, **numbers, **spread, "verdict": ""})
    table = pd.DataFrame(rows, columns=COLUMNS)
    tested = table["verdict"] != MISSING
    table.loc[tested, "p_holm"] = holm(table.loc[tested, "p"].to_numpy(dtype=float))
    margins = {claim.id: claim.within for claim in claims}
    table.loc[tested, "verdict"] = [_verdict(row, margins[row.claim]) for row in table[tested].itertuples()]
    return table


def _verdict(row, within: float | None) -> str:
    if within is not None and row.expected == "same":
        if -within < row.low and row.high < within:
            return REPRODUCED
        return NOT_REPRODUCED if row.low > within or row.high < -within else UNDECIDED
    if row.p_holm >= LEVEL:
        return UNDECIDED
    return REPRODUCED if (row.difference < 0) == (row.expected == "lower") else NOT_REPRODUCED


def _trials(trials: pd.DataFrame, claim: Claim, metric: str, **place) -> list[float]:
    """a − b of each seed."""
    rows = where(trials, study=claim.study, metric=metric, **place)
    if claim.variant is None:
        sides = [where(rows, setting=claim.setting, variant=name) for name in (claim.a, claim.b)]
    else:
        sides = [where(rows, setting=name, variant=claim.variant) for name in (claim.a, claim.b)]
    a, b = (side.set_index("trial")["value"] for side in sides)
    return (a - b).dropna().tolist()


def sentences(claims: Sequence[Claim], judged: pd.DataFrame) -> dict[str, list[str]]:
    """What came of each claim: one sentence per test, by the claim's id."""
    return {claim.id: [_sentence(row) for row in where(judged, claim=claim.id).itertuples()] for claim in claims}


def _sentence(row) -> str:
    shown = tables.metric(row.metric)
    what = f"{shown.label}, {tables.pair_label(row.a, row.b)}"
    if row.verdict == MISSING:
        return f"{what}: **missing**, these results hold no such images."
    value = tables.interval(row.difference * shown.scale, row.low * shown.scale, row.high * shown.scale, signed=True)
    unit = f" {shown.unit}" if shown.unit else ""
    n = f"n = {int(row.n)}"
    if row.trials > 1:
        low, high = row.trial_low * shown.scale, row.trial_high * shown.scale
        spread = tables.interval(row.difference * shown.scale, low, high, signed=True)
        n += f" in {int(row.trials)} trials, over which {spread}"
    verdict = UNDECIDED + " at this n" if row.verdict == UNDECIDED else row.verdict
    place = f"{row.backbone}, {size_name(int(row.height), int(row.width))}"
    return f"{what}: {value}{unit} ({place}, {n}, p {tables.p_text(row.p_holm)} after Holm): **{verdict}**."


def overview(claims: Sequence[Claim], judged: pd.DataFrame) -> pd.DataFrame:
    """One row per claim: what it says, where, and how many of its tests came out how."""
    rows = []
    for claim in claims:
        counts = where(judged, claim=claim.id)["verdict"].value_counts()
        tally = {name: int(counts.get(name, 0)) for name in (REPRODUCED, NOT_REPRODUCED, UNDECIDED, MISSING)}
        rows.append({"claim": claim.says, "source": f"{claim.paper}, {claim.section}", "study": claim.study, **tally})
    return pd.DataFrame(rows)


def directions(printed: pd.DataFrame, paired: pd.DataFrame) -> pd.DataFrame:
    """Signs of a paper's differences between variants beside ours, for the metrics that both have.

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
            for b in names[:i]:
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
