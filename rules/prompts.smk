# Prompts, and the reference images of the same prompts.


rule draw_prompts:
    input:
        prompt_source(),
    output:
        report(layout.prompts(CONFIG), category="Prompts"),
    log:
        log_of("prompts"),
    conda:
        ENVIRONMENT
    params:
        version=VERSIONS["prompts"],
        reads=reads("prompts"),
        config=CONFIG_FILE,
    message:
        "Draw the prompts"
    shell:
        "hires prompts --config {params.config} 2>&1 | tee {log}"


rule references:
    input:
        layout.prompts(CONFIG),
    output:
        layout.pattern(CONFIG, "reference_manifest"),
    log:
        log_of("references/{height}x{width}"),
    conda:
        ENVIRONMENT
    threads: CONFIG.compute.threads
    params:
        version=VERSIONS["references"],
        sizes=layout.references(CONFIG),
        reads=reads("prompts/private_addresses"),
        config=CONFIG_FILE,
    message:
        "Reference images of {wildcards.height}x{wildcards.width}"
    shell:
        "hires references --config {params.config} --size {wildcards.height}x{wildcards.width} 2>&1 | tee {log}"
