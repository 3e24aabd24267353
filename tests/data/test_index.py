import io
import json
import os
import tarfile
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fusion.batch import Supply
from dist_fusion.data import index
from dist_fusion.data.index import index_file, outlines, reasons
from dist_fusion.data.record import Unusable
from dist_fusion.data.shards import Reader, parse, write_shards

GOOD = {"jpg": b"x" * 900, "json": json.dumps({"texts": ["one", "two"]}).encode()}


def tar_of(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def good(*keys):
    return [(f"{key}.{name}", data) for key in keys for name, data in GOOD.items()]


def outline(shard):
    (found,) = outlines([str(shard)])
    return found


def told(shard):
    return [(damage.key, damage.reason) for damage in outline(shard).damages]


def keys_of(shard):
    return index.keys(str(shard)).tolist()


def test_an_index_says_where_each_sample_is_and_what_it_has(tmp_path):
    question = {"id": "1", "question": "same?", "answers": {}}
    statement = {"id": "1", "text": "same", "label": "True"}
    pair = json.dumps({"questions": [question], "statements": [statement]}).encode()
    shard = tar_of(tmp_path / "0.tar", *good("a"), ("b.left.png", b"L"), ("b.right.png", b"R"), ("b.json", pair))
    found = outline(shard)
    assert [found.supplies[n] for n in found.supply] == [Supply(1, 2, 0, ()), Supply(2, 0, 1, ("True",))]
    one, two = (parse(shard, Reader().read(shard, *place)) for place in zip(found.begin, found.end, strict=True))
    assert (one.images, one.texts) == ((b"x" * 900,), ("one", "two"))
    assert (two.images, two.statements) == ((b"L", b"R"), (statement,))


def test_an_index_is_kept_beside_its_tar_and_made_anew_when_that_changes(tmp_path, monkeypatch):
    shard = tar_of(tmp_path / "0.tar", *good("a"))
    outline(shard)
    assert index_file(shard) == tmp_path / "0.tar.index" and index_file(shard).exists()
    monkeypatch.setattr(index, "_scanned", lambda shard: pytest.fail("it was scanned again"))
    outline(shard)
    monkeypatch.undo()
    tar_of(tmp_path / "0.tar", *good("a", "b"))
    os.utime(shard, ns=(1, 1))
    assert len(outline(shard).begin) == 2


@pytest.mark.parametrize("torn", [b"", b"PK", b"x" * 300, None])
def test_a_torn_or_foreign_index_is_made_anew_and_runs_nothing(tmp_path, torn):
    shard = tar_of(tmp_path / "0.tar", *good("a"))
    whole = outline(shard)
    if torn is None:
        torn = index_file(shard).read_bytes()[:-200]
    index_file(shard).write_bytes(torn)
    assert len(outline(shard).begin) == len(whole.begin) == 1
    np.save(index_file(shard).open("wb"), np.array([print], dtype=object), allow_pickle=True)
    assert len(outline(shard).begin) == 1


def test_an_index_goes_to_the_cache_where_the_folder_cannot_be_written(tmp_path, monkeypatch):
    shard = tar_of(tmp_path / "0.tar", *good("a"))
    monkeypatch.setenv(index.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert len(outline(shard).begin) == 1
    assert not (tmp_path / "0.tar.index").exists()
    assert len([*(tmp_path / "cache" / "indices").iterdir()]) == 1


@pytest.mark.parametrize(
    ("members", "damages"),
    [
        ([("b.json", b"{}")], [("b", "no image")]),
        ([("b.jpg", b"x")], [("b", "no text")]),
        ([("b.jpg", b"x"), ("b.json", b'{"texts": [" "]}')], [("b", "empty caption")]),
        ([("b.jpg", b"x"), ("b.json", b"{")], [("b", "unreadable .json or .txt")]),
        ([("b.jpg", b"x"), ("b.jpg", b"y"), ("b.txt", b"x")], [("b", "duplicate key")]),
        ([*good("b"), *good("a")], [("a", "duplicate key")]),
        ([("b.1.jpg", b"x"), ("b.1.txt", b"x"), ("b.2.jpg", b"y")], [("b", "dotted key")]),
    ],
)
def test_a_sample_that_cannot_be_used_is_told_by_reason_and_leaves_the_rest(tmp_path, members, damages):
    shard = tar_of(tmp_path / "0.tar", *good("a"), *members, *good("c"))
    assert told(shard) == damages
    assert keys_of(shard)[0] == "a" and keys_of(shard)[-1] == "c"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty shard"),
        (b"<!DOCTYPE html><html>404</html>" * 40, "no tar"),
        (b"\x1f\x8b\x08" + bytes(600), "no tar"),
    ],
)
def test_what_is_no_tar_is_told(tmp_path, data, reason):
    (tmp_path / "0.tar").write_bytes(data)
    assert told(tmp_path / "0.tar") == [("", reason)]
    assert reasons(outline(tmp_path / "0.tar").damages) == f"1 {reason}"


def test_a_tar_that_is_gone_is_told():
    assert told("/nowhere/0.tar") == [("", "cannot be read")]


def test_behind_garbage_the_shard_goes_on(tmp_path):
    """tarfile takes it for the end, and says nothing."""
    shard = tar_of(tmp_path / "0.tar", *good("a", "b", "c"))
    data = bytearray((tmp_path / "0.tar").read_bytes())
    at = data.index(b"b.jpg")
    data[at : at + 512] = b"\xff" * 512
    (tmp_path / "0.tar").write_bytes(bytes(data))
    assert "c" in keys_of(shard) and "a" in keys_of(shard)
    assert ("", "garbage in a shard") in told(shard)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_tar_that_was_cut_off_gives_the_samples_before_the_cut(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "0.tar"
    tar_of(path, *good("a", "b", "c", "d"))
    whole = path.read_bytes()
    used = len(whole.rstrip(b"\0"))
    length = data.draw(st.integers(1, used) | st.integers(1, used // 512).map(lambda block: 512 * block))
    path.write_bytes(whole[:length])
    found = outline(path)
    assert found.damages
    assert keys_of(path) == ["a", "b", "c", "d"][: len(keys_of(path))]
    for place in zip(found.begin, found.end, strict=True):
        assert parse(str(path), Reader().read(str(path), *place)).texts == ("one", "two")


def test_mutated_tars_never_crash_and_lose_nothing_unlisted(tmp_path):
    """400 tars with bytes changed: a sample is read as it was, or is told, or lies in a shard that is told."""
    mutations = int(os.environ.get("DIST_FUSION_MUTATIONS", 400))
    path = tmp_path / "0.tar"
    tar_of(path, *good(*"abcdef"))
    whole = path.read_bytes()
    used = len(whole.rstrip(b"\0"))
    draw = Random(0)
    for number in range(mutations):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 3, 40))):
            place = draw.randrange(used)
            length = draw.choice((1, 1, 8, 600))
            data[place : place + length] = draw.randbytes(min(length, used - place))
        path.write_bytes(bytes(data[: draw.choice((len(data), len(data), draw.randrange(1, len(data))))]))
        os.utime(path, ns=(number, number))
        found = outline(path)
        keys = set(keys_of(path))
        for place in zip(found.begin, found.end, strict=True):
            try:
                parse(str(path), Reader().read(str(path), *place))
            except Unusable:
                continue
        assert found.damages or len(keys) == 6, number


def test_several_processes_index_what_one_does(tmp_path, monkeypatch):
    write_shards(tmp_path, [(f"{i}", GOOD) for i in range(12)], 3)
    shards = sorted(map(str, tmp_path.glob("*.tar")))
    alone = outlines(shards)
    for shard in shards:
        index_file(shard).unlink()
    monkeypatch.setattr(index, "LARGE", 0)
    for one, other in zip(outlines(shards), alone, strict=True):
        assert one.begin.tolist() == other.begin.tolist() and one.supplies == other.supplies


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("key", ["a", "folder/a", "ä" * 30, "k" * 150])
def test_any_kind_of_tar_with_any_names_is_read(tmp_path, kind, key):
    if kind == tarfile.USTAR_FORMAT and len(key) > 100:
        pytest.skip("no such names in this format")
    with tarfile.open(tmp_path / "0.tar", "w", format=kind) as tar:
        for name, data in good(key, "z"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    shard = str(tmp_path / "0.tar")
    found = outline(shard)
    assert (keys_of(shard), found.damages) == ([key, "z"], ())
    records = [parse(shard, Reader().read(shard, *place)) for place in zip(found.begin, found.end, strict=True)]
    assert [(one.key, one.images) for one in records] == [(f"{shard}/{k}", (GOOD["jpg"],)) for k in (key, "z")]
