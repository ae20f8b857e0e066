"""The vocabulary builder."""

from __future__ import annotations

import json
import lzma
import random
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import harness as h
import retokenize_scylla as R
from records import vocabulary as V

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
    return V.vocabulary_yaml(tokens)


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
    vocabulary = R.load_vocabulary(V.build_vocab(documents, size, rounds=3))
    assert vocabulary.vocab_size == size and vocabulary.bos_id == size - 1 and not vocabulary.lossy
    tokens = vocabulary.tokens
    assert tokens[:256] == tuple(bytes([value]) for value in range(256)) and tokens[-1] == b""
    assert len(set(tokens)) == size and max(map(len, tokens)) <= R.MAX_TOKEN_BYTES
    segmenter = R.Segmenter(vocabulary)
    for identity, token in enumerate(tokens[:-1]):
        assert segmenter.encode(token) == [identity]


def test_building_is_deterministic_and_ignores_empty_documents():
    documents = made_up_documents(200)
    built = V.build_vocab(documents, 500, rounds=4)
    assert built == V.build_vocab(iter([b"", *documents, b""]), 500, rounds=4)
    assert built != V.build_vocab(documents[100:], 500, rounds=4)


def test_built_vocabulary_is_lossless_on_random_bytes():
    vocabulary = R.load_vocabulary(V.build_vocab(made_up_documents(200), 600, rounds=2))
    segmenter, draw = R.Segmenter(vocabulary), random.Random(2)
    for document in [draw.randbytes(draw.randint(0, 300)) for _ in range(50)]:
        ids = segmenter.encode(document)
        assert b"".join(vocabulary.tokens[identity] for identity in ids) == document


def test_built_vocabulary_beats_byte_pairs_on_unseen_text():
    documents = made_up_documents(500)
    train, unseen = documents[:350], documents[350:]
    built = bytes_per_token(V.build_vocab(train, 500), unseen)
    assert built > 1.03 * bytes_per_token(byte_pair_vocabulary(train, 500), unseen)


def test_more_rounds_never_make_it_worse_on_the_text_it_is_built_from():
    documents = made_up_documents(200)
    reached = [bytes_per_token(V.build_vocab(documents, 500, rounds), documents)
               for rounds in (0, 12)]
    assert reached[0] <= reached[1]


def test_losses_are_the_tokens_that_removal_costs():
    draft = V.Draft([b"abab abab", b"ab"])
    draft.take((*V.BYTES, b"ab", b"abab"))
    assert draft.ids.tolist() == [258, 257, 32, 257, 258, 256]
    losses = draft.losses()
    assert losses[256:].tolist() == [1, 2]  # "ab" once -> 2 bytes; "abab" twice -> 2 x "ab"
    assert losses[ord("a")] == 0


def test_pairs_count_what_can_join():
    draft = V.Draft([b"aaaa", b"xyxyxy", b"xy"])
    assert draft.pairs(258) == [b"xy", b"yx"]
    assert draft.pairs(300) == [b"xy", b"yx"]  # "aaaa" holds "aa" three times, but one can join


def test_a_vocabulary_is_built_from_shards(case, tmp_path, capsys):
    """As from the source text of their documents, some of which cross shards."""
    command = ["--build-vocab", "300", "--build-rounds", "1", "--output", str(tmp_path / "v.yaml")]
    shards = ["--sp-shards", str(case.folder / "in" / "*.bin")]
    assert R.main([*command, *shards, "--sp-model", str(case.model)]) == 0
    source = [text for k in range(4) for text in case.source(k)]
    assert (tmp_path / "v.yaml").read_bytes() == V.build_vocab(source, 300, 1)
    for wrong in (shards, [*shards, "--docs", "d.jsonl"], ["--sp-model", "m"], []):
        with pytest.raises(SystemExit):
            R.main([*command, *wrong])
    assert "--sp-shards and --sp-model need each other" in capsys.readouterr().err


def test_log_reports_every_round():
    lines: list[str] = []
    documents = made_up_documents(100)
    V.build_vocab(documents, 400, 3, lines.append)
    assert [line.split(":")[0] for line in lines] == [
        f"vocabulary round {number}/3" for number in (1, 2, 3)]


@pytest.mark.parametrize("documents, size, told", [
    ([b"some text"], 256, "size must be 257"),
    ([b"some text"], 65536, "size must be 257"),
    ([], 300, "holds no text"),
    ([b"", b""], 300, "holds no text"),
    ([b"too little text"], 300, "repeat too little for more than"),
])
def test_impossible_vocabularies_are_refused(documents, size, told):
    with pytest.raises(R.InputError, match=told):
        V.build_vocab(documents, size)


def test_command_line_builds_a_vocabulary(tmp_path, capsys):
    source, output = tmp_path / "docs.jsonl", tmp_path / "vocab.yaml"
    texts = [document.decode("latin-1") for document in made_up_documents(150)]
    h.write_documents(source, texts)
    arguments = ["--docs", str(source), "--output", str(output), "--build-rounds", "2"]
    assert R.main(["--build-vocab", "400", *arguments]) == 0
    assert R.load_vocabulary(output).vocab_size == 400
    assert output.read_bytes() == V.build_vocab([text.encode() for text in texts], 400, 2)
    before = output.read_bytes()
    assert R.main(["--build-vocab", "400", "--build-bytes", "50", *arguments]) == 1
    assert "error: --build-vocab 400" in capsys.readouterr().err
    assert output.read_bytes() == before and sorted(tmp_path.iterdir()) == [source, output]


def test_the_study_of_bytes_per_token(tmp_path, capsys, monkeypatch):
    """Its table has source bytes over ids without BOS, of a model and of vocabularies."""
    case = h.Case(tmp_path / "case", case="ascii")
    texts = h.texts(9)
    documents = h.write_documents(tmp_path / "d.jsonl", texts)
    monkeypatch.setattr(sys, "argv", ["x", "--docs", str(documents), "--vocab", str(case.vocab),
                                      "--sp-model", str(case.model)])
    assert h.tool("bytes_per_token").main() == 0
    table = capsys.readouterr().out
    wanted = bytes_per_token(case.vocab, [text.encode() for text in texts])
    assert f"| toy.yaml | 256 | raw | {wanted:.3f} |" in table
    tokens = case.processor.encode(texts)
    decoded = sum(len(case.processor.decode(ids).encode()) for ids in tokens)
    assert (f"| sp.model | 300 | as the model decodes it | "
            f"{decoded / sum(map(len, tokens)):.3f} |" in table)


@pytest.mark.slow
@h.needs_shared
def test_small_build_beats_scylla_on_unseen_text():
    vocabulary = V.build_vocab(proxy_documents(1_000_000), 1254, rounds=4)
    unseen = jsonl_documents("proxy_val.jsonl")[:100]
    assert bytes_per_token(vocabulary, unseen) > 1.1 * bytes_per_token(
        h.SHARED / "data" / "scylla.yaml", unseen)


@h.needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("size, bar", [(998, 2.45), (1254, 2.60)])
def test_build_reaches_its_bar_on_real_documents(size, bar):
    vocabulary = V.build_vocab(proxy_documents(6_000_000), size)
    assert bytes_per_token(vocabulary, jsonl_documents("fineweb_docs.jsonl")) >= bar
    assert np.all(R.load_vocabulary(vocabulary).base_bytes[:-1] > 0)
