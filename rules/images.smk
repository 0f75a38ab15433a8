# Base latents, and the images that start from them. One job loads a model once and makes one shard of every variant
# and setting of a study: starting up and loading take several seconds. Each image is kept whatever becomes of its job.


rule base:
    input:
        prompts=layout.prompts(CONFIG),
        model=model_of,
    output:
        layout.pattern(CONFIG, "base_shard"),
    log:
        log_of("base/{backbone}/{base_height}x{base_width}-{key}/shard-{shard}"),
    conda:
        ENVIRONMENT
    threads: CONFIG.compute.threads
    resources:
        gpu=GPUS,
    params:
        version=VERSIONS["base"],
        rows=base_rows,
        reads=reads("backbones/{backbone}"),
        config=CONFIG_FILE,
    message:
        "Base latents: {wildcards.backbone}, {wildcards.base_height}x{wildcards.base_width}, shard {wildcards.shard}"
    shell:
        "hires base --config {params.config} --backbone {wildcards.backbone}"
        " --name {wildcards.base_height}x{wildcards.base_width}-{wildcards.key} --shard {wildcards.shard}"
        " 2>&1 | tee {log}"


for study in CONFIG.studies:

    rule:
        name:
            f"images_{study}"
        input:
            prompts=layout.prompts(CONFIG),
            base=base_of(study),
            model=model_of,
        output:
            of_study("image_shard", study),
        log:
            log_of(f"images/{study}/{{backbone}}/{{height}}x{{width}}/shard-{{shard}}"),
        conda:
            ENVIRONMENT
        threads: CONFIG.compute.threads
        resources:
            gpu=GPUS,
        params:
            version=VERSIONS["images"],
            rows=rows_of(study),
            variants=variants_of(study),
            reads=reads(
                "backbones/{backbone}",
                f"studies/{study}/settings",
                f"studies/{study}/seeds",
                "compute/image_format",
            ),
            study=study,
            config=CONFIG_FILE,
        message:
            f"Images: {study}, {{wildcards.backbone}}, {{wildcards.height}}x{{wildcards.width}}, shard {{wildcards.shard}}"
        shell:
            "hires images --config {params.config} --study {params.study} --backbone {wildcards.backbone}"
            " --size {wildcards.height}x{wildcards.width} --shard {wildcards.shard} 2>&1 | tee {log}"
