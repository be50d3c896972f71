import io
import os
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import get_worker_info

from clipmap_hf.data import loader
from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.loader import BatchPlan, PairDataset, PairStream
from clipmap_hf.data.pairs import load_pairs


ROWS, SHARD_ROWS = 50, 7


def collate(rows: list[dict]) -> dict:
    """What a collator is given: `(id, epoch)` of each row, and the worker that it runs in."""
    worker = get_worker_info()
    return {"rows": [(row["id"], row["epoch"]) for row in rows], "worker": worker.id if worker else 0}


def numbered_rows(shards):
    for shard in shards:
        for index in range(SHARD_ROWS):
            yield {"id": shard * SHARD_ROWS + index}


def stream(shards: int = 6, buffer: int = 10) -> PairStream:
    pairs = IterableDataset.from_generator(
        numbered_rows,
        features=datasets.Features({"id": datasets.Value("int64")}),
        gen_kwargs={"shards": list(range(shards))},
    )
    return PairStream(pairs, buffer)


def map_style(rows: int = ROWS) -> PairDataset:
    return PairDataset(Dataset.from_dict({"id": list(range(rows))}))


def steps_of(pairs, count: int, plan: BatchPlan, start: int = 0) -> list[list[list[tuple[int, int]]]]:
    return [[chunk["rows"] for chunk in step] for step in islice(pairs.steps(plan, collate, start), count)]


def rows_in(steps) -> list[tuple[int, int]]:
    return [row for step in steps for chunk in step for row in chunk]


# Plans


def test_a_plan_shares_a_batch_out():
    plan = BatchPlan(24, 4, world_size=2)
    assert (plan.local_size, plan.chunk_size) == (12, 4)
    assert BatchPlan(24, world_size=2).chunk_size == 12


def test_a_batch_that_processes_cannot_share_is_an_error():
    with pytest.raises(ValueError, match="batch_size=10 .* multiple of the number of processes, 4"):
        BatchPlan(10, world_size=4)
    with pytest.raises(ValueError, match="micro_batch_size=5 must divide the 8 pairs"):
        BatchPlan(16, 5, world_size=2)


# Data sets with random access


def test_every_epoch_is_another_permutation_without_what_does_not_fill_a_batch():
    steps = steps_of(map_style(), 12, BatchPlan(8))
    epochs = [rows_in(steps[:6]), rows_in(steps[6:])]
    for number, rows in enumerate(epochs):
        ids = [row for row, _ in rows]
        assert {epoch for _, epoch in rows} == {number}
        assert len(ids) == len(set(ids)) == 48 and set(ids) < set(range(ROWS)) and ids != sorted(ids)
    orders = [[row for row, _ in rows] for rows in epochs]
    assert orders[0] != orders[1] and set(orders[0]) != set(orders[1])  # others are left out


def test_a_whole_number_of_batches_leaves_nothing_out():
    assert {row for row, _ in rows_in(steps_of(map_style(48), 6, BatchPlan(8)))} == set(range(48))


def test_the_order_depends_on_the_seed_and_no_epoch_is_one_of_another_seed():
    orders = [rows_in(steps_of(map_style(48), 12, BatchPlan(8, seed=seed))) for seed in (0, 1, 0)]
    assert orders[0] == orders[2]
    ids = [[[row for row, _ in order[first : first + 48]] for first in (0, 48)] for order in orders[:2]]
    assert len({tuple(order) for order in ids[0] + ids[1]}) == 4


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_chunks_of_all_ranks_are_the_batch_of_one_process(world_size):
    whole = steps_of(map_style(), 14, BatchPlan(8))
    shares = [steps_of(map_style(), 14, BatchPlan(8, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for step, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert [row for part in parts for chunk in part for row in chunk] == step[0]


def test_micro_batches_are_the_batch_in_pieces():
    whole = steps_of(map_style(), 14, BatchPlan(8))
    pieces = steps_of(map_style(), 14, BatchPlan(8, 2))
    assert [[len(chunk) for chunk in step] for step in pieces] == [[2] * 4] * 14
    assert [sum(step, []) for step in pieces] == [step[0] for step in whole]


def test_fewer_pairs_than_a_batch_fill_it_in_other_views():
    pairs = PairDataset(datasets.Dataset.from_dict({"id": [0, 1, 2]}))
    filled = pairs.filling(8)
    assert len(filled) == 9 and len(pairs.filling(3)) == 3
    seen = [filled[epoch, index] for epoch in range(2) for index in range(9)]
    assert sorted((row["id"], row["epoch"]) for row in seen) == [(row, view) for row in range(3) for view in range(6)]


def test_fewer_pairs_than_a_batch_are_an_error():
    with pytest.raises(ValueError, match="has 7 pairs, fewer than batch_size=8"):
        map_style(7).steps(BatchPlan(8), collate)


# Taking a run up again


@pytest.mark.parametrize("start", [1, 4, 7, 13])
@pytest.mark.parametrize("plan", [BatchPlan(8), BatchPlan(8, 2), BatchPlan(8, 2, rank=1, world_size=2)], ids=str)
@pytest.mark.parametrize("make", [map_style, stream])
def test_a_later_start_gives_what_an_uninterrupted_run_gives(make, plan, start):
    whole = steps_of(make(), start + 6, plan)
    assert steps_of(make(), 6, plan, start) == whole[start:]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("chunk", [8, 4, 2])
@pytest.mark.parametrize("make", [map_style, stream])
def test_a_later_start_is_exact_with_workers_too(make, chunk, num_workers):
    plan = BatchPlan(8, chunk, num_workers=num_workers)
    whole = steps_of(make(), 20, plan)
    for start in (1, 3, 14):
        assert steps_of(make(), 3, plan, start) == whole[start : start + 3]


def test_a_later_start_is_exact_where_it_is_not_the_first_workers_turn():
    plan = BatchPlan(6, 2, num_workers=2)  # three chunks a step
    assert steps_of(stream(), 2, plan, 1) == steps_of(stream(), 3, plan)[1:]


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        raise ConnectionResetError("the mount is gone")


@pytest.mark.parametrize("lost", [ConnectionResetError(104, "Connection reset by peer"), EOFError()], ids=repr)
def test_a_pipe_that_a_dying_worker_cuts_is_reported_as_its_death(lost, monkeypatch):
    def cut(self):
        raise lost

    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "_next_data", cut)
    with pytest.raises(RuntimeError, match="DataLoader worker exited unexpectedly .* killed"):
        next(map_style().steps(BatchPlan(4, num_workers=1), collate))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_connection_that_the_data_loses_is_not_blamed_on_a_worker(num_workers):
    with pytest.raises(ConnectionResetError, match="the mount is gone"):
        next(PairDataset(Broken()).steps(BatchPlan(4, num_workers=num_workers), collate))


def test_workers_do_not_change_the_order_of_a_data_set():
    plans = [BatchPlan(8, 4, num_workers=workers) for workers in (0, 2)]
    assert steps_of(map_style(), 8, plans[0]) == steps_of(map_style(), 8, plans[1])


# Streams


def by_worker(pairs: PairStream, steps: int, plan: BatchPlan) -> dict[int, list[tuple[int, int]]]:
    rows = {worker: [] for worker in range(max(plan.num_workers, 1))}
    for step in islice(pairs.steps(plan, collate), steps):
        for chunk in step:
            rows[chunk["worker"]] += chunk["rows"]
    return rows


def test_a_stream_gives_all_rows_in_every_epoch_in_another_order():
    rows = rows_in(steps_of(stream(), 18, BatchPlan(7)))
    orders = [[row for row, number in rows if number == epoch] for epoch in range(3)]
    assert all(sorted(order) == list(range(42)) for order in orders)
    assert len({tuple(order) for order in [*orders, range(42)]}) == 4
    assert [epoch for _, epoch in rows] == [0] * 42 + [1] * 42 + [2] * 42


def test_the_order_of_a_stream_depends_on_the_seed():
    orders = [rows_in(steps_of(stream(), 12, BatchPlan(7, seed=seed))) for seed in (0, 1, 0)]
    assert orders[0] == orders[2] and len({str(order[half : half + 42]) for order in orders for half in (0, 42)}) == 4


def test_rows_of_different_shards_are_mixed():
    first = [row // SHARD_ROWS for row, _ in rows_in(steps_of(stream(buffer=21), 1, BatchPlan(10)))]
    assert len(set(first)) > 2


@pytest.mark.parametrize("shards", [6, 7])
@pytest.mark.parametrize("world_size", [2, 3])
def test_no_row_is_read_by_two_processes(shards, world_size):
    seen = Counter()
    for rank in range(world_size):
        size = SHARD_ROWS * len(range(rank, shards, world_size))  # of the epoch of this process
        plan = BatchPlan(world_size, rank=rank, world_size=world_size)
        seen.update({row for row, epoch in rows_in(steps_of(stream(shards), size, plan)) if epoch == 0})
    assert seen == Counter(range(shards * SHARD_ROWS))


@pytest.mark.slow
@pytest.mark.parametrize(("shards", "num_workers"), [(6, 2), (7, 3), (3, 3)])
def test_no_row_is_read_by_two_workers_in_an_epoch(shards, num_workers):
    steps = 4 * shards * SHARD_ROWS
    rows = by_worker(stream(shards), steps, BatchPlan(1, num_workers=num_workers))
    lengths = [len(of_worker) for of_worker in rows.values()]
    assert max(lengths) - min(lengths) <= 1  # they take turns
    for epoch in (0, 1):
        read = Counter(row for of_worker in rows.values() for row, number in of_worker if number == epoch)
        assert read == Counter(range(shards * SHARD_ROWS))
    for of_worker in rows.values():
        assert [epoch for _, epoch in of_worker] == sorted(epoch for _, epoch in of_worker)


@pytest.mark.slow
def test_every_worker_of_every_process_has_a_shard_of_its_own():
    seen = Counter()
    for rank in range(2):  # of 5 shards, 3 and 2
        plan = BatchPlan(2, rank=rank, world_size=2, num_workers=2)
        for of_worker in by_worker(stream(5), 40, plan).values():
            assert of_worker
            seen.update({row for row, epoch in of_worker if epoch == 0})
    assert seen == Counter(range(35))


@pytest.mark.parametrize(("shards", "world_size", "num_workers"), [(1, 2, 0), (5, 3, 2), (2, 1, 3)])
def test_too_few_shards_are_an_error_that_gives_both_numbers(shards, world_size, num_workers):
    plan = BatchPlan(world_size, world_size=world_size, num_workers=num_workers)
    readers = world_size * max(num_workers, 1)
    with pytest.raises(ValueError, match=f"has {shards} shards, fewer than the {readers} that read it"):
        stream(shards).steps(plan, collate)


def test_a_stream_without_rows_is_an_error():
    with pytest.raises(ValueError, match="has no rows in epoch 0"):
        next(stream(0).steps(BatchPlan(2), collate))


# Worker processes


@pytest.fixture
def tars(tmp_path) -> str:
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for index in range(6):
                for suffix in ("jpg", "txt"):
                    content = f"{suffix} {shard} {index}".encode()
                    member = tarfile.TarInfo(f"{index}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(tmp_path / "*.tar")


SPAWNED = """
import sys
from itertools import islice
import torch
from clipmap_hf.data.loader import BatchPlan, PairDataset, PairStream
from clipmap_hf.data.pairs import load_pairs


def texts(rows):
    return [row["txt"] for row in rows]


if __name__ == "__main__":
    import datasets
    datasets.config.HF_DATASETS_CACHE = sys.argv[3]
    torch.multiprocessing.set_start_method(sys.argv[1])
    for streaming in (False, True):
        pairs = load_pairs(sys.argv[2], image_column="jpg", caption_columns=["txt"], streaming=streaming)
        pairs = PairStream(pairs) if streaming else PairDataset(pairs)
        steps = list(islice(pairs.steps(BatchPlan(6, num_workers=2), texts), 2))
        assert len({text for step in steps for chunk in step for text in chunk}) == 12, steps
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_may_be_started_in_any_way(tars, tmp_path, method):
    script = tmp_path / "script.py"
    script.write_text(SPAWNED)
    command = [sys.executable, str(script), method, tars, str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, check=True, env=environment, timeout=120)


def process_ids(rows: list[dict]) -> dict:
    return {"rows": [row["id"] for row in rows], "process": os.getpid()}


@pytest.mark.parametrize("make", [map_style, stream])
def test_workers_outlive_the_signal_that_asks_a_run_to_stop(make):
    steps = make().steps(BatchPlan(2, num_workers=1), process_ids)
    worker = next(steps)[0]["process"]
    assert worker != os.getpid()
    assert os.getpgid(worker) != os.getpgid(0)  # so a signal for the group of the run does not reach it
    assert [len(chunk["rows"]) for step in islice(steps, 8) for chunk in step] == [2] * 8


def test_a_worker_starts_where_there_are_no_process_groups(monkeypatch):
    """As on Windows."""
    monkeypatch.delattr(loader.os, "setpgid")
    parent = SimpleNamespace(join=threading.Event().wait)  # never ends
    monkeypatch.setattr(loader.multiprocessing, "parent_process", lambda: parent)
    loader.start_worker(0)


def test_reading_leaves_the_global_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    steps_of(map_style(), 3, BatchPlan(8))
    steps_of(stream(), 3, BatchPlan(8))
    assert torch.equal(torch.rand(3), expected)


def test_a_truncated_shard_is_counted_and_the_run_goes_on(tars, tiny_processor):
    broken = sorted(Path(tars).parent.glob("*.tar"))[1]
    broken.write_bytes(broken.read_bytes()[:700])
    pairs = load_pairs(tars, image_column="jpg", caption_columns=["txt"], streaming=True)
    collator = PairCollator(tiny_processor.tokenizer, tiny_processor.image_processor, ["txt"])
    (first,), (second,) = islice(PairStream(pairs).steps(BatchPlan(7), collator), 2)
    assert first == second == {"bad_rows": {"undecodable image": 6, "truncated shard": 1}}
