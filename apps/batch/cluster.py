"""The Ray engine: the stage of the local one, in as many processes as a cluster has room for.

Ray Data moves the work: one task lists the inputs, a batch at a time and never far ahead; actors hold a copy of the
stage each and turn batches into rows (on GPUs, tasks decode for them); rows come back in the order of the listing, to
this process, which writes them. So the output, its ledger and what happens after an interruption are those of a local
run, and one may go on where the other ended.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import queue
import re
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import Stopped, UsageError, in_one_line
from .engines import Emit, Rest, Stop
from .ray_tasks import Failed, Place, Tries, Worker, decoded, listing
from .stage import Stage

__all__ = ["Cluster", "Share", "check_address", "run_ray", "share_out"]

_GIB = 1 << 30
_QUIET = 30.0  # seconds without a row until the user is told what Ray says of itself
_LEAVE = 30.0  # seconds that a run which ends early waits for the batch at hand


@dataclass(frozen=True)
class Cluster:
    """What may be taken of a Ray cluster.

    Attributes:
        address: Of its head, `auto` or `ray://…`; None to start one on this machine for this run.
        workers: Copies of the stage; None for as many as there is room for.
        cpus: CPU cores, and threads, of each.
        gpus: GPUs of each, or a part of one; None for one if there are any and the device is not the CPU.
        memory: GiB that Ray shall set aside for each; None leaves it to Ray.
        device: `auto`, `cpu` or `cuda`.
    """

    address: str | None = None
    workers: int | None = None
    cpus: int = 1
    gpus: float | None = None
    memory: float | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Share:
    """What a run takes: so many workers, with so much for each."""

    workers: int
    cpus: int
    gpus: float
    memory: float | None


def check_address(address: str) -> None:
    """Finds out before any work whether somebody answers there; Ray itself would try for minutes.

    Args:
        address: `HOST:PORT`, `ray://HOST:PORT`, or `auto`.

    Raises:
        UsageError: Nobody does, or this is no address.
    """
    if address == "auto":
        return
    found = re.fullmatch(r"(?:ray://)?\[?([^\s/]+?)\]?:(\d{1,5})", address)
    if found is None or int(found[2]) > 65535:
        raise UsageError(f"--ray-address {address}: expected HOST:PORT, ray://HOST:PORT or auto")
    try:
        socket.create_connection((found[1], int(found[2])), timeout=10).close()
    except OSError as error:
        raise UsageError(
            f"--ray-address {address}: nobody answers there ({error.strerror or error}); `ray status` on the head "
            "shows whether the cluster is up"
        ) from error


def share_out(cluster: Cluster, nodes: Sequence[dict[str, float]]) -> Share:
    """Works out how many workers fit.

    Args:
        cluster: What is asked for.
        nodes: The resources of each node that is up, as Ray names them: `CPU`, `GPU`, `memory` (bytes).

    Returns:
        What can be started at once. Workers with a GPU leave a core to the tasks that decode for them; others decode
        for themselves.

    Raises:
        UsageError: It does not fit; Ray would wait for room for ever.
    """
    gpus = cluster.gpus
    if gpus is None:
        has_gpu = any(node.get("GPU", 0) >= 1 for node in nodes)
        gpus = 1.0 if cluster.device.startswith("cuda") or (has_gpu and cluster.device == "auto") else 0.0
    need = {"CPU": cluster.cpus, "GPU": gpus, "memory": (cluster.memory or 0) * _GIB}
    fitting = sum(_fitting(need, node) for node in nodes)
    cores = sum(node.get("CPU", 0) for node in nodes)
    room = fitting if not gpus else min(fitting, math.floor((cores - 1) / cluster.cpus))
    each = ", ".join(_amounts(cluster.cpus, gpus, cluster.memory))
    if room < 1:
        cpus, most_gpus = (max((node.get(kind, 0) for node in nodes), default=0) for kind in ("CPU", "GPU"))
        largest = _amounts(cpus, most_gpus, None)
        spare = " and one core for decoding" if gpus else ""
        raise UsageError(
            f"no worker fits: each needs {each}{spare}, and the largest of {_counted(len(nodes), 'node')} has "
            f"{', '.join(largest)}; ask for less with --cpus-per-worker, --gpus-per-worker or --memory-per-worker"
        )
    if cluster.workers is not None and cluster.workers > room:
        raise UsageError(
            f"--num-workers {cluster.workers} does not fit: with {each} for each worker there is room for {room} on "
            + _counted(len(nodes), "node")
            + (", one core being left for decoding" if gpus else "")
            + "; ask for fewer, or for less each"
        )
    return Share(cluster.workers or room, cluster.cpus, gpus, cluster.memory)


def _fitting(need: dict[str, float], node: dict[str, float]) -> int:
    """How many workers one node has room for; each runs on one node."""
    return min(math.floor(node.get(kind, 0) / amount + 1e-9) for kind, amount in need.items() if amount)


def _amounts(cpus: float, gpus: float, memory: float | None) -> Iterator[str]:
    yield f"{cpus:g} CPU"
    if gpus:
        yield f"{gpus:g} GPU"
    if memory:
        yield f"{memory:g} GiB"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def run_ray(
    stage: Stage,
    rest: Rest,
    emit: Emit,
    stop: Stop,
    *,
    cluster: Cluster,
    batch_size: int,
    note: Callable[[str], None],
    read_timeout: float | None = None,
) -> None:
    """Runs a stage over inputs on a Ray cluster.

    Args:
        stage: The work; its copies are sent to the workers.
        rest: The inputs that are to do.
        emit: Takes each batch's sources with their rows, in order.
        stop: Asked all the time.
        cluster: What may be taken.
        batch_size: Inputs a batch.
        note: Told what the user should know.
        read_timeout: Seconds that reading one input may take; None for any time.

    Raises:
        UsageError: Ray cannot be reached or has no room.
        Stopped: A worker died again and again, or the network failed; what was emitted before is whole.
    """
    with _connected(cluster.address) as ray:
        share = share_out(cluster, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        amounts = ", ".join(_amounts(share.cpus, share.gpus, share.memory))
        note(f"Ray: {_counted(share.workers, 'worker')}, each with {amounts}")
        results = _results(stage, rest, share, cluster.device, batch_size, read_timeout)
        for sources, rows in _watched(results, stop, lambda: note(_state(ray))):
            emit(sources, rows)
            if stop.signum is not None:
                return


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray, of this process already or for this run; quiet, since what matters is told by us."""
    # Ray reads these when it is imported or started. Workers are niced by 15 unless told not to.
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    # Without the last one, what is left of a stopped run would start a Ray of its own.
    quiet |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_ENABLE_AUTO_CONNECT": "0"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"ray\.")  # on how it is used by itself
    if ray.is_initialized():  # a program that uses this suite has chosen its cluster
        yield ray
        return
    own: dict[str, Any] = {"address": address} if address else {"include_dashboard": False, "object_store_memory": _GIB}
    try:
        with _hushed():
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:  # of many kinds: no such host, another version there, no room for the object store
        where = f"the cluster at {address} cannot be reached" if address else "Ray cannot be started here"
        raise UsageError(f"--engine ray: {where}: {' '.join(str(error).split()) or type(error).__name__}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keeps what native code has to say off this process's stderr: Ray remarks on the settings above."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _results(
    stage: Stage, rest: Rest, share: Share, device: str, batch_size: int, read_timeout: float | None
) -> Generator[Any, None, None]:
    """What each batch came to, in order; work begins with the first that is asked for."""
    import ray
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = 1  # a batch a block: Ray would else collect small ones until they are 128 MiB
    tries: Any = ray.remote(num_cpus=0)(Tries).remote()
    place = Place(os.getcwd(), "cuda" if share.gpus and device == "auto" else device, share.cpus)
    with ray.data.DataContext.current(context):
        dataset: Any = ray.data.read_datasource(listing(rest, batch_size, place), num_cpus=0, override_num_blocks=1)
        if share.gpus:
            options = {"place": place, "decoder": stage.decoder, "read_timeout": read_timeout}
            dataset = dataset.map_batches(decoded, batch_size=1, fn_kwargs=options, num_cpus=1)
        dataset = dataset.map_batches(
            Worker,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=share.workers, max_tasks_in_flight_per_actor=2),
            fn_constructor_args=(place, stage, read_timeout, tries),
            num_cpus=share.cpus,
            num_gpus=share.gpus or None,
            memory=None if share.memory is None else share.memory * _GIB,
        )
        for row in dataset.iter_rows():
            yield pickle.loads(row["content"])


def _watched(results: Generator[Any, None, None], stop: Stop, on_quiet: Callable[[], None]) -> Iterator[Any]:
    """The same, with an eye on the clock and on signals while Ray is waited for.

    Raises:
        Exception: What a worker raised.
        Stopped: Ray gave up.
    """
    ready: queue.Queue[Any] = queue.Queue(maxsize=1)
    over = threading.Event()

    def hand(result: Any) -> None:
        while not over.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(result, timeout=0.2)

    def fetch() -> None:
        try:
            with contextlib.closing(results):
                for result in results:
                    hand(result)
                    if over.is_set():
                        return
            hand(None)
        except Exception as error:
            hand(Failed(_given_up(error), traceback.format_exc()))

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    try:
        yield from _taken(ready, stop, on_quiet)
    finally:
        over.set()
        thread.join(timeout=_LEAVE)


def _taken(ready: queue.Queue[Any], stop: Stop, on_quiet: Callable[[], None]) -> Iterator[Any]:
    last = time.monotonic()
    while stop.signum is None:
        try:
            result = ready.get(timeout=0.2)
        except queue.Empty:
            if time.monotonic() - last > _QUIET:
                on_quiet()
                last = time.monotonic()
            continue
        last = time.monotonic()
        if result is None:
            return
        if isinstance(result, Failed):
            raise result.error from RuntimeError(result.trace)
        yield result


def _given_up(error: Exception) -> Exception:
    """What Ray raises after it has tried again, in words."""
    from ray.exceptions import RayError

    if not isinstance(error, RayError):
        return error
    return Stopped(
        f"Ray has given up ({in_one_line(error)}); too little memory and lost machines are the usual reasons: "
        "try fewer --num-workers or a smaller --batch-size"
    )


def _state(ray: Any) -> str:
    """What Ray says of itself while nothing comes."""
    all_of, free = ray.cluster_resources(), ray.available_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    return (
        f"nothing has come from Ray for {_QUIET:g} s: {_counted(nodes, 'node')} up, "
        f"{free.get('CPU', 0):g} of {all_of.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} of "
        f"{all_of.get('GPU', 0):g} GPU free; waiting on"
    )
