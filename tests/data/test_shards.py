import io
import json
import pickle
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fusion.data.shards import find_shards, read_records, write_shards
from dist_fusion.schema import UserError


def tree_of(**tree):
    return json.dumps(tree).encode()


def read(*folders):
    return list(read_records(find_shards([str(folder) for folder in folders])))


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


TEXTS = st.lists(st.text().filter(str.strip), min_size=1, max_size=3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=600), TEXTS), min_size=1, max_size=7), st.integers(1, 4))
def test_what_is_written_is_read_in_its_order(tmp_path_factory, samples, samples_per_shard):
    folder = tmp_path_factory.mktemp("written")
    members = [(f"{i:03d}", {"jpg": image, "json": tree_of(texts=t)}) for i, (image, t) in enumerate(samples)]
    assert write_shards(folder, members, samples_per_shard) == len(samples)
    names = [f"{i:05d}.tar" for i in range(-(-len(samples) // samples_per_shard))]
    assert sorted(path.name for path in folder.iterdir()) == names  # an index comes with the first reading
    records = read(folder)
    assert [(record.images, record.texts) for record in records] == [((image,), tuple(t)) for image, t in samples]


def test_writing_twice_gives_the_same_bytes(tmp_path):
    members = [(f"{i}", {"png": bytes([i]) * 700, "json": tree_of(texts=["x"])}) for i in range(5)]
    for name in ("one", "two"):
        write_shards(tmp_path / name, members, 2)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_tars_in_the_way_img2dataset_writes_them_are_read_as_one_text(tmp_path):
    write_tar(
        tmp_path / "00000.tar",
        {
            "000000000.jpg": b"picture 0",
            "000000000.txt": b"a caption\n",
            "000000000.json": tree_of(caption="a caption", url="http://x/y.jpg", key="000000000", width=3, error=None),
            "000000001.jpg": b"picture 1",
            "000000001.txt": "ein Käfer".encode(),
        },
    )
    first, second = read(tmp_path)
    assert (first.images, first.image_ids, first.questions) == ((b"picture 0",), ("http://x/y.jpg",), ())
    assert [text.strip() for text in first.texts] == ["a caption"]
    assert (second.images, second.texts) == ((b"picture 1",), ("ein Käfer",))
    assert second.image_ids == (f"{tmp_path.name}/00000.tar/000000001",)


@pytest.mark.parametrize(
    "question",
    [{"question": "x"}, "x", {"id": "1", "question": "x", "answers": ["yes"]},
     {"id": "1", "question": "x", "answers": {"yes": "1"}}, {"id": "1", "question": 3, "answers": {}}],
)  # fmt: skip
def test_a_question_that_could_not_be_asked_is_refused_before_training(tmp_path, question):
    write_tar(tmp_path / "0.tar", {"a.jpg": b"x", "a.json": tree_of(questions=[question])})
    with pytest.raises(UserError, match="unreadable"):
        read(tmp_path)


@pytest.mark.parametrize(
    "statement",
    ["x", {"text": "x", "label": "True"}, {"id": "1", "text": "x"}, {"id": "1", "text": 3, "label": "True"},
     {"id": "1", "text": "x", "label": True}, {"id": "1", "text": "x", "label": "True", "group": 3}],
)  # fmt: skip
def test_a_statement_that_could_not_be_judged_is_refused_before_training(tmp_path, statement):
    write_tar(tmp_path / "0.tar", {"a.jpg": b"x", "a.json": tree_of(statements=[statement])})
    with pytest.raises(UserError, match=r"0\.tar/a: unreadable .*statement"):
        read(tmp_path)


def test_texts_of_the_json_come_before_the_txt(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.jpg": b"x", "a.txt": b"old", "a.json": tree_of(texts=["one", " ", "two"])})
    assert read(tmp_path)[0].texts == ("one", "two")


def test_a_sample_may_have_two_images_and_questions_without_texts(tmp_path):
    question = {"id": "1", "question": "same?", "answers": {"no": 1.0}, "kind": "yes/no"}
    members = {"right.png": b"R", "left.png": b"L", "json": tree_of(image_id="pair", questions=[question])}
    write_shards(tmp_path, [("7", members)], 5)
    (record,) = read(tmp_path)
    assert record.images == (b"L", b"R") and record.image_ids == ("pair/0", "pair/1")
    assert record.texts == () and record.questions == (question,) and record.statements == ()


def test_a_pickle_in_a_tar_is_never_loaded(tmp_path):
    made = tmp_path / "made"
    bomb = pickle.dumps(Bomb(made))
    pickle.loads(bomb).close()
    assert made.exists()  # the bomb works
    made.unlink()
    members = {f"0.{end}": bomb for end in ("pyd", "pkl", "pickle", "pth", "pt", "npy", "ten", "cbor")}
    write_tar(tmp_path / "0.tar", {"0.png": b"x", "0.json": tree_of(texts=["fine"]), **members})
    (record,) = read(tmp_path)
    assert record.texts == ("fine",) and record.images == (b"x",)
    assert not made.exists()


@pytest.mark.parametrize("name", ["./pipe:touch made.tar", "."])
def test_a_tar_that_is_named_like_a_command_is_read_and_never_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "pipe:touch made.tar", {"0.png": b"x", "0.json": tree_of(texts=["fine"])})
    assert [record.texts for record in read(name)] == [("fine",)]
    assert not (tmp_path / "made.tar").exists()


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("pipe:touch made.tar", "set data.trust_shards=true"),
        ("http://host/0.tar", "set data.cache"),
        ("https://host/{0..9}.tar", "set data.cache"),
        ("s3://bucket/0.tar", "a shard is a local path"),
        ("file:0.tar", "a shard is a local path"),
    ],
)
def test_a_command_or_address_is_refused_unless_a_recipe_says_how(tmp_path, monkeypatch, name, instead):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        find_shards([name])
    assert repr(name) in str(error.value) and instead in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(UserError, match="nowhere', which does not exist; `dist-fusion prepare` makes shards"):
        find_shards([str(tmp_path / "nowhere")])


def test_a_folder_without_tars_is_told(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"which has no \.tar files"):
        find_shards([str(tmp_path)])


def test_an_empty_tar_is_told(tmp_path):
    (tmp_path / "3.tar").touch()
    with pytest.raises(UserError, match=r"3\.tar: empty shard"):
        read(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_shards(folder, [(f"{i}", {"jpg": b"x" * 700, "json": tree_of(texts=["x"])}) for i in range(5)], 9)
    data = (folder / "00000.tar").read_bytes()
    return data, len(data.rstrip(b"\0"))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_tar_that_was_cut_off_is_told_wherever_it_was_cut(tmp_path_factory, whole, data):
    content, used = whole
    length = data.draw(st.integers(1, used) | st.integers(1, used // 512).map(lambda block: 512 * block))
    path = tmp_path_factory.mktemp("cut") / "0.tar"
    path.write_bytes(content[:length])
    with pytest.raises(UserError) as error:
        read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("start", [b"garbage" * 300, b"\x1f\x8b\x08" + b"\0" * 600])
def test_a_file_that_is_no_tar_is_told(tmp_path, start):
    (tmp_path / "0.tar").write_bytes(start)
    with pytest.raises(UserError, match=r"0\.tar: no tar"):
        read(tmp_path)


@pytest.mark.parametrize(
    "tree",
    [b"{", b"[1]", b'"x"', b"\xff", b'{"texts": "abc"}', b'{"texts": [1]}', b'{"questions": 5}', b'{"statements": 5}',
     b'{"texts": ["half a pair: \\ud83d"]}', b'{"texts": ["x"], "image_id": "\\ud83d"}'],
)  # fmt: skip
def test_a_json_that_is_wrong_is_told_with_its_sample(tmp_path, tree):
    write_shards(tmp_path, [("good", {"png": b"x", "txt": b"x"}), ("wrong", {"png": b"x", "json": tree})], 9)
    with pytest.raises(UserError, match=r"00000\.tar/wrong: unreadable \.json or \.txt"):
        read(tmp_path)


def test_a_key_that_is_no_utf_8_names_its_image_all_the_same(tmp_path):
    long = "x" * 120  # a name that tarfile reads, which lets such bytes pass
    write_tar(tmp_path / "0.tar", {f"{long}\udcff.png": b"x", f"{long}\udcff.txt": b"text"})
    (record,) = read(tmp_path)
    assert record.image_ids[0].encode().endswith(rb"x\udcff")


def test_shards_are_in_the_order_of_their_names_folder_after_folder(tmp_path):
    for name in ("b/1.tar", "b/0.tar", "a/9.tar"):
        write_tar(tmp_path / name, {"0.png": b"x"})
    found = find_shards([str(tmp_path / "b"), str(tmp_path / "a" / "9.tar")])
    assert found == [str(tmp_path / name) for name in ("b/0.tar", "b/1.tar", "a/9.tar")]
