"""Attention over a million tokens, in two processes that have 600 MB each.

Keys, values, queries and results lie on the disk, in zarr; Dask's workers read and write
them chunk by chunk. At the end one row is checked against plain NumPy.

    pip install ".[dask]" rich
    python examples/million_tokens.py
    python examples/million_tokens.py --tokens 200000 --heads 2 --window 1000
"""

import argparse
import tempfile
import time
from pathlib import Path

import common
import dask.array as da
import numpy as np
import zarr
from distributed import Client, LocalCluster
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import mha_fast
import mha_fast.dask

DIM = 64
CHUNK = 16 * 3072  # tokens: 12.6 MB of each array and head


def make(folder: Path, tokens: int, heads: int) -> None:
    """Random queries, keys and values in files."""
    drawn = da.random.default_rng(0).standard_normal
    for name in "qkv":
        x = drawn((heads, tokens, DIM), chunks=(1, CHUNK, DIM)).astype("f4")
        x.to_zarr(str(folder / name), compressors=None)


def attend(folder: Path, window: int) -> "da.Array":
    """The task: chunks of the result, each of which is written once it is known."""
    q, k, v = (da.from_zarr(str(folder / name)) for name in "qkv")
    out = mha_fast.dask.attention(q, k, v, causal=True, window=(window - 1, 0))
    target = zarr.create_array(
        str(folder / "out"), shape=out.shape, chunks=(1, CHUNK, DIM), dtype="f4", compressors=None
    )
    return out.map_blocks(Writer(target), dtype="f4", meta=np.empty((0, 0, 0), "f4"))


class Writer:
    """Writes a block of the result to its place, and returns how many rows it had."""

    def __init__(self, target):
        self.target = target

    def __call__(self, block, block_info=None):
        place = tuple(slice(*ends) for ends in block_info[0]["array-location"])
        self.target[place] = block
        return np.full((1, 1, 1), block.shape[1], "f4")


def follow(client: Client, blocks: "da.Array") -> None:
    """A bar that counts the chunks that are written."""
    futures = client.compute(list(blocks.to_delayed().ravel()))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn()) as progress:
        bar = progress.add_task("chunks written", total=len(futures))
        while not all(future.done() for future in futures):
            progress.update(bar, completed=sum(future.done() for future in futures))
            time.sleep(0.2)
        progress.update(bar, completed=len(futures))
    client.gather(futures)  # raises what went wrong


def peak_memory() -> int:
    """Bytes that this process has had at most."""
    with open("/proc/self/status") as status:
        return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])


def check(folder: Path, row: int, window: int) -> float:
    """How far a row of the first head is from the reference's."""
    q, k, v, out = (zarr.open(str(folder / name), mode="r") for name in (*"qkv", "out"))
    keys = slice(max(row - window + 1, 0), row + 1)
    wide = (x[0, part].astype(np.float64) for x, part in ((q, slice(row, row + 1)), (k, keys),
                                                         (v, keys)))  # fmt: skip
    return float(abs(out[0, row] - mha_fast.reference.attention(*wide)[0]).max())


def parse_args(arguments=None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default, text in (
        ("tokens", 2**20, "in each head"),
        ("heads", 8, "of 64 numbers"),
        ("window", 4096, "keys that a token sees, itself among them"),
        ("memory", 600, "megabytes of each worker"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default:,})")
    parser.add_argument("--folder", type=Path, help="for the files (a temporary one)")
    found = parser.parse_args(arguments)
    for name, x in vars(found).items():
        if isinstance(x, int) and x < 1:
            parser.error(f"--{name} is {x}, expected at least 1")
    return found


def main() -> None:
    """Make the files, compute, report."""
    args = parse_args()
    with (
        tempfile.TemporaryDirectory(dir=args.folder) as folder,
        LocalCluster(
            n_workers=2, threads_per_worker=1, memory_limit=f"{args.memory}MB",
            dashboard_address=None,
        ) as cluster,
        Client(cluster) as client,
    ):  # fmt: skip
        folder = Path(folder)
        size = 4 * args.heads * args.tokens * DIM * 4 / 1e9
        print(f"{args.heads} heads of {args.tokens:,} tokens: {size:.1f} GB in and out")
        make(folder, args.tokens, args.heads)
        start = time.monotonic()
        follow(client, attend(folder, args.window))
        seconds = time.monotonic() - start
        print(f"{seconds:.1f} s, {args.tokens / seconds:,.0f} tokens a second")
        for name, peak in client.run(peak_memory).items():
            print(f"worker {name.rpartition(':')[2]}: {peak / 1e6:.0f} MB at most")
        row = args.tokens * 3 // 4
        print(f"row {row:,} is off by {check(folder, row, args.window):.1e}")


if __name__ == "__main__":
    common.run(main)
