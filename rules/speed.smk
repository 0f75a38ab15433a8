# What `hires speed` measures: a job for each part, one after the other on a GPU of its own.

from hires.execution.devices import gpus
from hires.speed.settings import load_speed, parts, root

SPEED = load_speed(Path("config/speed.yaml"))
SPEED_GPUS = len(gpus())  # whatever compute.device says, as for `hires speed`
SPEED_ROOT = root(SPEED_GPUS > 0)
SPEED_PARTS = [
    part.name
    for part in parts(SPEED.models if SPEED_GPUS else SPEED.without_gpu)
    if part.kind != "gpus" or SPEED_GPUS != 1  # on CPUs two processes take the place of two GPUs
]


rule speed_part:
    output:
        SPEED_ROOT / "parts" / "{part}.json",
    log:
        str(SPEED_ROOT / "logs" / "{part}.log"),
    wildcard_constraints:
        part="|".join(SPEED_PARTS),
    conda:
        ENVIRONMENT
    threads: workflow.cores
    resources:
        gpu=min(SPEED_GPUS, 1),
    params:
        version=VERSIONS["speed"],
    message:
        "Speed: {wildcards.part}"
    shell:
        "hires speed --force --parts {wildcards.part} 2>&1 | tee {log}"


rule speed_tables:
    input:
        expand(SPEED_ROOT / "parts" / "{part}.json", part=SPEED_PARTS),
    output:
        SPEED_ROOT / "measurements.parquet",
    log:
        str(SPEED_ROOT / "logs" / "tables.log"),
    conda:
        ENVIRONMENT
    params:
        version=VERSIONS["speed"],
    message:
        "Speed: tables and figures"
    shell:
        "hires speed tables 2>&1 | tee {log}"
