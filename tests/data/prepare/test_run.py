import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dist_fusion import cli, train
from dist_fusion.data.prepare.plan import Options
from dist_fusion.data.prepare.run import prepare
from dist_fusion.data.prepare.table import PREPARE, DataSet
from dist_fusion.schema import UserError
from tests.data.prepare.sets import everything, make, picture, put, put_lines, read, skipped


def table(source, count, size=(40, 30)):
    """`count` images with two captions each and every fourth with an empty one, number 7 broken, number 8 missing."""
    for n in range(count):
        put(source / f"{n}.jpg", picture(n, size)[: 200 if n == 7 else None])
    (source / "8.jpg").unlink()
    captions = [[f"one of {n}", "two", *([" "] if n % 4 == 0 else [])] for n in range(count)]
    put_lines(source / "captions.jsonl", [{"image": f"{n}.jpg", "caption": told} for n, told in enumerate(captions)])
    return source


@pytest.fixture
def source(tmp_path):
    return table(tmp_path / "mine", 23)


def test_counts_are_exact_and_everything_left_out_is_listed(source, tmp_path):
    told = make("folder", source, tmp_path / "shards", samples_per_shard=5)
    assert told == {
        "name": "folder",
        "counts": {"train": {"mine": {"samples": 21, "texts": 42}}},
        "shards": {"train": 5},
        "skipped": {"empty caption": 6, "missing image": 1, "undecodable image": 1},
    }
    assert len(read(tmp_path / "shards", "train")) == 21
    listed = skipped(tmp_path / "shards")
    assert listed[:2] == [
        ("train", "empty caption", "0.jpg, caption 2"),
        ("train", "empty caption", "4.jpg, caption 2"),
    ]
    assert [(split, reason, item.split(":")[0]) for split, reason, item in listed[6:]] == [
        ("train", "undecodable image", "7.jpg"), ("train", "missing image", "8.jpg"),
    ]  # fmt: skip


def test_two_workers_and_one_write_the_same_bytes(source, tmp_path):
    for workers in (1, 2):
        make("folder", source, tmp_path / str(workers), workers=workers, samples_per_shard=2)
    assert everything(tmp_path / "1") == everything(tmp_path / "2")


@pytest.mark.launch
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes_and_leaves_no_worker(tmp_path, workers):
    source, target = table(tmp_path / "mine", 40, (2000, 1500)), tmp_path / "shards"
    call = f"prepare('folder', [Path({str(source)!r}), Path({str(target)!r})], Options(samples_per_shard=2), {workers})"
    program = (
        "from pathlib import Path\nfrom dist_fusion.data.prepare.plan import Options\n"
        f"from dist_fusion.data.prepare.run import prepare\n{call}\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL, start_new_session=True)
    wait_until(lambda: len(list(target.glob("train/*.json"))) >= 3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not alive(process.pid))
    finished = {path: path.stat().st_mtime_ns for path in target.glob("train/*.json")}
    assert 3 <= len(finished) < 20 and not (target / "prepare.json").exists()
    make("folder", source, target, workers=workers, samples_per_shard=2)
    assert all(path.stat().st_mtime_ns == time_of for path, time_of in finished.items())
    make("folder", source, tmp_path / "at once", samples_per_shard=2)
    assert everything(target) == everything(tmp_path / "at once")


def wait_until(holds, seconds=60):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def alive(group):
    """Whether a process of a group still runs."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"x" + data[1:], lambda data: None])
def test_a_finished_shard_that_was_damaged_is_made_again(source, tmp_path, damage):
    make("folder", source, tmp_path / "shards", samples_per_shard=5)
    before, tar = everything(tmp_path / "shards"), tmp_path / "shards" / "train" / "00002.tar"
    data = damage(tar.read_bytes())
    tar.unlink() if data is None else tar.write_bytes(data)
    make("folder", source, tmp_path / "shards", samples_per_shard=5)
    assert everything(tmp_path / "shards") == before


def test_an_image_that_has_come_since_is_taken_in(source, tmp_path):
    make("folder", source, tmp_path / "shards", samples_per_shard=5)
    first = (tmp_path / "shards" / "train" / "00000.tar").stat().st_mtime_ns
    put(source / "8.jpg", picture(8))
    told = make("folder", source, tmp_path / "shards", samples_per_shard=5)
    assert "missing image" not in told["skipped"] and "8.jpg" in read(tmp_path / "shards", "train")
    assert (tmp_path / "shards" / "train" / "00000.tar").stat().st_mtime_ns == first


def test_what_a_killed_run_left_half_written_is_removed(source, tmp_path):
    make("folder", source, tmp_path / "shards")
    put(tmp_path / "shards" / "train" / ".00000.tar.4711", b"half")
    make("folder", source, tmp_path / "shards")
    assert not list((tmp_path / "shards").rglob(".*"))


def test_a_shard_of_which_nothing_is_left_has_no_tar(source, tmp_path):
    for n in range(5, 10):
        (source / f"{n}.jpg").unlink(missing_ok=True)
    assert make("folder", source, tmp_path / "shards", samples_per_shard=5)["shards"] == {"train": 4}
    assert not (tmp_path / "shards" / "train" / "00001.tar").exists()
    assert len(read(tmp_path / "shards", "train")) == 18


def test_a_large_image_becomes_a_smaller_jpeg_and_a_small_one_stays_as_it_is(source, tmp_path):
    put(source / "0.jpg", picture(0, (800, 600)))
    make("folder", source, tmp_path / "shards", short_side=100)
    records = read(tmp_path / "shards", "train")
    assert len(records["0.jpg"].images[0]) < len(picture(0, (800, 600))) / 4
    assert records["1.jpg"].images == (picture(1),)


def test_another_plan_in_the_same_folder_is_refused(source, tmp_path):
    make("folder", source, tmp_path / "shards")
    with pytest.raises(UserError, match="holds the shards of another plan: its options is"):
        make("folder", source, tmp_path / "shards", short_side=128)
    put_lines(source / "captions.jsonl", [{"image": f"{n}.jpg", "caption": "other"} for n in range(23)])
    with pytest.raises(UserError, match="holds the shards of another plan: its inputs is"):
        make("folder", source, tmp_path / "shards")
    put(tmp_path / "full" / "thesis.tex", "x")
    with pytest.raises(UserError, match=r"full is not empty and has no plan\.json"):
        make("folder", source, tmp_path / "full")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 9}, "prepare folder does not know --frames"),
        ({"held_out": "none"}, "prepare folder does not know --held-out"),
        ({"only": "dev"}, "has no sample of dev"),
        ({"only": "val"}, "--only names the split 'val'; it can be some of train,restval,dev,test"),
        ({"short_side": 8}, "--short-side is 8; it must be at least 16"),
        ({"samples_per_shard": 0}, "--samples-per-shard is 0; it must be at least 1"),
    ],
)
def test_an_option_that_cannot_be_is_told(source, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        make("folder", source, tmp_path / "shards", **options)
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("name", [name for name, row in PREPARE.items() if isinstance(row, DataSet)])
def test_an_empty_source_is_told_by_every_set_before_anything_is_made(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=str(tmp_path / "empty")):
        make(name, tmp_path / "empty", tmp_path / "shards")
    with pytest.raises(UserError, match="nowhere is no folder; "):
        make(name, tmp_path / "nowhere", tmp_path / "shards")
    with pytest.raises(UserError, match="takes SRC DST; given were 1 folders"):
        prepare(name, [tmp_path], Options(), 1)
    assert not (tmp_path / "shards").exists()


def test_the_command_prints_what_was_made(source, tmp_path, capsys):
    target = str(tmp_path / "shards")
    assert (
        cli.main(["prepare", "folder", str(source), target, "--workers", "1", "--samples-per-shard", "9"]) == train.DONE
    )
    printed = capsys.readouterr()
    assert "train    mine: 21 samples, 42 texts in 3 shards" in printed.out
    assert "skipped  1: undecodable image" in printed.out
    assert "samples" in printed.err and "folder" in printed.err  # the progress line
    assert json.loads((tmp_path / "shards" / "plan.json").read_text())["planned"] == {"train": 23}


def test_help_lists_every_set_with_what_it_needs(capsys):
    with pytest.raises(SystemExit):
        cli.main(["prepare", "--help"])
    lines = capsys.readouterr().out.splitlines()
    for name, row in PREPARE.items():
        (line,) = (line for line in lines if line.startswith(f"  {name} "))
        assert (row.needs if isinstance(row, DataSet) else row.about) in line
