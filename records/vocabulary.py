"""Build byte-exact vocabularies: `retokenize_scylla.py --build-vocab`.

Pairs of adjacent tokens are merged as the text wants them, and the exact segmenter counts what a
vocabulary is worth.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from records.documents import DocumentReader, shard_documents
from retokenize_scylla import (
    CAPITALS,
    MARKS,
    MAX_IDS,
    MAX_TOKEN_BYTES,
    Documents,
    Segmenter,
    SentencePieceModel,
    Vocabulary,
    compiled,
    file_errors,
    find_shards,
    mark_capitals,
    positive,
    require,
)

BYTES = tuple(bytes([value]) for value in range(256))
FIRST = {"none": BYTES, "ascii": tuple(byte for byte in BYTES if byte not in CAPITALS)}  # by case
PEAK = 3.0  # how many times its final size the vocabulary reaches before it is pruned
GROWTH, DECAY = 0.25, 0.15  # share of the tokens taken in, or thrown out, per step on that way
FIRST_SWAP, LAST_SWAP = 0.3, 0.02  # share of the tokens exchanged in the first and the last round


def build_vocab(documents: Iterable[bytes], size: int, rounds: int = 12,
                log: Callable[[str], None] | None = None, case: str = "none",
                apart: bool = False) -> bytes:
    """TokenMonster YAML of `size` ids (BOS the last) that segments `documents` into few tokens.

    From the single bytes up, the most frequent pairs of adjacent tokens are taken in, and above
    `size` the tokens that the text misses least are thrown out; `rounds` ever smaller exchanges
    follow. The exact segmenter counts the tokens of each round, and the best round is kept.

    With case "ascii" the tokens are of the text that `mark_capitals` gives, without capitals; with
    `apart` its marks are tokens of their own, and in no other.
    """
    least = len(FIRST[case]) + 1
    require(least <= size < MAX_IDS, f"--build-vocab {size}: the size must be {least} (each byte "
            f"that texts have, and BOS) to {MAX_IDS - 1}")
    draft, wanted = Draft(documents, case, apart), size - 1
    draft.grow(min(int(PEAK * wanted), MAX_IDS - 2), GROWTH)
    require(len(draft.tokens) >= wanted,
            f"--build-vocab {size}: the {draft.source_bytes} bytes of text repeat too little "
            f"for more than {len(draft.tokens) + 1} ids; give more text")
    draft.prune(wanted, DECAY)
    best, fewest = draft.tokens, draft.ids.size
    for number, share in enumerate(np.geomspace(FIRST_SWAP, LAST_SWAP, rounds), 1):
        draft.grow(int(wanted * (1 + share)), share)
        draft.prune(wanted, share / 2)
        if draft.ids.size < fewest:
            best, fewest = draft.tokens, draft.ids.size
        if log:
            log(f"vocabulary round {number}/{rounds}: {draft.source_bytes} bytes, "
                f"{draft.source_bytes / (fewest - draft.text.starts.size + 1):.4f} bytes per token")
    return vocabulary_yaml([*FIRST[case], *sorted(set(best).difference(BYTES))], case)


def vocabulary_yaml(tokens: list[bytes], case: str = "none") -> bytes:
    """TokenMonster YAML of a byte-exact vocabulary: ids in list order, no BOS entry.

    "case" is a setting of ours that TokenMonster does not have.
    """
    lines = ["charset: none", 'normalization: "none"', "capcode: 0"]
    lines += [f"case: {case}"] * (case != "none") + ["tokens:"]
    for identity, token in enumerate(tokens):
        text = token.decode("latin-1")
        plain = all(" " <= char <= "~" for char in text) and not text.startswith("TokenMonster")
        text = text if plain else f"TokenMonsterHexEncode{{{token.hex()}}}"
        lines += [f"    - token:   {json.dumps(text)}", f"      id:      {identity}",
                  "      score:   0", "      encoded: true"]
    return ("\n".join(lines) + "\n").encode()


def first_bytes(documents: Iterable[bytes], limit: int) -> list[bytes]:
    """The first documents that together have at most `limit` bytes, longer ones left out."""
    chosen, size = [], 0
    for document in documents:
        if size + len(document) <= limit:
            chosen.append(document)
            size += len(document)
    return chosen


class Draft:
    """A growing and shrinking vocabulary, and the text segmented with it.

    `ids` are those of the exact segmenter.
    """

    def __init__(self, documents: Iterable[bytes], case: str = "none", apart: bool = False):
        """Start with the single bytes; `case` and `apart` as in `build_vocab`."""
        kept = [document for document in documents if document]
        require(kept, "--build-vocab: the source holds no text; give documents to build from")
        text = Documents.joined(kept)
        self.source_bytes, self.singles = text.values.size, len(FIRST[case])
        self.text = mark_capitals(text) if case == "ascii" else text
        self.unmerged = MARKS if apart else b""
        self.take(FIRST[case])

    def take(self, tokens: tuple[bytes, ...]) -> None:
        """Make `tokens`, the single bytes first, the vocabulary; segment the text with it."""
        self.tokens = tokens
        self.segmenter = Segmenter(Vocabulary("draft", b"", (*tokens, b"")))
        self.ids = self.segmenter.segment(self.text).values

    def grow(self, size: int, share: float) -> None:
        """Take in frequent pairs, at most `share` of the tokens at a time, up to `size` tokens."""
        while len(self.tokens) < size:
            pairs = self.pairs(min(size, int(len(self.tokens) * (1 + share)) + 1))
            if not pairs:
                return
            self.take((*self.tokens, *pairs))

    def pairs(self, size: int) -> list[bytes]:
        """The most frequent pairs of adjacent tokens, as many as make `size` tokens."""
        base = len(self.tokens) + 1
        keys = self.ids[:-1].astype(np.uint32) * np.uint32(base) + self.ids[1:]
        keys, counts = np.unique(keys, return_counts=True)
        left, right = np.divmod(keys.astype(np.int64), base)
        counts[left == right] //= 2  # of three equal tokens in a row only two can join
        counts[(left == len(self.tokens)) | (right == len(self.tokens))] = 0  # BOS
        known, found = set(self.tokens), []
        for at in np.argsort(-counts, kind="stable"):
            if len(known) >= size or counts[at] < 2:
                break
            pair = self.tokens[left[at]] + self.tokens[right[at]]
            if (len(pair) <= MAX_TOKEN_BYTES and pair not in known
                    and pair == pair.translate(None, self.unmerged)):
                known.add(pair)
                found.append(pair)
        return found

    def prune(self, size: int, share: float) -> None:
        """Throw out the least missed tokens, at most `share` at a time, down to `size` tokens."""
        while len(self.tokens) > size:
            loss = self.losses()
            loss[:self.singles] = np.iinfo(np.int64).max
            left = max(size, int(len(self.tokens) * (1 - share)))
            kept = np.sort(np.argsort(-loss, kind="stable")[:left])
            self.take(tuple(self.tokens[at] for at in kept))

    def losses(self) -> np.ndarray:
        """int64 [tokens]: how many tokens more the text would take without each of them."""
        keys = {token: identity for identity, token in enumerate(self.tokens)}
        shorter = [next((keys[token[:cut]] for cut in range(len(token) - 1, 0, -1)
                         if token[:cut] in keys), -1) for token in self.tokens]
        loss = np.zeros(len(self.tokens), dtype=np.int64)
        compiled(_loss_kernel)(
            self.text.starts, self.segmenter.longest(self.text), self.ids,
            np.array([len(token) for token in self.tokens]), np.array(shorter), loss)
        return loss


def _loss_kernel(starts, longest, ids, length, shorter, loss):
    """loss[t] += the tokens it costs, with the fewest pieces, not to use t where `ids` has it.

    shorter[t] is the longest token that t begins with, -1 for none; fewest[i] is the least number
    of tokens from byte i of a document to its end.
    """
    fewest = np.zeros(np.max(np.diff(starts)) + 1, dtype=np.int32)
    at = 0
    for document in range(starts.size - 1):
        begin, size = starts[document], starts[document + 1] - starts[document]
        fewest[size] = 0
        for i in range(size - 1, -1, -1):
            token = np.int64(longest[begin + i])
            least = size
            while token >= 0:
                least = min(least, np.int64(fewest[i + length[token]]))
                token = shorter[token]
            fewest[i] = least + 1
        at += 1  # BOS
        i = 0
        while i < size:
            chosen = np.int64(ids[at])
            token = np.int64(longest[begin + i])
            least = size
            while token >= 0:
                if token != chosen:
                    least = min(least, np.int64(fewest[i + length[token]]))
                token = shorter[token]
            i += length[chosen]
            loss[chosen] += least - fewest[i]
            at += 1


# --- command line ---------------------------------------------------------------------------


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line of `retokenize_scylla.py --build-vocab`."""
    parser = argparse.ArgumentParser(
        description="Build a byte-exact vocabulary from SentencePiece shards or documents.")
    add, source = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    add("--build-vocab", metavar="N", type=positive, required=True, help="ids, BOS included")
    source.add_argument("--sp-shards", metavar="FILE", nargs="+",
        help="shards of --sp-model, paths or patterns; the first is enough")
    source.add_argument("--docs", metavar="FILE", nargs="+", type=Path,
        help="JSON lines with \"text\" instead (.jsonl, .gz, .xz, .zst)")
    add("--sp-model", metavar="MODEL", help="of --sp-shards")
    add("--build-bytes", metavar="B", type=positive, default=50_000_000,
        help="bytes of text that are read, whole documents (50000000)")
    add("--build-rounds", metavar="R", type=positive, default=12,
        help="rounds of exchanging tokens (12)")
    add("--case", choices=("none", "ascii"), default="none",
        help="ascii: write A to Z as a to z with marks, without loss (none)")
    add("--case-marks", choices=("free", "apart"),
        help="free: marks may be parts of tokens; apart: tokens of their own (free)")
    add("--output", metavar="FILE", type=Path, default=Path("vocab.yaml"),
        help="where the vocabulary goes (vocab.yaml)")
    options = parser.parse_args(arguments)
    if bool(options.sp_shards) != bool(options.sp_model):
        parser.error("--sp-shards and --sp-model need each other")
    if options.case_marks and options.case == "none":
        parser.error(f"--case-marks {options.case_marks} needs --case ascii")
    return options


def run(options: argparse.Namespace) -> None:
    """Write a vocabulary built from documents."""
    require(not options.output.is_dir(), f"--output {options.output}: is a folder; give a file")
    documents = (DocumentReader(options.docs).documents() if options.docs else shard_documents(
        find_shards(options.sp_shards), SentencePieceModel(options.sp_model)))
    texts = first_bytes(documents, options.build_bytes)
    data = build_vocab(texts, options.build_vocab, options.build_rounds,
                       lambda line: print(line, file=sys.stderr, flush=True),
                       options.case, options.case_marks == "apart")
    with file_errors(f"write {options.output}"):
        part = options.output.with_name(options.output.name + ".part")
        part.write_bytes(data)
        part.replace(options.output)
    print(f"{options.output}: {options.build_vocab} ids")
