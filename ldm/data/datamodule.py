"""Lightning data module over a training and a validation manifest; a resumed run goes on in the middle of the data."""
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, DistributedSampler

from ldm.data.cache import TileCache, open_tiles, remove_tiles, shared_folder, write_tiles
from ldm.data.classes import ClassTable
from ldm.data.dataset import PairDataset, collate_batch
from ldm.data.manifest import read_manifest
from ldm.util import UserError, is_rank_zero, leave_signals_to_main

log = logging.getLogger(__name__)


class RowSampler(DistributedSampler):
    """Shuffled rows of one rank as triples (row, epoch, copy): an endless stream that begins where the training stands.

    So a resumed run sees the rows of an uninterrupted one, wherever it was stopped. Fewer rows than a batch needs are
    repeated until they fill one. It is a DistributedSampler so that Lightning leaves it in place.

    Args:
        num_rows: rows of the dataset.
        batch_size: rows per batch and rank; rows left over at the end of an epoch are dropped.
        num_replicas: number of ranks.
        rank: this rank.
        seed: the order of an epoch depends on (seed, epoch).
        batches_done: gives the number of batches that this rank has trained on, over all epochs.
        weights: how often each row comes in an epoch; None = once.
    """

    def __init__(self, num_rows: int, batch_size: int, num_replicas: int = 1, rank: int = 0, seed: int = 0,
                 batches_done: Callable[[], int] = lambda: 0, weights: Sequence[int] | None = None) -> None:
        self.entries = [(row, copy) for row in range(num_rows) for copy in range(weights[row] if weights else 1)]
        count = len(self.entries)
        repeated = range(count * max(1, -(-num_replicas * batch_size // count)))
        super().__init__(repeated, num_replicas, rank, shuffle=True, seed=seed, drop_last=True)
        self.batch_size, self.batches_done = batch_size, batches_done

    def __len__(self) -> int:
        return self.num_samples // self.batch_size * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        order: dict[int, list[int]] = {}
        for position in itertools.count(self.batches_done() * self.batch_size):
            epoch, number = divmod(position, len(self))
            if epoch not in order:
                self.set_epoch(epoch)
                order = {epoch: list(super().__iter__())}
            row, copy = self.entries[order[epoch][number] % len(self.entries)]
            yield row, epoch, copy


class Stream:
    """Batches of an endless loader, an epoch's number at a time: between epochs its workers go on reading ahead.

    Args:
        loader: whose sampler never ends, but tells the length of an epoch.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader, self.batches = loader, None

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The next epoch's batches."""
        self.batches = self.batches or iter(self.loader)
        return itertools.islice(self.batches, len(self))

    def close(self) -> None:
        """End the workers, as Lightning ends those of loaders that it knows."""
        if hasattr(self.batches, "_shutdown_workers"):
            self.batches._shutdown_workers()
        self.batches = self.loader._iterator = None


class DataModule(LightningDataModule):
    """Training and validation data of one method.

    Args:
        data_root: folder that the manifests' paths are relative to.
        train_manifest: JSON-lines file of the training rows.
        class_table: name, path or mapping, see ClassTable.load.
        batch_size: rows per step and rank.
        num_workers: loader processes per rank; 0 = load in the training process.
        val_manifest: JSON-lines file of the validation rows; None = no validation.
        size: (height, width) of all items; None = the masks' own size.
        flip, random_crop, colour_jitter, reference, target_share, recolour_share: see PairDataset. Validation images
            are not changed at random.
        size_factor, takes, channels: of the method (`size_factor`, `takes`, `image_channels`): heights and widths are
            multiples of the first; what it does not take, rows need not have.
        check_files: decode every file before training starts.
        cache: `memory` = keep all decoded training tiles in the shared memory of the node, once for all its ranks and
            loader processes; None = decode every file in every epoch.
        cache_limit_gb: most gigabytes that the tiles may take.
        seed: seed of order, flips and crops.
    """

    def __init__(self, data_root: str, train_manifest: str, class_table: str | Mapping, batch_size: int,
                 num_workers: int = 2, val_manifest: str | None = None, size: tuple[int, int] | None = None,
                 flip: float = 0.5, random_crop: bool = False, colour_jitter: float = 0.0, reference: str = "target",
                 size_factor: int | None = None, check_files: bool = True, seed: int = 23,
                 takes: Sequence[str] = ("prompt", "reference"), channels: int = 3, target_share: float = 0.0,
                 recolour_share: float = 0.0, cache: str | None = None, cache_limit_gb: float = 16.0) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise UserError(f"data: batch_size={batch_size}, num_workers={num_workers}. Expected at least 1 and 0.")
        if cache not in (None, "memory"):
            raise UserError(f"data.params.cache: {cache!r} is unknown. Expected memory or null.")
        self.cache, self.cache_limit_gb, self.stream = cache, cache_limit_gb, None
        self.data_root = Path(data_root)
        self.train_manifest, self.val_manifest = train_manifest, val_manifest
        self.table = ClassTable.load(class_table)
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.size = None if size is None else (int(size[0]), int(size[1]))
        self.random_crop = random_crop
        self.changes = {"flip": flip, "colour_jitter": colour_jitter, "target_share": target_share,
                        "recolour_share": recolour_share}  # at random, in training
        self.takes, self.channels, self.reference = takes, channels, reference if "reference" in takes else "none"
        self.size_factor, self.check_files = size_factor, check_files
        self.train_set: PairDataset | None = None
        self.val_set: PairDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read and check the manifests; called before the Trainer does, it finds bad input early.

        Raises:
            ManifestError: listing all bad rows.
        """
        if self.train_set is None:
            self.train_set = self.make_dataset(self.train_manifest, is_training=True)
            if self.val_manifest:
                self.val_set = self.make_dataset(self.val_manifest, is_training=False)
        ranks = self.trainer.world_size if self.trainer else 1
        if len(self.train_set) < ranks * self.batch_size:
            log.warning("%s: %d rows do not fill a batch of %d on %d ranks: rows are repeated within a batch",
                        self.train_manifest, len(self.train_set), self.batch_size, ranks)

    def make_dataset(self, manifest: str, is_training: bool) -> PairDataset:
        """Dataset over one manifest; flips and random windows only in training."""
        need = {"image", *self.takes} - ({"reference"} if self.reference != "manifest" else set())
        rows = read_manifest(manifest, self.data_root, need=need, table=self.table, size_factor=self.size_factor,
                             size=self.size, check_files=self.check_files and is_rank_zero())
        return PairDataset(rows, self.table, size=self.size, reference=self.reference, seed=self.seed,
                           channels=self.channels, random_crop=self.random_crop and is_training,
                           centre_crop=self.random_crop and not is_training, **(self.changes if is_training else {}))

    def prompts(self) -> set[str]:
        """Distinct prompts of all rows."""
        return {row.prompt for dataset in (self.train_set, self.val_set) if dataset for row in dataset.rows}

    def train_dataloader(self) -> Stream:
        """Endless stream of shuffled full batches, beginning where the training stands (see RowSampler)."""
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        if self.cache and self.train_set.tiles is None:
            self.train_set.tiles = self.decode_once()
        sampler = RowSampler(len(self.train_set), self.batch_size, ranks, rank, self.seed, self.count_batches_done,
                             [row.weight for row in self.train_set.rows])
        # Forked workers share the decoded tiles; other ways of starting them would hand each a copy.
        context = "fork" if self.num_workers and self.train_set.tiles is not None else None
        self.stream = Stream(self.make_loader(self.train_set, sampler=sampler, drop_last=True,
                                              multiprocessing_context=context))
        return self.stream

    def decode_once(self) -> TileCache:
        """All tiles of the training set in shared memory: one process of a node decodes, the others open its file."""
        strategy = self.trainer.strategy if self.trainer else None
        run = strategy.broadcast(os.getpid()) if strategy else os.getpid()
        path, is_first = shared_folder() / f"tisynth-tiles-{run}", not self.trainer or self.trainer.local_rank == 0
        if is_first:
            keys = self.train_set.tile_keys()
            write_tiles(path, keys, self.train_set.read_tile, self.cache_limit_gb * 1e9)
        if strategy:
            strategy.barrier("tiles are written")
        tiles = open_tiles(path)
        log.info("%d decoded tiles take %.2f GB of %s", len(tiles), tiles.memory.nbytes / 1e9, path.parent)
        if strategy:
            strategy.barrier("tiles are open")
        if is_first:
            remove_tiles(path)
        return tiles

    def teardown(self, stage: str) -> None:
        """End the loader's processes before the program ends them with a message of theirs."""
        if self.stream is not None:
            self.stream.close()

    def val_dataloader(self) -> DataLoader | list:
        """Loader of the validation rows in order; an empty list when there is no validation."""
        return self.make_loader(self.val_set, shuffle=False) if self.val_set else []

    def make_loader(self, dataset: PairDataset, **options: Any) -> DataLoader:
        """DataLoader with what both loaders share."""
        return DataLoader(dataset, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=collate_batch,
                          pin_memory=torch.cuda.is_available(), persistent_workers=self.num_workers > 0,
                          worker_init_fn=leave_signals_to_main, **options)

    def count_batches_done(self) -> int:
        """Batches this rank has trained on; Lightning keeps the count in its checkpoints."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed if self.trainer else 0
