"""From the parts' files to tables: single measurements, images composed of them, ratios beside what was published."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from hires.analysis.tables import markdown
from hires.errors import HiresError
from hires.execution.step_cache import computed_steps
from hires.files.blocks import with_block
from hires.files.storage import read_json, write_text
from hires.settings import PRESETS
from hires.speed.settings import cascade_steps

Row = dict[str, Any]
# Steps of Scale-DiT's paper: of the low-resolution image, and dense at full size; of the high-resolution stage
SCALE_DIT_STEPS = (28, 18)


def write(folder: Path) -> str:
    """Write measurements.parquet, tables/ and figures/ of a folder with parts; returns the tables as text."""
    rows = measurements(folder)
    images = composed(rows)
    rows.drop(columns="times").to_parquet(folder / "measurements.parquet", index=False)
    written = []
    for name, table in (
        ("steps", steps(rows)),
        ("images", shown(images[images["setting"] == "equal steps"])),
        ("papers", shown(images[images["setting"] == "the papers' own"])),
        ("ratios", ratios(rows, images)),
        ("flop", flops(rows)),
        ("parts", others(rows)),
        ("check", check(rows, images)),
        ("gpus", gpus(rows)),
    ):
        if len(table):
            text = markdown(table)
            written.append(f"{name}\n\n{text}")
            write_text(folder / "tables" / f"{name}.csv", table.to_csv(index=False))
            write_text(folder / "tables" / f"{name}.md", f"{text}\n{footnote(rows)}\n")

    from hires.figures.speed import draw

    draw(folder, rows, images)
    return "\n".join([*written, footnote(rows)])


def readme_block(folder: Path) -> str:
    """What the README says of speed: seconds an image and ratios, sizes side by side; or that there is nothing yet."""
    if not (folder / "parts").is_dir():
        return "Not measured yet: `hires speed` on a GPU, then `hires promote speed`."
    rows = measurements(folder)
    images = composed(rows)
    equal = images[(images["setting"] == "equal steps") & (images["contender"] != "dense-jump")]
    tables = (
        _by_size(shown(equal), "contender", "seconds an image", "seconds an image"),
        _by_size(ratios(rows, images), "figure", "factor", "factor (as the papers print it)"),
    )
    shared = gpus(rows)
    told = [*map(markdown, tables), *([markdown(shared)] if len(shared) else []), footnote(rows)]
    return "\n".join(told)


def _by_size(table: pd.DataFrame, what: str, value: str, header: str) -> pd.DataFrame:
    """`value` of every model and `what`, a column for each size; what the papers print is in brackets beside it."""
    printed = table["published"].map(lambda x: f" ({x})" if x else "") if "published" in table else ""
    cells = table.assign(cell=table[value] + printed, side=table["size"].map(lambda side: f"{side}²"))
    wide = cells.pivot_table("cell", ["model", what], "side", "first", fill_value="", sort=False)
    return wide.reset_index().rename(columns={what: header})


def in_readme(text: str, folder: Path) -> str:
    """The README with its block about speed written anew."""
    return with_block(text, "speed", f"{readme_block(folder)}\n")


def promote(source: Path, target: Path, readme: Path) -> None:
    """Copy the parts, tables and figures of a run on a GPU into the tracked results, and write the README's block.

    Parts of the same name are replaced, the others stay. HiresError for a run without a GPU.
    """
    rows = measurements(source)
    if not rows["gpu"].all():
        raise HiresError(
            f"{source} was measured without a GPU: only a GPU's results are promoted: run hires speed on one"
        )
    for path in sorted((source / "parts").glob("*.json")):
        write_text(target / "parts" / path.name, path.read_text())
    kernels = source / "kernels.csv"
    if kernels.is_file():
        write_text(target / "kernels.csv", kernels.read_text())
    write(target)
    write_text(readme, in_readme(readme.read_text(), target))


def measurements(folder: Path) -> pd.DataFrame:
    """One row for each measurement of each part, with what it was measured on. HiresError where there is none."""
    files = sorted((folder / "parts").glob("*.json"))
    found = list(_measurements(files))
    if not found:
        raise HiresError(f"{folder} has no measured part: run `hires speed`")
    table = pd.DataFrame(found)
    optional = "reason seconds peak_bytes flop flop_low view_batch dtype_vae stages warm_up busy graph"
    table = table.reindex(columns=[*table.columns, *(x for x in optional.split() if x not in table)])
    return table.sort_values(["model", "size", "contender", "what"], kind="stable", ignore_index=True)


def _measurements(files: list[Path]) -> Iterator[Row]:
    for path in files:
        part = read_json(path)
        machine = part["machine"]
        shared = {
            **{name: part[name] for name in ("part", "model", "kind", "base", "dtype", "compiled", "complete", "time")},
            "device": machine["gpu"] or machine["cpu"],
            "gpu": machine["gpu"] is not None,
            "torch": machine["packages"]["torch"],
            "triton": machine["packages"].get("triton"),
            "commit": machine["commit"],
            "dirty": machine["dirty"],
        }
        for row in part["rows"]:
            kept = {name: value for name, value in row.items() if name not in ("dtype", "seconds_a_view", "side")}
            yield {**shared, "size": row.get("side", part["size"]), **kept, "dtype_vae": row.get("dtype")}


def footnote(rows: pd.DataFrame) -> str:
    """What everything was measured on, and which parts were cut short."""

    def distinct(name: str) -> str:
        return ", ".join(sorted({str(x)[:9] if name == "commit" else str(x) for x in rows[name].dropna()}))

    how = "blocks compiled" if rows.loc[rows["kind"] != "largest", "compiled"].all() else "eager"
    dirty = " with changes" if rows["dirty"].fillna(False).any() else ""
    what = "random weights" if rows["gpu"].all() else "tiny architectures on a CPU: they say nothing about the methods"
    cut = ", ".join(sorted(set(rows.loc[~rows["complete"], "part"])))
    return (
        f"{distinct('device')}; torch {distinct('torch')}, triton {distinct('triton')}; commit {distinct('commit')}"
        f"{dirty}; {how}, {what}" + (f"; cut short: {cut}" if cut else "")
    )


def _step_rows(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[(rows["kind"] == "steps") & (rows["what"] == "step")]


def steps(rows: pd.DataFrame) -> pd.DataFrame:
    """Seconds and memory of a step of every contender at every size, and µs a token of 16×16 pixels."""
    table = _step_rows(rows)
    tokens = (table["size"] // 16) ** 2
    return pd.DataFrame(
        {
            "model": table["model"],
            "size": table["size"],
            "contender": table["contender"],
            "seconds a step": table["seconds"].map(_number),
            "µs a token": (table["seconds"].astype(float) / tokens * 1e6).map(_number),
            "peak GiB": (table["peak_bytes"].astype(float) / 2**30).map(_number),
            "GPU busy, %": (100 * table["busy"].astype(float)).map(_number),
            "CUDA graph": table["graph"].eq(True).map({True: "yes", False: ""}),
            "views a call": table["view_batch"].map(_number),
            "first step, s": table["warm_up"].map(_number),
            "note": table["reason"].astype(object).fillna(""),
        }
    )


def others(rows: pd.DataFrame) -> pd.DataFrame:
    """VAE, text encoders, the low-resolution pass, options and the largest sizes."""
    table = rows[~((rows["kind"] == "steps") & rows["what"].isin(["step", "flop"]))]
    return pd.DataFrame(
        {
            "part": table["part"],
            "size": table["size"],
            "what": (table["contender"] + " " + table["what"]).str.strip(),
            "seconds": table["seconds"].map(_number),
            "peak GiB": (table["peak_bytes"].astype(float) / 2**30).map(_number),
            "dtype": table["dtype_vae"].fillna(table["dtype"]),
            "note": table["reason"].astype(object).fillna(""),
        }
    )


def flops(rows: pd.DataFrame) -> pd.DataFrame:
    """TFLOP of a step, counted, beside ScaleDiff's table in units of the counted base pass."""
    from hires.speed.flop import by_formula

    found = []
    for model, table in rows.groupby("model"):
        base = table[(table["contender"] == "base") & (table["what"] == "step")]
        free = table[(table["contender"] == "attention-free") & (table["what"] == "flop")]
        for row in _step_rows(table).dropna(subset="flop").to_dict("records"):
            entry = {"model": model, "size": row["size"], "contender": row["contender"], "TFLOP": row["flop"] / 1e12}
            if len(base) and len(free):
                whole = int(base["flop"].iloc[0])
                attention = whole - int(free["flop"].iloc[0])
                formula = by_formula(row["contender"], whole, attention, row["size"] / row["base"])
                entry["TFLOP by the paper's table"] = None if formula is None else formula / 1e12
            if row["seconds"]:
                entry["TFLOP/s"] = row["flop"] / row["seconds"] / 1e12
            found.append({key: _number(x) if isinstance(x, float) else x for key, x in entry.items()})
    return pd.DataFrame(found).fillna("")


def composed(rows: pd.DataFrame) -> pd.DataFrame:
    """Seconds of whole images from measured parts: text, base, and each stage's VAE and steps, then the last decode.

    "equal steps": every contender takes ScaleDiff's numbers of steps in its cascade; scale-dit and dense-jump go from
    the base to the target at once. "the papers' own": Scale-DiT's numbers; dense-direct is the whole schedule at the
    target size. Only images all of whose parts were measured.
    """
    found = []
    for model, table in rows.groupby("model"):
        measured = Measured(table)
        base = int(table["base"].iloc[0])
        sizes = sorted(side for side in set(_step_rows(table)["size"]) if side > base)
        many, few = cascade_steps(str(model))
        for side in sizes:
            for contender in sorted(
                set(_step_rows(table)["contender"]) - {"base", "base-fp8", "scale-dit", "attention-free"}
            ):
                found.append(
                    (model, side, "equal steps", contender, measured.cascade(contender, base, side, many, few))
                )
            for contender, name in (("scale-dit", "scale-dit"), ("dense", "dense-jump")):
                found.append((model, side, "equal steps", name, measured.jump(contender, base, side, many, few)))
            found.append((model, side, "the papers' own", "dense-direct", measured.direct("dense", side, many)))
            if "scale-dit" in set(table["contender"]):
                whole, part = SCALE_DIT_STEPS
                own = measured.jump("scale-dit", base, side, whole, part)
                found.append((model, side, "the papers' own", "scale-dit", own))
                own = measured.direct("dense", side, whole)
                found.append((model, side, "the papers' own", "dense-direct, 28 steps", own))
            own = measured.cascade("scalediff", base, side, many, few)
            found.append((model, side, "the papers' own", "scalediff", own))
    table = pd.DataFrame(found, columns=["model", "size", "setting", "contender", "parts"])
    table = table[table["parts"].notna()]
    return table.assign(seconds=[sum(parts.values()) for parts in table["parts"]])


class Measured:
    """Looks up the medians of one model; a sum that lacks one is None."""

    def __init__(self, table: pd.DataFrame):
        self.table = table[table["seconds"].notna()]

    def step(self, contender: str, size: int) -> float | None:
        return self._one(kind="steps", what="step", contender=contender, size=size)

    def vae(self, what: str, size: int) -> float | None:
        return self._one(kind="steps", what=what, size=size)

    def text(self) -> float | None:
        found = self.table[self.table["kind"] == "text"]["seconds"]
        return float(found.sum()) if len(found) else None

    def _one(self, **columns: Any) -> float | None:
        rows = self.table
        for name, value in columns.items():
            rows = rows[rows[name] == value]
        return float(rows["seconds"].iloc[0]) if len(rows) else None

    def cascade(self, contender: str, base: int, side: int, many: int, few: int) -> dict[str, float] | None:
        """Doubling from the base to the target, `few` steps a stage; "scalediff-fast" computes a part of all steps.

        An extrapolated step takes the scheduler's time alone, which is left out.
        """
        first = "base" if contender not in ("scalediff-fp8", "scalediff-fast") else "base-fp8"
        if contender == "scalediff-fast":
            interval = PRESETS["fast"]["step_cache"]
            many, few = computed_steps(many, interval), computed_steps(few, interval)
        parts = {"text": self.text(), "base": _times(many, self.step(first, base))}
        before = base
        while before < side:
            size = min(2 * before, side)
            parts[f"decode {before}"] = self.vae("decode", before)
            parts[f"encode {size}"] = self.vae("encode", size)
            parts[f"steps {size}"] = _times(few, self.step(contender, size))
            before = size
        return _whole({**parts, f"decode {side}": self.vae("decode", side)})

    def jump(self, contender: str, base: int, side: int, many: int, few: int) -> dict[str, float] | None:
        """From the base to the target at once; Scale-DiT is guided by the base, resized to a quarter of the side."""
        parts = {
            "text": self.text(),
            "base": _times(many, self.step("base", base)),
            f"decode {base}": self.vae("decode", base),
            f"encode {side}": self.vae("encode", side),
        }
        if contender == "scale-dit":
            parts["low-resolution pass"] = self._one(kind="steps", what="low-resolution pass", size=side)
            if side // 4 > base:  # smaller ones take next to nothing
                parts[f"encode {side // 4}"] = self.vae("encode", side // 4)
        parts[f"steps {side}"] = _times(few, self.step(contender, side))
        return _whole({**parts, f"decode {side}": self.vae("decode", side)})

    def direct(self, contender: str, side: int, many: int) -> dict[str, float] | None:
        """The whole schedule at the target size."""
        return _whole(
            {
                "text": self.text(),
                f"steps {side}": _times(many, self.step(contender, side)),
                f"decode {side}": self.vae("decode", side),
            }
        )


def _times(count: int, seconds: float | None) -> float | None:
    return None if seconds is None else count * seconds


def _whole(parts: dict[str, float | None]) -> dict[str, float] | None:
    found = {name: seconds for name, seconds in parts.items() if seconds is not None}
    return found if len(found) == len(parts) else None


def shown(images: pd.DataFrame) -> pd.DataFrame:
    """Composed images as people read them: seconds, and where they go."""
    found = []
    for row in images.to_dict("records"):
        parts = row["parts"]
        vae = sum(x for name, x in parts.items() if name.startswith(("encode", "decode")))
        found.append(
            {
                "model": row["model"],
                "size": row["size"],
                "contender": row["contender"],
                "seconds an image": _number(row["seconds"]),
                "text": _number(parts["text"]),
                "base": _number(parts.get("base")),
                "steps": _number(sum(x for name, x in parts.items() if name.startswith("steps"))),
                "VAE": _number(vae),
                "low-resolution pass": _number(parts.get("low-resolution pass")),
            }
        )
    return pd.DataFrame(found)


@dataclass(frozen=True)
class Ratio:
    """A factor between two contenders: seconds of `over` ÷ seconds of `under`.

    `of`: "step", or a setting of `composed`. `published`: what a paper prints, for a model and side in pixels.
    """

    figure: str
    over: str
    under: str
    of: str
    published: dict[tuple[str, int], float] = field(default_factory=dict)


RATIOS = (
    Ratio("scalediff step, multidiffusion ÷ scalediff", "multidiffusion", "scalediff", "step"),
    Ratio("scalediff step, dense ÷ scalediff", "dense", "scalediff", "step"),
    Ratio("scalediff step ÷ attention left out", "scalediff", "attention-free", "step"),
    Ratio(
        "scale-dit step, dense ÷ scale-dit", "dense", "scale-dit", "step",
        {("flux-dev", 4096): 2.29, ("flux-dev", 8192): 6.93},
    ),
    Ratio(
        "scalediff image, multidiffusion ÷ scalediff", "multidiffusion", "scalediff", "equal steps",
        {("flux-dev", 4096): 2.8, ("sdxl", 4096): 2.1},
    ),
    Ratio("scalediff image, dense ÷ scalediff", "dense", "scalediff", "equal steps", {("sdxl", 4096): 1.64}),
    Ratio("fp8 image, multidiffusion ÷ scalediff-fp8", "multidiffusion", "scalediff-fp8", "equal steps"),
    Ratio("fast image, multidiffusion ÷ scalediff-fast", "multidiffusion", "scalediff-fast", "equal steps"),
    Ratio("scale-dit image, dense-jump ÷ scale-dit", "dense-jump", "scale-dit", "equal steps"),
    Ratio(
        "scale-dit image, 28 dense steps ÷ scale-dit", "dense-direct, 28 steps", "scale-dit", "the papers' own",
        {("flux-dev", 8192): 10.77},
    ),
)  # fmt: skip


def ratios(rows: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """Factors between contenders of the same parts, beside those that the papers print (on other hardware)."""
    found = []
    by_step = _step_rows(rows).assign(setting="step")[["model", "size", "setting", "contender", "seconds"]]
    table = pd.concat([by_step, images[["model", "size", "setting", "contender", "seconds"]]], ignore_index=True)
    table = table[table["seconds"].notna()]
    for (model, size), group in table.groupby(["model", "size"]):
        for ratio in RATIOS:
            values = group[group["setting"] == ratio.of].set_index("contender")["seconds"].astype(float)
            if ratio.over in values and ratio.under in values:
                printed = ratio.published.get((str(model), int(size)))
                factor = f"{values[ratio.over] / values[ratio.under]:.3g}"
                entry = {"model": model, "size": size, "figure": ratio.figure, "factor": factor}
                found.append({**entry, "published": "" if printed is None else f"{printed:g}"})
    return pd.DataFrame(found)


def check(rows: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """Whole ScaleDiff images as they ran, beside those composed of parts; text encoding is left out of both."""
    found = []
    for row in rows[(rows["kind"] == "image") & (rows["what"] == "image")].dropna(subset="seconds").to_dict("records"):
        same = images[
            (images["model"] == row["model"])
            & (images["size"] == row["size"])
            & (images["contender"] == "scalediff")
            & (images["setting"] == "equal steps")
        ]
        if len(same):
            composed_seconds = same["seconds"].iloc[0] - same["parts"].iloc[0]["text"]
            found.append(
                {
                    "model": row["model"],
                    "size": row["size"],
                    "measured, s": _number(row["seconds"]),
                    "composed, s": _number(composed_seconds),
                    "difference": f"{composed_seconds / row['seconds'] - 1:+.1%}",
                }
            )
    return pd.DataFrame(found)


def gpus(rows: pd.DataFrame) -> pd.DataFrame:
    """One image on one device and on several: seconds of its denoising, and of all but text; from one part."""
    found = []
    for model, table in rows[(rows["kind"] == "gpus") & rows["seconds"].notna()].groupby("model"):
        seconds = table.set_index(["contender", "what", "size"])["seconds"].astype(float).to_dict()
        many, few = cascade_steps(str(model))
        base, *sides = sorted(set(table["size"]))
        totals: dict[str, tuple[float, float]] = {}
        for name in ("alone", "together"):
            needed = [("step", side) for side in (base, *sides)] + [("decode", base)]
            needed += [(what, side) for side in sides for what in ("encode", "decode")]
            if all((name, *place) in seconds for place in needed):
                above = few * sum(seconds[name, "step", side] for side in sides)
                vae = sum(seconds[name, what, side] for what, side in needed if what != "step")
                totals[name] = above, above + vae + many * seconds[name, "step", base]
        if len(totals) == 2:
            for figure, place in (("denoising above the base", 0), ("image", 1)):
                alone, together = totals["alone"][place], totals["together"][place]
                entry = {"model": model, "size": sides[-1], "figure": figure, "alone, s": _number(alone)}
                found.append({**entry, "together, s": _number(together), "factor": f"{alone / together:.3g}"})
    return pd.DataFrame(found)


def _number(value: Any) -> str:
    """Three digits, nothing where there is none."""
    if value is None or pd.isna(value):
        return ""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
