"""Videos of one's own, each with its captions in a file of the same name: .txt (one a line) or .json ({"texts": []}).

Every video becomes some evenly spaced frames, each a sample with all the captions.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from dist_fusion.data.prepare.plan import Options, Picture, Plan, Planned, Skip, captioned
from dist_fusion.data.prepare.sources import in_form, listed_files
from dist_fusion.data.video import find_ffmpeg
from dist_fusion.schema import UserError

EXTENSIONS = (".mp4", ".webm", ".mkv", ".mov", ".avi")


def plan(source: Path, options: Options) -> Plan:
    """`options.frames` samples a video, in the order of the videos' names; all are train."""
    if find_ffmpeg() is None:
        raise UserError("videos need ffmpeg: install the system's, or the package imageio-ffmpeg")
    videos = [path for path in listed_files(source) if path.suffix.lower() in EXTENSIONS]
    if not videos:
        raise UserError(f"{source} has no video; it should have some of {', '.join(EXTENSIONS)}")
    captions = {video: _captions(video) for video in videos}

    def items() -> Iterator[Planned | Skip]:
        for video in videos:
            place = str(video.relative_to(source))
            for item in captioned("train", (Picture((place,)),), place, source.resolve().name, captions[video]):
                yield item._replace(frames=options.frames) if isinstance(item, Planned) else item

    sidecars = (video.with_suffix(suffix) for video in videos for suffix in (".txt", ".json"))
    return Plan(items, tuple(path for path in sidecars if path.is_file()))


def _captions(video: Path) -> list[str]:
    text, tree = video.with_suffix(".txt"), video.with_suffix(".json")
    if text.is_file():
        return text.read_text(encoding="utf-8").splitlines()
    if not tree.is_file():
        raise UserError(f"{video} has no captions: there is no {text.name} or {tree.name} beside it")
    with in_form(tree, 'captions, {"texts": [...]} or {"caption": ...}'):
        told = json.loads(tree.read_text(encoding="utf-8"))
        return [str(text) for text in (told["texts"] if "texts" in told else [told["caption"]])]
