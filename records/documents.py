"""Documents of JSON-lines files, plain or compressed, and of SentencePiece shards."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from retokenize_scylla import (
    InputError,
    SentencePieceModel,
    file_errors,
    needs,
    require,
    whole_documents,
)


class DocumentReader:
    """Documents of JSON-lines files, plain or compressed (.gz, .xz, .zst), in file order."""

    def __init__(self, paths: list[Path]):
        """InputError when a file is missing."""
        for path in paths:
            require(path.is_file(), f"{path}: no such document file; --docs takes .jsonl, .gz, .xz "
                    "or .zst")
        damage = [EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile]
        if any(path.suffix == ".zst" for path in paths):
            with needs("zstandard"):
                import zstandard
            damage.append(zstandard.ZstdError)
        self.damage = tuple(damage)
        self.paths, self.total = paths, sum(path.stat().st_size for path in paths)
        self.position = 0  # bytes of the files that have been read

    def lines(self) -> Iterator[tuple[str, bytes]]:
        """(file:number, line) of every non-empty line; InputError when a file is damaged."""
        passed = 0
        for path in self.paths:
            with file_errors(f"read {path}"), open(path, "rb") as file:
                try:
                    for number, line in enumerate(decompressed(path, file), 1):
                        self.position = passed + file.tell()
                        if line.strip():
                            yield f"{path}:{number}", line
                except self.damage as error:
                    raise InputError(f"{path}: damaged or truncated ({error}); fetch the file "
                                     "again") from None
                self.position = passed = passed + path.stat().st_size

    def documents(self, skip: int = 0) -> Iterator[bytes]:
        """UTF-8 of the "text" of every line but the first `skip`, which are passed over at once."""
        lines = self.lines()
        deque(itertools.islice(lines, skip), maxlen=0)
        return (document_text(line, where) for where, line in lines)


def decompressed(path: Path, file: IO[bytes]) -> Iterable[bytes]:
    """Lines of an open file, decompressed as its name says; EOFError and others when damaged."""
    if path.suffix == ".gz":
        return gzip.open(file)
    if path.suffix == ".xz":
        return frame_lines(file, lzma.LZMADecompressor)
    if path.suffix == ".zst":
        import zstandard

        return frame_lines(file, zstandard.ZstdDecompressor().decompressobj)
    return file


def frame_lines(file: IO[bytes], decompressor: Callable[[], Any]) -> Iterator[bytes]:
    """Lines of an archive of one or more frames, each by a decompressor of its own.

    The packages' own readers end without an error where a .zst is cut, or a .xz is followed by
    what is none.
    """
    frame, rest = decompressor(), b""
    while chunk := file.read(1 << 17):
        while chunk := chunk.lstrip(b"\0") if frame.eof else chunk:  # .xz may be padded
            frame = decompressor() if frame.eof else frame
            *lines, rest = (rest + frame.decompress(chunk)).split(b"\n")
            yield from lines
            chunk = frame.unused_data
    if not frame.eof:
        raise EOFError("the last frame is cut off")
    yield rest


def document_text(line: bytes, where: str) -> bytes:
    """UTF-8 of the "text" of one JSON line."""
    try:
        return json.loads(line)["text"].encode()
    except UnicodeEncodeError as error:
        problem = f"the text has a lone surrogate at character {error.start}"
    except (ValueError, RecursionError) as error:
        problem = f"not JSON ({error})"
    except (KeyError, TypeError, AttributeError):
        problem = f"no string \"text\" in {line[:60]!r}"
    raise InputError(f"{where}: {problem}; each line must be an object with a string \"text\"")


def shard_documents(paths: list[Path], model: SentencePieceModel) -> Iterator[bytes]:
    """Source text (`sp.decode`) of every document of SentencePiece shards."""
    for index in range(len(paths)):
        for ids in whole_documents(paths, index, model.bos_id):
            yield from (text.tobytes() for text in model.decode(ids).split())
