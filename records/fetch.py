"""Fetch FineWeb shards and their tokenizer from a Hugging Face dataset repository, checked.

    python records/fetch.py --output data/record --shards 80

Files are listed with size and hash, downloaded by huggingface_hub (which resumes a broken download
and honours HF_ENDPOINT, HF_TOKEN and HTTPS_PROXY), and compared with both: SHA-256 for large files,
the git hash for small ones. What was checked stands in fetched.json and is not fetched again; once
all of it is there, the hub is not asked either.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPO = "willdepueoai/parameter-golf"
FOLDER, TOKENIZERS = "datasets/datasets/fineweb10B_sp1024", "datasets/tokenizers"
MODEL = "fineweb_1024_bpe.model"
LEDGER = "fetched.json"


class FetchError(Exception):
    """Nothing usable was fetched; the message says what is wrong and the remedy."""


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def wanted(repo: str, revision: str, shards: int) -> list[Any]:
    """Files to fetch, as the repository lists them: training shards, validation, the model."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        files = [entry for folder in (FOLDER, TOKENIZERS) for entry in api.list_repo_tree(
            repo, folder, repo_type="dataset", revision=revision) if hasattr(entry, "size")]
    except Exception as error:  # of the network library, which depends on the hub's version
        raise FetchError(f"cannot list {repo} ({first_line(error)}); check the network and "
                         "HF_ENDPOINT, or put shards there and set DATA_PATH") from error
    by_name = {Path(entry.path).name: entry for entry in sorted(files, key=lambda e: e.path)}
    train = [name for name in by_name if name.startswith("fineweb_train_")][:shards]
    val = [name for name in by_name if name.startswith("fineweb_val_")]
    if len(train) < shards or not val or MODEL not in by_name:
        raise FetchError(f"{repo} has {len(train)} of {shards} training shards, {len(val)} of "
                         f"validation and {'a' if MODEL in by_name else 'no'} {MODEL}; lower "
                         "SHARDS, or name another repository with --repo")
    return [by_name[name] for name in [*train, *val, MODEL]]


def right(path: Path, entry: Any) -> bool:
    """Whether a file has the size and the hash that the repository lists."""
    if not path.is_file() or path.stat().st_size != entry.size:
        return False
    large = entry.lfs is not None
    digest = hashlib.sha256() if large else hashlib.sha1(b"blob %d\0" % entry.size)
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest() == (entry.lfs.sha256 if large else entry.blob_id)


def stamp(path: Path) -> list[int]:
    """Size and time of a file, by which a checked one is known again."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def fetch_one(entry: Any, output: Path, repo: str, revision: str) -> str:
    """Download a file, whole and checked; a damaged one is fetched once more from the start."""
    from huggingface_hub import hf_hub_download

    for again in (False, True):
        try:
            path = Path(hf_hub_download(repo, entry.path, repo_type="dataset", revision=revision,
                                        local_dir=output, force_download=again))
        except Exception as error:
            raise FetchError(f"{entry.path}: {first_line(error)}; run again, finished files are "
                             "kept and broken ones go on") from error
        if right(path, entry):
            return entry.path
        path.unlink()
    raise FetchError(f"{entry.path}: size or hash is not what {repo} lists; it was removed, run "
                     "again or choose another mirror with HF_ENDPOINT")


def room(output: Path, missing: Iterable[Any]) -> None:
    """Raise FetchError unless the disk holds what is missing."""
    needed, free = sum(entry.size for entry in missing), shutil.disk_usage(output).free
    if needed > free:
        raise FetchError(f"{output} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are to be "
                         "fetched; make room, lower SHARDS, or set DATA_DIR to a larger disk")


def fetch(output: Path, shards: int, repo: str, revision: str) -> None:
    """Fetch whatever is not there yet; prints a line for each file."""
    output.mkdir(parents=True, exist_ok=True)
    ledger_path, asked = output / LEDGER, [repo, revision, shards]
    ledger = json.loads(ledger_path.read_text()) if ledger_path.exists() else {}
    complete = ledger.pop("complete", {})  # what was asked for, and the files that answered it

    def there(name: str) -> bool:
        return (output / name).is_file() and ledger.get(name) == stamp(output / name)

    def write_ledger() -> None:
        part = ledger_path.with_suffix(".part")
        part.write_text(json.dumps(ledger, indent=1) + "\n", encoding="utf-8")
        part.replace(ledger_path)

    if complete.get("asked") == asked and all(map(there, complete["files"])):
        print(f"{len(complete['files'])} files are there and checked, 0 of them fetched now")
        return
    files = wanted(repo, revision, shards)
    missing = [entry for entry in files if not there(entry.path)]
    room(output, missing)
    with ThreadPoolExecutor(4) as pool:
        done = pool.map(lambda entry: fetch_one(entry, output, repo, revision), missing)
        for count, name in enumerate(done, 1):
            ledger[name] = stamp(output / name)
            write_ledger()
            print(f"fetched {name} ({count}/{len(missing)})", flush=True)
    ledger["complete"] = dict(asked=asked, files=[entry.path for entry in files])
    write_ledger()
    print(f"{len(files)} files are there and checked, {len(missing)} of them fetched now")


def main(arguments: list[str] | None = None) -> int:
    """Fetch; 0, or 1 with a message."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=80, help="training shards (80)")
    parser.add_argument("--repo", default=REPO)
    parser.add_argument("--revision", default="main")
    options = parser.parse_args(arguments)
    try:
        fetch(options.output, options.shards, options.repo, options.revision)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
