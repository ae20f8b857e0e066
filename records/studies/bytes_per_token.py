"""Bytes per token of vocabularies on documents, BOS not counted, every document decoded again.

    python records/studies/bytes_per_token.py --docs d.jsonl --vocab a.yaml --sp-model m.model
"""

from __future__ import annotations

import argparse
import functools
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import retokenize_scylla as tool  # noqa: E402


def measure(documents: Iterable[bytes], encode: Callable[[bytes], list[int]],
            decode: Callable[[list[int]], bytes]) -> float:
    """Source bytes per token; a document that does not decode to itself is an error."""
    size = tokens = 0
    for document in documents:
        ids = encode(document)
        if decode(ids) != document:
            raise SystemExit(f"a document of {len(document)} bytes does not decode to itself")
        size, tokens = size + len(document), tokens + len(ids)
    return size / tokens


def join(pieces: tuple[bytes, ...], ids: list[int]) -> bytes:
    """Bytes of ids by concatenation."""
    return b"".join(pieces[i] for i in ids)


def main() -> int:
    """Print a Markdown table: raw documents, and with --sp-model as that model decodes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, nargs="+", required=True)
    parser.add_argument("--vocab", type=Path, nargs="*", default=[])
    parser.add_argument("--sp-model", type=Path)
    options = parser.parse_args()
    raw = list(tool.DocumentReader(options.docs).documents())
    texts = {"raw": raw}
    print("| vocabulary | ids | text | bytes/token |\n|--|--|--|--|")
    if options.sp_model:
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(model_file=str(options.sp_model))
        ids = [model.encode(document.decode()) for document in raw]
        texts["as the model decodes it"] = [model.decode(one).encode() for one in ids]
        tokens = sum(map(len, ids))
        for name, documents in texts.items():
            print(f"| {options.sp_model.name} | {model.vocab_size()} | {name} "
                  f"| {sum(map(len, documents)) / tokens:.3f} |")
    for path in options.vocab:
        vocabulary = tool.load_vocabulary(path)
        pieces, encode = vocabulary.tokens, tool.Segmenter(vocabulary).encode
        decode = functools.partial(join, pieces)
        for name, documents in texts.items():
            print(f"| {path.name} | {len(pieces)} | {name} "
                  f"| {measure(documents, encode, decode):.3f} |")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    sys.exit(main())
