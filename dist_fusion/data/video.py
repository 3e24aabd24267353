"""ffmpeg: the frames of a video, and the last resort for a picture that Pillow does not know.

A file from a stranger could name other files and addresses for ffmpeg to open (playlists, concat scripts). So ffmpeg
never guesses: how the bytes begin chooses one demuxer of DEMUXERS, none of which holds such names, and no protocol is
allowed but the one that brings these bytes.
"""

import os
import re
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import ffmpeg
from PIL import Image

DEMUXERS = {  # how a file begins -> the demuxer it is given to
    rb".{4}(ftyp|moov|mdat|wide)": "mov",  # MP4 and QuickTime, HEIF (ffmpeg 9 reads it, 5.1 does not)
    rb"\x1a\x45\xdf\xa3": "matroska",  # and WebM
    rb"RIFF.{4}AVI ": "avi",
    rb"\xff\x0a|\0{3}\x0cJXL \r\n\x87\n": "jpegxl_pipe",
}
SILENCE = 20.0  # seconds that ffmpeg may take for a frame
MAX_PIXELS = 2**28 // 3  # of a picture or a frame: a quarter of a GiB in RGB


class UnreadableVideo(ValueError):
    """ffmpeg is not there, or makes no frame of this; the message says why."""


class Footage(NamedTuple):
    """How long a video is."""

    frames: int
    seconds: float


def find_ffmpeg() -> str | None:
    """The system's ffmpeg, or the one that the package imageio-ffmpeg brings, or None."""
    system = shutil.which("ffmpeg")
    if system is not None:
        return system
    try:
        from imageio_ffmpeg import get_ffmpeg_exe  # optional

        return str(get_ffmpeg_exe())
    except (ImportError, RuntimeError):  # the package is not there, or was built without its binary
        return None


def first_frame(data: bytes) -> bytes:
    """The first frame of a video's (or a HEIF's, or a JPEG XL's) bytes as a PNG, upright.

    Raises:
        UnreadableVideo: for any other file, a damaged one, one that takes longer than SILENCE, or without ffmpeg.
    """
    source = ffmpeg.input(
        "cache:pipe:0",  # a pipe that can be rewound: many an MP4 keeps its index at the end
        format=_demuxer(data[:16]),
        protocol_whitelist="cache,pipe",
        read_ahead_limit=-1,
        max_pixels=MAX_PIXELS,
        err_detect="explode",
    )
    command = _command(source.output("pipe:1", format="image2pipe", vcodec="png", **{"frames:v": 1}), "-xerror")
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=SILENCE, check=False)
    except subprocess.TimeoutExpired:
        raise UnreadableVideo(f"ffmpeg took longer than {SILENCE:.0f} s") from None
    if done.returncode or not done.stdout:
        raise UnreadableVideo(_complaint(done.stderr))
    return done.stdout


def probe(video: Path) -> Footage:
    """How many frames a video has and how long it takes, without decoding it.

    Raises:
        UnreadableVideo: if it is no video of DEMUXERS' kinds, or without ffmpeg.
    """
    packets = _source(video)["V:0"].output("pipe:1", format="framecrc", codec="copy")
    done = subprocess.run(_command(packets), stdin=subprocess.DEVNULL, capture_output=True, check=False)
    lines = done.stdout.decode(errors="replace").splitlines()
    unit = next((Fraction(line.split()[-1]) for line in lines if line.startswith("#tb")), Fraction(1))
    times = [tuple(map(int, line.split(",")[1:4])) for line in lines if not line.startswith("#")]  # decode, show, lasts
    if not times:
        raise UnreadableVideo(f"{video}: {_complaint(done.stderr)}")
    return Footage(len(times), float((times[-1][0] + times[-1][2] - times[0][0]) * unit))


def frames(video: Path, count: int) -> Iterator[Image.Image]:
    """`count` frames of a video as RGB, upright, from the middles of as many equal parts; all if it has no more.

    One a second is `count=round(probe(video).seconds)`. Frames arrive as ffmpeg decodes them, so memory holds one.

    Raises:
        UnreadableVideo: if it is no video of DEMUXERS' kinds, no frame can be decoded, ffmpeg says nothing for
            SILENCE seconds, or is not there.
    """
    assert count > 0
    total = probe(video).frames
    count = min(count, total)
    # Of frame n, when k are chosen: is the middle of part k behind n + 1? Then one frame a second, so that none is
    # doubled or left out to keep time.
    middles = _source(video)["V:0"].filter("select", f"gt(2*{count}*(n+1),(2*selected_n+1)*{total})")
    chosen = middles.filter("setpts", "N/TB").output(
        "pipe:1", format="image2pipe", vcodec="bmp", pix_fmt="bgr24", r=1, **{"frames:v": count}
    )
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            _command(chosen), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, bufsize=0
        )
        try:
            assert process.stdout is not None
            made = 0
            while head := _read(process.stdout, 6):
                rest = _read(process.stdout, int.from_bytes(head[2:6], "little") - 6)
                yield Image.open(BytesIO(head + rest), formats=("BMP",)).convert("RGB")
                made += 1
            if process.wait() or not made:
                log.seek(0)
                raise UnreadableVideo(f"{video}: {_complaint(log.read())}")
        finally:
            process.kill()
            process.communicate()


def _demuxer(head: bytes) -> str:
    for beginning, name in DEMUXERS.items():
        if re.match(beginning, head, re.DOTALL):
            return name
    raise UnreadableVideo("it is no video, HEIF or JPEG XL either")


def _source(video: Path) -> Any:
    with video.open("rb") as file:
        demuxer = _demuxer(file.read(16))
    return ffmpeg.input(
        f"file:{video.absolute()}", format=demuxer, protocol_whitelist="file", max_pixels=MAX_PIXELS, threads=1
    )


def _command(output: Any, *options: str) -> list[str]:
    program = find_ffmpeg()
    if program is None:
        raise UnreadableVideo("there is no ffmpeg: install the system's or the package imageio-ffmpeg")
    quiet = ("-nostdin", "-hide_banner", "-loglevel", "error")
    return list(output.global_args(*quiet, *options).compile(cmd=program))


def _complaint(log: bytes) -> str:
    """The last line that ffmpeg wrote, without the addresses in its memory."""
    lines = log.decode(errors="replace").strip().splitlines() or ["no frame"]
    return "ffmpeg: " + re.sub(r"\[(\S+) @ 0x[0-9a-f]+\]", r"\1:", lines[-1])[:200]


def _read(pipe: IO[bytes], length: int) -> bytes:
    """`length` bytes of a pipe, or fewer at its end; raises UnreadableVideo if none come for SILENCE seconds."""
    parts = []
    while length > 0:
        if not select.select([pipe], [], [], SILENCE)[0]:
            raise UnreadableVideo(f"ffmpeg said nothing for {SILENCE:.0f} s")
        part = os.read(pipe.fileno(), min(length, 2**20))
        if not part:
            break
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
