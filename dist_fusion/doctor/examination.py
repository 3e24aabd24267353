"""The examination: which checks there are, in which order, and who prints what they find."""

import argparse
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from dist_fusion import distributed
from dist_fusion.config import Config, load
from dist_fusion.describe import Survey, survey
from dist_fusion.doctor import between, files, gpus, host, report, software
from dist_fusion.doctor.lines import FAIL, OK, Case, Check, Line, examined, guarded
from dist_fusion.engine.ranks import on_gpu, start_ranks, stop_ranks
from dist_fusion.schema import UserError

WELL, ILL, MISTAKE = 0, 1, 2
CHECKS: dict[str, Check] = {
    "python": software.python,
    "packages": software.packages,
    "driver": gpus.driver,
    "gpus": gpus.kernels,
    "precision": gpus.precision,
    "gpu memory": gpus.memory,
    "compiler": software.compiler,
    "deepspeed ops": software.deepspeed_ops,
    "builds": software.builds,
    "ffmpeg": software.ffmpeg,
    "triton cache": files.triton_cache,
    "shards": files.shards,
    "disk": files.disk,
    "cores": host.cores,
    "memory": host.host_memory,
    "shared memory": host.shared_memory,
    "open files": host.open_files,
    "host name": host.name,
}
"""What a rank finds out by itself."""
COLLECTIVE: dict[str, Check] = {
    "ranks": between.ranks,
    "shared folder": between.shared_folder,
    "clocks": between.clocks,
    "exchange": between.exchange,
}
"""What several ranks find out together."""
Surveyed = tuple[list[Line], Survey | None]
PATIENCE = 300.0
"""Seconds after which a check has failed: what hangs here would hang the training, too."""
APART = (
    "the ranks do not reach one another: see that the host names lead to the right network (GLOO_SOCKET_IFNAME, "
    "NCCL_SOCKET_IFNAME), that no firewall is between the nodes, and what NCCL_DEBUG=INFO says"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    parser.add_argument("--recipe", help="what shall run: a path, or the name of a shipped recipe")
    parser.add_argument(
        "--run", type=Path, metavar="FOLDER", help="of a run: its recipe, unless --recipe names another"
    )
    parser.add_argument("--shards", nargs="+", default=[], help="folders of tars, besides the recipe's")
    parser.add_argument("--ranks", type=int, help="as if on so many ranks")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds that a check may take (%(default)s)")


def main(arguments: Sequence[str]) -> int:
    """Examine what the arguments say; returns the exit code. Collective."""
    parser = argparse.ArgumentParser(prog="dist-fusion doctor", description="Whether this machine can train.")
    add_arguments(parser)
    given = parser.parse_args([word for word in arguments if not word.startswith("--local_rank")])
    try:
        found, text = examine(given)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once a node
            sys.stderr.write(f"dist-fusion: {error}\n")
        return MISTAKE
    sys.stdout.write(text)
    return found


def examine(given: argparse.Namespace) -> tuple[int, str]:
    """The exit code, and the report, which only the first rank has. Collective.

    Raises UserError for arguments that cannot be.
    """
    config = _config(given)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if given.ranks is not None and (given.ranks < 1 or ranks > 1):
        raise UserError(f"--ranks is {given.ranks}, and there are {ranks}; leave it out, or at least 1 in one process")
    surveyed = recipe_lines(config, given.ranks or ranks) if os.environ.get("RANK", "0") == "0" else None
    alone = Case(config, None, ranks, 1, _nearest(_folder(given, config)), (), torch.device("cpu"))

    def by_itself(line: Line) -> str:
        found = {**{name: examined(check, alone) for name, check in CHECKS.items()}, "meeting": [line]}
        return report.as_text([found], [_seat()], _colours())

    lines: list[Line] = []
    with watched("meeting", given.patience, by_itself), guarded(lines):
        device = start_ranks()
    if lines:
        return ILL, by_itself(lines[0]._replace(remedy=APART))
    try:
        return _report(given, config, surveyed, device)
    finally:
        stop_ranks()


def _report(
    given: argparse.Namespace, config: Config | None, surveyed: Surveyed | None, device: torch.device
) -> tuple[int, str]:
    count = distributed.world_size()
    ranks = given.ranks or count
    found: dict[str, list[Line]] = {}
    found["recipe"], known = distributed.from_first(surveyed)
    case = Case(
        config if known else None, known.facts if known else None, ranks, _here(ranks),
        _nearest(_folder(given, config)), (*_shards(config), *given.shards), device,
    )  # fmt: skip
    for name, check in CHECKS.items():
        with watched(name, given.patience):
            found[name] = examined(check, case)
    if count > 1:
        for name, check in COLLECTIVE.items():
            with watched(name, given.patience):
                distributed.barrier()
                found[name] = examined(check, case)
    everyone = distributed.gathered((found, _seat()))
    all_found = [one for one, _ in everyone]
    text = report.as_text(all_found, [seat for _, seat in everyone], _colours()) if distributed.rank() == 0 else ""
    return ILL if report.is_red(all_found) else WELL, text


def _config(given: argparse.Namespace) -> Config | None:
    """The recipe that is meant. Raises UserError."""
    recipe = given.recipe
    if recipe is None and given.run is not None:
        if not (given.run / "config.yaml").is_file():
            raise UserError(f"{given.run} is no run: it has no config.yaml; name a --recipe in its place")
        recipe = given.run / "config.yaml"
    if recipe is None:
        if given.overrides:
            raise UserError(f"{' '.join(given.overrides)} changes no recipe: name one with --recipe")
        return None
    return load(recipe, given.overrides)


def recipe_lines(config: Config | None, ranks: int) -> Surveyed:
    """Whether a recipe could start on so many ranks, and what it costs if so.

    Its shards are another check's, which every rank makes. Not in a group of ranks: what is counted on tensors without
    data cannot travel.
    """
    lines: list[Line] = []
    if config is None:
        return [Line(OK, "none is named (--recipe)")], None
    known = None
    with guarded(lines):
        known = survey(replace(config, data=replace(config.data, shards=(), sources={}, dev=())), ranks)
        lines += [Line(FAIL, lacks) for lacks in known.lacking]
        micro = config.micro_batch(ranks)
        lines += [] if lines else [Line(OK, f"{config.name}: {micro} samples a rank and micro-step on {ranks} ranks")]
    return lines, known


def _here(ranks: int) -> int:
    """Ranks on this host."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    hosts = distributed.gathered(socket.gethostname())
    if len(hosts) > 1:
        return hosts.count(socket.gethostname())
    return min(ranks, torch.cuda.device_count()) if on_gpu() and torch.cuda.is_available() else ranks


def _shards(config: Config | None) -> tuple[str, ...]:
    if config is None:
        return ()
    of_sources = (shard for source in config.data.sources.values() for shard in source.shards)
    return (*config.data.shards, *of_sources, *config.data.dev)


def _folder(given: argparse.Namespace, config: Config | None) -> Path:
    if given.run is not None:
        return Path(given.run)
    return Path(config.runs) / config.name if config else Path()


def _nearest(folder: Path) -> Path:
    """The folder, or what there is above it."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def _colours() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def _seat() -> report.Seat:
    return report.Seat(int(os.environ.get("RANK", "0")), socket.gethostname())


@contextmanager
def watched(check: str, patience: float, told: Callable[[Line], str] | None = None) -> Iterator[None]:
    """End this process if what is inside takes too long, and say what it was."""

    def end() -> None:
        seat = _seat()
        said = f"it has not ended in {patience:.0f} s (rank {seat.rank} on {seat.host})"
        between_ranks = check in COLLECTIVE or check == "meeting"
        line = Line(FAIL, said, APART if between_ranks else "it waits for another rank, a disk or a GPU")
        text = told(line) if told else report.as_text([{check: [line]}], [seat], _colours())
        os.write(1, text.encode())  # whoever collects the output gets no more of it
        os._exit(ILL)

    timer = threading.Timer(patience, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
