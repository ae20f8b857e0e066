"""Bytes per token of vocabularies on documents, BOS not counted, every document decoded again.

    python records/studies/bytes_per_token.py --docs d.jsonl --vocab a.yaml --sp-model m.model
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from records.documents import DocumentReader  # noqa: E402
from records.other_tokenizers import SentencePieceTokenizer  # noqa: E402
from retokenize_scylla import (  # noqa: E402
    Documents,
    Segmenter,
    SentencePieceModel,
    Tokenizer,
    load_vocabulary,
)


def bytes_per_token(tokenizer: Tokenizer, text: Documents) -> float:
    """Source bytes per token; InputError if a document does not decode to itself."""
    counts = tokenizer.encode_documents(text).counts()
    return counts["source_bytes"] / (counts["tokens"] - counts["documents"])


def main() -> int:
    """Print a Markdown table: raw documents, and with --sp-model as that model decodes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, nargs="+", required=True)
    parser.add_argument("--vocab", type=Path, nargs="*", default=[])
    parser.add_argument("--sp-model", type=Path)
    options = parser.parse_args()
    texts = {"raw": Documents.joined(list(DocumentReader(options.docs).documents()))}
    tokenizers: list[Tokenizer] = [Segmenter(load_vocabulary(path)) for path in options.vocab]
    if options.sp_model:
        model = SentencePieceModel(options.sp_model)
        tokenizers.insert(0, SentencePieceTokenizer(model))
        ids = tokenizers[0].encode_documents(texts["raw"]).ids
        texts["as the model decodes it"] = model.decode(ids)
    print("| vocabulary | ids | text | bytes/token |\n|--|--|--|--|")
    for tokenizer in tokenizers:
        for name, text in texts.items():
            print(f"| {tokenizer.name} | {tokenizer.vocab_size} | {name} "
                  f"| {bytes_per_token(tokenizer, text):.3f} |")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    sys.exit(main())
