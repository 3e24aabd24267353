import pytest

from dist_fusion.checkpoint.manifest import DAMAGED, MANIFEST, folder_at
from dist_fusion.checkpoint.resuming import resume
from dist_fusion.schema import UserError


def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(tmp_path):
    folder = folder_at(tmp_path, 5)
    (folder / MANIFEST).mkdir(parents=True)  # reading it is an error, though it is there
    with pytest.raises(UserError, match=r"cannot be read now: rank 0 on .*Nothing is lost"):
        resume(None, tmp_path, 3)
    assert (folder / MANIFEST).exists() and not (folder / DAMAGED).exists()
