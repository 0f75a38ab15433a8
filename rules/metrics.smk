# Features, scores, one tidy table.


rule reference_features:
    input:
        prompts=layout.prompts(CONFIG),
        references=layout.pattern(CONFIG, "reference_manifest"),
        encoders=ENCODERS,
    output:
        layout.pattern(CONFIG, "reference_features"),
    log:
        log_of("features/references/{height}x{width}"),
    conda:
        ENVIRONMENT
    threads: CONFIG.compute.threads
    resources:
        gpu=GPUS,
    params:
        version=VERSIONS["features"],
        reads=reads("metrics/features", "metrics/clip", "metrics/patch", "metrics/scores"),
        config=CONFIG_FILE,
    message:
        "Features of the references of {wildcards.height}x{wildcards.width}"
    shell:
        "hires features --config {params.config} --references --size {wildcards.height}x{wildcards.width}"
        " 2>&1 | tee {log}"


for study in CONFIG.studies:

    rule:
        name:
            f"features_{study}"
        input:
            prompts=layout.prompts(CONFIG),
            images=images_of(study),
            encoders=ENCODERS,
        output:
            # Kept while the job runs: features that still fit are not extracted again.
            update(of_study("features", study)),
        log:
            log_of(f"features/{study}/{{backbone}}/{{height}}x{{width}}"),
        conda:
            ENVIRONMENT
        threads: CONFIG.compute.threads
        resources:
            gpu=GPUS,
        params:
            version=VERSIONS["features"],
            reads=reads("metrics/features", "metrics/clip", "metrics/patch", "metrics/scores"),
            study=study,
            config=CONFIG_FILE,
        message:
            f"Features: {study}, {{wildcards.backbone}}, {{wildcards.height}}x{{wildcards.width}}"
        shell:
            "hires features --config {params.config} --study {params.study} --backbone {wildcards.backbone}"
            " --size {wildcards.height}x{wildcards.width} 2>&1 | tee {log}"

    rule:
        name:
            f"scores_{study}"
        input:
            images=images_of(study),
            features=of_study("features", study),
            references=layout.pattern(CONFIG, "reference_features"),
        output:
            scores=of_study("scores", study),
            images=of_study("image_scores", study),
        log:
            log_of(f"scores/{study}/{{backbone}}/{{height}}x{{width}}"),
        conda:
            ENVIRONMENT
        threads: CONFIG.compute.threads
        params:
            version=VERSIONS["scores"],
            reads=reads("metrics"),
            study=study,
            config=CONFIG_FILE,
        message:
            f"Scores: {study}, {{wildcards.backbone}}, {{wildcards.height}}x{{wildcards.width}}"
        shell:
            "hires scores --config {params.config} --study {params.study} --backbone {wildcards.backbone}"
            " --size {wildcards.height}x{wildcards.width} 2>&1 | tee {log}"


rule collect_metrics:
    input:
        prompts=layout.prompts(CONFIG),
        references=[layout.reference_features(CONFIG, height, width) for height, width, _ in layout.references(CONFIG)],
        scores=[layout.scores(CONFIG, images) for images in CONFIG.image_sets()],
        images=[layout.image_scores(CONFIG, images) for images in CONFIG.image_sets()],
    output:
        metrics=layout.metrics(CONFIG),
        paired=layout.paired(CONFIG),
    log:
        log_of("metrics"),
    conda:
        ENVIRONMENT
    params:
        version=VERSIONS["metrics"],
        reads=reads("metrics"),
        config=CONFIG_FILE,
    message:
        "Collect the scores"
    shell:
        "hires metrics --config {params.config} 2>&1 | tee {log}"
