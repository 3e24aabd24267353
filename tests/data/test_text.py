import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizerFast

from dist_fusion.batch import content_id
from dist_fusion.data.text import SHIPPED, SPECIALS, Tokenizer, train_vocabulary
from dist_fusion.schema import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer("bert-base-uncased", 40)


@pytest.fixture(scope="module")
def bert():
    return BertTokenizerFast(vocab=str(SHIPPED / "bert-base-uncased.txt"), do_lower_case=True)


def test_the_shipped_vocabulary_is_that_of_bert(tokenizer):
    assert tokenizer.vocabulary == (30522, 0, 101, 102, 103)
    ids = tokenizer("a teal rectangle").ids
    assert (ids[0], ids[1], ids[-1]) == (101, 1037, 102)
    words = "".join(tokenizer.entries[i].removeprefix("##") for i in ids[1:-1])
    assert words == "atealrectangle"


@pytest.mark.parametrize(
    "string",
    [
        "a teal rectangle",
        "Ünïcödé Café naïve résumé",
        "什么颜色 is the 矩形?",
        "don't stop—'til you're \"there\"... (no?) $5.00 #tag @you",
        "  tabs\tand\nnewlines\r\n  ",
        "\u200bzero\u200dwidth\u0000null\ufffd",
        "İstanbul ǅ ﬁ ß Σς",
        "👩‍👩‍👧 emoji",
        "x" * 150,
        "",
    ],
)
def test_odd_strings_get_the_ids_of_berts_own_tokenizer(tokenizer, bert, string):
    assert list(tokenizer(string).ids) == bert(string, truncation=True, max_length=40)["input_ids"]


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_string_gets_the_ids_of_berts_own_tokenizer(tokenizer, bert, string):
    if any(special in string for special in SPECIALS):
        return  # Bert's own takes these as commands
    assert list(tokenizer(string).ids) == bert(string, truncation=True, max_length=40)["input_ids"]


@settings(max_examples=60, deadline=None)
@given(st.text(), st.integers(3, 12))
def test_a_text_is_cut_with_sep_kept_at_the_end(string, length):
    short, long = Tokenizer("bert-base-uncased", length)(string), Tokenizer("bert-base-uncased", 1000)(string)
    assert len(short.ids) == len(short.words) == min(length, len(long.ids))
    assert short.ids == (*long.ids[: len(short.ids) - 1], 102)
    assert short.words[0] is short.words[-1] is None
    assert None not in short.words[1:-1]
    assert (short.content == long.content) == (short.ids == long.ids)


def test_a_special_written_in_a_text_is_no_special(tokenizer):
    assert 103 not in tokenizer("a [MASK] rectangle").ids


def test_the_pieces_of_a_word_share_its_number(tokenizer):
    text = tokenizer("antidisestablishmentarianism wins")
    pieces = [word for word in text.words if word is not None]
    assert pieces == sorted(pieces) and pieces.count(0) > 2 and pieces.count(1) == 1
    assert set(pieces) == {0, 1}


@pytest.mark.parametrize("string", ["A Teal Rectangle", " a teal rectangle\n", "a téal rectangle"])
def test_texts_that_the_model_cannot_tell_apart_have_equal_content_ids(tokenizer, string):
    plain = tokenizer("a teal rectangle")
    assert tokenizer(string).ids == plain.ids
    assert tokenizer(string).content == plain.content
    assert tokenizer("a teal triangle").content != plain.content


@settings(max_examples=100, deadline=None)
@given(st.text(), st.text())
def test_a_content_id_fits_a_tensor_and_tells_strings_apart(one, other):
    assert 0 <= content_id(one) < 2**63
    assert (content_id(one) == content_id(other)) == (one == other)


def test_content_ids_never_change():
    """They are compared between runs and machines."""
    assert content_id("a teal rectangle") == 1125605234373586006


def test_a_missing_vocabulary_is_told():
    with pytest.raises(UserError) as error:
        Tokenizer("bert-base-cased", 40)
    assert "data.vocabulary is 'bert-base-cased': no such file" in str(error.value)
    assert "one of: bert-base-uncased" in str(error.value)


def test_a_file_that_is_no_vocabulary_is_told(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\nhello\n")
    with pytest.raises(UserError, match=r"has no \[CLS\], \[SEP\], \[MASK\]; it must be a WordPiece vocab.txt"):
        Tokenizer(str(tmp_path / "vocab.txt"), 40)


def test_a_trained_vocabulary_knows_the_texts_it_was_trained_on(tmp_path):
    texts = ["is there a teal rectangle?", "no, a black circle", "what shape is it?"]
    train_vocabulary(texts, 200, tmp_path / "vocab.txt")
    tokenizer = Tokenizer(str(tmp_path / "vocab.txt"), 40)
    assert tokenizer.entries[:5] == list(SPECIALS)
    assert len(set(tokenizer.entries)) == tokenizer.vocabulary.size <= 200
    unknown = tokenizer.entries.index("[UNK]")
    assert not any(unknown in tokenizer(text).ids for text in texts)
    assert unknown in tokenizer("Ж").ids


def test_training_a_vocabulary_twice_gives_the_same_file(tmp_path):
    texts = [f"text number {i} of many, is it {i % 7}?" for i in range(200)]
    for name in ("one", "two"):
        train_vocabulary(texts, 100, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
