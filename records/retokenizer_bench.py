"""`retokenize_scylla.py --bench`: what each stage costs, next to the library in its place."""

from __future__ import annotations

import resource
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path

from retokenize_scylla import (
    Documents,
    OutputFolder,
    Segmenter,
    ShardJob,
    mark_capitals,
    restore_capitals,
)

BLOCKS = 150  # of the first shard, for the stages: some 24 MB of text
CAPITALS = "capitals to marks and back"


def stages(job: ShardJob) -> dict[str, Callable[[], object]]:
    """Each stage for one core, over the same text, and the library's way to do the same."""
    sp, tokenizer = job.model.processor, job.tokenizer
    blocks = [block for block, _ in zip(job.documents(0), range(BLOCKS), strict=False)]
    lists = [[ids.tolist() for ids in block.split()] for block in blocks]
    texts = [job.model.decode(block) for block in blocks]
    made = [tokenizer.encode_documents(text).ids for text in texts]  # compiles the kernels, too
    found = {"sp.decode": lambda: [sp.decode(ids).encode() for block in lists for ids in block],
             "table of pieces": lambda: [job.model.decode(block) for block in blocks]}
    if isinstance(tokenizer, Segmenter):
        tokens = [tokenizer.pieces.join(Documents.after_bos([k], k)).values.tobytes()
                  for k in range(tokenizer.vocab_size)]
        joined = [tokenizer.pieces.join(ids).values.tobytes() for ids in made]
        found |= {
            "segmenter": lambda: [tokenizer.segment(text) for text in texts],
            "b''.join": lambda: [b"".join([tokens[k] for k in ids.values.tolist()])
                                 for ids in made],
            "joining kernel": lambda: [tokenizer.pieces.join(ids) for ids in made]}

        def plain() -> None:
            for block, wanted in zip(lists, joined, strict=True):
                again = Documents.joined([sp.decode(ids).encode() for ids in block])
                ids = tokenizer.segment(again).values
                assert b"".join([tokens[k] for k in ids.tolist()]) == wanted

        def ours() -> None:
            for block in blocks:
                tokenizer.encode_documents(job.model.decode(block))

        found |= {"these three, library and segmenter": plain, "these three, ours": ours}
        if tokenizer.marked:
            found[CAPITALS] = lambda: [restore_capitals(mark_capitals(text)) for text in texts]
    return found


def bench(job: ShardJob, workers: int) -> None:
    """Print MB/s end to end for one and for more workers, and of the stages."""
    job.tokenizer.encode_documents(Documents.joined([b"compiles the kernels"]))
    whole: dict[int, tuple[float, float]] = {}
    for count in sorted({1, workers}):
        with tempfile.TemporaryDirectory(dir=job.folder.path) as scratch:
            run = ShardJob(OutputFolder(Path(scratch)), job.tokenizer, job.paths, job.model)
            seconds = timeit.timeit(lambda: run.run(count), number=1)  # noqa: B023
            whole[count] = run.folder.publish(run.tokenizer)["source_bytes"] / 1e6, seconds
    peak = max(resource.getrusage(who).ru_maxrss
               for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    every = stages(job)
    size = sum(map(len, every["sp.decode"]())) / 1e6
    rates = {name: size / min(timeit.repeat(stage, number=1, repeat=3))
             for name, stage in every.items()}
    for name, rate in rates.items():
        print(f"{name}: {rate:.1f} MB/s on one core")
    alone = whole[1][0] / whole[1][1]
    for count, (size, seconds) in whole.items():
        rate = size / seconds
        print(f"end to end, {count} worker(s): {size:.1f} MB in {seconds:.2f} s, {rate:.1f} MB/s, "
              f"{rate / rates['sp.decode']:.2f} x sp.decode, {rate / alone:.2f} x one worker")
    if CAPITALS in rates:
        print(f"{CAPITALS}: {alone / rates[CAPITALS]:.1%} of one worker's time")
    print(f"peak memory of a process: {peak / 1024:.0f} MiB")
