"""Fetch the first FineWeb shards and their tokenizer from a Hugging Face dataset repository.

    python records/fetch.py --output data/record --shards 80

huggingface_hub downloads the files. It goes on where a download broke off, and it honours
HF_ENDPOINT, HF_TOKEN and HTTPS_PROXY. fetched.json then notes the name and size of each file; as
long as all of them are there with that size, the hub is not asked again. Every failure ends the
program with exit code 1 and a message.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

REPO = "willdepueoai/parameter-golf"
FOLDER = "datasets/datasets/fineweb10B_sp1024"
MODEL = "datasets/tokenizers/fineweb_1024_bpe.model"


def listing(repo: str, shards: int) -> tuple[str, dict[str, int]]:
    """The commit of the repository, and the size in bytes of each file to fetch."""
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(repo, files_metadata=True)
    sizes = {file.rfilename: file.size for file in info.siblings}
    train, val = (sorted(name for name in sizes if name.startswith(f"{FOLDER}/fineweb_{split}_"))
                  for split in ("train", "val"))
    if len(train) < shards or not val or MODEL not in sizes:
        raise SystemExit(f"error: {repo} has {len(train)} of {shards} training shards, {len(val)} "
                         f"of validation and {'a' if MODEL in sizes else 'no'} {MODEL}; lower "
                         "SHARDS, or name another repository with --repo")
    return info.sha, {name: sizes[name] for name in [*train[:shards], *val, MODEL]}


def missing(output: Path, sizes: dict[str, int]) -> list[str]:
    """Names of the files that are not there with their size."""
    return [name for name, size in sizes.items()
            if not (output / name).is_file() or (output / name).stat().st_size != size]


def fetch(output: Path, repo: str, shards: int) -> dict[str, int]:
    """Fetch what is not there yet; the size in bytes of every file."""
    from huggingface_hub import snapshot_download

    commit, sizes = listing(repo, shards)
    output.mkdir(parents=True, exist_ok=True)
    needed = sum(sizes[name] for name in missing(output, sizes))
    if needed > (free := shutil.disk_usage(output).free):
        raise SystemExit(f"error: {output} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are "
                         "to be fetched; make room, lower SHARDS, or set DATA_DIR to a larger disk")
    for name in missing(output, sizes):  # the library would trust a file of a wrong size
        (output / name).unlink(missing_ok=True)
    snapshot_download(repo, repo_type="dataset", revision=commit, local_dir=output,
                      allow_patterns=list(sizes))
    if bad := missing(output, sizes):
        raise SystemExit(f"error: {', '.join(bad)}: not of the size that {repo} lists; run "
                         "again, or choose another mirror with HF_ENDPOINT")
    return sizes


def main(arguments: list[str] | None = None) -> None:
    """Fetch, unless everything is there; SystemExit with a message on any failure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=80, help="training shards (80)")
    parser.add_argument("--repo", default=REPO)
    options = parser.parse_args(arguments)
    asked, path = [options.repo, options.shards], options.output / "fetched.json"
    note = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if note.get("asked") != asked or missing(options.output, note["sizes"]):
        try:
            note = dict(asked=asked, sizes=fetch(options.output, *asked))
        except Exception as error:  # of the network library, which depends on the hub's version
            what = " ".join(str(error).split())[:300] or type(error).__name__
            raise SystemExit(f"error: {options.repo}: {what}; check the network and HF_ENDPOINT "
                             "and run again: finished files are kept, broken ones go on") from error
        path.write_text(json.dumps(note, indent=1), encoding="utf-8")
    print(f"all {len(note['sizes'])} files are in {options.output}")


if __name__ == "__main__":
    main()
