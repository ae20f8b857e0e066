"""Tokenizers of shards that are not byte-exact Scylla shards: for comparisons, and for proof."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retokenize_scylla import (
    Documents,
    Encoded,
    InputError,
    PieceTable,
    SentencePieceModel,
    Tokenizer,
    Vocabulary,
    compare,
    needs,
    require,
)


def with_bos(parts: list[list[int]], bos: int) -> Documents:
    """Documents of lists of ids."""
    each = itertools.chain.from_iterable(ids for part in parts for ids in ((bos,), part))
    return Documents.after_bos(np.fromiter(each, dtype=np.uint16), bos)


class SentencePieceTokenizer(Tokenizer):
    """Plain SentencePiece shards; a document is bad when the trainer's byte table miscounts it.

    The source of such shards is what `sp.decode` gives back.
    """

    kind = "sentencepiece"

    def __init__(self, model: SentencePieceModel):
        """The trainer counts no leading space after a boundary."""
        super().__init__(model)
        self.model, self.counting = model, PieceTable(*model.pieces(b"", b""), strip=1)

    def encode_documents(self, text: Documents) -> Encoded:
        """Ids of documents of text."""
        texts = [part.tobytes().decode() for part in text.split()]
        ids = with_bos(self.model.processor.encode(texts, num_threads=1), self.bos_id)
        return compare(ids, self.model.decode(ids), self.counting.join(ids))


class LossyTokenizer(Tokenizer):
    """Any other TokenMonster vocabulary, by the tokenmonster package; bad documents are counted."""

    status = "lossy"

    def __init__(self, vocabulary: Vocabulary):
        """Start the package's helper; InputError when package or helper are missing."""
        super().__init__(vocabulary)
        require(not vocabulary.marked, f"{self.name}: the tokenmonster package does not know case: "
                "ascii; use a byte-exact vocabulary")
        with needs("tokenmonster"):
            import tokenmonster
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / self.name
                path.write_bytes(self.data)
                self.package = (tokenmonster.load(str(path)) if self.data[0] <= 2
                                else tokenmonster.new(self.data))
        except OSError as error:
            raise InputError(
                f"{self.name}: the tokenmonster package cannot load its helper program ({error}): "
                "its first use downloads tokenmonsterserver from Hugging Face into "
                "~/_tokenmonster, which needs a network once; or use a byte-exact vocabulary"
            ) from None
        self.encoding = "latin-1" if vocabulary.charset == "none" else "utf-8"
        sizes = [len(self._decode([k])) for k in range(self.bos_id)]
        self.base_bytes = np.array([*sizes, 0], dtype=np.int16)

    def _decode(self, ids: Sequence[int]) -> bytes:
        """Bytes that the package decodes; it has no batches and no empty lists."""
        return self.package.decode(ids).encode(self.encoding) if len(ids) else b""

    def encode_documents(self, text: Documents) -> Encoded:
        """Ids of documents of text, and which of them decode differently."""
        parts = [self.package.tokenize(part.tobytes()) for part in text.split()]
        lists = [[] if part is None else [int(k) for k in part] for part in parts]
        decoded = Documents.joined([self._decode(ids) for ids in lists])
        return compare(with_bos(lists, self.bos_id), text, decoded)
