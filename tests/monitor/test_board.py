import json

from dist_fusion.monitor.board import Board


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_goes_on_where_it_resumed_and_drops_what_an_earlier_life_logged_later(tmp_path):
    first = Board(tmp_path, 0)
    for step in range(1, 6):
        first.scalars(step, {"loss/total": float(step)})
    first.close()
    second = Board(tmp_path, 3)
    second.scalars(4, {"loss/total": 40.0})
    second.close()
    assert [(line["step"], line["loss/total"]) for line in lines(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_a_line_torn_by_a_kill_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/total": 1.0}\n{"step": 2, "loss/to')
    board = Board(tmp_path, 2)
    board.scalars(3, {"loss/total": 3.0})
    board.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]


def test_tensorboard_shows_one_curve_over_two_lives(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, stop in ((0, 5), (3, 8)):
        board = Board(tmp_path, start)
        for step in range(start + 1, stop + 1):
            board.scalars(step, {"loss/total": 10.0 * start + step})
        board.close()
    curve = EventAccumulator(str(tmp_path / "tb")).Reload().Scalars("loss/total")
    assert [(point.step, point.value) for point in curve] == [
        (1, 1),
        (2, 2),
        (3, 3),
        *((s, 30 + s) for s in range(4, 9)),
    ]


def test_what_was_told_of_the_step_resumed_from_is_told_once(tmp_path):
    """A life may end between the scores of a step and the checkpoint that knows of them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first in (True, False):
        board = Board(tmp_path, 0 if first else 4)
        if first:
            board.scalars(4, {"loss/total": 4.0})
        board.scalars(4, {"dev/vqa/all": 50.0, **({} if first else {"dev/vqa/late": 1.0})})
        board.scalars(5, {"loss/total": 5.0, "dev/vqa/all": 60.0})
        board.close()
    assert [{k: v for k, v in line.items() if k != "step"} for line in lines(tmp_path) if line["step"] == 4] == [
        {"loss/total": 4.0},
        {"dev/vqa/all": 50.0},
        {"dev/vqa/late": 1.0},
    ]
    curve = EventAccumulator(str(tmp_path / "tb")).Reload().Scalars("dev/vqa/all")
    assert [(point.step, point.value) for point in curve] == [(4, 50), (5, 60)]


def test_a_broken_line_amid_others_costs_only_itself(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/total": 1.0}\n{"step": 2, "lo\n{"step": 3, "x": 3.0}\n')
    Board(tmp_path, 3).close()
    assert '{"step": 3, "x": 3.0}' in (tmp_path / "metrics.jsonl").read_text()
