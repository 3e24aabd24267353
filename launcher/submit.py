"""Jobs through submitit: one of a run, or an array of several."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from dist_fusion.config import Config, dump
from dist_fusion.schema import UserError
from launcher import records
from launcher.check import folder_of
from launcher.job import Training
from launcher.profile import Profile


def submit(configs: Sequence[Config], profile: Profile, folder: Path) -> dict[Path, records.Job]:
    """Submit a job for each of the runs, as an array if there are several; returns the newest job of each run's folder.

    A job trains what its recipe says at this moment, whatever becomes of the file.

    Raises:
        UserError: if one of the runs has a job already, or the profile is refused. Then nothing is submitted.
    """
    runs = [folder_of(config) for config in configs]
    queued = records.queue_of(runs)
    for run in runs:
        for job in records.lives(run, queued):
            raise UserError(f"the run {run} has a job already: {job.job}; see launcher jobs, or launcher cancel {run}")
    executor = profile.executor(folder)
    trainings = [Training(str(_kept(run, config))) for run, config in zip(runs, configs, strict=True)]
    with executor.batch():
        jobs = [executor.submit(training) for training in trainings]
    for run, job in zip(runs, jobs, strict=True):
        records.note(run, job.job_id, profile.cluster, str(job.paths.stdout))
    if profile.cluster == "debug":  # a job of this process, which runs when it is asked for what it found
        for job in jobs:
            job.results()
    return {run: records.jobs_of(run)[-1] for run in runs}


def _kept(run: Path, config: Config) -> Path:
    """The resolved recipe in a file of its own."""
    when = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
    path = run / "logs" / f"submitted-{when}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(config))
    return path


def told(jobs: Mapping[Path, records.Job]) -> str:
    """Where the jobs log, and how they are followed."""
    lines = [f"{run}: job {job.job}\n  log     {job.log}" for run, job in jobs.items()]
    first = next(iter(jobs))
    return "\n".join([*lines, f"  follow  python -m launcher logs {first} -f"])
