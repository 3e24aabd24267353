import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from dist_fusion.data.images import UnreadableImage, read
from dist_fusion.data.video import UnreadableVideo, find_ffmpeg, first_frame, frames, probe

needs_ffmpeg = pytest.mark.skipif(find_ffmpeg() is None, reason="needs ffmpeg, or the package imageio-ffmpeg")
NUM_FRAMES, RATE = 50, 25
CODECS = {"mp4": "mpeg4", "mov": "mjpeg", "mkv": "ffv1", "webm": "vp9", "avi": "mpeg4"}
PICTURE = b"\0\0\0\x20ftypheic"  # how a HEIF begins


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """The same two seconds in several files: frame n is grey of level 5 n."""
    folder = tmp_path_factory.mktemp("videos")
    raw = b"".join(bytes([5 * n]) * (3 * 32 * 24) for n in range(NUM_FRAMES))
    for kind, codec in CODECS.items():
        command = [find_ffmpeg(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "32x24"]
        command += ["-r", str(RATE), "-i", "pipe:0", "-c:v", codec, "-q:v", "2", str(folder / f"grey.{kind}")]
        subprocess.run(command, input=raw, check=True)
    return folder


def levels(images):
    return [round(image.getpixel((16, 12))[1] / 5) for image in images]


@needs_ffmpeg
@pytest.mark.parametrize("kind", CODECS)
def test_frames_are_evenly_spaced(videos, kind):
    path = videos / f"grey.{kind}"
    assert levels(frames(path, 5)) == pytest.approx([5, 15, 25, 35, 45], abs=0.6)
    assert levels(frames(path, 1)) == pytest.approx([25], abs=0.6)
    images = list(frames(path, 3))
    assert {(image.mode, image.size) for image in images} == {("RGB", (32, 24))}


@needs_ffmpeg
@pytest.mark.parametrize("count", [7, 49, 50, 51, 400])
def test_no_frame_comes_twice_and_none_is_made_up(videos, count):
    found = levels(frames(videos / "grey.mkv", count))
    assert len(found) == min(count, NUM_FRAMES) and found == sorted(set(found))


@needs_ffmpeg
@pytest.mark.parametrize("kind", CODECS)
def test_a_probe_counts_frames_and_seconds(videos, kind):
    found = probe(videos / f"grey.{kind}")
    assert found.frames == NUM_FRAMES and found.seconds == pytest.approx(NUM_FRAMES / RATE, abs=0.05)


@needs_ffmpeg
def test_a_video_whose_frames_are_not_all_taken_leaves_no_process(videos):
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before, taken = children.read_text(), frames(videos / "grey.mkv", 50)
    next(taken)
    assert children.read_text() != before
    taken.close()
    assert children.read_text() == before


@needs_ffmpeg
def test_half_a_video_gives_the_frames_it_has(videos, tmp_path):
    data, half = (videos / "grey.mkv").read_bytes(), tmp_path / "half.mkv"
    half.write_bytes(data[: len(data) // 2])
    found = levels(frames(half, 5))
    assert 3 <= len(found) <= 5 and found == sorted(set(found)) and found[-1] < 30


@needs_ffmpeg
@pytest.mark.parametrize("kind", CODECS)
def test_a_video_is_read_as_its_first_frame(videos, kind):
    data = (videos / f"grey.{kind}").read_bytes()
    assert Image.open(BytesIO(first_frame(data))).format == "PNG"
    assert read(data, 16).size == (32, 24) and levels([read(data, 16)]) == [0]


@needs_ffmpeg
def test_a_jpeg_xl_is_read_where_ffmpeg_reads_it(tmp_path):
    path = tmp_path / "red.jxl"
    command = [find_ffmpeg(), "-v", "error", "-f", "lavfi", "-i", "color=red:size=32x24", "-frames:v", "1", str(path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this ffmpeg writes no JPEG XL")
    image = read(path.read_bytes(), 16)
    assert image.size == (32, 24) and image.getpixel((5, 5))[0] > 240 > 20 > image.getpixel((5, 5))[1]


@pytest.mark.parametrize("data", [b"", b"no video", PICTURE, b"\x1a\x45\xdf\xa3" + bytes(50)])
def test_what_is_no_video_is_refused(tmp_path, data):
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(UnreadableVideo):
        first_frame(data)
    with pytest.raises(UnreadableVideo):
        probe(path)
    with pytest.raises(UnreadableVideo):
        list(frames(path, 2))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The folder of an `ffmpeg` that writes down what it was asked, does what `body` says, and is the only one."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "ffmpeg"

    def install(body):
        program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n{body}\n')
        program.chmod(0o755)
        return tmp_path / "asked"

    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return install


PLAYLISTS = {
    "HLS": b"#EXTM3U\n#EXTINF:1,\nfile://{secret}\n",
    "concat": b"ffconcat version 1.0\nfile '{secret}'\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="{secret}"/></svg>',
    "SDP": b"v=0\nm=video 1 RTP/AVP 1\n",
    "path": b"{secret}",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_file_that_names_others_never_reaches_ffmpeg(fake, tmp_path, kind):
    """A playlist in a shard from a stranger would have ffmpeg read any local file, or ask any address."""
    asked, secret = fake("exit 1"), tmp_path / "secret.png"
    Image.new("RGB", (4, 4)).save(secret)
    with pytest.raises(UnreadableImage, match="no video"):
        read(PLAYLISTS[kind].replace(b"{secret}", str(secret).encode()), 8)
    assert not asked.exists()


def test_ffmpeg_may_open_nothing_but_what_it_is_given(fake, tmp_path):
    asked = fake("exit 1")
    (tmp_path / "film.mp4").write_bytes(PICTURE)
    with pytest.raises(UnreadableVideo):
        first_frame(PICTURE)
    with pytest.raises(UnreadableVideo):
        probe(tmp_path / "film.mp4")
    by_pipe, by_file = asked.read_text().splitlines()
    assert "-f mov " in by_pipe and "-protocol_whitelist cache,pipe " in by_pipe and "-i cache:pipe:0 " in by_pipe
    assert "-f mov " in by_file and "-protocol_whitelist file " in by_file and "-i file:/" in by_file


def test_what_ffmpeg_makes_must_be_a_picture(fake):
    fake("echo no picture")
    with pytest.raises(UnreadableImage):
        read(PICTURE, 8)


def test_an_ffmpeg_that_hangs_is_stopped(fake, tmp_path, monkeypatch):
    fake("exec sleep 60")
    monkeypatch.setattr("dist_fusion.data.video.SILENCE", 0.2)
    with pytest.raises(UnreadableVideo, match="longer"):
        first_frame(PICTURE)


def test_an_ffmpeg_that_hangs_between_frames_is_stopped(fake, tmp_path, monkeypatch):
    path = tmp_path / "film.mp4"
    path.write_bytes(PICTURE)
    fake('case "$*" in *framecrc*) echo "0, 0, 0, 1, 9, 0x1";; *) printf BM; exec sleep 60;; esac')
    monkeypatch.setattr("dist_fusion.data.video.SILENCE", 0.2)
    with pytest.raises(UnreadableVideo, match="said nothing"):
        next(frames(path, 1))


def test_without_ffmpeg_the_reason_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(UnreadableImage, match="install"):
        read(PICTURE, 8)
