import subprocess

import pytest

from dist_fusion.data.video import find_ffmpeg
from dist_fusion.schema import UserError
from tests.data.prepare.sets import make, put, read

FFMPEG = find_ffmpeg()
needs_ffmpeg = pytest.mark.skipif(FFMPEG is None, reason="ffmpeg is not installed")


@pytest.fixture
def source(tmp_path):
    """Two seconds of a moving test picture, and a file that is no video."""
    folder = tmp_path / "clips"
    folder.mkdir()
    pattern = ["-f", "lavfi", "-i", "testsrc=size=64x48:rate=5:duration=2", "-y", str(folder / "a.mkv")]
    subprocess.run([FFMPEG, "-loglevel", "error", *pattern], check=True)
    put(folder / "a.txt", "A clock runs.\n\nColours beside it.\n")
    return folder


@needs_ffmpeg
def test_a_video_becomes_frames_that_each_have_all_captions(source, tmp_path):
    told = make("video", source, tmp_path / "shards", frames=3, short_side=24)
    records = read(tmp_path / "shards", "train")
    assert records.keys() == {"a.mkv#0", "a.mkv#1", "a.mkv#2"}
    assert {record.texts for record in records.values()} == {("A clock runs.", "Colours beside it.")}
    assert len({record.images for record in records.values()}) == 3
    assert told["counts"] == {"train": {"clips": {"samples": 3, "texts": 6}}} and told["skipped"] == {
        "empty caption": 1
    }


@needs_ffmpeg
def test_a_broken_video_is_listed_and_captions_may_be_json(source, tmp_path):
    put(source / "b.mp4", b"no video" * 50)
    put(source / "b.json", {"caption": "broken"})
    told = make("video", source, tmp_path / "shards")
    assert told["skipped"]["undecodable image"] == 1
    assert {name.split("#")[0] for name in read(tmp_path / "shards", "train")} == {"a.mkv"}


@needs_ffmpeg
def test_a_video_without_captions_and_a_folder_without_videos_are_told(source, tmp_path):
    (source / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a.mkv has no captions: there is no a.txt or a.json beside it"):
        make("video", source, tmp_path / "shards")
    (source / "a.mkv").unlink()
    with pytest.raises(UserError, match=r"has no video; it should have some of \.mp4"):
        make("video", source, tmp_path / "shards")
