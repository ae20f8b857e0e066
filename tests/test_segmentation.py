"""The segmenter, vocabularies, the SentencePiece table and the vocabulary builder."""

from __future__ import annotations

import json
import lzma
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import harness as h
import references as ref
import retokenize_scylla as R


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
    segmenter = R.Segmenter(R.load_vocabulary(R.vocabulary_yaml(entries)))
    assert [entries[k] for k in segmenter.encode(text)] == wanted.split()
    assert segmenter.encode(text) == ref.Segmenter(entries).encode(text)


@h.needs_shared
def test_published_vocabulary_and_its_byte_table():
    vocabulary = R.load_vocabulary(h.SHARED / "data" / "scylla.yaml")
    assert (vocabulary.vocab_size, vocabulary.bos_id, vocabulary.lossy) == (1254, 1253, "")
    published = np.load(h.SHARED / "data" / "scylla.meta.npz")
    np.testing.assert_array_equal(vocabulary.base_bytes(), published["base_bytes"])
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
    again = R.load_vocabulary(R.vocabulary_yaml(awkward))
    assert again.tokens == (*awkward, b"") and "no token for" in again.lossy


@pytest.mark.parametrize(("data", "message"), [
    (b"\xff\xfe\x00 nothing", "neither a TokenMonster YAML"),
    (b"tokens:\n    - token: \"a\n      id: 0\n", "unclosed quote"),
    (b"tokens:\n    - token: \"\\q\"\n      id: 0\n", "is not YAML"),
    (b"tokens:\n    - token: a\n      id: 1\n", "ids must be 0..0"),
    (b"tokens:\n    - token: a\n", "needs a token and a numeric id"),
    (b"{\"model\": 1}\n", "cannot read the line"),
    (b"charset: none\n", "0 tokens"),
    (b"\x02\x07" + bytes(30), "charset 7"),
])
def test_unknown_vocabulary_is_refused_by_name(tmp_path, data, message):
    path = tmp_path / "strange.yaml"
    path.write_bytes(data)
    with pytest.raises(R.InputError, match="strange.yaml.*unknown vocabulary") as error:
        R.load_vocabulary(path)
    assert message in str(error.value)


def check_table(model: R.SentencePieceModel, documents: list[list[int]]) -> None:
    ids = np.array([k for document in documents for k in document], dtype=np.uint16)
    text, starts = model.decode(ids, R.document_starts(ids, model.bos_id))
    for k, document in enumerate(documents):
        assert text[starts[k]:starts[k + 1]].tobytes().decode() == model.processor.decode(document)


def test_table_equals_sp_decode_on_random_ids(tmp_path):
    (tmp_path / "sp.model").write_bytes(h.sentencepiece_model())
    model = R.SentencePieceModel(tmp_path / "sp.model")
    assert model.table is not None
    rng = np.random.default_rng(1)
    space = model.processor.piece_to_id(R.SPACE_MARK)
    special = [0, 2, 3, space, space, 299, *(4 + k for k in (0xE2, 0x80, 0x99, 0xF0, 0xC0, 0, 65))]
    documents = [[1, *rng.choice(special, rng.integers(0, 9)).tolist()] for _ in range(3000)]
    documents += [[1, *(k for k in rng.integers(0, 300, 12).tolist() if k != 1)]
                  for _ in range(1000)]
    check_table(model, documents)


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
    assert len(documents) == 120 and model.table is not None
    check_table(model, documents)
    odd = model.table.join(np.concatenate(documents).astype(np.uint16), np.array(
        np.cumsum([0] + [len(ids) for ids in documents])))[2]
    assert not odd.any(), "real documents need no fall-back"


@h.needs_shared
def test_the_published_lossy_vocabulary_is_recognised():
    vocabulary = R.load_vocabulary(h.SHARED / "data" / "candidate.vocab")
    assert "998 tokens with capcode 2, charset UTF-8, normalization NFD" in vocabulary.lossy
    with pytest.raises(R.InputError, match="refused"):
        R.make_engine(vocabulary, allow_lossy=False)


def test_lossy_yaml_is_refused_with_its_reasons():
    """Each thing that loses bytes is named."""
    data = R.vocabulary_yaml([bytes([k]) for k in range(200)])
    for right, wrong in ((b"capcode: 0", b"capcode: 2"), (b"charset: none", b"charset: utf-8"),
                         (b'normalization: "none"', b'normalization: "nfd"')):
        assert right in data
        data = data.replace(right, wrong)
    vocabulary = R.load_vocabulary(data, "half.yaml")
    for reason in ("capcode 2", "charset utf-8", "normalization nfd", "no token for 56 of the 256"):
        assert reason in vocabulary.lossy
    with pytest.raises(R.InputError, match="half.yaml: refused"):
        R.make_engine(vocabulary, allow_lossy=False)


SYLLABLES = ("ba", "ke", "lin", "tor", "ma", "shi", "ed", "ing", "\u00e9t", "-", "'s", "qu")


def made_up_documents(count: int, seed: int = 1) -> list[bytes]:
    """Documents of words that follow Zipf's law, with stops, new lines and some invalid UTF-8."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(600)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    documents = []
    for _ in range(count):
        chosen = draw.choices(words, weights, k=draw.randint(1, 120))
        text = " ".join(word + draw.choice(("", "", "", ",", ".\n")) for word in chosen)
        documents.append(text.encode() + draw.randbytes(draw.randint(0, 3)))
    return documents


def proxy_documents(limit: int) -> list[bytes]:
    """The first `limit` bytes of the proxy corpus."""
    with lzma.open(h.SHARED / "data" / "proxy_train.jsonl.xz", "rt", encoding="utf-8") as lines:
        texts = (json.loads(line)["text"].encode() for line in lines)
        documents, size = [], 0
        while size < limit:
            documents.append(next(texts))
            size += len(documents[-1])
    return documents


def jsonl_documents(name: str) -> list[bytes]:
    """Documents of an uncompressed file of ../shared/data."""
    lines = (h.SHARED / "data" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"].encode() for line in lines]


def bytes_per_token(vocabulary: bytes | Path, documents: list[bytes]) -> float:
    """Bytes per token of the exact segmenter, BOS not counted."""
    segmenter = R.Segmenter(R.load_vocabulary(vocabulary))
    return sum(map(len, documents)) / sum(len(segmenter.encode(one)) for one in documents)


def byte_pair_vocabulary(documents: list[bytes], size: int) -> bytes:
    """Plain byte-pair encoding over words with their leading space: the baseline to beat."""
    words = Counter(tuple(bytes([value]) for value in word)
                    for document in documents for word in re.split(rb"(?= )", document))
    tokens = [bytes([value]) for value in range(256)]
    while len(tokens) < size - 1:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += count
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        if left + right not in tokens:
            tokens.append(left + right)
        words = Counter({joined(word, left, right): count for word, count in words.items()})
    return R.vocabulary_yaml(tokens)


def joined(word: tuple[bytes, ...], left: bytes, right: bytes) -> tuple[bytes, ...]:
    """`word` with every adjacent `left`, `right` as one piece."""
    pieces: list[bytes] = []
    for piece in word:
        if pieces and pieces[-1] == left and piece == right:
            pieces[-1] = left + right
        else:
            pieces.append(piece)
    return tuple(pieces)


@pytest.mark.parametrize("size", [257, 300, 700])
def test_built_vocabulary_loads_with_every_id_alive(size):
    documents = made_up_documents(300)
    vocabulary = R.load_vocabulary(R.build_vocab(documents, size, rounds=3))
    assert vocabulary.vocab_size == size and vocabulary.bos_id == size - 1 and not vocabulary.lossy
    tokens = vocabulary.tokens
    assert tokens[:256] == tuple(bytes([value]) for value in range(256)) and tokens[-1] == b""
    assert len(set(tokens)) == size and max(map(len, tokens)) <= R.MAX_TOKEN_BYTES
    segmenter = R.Segmenter(vocabulary)
    for identity, token in enumerate(tokens[:-1]):
        assert segmenter.encode(token) == [identity]


def test_building_is_deterministic_and_ignores_empty_documents():
    documents = made_up_documents(200)
    built = R.build_vocab(documents, 500, rounds=4)
    assert built == R.build_vocab(iter([b"", *documents, b""]), 500, rounds=4)
    assert built != R.build_vocab(documents[100:], 500, rounds=4)


def test_built_vocabulary_is_lossless_on_random_bytes():
    vocabulary = R.load_vocabulary(R.build_vocab(made_up_documents(200), 600, rounds=2))
    segmenter, draw = R.Segmenter(vocabulary), random.Random(2)
    for document in [draw.randbytes(draw.randint(0, 300)) for _ in range(50)]:
        ids = segmenter.encode(document)
        assert b"".join(vocabulary.tokens[identity] for identity in ids) == document


def test_built_vocabulary_beats_byte_pairs_on_unseen_text():
    documents = made_up_documents(500)
    train, unseen = documents[:350], documents[350:]
    built = bytes_per_token(R.build_vocab(train, 500), unseen)
    assert built > 1.03 * bytes_per_token(byte_pair_vocabulary(train, 500), unseen)


def test_more_rounds_never_make_it_worse_on_the_text_it_is_built_from():
    documents = made_up_documents(200)
    reached = [bytes_per_token(R.build_vocab(documents, 500, rounds), documents)
               for rounds in (0, 12)]
    assert reached[0] <= reached[1]


def test_losses_are_the_tokens_that_removal_costs():
    draft = R._Draft([b"abab abab", b"ab"])
    draft.take((*R.BYTES, b"ab", b"abab"))
    assert draft.ids.tolist() == [258, 257, 32, 257, 258, 256]
    losses = draft.losses()
    assert losses[256:].tolist() == [1, 2]  # "ab" once -> 2 bytes; "abab" twice -> 2 x "ab"
    assert losses[ord("a")] == 0


def test_pairs_count_what_can_join():
    draft = R._Draft([b"aaaa", b"xyxyxy", b"xy"])
    assert draft.pairs(258) == [b"xy", b"yx"]
    assert draft.pairs(300) == [b"xy", b"yx"]  # "aaaa" holds "aa" three times, but one can join


def test_log_reports_every_round():
    lines: list[str] = []
    documents = made_up_documents(100)
    R.build_vocab(documents, 400, 3, lines.append)
    assert [line.split(":")[0] for line in lines] == [
        f"vocabulary round {number}/3" for number in (1, 2, 3)]


@pytest.mark.parametrize("documents, size, told", [
    ([b"some text"], 256, "size must be 257"),
    ([b"some text"], 70000, "size must be 257"),
    ([], 300, "holds no text"),
    ([b"", b""], 300, "holds no text"),
    ([b"too little text"], 300, "repeat too little for more than"),
])
def test_impossible_vocabularies_are_refused(documents, size, told):
    with pytest.raises(R.InputError, match=told):
        R.build_vocab(documents, size)


def test_command_line_builds_a_vocabulary(tmp_path, capsys):
    source, output = tmp_path / "docs.jsonl", tmp_path / "vocab.yaml"
    texts = [document.decode("latin-1") for document in made_up_documents(150)]
    h.write_documents(source, texts)
    arguments = ["--docs", str(source), "--output", str(output), "--build-rounds", "2"]
    assert R.main(["--build-vocab", "400", *arguments]) == 0
    assert R.load_vocabulary(output).vocab_size == 400
    assert output.read_bytes() == R.build_vocab([text.encode() for text in texts], 400, 2)
    before = output.read_bytes()
    assert R.main(["--build-vocab", "400", "--build-bytes", "50", *arguments]) == 1
    assert "error: --build-vocab 400" in capsys.readouterr().err
    assert output.read_bytes() == before and sorted(tmp_path.iterdir()) == [source, output]


@h.needs_shared
def test_small_build_beats_scylla_on_unseen_text():
    vocabulary = R.build_vocab(proxy_documents(1_000_000), 1254, rounds=4)
    unseen = jsonl_documents("proxy_val.jsonl")[:100]
    assert bytes_per_token(vocabulary, unseen) > 1.1 * bytes_per_token(
        h.SHARED / "data" / "scylla.yaml", unseen)


@h.needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("size, bar", [(998, 2.45), (1254, 2.60)])
def test_build_reaches_its_bar_on_real_documents(size, bar):
    vocabulary = R.build_vocab(proxy_documents(6_000_000), size)
    assert bytes_per_token(vocabulary, jsonl_documents("fineweb_docs.jsonl")) >= bar
    assert np.all(R.load_vocabulary(vocabulary).base_bytes()[:-1] > 0)


def test_byte_model_is_witten_bell(tmp_path):
    """The yardstick's closed form, by hand on a few bytes: contexts, orders, what is scored."""
    train, val = tmp_path / "train.jsonl", tmp_path / "val.jsonl"
    train.write_text(json.dumps({"text": "ab"}) + "\n" + json.dumps({"text": "ac"}) + "\n")
    val.write_text(json.dumps({"text": "ab"}) + "\n")

    def mixed(count, total, kinds, lower):
        return (count + kinds * lower) / (total + kinds)

    # counted symbols after the two leading zeros: a b 0 0 a c; in contexts of 0, 1 and 2 bytes
    a0, b0 = mixed(2, 6, 4, 1 / 256), mixed(1, 6, 4, 1 / 256)
    a1 = mixed(2, 3, 2, a0)  # after 0: a, 0, a
    b1 = mixed(1, 2, 2, b0)  # after a: b, c
    a2 = mixed(2, 2, 1, a1)  # after 0 0: a, a
    b2 = mixed(1, 2, 2, b1)  # after 0 a: b, c
    expected = -np.log2([a2, b2]).mean()
    assert R.byte_model_bpb(train, val) == pytest.approx(expected, abs=1e-12)
