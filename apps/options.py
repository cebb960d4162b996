"""The options that verbs share, one by one and in groups, in typer's terms; importing this stays cheap."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .errors import UsageError

if TYPE_CHECKING:
    import torch

    from .batch.sources import Inputs
    from .batch.stage import Compute

__all__ = [
    "BatchSize",
    "Batches",
    "Checkpoint",
    "CpusPerWorker",
    "Debug",
    "Device",
    "Distributed",
    "EngineName",
    "GpusPerWorker",
    "Json",
    "Machine",
    "MemoryPerWorker",
    "Model",
    "NumWorkers",
    "Output",
    "Overwrite",
    "Prepared",
    "RandomWeights",
    "RayAddress",
    "ReadTimeout",
    "Reading",
    "Resume",
    "RowsPerPart",
    "RuntimeName",
    "Searching",
    "Shard",
    "Threads",
    "Writing",
    "WritingPictures",
    "WritingRows",
]

_INPUT, _MODEL, _OUTPUT, _SPEED = "What to read", "Which model", "What to write", "How fast"
_WIDE = "On how many machines"

Engines = Literal["local", "ray"]
Runtimes = Literal["torch", "onnx", "openvino"]
_NEEDS = {"onnx": ("onnxruntime", "onnxscript"), "openvino": ("openvino", "onnxscript")}

Images = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT",
        help="Image files, folders, quoted patterns such as 'photos/**/*.jpg', .tar shards, .parquet files with "
        "pictures; also at addresses such as s3://bucket/photos.",
        show_default=False,
    ),
]
ImagesAndText = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT… [TEXT]",
        help="Images as for classify, and .csv, .jsonl, .parquet that embed --clip wrote; then what to search for.",
        show_default=False,
    ),
]
Recursive = Annotated[
    bool, typer.Option("--recursive/--no-recursive", help="Search folders inside folders.", rich_help_panel=_INPUT)
]
Glob = Annotated[
    str | None,
    typer.Option(
        help="Names to take in folders and shards, e.g. '*.JPG'; else all image suffixes.",
        rich_help_panel=_INPUT,
        show_default=False,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Stop after so many inputs.", rich_help_panel=_INPUT, show_default=False),
]
Shard = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Of N parts of the run only the I-th, from 0; attnsuite merge puts their outputs together.",
        rich_help_panel=_INPUT,
        show_default=False,
    ),
]
ReadTimeout = Annotated[
    float,
    typer.Option(
        min=0.1,
        metavar="SECONDS",
        help="An input that takes longer to read and decode becomes a row with an error.",
        rich_help_panel=_INPUT,
    ),
]

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Any timm name (attnsuite models lists ours), hf-hub:OWNER/NAME or local-dir:FOLDER.",
        rich_help_panel=_MODEL,
    ),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        help="Weights of your own for --model: .safetensors, .pth, ….", rich_help_panel=_MODEL, show_default=False
    ),
]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="No trained weights: to try speed or set-up.", rich_help_panel=_MODEL)
]

Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        help="OUT.csv, OUT.jsonl, OUT.parquet, or DIR/ for a folder of Parquet files; else a table on a terminal, CSV "
        "in a pipe.",
        rich_help_panel=_OUTPUT,
        show_default=False,
    ),
]
Folder = Annotated[
    str,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Folder for pictures and rows.jsonl.",
        rich_help_panel=_OUTPUT,
        show_default=False,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Rows as JSON lines on stdout; with -o, the summary as JSON.", rich_help_panel=_OUTPUT),
]
RowsPerPart = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="With -o DIR/: rows of each Parquet file in it; 100,000.",
        rich_help_panel=_OUTPUT,
        show_default=False,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume/--no-resume", help="Go on where the same command ended; or refuse to.", rich_help_panel=_OUTPUT
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output that is there.", rich_help_panel=_OUTPUT)
]

BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1, help="Images a batch; by default as fits the device.", rich_help_panel=_SPEED, show_default=False
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Decode processes, 0 for none beside this one; by default one a core (`train` on a CPU: half).",
        rich_help_panel=_SPEED,
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads of the network.", rich_help_panel=_SPEED, show_default=False),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=_SPEED)]
Amp = Annotated[bool, typer.Option("--amp", help="Half precision (bfloat16).", rich_help_panel=_SPEED)]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the network first (torch.compile).", rich_help_panel=_SPEED)
]
RuntimeName = Annotated[
    Runtimes,
    typer.Option(
        "--runtime",
        help="torch; on a CPU onnx (ONNX Runtime) or openvino, faster for networks of convolutions.",
        rich_help_panel=_SPEED,
    ),
]
EngineName = Annotated[
    Engines,
    typer.Option("--engine", help="local, or ray for Ray Data on a cluster of machines.", rich_help_panel=_WIDE),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Head of a running cluster, or auto; else Ray is started on this machine for the run.",
        rich_help_panel=_WIDE,
        show_default=False,
    ),
]
NumWorkers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="With ray: copies of the model; by default as many as there is room for.",
        rich_help_panel=_WIDE,
        show_default=False,
    ),
]
CpusPerWorker = Annotated[
    int | None,
    typer.Option(min=1, help="With ray: cores and threads of each; 1.", rich_help_panel=_WIDE, show_default=False),
]
GpusPerWorker = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="With ray: GPUs of each, 0.5 for two on one; by default 1 where there are any.",
        rich_help_panel=_WIDE,
        show_default=False,
    ),
]
MemoryPerWorker = Annotated[
    float | None,
    typer.Option(
        min=0.1,
        metavar="GIB",
        help="With ray: memory that is set aside for each.",
        rich_help_panel=_WIDE,
        show_default=False,
    ),
]
FastDecode = Annotated[
    bool,
    typer.Option(
        "--fast-decode",
        help="Decode large JPEGs at a fraction of their size: faster, and numbers move a little.",
        rich_help_panel=_SPEED,
    ),
]

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@dataclass(frozen=True)
class Reading:
    """Which images a verb reads.

    Attributes:
        inputs: Files, folders, patterns, archives.
        recursive: Search folders inside folders.
        glob: Pattern that file names must match.
        limit: Stop after so many inputs.
        shard: `"I/N"`, one of several parts of the run; None for the whole.
        read_timeout: Seconds that reading one input may take.
    """

    inputs: Images
    recursive: Recursive = True
    glob: Glob = None
    limit: Limit = None
    shard: Shard = None
    read_timeout: ReadTimeout = 120.0

    def find(self, note: Callable[[str], None]) -> Inputs:
        """The images as a stream.

        Args:
            note: Told what the user should know of them.

        Raises:
            UsageError: There are none.
        """
        from .batch.shards import read_shard
        from .batch.sources import Inputs

        shard = None if self.shard is None else read_shard(self.shard)
        inputs = Inputs(self.inputs, self.recursive, self.glob, self.limit, shard, note)
        inputs.check()
        return inputs

    def facts(self) -> dict[str, Any]:
        """What rows depend on, for the ledger."""
        from .batch.sources import encode_path

        named = [encode_path(argument) for argument in self.inputs]
        facts = {"inputs": named, "recursive": self.recursive, "glob": self.glob, "limit": self.limit}
        return facts if self.shard is None else {**facts, "shard": self.shard}


@dataclass(frozen=True)
class Searching(Reading):
    """The same for a verb that also takes files of features, and whose last argument may be a text."""

    inputs: ImagesAndText = field()


@dataclass(frozen=True)
class Writing:
    """Where rows go.

    Attributes:
        output: The output file, or None for the screen.
        as_json: JSON lines on stdout, or a JSON summary beside an output file.
        resume: Go on where the same command ended.
        overwrite: Replace what is there.
    """

    output: Output = None
    as_json: Json = False
    resume: Resume = True
    overwrite: Overwrite = False

    @property
    def part_rows(self) -> int | None:
        """Rows of each file, if `output` is a folder of Parquet files; None for 100,000."""
        return None


@dataclass(frozen=True)
class WritingRows(Writing):
    """The same for a verb whose rows may go to a folder of parts; `rows_per_part` is what the user says of them."""

    rows_per_part: RowsPerPart = None

    @property
    def part_rows(self) -> int | None:
        """As the user says."""
        return self.rows_per_part


@dataclass(frozen=True)
class WritingPictures(Writing):
    """The same for a verb that draws: `output` is a folder for pictures and their rows."""

    output: Folder = field()


@dataclass(frozen=True)
class Machine:
    """What a verb may take of the machine.

    Attributes:
        workers: Decode processes; None chooses by cores and device.
        threads: CPU threads of the network; None leaves them to torch.
        device: Name of a device, or `auto`.
        amp: Half precision.
    """

    workers: Workers = None
    threads: Threads = None
    device: Device = "auto"
    amp: Amp = False

    def batch(self, suited: int) -> int:
        """Pictures a batch, where `suited` is what suits the verb on its device."""
        return suited

    def compute(self, device: torch.device, on_gpu: bool, suited: int) -> Compute:
        """How the network is run.

        Args:
            device: Where.
            on_gpu: Whether it, or a worker's device, is a GPU.
            suited: Pictures a batch that suit the verb there.

        Raises:
            UsageError: That cannot be.
        """
        from .batch.stage import Compute

        return Compute(device, self.amp, batch_size=self.batch(suited))

    @property
    def reduces(self) -> bool:
        """Whether large JPEGs are decoded at a fraction of their size."""
        return False


@dataclass(frozen=True)
class Batches(Machine):
    """The same for a network that takes several pictures at once: how many, None for what suits the device."""

    batch_size: BatchSize = None

    def batch(self, suited: int) -> int:
        """What the user says, else what suits."""
        return self.batch_size or suited


@dataclass(frozen=True)
class Prepared(Batches):
    """The same for a network that sees little of large pictures, and may be made into something faster first.

    Attributes:
        compile: By `torch.compile`.
        runtime: Or by another library than PyTorch.
        fast_decode: Decode large JPEGs at a fraction of their size.
    """

    compile: Compile = False
    runtime: RuntimeName = "torch"
    fast_decode: FastDecode = False

    def compute(self, device: torch.device, on_gpu: bool, suited: int) -> Compute:
        """As the user says.

        Raises:
            UsageError: The runtime is not installed, or cannot do what else was asked for.
        """
        if self.runtime != "torch":
            self._check_runtime(_NEEDS[self.runtime], on_gpu)
        return replace(super().compute(device, on_gpu, suited), compile=self.compile, runtime=self.runtime)

    def _check_runtime(self, needs: Sequence[str], on_gpu: bool) -> None:
        asked = f"--runtime {self.runtime}"
        for option in ("compile", "amp"):
            if getattr(self, option):
                raise UsageError(f"{asked} and --{option} exclude each other")
        if on_gpu:
            raise UsageError(f"{asked} is for the CPU: add --device cpu")
        missing = [name for name in needs if importlib.util.find_spec(name) is None]
        if missing:
            raise UsageError(f'{asked} needs {" and ".join(missing)}: pip install "attnsuite[{self.runtime}]"')

    @property
    def reduces(self) -> bool:
        """As the user says."""
        return self.fast_decode


@dataclass(frozen=True)
class Distributed:
    """Which engine runs a verb, and what it may take of a cluster.

    Attributes:
        engine: `local` or `ray`.
        ray_address: Of a running cluster; None to start one here.
        num_workers: Copies of the model; None for as many as there is room for.
        cpus_per_worker: Cores of each; None for one.
        gpus_per_worker: GPUs of each; None for one where there are any.
        memory_per_worker: GiB set aside for each; None leaves it to Ray.
    """

    engine: EngineName = "local"
    ray_address: RayAddress = None
    num_workers: NumWorkers = None
    cpus_per_worker: CpusPerWorker = None
    gpus_per_worker: GpusPerWorker = None
    memory_per_worker: MemoryPerWorker = None

    def check(self, machine: Machine) -> None:
        """Refuses what cannot be, before any work.

        Args:
            machine: The options for one machine.

        Raises:
            UsageError: An option of the other engine was given, or Ray is not installed.
        """
        if self.engine == "ray":
            given = [f"--{name}" for name in ("workers", "threads") if getattr(machine, name) is not None]
            hint = "with --engine ray it is --num-workers and --cpus-per-worker"
        else:
            names = [field.name for field in fields(self) if field.name != "engine"]
            given = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]
            hint = "this is about --engine ray"
        if given:
            raise UsageError(f"{', '.join(given)}: {hint}")
        if self.engine == "ray" and importlib.util.find_spec("ray") is None:
            raise UsageError('--engine ray needs Ray: pip install "attnsuite[ray]"')
