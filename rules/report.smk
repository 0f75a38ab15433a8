# What people read: notebooks, provenance, report; and the figures of the reference results.


rule notebook:
    input:
        notebook="notebooks/{notebook}.ipynb",
        metrics=layout.metrics(CONFIG),
        paired=layout.paired(CONFIG),
    output:
        report(layout.pattern(CONFIG, "notebook"), category="Notebooks", labels={"notebook": "{notebook}"}),
    log:
        log_of("notebooks/{notebook}"),
    conda:
        ENVIRONMENT
    threads: CONFIG.compute.threads
    params:
        version=VERSIONS["notebook"],
        reads=reads("notebooks/{notebook}"),
        config=CONFIG_FILE,
    message:
        "Notebook {wildcards.notebook}"
    shell:
        "hires notebook --config {params.config} --name {wildcards.notebook} 2>&1 | tee {log}"


rule provenance:
    input:
        layout.metrics(CONFIG),
    output:
        layout.provenance(CONFIG),
    log:
        log_of("provenance"),
    conda:
        ENVIRONMENT
    params:
        version=VERSIONS["provenance"],
        config=CONFIG_FILE,
    message:
        "Provenance of the results"
    shell:
        "hires provenance --config {params.config} 2>&1 | tee {log}"


rule html_report:
    input:
        layout.metrics(CONFIG),
        layout.provenance(CONFIG),
        [layout.notebook(CONFIG, name) for name in CONFIG.notebooks],
    output:
        report(layout.report(CONFIG), category="Report"),
    log:
        log_of("report"),
    conda:
        ENVIRONMENT
    params:
        version=VERSIONS["report"],
        config=CONFIG_FILE,
    message:
        "Report"
    shell:
        "hires report --config {params.config} 2>&1 | tee {log}"


rule checksums:
    input:
        layout.provenance(CONFIG),
        layout.report(CONFIG),
    output:
        layout.checksums(CONFIG),
    log:
        log_of("checksums"),
    conda:
        ENVIRONMENT
    params:
        version=VERSIONS["checksums"],
        config=CONFIG_FILE,
    message:
        "Checksums of everything made"
    shell:
        "hires checksums --config {params.config} 2>&1 | tee {log}"


rule redraw_claims:
    input:
        notebook="notebooks/07_claims.ipynb",
        claims="config/claims.yaml",
        metrics=reference_scores,
    output:
        "results/figures/notebooks/07_claims.ipynb",
    log:
        "results/figures/logs/07_claims.log",
    conda:
        ENVIRONMENT
    params:
        version=VERSIONS["notebook"],
        config=CONFIG_FILE,
    message:
        "Judge the papers' claims by results/reference"
    shell:
        "hires notebook --config {params.config} --name 07_claims --results results/reference"
        " --output results 2>&1 | tee {log}"


rule claims_page:
    input:
        "results/figures/notebooks/07_claims.ipynb",
    output:
        "results/figures/claims.html",
    log:
        "results/figures/logs/claims.log",
    conda:
        ENVIRONMENT
    message:
        "The claims as one page"
    shell:
        "python -m nbconvert --to html --no-input --output-dir results/figures --output claims {input} 2>&1 | tee {log}"


# The default's studies are small ones of other names.
REFERENCE_STUDIES = {"02_ablation": "--set study=variants", "03_tau": "--set study=tau-sweep"}


rule redraw:
    input:
        notebook="notebooks/{notebook}.ipynb",
        metrics=reference_scores,
    output:
        "results/figures/notebooks/{notebook}.ipynb",
    log:
        "results/figures/logs/{notebook}.log",
    conda:
        ENVIRONMENT
    params:
        version=VERSIONS["notebook"],
        reads=reads("notebooks/{notebook}"),
        study=lambda wildcards: REFERENCE_STUDIES.get(wildcards.notebook, ""),
        config=CONFIG_FILE,
    message:
        "Redraw the figures of {wildcards.notebook} from results/reference"
    shell:
        "hires notebook --config {params.config} --name {wildcards.notebook} --results results/reference"
        " --output results {params.study} 2>&1 | tee {log}"
