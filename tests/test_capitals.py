"""Capitals as marks: the transform, vocabularies that have it, and their bytes."""

from __future__ import annotations

import itertools
import json
import random
import string

import pytest

import harness as h
import references as ref
import retokenize_scylla as R
from records import vocabulary as V

EXAMPLES = {  # text: its form, with > for 0xFF and ^ for 0xFE
    "": "", "a": "a", "A": ">a", "AB": "^ab", "Ab": ">ab", "aB": "a>b", "aBC": "a^bc",
    "ABc": ">a>bc", "ABcDE": ">a>bc^de", "aBcD": "a>bc>d", " A": "> a", " AB": "^ ab",
    "  The": " > the", " a B": " a> b", "\nThe": "\n>the", "\u00a0I": "\u00a0>i",
    "A NASA pArt": ">a^ nasa p>art", "DON'T": "^don'>t", "I'M": ">i'>m", "X2Y": ">x2>y",
    "AB2CD": "^ab2^cd", "\u00c9COLE": "\u00c9^cole", "AB\u00e9": "^ab\u00e9", "A.B. C": ">a.>b.> c",
    " \u00c9A": " \u00c9>a", "MW ": "^mw ", "@ Z[ `": "@> z[ `", "AZaz": ">a>zaz",
    "ABCDEFGh": ">a>b>c>d>e>f>gh",
}


def marked(documents: list[bytes]) -> list[bytes]:
    """The forms of documents, which must be those of the reference and have them as inverse."""
    text = R.Documents.joined(documents)
    form = R.mark_capitals(text)
    again = R.restore_capitals(form)
    assert again.values.tobytes() == text.values.tobytes()
    assert again.starts.tolist() == text.starts.tolist()
    forms = [part.tobytes() for part in form.split()]
    for document, made in zip(documents, forms, strict=True):
        assert made == ref.marked(document) and ref.restored(made) == document
    return forms


def test_examples():
    forms = marked([text.encode() for text in EXAMPLES])
    assert [marked([text.encode()])[0] for text in EXAMPLES] == forms  # alone, too
    wanted = [form.encode().translate(bytes.maketrans(b">^", R.MARKS))
              for form in EXAMPLES.values()]
    assert forms == wanted


def test_every_short_text_and_every_pair_of_letters():
    """Texts one after another in one block: no document sees its neighbours."""
    short = ["".join(chars) for size in range(7)
             for chars in itertools.product("AbC -", repeat=size)]
    beside = [("", ""), (" ", "'"), ("\u00e9", "1"), ("7", " "), ("'", "\u00c9")]
    letters = map("".join, itertools.product(string.ascii_letters, repeat=2))
    pairs = [before + pair + after for pair in letters for before, after in beside]
    forms = marked([text.encode() for text in short + pairs])
    assert len(set(forms)) == len({*short, *pairs})


@pytest.mark.parametrize("seed", range(4))
def test_random_text(seed):
    rng, documents = random.Random(seed), []
    planes = [(32, 127), (32, 127), (65, 91), (97, 123), (32, 33), (0, 256), (0, 0xD800),
              (0xE000, 0x110000)]
    for _ in range(400):
        ranges = rng.choices(planes, k=rng.randint(1, 3))
        documents.append("".join(chr(rng.randrange(*rng.choice(ranges)))
                                 for _ in range(rng.randrange(60))).encode())
    marked(documents)


def test_whatever_is_restored_has_the_bytes_without_its_marks():
    """Of ids in any order, forms of no text too: so the byte table holds for a model's samples."""
    rng = random.Random(3)
    pieces = [b"\xff", b"\xfe", b" ", b"a", b"ab", b"-", b"\xc3", b"9"]
    documents = [ref.drawn(rng, pieces, 9) for _ in range(5000)]
    restored = R.restore_capitals(R.Documents.joined(documents))
    for document, text in zip(documents, restored.split(), strict=True):
        assert text.tobytes().lower() == document.translate(None, R.MARKS)
    assert R.restore_capitals(R.Documents.joined([b"\xfe", b"\xff a\xfe-b\xfe", b"a\xff  a"])
                              ).values.tobytes() == b" A-ba  A"


@pytest.mark.parametrize("mark", R.MARKS)
def test_text_with_a_mark_is_refused_by_name(mark):
    documents = [b"ab", b"", b"\xc3A" + bytes([mark]), b"c"]
    with pytest.raises(R.InputError, match=f"document 2 of a block has the byte 0x{mark:X} at 2, "):
        R.mark_capitals(R.Documents.joined(documents))
    segmenter = R.Segmenter(R.load_vocabulary(h.vocabulary(case="ascii")))
    with pytest.raises(R.InputError, match="document 0 of a block has the byte.* do without case"):
        segmenter.encode_documents(R.Documents.joined([bytes([mark])]))


def test_what_a_vocabulary_with_case_must_hold():
    """No token for a capital; the bytes are counted without marks; other cases are refused."""
    vocabulary = R.load_vocabulary(h.vocabulary([b"\xff\xfe a\xff", b"A\xff"], "ascii"))
    assert (vocabulary.marked, vocabulary.lossy, vocabulary.vocab_size) == (True, "", 237)
    bytes_of = dict(zip(vocabulary.tokens, vocabulary.base_bytes.tolist(), strict=True))
    assert [bytes_of[token] for token in (
        b"\xff", b"\xfe", b"\xff\xfe a\xff", b"A\xff", b"d\xff t", b"\xfd", b"a", b"")] == [
        0, 0, 2, 1, 3, 1, 1, 0]
    tokens = [byte for byte in V.BYTES if byte not in b"AQ\xff"]
    for case, missing in (("none", "3 of the 256"), ("ascii", "1 of the 230"),
                          ("ASCII", "1 of the 230")):
        vocabulary = R.load_vocabulary(V.vocabulary_yaml(tokens, case))
        assert vocabulary.lossy == f"no token for {missing} byte values"
    for wrong in ("upper", "", "null", "[ascii]"):
        with pytest.raises(R.InputError, match="case .* is not none or ascii; build"):
            R.load_vocabulary(b"case: %s\n" % wrong.encode() + h.vocabulary())
    plain = R.load_vocabulary(h.vocabulary([b"\xff\xfe"]))
    assert not plain.marked and plain.base_bytes[256] == 2


TEXTS = [text.encode() for text in (
    "The cat sat. NASA and the UN said: The cat's hat, THE HAT! It isn't McDonald's.",
    " A dog ran. The UN and NASA heard The dog: IT BARKED. Caf\u00e9 \u00c9toile, I said.")] * 20


def build(size: int, **options) -> R.Vocabulary:
    """A vocabulary built from TEXTS."""
    return R.load_vocabulary(V.build_vocab(TEXTS, size, 1, **options))


def test_built_vocabularies_with_case():
    plain, free, apart = build(290), build(290, case="ascii"), build(
        290, case="ascii", apart=True)
    tokens = {name: len(R.Segmenter(vocabulary).segment(R.Documents.joined(TEXTS)).values)
              for name, vocabulary in (("plain", plain), ("free", free), ("apart", apart))}
    assert tokens["free"] < tokens["apart"] and tokens["free"] < tokens["plain"]
    for vocabulary in (free, apart):
        assert (vocabulary.marked, vocabulary.lossy, vocabulary.vocab_size) == (True, "", 290)
        assert vocabulary.tokens[:230] == V.FIRST["ascii"] and len(set(vocabulary.tokens)) == 290
        assert not any(token != token.lower() for token in vocabulary.tokens)
    with_marks = [sum(len(token) > 1 and token != token.translate(None, R.MARKS)
                      for token in vocabulary.tokens) for vocabulary in (free, apart)]
    assert with_marks[0] > 0 == with_marks[1]


def test_a_draft_counts_the_bytes_of_the_source():
    """Marks do not count in what is told, and only the single bytes are safe from pruning."""
    lines: list[str] = []
    built = R.Segmenter(R.load_vocabulary(V.build_vocab(TEXTS, 290, 1, lines.append, "ascii")))
    size = sum(map(len, TEXTS))
    tokens = built.segment(R.Documents.joined(TEXTS)).values.size - len(TEXTS)
    assert lines == [f"vocabulary round 1/1: {size} bytes, {size / tokens:.4f} bytes per token"]
    draft = V.Draft(TEXTS, "ascii")
    draft.grow(240, 1)
    assert len(draft.tokens) == 240
    draft.prune(230, 1)
    assert draft.tokens == V.FIRST["ascii"]
    with pytest.raises(R.InputError, match="the 6 bytes of text repeat too little"):
        V.build_vocab([b"", b"ABC", b"ABC"], 300, case="ascii")


def test_command_line_builds_with_case(tmp_path, capsys):
    source, output = tmp_path / "docs.jsonl", tmp_path / "vocab.yaml"
    h.write_documents(source, [text.decode() for text in TEXTS])
    command = ["--build-vocab", "260", "--docs", str(source), "--output", str(output),
               "--build-rounds", "1"]
    for more, marks in ((["--case", "ascii"], "free"),
                        (["--case", "ascii", "--case-marks", "apart"], "apart")):
        assert R.main([*command, *more]) == 0
        assert output.read_bytes() == V.build_vocab(TEXTS, 260, 1, None, "ascii", marks == "apart")
        assert output.read_bytes().count(b"\ncase: ascii\n") == 1
    assert R.main([*command]) == 0 and b"case" not in output.read_bytes()
    assert R.main(["--build-vocab", "230", "--case", "ascii", *command[2:]]) == 1
    assert "the size must be 231" in capsys.readouterr().err
    for marks in ("free", "apart"):
        with pytest.raises(SystemExit):
            R.main([*command, "--case-marks", marks])
        assert f"--case-marks {marks} needs --case ascii" in capsys.readouterr().err


@h.needs_shared
def test_real_documents():
    lines = (h.SHARED / "data" / "fineweb_docs.jsonl").read_text().splitlines()
    documents = [json.loads(line)["text"].encode() for line in lines]
    forms = marked(documents)
    assert 1.02 < sum(map(len, forms)) / sum(map(len, documents)) < 1.05
