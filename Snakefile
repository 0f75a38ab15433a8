# Everything of one configuration: snakemake --cores all [--configfile config/smoke.yaml] [--config name=trial]
# Parts of it: prompts, images, metrics, report. `figures` redraws results/reference from its stored scores. `speed`
# measures what config/speed.yaml names, on the GPU where there is one.


include: "rules/common.smk"
include: "rules/prompts.smk"
include: "rules/images.smk"
include: "rules/metrics.smk"
include: "rules/report.smk"
include: "rules/speed.smk"


rule all:
    default_target: True
    input:
        layout.report(CONFIG),
        layout.provenance(CONFIG),
        layout.checksums(CONFIG),


rule prompts:
    input:
        layout.prompts(CONFIG),


rule images:
    input:
        [path for images in CONFIG.image_sets() for path in layout.image_shards(CONFIG, images)],


rule metrics:
    input:
        layout.metrics(CONFIG),


rule report:
    input:
        layout.report(CONFIG),


rule figures:
    input:
        [f"results/figures/notebooks/{name}.ipynb" for name in CONFIG.notebooks],
        "results/figures/claims.html",


rule speed:
    input:
        SPEED_ROOT / "measurements.parquet",
