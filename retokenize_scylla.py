"""Re-tokenize FineWeb SentencePiece shards (or documents) to a byte-exact TokenMonster vocabulary.

Sections: errors and files, vocabulary, segmenter, SentencePiece, shards, ledger, jobs, workers,
vocabulary builder, demo data, bench, command line. Nothing runs at import.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import errno
import fcntl
import functools
import glob
import gzip
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import lzma
import multiprocessing
import multiprocessing.connection
import os
import re
import resource
import shutil
import signal
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import numpy as np

# --- errors and files -----------------------------------------------------------------------


class InputError(ValueError):
    """A mistake of the user or of the data: the text names the file, the value and the remedy."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with the signal's number."""


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def stream_sha256(file: IO[bytes]) -> str:
    """Hexadecimal SHA-256 of an open file, from its beginning."""
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with file_errors(f"read {path}"), open(path, "rb") as file:
        return stream_sha256(file)


@contextlib.contextmanager
def file_errors(action: str) -> Iterator[None]:
    """Turn an OSError of the block into an InputError that says what failed and what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = ("make room and run again: finished shards are kept" if full
                  else "check the path and its permissions")
        raise InputError(f"cannot {action}: {error.strerror or error}; {remedy}") from None


# --- vocabulary -----------------------------------------------------------------------------

MAX_TOKEN_BYTES = 40
MAX_IDS = 65536
HEX_TOKEN = re.compile(r"TokenMonsterHexEncode\{((?:[0-9a-fA-F]{2})*)\}")
YAML_ESCAPES = {
    "0": "\0", "a": "\a", "b": "\b", "t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r",
    "e": "\x1b", " ": " ", '"': '"', "/": "/", "\\": "\\", "N": "\x85", "_": "\xa0",
    "L": "\u2028", "P": "\u2029",
}
YAML_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))")
YAML_LINE = re.compile(r" *(- +)?([A-Za-z][A-Za-z-]*):(?: +(.*?))? *")
CHARSETS = {0: "none", 1: "UTF-8", 2: "UTF-16"}


@dataclass(frozen=True)
class Vocabulary:
    """Token bytes by id (b"" for dead ids and BOS); `lossy` says why it is not byte-exact."""

    name: str
    data: bytes
    tokens: tuple[bytes, ...]
    lossy: str = ""
    charset: str = "none"
    binary: bool = False

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the vocabulary file."""
        return sha256_bytes(self.data)

    @property
    def vocab_size(self) -> int:
        """Number of ids, the synthetic BOS included."""
        return len(self.tokens)

    @property
    def bos_id(self) -> int:
        """The zero-byte BOS: always the last id."""
        return len(self.tokens) - 1

    def base_bytes(self) -> np.ndarray:
        """int16 [V]: bytes each id stands for, 0 for dead ids and BOS."""
        return np.array([len(token) for token in self.tokens], dtype=np.int16)


def load_vocabulary(source: Path | str | bytes, name: str = "vocabulary") -> Vocabulary:
    """Vocabulary from a TokenMonster YAML or binary file, or from the bytes of one."""
    if isinstance(source, bytes):
        data = source
    else:
        path, name = Path(source), str(source)
        if not path.is_file():
            raise InputError(f"{path}: no such vocabulary file; give --vocab a TokenMonster YAML")
        data = path.read_bytes()
    if len(data) > 20 and data[0] <= 2:
        return _binary_vocabulary(data, name)
    return _yaml_vocabulary(data, name)


def _binary_vocabulary(data: bytes, name: str) -> Vocabulary:
    """Recognise the binary format by its header; only its size and settings are read."""
    size = int.from_bytes(data[11:14], "little")
    charset = CHARSETS.get(data[1])
    if charset is None or not 0 < size < MAX_IDS:
        raise InputError(
            f"{name}: unknown vocabulary: not a TokenMonster YAML, and its binary header says "
            f"capcode {data[0]}, charset {data[1]}, {size} tokens; give the vocabulary as YAML"
        )
    normal = "NFD" if data[2] & 1 else ("none" if data[2] == 0 else f"flags {data[2]}")
    reason = (
        f"binary vocabulary of {size} tokens with capcode {data[0]}, charset {charset}, "
        f"normalization {normal}"
    )
    return Vocabulary(Path(name).name, data, (b"",) * (size + 1), reason, charset, binary=True)


def _yaml_vocabulary(data: bytes, name: str) -> Vocabulary:
    """Read the YAML that TokenMonster writes; the entry later in the file wins a byte string."""
    settings, entries = _parse_yaml(data, name)
    ids = [identity for _, identity in entries]
    if not entries or sorted(ids) != list(range(len(ids))) or len(ids) >= MAX_IDS:
        raise InputError(
            f"{name}: unknown vocabulary: {len(ids)} tokens whose ids must be 0..{len(ids) - 1}, "
            f"each once, fewer than {MAX_IDS}; export it again with TokenMonster's exportvocab"
        )
    id_of = {token: identity for token, identity in entries if 0 < len(token) <= MAX_TOKEN_BYTES}
    tokens = [b""] * (len(ids) + 1)
    for token, identity in id_of.items():
        tokens[identity] = token
    return Vocabulary(Path(name).name, data, tuple(tokens), _lossy_reason(settings, id_of),
                      settings.get("charset", "none").lower())


def _lossy_reason(settings: dict[str, str], id_of: dict[bytes, int]) -> str:
    """Why a YAML vocabulary is not byte-exact; empty when it is."""
    wanted = {"capcode": "0", "charset": "none", "normalization": "none"}
    wrong = [f"{key} {settings.get(key, 'missing')}" for key, value in wanted.items()
             if settings.get(key, "").lower() != value]
    wrong += [f"{key} entries" for key in ("unk", "special", "deleted")
              if settings.get(key, "false") not in ("false", "[]", "null", "~")]
    missing = sum(bytes([value]) not in id_of for value in range(256))
    if missing:
        wrong.append(f"no token for {missing} of the 256 byte values")
    return ", ".join(wrong)


def _parse_yaml(data: bytes, name: str) -> tuple[dict[str, str], list[tuple[bytes, int]]]:
    """Top-level settings and (token bytes, id) in file order, from TokenMonster's YAML subset."""
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}: unknown vocabulary: neither a TokenMonster YAML (invalid UTF-8 at byte "
            f"{error.start}) nor its binary format; give --vocab a TokenMonster YAML"
        ) from None
    settings: dict[str, str] = {}
    entries: list[dict[str, str]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = YAML_LINE.fullmatch(line.rstrip("\r"))
        if match is None or (line[0] in " -" and "tokens" not in settings):
            raise InputError(f"{name}:{number}: unknown vocabulary: cannot read the line "
                             f"{line[:60]!r}; give --vocab a TokenMonster YAML")
        dash, key, value = match.groups()
        if line[0] not in " -":
            settings[key] = _yaml_scalar(value or "", f"{name}:{number}")
            continue
        if dash:
            entries.append({})
        if "special" not in settings and "deleted" not in settings:
            entries[-1][key] = _yaml_scalar(value or "", f"{name}:{number}")
    return settings, [_yaml_entry(entry, name) for entry in entries if entry]


def _yaml_entry(entry: dict[str, str], name: str) -> tuple[bytes, int]:
    """(token bytes, id) of one parsed list entry."""
    if "token" not in entry or not re.fullmatch(r"\d{1,9}", entry.get("id", "")):
        raise InputError(f"{name}: unknown vocabulary: the entry {entry} needs a token and a "
                         "numeric id; export it again with TokenMonster's exportvocab")
    match = HEX_TOKEN.fullmatch(entry["token"])
    token = bytes.fromhex(match[1]) if match else entry["token"].encode("utf-8", "surrogatepass")
    return token, int(entry["id"])


def _yaml_scalar(text: str, where: str) -> str:
    """One plain, single-quoted or double-quoted YAML scalar on one line."""
    if text[:1] not in ("'", '"'):
        return text
    if len(text) < 2 or text[-1] != text[0]:
        raise InputError(f"{where}: unknown vocabulary: unclosed quote in {text[:60]!r}; tokens "
                         "must stand on one line, as TokenMonster writes them")
    if text[0] == "'":
        return text[1:-1].replace("''", "'")
    return YAML_ESCAPE.sub(lambda match: _yaml_escape(match, where), text[1:-1])


def _yaml_escape(match: re.Match[str], where: str) -> str:
    """The character that a YAML escape stands for."""
    code = match[1] or match[2] or match[3]
    if code:
        return chr(int(code, 16))
    if match[4] not in YAML_ESCAPES:
        raise InputError(f"{where}: unknown vocabulary: escape {match[0]!r} is not YAML")
    return YAML_ESCAPES[match[4]]


def vocabulary_yaml(tokens: list[bytes]) -> bytes:
    """TokenMonster YAML of a byte-exact vocabulary: ids in list order, no BOS entry."""
    lines = ["charset: none", 'normalization: "none"', "capcode: 0", "tokens:"]
    for identity, token in enumerate(tokens):
        lines += [f"    - token:   {_yaml_quote(token)}", f"      id:      {identity}",
                  "      score:   0", "      encoded: true"]
    return ("\n".join(lines) + "\n").encode()


def _yaml_quote(token: bytes) -> str:
    """Printable ASCII as a double-quoted string, everything else as hexadecimal."""
    text = token.decode("latin-1")
    if not all(" " <= char <= "~" for char in text) or text.startswith("TokenMonster"):
        return f'"TokenMonsterHexEncode{{{token.hex()}}}"'
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


# --- segmenter ------------------------------------------------------------------------------

NO_RUNE = "\ufffd"
WHITE_SPACE = frozenset(
    "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
    + "".join(map(chr, range(0x2000, 0x200B)))
)
ENDS_LETTER, STARTS_LETTER, STARTS_SPACE, ONE_WORD, HOMOGENEOUS = 1, 2, 4, 32, 128
# Columns of the per-token table that the choosing kernel reads (one 16-byte row per id).
LENGTH, SCORE, FLAGS, ROW = 3, 4, 5, 8  # after the three candidates: itself, alternatives
LETTER_CLASS, OTHER_CLASS, SPACE_CLASS = 1, 2, 3  # the classes 1, 10 and 12 of the specification


def rune(text: bytes) -> tuple[str, int]:
    """First character and its size by strict UTF-8; (U+FFFD, 1) if invalid, (U+FFFD, 0) if none."""
    for size in range(1, min(4, len(text)) + 1):
        try:
            return text[:size].decode("utf-8"), size
        except UnicodeDecodeError:
            continue
    return NO_RUNE, min(1, len(text))


def last_rune(text: bytes) -> str:
    """Last character by strict UTF-8, U+FFFD when there is none."""
    for size in range(1, min(4, len(text)) + 1):
        try:
            return text[-size:].decode("utf-8")[-1]
        except UnicodeDecodeError:
            continue
    return NO_RUNE


@functools.cache
def is_letter(char: str) -> bool:
    """Unicode category L*, or a mark (Mn, Mc, Me)."""
    return unicodedata.category(char)[0] in "LM"


@functools.cache
def is_number(char: str) -> bool:
    """Unicode category N*."""
    return unicodedata.category(char)[0] == "N"


def is_word(char: str) -> bool:
    """Letter or number."""
    return is_letter(char) or is_number(char)


def runes(text: bytes) -> list[str]:
    """All characters of `text`, each invalid byte as U+FFFD."""
    found = []
    while text:
        char, size = rune(text)
        found.append(char)
        text = text[size:]
    return found


def token_fields(token: bytes) -> tuple[int, int, int]:
    """(flags, words, shortest alternative) of a token, section 4.3 of the specification."""
    chars = runes(token)
    first, second = chars[0], chars[1] if len(chars) > 1 else NO_RUNE
    flags, words, shortest = 0, 0, 1
    if first == " ":
        flags |= STARTS_SPACE
        if is_word(second):
            words, shortest = 1, 2
    elif is_letter(first):
        flags |= STARTS_LETTER
    kind = _first_kind(token, first, second)
    for before, char in zip(chars[1:], chars[2:], strict=False):
        words += before == " " and is_word(char)
        if is_letter(char):
            kind = kind if kind == "letters" else ""
        elif is_number(char):
            kind = kind if kind == "digits" else ""
        elif char != " ":
            kind = kind if kind == "punct" else ""
    ends_letter = is_letter(last_rune(token))
    if shortest == 2 and ends_letter and kind == "letters" and words == 1:
        flags |= ONE_WORD
    if words <= 1:
        shortest = 1
    flags |= ENDS_LETTER * ends_letter + HOMOGENEOUS * bool(kind)
    return flags, words, shortest


def _first_kind(token: bytes, first: str, second: str) -> str:
    """What a token could be made of, judged by its first two characters."""
    if len(token) == 1:
        return "punct"
    if (first == " " or is_letter(first)) and is_letter(second):
        return "letters"
    if (first == " " or is_number(first)) and is_number(second):
        return "digits"
    return "" if is_word(first) or is_word(second) else "punct"


def cut_priority(token: bytes, cut: int) -> int:
    """How good a place byte `cut` of a token is to break it, section 4.3."""
    if token[cut:cut + 1] == b" " and is_word(rune(token[cut + 1:])[0]):
        return 10
    left, right = last_rune(token[:cut]), rune(token[cut:])[0]
    left_name, right_name = (is_letter(char) or char == "_" for char in (left, right))
    if left_name != right_name or is_number(left) != is_number(right):
        return 9
    if (left in WHITE_SPACE) != (right in WHITE_SPACE):
        return 7 if left in WHITE_SPACE else 8
    return 1


def alternatives(token: bytes, keys: dict[bytes, int], shortest: int) -> list[bytes]:
    """At most two shorter tokens that are prefixes of `token`, the better one first."""
    slots = [(0, 0), (0, 0)]  # (priority, length)
    for cut in range(len(token) - 1, shortest - 1, -1):
        if token[:cut] in keys:
            target = 0 if slots[0] <= slots[1] else 1
            slots[target] = max(slots[target], (cut_priority(token, cut), cut),
                                key=lambda slot: slot[0])
    slots.sort(reverse=True)
    return [token[:length] for _, length in slots if length]


def byte_classes(keys: dict[bytes, int]) -> np.ndarray:
    """uint8 [257]: class of each byte by the tokens that begin with it; 256 is the end, class 0."""
    counts = np.zeros((256, 4), dtype=np.int64)
    for token in keys:
        char = rune(token)[0]
        kind = (SPACE_CLASS if char == " " else LETTER_CLASS if is_letter(char)
                else 0 if is_number(char) else OTHER_CLASS)
        counts[token[0], kind] += 1
    best = counts.argmax(axis=1)
    majority = 2 * counts.max(axis=1) > counts.sum(axis=1)
    enough = counts.max(axis=1) > 2
    return np.append(np.where(majority & enough, best, 0), 0).astype(np.uint8)


def _token_table(vocabulary: Vocabulary, keys: dict[bytes, int]) -> np.ndarray:
    """uint16 [V, ROW]: candidates (itself where one is missing), length, own score and flags."""
    table = np.zeros((vocabulary.vocab_size, ROW), dtype=np.uint16)
    for token, identity in keys.items():
        flags, words, shortest = token_fields(token)
        shorter = [keys[prefix] for prefix in alternatives(token, keys, shortest)]
        score = len(token) + bool(flags & HOMOGENEOUS) + max(0, words - 1) + 100 * words
        choices = [identity, *shorter, identity, identity][:3]
        table[identity, :FLAGS + 1] = (*choices, len(token), score, flags)
    return table


def _follow_scores(table: np.ndarray) -> np.ndarray:
    """int16 [V, 4]: what a token adds as second of a pair, by the class of the byte after it."""
    flags = table[:, FLAGS]
    scores = np.stack([table[:, SCORE].astype(np.int16) + ((flags & STARTS_SPACE) > 0)] * 4, axis=1)
    scores[:, LETTER_CLASS] -= 3 * ((flags & ENDS_LETTER) > 0)
    scores[:, OTHER_CLASS] += 100
    scores[:, SPACE_CLASS] += 101
    return scores


def _suffix_automaton(keys: dict[bytes, int]) -> SimpleNamespace:
    """Aho-Corasick automaton over the reversed tokens, to be run from the end of a text.

    After reading text[i:] backwards its state is the longest piece at i that ends some token, so
    `longest[state]` is the longest token at i. Bytes that occur only as single tokens share column
    0 and lead back to state 0, whose token is the byte's own. Rows have 2**shift columns, common
    bytes first, so that the part of a row that is in use stays in the cache.
    """
    counts = np.bincount(np.frombuffer(b"".join(token for token in keys if len(token) > 1),
                                       dtype=np.uint8), minlength=256)
    used = [value for value in np.argsort(-counts, kind="stable") if counts[value]]
    column = np.zeros(256, dtype=np.uint8 if len(used) < 256 else np.uint16)
    column[used] = np.arange(1, len(used) + 1)
    shift = int(len(used)).bit_length()
    child: list[dict[int, int]] = [{}]
    token_at: dict[int, int] = {}
    for token, identity in keys.items():
        if len(token) == 1 and column[token[0]] == 0:
            continue
        state = 0
        for value in reversed(token):
            state = child[state].setdefault(int(column[value]), len(child))
            if state == len(child):
                child.append({})
        token_at[state] = identity
    step = np.zeros((len(child), 1 << shift), dtype=np.uint16 if len(child) < 65536 else np.int32)
    longest = np.zeros(len(child), dtype=np.uint16)
    fallback = np.zeros(len(child), dtype=np.int64)
    queue = [0]
    for state in queue:  # breadth first: a state's fall-back is shorter, so it is finished
        if state:
            step[state] = step[fallback[state]]
            longest[state] = token_at.get(state, longest[fallback[state]])
        for at, target in child[state].items():
            fallback[target] = step[state, at]
            step[state, at] = target
            queue.append(target)
    return SimpleNamespace(step=step.reshape(-1), longest=longest, column=column, shift=shift)


def _longest_kernel(text, starts, step, longest, column, shift, byte_token, out):  # noqa: PLR0913
    """out[i] = id of the longest token at i that ends within its document."""
    for document in range(starts.size - 1):
        state = 0
        for i in range(starts[document + 1] - 1, starts[document] - 1, -1):
            value = text[i]
            state = np.int64(step[(state << shift) + column[value]])
            out[i] = longest[state] if state != 0 else byte_token[value]


def _choose_kernel(text, starts, longest, table, follow, classes, out):
    """Write BOS and the chosen ids of each document to out; return how many were written."""
    count = 0
    bos = table.shape[0] - 1
    for document in range(starts.size - 1):
        i, end = starts[document], starts[document + 1]
        out[count] = bos
        count += 1
        while i < end:
            whole = np.int64(longest[i])
            size = np.int64(table[whole, LENGTH])
            choice = whole
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
                        best = value
                        choice = candidate
            out[count] = choice
            count += 1
            i += np.int64(table[choice, LENGTH])
    return count


@functools.cache
def compiled(kernel):
    """`kernel` compiled by Numba, kept on disk so that a second start is quick."""
    try:
        import numba
    except ImportError:
        raise InputError("the numba package is missing: pip install numba") from None
    try:
        return numba.njit(cache=True, nogil=True)(kernel)
    except RuntimeError:  # no folder to keep the machine code in
        return numba.njit(nogil=True)(kernel)


class Segmenter:
    """The exact segmentation of section 4 for one byte-exact vocabulary."""

    def __init__(self, vocabulary: Vocabulary):
        """Build the tables; InputError when the vocabulary is not byte-exact."""
        if vocabulary.lossy:
            raise InputError(f"{vocabulary.name}: not byte-exact: {vocabulary.lossy}")
        keys = {token: identity for identity, token in enumerate(vocabulary.tokens) if token}
        self.vocabulary = vocabulary
        self.table = _token_table(vocabulary, keys)
        self.follow = _follow_scores(self.table)
        self.classes = byte_classes(keys)
        self.automaton = _suffix_automaton(keys)
        self.byte_token = np.array([keys[bytes([value])] for value in range(256)], dtype=np.uint16)

    def longest(self, text: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """uint16 [bytes]: longest token at each position of documents text[starts[k]:...]."""
        found = np.empty(text.size, dtype=np.uint16)
        machine = self.automaton
        compiled(_longest_kernel)(text, starts, machine.step, machine.longest, machine.column,
                                  machine.shift, self.byte_token, found)
        return found

    def segment(self, text: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """uint16 ids of documents text[starts[k]:starts[k+1]] (uint8, int64), BOS before each."""
        ids = np.empty(text.size + starts.size, dtype=np.uint16)
        count = compiled(_choose_kernel)(text, starts, self.longest(text, starts), self.table,
                                         self.follow, self.classes, ids)
        return ids[:count]

    def encode(self, text: bytes) -> list[int]:
        """Ids of one document, without BOS."""
        starts = np.array([0, len(text)], dtype=np.int64)
        return self.segment(np.frombuffer(text, dtype=np.uint8), starts)[1:].tolist()


# --- pieces: ids to bytes -------------------------------------------------------------------

PLAIN_PIECE, SPACED_PIECE, BYTE_PIECE = 0, 1, 2
STRIP_NONE, STRIP_ONE, STRIP_ALL = 0, 1, 2  # spaces dropped while a document is still empty
WIDE = 8  # bytes copied at once, so that most pieces need no inner loop
SPACE_MARK = "\u2581"


def _utf8_machine() -> np.ndarray:
    """uint8 [9, 256]: state after a byte of strict UTF-8; 0 between characters, 8 an error."""
    step = np.full((9, 256), 8, dtype=np.uint8)
    step[0, :0x80] = 0
    step[0, 0xC2:0xE0] = 1
    step[0, 0xE0:0xF0], step[0, 0xE0], step[0, 0xED] = 2, 4, 5
    step[0, 0xF0:0xF5], step[0, 0xF0], step[0, 0xF4] = 3, 6, 7
    for state in (1, 2, 3):
        step[state, 0x80:0xC0] = state - 1
    step[4, 0xA0:0xC0] = step[5, 0x80:0xA0] = 1
    step[6, 0x90:0xC0] = step[7, 0x80:0x90] = 2
    return step


def _join_kernel(ids, starts, table, out, ends, odd):
    """Concatenate the pieces of each document into out.

    `ends[k]` becomes the end of document k; `odd[k]` tells that its byte pieces are not UTF-8.
    """
    pieces, places, utf8, strip = table
    at = 0
    for document in range(starts.size - 1):
        begin, state, strippable = at, 0, strip
        for position in range(starts[document], starts[document + 1]):
            place = places[ids[position]]
            first, size, kind = place >> 16, (place >> 2) & 0x3FFF, place & 3
            if kind == BYTE_PIECE:
                state = np.int64(utf8[state, pieces[first]])
            elif state != 0:
                odd[document] = True
            if kind == SPACED_PIECE and strippable != STRIP_NONE and at == begin:
                first, size = first + 1, size - 1
                if strippable == STRIP_ONE:
                    strippable = STRIP_NONE
            b0, b1, b2, b3 = pieces[first], pieces[first + 1], pieces[first + 2], pieces[first + 3]
            b4, b5, b6, b7 = (pieces[first + 4], pieces[first + 5], pieces[first + 6],
                              pieces[first + 7])
            out[at], out[at + 1], out[at + 2], out[at + 3] = b0, b1, b2, b3
            out[at + 4], out[at + 5], out[at + 6], out[at + 7] = b4, b5, b6, b7
            for i in range(WIDE, size):
                out[at + i] = pieces[first + i]
            at += size
        odd[document] |= state != 0
        ends[document] = at


class PieceTable:
    """Bytes of every id of a tokenizer, joined document by document."""

    def __init__(self, pieces: list[bytes], kinds: np.ndarray | None = None, strip: int = 0):
        """`kinds` (uint8 [V]) and `strip` describe SentencePiece; plain concatenation without."""
        self.lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
        self.widest = int(self.lengths.max(initial=1))
        kinds = np.zeros(len(pieces), dtype=np.uint8) if kinds is None else kinds
        flat = np.frombuffer(b"".join(pieces) + bytes(WIDE + 1), dtype=np.uint8)
        places = (np.cumsum(self.lengths) - self.lengths) << 16 | self.lengths << 2 | kinds
        self.table = (flat, places, _utf8_machine(), strip)

    def join(self, ids: np.ndarray, starts: np.ndarray
             ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(text uint8, starts int64 [documents+1], odd bool [documents]) of uint16 ids.

        InputError names an id outside the vocabulary.
        """
        highest = int(ids.max(initial=0))
        if highest >= self.lengths.size:
            raise InputError(f"id {highest} is out of range: the model has {self.lengths.size} "
                             "ids; use the model that made the shards")
        out = np.empty(ids.size * self.widest + WIDE, dtype=np.uint8)
        ends = np.zeros(starts.size, dtype=np.int64)
        odd = np.zeros(starts.size - 1, dtype=np.bool_)
        compiled(_join_kernel)(ids, starts, self.table, out, ends[1:], odd)
        return out[:ends[-1]], ends, odd


def document_starts(ids: np.ndarray, bos: int) -> np.ndarray:
    """int64 [documents+1]: where each document of a run of whole documents begins, and the end."""
    return np.append(np.flatnonzero(ids == bos), ids.size)


class SentencePieceModel:
    """A SentencePiece model: encoding, and a table whose text equals `sp.decode`."""

    def __init__(self, path: Path | str):
        """Load the model; InputError when it is missing or unreadable."""
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"{path}: no such SentencePiece model; give --sp-model a .model file")
        data = self.path.read_bytes()
        self.sha256 = sha256_bytes(data)
        try:
            import sentencepiece
        except ImportError:
            raise InputError("the sentencepiece package is missing: pip install "
                             "sentencepiece") from None
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise InputError(f"{path}: not a SentencePiece model ({error}); fetch it "
                             "again") from None
        self.vocab_size = self.processor.get_piece_size()
        self.bos_id = self.processor.bos_id()
        if self.bos_id < 0 or self.vocab_size > MAX_IDS:
            raise InputError(f"{path}: the model has bos id {self.bos_id} and {self.vocab_size} "
                             f"ids; it needs a bos and at most {MAX_IDS} ids")
        self.table = self._probed_table()

    def _pieces(self, unknown: bytes) -> tuple[list[bytes], np.ndarray]:
        """(bytes, kind) of each id; control and unused ids have none."""
        sp, pieces, kinds = self.processor, [], np.zeros(self.vocab_size, dtype=np.uint8)
        for identity in range(self.vocab_size):
            text = sp.id_to_piece(identity)
            if sp.is_byte(identity):
                kinds[identity] = BYTE_PIECE
                pieces.append(bytes([int(text[3:5], 16)]))
            elif sp.is_unknown(identity):
                pieces.append(unknown)
            elif sp.is_control(identity):
                pieces.append(b"")
            else:
                kinds[identity] = SPACED_PIECE if text.startswith(SPACE_MARK) else PLAIN_PIECE
                pieces.append(text.replace(SPACE_MARK, " ").encode())
        return pieces, kinds

    def _probed_table(self) -> PieceTable | None:
        """The table that agrees with `sp.decode` on every piece in every position, if there is one.

        Probed: each piece alone, after itself, after a space and after a piece without space.
        """
        unknown = self.processor.decode([self.processor.unk_id()]).encode()
        pieces, kinds = self._pieces(unknown)
        inner = int(np.flatnonzero((kinds == PLAIN_PIECE)
                                   & (np.array([len(piece) for piece in pieces]) > 0))[-1])
        space = self.processor.piece_to_id(SPACE_MARK)
        probes = []
        for identity in range(self.vocab_size):
            probes += [[identity], [identity, identity], [inner, identity],
                       [space, identity], [space, space, identity]]
        expected = self.decode_slowly(probes)
        flat = np.array([identity for probe in probes for identity in probe], dtype=np.uint16)
        starts = np.cumsum([0] + [len(probe) for probe in probes])
        for strip in (STRIP_ALL, STRIP_ONE, STRIP_NONE):
            table = PieceTable(pieces, kinds, strip)
            text, ends, odd = table.join(flat, starts)
            if all(odd[k] or text[ends[k]:ends[k + 1]].tobytes() == expected[k]
                   for k in range(len(probes))):
                return table
        return None

    def decode_slowly(self, documents: list[list[int]]) -> list[bytes]:
        """UTF-8 of `sp.decode`, the definition of source text."""
        return [text.encode() for text in self.processor.decode(documents)] if documents else []

    def decode(self, ids: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(text uint8, starts int64 [documents+1]): `sp.decode` of each document's ids.

        The table serves all but the documents whose byte pieces are not valid UTF-8.
        """
        if self.table is not None:
            text, ends, odd = self.table.join(ids, starts)
            if not odd.any():
                return text, ends
        elif ids.size and ids.max() >= self.vocab_size:
            raise InputError(f"id {ids.max()} is out of range: the model has {self.vocab_size} "
                             "ids; use the model that made the shards")
        parts = [
            text[ends[k]:ends[k + 1]].tobytes() if self.table is not None and not odd[k]
            else self.decode_slowly([ids[starts[k]:starts[k + 1]].tolist()])[0]
            for k in range(starts.size - 1)
        ]
        return joined(parts)

    def counting_table(self) -> PieceTable:
        """The trainer's byte count of each id: no leading space after a boundary."""
        pieces, kinds = self._pieces(b"")
        return PieceTable(pieces, kinds, STRIP_ONE)


def joined(documents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """(text uint8, starts int64 [documents+1]) of a list of documents."""
    starts = np.cumsum([0] + [len(document) for document in documents], dtype=np.int64)
    return np.frombuffer(b"".join(documents), dtype=np.uint8), starts


# --- shards ---------------------------------------------------------------------------------

HEADER_INTS, SHARD_MAGIC, SHARD_VERSION = 256, 20240520, 1
HEADER_BYTES = 4 * HEADER_INTS
BLOCK_IDS = 1 << 16  # ids handled at once: text and ids of a block stay in the cache
SHARD_NAME = re.compile(r"(.*?)(\d+)\.bin")


def shard_header(tokens: int) -> bytes:
    """The 1024 bytes before the ids of a shard."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens
    return header.tobytes()


def open_shard(path: Path) -> np.ndarray:
    """Memory-mapped uint16 ids of a shard; InputError when header and length disagree."""
    with file_errors(f"read {path}"):
        size = path.stat().st_size
        if size < HEADER_BYTES:
            raise InputError(f"{path}: truncated: {size} bytes are less than the {HEADER_BYTES} of "
                             "a shard header; fetch the file again")
        magic, version, tokens = (int(value) for value in np.fromfile(path, "<i4", 3))
        if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
            raise InputError(f"{path}: magic {magic} and version {version} are not the "
                             f"{SHARD_MAGIC} and {SHARD_VERSION} of a token shard; check "
                             "--sp-shards")
        if size != HEADER_BYTES + 2 * tokens:
            kind = "truncated" if size < HEADER_BYTES + 2 * tokens else "too long"
            raise InputError(f"{path}: {kind}: the header counts {tokens} tokens, the file holds "
                             f"{(size - HEADER_BYTES) / 2:g}; fetch the file again")
        if tokens == 0:
            raise InputError(f"{path}: empty source: the shard has no tokens; remove it or fetch "
                             "it again")
        return np.memmap(path, "<u2", "r", offset=HEADER_BYTES)


def find_shards(pattern: str) -> list[Path]:
    """Input shards of a glob, in name order, checked for duplicate names and gaps."""
    paths = sorted((Path(path) for path in glob.glob(pattern)), key=lambda path: path.name)
    if not paths:
        raise InputError(f"--sp-shards {pattern}: empty source: no file matches; check the path, "
                         "and quote the pattern")
    for before, path in zip(paths, paths[1:], strict=False):
        if before.name == path.name:
            raise InputError(f"duplicate shard name {path.name}: {before} and {path} would write "
                             "the same output; narrow --sp-shards")
        if follows(before, path) is False:
            raise InputError(f"{path}: the shard before it is missing ({before.name} is the last "
                             "one found); documents span shards, so fetch it")
    return paths


def follows(before: Path, path: Path) -> bool | None:
    """True when `path` continues `before`, None when it starts another series, False on a gap."""
    left, right = SHARD_NAME.fullmatch(before.name), SHARD_NAME.fullmatch(path.name)
    if left is None or right is None or left[1] != right[1]:
        return None
    return int(right[2]) == int(left[2]) + 1


def whole_documents(paths: list[Path], index: int, bos: int) -> Iterator[np.ndarray]:
    """Blocks of whole documents (uint16 ids, each document begins with BOS) that begin in a shard.

    The last document is completed from the following shards. InputError when the first shard of a
    series does not begin with BOS.
    """
    path, ids = paths[index], open_shard(paths[index])
    at = _first_bos(ids, bos)
    if at and (index == 0 or not follows(paths[index - 1], path)):
        raise InputError(f"{path}: the first id is {ids[0]}, not BOS ({bos}): the document that it "
                         "belongs to began in an earlier shard; add the shards before it")
    while at < ids.size:
        size = BLOCK_IDS
        while True:
            window = ids[at:at + size]
            found = np.flatnonzero(window == bos)
            if at + size >= ids.size or found.size > 1:
                break
            size *= 2
        last = int(found[-1])
        if at + size < ids.size:
            yield window[:last]
            at += last
            continue
        if last:
            yield window[:last]
        yield np.concatenate([window[last:], *_continuation(paths, index, bos)])
        return


def _first_bos(ids: np.ndarray, bos: int) -> int:
    """Position of the first BOS, or the number of ids."""
    for at in range(0, ids.size, BLOCK_IDS):
        found = np.flatnonzero(ids[at:at + BLOCK_IDS] == bos)
        if found.size:
            return at + int(found[0])
    return ids.size


def _continuation(paths: list[Path], index: int, bos: int) -> list[np.ndarray]:
    """Ids at the beginning of the following shards that complete a shard's last document."""
    parts = []
    while index + 1 < len(paths) and follows(paths[index], paths[index + 1]):
        index += 1
        ids = open_shard(paths[index])
        parts.append(ids[:_first_bos(ids, bos)])
        if parts[-1].size < ids.size:
            break
    return parts


# --- output folder and ledger ---------------------------------------------------------------

LEDGER_FOLDER = ".ledger"
META_NAME = "scylla.meta.npz"
DEFAULT_SHARD_TOKENS = 100_000_000
COUNTS = ("tokens", "documents", "source_bytes", "decoded_bytes", "bad_documents")


class OutputFolder:
    """The output folder: every file in it appears whole, with a ledger entry for every shard.

    A shard is renamed into place before its entry is written, and the manifest is made from the
    entries, so that whatever the manifest lists is whole, and a shard without entry is redone.
    """

    def __init__(self, path: Path):
        """Create the folder; InputError when it cannot be written."""
        self.path, self.ledger = Path(path), Path(path) / LEDGER_FOLDER
        with file_errors(f"write the output folder {path}"):
            self.ledger.mkdir(parents=True, exist_ok=True)
            self.clean()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock, which guards the making and the clearing of partial files."""
        with open(self.ledger / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def part(self, name: str) -> tuple[IO[bytes], Path]:
        """A new partial file for `name`, locked for as long as it is open."""
        with self.locked():
            handle, path = tempfile.mkstemp(".part", name + ".", self.ledger)
            fcntl.flock(handle, fcntl.LOCK_EX)
        os.fchmod(handle, 0o644)
        return os.fdopen(handle, "r+b", buffering=1 << 20), Path(path)

    def clean(self) -> None:
        """Remove the partial files that no live process holds."""
        with self.locked():
            for path in self.ledger.glob("*.part"):
                with contextlib.suppress(OSError), open(path, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()

    @contextlib.contextmanager
    def atomic(self, target: Path) -> Iterator[IO[bytes]]:
        """A file that appears at `target` when the block ends, and not at all if it fails."""
        with file_errors(f"write {target}"):
            file, path = self.part(target.name)
            try:
                with file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(path, target)
            except BaseException:
                path.unlink(missing_ok=True)
                raise

    def put(self, target: Path, data: bytes) -> None:
        """Write a small file atomically, unless it has these bytes already."""
        with file_errors(f"write {target}"):
            if target.is_file() and target.read_bytes() == data:
                return
        with self.atomic(target) as file:
            file.write(data)

    def entry(self, name: str) -> dict | None:
        """Ledger entry of a shard, None when there is none or it cannot be read."""
        try:
            return json.loads((self.ledger / f"{name}.json").read_text())
        except (OSError, ValueError):
            return None

    def entries(self) -> dict[str, dict]:
        """Ledger entries by shard name, of the shards that are there with the right length."""
        found = {}
        for path in sorted(self.ledger.glob("*.bin.json")):
            name, shard = path.name[:-len(".json")], self.path / path.name[:-len(".json")]
            entry = self.entry(name)
            if entry and shard.is_file() and (
                    shard.stat().st_size == HEADER_BYTES + 2 * entry["tokens"]):
                found[name] = entry
        return found

    def record(self, name: str, entry: dict) -> None:
        """Write the ledger entry of a finished shard."""
        self.put(self.ledger / f"{name}.json", _json_bytes(entry))

    def forget(self, name: str, shard_too: bool = False) -> None:
        """Remove the ledger entry of a shard that will be made again, or the shard as well."""
        (self.ledger / f"{name}.json").unlink(missing_ok=True)
        if shard_too:
            (self.path / name).unlink(missing_ok=True)

    def finished(self, name: str, identity: dict) -> bool:
        """True when the shard is there, with the entry of the same work and the same SHA-256."""
        entry = self.entry(name)
        return (entry is not None and entry["identity"] == identity
                and (self.path / name).is_file()
                and file_sha256(self.path / name) == entry["sha256"])

    def publish(self, tokenizer: dict) -> dict:
        """Write manifest.json from the ledger entries, again if one came while it was written."""
        while True:
            entries = self.entries()
            manifest = build_manifest(tokenizer, entries)
            self.put(self.path / "manifest.json", _json_bytes(manifest))
            if self.entries() == entries:
                return manifest


def build_manifest(tokenizer: dict, entries: dict[str, dict]) -> dict:
    """The manifest of a folder: tokenizer, source, per-shard ledger and totals per split."""
    totals = {split: dict.fromkeys(COUNTS, 0) for split in ("train", "val", "all")}
    sources, shards = [], {}
    for name, entry in sorted(entries.items()):
        source = {key: entry["identity"][key] for key in ("kind", "model_sha256")}
        sources += [source] if source not in sources else []
        shards[name] = entry
        for split in (split_of(name), "all"):
            for key in COUNTS:
                totals[split][key] += entry[key]
    source = sources[0] if len(sources) == 1 else {"kind": "mixed", "sources": sources}
    return {"format": 1, "tokenizer": tokenizer, "source": source, "shards": shards,
            "totals": totals}


def split_of(name: str) -> str:
    """The split that a shard's name tells: val when it has that word, train otherwise."""
    return "val" if "val" in re.split(r"[^a-z]+", name) else "train"


def _json_bytes(value: dict) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


class ShardWriter:
    """Ids and counts of one output shard that is being written."""

    def __init__(self, file: IO[bytes]):
        """Leave room for the header, which is known at the end."""
        self.file, self.counts, self.sha256 = file, dict.fromkeys(COUNTS, 0), ""
        self.file.write(bytes(HEADER_BYTES))

    def append(self, block: Encoded) -> None:
        """Write the ids of whole documents and add up what they count."""
        self.file.write(np.ascontiguousarray(block.ids, dtype="<u2"))
        for key, value in block.counts().items():
            self.counts[key] += value

    def seal(self) -> None:
        """Write the header and take the SHA-256 of the file as it is on disk."""
        self.file.seek(0)
        self.file.write(shard_header(self.counts["tokens"]))
        self.sha256 = stream_sha256(self.file)

    def entry(self, status: str, identity: dict) -> dict:
        """Ledger entry of the finished shard."""
        return {**self.counts, "sha256": self.sha256, "status": status, "identity": identity}


@contextlib.contextmanager
def shard_writer(folder: OutputFolder, name: str) -> Iterator[ShardWriter]:
    """A shard that appears in the folder when the block ends, and not at all if it fails."""
    with folder.atomic(folder.path / name) as file:
        writer = ShardWriter(file)
        yield writer
        writer.seal()


# --- engines --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """Ids of whole documents, and per document source bytes, decoded bytes, and bad or not."""

    ids: np.ndarray
    starts: np.ndarray
    source: np.ndarray
    decoded: np.ndarray
    bad: np.ndarray

    def counts(self) -> dict[str, int]:
        """What these documents add to the ledger."""
        values = (self.ids.size, self.source.size, self.source.sum(), self.decoded.sum(),
                  self.bad.sum())
        return dict(zip(COUNTS, map(int, values), strict=True))

    def documents(self, first: int, last: int) -> Encoded:
        """Only the documents first..last-1."""
        begin, end = self.starts[first], self.starts[last]
        return Encoded(self.ids[begin:end], self.starts[first:last + 1] - begin,
                       *(field[first:last] for field in (self.source, self.decoded, self.bad)))


def compare(ids: np.ndarray, source: tuple[np.ndarray, np.ndarray],
            decoded: tuple[np.ndarray, np.ndarray], id_starts: np.ndarray) -> Encoded:
    """Compare decoded documents with their source, each a (text, starts) pair, byte by byte."""
    (text, starts), (again, ends) = source, decoded
    bad = np.zeros(starts.size - 1, dtype=np.bool_)
    if not (np.array_equal(starts, ends) and np.array_equal(text, again)):
        for k in range(bad.size):
            bad[k] = not np.array_equal(text[starts[k]:starts[k + 1]], again[ends[k]:ends[k + 1]])
    return Encoded(ids, id_starts, np.diff(starts), np.diff(ends), bad)


class ScyllaEngine:
    """Byte-exact TokenMonster vocabulary: our own segmenter; every document is compared."""

    status, kind = "exact", "tokenmonster"

    def __init__(self, vocabulary: Vocabulary):
        """Build the segmenter; its byte table is also what meta.npz publishes."""
        self.vocabulary, self.bos_id = vocabulary, vocabulary.bos_id
        self.vocab_size, self.sha256 = vocabulary.vocab_size, vocabulary.sha256
        self.name, self.data = vocabulary.name, vocabulary.data
        self.segmenter = Segmenter(vocabulary)
        self.pieces = PieceTable(list(vocabulary.tokens))
        self.base_bytes = vocabulary.base_bytes()
        assert np.array_equal(self.base_bytes, self.pieces.lengths)

    def encode_text(self, text: np.ndarray, starts: np.ndarray) -> Encoded:
        """Ids of documents text[starts[k]:starts[k+1]]; InputError if one decodes differently."""
        ids = self.segmenter.segment(text, starts)
        id_starts = document_starts(ids, self.bos_id)
        again, ends, _ = self.pieces.join(ids, id_starts)
        block = compare(ids, (text, starts), (again, ends), id_starts)
        if block.bad.any():
            raise InputError(f"document {int(block.bad.argmax())} of a block does not decode to "
                             f"its source with {self.name}; nothing is published: report this")
        return block

    def encode_documents(self, documents: list[bytes]) -> Encoded:
        """Ids of documents given as UTF-8."""
        return self.encode_text(*joined(documents))


class LossyEngine(ScyllaEngine):
    """Any other TokenMonster vocabulary, by the tokenmonster package; bad documents are counted."""

    status = "lossy"

    def __init__(self, vocabulary: Vocabulary):
        """Start the package's helper; InputError when package or helper are missing."""
        try:
            import tokenmonster
        except ImportError:
            raise InputError("--allow-lossy needs the tokenmonster package: pip install "
                             "tokenmonster") from None
        self.vocabulary, self.sha256 = vocabulary, vocabulary.sha256
        self.name, self.data = vocabulary.name, vocabulary.data
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / vocabulary.name
            path.write_bytes(vocabulary.data)
            try:
                self.tokenizer = (tokenmonster.load(str(path)) if vocabulary.binary
                                  else tokenmonster.new(vocabulary.data))
            except OSError as error:
                raise InputError(
                    f"{vocabulary.name}: the tokenmonster package cannot load its helper program "
                    f"({error}): its first use downloads tokenmonsterserver from Hugging Face into "
                    "~/_tokenmonster, which needs a network once; or use a byte-exact vocabulary"
                ) from None
        self.encoding = "latin-1" if vocabulary.charset == "none" else "utf-8"
        self.bos_id = len(self.tokenizer)
        self.vocab_size = self.bos_id + 1
        self.base_bytes = np.array([len(self._decode([k])) for k in range(self.bos_id)] + [0],
                                   dtype=np.int16)

    def _decode(self, ids: list[int]) -> bytes:
        """Bytes that the package decodes; it has no batches and no empty lists."""
        return (self.tokenizer.decode(ids) or "").encode(self.encoding) if len(ids) else b""

    def encode_text(self, text: np.ndarray, starts: np.ndarray) -> Encoded:
        """Ids of documents text[starts[k]:starts[k+1]], and which of them decode differently."""
        parts, decoded = [], []
        for k in range(starts.size - 1):
            ids = self.tokenizer.tokenize(text[starts[k]:starts[k + 1]].tobytes())
            ids = [] if ids is None else [int(identity) for identity in ids]
            decoded.append(self._decode(ids))
            parts.append([self.bos_id, *ids])
        ids = np.array([identity for part in parts for identity in part], dtype=np.uint16)
        return compare(ids, (text, starts), joined(decoded), document_starts(ids, self.bos_id))


class SentencePieceEngine:
    """Plain SentencePiece shards; a document is bad when the trainer's byte table miscounts it."""

    kind = "sentencepiece"

    def __init__(self, model: SentencePieceModel):
        """The source of these shards is what `sp.decode` gives back."""
        self.model, self.bos_id, self.vocab_size = model, model.bos_id, model.vocab_size
        self.sha256, self.name, self.data = model.sha256, model.path.name, model.path.read_bytes()
        self.counting = model.counting_table()
        self.status = "exact"

    def encode_documents(self, documents: list[bytes]) -> Encoded:
        """Ids of documents given as UTF-8."""
        texts = [document.decode() for document in documents]
        parts = [[self.bos_id, *ids] for ids in self.model.processor.encode(texts, num_threads=1)]
        ids = np.array([identity for part in parts for identity in part], dtype=np.uint16)
        id_starts = document_starts(ids, self.bos_id)
        counted, ends, _ = self.counting.join(ids, id_starts)
        return compare(ids, self.model.decode(ids, id_starts), (counted, ends), id_starts)


Engine = ScyllaEngine | SentencePieceEngine


def make_engine(vocabulary: Vocabulary, allow_lossy: bool) -> ScyllaEngine:
    """The engine for a vocabulary; a lossy one is refused unless it is allowed."""
    if not vocabulary.lossy:
        return ScyllaEngine(vocabulary)
    if not allow_lossy:
        raise InputError(
            f"{vocabulary.name}: refused: not byte-exact: {vocabulary.lossy}. No per-token byte "
            "count can be right for it, so no BPB either. Use a byte-exact vocabulary (scylla.yaml "
            "or --build-vocab), or pass --allow-lossy to go on and see how many documents are wrong"
        )
    return LossyEngine(vocabulary)


def tokenizer_record(engine: Engine) -> dict:
    """The manifest's description of the output tokenizer."""
    return {"kind": engine.kind, "path": engine.name, "sha256": engine.sha256,
            "vocab_size": engine.vocab_size, "byte_exact": engine.status == "exact",
            "bos_id": engine.bos_id}


def put_tokenizer(folder: OutputFolder, engine: Engine) -> None:
    """Write the tokenizer and, for TokenMonster, its meta.npz beside the shards."""
    folder.put(folder.path / engine.name, engine.data)
    if engine.kind != "tokenmonster":
        return
    boundary = np.zeros(engine.vocab_size, dtype=np.bool_)
    boundary[engine.bos_id] = True
    buffer = io.BytesIO()
    np.savez(buffer, format_version=np.int64(1), tokenizer_kind=np.str_(engine.kind),
             source_model_name=np.str_(engine.name), vocab_size=np.int64(engine.vocab_size),
             base_bytes=engine.base_bytes, is_boundary_token=boundary,
             has_leading_space=np.zeros(engine.vocab_size, dtype=np.bool_))
    folder.put(folder.path / META_NAME, buffer.getvalue())


# --- jobs -----------------------------------------------------------------------------------


class Progress:
    """Counters that all processes share, one row per task, and whole lines on stderr."""

    def __init__(self, rows: int, total: int, interval: float = 5.0):
        """`total` is in the unit of the counters' last column (ids, or bytes of a file)."""
        self.counters = multiprocessing.RawArray("q", 3 * rows)
        self.total, self.interval, self.owner = total, interval, os.getpid()
        self.begin = self.latest = time.monotonic()

    def add(self, row: int, block: Encoded, amount: int) -> None:
        """Count the documents of a block, and `amount` units of the total as done."""
        for column, value in enumerate((block.source.sum(), block.source.size, amount)):
            self.counters[3 * row + column] += int(value)
        self.report()

    def report(self, last: bool = False) -> None:
        """Print a line when the interval has passed, or for the last time."""
        now = time.monotonic()
        if os.getpid() != self.owner or not (last or now - self.latest >= self.interval):
            return
        self.latest = now
        source, documents, done = (sum(self.counters[column::3]) for column in range(3))
        seconds = max(now - self.begin, 1e-9)
        left = seconds * (self.total - done) / done if done else float("nan")
        print(f"progress: {100 * done / max(1, self.total):.1f}% {source / 1e6:.1f} MB "
              f"{documents} documents {source / 1e6 / seconds:.1f} MB/s "
              f"{documents / seconds:.0f} documents/s "
              + (f"took:{seconds:.1f}s" if last else f"eta:{left:.0f}s"),
              file=sys.stderr, flush=True)


@dataclass(frozen=True)
class ShardJob:
    """Re-tokenize the shards of a list; called with an index, in any process."""

    folder: OutputFolder
    paths: list[Path]
    model: SentencePieceModel
    engine: ScyllaEngine
    progress: Progress

    def __call__(self, index: int) -> str:
        """Make one shard, or skip it when it is finished; returns which of the two."""
        path = self.paths[index]
        try:
            return self._make(index)
        except InputError as error:
            where = "" if path.name in str(error) else f"{path}: "
            raise InputError(f"{where}{error}") from None

    def _identity(self, source_sha256: str) -> dict:
        """What a shard is made from: equal identities give equal bytes."""
        return {"kind": "sp-shards", "model_sha256": self.model.sha256,
                "tokenizer_sha256": self.engine.sha256, "source_sha256": source_sha256}

    def _make(self, index: int) -> str:
        name = self.paths[index].name
        if self.folder.entry(name):
            digest = hashlib.sha256()
            for ids in whole_documents(self.paths, index, self.model.bos_id):
                digest.update(ids)
            if self.folder.finished(name, self._identity(digest.hexdigest())):
                return "skipped"
            self.folder.forget(name)
            self.folder.publish(tokenizer_record(self.engine))
        digest = hashlib.sha256()
        with shard_writer(self.folder, name) as writer:
            for ids in whole_documents(self.paths, index, self.model.bos_id):
                digest.update(ids)
                text, starts = self.model.decode(ids, document_starts(ids, self.model.bos_id))
                block = self.engine.encode_text(text, starts)
                writer.append(block)
                self.progress.add(index, block, ids.size)
        identity = self._identity(digest.hexdigest())
        self.folder.record(name, writer.entry(self.engine.status, identity))
        self.folder.publish(tokenizer_record(self.engine))
        return "made"


def retokenize_shards(job: ShardJob, indices: list[int], workers: int) -> list[str]:
    """Run a job over the shards of this rank; returns "made" or "skipped" for each."""
    for index in indices:
        next(whole_documents(job.paths, index, job.model.bos_id), None)
    return list(pool_map(job, indices, workers, job.progress.report))


# --- documents ------------------------------------------------------------------------------

BLOCK_BYTES = 1 << 20
OPENERS = {".gz": "gzip", ".xz": "lzma", ".zst": "zstandard"}


class DocumentReader:
    """Documents of JSON-lines files, plain or compressed (.gz, .xz, .zst), in file order."""

    def __init__(self, paths: list[Path]):
        """InputError when a file is missing, or its decompressor."""
        self.paths, self.raw, self.passed = paths, None, 0
        for path in paths:
            if not path.is_file():
                raise InputError(f"{path}: no such document file; --docs takes .jsonl, .gz, .xz "
                                 "or .zst")
            if path.suffix == ".zst":
                self._zstandard()
        self.total = sum(path.stat().st_size for path in paths)

    @staticmethod
    def _zstandard():
        try:
            import zstandard
        except ImportError:
            raise InputError(".zst documents need the zstandard package: pip install "
                             "zstandard") from None
        return zstandard

    def position(self) -> int:
        """Bytes of the files consumed so far."""
        return self.passed + (self.raw.tell() if self.raw and not self.raw.closed else 0)

    def lines(self) -> Iterator[tuple[Path, int, bytes]]:
        """(file, line number, line) of every non-empty line; InputError when a file is damaged."""
        for path in self.paths:
            damaged = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
            if path.suffix == ".zst":
                damaged += (self._zstandard().ZstdError,)
            with file_errors(f"read {path}"), open(path, "rb") as self.raw:
                try:
                    for number, line in enumerate(self._open(path), 1):
                        if line.strip():
                            yield path, number, line
                except damaged as error:
                    raise InputError(f"{path}: damaged or truncated ({error}); fetch the file "
                                     "again") from None
                self.passed += path.stat().st_size

    def _open(self, path: Path) -> Iterable[bytes]:
        """The decompressed lines of the file that `raw` reads."""
        if path.suffix == ".gz":
            return gzip.open(self.raw)
        if path.suffix == ".xz":
            return lzma.open(self.raw)
        if path.suffix == ".zst":
            return self._zstandard_lines()
        return self.raw

    def _zstandard_lines(self) -> Iterator[bytes]:
        """Lines of a .zst file; EOFError when its last frame is cut off."""
        frames = self._zstandard().ZstdDecompressor()
        frame, rest = frames.decompressobj(), b""
        while chunk := self.raw.read(1 << 17):
            while chunk:
                frame = frames.decompressobj() if frame.eof else frame
                *lines, rest = (rest + frame.decompress(chunk)).split(b"\n")
                yield from lines
                chunk = frame.unused_data
        if not frame.eof:
            raise EOFError("the last frame is cut off")
        yield rest

    def documents(self, skip: int = 0) -> Iterator[bytes]:
        """UTF-8 of the "text" of every line after the first `skip`."""
        for number, (path, line_number, line) in enumerate(self.lines()):
            if number >= skip:
                yield document_text(line, f"{path}:{line_number}")

    def blocks(self, skip: int = 0) -> Iterator[list[bytes]]:
        """Lists of documents of about BLOCK_BYTES."""
        block, size = [], 0
        for document in self.documents(skip):
            block.append(document)
            size += len(document) + 1
            if size >= BLOCK_BYTES:
                yield block
                block, size = [], 0
        if block:
            yield block


def document_text(line: bytes, where: str) -> bytes:
    """UTF-8 of the "text" of one JSON line."""
    try:
        value = json.loads(line)
        text = value["text"] if isinstance(value, dict) else None
        if isinstance(text, str):
            return text.encode()
        problem = f"no string \"text\" in {line[:60]!r}"
    except KeyError:
        problem = f"no \"text\" in {line[:60]!r}"
    except UnicodeEncodeError as error:
        problem = f"the text has a lone surrogate at character {error.start}"
    except ValueError as error:
        problem = f"not JSON ({error})"
    raise InputError(f"{where}: {problem}; each line must be an object with a string \"text\"")


@dataclass(frozen=True)
class DocumentJob:
    """Tokenize documents into shards of at least `shard_tokens` tokens (the last one has the rest).

    A shard ends with the document that reaches the size, so that documents never span shards.
    """

    folder: OutputFolder
    reader: DocumentReader
    engine: Engine
    split: str
    shard_tokens: int

    def name(self, number: int) -> str:
        """File name of a shard."""
        return f"fineweb_{self.split}_{number:06d}.bin"

    def run(self, workers: int) -> list[str]:
        """Make all shards after the finished ones; returns "made" or "skipped" for each."""
        digest = sha256_bytes("".join(map(file_sha256, self.reader.paths)).encode())
        number, skip = self._finished(digest)
        self._drop_from(number)
        progress = Progress(1, self.reader.total)
        blocks = pool_map(self.engine.encode_documents, self.reader.blocks(skip), workers,
                          progress.report)
        made = []
        with contextlib.closing(blocks):
            pieces = self._pieces(blocks, progress)
            for first in pieces:
                identity = self._identity(digest, skip)
                name = self.name(number + len(made))
                with shard_writer(self.folder, name) as writer:
                    for piece, full in itertools.chain([first], pieces):
                        writer.append(piece)
                        if full:
                            break
                bad = writer.counts["bad_documents"]
                status = self.engine.status if not bad else "lossy"
                self.folder.record(name, writer.entry(status, identity))
                self.folder.publish(tokenizer_record(self.engine))
                skip += writer.counts["documents"]
                made.append("made")
        if not skip:
            raise InputError(f"{self.reader.paths[0]}: empty source: no documents; check --docs")
        progress.report(last=True)
        return ["skipped"] * number + made

    def _identity(self, digest: str, first: int) -> dict:
        """What a shard is made from: equal identities give equal bytes."""
        model = self.engine.sha256 if self.engine.kind == "sentencepiece" else None
        return {"kind": "docs", "model_sha256": model, "tokenizer_sha256": self.engine.sha256,
                "source_sha256": digest, "first_document": first, "shard_tokens": self.shard_tokens}

    def _finished(self, digest: str) -> tuple[int, int]:
        """(number of leading shards that are finished, documents in them)."""
        number = skip = 0
        while self.folder.finished(self.name(number), self._identity(digest, skip)):
            skip += self.folder.entry(self.name(number))["documents"]
            number += 1
        return number, skip

    def _drop_from(self, number: int) -> None:
        """Remove the shards of earlier runs that this one will not leave as they are."""
        stale = [name for name in self.folder.entries()
                 if name.startswith(f"fineweb_{self.split}_") and name >= self.name(number)]
        for name in stale:
            self.folder.forget(name, shard_too=True)
        if stale:
            self.folder.publish(tokenizer_record(self.engine))

    def _pieces(self, blocks: Iterator[Encoded], progress: Progress
                ) -> Iterator[tuple[Encoded, bool]]:
        """Blocks cut where a shard is full; the flag tells that it is."""
        room = self.shard_tokens
        for block in blocks:
            progress.add(0, block, self.reader.position() - progress.counters[2])
            first, count = 0, block.source.size
            while first < count:
                last = int(np.searchsorted(block.starts, block.starts[first] + room))
                full = last <= count
                last = min(last, count)
                piece = block.documents(first, last)
                room = self.shard_tokens if full else room - piece.ids.size
                first = last
                yield piece, full


# --- workers --------------------------------------------------------------------------------

CRASHED, REFUSED, DONE = "crashed", "refused", "done"


def stop_on_signals() -> None:
    """Make Ctrl-C and SIGTERM raise Stopped once; further ones do not disturb the clean-up."""
    def stop(number, _frame):
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)
        raise Stopped(number)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)


def _exit_with_parent() -> None:
    """End this worker when the process that started it is gone."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _worker_main(function: Callable, connection) -> None:
    """Answer tasks until the connection closes; Ctrl-C is left to the parent."""
    stop_on_signals()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, Stopped):
        while True:
            task = connection.recv()
            try:
                answer = DONE, function(task)
            except InputError as error:
                answer = REFUSED, str(error)
            except Exception:
                answer = CRASHED, traceback.format_exc()
            connection.send(answer)


class Worker:
    """A process that calls one function on the tasks it is sent."""

    def __init__(self, context, function: Callable):
        """Start the process."""
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_worker_main, args=(function, other), daemon=True)
        self.process.start()
        other.close()

    def result(self):
        """The answer to the last task; InputError when the task was refused or the process died."""
        try:
            kind, value = self.connection.recv()
        except EOFError:
            self.process.join()
            raise InputError(
                f"a worker process died (exit code {self.process.exitcode}; -9 is often too little "
                "memory): use fewer --workers and run again: finished shards are kept") from None
        if kind == REFUSED:
            raise InputError(value)
        if kind == CRASHED:
            raise RuntimeError(f"in a worker process:\n{value}")
        return value

    def stop(self) -> None:
        """End the process and wait for its clean-up."""
        self.process.terminate()
        self.process.join(10)
        self.process.kill()
        self.connection.close()


def pool_map(function: Callable, tasks: Iterable, workers: int, tick: Callable) -> Iterator:
    """function(task) for every task, in task order, from `workers` processes.

    Tasks are drawn as they are needed, so memory is bounded; `tick` is called about once a second.
    """
    if workers <= 1:
        for task in tasks:
            yield function(task)
            tick()
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = []
    try:
        for _ in range(workers):
            pool.append(Worker(context, function))
        yield from _dispatch(pool, tasks, tick)
    finally:
        for worker in pool:
            worker.stop()


def _dispatch(pool: list[Worker], tasks: Iterable, tick: Callable) -> Iterator:
    """Hand tasks to idle workers and yield the results in task order."""
    idle, busy, ready = list(pool), {}, {}
    numbered = enumerate(tasks)
    sent = due = 0
    while True:
        while due in ready:
            yield ready.pop(due)
            due += 1
        for worker, (number, task) in zip(idle[:2 * len(pool) - (sent - due)], numbered,
                                          strict=False):
            worker.connection.send(task)
            busy[worker.connection] = worker, number
            sent += 1
        idle = [worker for worker in idle if worker.connection not in busy]
        if not busy:
            return
        for connection in multiprocessing.connection.wait(list(busy), timeout=1):
            worker, number = busy.pop(connection)
            ready[number] = worker.result()
            idle.append(worker)
        tick()


def rank_and_world() -> tuple[int, int]:
    """torchrun's RANK and WORLD_SIZE, (0, 1) without it."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
        raise InputError(f"RANK={rank} and WORLD_SIZE={world} do not fit: RANK must be a number "
                         "from 0 to WORLD_SIZE - 1; unset both to run on one machine")
    return int(rank), int(world)


def default_workers() -> int:
    """The cores this process may use, shared with torchrun's other processes on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


# --- vocabulary builder ---------------------------------------------------------------------

BYTES = tuple(bytes([value]) for value in range(256))
PEAK = 3.0  # how many times its final size the vocabulary reaches before it is pruned
GROWTH, DECAY = 0.25, 0.15  # share of the tokens taken in, or thrown out, per step on that way
FIRST_SWAP, LAST_SWAP = 0.3, 0.02  # share of the tokens exchanged in the first and the last round


def build_vocab(documents: Iterable[bytes], size: int, rounds: int = 12,
                log: Callable[[str], None] | None = None) -> bytes:
    """TokenMonster YAML of `size` ids (BOS the last) that segments `documents` into few tokens.

    From the 256 bytes up, the most frequent pairs of adjacent tokens are taken in, and above
    `size` the tokens that the text misses least are thrown out; `rounds` ever smaller exchanges
    follow. The exact segmenter counts the tokens of each round, and the best round is kept.
    """
    if not 257 <= size < MAX_IDS:
        raise InputError(f"--build-vocab {size}: the size must be 257 (the bytes and BOS) to "
                         f"{MAX_IDS - 1}")
    draft, wanted = _Draft(documents), size - 1
    draft.grow(min(int(PEAK * wanted), MAX_IDS - 2), GROWTH)
    if len(draft.tokens) < wanted:
        raise InputError(f"--build-vocab {size}: the {draft.text.size} bytes of --docs repeat too "
                         f"little for more than {len(draft.tokens) + 1} ids; give more text")
    draft.prune(wanted, DECAY)
    best, fewest = draft.tokens, draft.ids.size
    for number, share in enumerate(np.geomspace(FIRST_SWAP, LAST_SWAP, rounds), 1):
        draft.grow(int(wanted * (1 + share)), share)
        draft.prune(wanted, share / 2)
        if draft.ids.size < fewest:
            best, fewest = draft.tokens, draft.ids.size
        if log:
            log(f"vocabulary round {number}/{rounds}: {draft.text.size} bytes, "
                f"{draft.text.size / (fewest - draft.starts.size + 1):.4f} bytes per token")
    return vocabulary_yaml([*BYTES, *sorted(set(best).difference(BYTES))])


class _Draft:
    """A growing and shrinking vocabulary, and the text segmented with it.

    Document k is text[starts[k]:starts[k + 1]]; `ids` are those of the exact segmenter.
    """

    def __init__(self, documents: Iterable[bytes]):
        """Start with the 256 bytes."""
        kept = [document for document in documents if document]
        if not kept:
            raise InputError("--build-vocab: --docs holds no text; give documents to build from")
        self.text = np.frombuffer(b"".join(kept), dtype=np.uint8)
        self.starts = np.cumsum([0, *map(len, kept)], dtype=np.int64)
        self.take(BYTES)

    def take(self, tokens: tuple[bytes, ...]) -> None:
        """Make `tokens` the vocabulary (the bytes come first) and segment the text with it."""
        self.tokens = tokens
        self.segmenter = Segmenter(Vocabulary("draft", b"", (*tokens, b"")))
        self.ids = self.segmenter.segment(self.text, self.starts)

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
            if len(pair) <= MAX_TOKEN_BYTES and pair not in known:
                known.add(pair)
                found.append(pair)
        return found

    def prune(self, size: int, share: float) -> None:
        """Throw out the least missed tokens, at most `share` at a time, down to `size` tokens."""
        while len(self.tokens) > size:
            loss = self.losses()
            loss[:256] = np.iinfo(np.int64).max
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
            self.starts, self.segmenter.longest(self.text, self.starts), self.ids,
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


# --- demo data ------------------------------------------------------------------------------

DEMO = {
    "version": 1, "pieces": 1024, "vocabulary_ids": 1024, "sample_bytes": 1_500_000,
    "val_bytes": 170_000, "largest_val_document": 20_000, "smallest_text": 40,
    "packages": ["numpy", "networkx", "torch/nn", "torch/optim", "torch/distributions",
                 "torch/_tensor_docs.py", "torch/_torch_docs.py", "torch/functional.py"],
}
DEMO_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


def demo_sources() -> list[tuple[str, Path]]:
    """(document name, Python file) of the standard library and of installed packages, sorted."""
    roots = [("", Path(sysconfig.get_paths()["stdlib"]))]
    for package in DEMO["packages"]:
        spec = importlib.util.find_spec(package.split("/")[0])
        if spec is not None and spec.origin:
            roots.append((package, Path(spec.origin).parent.parent / package))
    found = {}
    for prefix, root in roots:
        for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
            inside = path.relative_to(root).parts
            if path.is_file() and not DEMO_SKIPPED & set(inside):
                found["/".join((*prefix.split("/"), *inside)).strip("/")] = path
    return sorted(found.items())


def module_texts(path: Path) -> list[str]:
    """Docstrings and other texts of several lines in a Python file, parsed but never imported."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return []
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    texts = [inspect.cleandoc(value) for value in values if isinstance(value, str)
             and "\n" in value and len(value) >= DEMO["smallest_text"]]
    return [text for text in texts if text.translate({10: 32, 9: 32}).isprintable()]


def demo_documents(sources: list[tuple[str, Path]], workers: int) -> dict[str, list[bytes]]:
    """Documents of the train and val splits, one for each module; no text occurs twice.

    Validation documents are chosen by a hash of their name, and lose no text to training.
    """
    with contextlib.closing(pool_map(module_texts, [path for _, path in sources], workers,
                                     lambda: None)) as results:
        texts = dict(zip((name for name, _ in sources), results, strict=True))
    order = sorted(texts, key=lambda name: sha256_bytes(name.encode()))
    seen: set[str] = set()
    splits: dict[str, list[bytes]] = {"val": [], "train": []}
    held = 0
    for name in order:
        size = sum(map(len, texts[name]))
        wanted = held < DEMO["val_bytes"] and size <= DEMO["largest_val_document"]
        fresh = [text for text in dict.fromkeys(texts[name]) if text not in seen]
        seen.update(fresh)
        if fresh:
            document = "\n\n".join(fresh).encode()
            splits["val" if wanted else "train"].append(document)
            held += len(document) * wanted
    return splits


def first_bytes(documents: Iterable[bytes], limit: int) -> list[bytes]:
    """The first documents that together have at most `limit` bytes, longer ones left out."""
    chosen, size = [], 0
    for document in documents:
        if size + len(document) <= limit:
            chosen.append(document)
            size += len(document)
    return chosen


def train_sentencepiece(documents: list[bytes], pieces: int) -> bytes:
    """A SentencePiece BPE model with byte fallback and the ids of the published SP1024."""
    import sentencepiece

    lines = (line.strip() for document in documents for line in document.decode().split("\n"))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for line in lines if line), model_writer=model, model_type="bpe",
        vocab_size=pieces, byte_fallback=True, character_coverage=0.999, pad_id=0, bos_id=1,
        eos_id=2, unk_id=3, num_threads=1, minloglevel=2)
    return model.getvalue()


def write_documents(path: Path, documents: Iterable[bytes]) -> None:
    """Write documents as JSON lines."""
    with open(path, "w", encoding="ascii") as file:
        for document in documents:
            file.write(json.dumps({"text": document.decode()}) + "\n")


def shard_documents(paths: list[Path], model: SentencePieceModel) -> Iterator[bytes]:
    """Source text (`sp.decode`) of every document of SentencePiece shards."""
    for index in range(len(paths)):
        for ids in whole_documents(paths, index, model.bos_id):
            text, starts = model.decode(ids, document_starts(ids, model.bos_id))
            for k in range(starts.size - 1):
                yield text[starts[k]:starts[k + 1]].tobytes()


def build_demo(folder: Path, log: Callable[[str], None] = print) -> dict[str, Path]:
    """Demo data made from documentation that is installed; returns the paths the trainer needs.

    Idempotent (a stamp holds the settings and the sources) and atomic.
    """
    sources = demo_sources()
    stamp = sha256_bytes(repr((sorted(DEMO.items()), sys.version, file_sha256(Path(__file__)), [
        (name, path.stat().st_size) for name, path in sources])).encode())
    folder = Path(folder)
    if not ((folder / "stamp").is_file() and (folder / "stamp").read_text() == stamp):
        begin = time.monotonic()
        building = folder.with_name(folder.name + ".building")
        with file_errors(f"write the demo data {folder}"):
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
            _build_demo(building, sources, log)
            (building / "stamp").write_text(stamp)
            shutil.rmtree(folder, ignore_errors=True)
            building.rename(folder)
        log(f"demo: built {folder} in {time.monotonic() - begin:.1f} s")
    return _demo_paths(folder)


def _demo_paths(folder: Path) -> dict[str, Path]:
    """Where the parts of the demo data are."""
    return {"data_path": folder / "scylla", "tokenizer_path": folder / "scylla" / "demo.yaml",
            "meta_path": folder / "scylla" / META_NAME, "train_text": folder / "train.jsonl",
            "val_text": folder / "val.jsonl", "sp_data_path": folder / "sp",
            "sp_model": folder / "sp" / "demo.model"}


def _build_demo(folder: Path, sources: list[tuple[str, Path]], log: Callable[[str], None]) -> None:
    """Text -> SentencePiece shards -> vocabulary -> exact Scylla shards, as the tool does it."""
    paths, workers = _demo_paths(folder), min(2, default_workers())
    splits = demo_documents(sources, workers)
    log("demo: " + ", ".join(f"{sum(map(len, documents)) / 1e6:.2f} MB of {split} text"
                             for split, documents in splits.items()))
    shards = OutputFolder(paths["sp_data_path"])
    sample = first_bytes(splits["train"], DEMO["sample_bytes"])
    shards.put(paths["sp_model"], train_sentencepiece(sample, DEMO["pieces"]))
    model = SentencePieceModel(paths["sp_model"])
    for split, documents in splits.items():
        path = paths[f"{split}_text"]
        write_documents(path, documents)
        DocumentJob(shards, DocumentReader([path]), SentencePieceEngine(model), split,
                    DEFAULT_SHARD_TOKENS).run(workers)
        made = [shards.path / f"fineweb_{split}_000000.bin"]
        write_documents(path, shard_documents(made, model))
    texts = DocumentReader([paths["train_text"]]).documents()
    vocabulary = build_vocab(first_bytes(texts, DEMO["sample_bytes"]), DEMO["vocabulary_ids"])
    engine = ScyllaEngine(load_vocabulary(vocabulary, "demo.yaml"))
    output = OutputFolder(paths["data_path"])
    inputs = find_shards(str(shards.path / "fineweb_*.bin"))
    job = ShardJob(output, inputs, model, engine, Progress(len(inputs), 0, float("inf")))
    retokenize_shards(job, list(range(len(inputs))), workers)
    finish(output, engine)
    log(f"demo: {sum(1 for token in engine.vocabulary.tokens if token)} tokens, byte-exact")


def byte_model_bpb(train_text: Path, val_text: Path) -> float:
    """Bits per byte of an order-2 byte model of one text on the other: the demo's yardstick.

    Witten-Bell interpolation of orders 2, 1 and 0 with the uniform distribution. Both files are
    JSON lines; a document begins after two zero bytes, which are not scored.
    """
    seen, text = (np.frombuffer(b"".join(b"\0\0" + document for document in
                                         DocumentReader([path]).documents()), np.uint8)
                  for path in (train_text, val_text))
    probability = np.full(text.size - 2, 1 / 256)
    for order in range(3):
        grams, wanted = (sum(t[2 - i:t.size - i].astype(np.int64) << 8 * i
                             for i in range(order + 1)) for t in (seen, text))
        counts = np.bincount(grams, minlength=256 ** (order + 1)).reshape(-1, 256)
        total, kinds = counts.sum(1)[wanted >> 8], (counts > 0).sum(1)[wanted >> 8]
        mixed = (counts.ravel()[wanted] + kinds * probability) / np.maximum(total + kinds, 1)
        probability = np.where(total > 0, mixed, probability)
    return float(-np.log2(probability[text[2:] > 0]).mean())


# --- bench ----------------------------------------------------------------------------------

BENCH_BYTES = 20_000_000


def sp_decode_rate(job: ShardJob) -> float:
    """MB/s of `sp.decode` over the first documents, the best of three: the yardstick."""
    documents, size = [], 0
    for ids in whole_documents(job.paths, 0, job.model.bos_id):
        starts = document_starts(ids, job.model.bos_id)
        documents += [ids[starts[k]:starts[k + 1]].tolist() for k in range(starts.size - 1)]
        size += 2 * ids.size
        if size > BENCH_BYTES:
            break
    best = 0.0
    for _ in range(3):
        begin = time.perf_counter()
        count = sum(len(job.model.processor.decode(ids).encode()) for ids in documents)
        best = max(best, count / 1e6 / (time.perf_counter() - begin))
    return best


def bench(job: ShardJob, workers: int) -> None:
    """Print the speed of re-tokenizing end to end next to `sp.decode`, for 1 and more workers."""
    yardstick = sp_decode_rate(job)
    print(f"sp.decode: {yardstick:.1f} MB/s on one core")
    job.engine.encode_documents([b"compiles the kernels"])
    rates = {}
    for count in sorted({1, workers}):
        with tempfile.TemporaryDirectory(dir=job.folder.path) as scratch:
            indices = list(range(len(job.paths)))
            run = dataclasses.replace(job, folder=OutputFolder(Path(scratch)),
                                      progress=Progress(len(indices), 0, float("inf")))
            begin = time.perf_counter()
            retokenize_shards(run, indices, count)
            seconds = time.perf_counter() - begin
        size = sum(run.progress.counters[0::3])
        rates[count] = size / 1e6 / seconds
        print(f"end to end, {count} worker(s): {size / 1e6:.1f} MB in {seconds:.2f} s, "
              f"{rates[count]:.1f} MB/s, {rates[count] / yardstick:.2f} x sp.decode, "
              f"{rates[count] / rates[1]:.2f} x one worker")
    peak = max(resource.getrusage(who).ru_maxrss
               for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"peak memory of a process: {peak / 1024:.0f} MiB")


# --- command line ---------------------------------------------------------------------------


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; contradictions are reported with the usage."""
    parser = argparse.ArgumentParser(
        description="Re-tokenize SentencePiece shards or documents, byte for byte exact. With "
        "torchrun's RANK and WORLD_SIZE the shards are spread over machines.")
    add = parser.add_argument
    add("--sp-shards", metavar="GLOB", help="input shards; one output shard each, same name")
    add("--docs", metavar="FILE", nargs="+", type=Path,
        help="JSON lines with \"text\" instead of shards (.jsonl, .gz, .xz, .zst)")
    add("--split", choices=("train", "val"), default="train", help="what --docs are (train)")
    add("--shard-tokens", type=positive, default=DEFAULT_SHARD_TOKENS,
        help="tokens per shard with --docs (100000000)")
    add("--sp-model", metavar="MODEL", help="SentencePiece model of the shards; with --docs and no "
        "--vocab, the model to make SentencePiece shards with")
    add("--vocab", metavar="FILE", help="TokenMonster vocabulary, YAML")
    add("--output-dir", metavar="DIR", type=Path, help="where shards, manifest.json, meta.npz go")
    add("--workers", type=positive, help="processes (all cores)")
    add("--allow-lossy", action="store_true",
        help="go on with a vocabulary that is not byte-exact, and count what is wrong")
    add("--bench", action="store_true", help="time --sp-shards into a scratch folder")
    add("--build-vocab", metavar="N", type=positive,
        help="build a byte-exact vocabulary of N ids from --docs")
    add("--build-bytes", metavar="B", type=positive, default=50_000_000,
        help="bytes of text that --build-vocab reads, whole documents (50000000)")
    add("--build-rounds", metavar="R", type=positive, default=12,
        help="rounds of exchanging tokens, for --build-vocab (12)")
    add("--output", metavar="FILE", type=Path, default=Path("vocab.yaml"),
        help="where --build-vocab writes (vocab.yaml)")
    options = parser.parse_args(arguments)
    if bool(options.sp_shards) == bool(options.docs):
        parser.error("give either --sp-shards or --docs")
    if options.sp_shards and not (options.sp_model and options.vocab):
        parser.error("--sp-shards needs --sp-model and --vocab")
    if options.docs and sum(map(bool, (options.vocab, options.sp_model, options.build_vocab))) != 1:
        parser.error("--docs needs one of --vocab, --sp-model and --build-vocab")
    if not options.output_dir and not options.build_vocab:
        parser.error("--output-dir is missing")
    if options.build_vocab and not options.docs or options.bench and not options.sp_shards:
        parser.error("--build-vocab needs --docs, --bench needs --sp-shards")
    return options


def finish(folder: OutputFolder, engine: Engine) -> dict:
    """Write tokenizer, byte table and manifest, clear partial files; returns the totals."""
    put_tokenizer(folder, engine)
    manifest = folder.publish(tokenizer_record(engine))
    folder.clean()
    return manifest["totals"]["all"]


def refuse_foreign(folder: OutputFolder, engine: Engine, mine: Callable[[str], bool]) -> None:
    """InputError when the folder holds shards of another vocabulary that this run will not redo."""
    for name, entry in folder.entries().items():
        if entry["identity"]["tokenizer_sha256"] != engine.sha256 and not mine(name):
            raise InputError(f"{folder.path / name}: was made with another vocabulary than "
                             f"{engine.name}; choose another --output-dir or remove the shard")


def run_shards(options: argparse.Namespace) -> None:
    """--sp-shards: re-tokenize, or time it with --bench."""
    rank, world = rank_and_world()
    paths = find_shards(options.sp_shards)
    engine = make_engine(load_vocabulary(options.vocab), options.allow_lossy)
    model = SentencePieceModel(options.sp_model)
    for path in paths:
        if path.parent.resolve() == options.output_dir.resolve():
            raise InputError(f"{path}: --output-dir is the folder of the input, whose shards it "
                             "would replace; choose another")
    folder = OutputFolder(options.output_dir)
    indices = list(range(len(paths)))[rank::world]
    total = sum(open_shard(paths[index]).size for index in indices)
    job = ShardJob(folder, paths, model, engine, Progress(len(paths), total))
    workers = 1 if engine.status == "lossy" else options.workers or default_workers()
    if options.bench:
        bench(job, workers)
        return
    names = {path.name for path in paths}
    refuse_foreign(folder, engine, names.__contains__)
    results = retokenize_shards(job, indices, min(workers, len(indices)))
    job.progress.report(last=True)
    report(finish(folder, engine), results, folder)


def run_documents(options: argparse.Namespace) -> None:
    """--docs: tokenize documents with a vocabulary, or with a SentencePiece model."""
    if rank_and_world()[0]:
        print("documents are one stream: rank 0 makes the shards", file=sys.stderr)
        return
    engine = (make_engine(load_vocabulary(options.vocab), options.allow_lossy) if options.vocab
              else SentencePieceEngine(SentencePieceModel(options.sp_model)))
    reader = DocumentReader(options.docs)
    folder = OutputFolder(options.output_dir)
    refuse_foreign(folder, engine, lambda name: name.startswith(f"fineweb_{options.split}_"))
    job = DocumentJob(folder, reader, engine, options.split, options.shard_tokens)
    workers = 1 if isinstance(engine, LossyEngine) else options.workers or default_workers()
    results = job.run(workers)
    report(finish(folder, engine), results, folder)


def run_build(options: argparse.Namespace) -> None:
    """--build-vocab: write a vocabulary built from documents."""
    texts = first_bytes(DocumentReader(options.docs).documents(), options.build_bytes)
    data = build_vocab(texts, options.build_vocab, options.build_rounds,
                       lambda line: print(line, file=sys.stderr, flush=True))
    with file_errors(f"write {options.output}"):
        temporary = options.output.with_name(options.output.name + ".part")
        temporary.write_bytes(data)
        temporary.replace(options.output)
    print(f"{options.output}: {load_vocabulary(options.output).vocab_size} ids")


def report(totals: dict, results: list[str], folder: OutputFolder) -> None:
    """The closing lines on stdout."""
    state = "exact" if totals["source_bytes"] == totals["decoded_bytes"] and not (
        totals["bad_documents"]) else "NOT EXACT"
    print(f"{folder.path}: {results.count('made')} made, {results.count('skipped')} skipped; "
          + " ".join(f"{key}:{totals[key]}" for key in COUNTS)
          + f" drift:{totals['decoded_bytes'] - totals['source_bytes']} {state}")


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit code: 0, 1 after an error, 128 + signal when stopped."""
    options = parse_arguments(arguments)
    stop_on_signals()
    try:
        with file_errors("go on"):
            if options.build_vocab:
                run_build(options)
            elif options.docs:
                run_documents(options)
            else:
                run_shards(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        if options.output_dir:  # a signal may fall between the making and the guarding of a file
            with contextlib.suppress(InputError):
                OutputFolder(options.output_dir).clean()
        print("stopped: finished shards are kept; run again to go on", file=sys.stderr)
        return 128 + int(stop.args[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
