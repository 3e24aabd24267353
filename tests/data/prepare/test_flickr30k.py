from tests.data.prepare.sets import make, picture, put, read


def test_captions_are_in_karpathys_splits(tmp_path):
    source = tmp_path / "flickr30k"
    entries = [
        {"sentids": [0, 1], "imgid": n, "sentences": [
            {"tokens": ["a", str(n), str(k)], "raw": f"A {n} {k}.", "imgid": n, "sentid": k} for k in range(2)
        ], "split": split, "filename": f"{1000092795 + n}.jpg"}
        for n, split in enumerate(("train", "val", "test"))
    ]  # fmt: skip
    put(source / "karpathy" / "dataset_flickr30k.json", {"images": entries, "dataset": "flickr30k"})
    for n in range(3):
        put(source / "flickr30k-images" / f"{1000092795 + n}.jpg", picture(n))
    told = make("flickr30k", source, tmp_path / "shards")
    for n, split in enumerate(("train", "dev", "test")):
        ((name, record),) = read(tmp_path / "shards", split).items()
        assert name == f"flickr30k/{1000092795 + n}" and record.texts == (f"A {n} 0.", f"A {n} 1.")
        assert told["counts"][split] == {"flickr30k": {"samples": 1, "texts": 2}}
