"""Runs a suite of benchmarks and prints one table.

    python -m benchmarks --suite=gpu [--only=CASES] [--minutes=10] [--tiny] [--folder=runs/benchmarks]

Cases run one after another, each in a process of its own, the most valuable first. Results are stored in
FOLDER/SUITE.json; the same command runs only what is not there yet, so that a suite can be measured in pieces:
`--minutes` starts no case after that time. `--tiny` runs the suite on models of few parameters, to test that it works.
`--peers=PYTHON,PYTHON` names environments that have the packages that the suite cpu compares with; this project needs
none of them, and the table says which are missing.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from benchmarks import results
from benchmarks.paired import PEERS
from benchmarks.suites import SUITES, Case

TINY = "-tiny"


def main() -> None:
    """Parses the arguments, runs the cases that are missing and prints the table."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--suite", required=True, choices=tuple(SUITES))
    parser.add_argument("--only", default="", help="names of cases, separated by commas")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no case after that time")
    parser.add_argument("--tiny", action="store_true", help="small models, to test the suite")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks"), help="of the results")
    parser.add_argument("--peers", default="", help="of the suite cpu: interpreters that have its peers, by commas")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # of the process of a case
    options = parser.parse_args()
    if options.peers:
        os.environ[PEERS] = options.peers  # the process of a case reads it
    cases, compared = SUITES[options.suite]
    if options.case:
        print(json.dumps(measure(cases[options.case], options.tiny)))
        return
    names = [name for name in options.only.split(",") if name] or list(cases)
    unknown = [name for name in names if name not in cases]
    if unknown:
        parser.error(f"--only names {unknown[0]!r}, expected some of {', '.join(cases)}")
    file = options.folder / f"{options.suite}{TINY if options.tiny else ''}.json"
    missing = [name for name in names if not results.complete(results.load(file).get(name))]
    began = time.monotonic()
    for name in tqdm(missing, unit="case", disable=None):
        if time.monotonic() - began > 60 * options.minutes:
            break
        results.add(file, name, run(options.suite, name, options.tiny))
    stored = results.load(file)
    print(results.table(stored, names, compared))
    sys.exit(1 if any("error" in stored.get(name, {}) for name in names) else 0)


def measure(case: Case, tiny: bool) -> dict:
    """Runs a case in this process and returns its entry."""
    try:
        measurements = [dataclasses.asdict(one) for one in case(tiny)]
    except results.NotInstalledError as error:
        return {"needs": str(error)}
    return results.environment() | {"measurements": measurements}


def run(suite: str, case: str, tiny: bool) -> dict:
    """Runs a case in a process of its own and returns its entry; this process opens no device."""
    command = [sys.executable, "-m", "benchmarks", f"--suite={suite}", f"--case={case}", *(["--tiny"] if tiny else [])]
    began = time.monotonic()
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=results.ROOT)
    entry = {"seconds": round(time.monotonic() - began, 1)}
    if process.returncode:
        return entry | {"error": f"exit status {process.returncode}"}
    return entry | json.loads(process.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
