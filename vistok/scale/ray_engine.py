"""Encoding on Ray Data: the batches of a store shared among workers on one machine or a cluster.

    driver: batch numbers that the store lacks ── Ray Data: blocks of numbers ──> workers (actors, one model each)
    worker: reads, decodes and encodes its batches exactly as one machine would (`scale.encode.BatchEncoder`)
    driver: rows as Arrow IPC bytes, in any order <── Ray Data ── worker;  StoreWriter puts them in their place

    encode_source(source, tokenizer, "store", options, engine=RayEngine(workers=8, address="ray://head:10001"))

Only numbers go out and only tokens come back; pictures are read where they are encoded, so every node must reach the
source under the same path or URL. A batch is the same whoever encodes it, and the writer takes each one once: a
worker or node that dies loses and doubles nothing, its batches are encoded again. The driver may die as well: the
same command goes on where the store stopped, with this engine or the local one.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from vistok.data.items import Source
from vistok.data.store import Manifest
from vistok.data.store_writer import Done
from vistok.errors import InputError, OutputError, VistokError
from vistok.extras import import_extra
from vistok.scale.encode import BatchEncoder, EncodeOptions
from vistok.tokenizer import Tokenizer

BATCHES_PER_TASK = 8  # at most: what a worker that dies takes with it
TASKS_PER_WORKER = 4  # at least, where there are batches enough, so that none waits long for the last
RESTARTS = 16  # of one worker; a picture that kills every worker must not do so for ever
ROUNDS = 3  # over batches that did not come back


@dataclass(frozen=True)
class RayEngine:
    """Give it to `encode_source` as `engine`.

    address: of a cluster (`auto`, `ray://host:10001`); where there is none given, Ray is started on this machine.
    workers: models at a time; by default one per GPU of the cluster, or one per processor core where it has none.
    gpus: whether workers take a GPU each; by default if the cluster has any.
    """

    address: str | None = None
    workers: int | None = None
    gpus: bool | None = None

    def __call__(self, source: Source, tokenizer: Tokenizer, options: EncodeOptions) -> "RayEncoder":
        return RayEncoder(self, source, tokenizer, options)


class RayEncoder:
    """Encodes batches on Ray. Raises MissingExtraError without Ray, InputError for what cannot be sent to workers."""

    def __init__(self, engine: RayEngine, source: Source, tokenizer: Tokenizer, options: EncodeOptions) -> None:
        import_extra("ray.data", "scale")
        BatchEncoder(source, tokenizer, options)  # refuses what does not go together, before anything is started
        self._engine, self._source, self._tokenizer, self._options = engine, source, tokenizer, options

    def run(self, batches: Sequence[int], plan: Manifest) -> Iterator["Delivered"]:
        """These batches of `plan`, in the order in which workers finish them. Ends Ray if it was started here."""
        if not batches:
            return
        with _connected(self._engine) as ray:
            errand = ray.put(self._packed(ray, plan))
            left = dict.fromkeys(batches)
            for _ in range(ROUNDS):
                for delivered in self._round(ray, errand, list(left)):
                    if delivered.batch in left:
                        del left[delivered.batch]
                        yield delivered
                if not left:
                    return
        raise OutputError(f"{len(left)} batches did not come back from Ray; run the same command again")

    def _packed(self, ray: Any, plan: Manifest) -> bytes:
        tokenizer = self._tokenizer
        if tokenizer.device.type != "cpu":
            tokenizer = deepcopy(tokenizer).to("cpu")  # workers may have other devices
        options = replace(self._options, workers=None)
        try:
            return ray.cloudpickle.dumps((self._source, tokenizer, options, plan))
        except Exception as error:  # whatever a part of a user's own raises
            raise InputError(
                f"{self._source.name} or {tokenizer.name} cannot be sent to workers ({error}); use the local engine"
            ) from error

    def _round(self, ray: Any, errand: Any, batches: list[int]) -> Iterator["Delivered"]:
        import pyarrow as pa

        resources = ray.cluster_resources()
        gpus = self._engine.gpus if self._engine.gpus is not None else resources.get("GPU", 0) > 0
        if gpus and not resources.get("GPU", 0):
            raise InputError("the workers were to have a GPU each, and Ray knows of none")
        workers = self._engine.workers or max(1, int(resources.get("GPU" if gpus else "CPU", 1)))
        workers = min(workers, len(batches))
        cores = max(1, int(resources.get("CPU", 1)) // workers) if gpus else 1
        step = max(1, min(BATCHES_PER_TASK, len(batches) // (workers * TASKS_PER_WORKER)))
        tables = [pa.table({"batch": batches[first : first + step]}) for first in range(0, len(batches), step)]
        ray.data.DataContext.get_current().enable_progress_bars = False  # there is one of ours
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        rows = ray.data.from_arrow(tables).map_batches(
            RayWorker,
            fn_constructor_kwargs={"errand": [errand], "device": "cuda" if gpus else "cpu"},
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=cores,
            num_gpus=1 if gpus else None,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
        )
        try:
            for block in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
                for batch, table, bad in zip(*(block.column(name) for name in ("batch", "table", "bad")), strict=True):
                    yield Delivered(batch.as_py(), table.as_buffer() if table.is_valid else None, bad.as_py())
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, VistokError):
                raise cause from error
            last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise OutputError(f"Ray gave up ({last}); what is done is kept: run the same command again") from error


@dataclass
class Delivered:
    """An encoded batch as it came from a worker: Arrow IPC (None without rows) and bad items as JSON."""

    batch: int
    table: Any
    bad: str

    def done(self) -> Done:
        import pyarrow as pa

        table = None if self.table is None else pa.ipc.open_stream(self.table).read_all()
        return Done(self.batch, table, json.loads(self.bad))


class RayWorker:
    """One model in a process of Ray's: batch numbers in, a row for each out."""

    def __init__(self, errand: list[Any], device: str) -> None:
        import ray

        source, tokenizer, options, self._plan = ray.cloudpickle.loads(ray.get(errand[0]))
        self._encoder = BatchEncoder(source, tokenizer.to(device), options)

    def __call__(self, numbers: Any) -> Iterator[Any]:
        """`numbers`: a table with the column `batch`. Yields tables of one row: batch, table, bad."""
        import pyarrow as pa

        for encoded in self._encoder.run(numbers.column("batch").to_pylist(), self._plan):
            done = encoded.done()
            yield pa.table(
                {
                    "batch": pa.array([done.batch], pa.int64()),
                    "table": pa.array([None if done.table is None else _ipc(done.table)], pa.large_binary()),
                    "bad": pa.array([json.dumps(list(done.bad))], pa.string()),
                }
            )


def _ipc(table: Any) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


@contextmanager
def _connected(engine: RayEngine) -> Iterator[Any]:
    """Ray, connected; what was running before is left running."""
    ray = import_extra("ray", "scale")
    import_extra("ray.data", "scale")
    if ray.is_initialized():
        yield ray
        return
    quiet = {"configure_logging": True, "logging_level": logging.ERROR, "log_to_driver": False}
    local = {} if engine.address or os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
    if local and engine.workers:
        local["num_cpus"] = max(engine.workers, os.cpu_count() or 1)  # type: ignore[assignment]
    try:
        ray.init(address=engine.address, **quiet, **local)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = engine.address or os.environ.get("RAY_ADDRESS") or "this machine"
        raise InputError(f"Ray cannot be reached at {where}: {str(error).splitlines()[0]}") from error
    try:
        yield ray
    finally:
        ray.shutdown()
