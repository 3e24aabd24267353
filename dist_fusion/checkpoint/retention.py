"""Which checkpoints are kept."""

from collections.abc import Iterable, Sequence

from dist_fusion.checkpoint.manifest import Saved


def superseded(
    whole: Sequence[Saved], keep: int, best_step: int | None, epochs: int, steps_per_epoch: float
) -> list[Saved]:
    """Those of the whole checkpoints (oldest first) that may go.

    The newest `keep` (2 or more) stay, that of `best_step`, and with `epochs` the first one of every so many epochs.
    """
    assert keep >= 2
    stay = {saved.step for saved in whole[-keep:]} | {best_step}
    if epochs:
        stay |= set(_firsts(whole, epochs * steps_per_epoch))
    return [saved for saved in whole if saved.step not in stay]


def _firsts(whole: Iterable[Saved], period: float) -> list[int]:
    """The step of the first checkpoint at or after each multiple of `period` steps, but for zero."""
    firsts: dict[int, int] = {}
    for saved in whole:
        firsts.setdefault(int(saved.step // period), saved.step)
    return [step for number, step in firsts.items() if number]
