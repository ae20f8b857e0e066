"""Re-tokenize FineWeb SentencePiece shards (or documents) to a byte-exact TokenMonster vocabulary.

Sections: errors, vocabulary, segmentation, ids to bytes, capitals as marks, tokenizers, input
shards, output folder and ledger, workers, jobs, command line.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

# --- errors ---------------------------------------------------------------------------------


class InputError(ValueError):
    """A mistake of the user or of the data: the text names the file, the value and the remedy."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with the signal's number."""


def require(condition: Any, text: str) -> None:
    """InputError with the text, unless the condition holds."""
    if not condition:
        raise InputError(text)


@contextlib.contextmanager
def file_errors(action: str) -> Iterator[None]:
    """Turn an OSError of the block into an InputError that says what failed and what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise InputError(f"cannot {action}: {error.strerror or error}; " + (
            "make room and run again: finished shards are kept" if full
            else "check the path and its permissions")) from None


@contextlib.contextmanager
def needs(package: str) -> Iterator[None]:
    """Turn the ImportError of an optional package into an InputError that says how to get it."""
    try:
        yield
    except ImportError:
        raise InputError(f"the {package} package is missing: pip install {package}") from None


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with file_errors(f"read {path}"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- vocabulary -----------------------------------------------------------------------------

MAX_TOKEN_BYTES, MAX_IDS = 40, 65536
HEX_TOKEN = re.compile(r"TokenMonsterHexEncode\{((?:[0-9a-fA-F]{2})*)\}")
CHARSETS = {0: "none", 1: "UTF-8", 2: "UTF-16"}
NEXT_MARK, RUN_MARK = 0xFF, 0xFE  # of `case: ascii`: see mark_capitals
MARKS, CAPITALS = bytes([NEXT_MARK, RUN_MARK]), bytes(range(ord("A"), ord("Z") + 1))


class Vocabulary:
    """A TokenMonster vocabulary; its last id is the synthetic BOS, which has no bytes."""

    def __init__(self, name: str, data: bytes, tokens: Sequence[bytes], lossy: str = "",
                 charset: str = "none", marked: bool = False):
        """Bytes of the file and of each id, b"" for dead ids; `lossy`: why it is not byte-exact.

        The tokens of a `marked` one are of text whose capitals are marks, which are no bytes of
        the source.
        """
        self.name, self.data, self.tokens = name, data, tuple(tokens)
        self.lossy, self.charset, self.marked = lossy, charset, marked
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.vocab_size, self.bos_id = len(tokens), len(tokens) - 1
        sizes = [len(token.translate(None, MARKS * marked)) for token in tokens]
        self.base_bytes = np.array(sizes, dtype=np.int16)


def load_vocabulary(source: Path | str | bytes, name: str = "vocabulary") -> Vocabulary:
    """Vocabulary from a TokenMonster YAML or binary file, or from the bytes of one."""
    if not isinstance(source, bytes):
        require(Path(source).is_file(),
                f"{source}: no such vocabulary file; give --vocab a TokenMonster YAML")
        source, name = Path(source).read_bytes(), str(source)
    binary = len(source) > 20 and source[0] <= 2
    return (_binary_vocabulary if binary else _yaml_vocabulary)(source, name)


def _binary_vocabulary(data: bytes, name: str) -> Vocabulary:
    """Recognise the binary format by its header; only its size and settings are read."""
    size, charset = int.from_bytes(data[11:14], "little"), CHARSETS.get(data[1])
    require(charset is not None and 0 < size < MAX_IDS,
            f"{name}: unknown vocabulary: not a TokenMonster YAML, and its binary header says "
            f"capcode {data[0]}, charset {data[1]}, {size} tokens; give the vocabulary as YAML")
    normal = "NFD" if data[2] & 1 else "none" if data[2] == 0 else f"flags {data[2]}"
    reason = (f"binary vocabulary of {size} tokens with capcode {data[0]}, charset {charset}, "
              f"normalization {normal}")
    return Vocabulary(Path(name).name, data, (b"",) * (size + 1), reason, charset)


def _yaml_vocabulary(data: bytes, name: str) -> Vocabulary:
    """Read the YAML that TokenMonster writes; the entry later in the file wins a byte string."""
    settings, id_of, ids = _load_yaml(data, name), {}, []
    unknown = f"{name}: unknown vocabulary:"
    charset, case = (str(settings.get(key, "none")).lower() for key in ("charset", "case"))
    require(case in ("none", "ascii"), f"{unknown} case {case!r} is not none or ascii; build it "
            "again with --build-vocab")
    for entry in settings["tokens"]:
        try:
            match, identity = HEX_TOKEN.fullmatch(entry["token"]), int(entry["id"])
            token = bytes.fromhex(match[1]) if match else entry["token"].encode()
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{unknown} the entry {entry} needs a token and a numeric id; export "
                             "it again with TokenMonster's exportvocab") from None
        ids.append(identity)
        if 0 < len(token) <= MAX_TOKEN_BYTES:
            id_of[token] = identity
    require(0 < len(ids) < MAX_IDS and sorted(ids) == list(range(len(ids))),
            f"{unknown} {len(ids)} tokens whose ids must be 0..{len(ids) - 1}, each once, fewer "
            f"than {MAX_IDS}; export it again with TokenMonster's exportvocab")
    tokens = [b""] * (len(ids) + 1)
    for token, identity in id_of.items():
        tokens[identity] = token
    needed = set(range(256)).difference(CAPITALS if case == "ascii" else b"")
    return Vocabulary(Path(name).name, data, tokens, _lossy_reason(settings, id_of, needed),
                      charset, case == "ascii")


def _load_yaml(data: bytes, name: str) -> dict:
    """The settings of a vocabulary, every scalar as a string, with a list of "tokens"."""
    with needs("pyyaml"):
        import yaml
    try:
        settings = yaml.load(data, getattr(yaml, "CBaseLoader", yaml.BaseLoader))
        problem = "no list of tokens"
    except (yaml.YAMLError, RecursionError) as error:
        settings, problem = None, " ".join(str(error).split())
    require(isinstance(settings, dict) and isinstance(settings.get("tokens"), list),
            f"{name}: unknown vocabulary: neither a TokenMonster YAML ({problem}) nor its binary "
            "format; give --vocab a TokenMonster YAML")
    return settings


def _lossy_reason(settings: dict, id_of: dict[bytes, int], needed: set[int]) -> str:
    """Why a YAML vocabulary is not byte-exact, for the bytes that texts have; empty when it is."""
    wanted = {"capcode": "0", "charset": "none", "normalization": "none"}
    wrong = [f"{key} {settings.get(key, 'missing')}" for key, value in wanted.items()
             if str(settings.get(key)).lower() != value]
    wrong += [f"{key} entries" for key in ("unk", "special", "deleted")
              if settings.get(key) not in (None, [], "false", "null", "~", "")]
    missing = sum(bytes([value]) not in id_of for value in needed)
    if missing:
        wrong.append(f"no token for {missing} of the {len(needed)} byte values")
    return ", ".join(wrong)


# --- segmentation: the tables and kernels of section 4 of the specification ------------------

NO_RUNE = "\ufffd"
WHITE_SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
                        + "".join(map(chr, range(0x2000, 0x200B))))
ENDS_LETTER, STARTS_LETTER, STARTS_SPACE, ONE_WORD, HOMOGENEOUS = 1, 2, 4, 32, 128
# Columns of the per-token table that the choosing kernel reads (one 16-byte row per id).
LENGTH, SCORE, FLAGS, ROW = 3, 4, 5, 8  # after the three candidates: itself, alternatives
LETTER_CLASS, OTHER_CLASS, SPACE_CLASS = 1, 2, 3  # the classes 1, 10 and 12 of the specification
codecs.register_error("byte by byte", lambda error: (NO_RUNE, error.start + 1))


def runes(text: bytes) -> str:
    """Characters by strict UTF-8; U+FFFD for each byte that is part of none, and for no text."""
    return text.decode("utf-8", "byte by byte") or NO_RUNE


@functools.cache
def kind_of(char: str) -> str:
    """L for a letter or mark (Unicode L*, Mn, Mc, Me), N for a number, a space itself, or "."."""
    category = unicodedata.category(char)[0].replace("M", "L")
    return category if category in "LN" else char if char == " " else "."


def token_fields(token: bytes) -> tuple[int, int, int]:
    """(flags, words, shortest alternative) of a token, section 4.3 of the specification."""
    kinds = "".join(map(kind_of, runes(token)))
    words = len(re.findall(" [LN]", kinds))
    homogeneous = len(token) == 1 or re.fullmatch("[ L]L[ L]*|[ N]N[ N]*|[ .]+", kinds)
    flags = (ENDS_LETTER * (kinds[-1] == "L") | STARTS_LETTER * (kinds[0] == "L")
             | STARTS_SPACE * (kinds[0] == " ") | ONE_WORD * bool(re.fullmatch(" L+", kinds))
             | HOMOGENEOUS * bool(homogeneous))
    return flags, words, 2 if words > 1 and re.match(" [LN]", kinds) else 1


def cut_priority(token: bytes, cut: int) -> int:
    """How good a place byte `cut` of a token is to break it, section 4.3."""
    left, right, after = runes(token[:cut])[-1], runes(token[cut:])[0], runes(token[cut + 1:])[0]
    if token[cut] == ord(" ") and kind_of(after) in "LN":
        return 10
    (left_name, left_number), (right_name, right_number) = (
        (kind_of(char) == "L" or char == "_", kind_of(char) == "N") for char in (left, right))
    if left_name != right_name or left_number != right_number:
        return 9
    if (left in WHITE_SPACE) != (right in WHITE_SPACE):
        return 7 if left in WHITE_SPACE else 8
    return 1


def alternatives(token: bytes, keys: dict[bytes, int], shortest: int) -> list[bytes]:
    """At most two shorter tokens that are prefixes of `token`, the better one first."""
    cuts = [cut for cut in range(shortest, len(token)) if token[:cut] in keys]
    return [token[:cut] for cut in sorted(
        cuts, key=lambda cut: (cut_priority(token, cut), cut), reverse=True)[:2]]


def byte_classes(keys: dict[bytes, int]) -> np.ndarray:
    """uint8 [257]: class of each byte by the tokens that begin with it; 256 is the end, class 0."""
    counts = np.zeros((256, 4), dtype=np.int64)
    column = {"N": 0, "L": LETTER_CLASS, ".": OTHER_CLASS, " ": SPACE_CLASS}
    for token in keys:
        counts[token[0], column[kind_of(runes(token)[0])]] += 1
    most = counts.max(axis=1)
    sure = (2 * most > counts.sum(axis=1)) & (most > 2)
    return np.append(np.where(sure, counts.argmax(axis=1), 0), 0).astype(np.uint8)


def token_table(size: int, keys: dict[bytes, int]) -> np.ndarray:
    """uint16 [V, ROW]: candidates (itself where one is missing), length, own score and flags."""
    table = np.zeros((size, ROW), dtype=np.uint16)
    for token, identity in keys.items():
        flags, words, shortest = token_fields(token)
        shorter = [keys[prefix] for prefix in alternatives(token, keys, shortest)]
        score = len(token) + bool(flags & HOMOGENEOUS) + max(0, words - 1) + 100 * words
        choices = [identity, *shorter, identity, identity][:3]
        table[identity, :FLAGS + 1] = (*choices, len(token), score, flags)
    return table


def follow_scores(table: np.ndarray) -> np.ndarray:
    """int16 [V, 4]: what a token adds as second of a pair, by the class of the byte after it."""
    flags = table[:, FLAGS]
    scores = np.stack([table[:, SCORE].astype(np.int16) + ((flags & STARTS_SPACE) > 0)] * 4, axis=1)
    scores[:, LETTER_CLASS] -= 3 * ((flags & ENDS_LETTER) > 0)
    scores[:, OTHER_CLASS] += 100
    scores[:, SPACE_CLASS] += 101
    return scores


def suffix_automaton(keys: dict[bytes, int]) -> tuple:
    """Aho-Corasick automaton over the reversed tokens, to be run from the end of a text.

    After text[i:] its state is the longest piece at i that ends some token, so `longest[state]` is
    the longest token at i. Bytes that are only tokens of their own share column 0 and lead back to
    state 0. Rows have 2**shift columns, common bytes first, so that what is used stays cached.
    """
    counts = np.bincount(np.frombuffer(b"".join(token for token in keys if len(token) > 1),
                                       dtype=np.uint8), minlength=256)
    used = [value for value in np.argsort(-counts, kind="stable") if counts[value]]
    column = np.zeros(256, dtype=np.uint8 if len(used) < 256 else np.uint16)
    column[used] = np.arange(1, len(used) + 1)
    shift = int(len(used)).bit_length()
    states = sorted({b"", *(token[k:] for token in keys if len(token) > 1 or column[token[0]]
                            for k in range(len(token)))}, key=len)
    number = {state: n for n, state in enumerate(states)}
    step = np.zeros((len(states), 1 << shift), dtype=np.uint16 if len(states) < 65536 else np.int32)
    longest = np.zeros(len(states), dtype=np.uint16)
    for n, state in enumerate(states[1:], 1):
        step[number[state[1:]], column[state[0]]] = n
    for n, state in enumerate(states[1:], 1):  # shorter ones first: the one fallen back to is done
        back = next(number[state[:k]] for k in range(len(state) - 1, -1, -1) if state[:k] in number)
        step[n] = np.where(step[n] > 0, step[n], step[back])
        longest[n] = keys.get(state, longest[back])
    byte_token = np.array([keys.get(bytes([value]), 0) for value in range(256)], dtype=np.uint16)
    return step.reshape(-1), longest, column, shift, byte_token


def _longest_kernel(text, starts, automaton, out):
    """out[i] = id of the longest token at i that ends within its document."""
    step, longest, column, shift, byte_token = automaton
    for document in range(starts.size - 1):
        state = 0
        for i in range(starts[document + 1] - 1, starts[document] - 1, -1):
            value = text[i]
            state = np.int64(step[(state << shift) + column[value]])
            out[i] = longest[state] if state != 0 else byte_token[value]


def _choose_kernel(text, starts, longest, table, follow, classes, out):
    """Write BOS and the chosen ids of each document to out; return how many were written."""
    count, bos = 0, table.shape[0] - 1
    for document in range(starts.size - 1):
        i, end = starts[document], starts[document + 1]
        out[count] = bos
        count += 1
        while i < end:
            whole = choice = np.int64(longest[i])
            size = np.int64(table[whole, LENGTH])
            after = i + size
            word = table[whole, FLAGS] & ONE_WORD
            if (table[whole, 1] != whole and after < end
                    and not (word and classes[text[after]] == SPACE_CLASS)):
                best = np.int64(-1000000)
                for slot in range(3):  # the token itself stands in for a missing alternative
                    candidate = np.int64(table[whole, slot])
                    length = np.int64(table[candidate, LENGTH])
                    second = np.int64(longest[i + length])
                    pair = length + np.int64(table[second, LENGTH])
                    kind = np.int64(classes[text[i + pair]]) if i + pair < end else 0
                    value = np.int64(table[candidate, SCORE]) + np.int64(follow[second, kind])
                    value -= 103 * (table[candidate, FLAGS] & (table[second, FLAGS] >> 1) & 1)
                    if pair <= size:
                        value -= 100 if pair < size else 10000
                    if value > best:
                        best, choice = value, candidate
            out[count] = choice
            count += 1
            i += np.int64(table[choice, LENGTH])
    return count


@functools.cache
def compiled(kernel):
    """`kernel` compiled by Numba, kept on disk so that a second start is quick."""
    with needs("numba"):
        import numba
    try:
        return numba.njit(cache=True, nogil=True)(kernel)
    except RuntimeError:  # no folder to keep the machine code in
        return numba.njit(nogil=True)(kernel)


# --- ids to bytes ---------------------------------------------------------------------------

WIDE = 8  # bytes copied at once, so that most pieces need no inner loop
SPACE_MARK, EVERY = "\u2581", 1 << 30


def _join_kernel(ids, starts, table, out, ends):
    """Concatenate the pieces of each document into out; ends[k] becomes the end of document k."""
    pieces, places, strip = table
    at = 0
    for document in range(starts.size - 1):
        begin, strippable = at, strip
        for position in range(starts[document], starts[document + 1]):
            place = places[ids[position]]
            first, size = place >> 16, (place >> 1) & 0x7FFF
            if place & 1 and at == begin and strippable > 0:
                first, size, strippable = first + 1, size - 1, strippable - 1
            for i in range(WIDE):
                out[at + i] = pieces[first + i]
            for i in range(WIDE, size):
                out[at + i] = pieces[first + i]
            at += size
        ends[document] = at


class Documents(NamedTuple):
    """Documents one after another: document k is values[starts[k]:starts[k + 1]]."""

    values: np.ndarray  # uint8 bytes, or uint16 ids with BOS before each document
    starts: np.ndarray  # int64 [documents + 1]

    @classmethod
    def joined(cls, parts: list[bytes]) -> Documents:
        """Of the bytes of each."""
        starts = np.cumsum([0] + [len(part) for part in parts], dtype=np.int64)
        return cls(np.frombuffer(b"".join(parts), dtype=np.uint8), starts)

    @classmethod
    def after_bos(cls, ids: Sequence[int] | np.ndarray, bos: int) -> Documents:
        """Of ids that begin with BOS, which stands before each document."""
        ids = np.asarray(ids, dtype=np.uint16)
        return cls(ids, np.append(np.flatnonzero(ids == bos), ids.size))

    def split(self) -> list[np.ndarray]:
        """The values of each document."""
        return [self.values[i:j] for i, j in itertools.pairwise(self.starts.tolist())]


class PieceTable:
    """Bytes of every id of a tokenizer, joined document by document."""

    def __init__(self, pieces: Sequence[bytes], spaced: np.ndarray | int = 0, strip: int = 0):
        """While a document is empty, up to `strip` `spaced` (bool [V]) pieces lose a space."""
        lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
        flat = np.frombuffer(b"".join(pieces) + bytes(WIDE + 1), dtype=np.uint8)
        self.size, self.widest = lengths.size, int(lengths.max(initial=1))
        self.table = flat, (np.cumsum(lengths) - lengths) << 16 | lengths << 1 | spaced, strip

    def join(self, ids: Documents) -> Documents:
        """The bytes of documents of ids."""
        highest = int(ids.values.max(initial=0))
        require(highest < self.size, f"id {highest} is out of range: the model has {self.size} "
                "ids; use the model that made the shards")
        out = np.empty(ids.values.size * self.widest + WIDE, dtype=np.uint8)
        ends = np.zeros_like(ids.starts)
        compiled(_join_kernel)(*ids, self.table, out, ends[1:])
        return Documents(out[:ends[-1]], ends)


def is_utf8(text: np.ndarray) -> bool:
    """Whether bytes (uint8) are strict UTF-8."""
    try:
        return str(text.data, "utf-8") is not None
    except UnicodeDecodeError:
        return False


# --- capitals as marks: `case: ascii` ---------------------------------------------------------

SPACE = 32  # also how far a small letter is from its capital


def _mark_kernel(text, starts, out, ends):
    """Write the documents with marks to out, ends[k] the end of document k.

    Returns where the text holds a byte that is a mark, -1 if nowhere.
    """
    at, stop, whole = 0, 0, False  # stop: end of the latest row of capitals; if it ends its run
    for document in range(starts.size - 1):
        begin, end = starts[document], starts[document + 1]
        for i in range(begin, end):
            value = text[i]
            if np.uint8(value - ord("A")) < 26:
                first = i >= stop
                if first:
                    stop = i + 1
                    while stop < end and np.uint8(text[stop] - ord("A")) < 26:
                        stop += 1
                    whole = stop > i + 1 and not (
                        stop < end and np.uint8(text[stop] - ord("a")) < 26)
                if first or not whole:
                    out[at] = RUN_MARK if whole else NEXT_MARK
                    if i > begin and text[i - 1] == SPACE:
                        out[at - 1], out[at] = out[at], SPACE
                    at += 1
                value += SPACE
            elif value >= RUN_MARK:
                return i
            out[at] = value
            at += 1
        ends[document] = at
    return -1


def _restore_kernel(marked, starts, out, ends):
    """Write the documents without marks to out, ends[k] the end of document k."""
    at = 0
    for document in range(starts.size - 1):
        mark, inside = 0, False  # the mark that counts; if its run of letters has begun
        for i in range(starts[document], starts[document + 1]):
            value = marked[i]
            if value >= RUN_MARK:
                mark, inside = value, False
                continue
            if mark:
                if np.uint8(value - ord("a")) < 26:
                    value -= SPACE
                    mark, inside = (mark if mark == RUN_MARK else 0), True
                elif inside or value != SPACE:
                    mark = 0
            out[at] = value
            at += 1
        ends[document] = at


def mark_capitals(text: Documents) -> Documents:
    """Documents with a to z for A to Z, and marks, bytes that no UTF-8 text contains.

    Where a run of ASCII letters ends with two or more capitals, 0xFE stands before these; 0xFF
    stands before each other capital. If a space precedes the letter, the mark precedes the space.
    With > for 0xFF and ^ for 0xFE: "A NASA pART, ABc" becomes ">a^ nasa p^art,> a>bc". Each text
    has one such form. InputError for text that contains 0xFE or 0xFF.
    """
    out, ends = np.empty(2 * text.values.size, dtype=np.uint8), np.zeros_like(text.starts)
    wrong = compiled(_mark_kernel)(*text, out, ends[1:])
    if wrong >= 0:
        document = int(np.searchsorted(text.starts, wrong, "right")) - 1
        raise InputError(
            f"document {document} of a block has the byte 0x{text.values[wrong]:02X} at "
            f"{wrong - text.starts[document]}, which is a mark of case: ascii and occurs in no "
            "UTF-8 text; give text, or do without case")
    return Documents(out[:ends[-1]], ends)


def restore_capitals(marked: Documents) -> Documents:
    """The inverse of `mark_capitals`; elsewhere a mark that no letter follows has no effect."""
    out, ends = np.empty_like(marked.values), np.zeros_like(marked.starts)
    compiled(_restore_kernel)(*marked, out, ends[1:])
    return Documents(out[:ends[-1]], ends)


# --- tokenizers -----------------------------------------------------------------------------

COUNTS = ("tokens", "documents", "source_bytes", "decoded_bytes", "bad_documents")


class Encoded(NamedTuple):
    """Ids of documents, and per document source bytes, decoded bytes, and 1 if these differ."""

    ids: Documents
    sizes: np.ndarray  # int64 [3, documents]

    def counts(self) -> dict[str, int]:
        """What these documents add to the ledger."""
        values = self.ids.values.size, self.sizes.shape[1], *self.sizes.sum(axis=1)
        return dict(zip(COUNTS, map(int, values), strict=True))

    def documents(self, first: int, last: int) -> Encoded:
        """Only the documents first..last-1."""
        starts = self.ids.starts[first:last + 1]
        ids = Documents(self.ids.values[starts[0]:starts[-1]], starts - starts[0])
        return Encoded(ids, self.sizes[:, first:last])


def compare(ids: Documents, source: Documents, decoded: Documents) -> Encoded:
    """Compare decoded documents with their source, byte by byte."""
    bad = np.zeros(source.starts.size - 1, dtype=np.bool_)
    if not all(map(np.array_equal, source, decoded)):
        bad[:] = [not np.array_equal(*pair)
                  for pair in zip(source.split(), decoded.split(), strict=True)]
    return Encoded(ids, np.stack([np.diff(source.starts), np.diff(decoded.starts), bad]))


class Tokenizer:
    """What the jobs need: the tokenizer's file, its ids, and `encode_documents`."""

    kind, status = "tokenmonster", "exact"
    base_bytes: np.ndarray | None = None  # int16 [V], for meta.npz

    def __init__(self, source: Vocabulary | SentencePieceModel):
        """The vocabulary or model of which the tokenizer is made."""
        self.name, self.data, self.sha256 = source.name, source.data, source.sha256
        self.vocab_size, self.bos_id = source.vocab_size, source.bos_id


class Segmenter(Tokenizer):
    """The exact segmentation for a byte-exact TokenMonster vocabulary."""

    def __init__(self, vocabulary: Vocabulary):
        """Build the tables; InputError when the vocabulary is not byte-exact."""
        require(not vocabulary.lossy,
                f"{vocabulary.name}: refused: not byte-exact: {vocabulary.lossy}. No per-token "
                "byte count can be right for it, so no BPB either. Use a byte-exact vocabulary "
                "(scylla.yaml or --build-vocab), or pass --allow-lossy to go on and see how many "
                "documents are wrong")
        super().__init__(vocabulary)
        keys = {token: identity for identity, token in enumerate(vocabulary.tokens) if token}
        self.table, self.classes = token_table(self.vocab_size, keys), byte_classes(keys)
        self.follow, self.automaton = follow_scores(self.table), suffix_automaton(keys)
        self.pieces, self.base_bytes = PieceTable(vocabulary.tokens), vocabulary.base_bytes
        self.marked = vocabulary.marked

    def longest(self, text: Documents) -> np.ndarray:
        """uint16 [bytes]: longest token at each position that ends within its document."""
        found = np.empty(text.values.size, dtype=np.uint16)
        compiled(_longest_kernel)(*text, self.automaton, found)
        return found

    def segment(self, text: Documents) -> Documents:
        """Ids of documents of text."""
        if self.marked:
            text = mark_capitals(text)
        ids = np.empty(text.values.size + text.starts.size, dtype=np.uint16)
        count = compiled(_choose_kernel)(*text, self.longest(text), self.table, self.follow,
                                         self.classes, ids)
        return Documents.after_bos(ids[:count], self.bos_id)

    def decode(self, ids: Documents) -> Documents:
        """The text of documents of ids."""
        text = self.pieces.join(ids)
        return restore_capitals(text) if self.marked else text

    def encode(self, text: bytes) -> list[int]:
        """Ids of one document, without BOS."""
        return self.segment(Documents.joined([text])).values[1:].tolist()

    def encode_documents(self, text: Documents) -> Encoded:
        """Ids of documents of text; InputError if one decodes differently or is counted wrong."""
        ids = self.segment(text)
        block = compare(ids, text, self.decode(ids))
        wrong = block.sizes[2]
        if self.marked:  # elsewhere a token's bytes are what is joined
            counted = np.add.reduceat(self.base_bytes[ids.values], ids.starts[:-1], dtype=np.int64)
            wrong = wrong | (counted != block.sizes[0])
        for bad in np.flatnonzero(wrong):
            raise InputError(f"document {bad} of a block does not decode to its source with "
                             f"{self.name}, or is not counted so; nothing is published: report "
                             "this")
        return block


class SentencePieceModel:
    """A SentencePiece model, and a table whose text equals that of its `sp.decode`."""

    def __init__(self, path: Path | str):
        """Load the model; InputError when it is missing or unreadable."""
        require(Path(path).is_file(),
                f"{path}: no such SentencePiece model; give --sp-model a .model file")
        self.name, self.data = Path(path).name, Path(path).read_bytes()
        self.sha256 = hashlib.sha256(self.data).hexdigest()
        with needs("sentencepiece"):
            import sentencepiece
        try:
            self.processor = sp = sentencepiece.SentencePieceProcessor(model_proto=self.data)
        except RuntimeError as error:
            raise InputError(f"{path}: not a SentencePiece model ({error}); fetch it "
                             "again") from None
        self.vocab_size, self.bos_id = sp.get_piece_size(), sp.bos_id()
        require(self.bos_id >= 0 and self.vocab_size <= MAX_IDS,
                f"{path}: the model has bos id {self.bos_id} and {self.vocab_size} ids; it needs "
                f"a bos and at most {MAX_IDS} ids")
        self.table = self._probed_table()

    def pieces(self, unknown: bytes, control: bytes) -> tuple[list[bytes], np.ndarray]:
        """(bytes, whether with a leading space) of each id, BOS without any."""
        sp, pieces, spaced = self.processor, [], np.zeros(self.vocab_size, dtype=np.bool_)
        for k in range(self.vocab_size):
            text = sp.id_to_piece(k)
            if sp.is_byte(k):
                pieces.append(bytes([int(text[3:5], 16)]))
            elif sp.is_unknown(k) or sp.is_control(k):
                pieces.append(unknown if sp.is_unknown(k) else control * (k != self.bos_id))
            else:
                spaced[k] = text.startswith(SPACE_MARK)
                pieces.append(text.replace(SPACE_MARK, " ").encode())
        return pieces, spaced

    def _probed_table(self) -> PieceTable:
        """A table that gives the text of `sp.decode`, or bytes that are not UTF-8: see `decode`.

        Probed: each piece alone, after itself, after a space and after a piece without space.
        """
        sp, space, none = self.processor, self.processor.piece_to_id(SPACE_MARK), b"\xff"
        pieces, spaced = self.pieces(sp.decode([sp.unk_id()]).encode(), none)
        inner = max(k for k, piece in enumerate(pieces)
                    if piece not in (b"", none) and not spaced[k] and not sp.is_byte(k))
        probes = [probe for k in range(self.vocab_size)
                  for probe in ([k], [k, k], [inner, k], [space, k], [space, space, k])]
        ids = Documents(np.array(list(itertools.chain(*probes)), dtype=np.uint16),
                        np.cumsum([0] + [len(probe) for probe in probes]))
        expected = sp.decode(probes)
        for strip in (EVERY, 1, 0):
            table = PieceTable(pieces, spaced, strip)
            if all(text.tobytes() == wanted.encode() or not is_utf8(text)
                   for text, wanted in zip(table.join(ids).split(), expected, strict=True)):
                return table
        return PieceTable([none] * self.vocab_size)

    def decode(self, ids: Documents) -> Documents:
        """Source text: `sp.decode` of each document, asked where the table's bytes are no UTF-8."""
        text = self.table.join(ids)
        first = text.values[text.starts[text.starts < text.values.size]]
        if is_utf8(text.values) and not (first & 0xC0 == 0x80).any():
            return text
        return Documents.joined([
            part.tobytes() if is_utf8(part) else self.processor.decode(own.tolist()).encode()
            for part, own in zip(text.split(), ids.split(), strict=True)])


# --- input shards ---------------------------------------------------------------------------

HEADER_BYTES, SHARD_MAGIC, SHARD_VERSION = 256 * 4, 20240520, 1
BLOCK_IDS = 1 << 16  # ids handled at once: text and ids of a block stay in the cache
SHARD_NAME = re.compile(r"(.*?)(\d+)\.bin")


def open_shard(path: Path) -> np.ndarray:
    """Memory-mapped uint16 ids of a shard; InputError when header and length disagree."""
    with file_errors(f"read {path}"):
        there = path.stat().st_size - HEADER_BYTES
        require(there >= 0, f"{path}: truncated: {there + HEADER_BYTES} bytes are less than the "
                f"{HEADER_BYTES} of a shard header; fetch the file again")
        magic, version, tokens = np.fromfile(path, "<i4", 3).tolist()
        require((magic, version) == (SHARD_MAGIC, SHARD_VERSION),
                f"{path}: magic {magic} and version {version} are not the {SHARD_MAGIC} and "
                f"{SHARD_VERSION} of a token shard; check --sp-shards")
        require(there == 2 * tokens, f"{path}: {'truncated' if there < 2 * tokens else 'too long'}"
                f": the header counts {tokens} tokens, {2 * tokens} bytes, the file holds {there} "
                "bytes of them; fetch the file again")
        require(tokens, f"{path}: empty source: the shard has no tokens; remove or fetch it again")
        return np.memmap(path, "<u2", "r", offset=HEADER_BYTES)


def find_shards(patterns: list[str]) -> list[Path]:
    """Input shards of paths and globs, in name order, checked for duplicate names and gaps."""
    found: set[Path] = set()
    for pattern in patterns:
        paths = [pattern] if os.path.exists(pattern) else glob.glob(pattern)
        require(paths, f"--sp-shards {pattern}: empty source: no file matches; check the path")
        found.update(map(Path, paths))
    ordered = sorted(found, key=lambda path: (path.name, path))
    for before, path in itertools.pairwise(ordered):
        require(before.name != path.name, f"duplicate shard name {path.name}: {before} and {path} "
                "would write the same output; narrow --sp-shards")
        require(follows(before, path) is not False, f"{path}: the shard before it is missing "
                f"({before.name} is the last one found); documents span shards, so fetch it")
    return ordered


def follows(before: Path, path: Path) -> bool | None:
    """True when `path` continues `before`, None when it starts another series, False on a gap."""
    left, right = SHARD_NAME.fullmatch(before.name), SHARD_NAME.fullmatch(path.name)
    if left is None or right is None or left[1] != right[1]:
        return None
    return int(right[2]) == int(left[2]) + 1


def whole_documents(paths: list[Path], index: int, bos: int) -> Iterator[Documents]:
    """Blocks of the documents that begin in a shard; the last is completed from those after it.

    InputError when the first shard of a series does not begin with BOS.
    """
    path, ids = paths[index], open_shard(paths[index])
    at, size = first_bos(ids, bos), BLOCK_IDS
    require(at == 0 or index and follows(paths[index - 1], path),
            f"{path}: the first id is {ids[0]}, not BOS ({bos}): the document that it belongs to "
            "began in an earlier shard; add the shards before it")
    while at < ids.size:
        window = ids[at:at + size]
        starts = np.flatnonzero(window == bos)
        last = int(starts[-1])  # of a document that may go on
        if last:
            yield Documents(window[:last], starts)
        if at + size >= ids.size:
            whole = np.concatenate([window[last:], *_continuation(paths, index, bos)])
            yield Documents(whole, np.array([0, whole.size]))
            return
        at, size = at + last, BLOCK_IDS if last else 2 * size


def first_bos(ids: np.ndarray, bos: int) -> int:
    """Position of the first BOS, or the number of ids."""
    for at in range(0, ids.size, BLOCK_IDS):
        found = np.flatnonzero(ids[at:at + BLOCK_IDS] == bos)
        if found.size:
            return at + int(found[0])
    return ids.size


def _continuation(paths: list[Path], index: int, bos: int) -> Iterator[np.ndarray]:
    """Ids at the beginning of the following shards that complete a shard's last document."""
    for before, path in itertools.pairwise(paths[index:]):
        if not follows(before, path):
            return
        ids = open_shard(path)
        end = first_bos(ids, bos)
        yield ids[:end]
        if end < ids.size:
            return


# --- output folder and ledger ---------------------------------------------------------------

LEDGER_FOLDER, META_NAME, MANIFEST = ".ledger", "scylla.meta.npz", "manifest.json"


class OutputFolder:
    """The output folder: every file in it appears whole, with a ledger entry for every shard.

    A shard is renamed into place before its entry is written, and the manifest is made from these
    at the end. Before a shard is made again, its entry and the manifest are removed. So whatever
    the manifest lists is whole, and a shard without an entry is made again.
    """

    def __init__(self, path: Path | str):
        """Create the folder and clear it of dead runs; InputError when it cannot be written."""
        self.path, self.ledger = Path(path), Path(path) / LEDGER_FOLDER
        with file_errors(f"write the output folder {path}"):
            self.ledger.mkdir(parents=True, exist_ok=True)
            self.clean()

    def clean(self) -> None:
        """Remove the partial files that no live process holds."""
        for path in self.ledger.glob("*.part"):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()

    @contextlib.contextmanager
    def atomic(self, target: Path) -> Iterator[IO[bytes]]:
        """A file that appears at `target` when the block ends, or not at all; till then locked."""
        with file_errors(f"write {target}"):
            path = None
            while path is None or not path.exists():  # `clean` may come before the lock
                handle, name = tempfile.mkstemp(".part", target.name + ".", self.ledger)
                fcntl.flock(handle, fcntl.LOCK_EX)
                path = Path(name)
            try:
                with os.fdopen(handle, "r+b", buffering=1 << 20) as file:
                    os.fchmod(handle, 0o644)
                    yield file
                    file.flush()
                    os.fsync(handle)
                    path.replace(target)
            except BaseException:
                path.unlink(missing_ok=True)
                raise

    def put(self, name: str, data: bytes | dict) -> None:
        """Write a small file of the folder; a dictionary becomes JSON."""
        if isinstance(data, dict):
            data = (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()
        if (self.path / name).is_file() and (self.path / name).read_bytes() == data:
            return
        with self.atomic(self.path / name) as file:
            file.write(data)

    def entry(self, name: str) -> dict | None:
        """Ledger entry of a shard that is there with the right length, otherwise None."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            entry = json.loads((self.ledger / f"{name}.json").read_bytes())
            if (self.path / name).stat().st_size == HEADER_BYTES + 2 * entry["tokens"]:
                return entry
        return None

    def entries(self) -> dict[str, dict]:
        """All ledger entries by shard name."""
        return {path.stem: entry for path in sorted(self.ledger.glob("*.bin.json"))
                if (entry := self.entry(path.stem))}

    def forget(self, name: str) -> None:
        """Remove the entry of a shard that will be made again or removed, then the manifest."""
        for path in (self.ledger / f"{name}.json", self.path / MANIFEST):
            path.unlink(missing_ok=True)

    def finished(self, name: str, identity: dict) -> dict | None:
        """The entry of a shard that is there, whole, and made by the same work; otherwise None."""
        entry = self.entry(name)
        with contextlib.suppress(InputError):  # another run has just removed it
            if entry and entry["identity"] == identity and (
                    file_sha256(self.path / name) == entry["sha256"]):
                return entry
        return None

    def write_shard(self, name: str, blocks: Iterable[Encoded], status: str,
                    identity: Callable[[], dict]) -> dict[str, int]:
        """Make a shard, and its entry; returns its counts. Equal `identity` gives equal bytes."""
        self.forget(name)
        counts = dict.fromkeys(COUNTS, 0)
        with self.atomic(self.path / name) as file:
            file.write(bytes(HEADER_BYTES))
            for block in blocks:
                file.write(np.ascontiguousarray(block.ids.values, dtype="<u2"))
                for key, value in block.counts().items():
                    counts[key] += value
            file.seek(0)
            file.write(np.array([SHARD_MAGIC, SHARD_VERSION, counts["tokens"]], dtype="<i4"))
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.put(f"{LEDGER_FOLDER}/{name}.json", {
            **counts, "sha256": digest, "identity": identity(),
            "status": "lossy" if counts["bad_documents"] else status})
        return counts

    def publish(self, tokenizer: Tokenizer) -> dict[str, int]:
        """Write tokenizer, byte table and manifest; returns the totals."""
        self.put(tokenizer.name, tokenizer.data)
        if tokenizer.base_bytes is not None:
            boundary, table = np.arange(tokenizer.vocab_size) == tokenizer.bos_id, io.BytesIO()
            np.savez(table, format_version=np.int64(1), tokenizer_kind=np.str_(tokenizer.kind),
                     source_model_name=np.str_(tokenizer.name),
                     vocab_size=np.int64(tokenizer.vocab_size), base_bytes=tokenizer.base_bytes,
                     is_boundary_token=boundary, has_leading_space=np.zeros_like(boundary))
            self.put(META_NAME, table.getvalue())
        entries = None
        while entries != (now := self.entries()):  # again if another rank's came meanwhile
            entries = now
            for shard, entry in entries.items():
                require(entry["identity"]["tokenizer_sha256"] == tokenizer.sha256, f"{shard}: was "
                        "made with another vocabulary meanwhile; run again with --overwrite")
            manifest = build_manifest(tokenizer, entries)
            self.put(MANIFEST, manifest)
        return manifest["totals"]["all"]


def build_manifest(tokenizer: Tokenizer, entries: dict[str, dict]) -> dict:
    """The manifest of a folder: tokenizer, source, per-shard ledger and totals per split."""
    totals = {split: dict.fromkeys(COUNTS, 0) for split in ("train", "val", "all")}
    sources = []
    for name, entry in entries.items():
        source = {key: entry["identity"][key] for key in ("kind", "model_sha256")}
        sources += [source] if source not in sources else []
        split = "val" if "val" in re.split(r"[^a-z]+", name) else "train"
        for part, key in itertools.product((split, "all"), COUNTS):
            totals[part][key] += entry[key]
    about = {key: getattr(tokenizer, key) for key in ("kind", "sha256", "vocab_size", "bos_id")}
    about |= {"path": tokenizer.name, "byte_exact": tokenizer.status == "exact"}
    source = sources[0] if len(sources) == 1 else {"kind": "mixed", "sources": sources}
    return {"format": 1, "tokenizer": about, "source": source, "shards": entries, "totals": totals}


# --- workers --------------------------------------------------------------------------------


def on_signals(handler: Any) -> None:
    """What Ctrl-C and SIGTERM do."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, handler)


def raise_stopped(number: int, _frame: Any) -> None:
    """Raise Stopped once; further signals do not disturb the clean-up."""
    on_signals(signal.SIG_IGN)
    raise Stopped(number)


class Worker:
    """A worker process: what it does with a task, and the event that tells it to give up."""

    function: Callable
    given_up = threading.Event()

    @classmethod
    def start(cls, function: Callable, given_up: Any) -> None:
        """Leave Ctrl-C to the parent, and end when it has ended, however that was."""
        on_signals(signal.SIG_DFL)  # SIGTERM is the executor's way to end us
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        cls.function, cls.given_up = staticmethod(function), given_up
        threading.Thread(daemon=True, target=lambda: (
            multiprocessing.parent_process().join(), os._exit(1))).start()

    @classmethod
    def do(cls, task: Any) -> Any:
        """Called in the process."""
        return cls.function(task)


def process_map(function: Callable, tasks: Iterable, workers: int) -> Iterator:
    """function(task) in task order from `workers` processes, which suit small tasks and answers."""
    if workers <= 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    given_up = context.Event()
    pool = ProcessPoolExecutor(workers, context, Worker.start, (function, given_up))
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))  # amid a fork
        answers = pool.map(Worker.do, tasks)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        yield from answers
    except BrokenProcessPool:
        raise InputError(f"one of {workers} worker processes died (often of too little memory): "
                         "use fewer --workers and run again: finished shards are kept") from None
    finally:
        given_up.set()
        pool.shutdown(cancel_futures=True)


def thread_map(function: Callable, tasks: Iterable, workers: int) -> Iterator:
    """function(task) in task order from `workers` threads; tasks are drawn as they are needed."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for task in tasks:
            waiting.append(pool.submit(function, task))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Progress:
    """Lines on stderr about work whose total is known, in ids or in bytes of files."""

    interval = 5.0  # seconds between two lines

    def __init__(self, total: int, skipped: int):
        """`total` is what is left to do; the finished shards are told of once."""
        self.total, self.documents, self.bytes = total, 0, 0
        self.begin = self.latest = time.monotonic()
        if skipped:
            print(f"skipped: {skipped} finished shard(s)", file=sys.stderr, flush=True)

    def add(self, counts: dict[str, int], done: int) -> None:
        """Count finished documents; `done` of the total is done with them."""
        self.documents += counts["documents"]
        self.bytes += counts["source_bytes"]
        if time.monotonic() - self.latest >= self.interval:
            self.report(min(done / max(1, self.total), 0.999))

    def report(self, share: float = 1.0) -> None:
        """Print a line; the last one when the whole share is done."""
        self.latest = time.monotonic()
        seconds = max(self.latest - self.begin, 1e-9)
        print(f"progress: {100 * share:.1f}% {self.bytes / 1e6:.1f} MB {self.documents} documents "
              f"{self.bytes / 1e6 / seconds:.1f} MB/s {self.documents / seconds:.0f} documents/s "
              + (f"eta:{seconds * (1 - share) / max(share, 1e-9):.0f}s" if share < 1
                 else f"took:{seconds:.1f}s"), file=sys.stderr, flush=True)


def rank_and_world() -> tuple[int, int]:
    """torchrun's RANK and WORLD_SIZE, (0, 1) without it."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    require(rank.isdigit() and world.isdigit() and int(rank) < int(world),
            f"RANK={rank} and WORLD_SIZE={world} do not fit: RANK must be a number from 0 to "
            "WORLD_SIZE - 1; unset both to run on one machine")
    return int(rank), int(world)


def default_workers() -> int:
    """The cores this process may use, shared with torchrun's other processes on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


# --- jobs -----------------------------------------------------------------------------------


class Job:
    """Shards made with one tokenizer, from what `origin` says, into one folder."""

    def __init__(self, folder: OutputFolder, tokenizer: Tokenizer, makes: Callable[[str], bool],
                 **origin: Any):
        """`makes` tells the job's shards by name; `origin` goes into the ledger."""
        self.folder, self.tokenizer, self.makes = folder, tokenizer, makes
        self.origin = {"tokenizer_sha256": tokenizer.sha256, **origin}

    def make_room(self, overwrite: bool) -> None:
        """InputError when shards were made otherwise (others' with another tokenizer)."""
        names = {self.tokenizer.sha256: f"{self.tokenizer.name} ({self.tokenizer.sha256})"}
        with contextlib.suppress(OSError, ValueError, KeyError):
            about = json.loads((self.folder.path / MANIFEST).read_bytes())["tokenizer"]
            names.setdefault(about["sha256"], f"{about['path']} ({about['sha256']})")
        for name, entry in self.folder.entries().items():
            keys = self.origin if self.makes(name) else ["tokenizer_sha256"]
            both = [(key, entry["identity"].get(key), self.origin[key]) for key in keys]
            told = "; ".join(f"{key} {names.get(old, old)}, now {names.get(new, new)}"
                             for key, old, new in both if old != new)
            require(not told or overwrite, f"{self.folder.path / name} was made otherwise: {told}. "
                    "Choose another --output-dir, or pass --overwrite to remove such shards")
            if told:
                self.folder.forget(name)
                (self.folder.path / name).unlink(missing_ok=True)


class ShardJob(Job):
    """Re-tokenize SentencePiece shards: one output shard for each, with the same name."""

    def __init__(self, folder: OutputFolder, tokenizer: Tokenizer, paths: list[Path],
                 model: SentencePieceModel, rank: int = 0, world: int = 1):
        """All shards are needed, since documents cross them; a rank makes its share of them."""
        super().__init__(folder, tokenizer, {path.name for path in paths}.__contains__,
                         kind="sp-shards", model_sha256=model.sha256)
        self.paths, self.model = paths, model
        self.indices = range(rank, len(paths), world)

    def run(self, workers: int) -> tuple[int, int]:
        """Make the shards that are not finished; returns how many were made, and how many not."""
        for index in self.indices:
            next(self.documents(index), None)  # its errors come before any work
        known = [index for index in self.indices if self.folder.entry(self.paths[index].name)]
        finished = set(itertools.compress(known, process_map(self.is_finished, known, workers)))
        left = {k: open_shard(self.paths[k]).size for k in self.indices if k not in finished}
        progress = Progress(sum(left.values()), len(finished))
        for done, counts in zip(itertools.accumulate(left.values()),
                                process_map(self.make, left, min(workers, len(left))), strict=True):
            progress.add(counts, done)
        if left:
            progress.report()
        return len(left), len(finished)

    def documents(self, index: int) -> Iterator[Documents]:
        """Blocks of the documents that begin in a shard."""
        return whole_documents(self.paths, index, self.model.bos_id)

    def is_finished(self, index: int) -> bool:
        """Whether a shard is there, whole, and made from the source as it is now."""
        digest = hashlib.sha256()
        for ids in self.documents(index):
            digest.update(ids.values)
        identity = dict(self.origin, source_sha256=digest.hexdigest())
        return self.folder.finished(self.paths[index].name, identity) is not None

    def make(self, index: int) -> dict[str, int]:
        """Make one shard, in any process; returns its counts."""
        name, digest = self.paths[index].name, hashlib.sha256()
        try:
            return self.folder.write_shard(
                name, self.blocks(index, digest), self.tokenizer.status,
                lambda: dict(self.origin, source_sha256=digest.hexdigest()))
        except InputError as error:
            where = "" if name in str(error) else f"{self.paths[index]}: "
            raise InputError(f"{where}{error}") from None

    def blocks(self, index: int, digest) -> Iterator[Encoded]:
        """What a shard is to hold; `digest` takes the SHA-256 of the source."""
        for ids in self.documents(index):
            if Worker.given_up.is_set():
                raise Stopped
            digest.update(ids.values)
            yield self.tokenizer.encode_documents(self.model.decode(ids))


BLOCK_BYTES, SHARD_TOKENS = 1 << 20, 100_000_000


def in_blocks(documents: Iterable[bytes]) -> Iterator[Documents]:
    """Documents, together of about BLOCK_BYTES."""
    block, size = [], 0
    for document in documents:
        block.append(document)
        size += len(document) + 1
        if size >= BLOCK_BYTES:
            yield Documents.joined(block)
            block, size = [], 0
    if block:
        yield Documents.joined(block)


class DocumentJob(Job):
    """Tokenize documents into shards of at least `shard_tokens` tokens (the last one has the rest).

    A shard ends with the document that reaches the size, so that documents never span shards.
    """

    def __init__(self, folder: OutputFolder, tokenizer: Tokenizer, reader: Any,
                 split: str, shard_tokens: int = SHARD_TOKENS):
        """`reader` is of records/documents.py. Shards are called fineweb_{split}_{number}.bin."""
        self.reader, self.prefix, self.shard_tokens = reader, f"fineweb_{split}_", shard_tokens
        digests = "".join(map(file_sha256, reader.paths)).encode()
        super().__init__(
            folder, tokenizer, lambda name: name.startswith(self.prefix), kind="docs",
            model_sha256=tokenizer.sha256 if tokenizer.kind == "sentencepiece" else None,
            source_sha256=hashlib.sha256(digests).hexdigest(), shard_tokens=shard_tokens)

    def run(self, workers: int) -> tuple[int, int]:
        """Make all shards after the finished ones; returns how many were made, and how many not."""
        done = skip = made = 0
        while entry := self.folder.finished(
                self.name(done), dict(self.origin, first_document=skip)):
            skip, done = skip + entry["documents"], done + 1
        documents = self.reader.documents(skip)
        self.progress = Progress(self.reader.total - self.reader.position, done)
        blocks = thread_map(self.tokenizer.encode_documents, in_blocks(documents), workers)
        for _, pieces in itertools.groupby(self.pieces(blocks), lambda piece: piece[0]):
            skip += self.folder.write_shard(
                self.name(done + made), (piece for _, piece in pieces), self.tokenizer.status,
                functools.partial(dict, self.origin, first_document=skip))["documents"]
            made += 1
        require(skip, f"{self.reader.paths[0]}: empty source: no documents; check --docs")
        if made:
            self.progress.report()
        return made, done

    def name(self, number: int) -> str:
        """File name of a shard."""
        return f"{self.prefix}{number:06d}.bin"

    def pieces(self, blocks: Iterator[Encoded]) -> Iterator[tuple[int, Encoded]]:
        """Blocks cut where a shard is full, each piece with the number of its shard."""
        number, room, skipped = 0, self.shard_tokens, self.reader.position
        for block in blocks:
            self.progress.add(block.counts(), self.reader.position - skipped)
            starts, first = block.ids.starts, 0
            while first < starts.size - 1:
                last = min(int(np.searchsorted(starts, starts[first] + room)), starts.size - 1)
                yield number, block.documents(first, last)
                first, room = last, room - (starts[last] - starts[first])
                if room <= 0:
                    number, room = number + 1, self.shard_tokens


# --- command line ---------------------------------------------------------------------------


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; contradictions are reported with the usage."""
    parser = argparse.ArgumentParser(
        description="Re-tokenize SentencePiece shards or documents, byte for byte exact. "
        "RANK and WORLD_SIZE spread the shards over machines.",
        epilog="To build a vocabulary: --build-vocab N --help.")
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True).add_argument
    source("--sp-shards", metavar="FILE", nargs="+",
        help="input shards, paths or patterns; one output shard each, with the same name")
    source("--docs", metavar="FILE", nargs="+", type=Path,
        help="JSON lines with \"text\" instead of shards (.jsonl, .gz, .xz, .zst)")
    add("--split", choices=("train", "val"), default="train", help="what --docs are (train)")
    add("--shard-tokens", metavar="N", type=positive, default=SHARD_TOKENS,
        help="tokens per shard with --docs (100000000)")
    add("--sp-model", metavar="MODEL", help="of the input shards, or to make shards of --docs with")
    add("--vocab", metavar="FILE", help="TokenMonster vocabulary, YAML")
    add("--output-dir", metavar="DIR", type=Path, required=True, help="where all of it goes")
    add("--overwrite", action="store_true", help="remove shards that were made otherwise")
    add("--workers", metavar="N", type=positive, help="processes; threads with --docs (all cores)")
    add("--allow-lossy", action="store_true", help="go on, and count what is not byte-exact")
    add("--bench", action="store_true", help="time --sp-shards into a scratch folder")
    options = parser.parse_args(arguments)
    if options.sp_shards and not (options.sp_model and options.vocab):
        parser.error("--sp-shards needs --sp-model and --vocab")
    if options.docs and bool(options.vocab) == bool(options.sp_model):
        parser.error("--docs needs one of --vocab, --sp-model and --build-vocab")
    if options.bench and not options.sp_shards:
        parser.error("--bench needs --sp-shards")
    return options


def make_job(options: argparse.Namespace) -> Job:
    """What the command line asks for; InputError before the output folder is touched."""
    rank, world = rank_and_world()
    model = SentencePieceModel(options.sp_model) if options.sp_model else None
    vocabulary = load_vocabulary(options.vocab) if options.vocab else None
    if vocabulary and not (vocabulary.lossy and options.allow_lossy):
        tokenizer = Segmenter(vocabulary)
    else:
        from records import other_tokenizers as other

        tokenizer = (other.LossyTokenizer(vocabulary) if vocabulary
                     else other.SentencePieceTokenizer(model))
    if options.docs:
        from records.documents import DocumentReader

        reader = DocumentReader(options.docs)
        return DocumentJob(OutputFolder(options.output_dir), tokenizer, reader, options.split,
                           options.shard_tokens)
    paths = find_shards(options.sp_shards)
    require(options.output_dir.resolve() not in [path.resolve().parent for path in paths],
            f"{options.output_dir}: --output-dir is the folder of the input, whose shards it would "
            "replace; choose another")
    return ShardJob(OutputFolder(options.output_dir), tokenizer, paths, model, rank, world)


def run(options: argparse.Namespace) -> None:
    """Tokenize documents, or re-tokenize shards, or time that."""
    if options.docs and rank_and_world()[0]:
        print("documents are one stream: rank 0 makes the shards", file=sys.stderr)
        return
    job = make_job(options)
    workers = 1 if job.tokenizer.status == "lossy" else options.workers or default_workers()
    if options.bench:
        from records.retokenizer_bench import bench

        return bench(job, workers)
    job.make_room(options.overwrite)
    try:
        made, skipped = job.run(workers)
        totals = job.folder.publish(job.tokenizer)
    finally:
        job.folder.clean()  # of files that died with a worker, or with a signal before their guard
    drift = totals["decoded_bytes"] - totals["source_bytes"]
    print(f"{options.output_dir}: {made} made, {skipped} skipped; "
          + " ".join(f"{key}:{totals[key]}" for key in COUNTS)
          + f" drift:{drift} {'NOT EXACT' if drift or totals['bad_documents'] else 'exact'}")


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit code: 0, 1 after an error, 128 + signal when stopped."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parse, work = parse_arguments, run
    if any(argument.split("=")[0] == "--build-vocab" for argument in arguments):
        from records import vocabulary

        parse, work = vocabulary.parse_arguments, vocabulary.run
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # --help into `head`, say
    options = parse(arguments)
    signal.signal(signal.SIGPIPE, before)
    on_signals(raise_stopped)
    try:
        with file_errors("go on"):
            work(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        print("stopped: finished shards are kept; run again to go on", file=sys.stderr)
        return 128 + int(stop.args[0])
    return 0


if __name__ == "__main__":
    import retokenize_scylla  # the module that records/ imports, too

    sys.exit(retokenize_scylla.main())
