def test_ranks_that_do_not_share_a_disk_are_told_so(two_ranks, tmp_path):
    folders = [tmp_path / "node1", tmp_path / "node2"]
    for folder in folders:
        folder.mkdir()
    first, second = two_ranks.run("apart", folders=[str(folder) for folder in folders], patience=0.3)
    assert [grade for grade, _ in (*first, *second)] == ["FAIL", "FAIL"]
    assert "what 1 other ranks write is not seen here" in first[0][1]
    assert "of rank 0 is not the one that is here" in second[0][1]
    assert all(not [*folder.iterdir()] for folder in folders), "the doctor leaves nothing behind"


def test_ranks_that_share_one_see_what_each_writes(two_ranks, tmp_path):
    found = two_ranks.run("apart", folders=[str(tmp_path)] * 2, patience=5)
    assert [grade for ((grade, _),) in found] == ["ok", "ok"]
    assert not [*tmp_path.iterdir()]
