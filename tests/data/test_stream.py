import json
import os
import subprocess
import sys
from itertools import islice
from random import Random

import pytest
import torch

from dist_fusion.batch import content_id
from dist_fusion.data.shards import find_shards, read_records, write_shards
from dist_fusion.data.stream import DataConfig, Plan, SourceConfig, Stream, load_batches
from dist_fusion.data.text import Tokenizer
from dist_fusion.schema import UserError
from dist_fusion.tasks import TASKS

CONTRAST = 12  # samples of a micro-step on all ranks
STEPS = 8  # 96 samples of 41: over two epochs' ends
PRETRAINING = {"mlm": TASKS["mlm"](probability=0.3), "itm": TASKS["itm"](block=3), "itc": TASKS["itc"]()}


@pytest.fixture(scope="module")
def stream_of(shards):
    tokenizer = Tokenizer(str(shards / "vocab.txt"), 16)

    def build(rank=0, ranks=1, *, micro_batch=None, start=0, endless=True, tasks=PRETRAINING, seed=5, **data):
        config = DataConfig(**{"shards": (str(shards),), "shuffle_buffer": 10, "pad_multiple": 1, **data})
        plan = Plan(micro_batch or CONTRAST // ranks, rank, ranks, seed)
        return Stream(config, tasks, tokenizer, 8, plan, start=start, endless=endless)

    return build


def contents(batch):
    """What a batch asks, in words that hold on any number of ranks: ids and tokens, no rows."""
    texts = [tuple(ids[mask].tolist()) for ids, mask in zip(batch.text_ids, batch.text_mask, strict=True)]
    images = [(name, round(pixels.sum().item(), 3)) for name, pixels in zip(batch.image_id, batch.images, strict=True)]
    images = [(name.item(), pixels) for name, pixels in images]
    mlm, itm, itc = (batch.targets[task] for task in ("mlm", "itm", "itc"))
    pairs = [(images[image], texts[text]) for image, text in batch.pairs.tolist()]
    return {
        "mlm": [(*pairs[p], at, label) for (p, at), label in zip(mlm.rows.tolist(), mlm.labels.tolist(), strict=True)],
        "itm": [
            (*pairs[p], label, weight)
            for (p,), label, weight in zip(itm.rows.tolist(), itm.labels.tolist(), itm.weight.tolist(), strict=True)
        ],
        "itc": [tuple(label) for label in itc.labels.tolist()],
        "caption ids": [batch.caption_id[text].item() for _, text in itc.rows.tolist()],
        "image ids": [batch.image_id[image].item() for image, _ in itc.rows.tolist()],
    }


def taken(stream, steps=STEPS, workers=0):
    return [contents(loaded.batch) for loaded in islice(load_batches(stream, workers), steps)]


def joined(parts):
    """Each step's contents over all ranks, one after the other."""
    return [{key: [row for part in step for row in part[key]] for key in step[0]} for step in zip(*parts, strict=True)]


@pytest.fixture(scope="module")
def alone(stream_of):
    return taken(stream_of())


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_global_batches_are_the_same_on_any_number_of_ranks_and_workers(stream_of, alone, ranks, workers):
    assert joined([taken(stream_of(rank, ranks), workers=workers) for rank in range(ranks)]) == alone


def test_the_order_depends_on_the_seed(stream_of, alone):
    assert taken(stream_of()) == alone
    assert taken(stream_of(seed=6)) != alone


@pytest.mark.parametrize("start", [1, 3, 4, 7])
def test_a_stream_started_later_is_the_rest_of_one_from_the_start(stream_of, alone, start):
    """The first epoch ends in micro-step 3, the second in 6."""
    assert taken(stream_of(start=start), STEPS - start) == alone[start:]
    assert joined([taken(stream_of(r, 2, start=start), STEPS - start, workers=2) for r in range(2)]) == alone[start:]


def pictures_of(shards):
    for record in read_records(find_shards([str(shards)])):
        yield record.images[0]


def names(batches):
    return [name for batch in batches for name in batch["image ids"]]


def test_each_sample_comes_once_an_epoch_and_epochs_differ(stream_of):
    order = names(taken(stream_of(tasks={**PRETRAINING, "itm": TASKS["itm"](block=1)}, micro_batch=1), 3 * 41))
    epochs = [order[:41], order[41:82], order[82:]]
    assert set(epochs[0]) == {content_id(f"image picture/{i}") for i in range(41)}
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.fixture
def few(tmp_path, shards):
    """Writes a folder of shards with some texts a sample."""

    def write(*texts):
        pictures = islice(pictures_of(shards), len(texts))
        samples = [
            (f"{i}", {"png": picture, "json": json.dumps({"texts": of}).encode()})
            for i, (picture, of) in enumerate(zip(pictures, texts, strict=True))
        ]
        write_shards(tmp_path / "few", samples, 9)
        return (str(tmp_path / "few"),)

    return write


def test_masks_and_texts_are_drawn_anew_in_every_epoch(stream_of, few, shards):
    tokenizer = Tokenizer(str(shards / "vocab.txt"), 16)
    texts = [f"a {colour} picture, plain and {colour}, number {i}" for i, colour in enumerate(("red", "green", "blue"))]
    epochs = taken(stream_of(shards=few(texts), micro_batch=1, tasks={**PRETRAINING, "itm": TASKS["itm"](block=1)}), 40)
    assert {epoch["caption ids"][0] for epoch in epochs} == {tokenizer(text).content for text in texts}
    for text in texts:
        masks = {tuple(e["mlm"]) for e in epochs if e["caption ids"] == [tokenizer(text).content]}
        assert len(masks) > 3


def test_a_caption_that_was_not_drawn_keeps_its_picture_from_being_a_negative(stream_of, few):
    shared = few(*(["a plain picture", f"number {i}"] for i in range(3)))
    rows = [row for batch in taken(stream_of(shards=shared), 8) for row in batch["itm"]]
    assert {weight for *_, label, weight in rows if label == 0} == {0.0}
    assert {weight for *_, label, weight in rows if label == 1} == {1.0}


@pytest.mark.parametrize(("limit", "count"), [(0, 61), (1, 41), (2, 61)])
def test_texts_per_image_limits_the_texts_of_a_visit(stream_of, limit, count):
    stream = stream_of(endless=False, micro_batch=41, texts_per_image=limit)
    assert len(names(taken(stream, None))) == count


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("micro_batch", "last"), [(4, (1, 0)), (20, (1, 0)), (3, (3, 2)), (41, (41, 0)), (50, (41, 0)), (21, (21, 20))]
)
def test_one_epoch_gives_every_rank_the_same_number_of_batches(stream_of, micro_batch, last, workers):
    ranks = [
        taken(stream_of(rank, 2, micro_batch=micro_batch, endless=False, texts_per_image=1), None, workers)
        for rank in range(2)
    ]
    assert len(ranks[0]) == len(ranks[1]) == -(-41 // (2 * micro_batch))
    assert tuple(len(rank[-1]["image ids"]) for rank in ranks) == last
    assert names(joined(ranks)) == [content_id(f"image picture/{i}") for i in range(41)]


def test_what_a_task_cannot_use_is_passed_over(stream_of, tmp_path, shards):
    picture = {"png": next(iter(pictures_of(shards)))}
    samples = [
        ("0", {**picture, "json": json.dumps({"texts": ["a red picture"]}).encode()}),
        ("1", {**picture, "json": json.dumps({"texts": []}).encode()}),
        ("2", {"json": json.dumps({"texts": ["no picture"]}).encode()}),
        ("3", {**picture, "json": json.dumps({"texts": ["a blue picture"]}).encode()}),
    ]
    write_shards(tmp_path, samples, 9)
    stream = stream_of(shards=(str(tmp_path),), endless=False, micro_batch=6, most_damaged=1)
    assert stream.num_samples == 2
    assert [(damage.key, damage.reason) for damage in stream.damages] == [("1", "empty caption"), ("2", "no image")]
    assert names(taken(stream, None)) == [content_id(f"image {tmp_path.name}/00000.tar/{i}") for i in (0, 3)]
    with pytest.raises(
        UserError, match=r"has no sample with what vqa needs \(texts, questions, statements, or a second image\)"
    ):
        stream_of(shards=(str(tmp_path),), tasks={"vqa": TASKS["vqa"]()}, most_damaged=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_decoded_is_skipped_and_told(stream_of, tmp_path, shards, workers):
    pictures = list(islice(pictures_of(shards), 6))
    pictures[2], pictures[4] = b"no picture", pictures[4][:100]
    samples = [
        (f"{i}", {"png": picture, "json": json.dumps({"texts": [f"number {i}"]}).encode()})
        for i, picture in enumerate(pictures)
    ]
    write_shards(tmp_path, samples, 9)
    stream = stream_of(shards=(str(tmp_path),), endless=False, micro_batch=6)
    (loaded,) = load_batches(stream, workers)
    assert loaded.batch.image_id.unique().numel() == 4
    assert set(names([contents(loaded.batch)])) == {
        content_id(f"image {tmp_path.name}/00000.tar/{i}") for i in (0, 1, 3, 5)
    }
    assert [damage.key for damage in loaded.damages] == ["2", "4"]
    for damage, error in zip(loaded.damages, ("UnidentifiedImageError", "OSError"), strict=True):
        assert damage.reason == "undecodable image" and error in damage.detail and "00000.tar" in damage.shard


def test_a_batch_of_broken_pictures_is_empty_but_whole(stream_of, tmp_path):
    write_shards(tmp_path, [(f"{i}", {"png": b"x", "txt": b"some text"}) for i in range(3)], 9)
    (loaded,) = load_batches(stream_of(shards=(str(tmp_path),), endless=False, micro_batch=3), 0)
    assert len(loaded.damages) == 3
    assert loaded.batch.images.shape == (0, 3, 8, 8) and loaded.batch.pairs.shape == (0, 2)
    assert set(loaded.batch.targets) == set(PRETRAINING)


@pytest.mark.parametrize("name", ["nowhere", "pipe:touch made.tar", "http://host/0.tar"])
def test_shards_that_cannot_be_are_told_before_the_first_step(stream_of, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data\.shards"):
        stream_of(shards=(name,))
    assert list(tmp_path.iterdir()) == []


def test_questions_and_pictures_travel_with_their_answers(stream_of, shards):
    vqa = TASKS["vqa"](answers=str(shards / "answers.json"), questions_per_image=2)
    (loaded,) = load_batches(stream_of(endless=False, micro_batch=50, tasks={"vqa": vqa}), 0)
    target, batch = loaded.batch.targets["vqa"], loaded.batch
    assert len(batch.images) == 41 and len(target.rows) == 82
    assert torch.equal(target.labels.sum(1), torch.ones(82)) and (target.kind == 0).any()
    colour = target.labels[:, :3].argmax(1)
    number = {content_id(f"image picture/{i}"): i for i in range(41)}
    images = batch.pairs[target.rows[:, 0], 0]
    for asked, image, answer in zip(target.kind.tolist(), images.tolist(), colour.tolist(), strict=True):
        if asked == 0:
            assert answer == number[batch.image_id[image].item()] % 3 == batch.images[image].mean((1, 2)).argmax()


def test_statements_of_pairs_and_of_single_images_each_go_to_their_task(stream_of, tmp_path, shards):
    left, right, alone = islice(pictures_of(shards), 3)
    said = [{"id": "0", "text": "a red picture", "label": "True"}, {"id": "1", "text": "it is blue", "label": "false"}]
    grouped = {"id": "0", "text": "a red picture", "label": "neutral", "group": "own"}
    samples = [
        ("0", {"left.png": left, "right.png": right, "json": json.dumps({"statements": said}).encode()}),
        ("1", {"png": alone, "json": json.dumps({"statements": [grouped]}).encode()}),
    ]
    write_shards(tmp_path, samples, 9)
    tasks = {name: TASKS[name]() for name in ("nlvr2", "snli_ve")}
    stream = stream_of(shards=(str(tmp_path),), tasks=tasks, endless=False)
    ((batch, *_),) = stream
    pairs, single = batch.targets["nlvr2"], batch.targets["snli_ve"]
    assert pairs.labels.tolist() == [1, 0] and single.labels.tolist() == [2]
    assert pairs.group.tolist() == [content_id(statement["text"]) for statement in said]
    assert single.group.tolist() == [content_id("own")]
    assert batch.image_slot.tolist() == [0, 1, 0] and len(batch.text_ids) == 2


def test_a_label_that_a_task_does_not_know_is_told_with_its_sample_before_anything_is_decoded(stream_of, tmp_path):
    statement = {"id": "0", "text": "a red picture", "label": "-"}
    write_shards(tmp_path, [("odd", {"png": b"x", "json": json.dumps({"statements": [statement]}).encode()})], 9)
    with pytest.raises(UserError, match=r"00000\.tar/odd: the label '-' is not in tasks\.snli_ve\.labels"):
        stream_of(shards=(str(tmp_path),), tasks={"snli_ve": TASKS["snli_ve"]()})


HASHED = """
import sys
from hashlib import sha256
from itertools import islice
from random import Random
from dist_fusion.data.stream import DataConfig, Plan, Stream
from dist_fusion.data.text import Tokenizer
from dist_fusion.tasks import TASKS

folder = sys.argv[1]
tasks = {"mlm": TASKS["mlm"](probability=0.3), "itm": TASKS["itm"](block=3), "itc": TASKS["itc"]()}
config = DataConfig(shards=(folder,), shuffle_buffer=10, texts_per_image=1)
stream = Stream(config, tasks, Tokenizer(f"{folder}/vocab.txt", 16), 8, Plan(6, 0, 1, 5))
print(sha256(repr([one.batch for one in islice(stream, 6)]).encode()).hexdigest())
"""


def test_batches_do_not_depend_on_how_python_hashes_strings(shards):
    told = {
        subprocess.run(
            [sys.executable, "-c", HASHED, str(shards)], env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(told) == 1


@pytest.fixture(scope="module")
def damaged(shards, tmp_path_factory):
    """The shared shards with every ninth picture undecodable."""
    folder = tmp_path_factory.mktemp("damaged")
    samples = []
    for number, record in enumerate(read_records(find_shards([str(shards)]))):
        picture = b"no picture" if number % 9 == 4 else record.images[0]
        tree = json.dumps({"texts": record.texts, "image_id": record.image_ids[0]}).encode()
        samples.append((f"{number:03d}", {"png": picture, "json": tree}))
    write_shards(folder, samples, 14)
    return (str(folder),)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_whatever_is_broken_ranks_stay_in_step_and_agree(stream_of, damaged, ranks):
    alone = taken(stream_of(shards=damaged))
    assert joined([taken(stream_of(r, ranks, shards=damaged), workers=r % 2) for r in range(ranks)]) == alone
    broken = {content_id(f"image picture/{n}") for n in range(41) if n % 9 == 4}
    assert not broken & set(names(alone))
    assert {len(set(batch["image ids"])) for batch in alone} <= set(range(8, CONTRAST + 1))


def test_what_could_not_be_read_is_listed_wherever_it_was_met(stream_of, damaged):
    loaded = [*islice(load_batches(stream_of(shards=damaged), 0), 20)]
    met = {damage.key for one in loaded for damage in one.damages}
    assert met == {f"{n:03d}" for n in range(41) if n % 9 == 4}
    assert {sum(one.sources.values()) for one in loaded} == {CONTRAST}  # every place was filled


def test_too_much_damage_is_fatal_before_the_first_step_with_its_counts(stream_of, tmp_path, shards):
    picture = next(iter(pictures_of(shards)))
    write_shards(
        tmp_path,
        [(f"{n}", {"png": picture, "json": json.dumps({"texts": ["x"] if n else []}).encode()}) for n in range(20)], 50,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"1 of 20 samples .* more than data.most_damaged \(1.00%\): 1 empty"):
        stream_of(shards=(str(tmp_path),))
    assert stream_of(shards=(str(tmp_path),), most_damaged=0.05).num_samples == 19
    (tmp_path / "1.tar").touch()
    with pytest.raises(UserError, match=r"1 of 2 shards are unusable.*1 empty shard"):
        stream_of(shards=(str(tmp_path),), most_damaged=0.05)


def test_sources_are_visited_by_their_weights_with_their_own_number_of_texts(stream_of, few, shards):
    other = few(*(["a plain picture", f"number {i}"] for i in range(4)))
    sources = {
        "all": SourceConfig((str(shards),), texts_per_image=1),
        "few": SourceConfig(other, weight=2.0, texts_per_image=0),
    }
    stream = stream_of(shards=(), sources=sources, micro_batch=7, tasks={"itc": TASKS["itc"]()})
    assert stream.num_samples == 41 + 2 * 4
    loaded = [*islice(load_batches(stream, 0), 7)]
    seen = {name: sum(one.sources[name] for one in loaded) for name in sources}
    assert seen == {"all": 41, "few": 8}
    assert sum(len(one.batch.targets["itc"].rows) for one in loaded) == 41 + 2 * 8


@pytest.mark.parametrize(
    ("weight", "task", "message"),
    [(0.1, "itc", "data.sources.few: with a weight of 0.1"), (1.0, "vqa", "data.sources.few has no sample with what")],
)
def test_a_source_that_would_never_be_seen_is_a_mistake(stream_of, few, shards, weight, task, message):
    sources = {"all": SourceConfig((str(shards),)), "few": SourceConfig(few(["one", "number 1"]), weight=weight)}
    tasks = {task: TASKS[task]()}
    with pytest.raises(UserError, match=message):
        stream_of(shards=(), sources=sources, micro_batch=7, tasks=tasks)
    assert stream_of(shards=(), sources=sources, micro_batch=7, tasks=tasks, endless=False).num_samples


def test_pictures_are_augmented_in_training_alone_and_by_their_place(stream_of):
    def pictures(stream):
        return torch.cat([one.batch.images for one in islice(load_batches(stream, 0), 2)])

    plain, seen = pictures(stream_of()), pictures(stream_of(augment="randaugment"))
    assert not torch.equal(plain, seen)
    assert torch.equal(seen, pictures(stream_of(augment="randaugment")))
    halves = [[*islice(stream_of(r, 2, augment="randaugment"), 2)] for r in range(2)]
    assert torch.equal(seen, torch.cat([halves[r][step].batch.images for step in range(2) for r in range(2)]))
    scored = pictures(stream_of(endless=False, augment="randaugment"))
    assert torch.equal(scored, pictures(stream_of(endless=False)))


def test_mutated_shards_stream_to_their_end_and_lose_nothing_unlisted(stream_of, tmp_path, shards):
    """Bytes of a real shard changed at random: every sample is batched, or told with its shard or key."""
    samples = [
        (f"{n}", {"png": record.images[0], "json": json.dumps({"texts": record.texts}).encode()})
        for n, record in enumerate(islice(read_records(find_shards([str(shards)])), 5))
    ]
    write_shards(tmp_path, samples, 9)
    (shard,) = tmp_path.glob("*.tar")
    whole, draw = shard.read_bytes(), Random(0)
    used = len(whole.rstrip(b"\0"))
    for number in range(int(os.environ.get("DIST_FUSION_MUTATIONS", 60))):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 2, 30))):
            place = draw.randrange(used)
            length = min(draw.choice((1, 4, 700)), used - place)
            data[place : place + length] = draw.randbytes(length)
        shard.write_bytes(data)
        os.utime(shard, ns=(number, number))
        try:
            stream = stream_of(shards=(str(tmp_path),), endless=False, micro_batch=6, most_damaged=1)
        except UserError as error:
            if "has no sample" not in str(error):
                raise
            continue
        loaded = [*load_batches(stream, 0)]
        batched = sum(one.sources[""] for one in loaded)
        met = sum(len(one.damages) for one in loaded)
        assert batched + met == stream.num_samples
        assert stream.num_samples == 5 or stream.damages


def test_damage_is_a_share_of_all_samples_and_not_of_those_a_task_can_use(stream_of, tmp_path, shards):
    picture = next(iter(pictures_of(shards)))
    question = {"id": "0", "question": "is it red?", "answers": {"yes": 1.0}}
    trees = [{"questions": [question]}, {}, *({"texts": ["a picture"]} for _ in range(118))]
    write_shards(
        tmp_path, [(f"{n}", {"png": picture, "json": json.dumps(t).encode()}) for n, t in enumerate(trees)], 200
    )
    vqa = TASKS["vqa"](answers=str(shards / "answers.json"))
    assert stream_of(shards=(str(tmp_path),), tasks={"vqa": vqa}).num_samples == 1
