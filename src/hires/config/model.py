"""Every key of a configuration with its type, default and meaning, and the image sets that follow from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from hires.errors import HiresError, unknown
from hires.settings import Sampling
from hires.sizes import check_multiple, parse_size, stage_sizes
from hires.variants import VARIANTS, Variant

NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}"  # part of file names
SIZE = r"[1-9][0-9]{0,5}x[1-9][0-9]{0,5}"
HINTS = {  # what a pattern means, for the error
    f"^{NAME}$": "letters, digits and . _ + -, starting with a letter or digit, at most 100",
    f"^{SIZE}$": "height x width in pixels, such as 512x768",
    "^(auto|cpu|cuda(:[0-9]+)?)$": "auto, cpu, cuda or cuda:N",
}
TAKEN = ("reference", "train", "tables", "figures")  # folders of results/ that are no configuration's
SETTINGS_TAKEN = {"reference", "mean", "between"}  # what tables call true images, the mean over settings, differences
Name = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
Size = Annotated[str, StringConstraints(pattern=f"^{SIZE}$")]

Score = Literal[
    "fid", "kid", "is", "clip", "clip_iqa", "fid_patch", "kid_patch", "is_patch",
    "count", "colours", "repetition", "spectrum", "high_band", "low_band", "seams", "seconds", "peak_bytes",
    "fid_aliased", "kid_aliased", "fid_patch_3", "kid_patch_3",
]  # fmt: skip
PROTOCOLS = ("fid_aliased", "kid_aliased", "fid_patch_3", "kid_patch_3")  # the same scores as other papers take them


def _distinct(values: list) -> list:
    twice = sorted({str(v) for v in values if values.count(v) > 1})
    if twice:
        raise HiresError(f"named twice: {', '.join(twice)}; name each once")
    return values


Names = Annotated[list[Name], Field(min_length=1), AfterValidator(_distinct)]


class Section(BaseModel):
    """A fixed part of the configuration: unknown keys are refused, values don't change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Columns(Section):
    """Which column of the source holds what. Upper and lower case don't matter."""

    url: str | None = Field("URL", description="address of the image; null where the source has none")
    text: str = Field("TEXT", description="caption, the prompt")
    width: str = Field("WIDTH", description="width of the image in pixels; optional unless filters.min_side is set")
    height: str = Field("HEIGHT", description="height of the image in pixels; optional unless filters.min_side is set")
    similarity: str = Field("similarity", description="CLIP similarity of image and caption")
    punsafe: str = Field("punsafe", description="probability that the image is unsafe")
    pwatermark: str = Field("pwatermark", description="probability that the image bears a watermark")
    aesthetic: str = Field("AESTHETIC_SCORE", description="predicted aesthetic score")
    hash: str | None = Field(
        "hash", description="the row's own key, different in every row; optional, without it the key is (url, text)"
    )


class Filters(Section):
    """Which rows may be drawn. null switches a filter off, and its column is then not needed."""

    min_side: int | None = Field(None, ge=1, description="smallest shorter side, pixels")
    max_punsafe: float | None = Field(None, ge=0, le=1, description="largest probability of being unsafe")
    max_pwatermark: float | None = Field(None, ge=0, le=1, description="largest probability of a watermark")
    min_aesthetic: float | None = Field(None, description="smallest aesthetic score")
    min_similarity: float | None = Field(None, description="smallest CLIP similarity")
    min_characters: int | None = Field(1, ge=1, description="shortest caption, white space at both ends not counted")
    max_characters: int | None = Field(None, ge=1, description="longest caption")
    drop_duplicates: bool = Field(
        True, description="keep one row of those whose captions differ in case and white space only"
    )


class ScenePool(Section):
    """The embedded source: captions of held-out scenes, in LAION's schema."""

    pool: int = Field(2000, ge=1, description="number of held-out scenes to draw from")
    width: int = Field(512, ge=1, description="WIDTH that the source states, pixels")
    height: int = Field(512, ge=1, description="HEIGHT that the source states, pixels")
    close_ups: bool = Field(False, description="captions and true images of one object of each scene, zoom 2 to 4")


class Prompts(Section):
    """Where the prompts come from, and which are drawn."""

    source: str = Field(
        "scenes",
        description="scenes (embedded), or a parquet file, a folder of them, a glob, an address (hf://…, s3://…)",
    )
    frozen: str | None = Field(
        None, description="list that hires prompts --freeze wrote: its rows are replayed, none is drawn"
    )
    pictures: str | None = Field(
        None, description="folder that img2dataset wrote: reference images come from there, not from the web"
    )
    n: int = Field(16, ge=1, description="number of prompts; a smaller n draws the first of the same list")
    seed: int = Field(0, ge=0, description="another seed draws another list")
    columns: Columns = Field(default_factory=Columns, description="column names of the source")
    filters: Filters = Field(default_factory=Filters, description="which rows may be drawn")
    private_addresses: bool = Field(
        False, description="fetch reference images from addresses of the local network too, such as your own server"
    )
    scenes: ScenePool = Field(default_factory=ScenePool, description="size of the embedded source")


class BackboneEntry(Section):
    """A model under a name of its own: the same model may stand here twice with other settings."""

    model: str = Field(
        description="tiny-flux, tiny-sdxl, flux-dev, flux-schnell, flux2-klein, flux2-klein-base, sdxl, a diffusers "
        "folder, or OWNER/NAME[@REVISION] of the hub"
    )
    weights: Literal["pretrained", "random"] = Field("pretrained", description="random: untrained, for dry runs")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="precision of the model")
    base_resolution: int = Field(1024, ge=1, description="side of the square that the model was trained at, pixels")
    size_multiple: int = Field(64, ge=1, description="sides of every stage are multiples of this, pixels")
    adapters: dict[Name, str] = Field(
        default_factory=dict,
        description="adapter of a variant → LoRA folder or file; default: adapters/ in the model's",
    )
    sampling: Sampling = Field(default_factory=Sampling, description="settings on top of the model's own")


class Study(Section):
    """Images to make: every backbone x variant x size x setting of the study."""

    backbones: Names = Field(description="names from backbones")
    variants: Names = Field(description="built-in variants, or names from variants")
    sizes: dict[Size, Annotated[int, Field(ge=1)]] = Field(
        min_length=1, description="height x width in pixels → how many prompts, the first of the list"
    )
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(_distinct)] = Field(
        [0], description="one image per prompt and seed, with noise drawn from both"
    )
    settings: dict[Name, Sampling] = Field(
        default_factory=lambda: {"default": Sampling()},
        min_length=1,
        description="name → sampling settings on top of the backbone's",
    )


class Compute(Section):
    """How the work is split and where it runs. None of it changes an image, unless memory runs out (`adapt`)."""

    shard_size: int = Field(8, ge=1, description="prompts in one job")
    batch_size: int = Field(1, ge=1, description="images denoised together")
    device: Annotated[str, StringConstraints(pattern="^(auto|cpu|cuda(:[0-9]+)?)$")] = Field(
        "auto", description="auto takes a GPU where there is one"
    )
    threads: int = Field(1, ge=1, description="CPU threads of one job")
    job_minutes: float | None = Field(
        None, gt=0, description="Snakemake ends a job that takes longer, as one that hangs; null: never"
    )
    offload: bool = Field(False, description="on a GPU, parts of the model wait in main memory until they run")
    out_of_memory: Literal["refuse", "adapt"] = Field(
        "refuse", description="adapt goes on with half the batch or views, a tiled VAE, offload; records name which"
    )
    compile: bool = Field(
        False, description="compile blocks, replay short steps: a minute a size, then faster; other rounding"
    )
    image_format: Literal["png", "tiff"] = Field(
        "png", description="both lossless; tiff is uncompressed and written faster"
    )


class Patch(Section):
    """Crops at native resolution for the patch scores: the same boxes for every variant."""

    size: int = Field(
        128, ge=1, description="side of a crop, pixels; the feature model's input, so that none is resized"
    )
    per_image: int = Field(10, ge=1, description="crops of one image")
    seed: int = Field(0, ge=0, description="draws the boxes")


class Metrics(Section):
    """Scores and their protocol."""

    features: Literal["tiny-clip", "inception", "inception-tf1"] = Field(
        "tiny-clip", description="feature model of FID, KID and IS; inception-tf1: resized as torch-fidelity does"
    )
    clip: str = Field("tiny-clip", description="pair of encoders of the CLIP score: tiny-clip, a folder or a hub id")
    scores: Annotated[list[Score], Field(min_length=1), AfterValidator(_distinct)] = Field(
        [name for name in get_args(Score) if name not in PROTOCOLS],
        description="scores to compute; _aliased: resized without antialiasing, _patch_3: the first three crops only",
    )
    patch: Patch = Field(default_factory=Patch, description="crops of the patch scores")
    kid_subset_size: int = Field(1000, ge=2, description="images in one KID subset; KID is undefined below")
    kid_subsets: int = Field(100, ge=1, description="number of KID subsets")
    bootstrap: int = Field(1000, ge=1, description="resamples of an interval")
    minimum_n: int | None = Field(
        None, ge=1, description="FID, KID and IS of fewer images are flagged; default: the dimension of their features"
    )


class Config(Section):
    """Everything that a reproduction is made from."""

    extends: str | None = Field(None, description="another configuration, relative to this file, that this one edits")
    name: Name = Field(description="outputs go to results/<name>/")
    prompts: Prompts = Field(default_factory=Prompts, description="source and choice of the prompts")
    backbones: dict[Name, BackboneEntry] = Field(min_length=1, description="name → model and its settings")
    own_variants: dict[Name, Variant] = Field(
        default_factory=dict, alias="variants", description="name → a variant added to the built-in ones"
    )
    studies: dict[Name, Study] = Field(min_length=1, description="name → images to make")
    compute: Compute = Field(default_factory=Compute, description="split of the work, device")
    metrics: Metrics = Field(default_factory=Metrics, description="scores and their protocol")
    notebooks: dict[Name, dict[str, Any]] = Field(
        default_factory=dict, description="notebook in notebooks/ → values of its parameters cell"
    )
    _root: Path | None = None

    @model_validator(mode="after")
    def _names_and_sizes(self) -> Self:
        if self.name in TAKEN:
            raise HiresError(f"name = {self.name!r}: results/{self.name} is for other things; choose another name")
        for name, parameters in self.notebooks.items():
            for key in parameters.keys() & {"results", "output"}:
                raise HiresError(f"notebooks.{name}.{key}: follows from the configuration's name; leave it out")
        for name in self.own_variants:
            if name in VARIANTS:
                raise HiresError(f"variants.{name}: a built-in variant has this name; choose another one")
        for name, study in self.studies.items():
            for backbone in study.backbones:
                if backbone not in self.backbones:
                    raise at(f"studies.{name}.backbones", unknown("backbone", backbone, self.backbones))
            for variant in study.variants:
                if variant not in self.variants():
                    raise at(f"studies.{name}.variants", unknown("variant", variant, self.variants()))
            for size, n in study.sizes.items():
                place = f"studies.{name}.sizes.{size}"
                if n > self.prompts.n:
                    raise HiresError(
                        f"{place} = {n}: more than prompts.n = {self.prompts.n}; raise prompts.n or ask for fewer"
                    )
                for backbone in study.backbones:
                    self._check_size(f"{place} ({backbone})", *parse_size(size), backbone, study)
            self._check_names(name, study)
            self._check_taus(name, study)
        return self

    def _check_size(self, place: str, height: int, width: int, backbone: str, study: Study) -> None:
        """A variant that starts from noise needs sides of the right multiple, any other one a base."""
        entry = self.backbones[backbone]
        try:
            if any(self.variants()[name].start == "base" for name in study.variants):
                stage_sizes(height, width, entry.base_resolution, entry.size_multiple)
            else:
                check_multiple(height, width, entry.size_multiple)
        except HiresError as error:
            raise at(place, error) from None

    def _check_names(self, name: str, study: Study) -> None:
        for setting in sorted(SETTINGS_TAKEN & set(study.settings)):
            raise HiresError(f"studies.{name}.settings.{setting}: the tables use this name themselves; choose another")

    def _check_taus(self, name: str, study: Study) -> None:
        """τ must leave a step, where it and the steps are stated here."""
        if any(self.variants()[v].start == "base" and self.variants()[v].denoise for v in study.variants):
            for setting in study.settings:
                for backbone in study.backbones:
                    try:
                        self.sampling(name, setting, backbone).stage_steps()
                    except HiresError as error:
                        raise at(f"studies.{name}.settings.{setting} ({backbone})", error) from None

    @model_validator(mode="after")
    def _amounts(self) -> Self:
        if self.prompts.source == "scenes" and self.prompts.scenes.pool < self.prompts.n:
            raise HiresError(
                f"prompts.scenes.pool = {self.prompts.scenes.pool}: fewer than prompts.n = {self.prompts.n}; raise it"
            )
        side = min(min(parse_size(size)) for study in self.studies.values() for size in study.sizes)
        if any("_patch" in score for score in self.metrics.scores) and self.metrics.patch.size > side:
            raise HiresError(
                f"metrics.patch.size = {self.metrics.patch.size}: larger than the shortest image side, {side}"
            )
        if any(score.endswith("_3") for score in self.metrics.scores) and self.metrics.patch.per_image < 3:
            raise HiresError(
                f"metrics.patch.per_image = {self.metrics.patch.per_image}: scores of three crops need three or more"
            )
        return self

    def variants(self) -> dict[str, Variant]:
        """The built-in variants and this configuration's own."""
        return {**VARIANTS, **self.own_variants}

    @property
    def root(self) -> Path:
        """Folder of every output, by default relative to the working directory."""
        return self._root or Path("results") / self.name

    def at(self, folder: Path) -> "Config":
        """The same configuration with its outputs in `folder`."""
        moved = self.model_copy()
        moved._root = folder
        return moved

    def sampling(self, study: str, setting: str, backbone: str) -> Sampling:
        """Settings that this configuration states; the backbone's own defaults come under them."""
        for kind, name, table in (("study", study, self.studies), ("backbone", backbone, self.backbones)):
            if name not in table:
                raise unknown(kind, name, table)
        settings = self.studies[study].settings
        if setting not in settings:
            raise unknown("setting", setting, settings)
        return settings[setting].over(self.backbones[backbone].sampling)

    def image_sets(self) -> list["ImageSet"]:
        """Every image set, in the order of the file."""
        return [
            ImageSet(name, setting, backbone, variant, *parse_size(size), n, tuple(study.seeds))
            for name, study in self.studies.items()
            for setting in study.settings
            for backbone in study.backbones
            for size, n in study.sizes.items()
            for variant in study.variants
        ]

    def image_set(self, study: str, setting: str, backbone: str, variant: str, height: int, width: int) -> "ImageSet":
        """The image set of these names; HiresError names the first one that the configuration lacks."""
        if study not in self.studies:
            raise unknown("study", study, self.studies)
        entry, size = self.studies[study], f"{height}x{width}"
        for kind, name, names in (
            ("setting", setting, entry.settings),
            ("backbone", backbone, entry.backbones),
            ("variant", variant, entry.variants),
            ("size", size, entry.sizes),
        ):
            if name not in names:
                raise unknown(f"{kind} of study {study!r}", name, names)
        return ImageSet(study, setting, backbone, variant, height, width, entry.sizes[size], tuple(entry.seeds))


@dataclass(frozen=True)
class ImageSet:
    """The images of one variant at one size: the first `n` prompts, each with every seed."""

    study: str
    setting: str
    backbone: str
    variant: str
    height: int
    width: int
    n: int
    seeds: tuple[int, ...]

    @property
    def size(self) -> str:
        return f"{self.height}x{self.width}"

    @property
    def names(self) -> dict[str, Any]:
        """What tells it from other sets: its place in paths, records and tables."""
        names = ("study", "setting", "backbone", "variant", "height", "width")
        return {name: getattr(self, name) for name in names}


def at(place: str, error: HiresError) -> HiresError:
    """The same mistake, told with its place."""
    return HiresError(f"{place}: {error}")
