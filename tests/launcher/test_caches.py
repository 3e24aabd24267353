"""Compiled code: where it is kept, and what killed builds leave."""

import subprocess
import sys

from launcher.caches import folders, hold_builds

HOLD = "import sys; from pathlib import Path; from launcher.caches import hold_builds\n"
HOLD += "held = hold_builds(Path(sys.argv[1])); print('held', flush=True); input()"


def test_the_folders_are_named_by_versions_and_leave_alone_what_is_chosen():
    chosen = folders({"TRITON_CACHE_DIR": "/mine"})
    assert chosen["TRITON_CACHE_DIR"] == "/mine"
    assert "torch-2." in chosen["TORCH_EXTENSIONS_DIR"] and "deepspeed-" in chosen["TORCH_EXTENSIONS_DIR"]


def test_the_lock_of_a_killed_build_is_removed_but_not_that_of_one_that_lives(tmp_path):
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        assert not lock.exists()  # it was alone there
        lock.touch()
        hold_builds(tmp_path).close()
        assert lock.exists()  # a living process may hold it
    finally:
        other.kill()
        other.wait()
    hold_builds(tmp_path).close()
    assert not lock.exists()
