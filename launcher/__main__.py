"""`python -m launcher …`: runs on a cluster. `python -m launcher COMMAND --help` says more."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import launcher
from dist_fusion.schema import UserError
from launcher import logs, records, slurm
from launcher.life import DONE, FAILED, MISTAKE, work


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 75 saved and to be continued, 2 the user's mistake)."""
    parser = argparse.ArgumentParser(prog="python -m launcher", description=launcher.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    one = commands.add_parser("check", help="see whether a recipe could start here, before anything waits in a queue")
    _recipe(one)
    one.add_argument("--ranks", type=int, default=1, help="on so many, one a GPU (1)")

    one = commands.add_parser("worker", help="what srun starts, once a GPU: see slurm/pretrain.sh")
    _recipe(one)
    one.add_argument(
        "--no-requeue", action="store_true", help="saved and to be continued is exit code 75, no new start"
    )

    one = commands.add_parser("submit", help="a job through submitit")
    _recipe(one)
    _cluster(one)

    one = commands.add_parser("sweep", help="the cells of a table as an array of jobs; started again, it goes on")
    one.add_argument("sweep", type=Path, help="a file: name, recipe, overrides, and cells with overrides of each")
    _cluster(one)
    one.add_argument("--detach", action="store_true", help="do not wait for the jobs, only submit and show")

    one = commands.add_parser("jobs", help="the jobs of all runs in a folder")
    one.add_argument("runs", type=Path, nargs="?", default=Path("runs"), help="(runs)")

    one = commands.add_parser("logs", help="what the newest job of a run says")
    one.add_argument("run", type=Path, help="its folder")
    one.add_argument("-f", "--follow", action="store_true", help="go on until the job is over")

    one = commands.add_parser("cancel", help="let the job of a run save at its next step and end")
    one.add_argument("run", type=Path, help="its folder")
    one.add_argument("--now", action="store_true", help="end it at once; what is not saved is lost")

    one = commands.add_parser("doctor", help="whether the nodes of a job can train: dist-fusion doctor on all of them")
    _cluster(one, required=False)
    one.add_argument(
        "--logs", type=Path, default=Path("runs/doctor"), metavar="FOLDER", help="of the job (%(default)s)"
    )
    one.set_defaults(words=[])
    one.epilog = (
        "All other words are the doctor's own: see dist-fusion doctor --help. Without --cluster: here, or in srun."
    )

    given, more = parser.parse_known_args(arguments)
    if "words" in given:
        given.words, more = more, []
    if more and ("overrides" not in given or any(word.startswith("-") for word in more)):
        parser.error(f"what is {' '.join(more)}? See python -m launcher {given.command} --help")
    if more:
        given.overrides += more  # those that stand behind an option

    try:
        return COMMANDS[given.command](given)
    except KeyboardInterrupt:
        sys.stderr.write("launcher: interrupted; jobs go on, and the same command shows them again\n")
        return 128 + signal.SIGINT
    except slurm.SlurmError as error:
        sys.stderr.write(f"launcher: SLURM does not do it: {error}\n")
        return FAILED
    except UserError as error:
        sys.stderr.write(f"launcher: {error}\n")
        return MISTAKE


def _recipe(one: argparse.ArgumentParser) -> None:
    one.add_argument("recipe", help="a path, or the name of a shipped recipe")
    one.add_argument("overrides", nargs="*", metavar="key=value")


def _cluster(one: argparse.ArgumentParser, required: bool = True) -> None:
    one.add_argument("--cluster", required=required, help="a profile: a path, or one of those in slurm/ by its name")
    one.add_argument(
        "--with", action="append", default=[], dest="changes", metavar="key=value", help="another value in the profile"
    )


def _check(given: argparse.Namespace) -> int:
    from launcher.check import check, told

    _say(f"{told(check(given.recipe, given.overrides, given.ranks), given.ranks)}\n")
    return DONE


def _worker(given: argparse.Namespace) -> int:
    return work(given.recipe, given.overrides, requeue=not given.no_requeue)


def _submit(given: argparse.Namespace) -> int:
    from dist_fusion.checkpoint.folder import folder_of
    from launcher.check import check
    from launcher.profile import load_profile
    from launcher.submit import submit, told

    profile = load_profile(given.cluster, given.changes)
    config = check(given.recipe, given.overrides, profile.ranks)
    run = folder_of(config)
    if (run / "model.safetensors").exists():
        _say(f"{run} has ended; its model is there\n")
        return DONE
    _say(f"{told(submit([config], profile, run / 'logs'))}\n")
    return DONE


def _sweep(given: argparse.Namespace) -> int:
    from launcher import sweep
    from launcher.profile import load_profile

    profile, cells = load_profile(given.cluster, given.changes), sweep.read_sweep(given.sweep)
    configs = sweep.check_cells(cells, profile.ranks)
    for run, job in sweep.start(cells, configs, profile).items():
        _say(f"{run}: job {job.job}, log {job.log}\n")
    rows = sweep.summary(configs) if given.detach else sweep.follow(configs, lambda line: _say(f"{line}\n"))
    _say(f"{sweep.as_text(rows)}\n")
    return FAILED if any(row.now.state == "failed" for row in rows) else DONE


def _jobs(given: argparse.Namespace) -> int:
    """One line for each run's newest job."""
    runs = [*records.runs_in(given.runs)]
    queued = records.queue_of(runs)
    for run in runs:
        job = records.jobs_of(run)[-1]
        now = records.state(run, job, queued)
        _say(f"{run!s:<32} {job.job:<12} {now.state:<10} {now.elapsed:>12} {now.where}".rstrip() + "\n")
    return DONE


def _logs(given: argparse.Namespace) -> int:
    logs.show(given.run, given.follow, _say)
    return DONE


def _cancel(given: argparse.Namespace) -> int:
    """End what waits; let what runs save, or not."""
    newest = logs.newest(given.run)
    if newest.by_hand and (array := records.chain_of(given.run)):  # the next one would start as soon as this one ends
        slurm.cancel_waiting(array)
        _say(f"those of array {array} that wait are cancelled\n")
    queued = records.queue_of([given.run])
    for job in records.lives(given.run, queued):
        if given.now or not records.trains(given.run, job, queued):
            slurm.cancel(job.job) if job.cluster == "slurm" else os.kill(int(job.job), signal.SIGINT)
            _say(f"job {job.job} is cancelled\n")
        else:
            (given.run / "STOP").touch()
            _say(f"job {job.job} saves at its next step and ends\n")
    return DONE


def _doctor(given: argparse.Namespace) -> int:
    from launcher import doctor
    from launcher.profile import load_profile

    if given.cluster is None:
        return doctor.here(given.words)
    return doctor.on_nodes(given.words, load_profile(given.cluster, given.changes), given.logs, _say)


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "check": _check,
    "worker": _worker,
    "submit": _submit,
    "sweep": _sweep,
    "jobs": _jobs,
    "logs": _logs,
    "cancel": _cancel,
    "doctor": _doctor,
}

if __name__ == "__main__":
    code = main()
    # As in dist_fusion.train: threads of libraries may abort a rank that has ended well.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
