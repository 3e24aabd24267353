"""The examination: which checks there are, in which order, and who prints what they find."""

import argparse
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
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
PATIENCE = {"meeting": 300.0, "exchange": 120.0}
"""Seconds that a check may take, if not OTHERS, before all ends: what hangs here would hang the training, too."""
OTHERS = 180.0
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
    lines: list[Line] = []
    with watched("meeting"), guarded(lines):
        device = start_ranks()
    if lines:
        lines = [line._replace(remedy=APART if ranks > 1 else "see the lines above") for line in lines]
        alone = Case(config, None, ranks, 1, _nearest(_folder(given, config)), (), torch.device("cpu"))
        found = {**{name: examined(check, alone) for name, check in CHECKS.items()}, "meeting": lines}
        seat = report.Seat(int(os.environ.get("RANK", "0")), socket.gethostname())
        return ILL, report.as_text([found], [seat], _colours())
    try:
        return report_of(given, config, device)
    finally:
        stop_ranks()


def report_of(given: argparse.Namespace, config: Config | None, device: torch.device) -> tuple[int, str]:
    """What `examine` tells, by ranks that have started. Collective."""
    count = distributed.world_size()
    ranks = given.ranks or count
    found: dict[str, list[Line]] = {}
    with watched("recipe"):
        found["recipe"], known = _recipe(config, ranks)
    case = Case(
        config if known else None, known.facts if known else None, ranks, _here(ranks),
        _nearest(_folder(given, config)), (*_shards(config), *given.shards), device,
    )  # fmt: skip
    for name, check in CHECKS.items():
        with watched(name):
            found[name] = examined(check, case)
    if count > 1:
        for name, check in COLLECTIVE.items():
            with watched(name):
                distributed.barrier()
                found[name] = examined(check, case)
    everyone = distributed.gathered((found, report.Seat(distributed.rank(), socket.gethostname())))
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


def _recipe(config: Config | None, ranks: int) -> tuple[list[Line], Survey | None]:
    """Whether a recipe could start on so many ranks, found out by the first of them. Collective.

    Its shards are another check's, which every rank makes.
    """
    lines: list[Line] = []
    known = None
    if config is None:
        return [Line(OK, "none is named (--recipe)")], None
    if distributed.rank() == 0:
        with guarded(lines):
            known = survey(replace(config, data=replace(config.data, shards=(), sources={}, dev=())), ranks)
            lines += [Line(FAIL, lacks) for lacks in known.lacking]
            micro = config.micro_batch(ranks)
            lines += (
                [] if lines else [Line(OK, f"{config.name}: {micro} samples a rank and micro-step on {ranks} ranks")]
            )
    told: tuple[list[Line], Survey | None] = distributed.from_first((lines, known))
    return told


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


@contextmanager
def watched(check: str, patience: Mapping[str, float] = PATIENCE) -> Iterator[None]:
    """End this process if what is inside takes too long, and say what it was."""
    limit = patience.get(check, OTHERS)

    def end() -> None:
        where = f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"
        remedy = APART if check in COLLECTIVE or check == "meeting" else "it waits for a disk, or for a GPU"
        sys.stdout.write(f"FAIL  {check:<14}  has not ended in {limit:.0f} s ({where})\n{'':22}→ {remedy}\n")
        sys.stdout.flush()
        os._exit(ILL)

    timer = threading.Timer(limit, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
