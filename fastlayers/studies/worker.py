"""One process of a run that several share: ``python -m fastlayers.studies.worker JOB MACHINE``, both in JSON."""

from __future__ import annotations

import sys

from fastlayers.studies import runner
from fastlayers.studies.results import Job
from fastlayers.studies.runner import Machine


def main() -> None:
    """Does the run of the command line."""
    job, machine = sys.argv[1:]
    runner.run(Job.model_validate_json(job), Machine.model_validate_json(machine))


if __name__ == "__main__":
    main()
