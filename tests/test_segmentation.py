"""The segmenter, vocabularies and the SentencePiece table."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

import harness as h
import references as ref
import retokenize_scylla as R
from records.vocabulary import vocabulary_yaml


def test_fields_of_the_page():
    rng = random.Random(9)
    for _ in range(3000):
        token = ref.drawn(rng, ref.ATOMS, 5)
        for cut in range(1, len(token)):
            assert R.cut_priority(token, cut) == ref.Segmenter.priority(token, cut), (token, cut)
    assert [R.cut_priority(b"._ .", cut) for cut in (1, 2, 3)] == [9, 9, 7]
    assert R.cut_priority(b". .", 1) == 8 and R.cut_priority(b". a", 1) == 10
    letters = [b"\xc3\xa9", b"\xc3\xa9a", b"\xc3\xa9b"]
    others = [b"\xc3", b"\xc3 ", b"\xc3."]
    for keys, kind in ((letters + others, 0), (letters + others[:2], R.LETTER_CLASS),
                       (letters[:2] + others, R.OTHER_CLASS), (letters[:2], 0)):
        assert R.byte_classes(dict.fromkeys(keys, 0))[0xC3] == kind


ALIKE = {  # name: (tokens beside the bytes, text, what it is cut into)
    "neither of the longest two":
        ("12345 1234 123 12 2345678", "12345678", "12345 6 7 8"),  # 1 2345678 would score more
    "the second of the longest two": ("12345 1234 123 12 4567", "1234567", "123 4567"),
    "the longest, beside a better one": ("a1234 a123 a12 456", "a123456", "a123 456"),
    "the longer of two better ones":
        ("1.2345 1.2 1. 2345678 .2345678", "1.2345678", "1. 2345678"),  # both score the same
    "the shorter of two better ones":
        ("1.2345 1.2 1. 2345678 .23456789", "1.23456789", "1 .23456789"),
    "the token itself": ("12345 1234 456", "123456", "12345 6"),  # 1234 would be cut like 12345
    "the longest": ("12345 1234 567", "1234567", "1234 567"),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
def test_alternatives_that_are_cut_alike(name):
    """Of prefixes with equal priority the longest two are kept, the longer one first."""
    tokens, text, wanted = (part.encode() for part in ALIKE[name])
    entries = [bytes([k]) for k in range(256)] + tokens.split()
    segmenter = R.Segmenter(R.load_vocabulary(vocabulary_yaml(entries)))
    assert [entries[k] for k in segmenter.encode(text)] == wanted.split()
    assert segmenter.encode(text) == ref.Segmenter(entries).encode(text)


@h.needs_shared
def test_published_vocabulary_and_its_byte_table():
    vocabulary = R.load_vocabulary(h.SHARED / "data" / "scylla.yaml")
    assert (vocabulary.vocab_size, vocabulary.bos_id, vocabulary.lossy) == (1254, 1253, "")
    published = np.load(h.SHARED / "data" / "scylla.meta.npz")
    np.testing.assert_array_equal(vocabulary.base_bytes, published["base_bytes"])
    classes = R.byte_classes({token: k for k, token in enumerate(vocabulary.tokens) if token})
    of_class = [bytes(np.flatnonzero(classes == kind).tolist()) for kind in (1, 2, 3)]
    assert of_class == [b"CDWabcdefgiklmnopqrstuvwy", b"\n),-.:\\_{\xe2", b" "]


def test_yaml_scalars_duplicates_and_hex():
    lines = ["charset: none", "capcode: 0", "normalization: 'none'", "training-param: 3", "tokens:"]
    scalars = ['"\\x41\\n\\"\\\\\\u00e9"', "'it''s'", "plain", '"TokenMonsterHexEncode{ff00}"',
               '""', f'"{"x" * 41}"', "plain"]
    scalars += [f'"TokenMonsterHexEncode{{{value:02x}}}"' for value in range(256)]
    for k, scalar in enumerate(scalars):
        lines += [f"    - token:   {scalar}", f"      id:      {k}", "      score:   0.1"]
    vocabulary = R.load_vocabulary("\n".join(lines).encode(), "scalars.yaml")
    assert vocabulary.tokens[:7] == (b'A\n"\\\xc3\xa9', b"it's", b"", b"\xff\0", b"", b"", b"plain")
    assert (vocabulary.vocab_size, vocabulary.lossy) == (264, "")
    awkward = [b'a"\\b', b"TokenMonsterHexEncode{41}", b"'", b" # x: y", b"\x85\xe2\x80\xa8", b"\n"]
    again = R.load_vocabulary(vocabulary_yaml(awkward))
    assert again.tokens == (*awkward, b"") and "no token for" in again.lossy


@pytest.mark.parametrize(("data", "message"), [
    (b"\xff\xfe\x00 nothing", "neither a TokenMonster YAML"),
    (b"tokens:\n    - token: \"a\n      id: 0\n", "line 4, column 1"),
    (b"tokens:\n    - token: \"\\q\"\n      id: 0\n", "unknown escape character in"),
    (b"tokens:\n    - token: a\n      id: 1\n", "ids must be 0..0"),
    (b"tokens:\n    - token: a\n", "needs a token and a numeric id"),
    (b"{\"model\": 1}\n", "no list of tokens"),
    (b"charset: none\n", "no list of tokens"),
    (b"tokens: []\n", "0 tokens"),
    (b"tokens: [x]\n", "the entry x needs a token"),
    (b"[" * 100000, "nesting"),
    (b"\x02\x07" + bytes(30), "charset 7"),
])
def test_unknown_vocabulary_is_refused_by_name(tmp_path, data, message):
    path = tmp_path / "strange.yaml"
    path.write_bytes(data)
    with pytest.raises(R.InputError, match="strange.yaml.*unknown vocabulary") as error:
        R.load_vocabulary(path)
    assert message in str(error.value)


def check_table(model: R.SentencePieceModel, documents: list[list[int]]) -> None:
    ids = R.Documents.after_bos([k for document in documents for k in document], model.bos_id)
    for text, document in zip(model.decode(ids).split(), documents, strict=True):
        assert text.tobytes().decode() == model.processor.decode(document)


def test_table_equals_sp_decode_on_random_ids(tmp_path):
    (tmp_path / "sp.model").write_bytes(h.sentencepiece_model())
    model = R.SentencePieceModel(tmp_path / "sp.model")
    rng = np.random.default_rng(1)
    space = model.processor.piece_to_id(R.SPACE_MARK)
    special = [0, 2, 3, space, space, 299, *(4 + k for k in (0xE2, 0x80, 0x99, 0xF0, 0xC0, 0, 65))]
    documents = [[1, *rng.choice(special, rng.integers(0, 9)).tolist()] for _ in range(3000)]
    documents += [[1, *(k for k in rng.integers(0, 300, 12).tolist() if k != 1)]
                  for _ in range(1000)]
    check_table(model, documents)
    text = next(ids for ids in documents if len(ids) > 3 and min(ids[1:]) > 260)
    model.processor = None  # the table is not all fall-back
    model.decode(R.Documents.after_bos(text, 1))


def test_a_character_cut_by_documents_is_none(tmp_path):
    """A document that ends within a character, before one that begins with the rest of it."""
    (tmp_path / "sp.model").write_bytes(h.sentencepiece_model())
    model = R.SentencePieceModel(tmp_path / "sp.model")
    check_table(model, [[1, 290, 4 + 0xE2, 4 + 0x80], [1, 4 + 0x99, 290], [1]])


@pytest.mark.parametrize("options", [{"remove_extra_whitespaces": False},
                                     {"add_dummy_prefix": False}])
def test_table_follows_the_normalizer_of_the_model(tmp_path, options):
    import sentencepiece
    with open(tmp_path / "other.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(h.texts(100)), model_writer=file, vocab_size=300, pad_id=0,
            model_type="bpe", byte_fallback=True, bos_id=1, eos_id=2, unk_id=3, minloglevel=2,
            **options)
    model = R.SentencePieceModel(tmp_path / "other.model")
    space = model.processor.piece_to_id(R.SPACE_MARK)
    rng = np.random.default_rng(2)
    check_table(model, [[1, *rng.choice([space, 0, 299, 298, 290, 69], 5).tolist()]
                        for _ in range(300)])


@h.needs_shared
def test_table_equals_sp_decode_on_every_real_document():
    model = R.SentencePieceModel(h.SHARED / "data" / "fineweb_1024_bpe.model")
    lines = (h.SHARED / "data" / "fineweb_docs.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    documents = [[1, *ids] for ids in model.processor.encode(texts)]
    assert len(documents) == 120
    check_table(model, documents)
    model.processor = None  # real documents need no fall-back
    model.decode(R.Documents.after_bos(np.concatenate(documents), model.bos_id))


@h.needs_shared
def test_the_published_lossy_vocabulary_is_recognised():
    vocabulary = R.load_vocabulary(h.SHARED / "data" / "candidate.vocab")
    assert "998 tokens with capcode 2, charset UTF-8, normalization NFD" in vocabulary.lossy
    with pytest.raises(R.InputError, match="refused"):
        R.Segmenter(vocabulary)


def test_lossy_yaml_is_refused_with_its_reasons():
    """Each thing that loses bytes is named."""
    data = vocabulary_yaml([bytes([k]) for k in range(200)])
    for right, wrong in ((b"capcode: 0", b"capcode: 2"), (b"charset: none", b"charset: utf-8"),
                         (b'normalization: "none"', b'normalization: "nfd"')):
        assert right in data
        data = data.replace(right, wrong)
    vocabulary = R.load_vocabulary(data, "half.yaml")
    plain = vocabulary_yaml([bytes([k]) for k in range(256)])
    for line, reason in ((b"unk: true\n", "unk"), (b"special: [x]\n", "special"),
                         (b"deleted: [x]\n", "deleted"), (b"unk: false\nspecial: []\n", "")):
        assert R.load_vocabulary(plain + line).lossy == f"{reason} entries" * bool(reason)
    for reason in ("capcode 2", "charset utf-8", "normalization nfd", "no token for 56 of the 256"):
        assert reason in vocabulary.lossy
    with pytest.raises(R.InputError, match="half.yaml: refused"):
        R.Segmenter(vocabulary)
