from pathlib import Path

import pytest
from safetensors.torch import load_file

from dist_fusion.config import load
from dist_fusion.doctor.files import disk, kind_of, shards, triton_cache
from dist_fusion.doctor.lines import FAIL, OK, WARN
from dist_fusion.facts import saved_share, saved_size
from tests.doctor.cases import case, facts, grades

MOUNTED = """\
21 1 8:1 / / rw - ext4 /dev/sda1 rw
30 21 0:40 / /home rw,relatime shared:5 - nfs4 server:/home rw
31 30 0:41 / /home/me/my\\040disk rw - xfs /dev/sdb rw
32 21 0:42 / /home rw - lustre mds:/home rw
"""


@pytest.mark.parametrize(
    ("path", "kind"), [("/usr", "ext4"), ("/home/me", "lustre"), ("/home/me/my disk/x", "xfs"), ("/homes", "ext4")]
)
def test_a_path_is_on_what_was_mounted_last_at_the_nearest_place_above_it(tmp_path, path, kind):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTED)
    assert kind_of(Path(path), mounts) == kind


def test_this_machines_own_mounts_can_be_read(tmp_path):
    assert kind_of(Path("/proc/self")) == "proc"
    assert triton_cache(case(tmp_path))[0].grade in (OK, WARN)


def test_shards_that_are_whole_cut_off_or_not_there(shards_of_two, tmp_path):
    whole, cut = shards_of_two
    lines = shards(case(tmp_path, shards=(whole, cut, tmp_path / "nowhere", "http://somewhere/{0..9}.tar")))
    assert grades(lines) == [OK, FAIL, FAIL, OK]
    assert "1 shards" in lines[0].said and "cannot be read" in lines[1].said and "does not exist" in lines[2].said


@pytest.fixture
def shards_of_two(shards, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    first = (shards / "00000.tar").read_bytes()
    for folder, data in ((whole, first), (cut, first[:700])):
        folder.mkdir()
        (folder / "00000.tar").write_bytes(data)
    return whole, cut


def test_a_disk_without_room_for_the_checkpoints_is_red_and_one_for_few_of_them_yellow(small_recipe, tmp_path):
    config = load(small_recipe)
    free = disk(case(tmp_path))[0].figures[0] * 1e9
    of_one = {OK: free / 6, WARN: free / 2.5, FAIL: free}  # two are kept, one is being written
    for grade, size in of_one.items():
        (line,) = disk(case(tmp_path, config, facts(config, size / 16)))
        assert line.grade == grade, line


def test_a_checkpoint_takes_what_was_told_beforehand(two_ranks, small_recipe, tmp_path):
    wide = ["name=sized", f"runs={tmp_path}", "model.width=128", "model.num_heads=4"]
    assert two_ranks.run("run", recipe=str(small_recipe), overrides=wide) == [{"code": 0}] * 2
    config = load(small_recipe, wide)
    parameters = sum(weight.numel() for weight in load_file(tmp_path / "sized" / "model.safetensors").values())
    told = facts(config, parameters)
    (newest,) = sorted((tmp_path / "sized" / "checkpoints").glob("step-*"))[-1:]
    files = {path.name: path.stat().st_size for path in newest.iterdir()}
    assert sum(files.values()) == pytest.approx(saved_size(told), rel=0.05)
    of_first = sum(size for name, size in files.items() if "rank_1" not in name and name != "rank-1.pt")
    assert of_first == pytest.approx(saved_share(told, 2), rel=0.05)
