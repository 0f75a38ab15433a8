"""Check what this machine offers hires and say what to mend: packages, GPU, kernels, weights, memory, disk, token.

Opens no connection. Exit code: 0 where the embedded default (--config, --model: that configuration, that model) can
run, else 1, with the lines to mend.
"""

import argparse
import json
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same as JSON; sizes are in GiB and MiB")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--config", type=Path, help="a configuration to check in place of the embedded default")
    what.add_argument("--model", help="a model to check: flux-dev, sdxl, …, a diffusers folder or a hub id")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder that outputs go to")


def run(args: argparse.Namespace) -> int:
    from hires import doctor

    checks = doctor.examine(args.results, args.config, args.model)
    wrong = [check for check in checks if check.state == "wrong"]
    if args.json:
        print(json.dumps(doctor.as_json(checks), indent=1, ensure_ascii=False))
    else:
        verdict = "can't run yet:" if wrong else "can run."
        subject = args.config or args.model or "The embedded default"
        print(f"{doctor.table(checks)}\n{subject} {verdict}", flush=True)
    for check in wrong:
        print(f"{check.name}: {check.found}: {check.mend}", file=sys.stderr)
    return int(bool(wrong))
