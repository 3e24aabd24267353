"""Strings to tokens: lower-casing WordPiece, as BERT and ViLT use it. Student and teacher share one tokenizer."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer

from dist_fusion.batch import Text
from dist_fusion.schema import UserError
from dist_fusion.types import Vocabulary

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
REMEMBERED = 2**14
"""Texts whose tokens are kept: questions repeat a lot."""
SHIPPED = Path(__file__).parent / "vocabularies"


class Tokenizer:
    """[CLS] tokens [SEP], cut at `max_length` with [SEP] kept."""

    def __init__(self, vocabulary: str, max_length: int):
        entries = _read(vocabulary)
        ids = {entry: i for i, entry in enumerate(entries)}
        self.vocabulary = Vocabulary(len(entries), *(ids[name] for name in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")))
        fast = FastTokenizer(WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
        fast.normalizer, fast.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
        fast.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[(name, ids[name]) for name in ("[CLS]", "[SEP]")]
        )
        fast.enable_truncation(max_length)
        self._fast = fast
        self.entries, self.max_length = entries, max_length
        self._remembered = lru_cache(maxsize=REMEMBERED)(self._encode)

    def __call__(self, string: str) -> Text:
        """The tokens of `string`."""
        return self._remembered(string)

    def _encode(self, string: str) -> Text:
        encoding = self._fast.encode(string)
        return Text(tuple(encoding.ids), tuple(encoding.word_ids))


def train_vocabulary(texts: Iterable[str], size: int, path: Path) -> None:
    """Learn a WordPiece vocabulary from `texts` and write it, one entry a line.

    It has at most `size` entries, more only where the letters and the special entries alone are more.
    """
    fast = FastTokenizer(WordPiece(unk_token="[UNK]"))
    fast.normalizer, fast.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    texts = list(texts)
    split = (fast.pre_tokenizer.pre_tokenize_str(fast.normalizer.normalize_str(text)) for text in texts)
    # The trainer numbers the letters inside words in the random order of a hash map, and breaks ties by those numbers.
    letters = sorted({f"##{letter}" for words in split for word, _ in words for letter in word[1:]})
    fast.train_from_iterator(
        texts, WordPieceTrainer(vocab_size=size, special_tokens=[*SPECIALS, *letters], show_progress=False)
    )
    entries = sorted(fast.get_vocab(), key=fast.get_vocab().__getitem__)
    path.write_text("".join(f"{entry}\n" for entry in entries))


def _read(vocabulary: str) -> Sequence[str]:
    shipped = SHIPPED / f"{vocabulary}.txt"
    path = shipped if shipped.is_file() else Path(vocabulary)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.txt")))
        raise UserError(
            f"data.vocabulary is {vocabulary!r}: no such file; it can be a WordPiece vocab.txt or one of: {names}"
        )
    entries = path.read_text(encoding="utf-8").splitlines()
    missing = [name for name in SPECIALS if name not in entries]
    if missing:
        raise UserError(
            f"data.vocabulary {path} has no {', '.join(missing)}; it must be a WordPiece vocab.txt, one entry a line"
        )
    return entries
