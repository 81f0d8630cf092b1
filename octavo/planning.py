"""``octavo.plan``: what a run will read, write, hold and take, from ``config.json`` alone.

The model is laid out as a real run would lay it out: where there are no weights, a file takes their place that
has the right header and no data. So bytes are exact. Memory is the bound that ``--max-memory`` keeps. Times
are an estimate: of this machine's rates, measured in a second or two, or of a GPU's data sheet.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo import canonical, fp8
from octavo.calibration import BATCH_TOKENS, MOMENT_TOKENS, Calibration
from octavo.checkpoint import read_json
from octavo.checkpoint.hub import resolve_model
from octavo.checkpoint.safetensors import build_header
from octavo.cluster import GPU_SHARE, hold_layers, passes_of, split, worker_memory, worker_threads
from octavo.devices import DEVICES, DISK_READ, DISK_WRITE, LINK, MEMORY_SHARE, PRODUCT_SHARE
from octavo.errors import OctavoError
from octavo.fused import fused_kernels
from octavo.job import Job, hidden_shape, layer_shape, open_job
from octavo.memory import PROGRAM, Settings, batch_memory, choose_settings, peak_memory
from octavo.preflight import pick_device
from octavo.reconstruction import Learning
from octavo.scheme import Scheme
from octavo.shapes import SHAPES, shape_called
from octavo.skeleton import build_skeleton
from octavo.threads import one_thread_each

# Seconds until a process has imported what it needs; until Ray and its workers are up.
_START, _RAY_START = 3.0, 7.0

# What a probe takes: bytes to the disk and back, and elements cast.
_PROBE_BYTES, _PROBE_ELEMENTS = 256 << 20, 1 << 25
_PROBE_WIDTH = 4096

# How many products of BF16 a processor computes in the time of one of float32.
_FLOAT32 = 10


class Rates(NamedTuple):
    """What a worker's machine does in a second.

    Attributes:
        read: GB from the disk.
        write: GB to the disk.
        product: TFLOP of a decoder layer's forward.
        cast: GB of BF16 weights measured and cast to FP8.
        link: GB from the host to the device; None on a CPU.
    """

    read: float
    write: float
    product: float
    cast: float
    link: float | None


class Plan(NamedTuple):
    """What a run will take. Bytes, seconds.

    Attributes:
        model: which.
        layers: decoder layers.
        parameters: values of the checkpoint.
        format: dialect of the edition.
        scheme: a key of :data:`octavo.scheme.KINDS`.
        tokens: of calibration.
        bytes_read: of weights, once, by all workers together.
        bytes_written: the edition's tensors.
        bytes_worked: hidden states written on the way.
        disk: what must be free: the edition, and two files of hidden states for each worker.
        peak_memory: of each process on its machine, an upper bound.
        device_memory: of each GPU, an estimate: layers, and two batches; None on CPUs.
        layers_at_a_time: that each worker holds in memory.
        workers: how many.
        device: of each.
        rates: of each worker's machine.
        seconds: by stage, of a worker; and ``total``, in which stages overlap.
        bound_by: the stage that takes longest.
        assumptions: in words.
    """

    model: str
    layers: int
    parameters: int
    format: str
    scheme: str
    tokens: int
    bytes_read: int
    bytes_written: int
    bytes_worked: int
    disk: int
    peak_memory: int
    device_memory: int | None
    layers_at_a_time: int
    workers: int
    device: str
    rates: Rates
    seconds: dict[str, float]
    bound_by: str
    assumptions: list[str]


def plan(
    model: str | Path,
    *,
    scheme: Scheme | None = None,
    calibration: Calibration | None = None,
    format: str = "modelopt",
    device: str = "auto",
    workers: int | None = None,
    max_memory: int | None = None,
    disk_read: float | None = None,
    disk_write: float | None = None,
) -> Plan:
    """What :func:`octavo.quantize` would take with the same options.

    Args:
        model: a directory with a ``config.json`` (weights or not), a name of :data:`octavo.shapes.SHAPES`,
            or a hub id.
        scheme: as for ``quantize``.
        calibration: likewise; only its size matters.
        format: likewise.
        device: ``auto``, ``cpu``, ``cuda``: this machine; or a GPU of :data:`octavo.devices.DEVICES`.
        workers: stages on Ray.
        max_memory: bytes each process may take.
        disk_read: GB/s, in the place of what is measured or assumed.
        disk_write: likewise.

    Raises:
        OctavoError: no such model or device, or an option that ``quantize`` would refuse.
    """
    scheme, calibration = scheme or Scheme(), calibration or Calibration()
    if device not in DEVICES and not device.startswith(("auto", "cpu", "cuda")):
        raise OctavoError(
            f"Unknown device {device!r}. Expected auto, cpu or cuda for this machine, or one of "
            f"{', '.join(DEVICES)}."
        )
    kind = "cuda" if device in DEVICES else pick_device(device).type
    with _laid_out(model) as (name, directory):
        job = open_job(directory, scheme, format, torch.device("cpu"))
        try:
            tokens = _tokens(job, calibration)
            count, on_gpu = workers or 1, kind == "cuda"
            settings, peak = _memory(job, tokens, device, kind, workers, max_memory)
            held, seq_len = settings.held, 0 if tokens is None else tokens.shape[1]
            layout = job.layout()
            hidden = None if tokens is None else hidden_shape(job, tokens, settings)
            rates = _rates(job, device, worker_threads(count), tokens)
            rates = rates._replace(read=disk_read or rates.read, write=disk_write or rates.write)
            written = sum(tensor.nbytes for tensor in layout.values())
            layer = _layer_seconds(job, rates, tokens, 0 if hidden is None else hidden.nbytes)
            batches = 1 if hidden is None else len(hidden.batches)
            outside = sum(job.checkpoint[name].nbytes for name in job.outside()) / 1e9
            carry = outside * (1 / rates.read + 1 / rates.write)
            total = _total(layer, split(len(job.plans), count), held, batches, workers) + carry
            stages = {stage: value * len(job.plans) / count for stage, value in layer.items()}
            return Plan(
                model=name,
                layers=len(job.plans),
                parameters=sum(_elements(job.checkpoint[key].shape) for key in job.checkpoint),
                format=format,
                scheme=job.scheme.kind,
                tokens=0 if tokens is None else tokens.numel(),
                bytes_read=job.checkpoint.nbytes,
                bytes_written=written,
                bytes_worked=0 if hidden is None else hidden.nbytes * len(job.plans),
                disk=written + (0 if hidden is None else 2 * count * hidden.nbytes),
                peak_memory=peak,
                device_memory=_device_memory(job, settings, seq_len, held) if on_gpu else None,
                layers_at_a_time=held,
                workers=count,
                device=device if device in DEVICES else kind,
                rates=rates,
                seconds={**stages, "carry": carry, "total": total},
                bound_by=max(stages, key=lambda stage: stages[stage]),
                assumptions=_assumptions(device, count, disk_read, disk_write),
            )
        finally:
            job.checkpoint.close()


def simulate(
    passes: Sequence[Sequence[int]], load: float, step: float, end: float, batches: int
) -> float:
    """Seconds until all stages of a pipeline are done.

    Args:
        passes: for each stage the number of layers of each of its passes.
        load: seconds to read one layer.
        step: seconds one batch takes in one layer.
        end: seconds to cast and write one layer behind a pass.
        batches: how many go through.
    """
    arrived = [0.0] * batches
    finish = 0.0
    for stage in passes:
        now = 0.0
        for number, layers in enumerate(stage):
            now += layers * load
            done = []
            for batch in range(batches):
                now = max(now, arrived[batch] if number == 0 else 0.0) + layers * step
                done.append(now)
            now += layers * end
        arrived = done
        finish = max(finish, now)
    return finish


def _memory(
    job: Job,
    tokens: Tensor | None,
    device: str,
    kind: str,
    workers: int | None,
    max_memory: int | None,
) -> tuple[Settings, int]:
    """How a run would use memory, and the bytes each of its processes takes at most."""
    samples, seq_len = (0, 0) if tokens is None else tokens.shape
    count, on_gpu = workers or 1, kind == "cuda"
    host = layer_shape(job, on_gpu=on_gpu)
    sizes = {
        "seq_len": 0 if on_gpu else seq_len,
        "layers": 1 if on_gpu else len(job.plans),
        "samples": samples,
        # Which tokens occur is not known: at most all of the vocabulary.
        "rows": min(samples * seq_len, job.decoder.config.vocab_size),
        "program": PROGRAM if workers is None else worker_memory(job, seq_len, kind, count),
    }
    settings = choose_settings(
        host, max_memory, BATCH_TOKENS[kind], cores=worker_threads(count), **sizes
    )
    if workers is not None and tokens is not None:
        limit = None if on_gpu else max_memory
        if device in DEVICES:
            limit = int(DEVICES[device].memory * GPU_SHARE)
        settings = hold_layers(job, settings, tokens.shape, kind, workers, limit)
    passes = passes_of(split(len(job.plans), count)[-1], settings.held)
    settings = settings._replace(held=max(map(len, passes)))
    on_host = settings._replace(held=1) if on_gpu else settings
    return settings, peak_memory(host, on_host, cores=settings.workers, **sizes)


def _device_memory(job: Job, settings: Settings, seq_len: int, held: int) -> int:
    shape = layer_shape(job)._replace(fused=False)
    # A single layer is followed by the next, read ahead.
    layers = 2 if held == 1 and len(job.plans) > 1 else held
    batches = 2 * batch_memory(shape, settings, seq_len) if seq_len else 0
    return layers * shape.nbytes + batches + shape.largest


def _total(
    layer: dict[str, float],
    stages: Sequence[Sequence[int]],
    held: int,
    batches: int,
    workers: int | None,
) -> float:
    """Seconds of the whole run, but for what is carried over."""
    compute = layer["calibrate"] + layer["cast"]
    if workers is None:
        # Reading, computing and writing overlap; the first is read and the last written alone.
        slowest = max(layer["read"], compute, layer["write"])
        return _START + layer["read"] + len(stages[0]) * slowest + layer["write"]
    passes = [[len(part) for part in passes_of(stage, held)] for stage in stages]
    step = layer["calibrate"] / batches
    return _RAY_START + simulate(
        passes, layer["read"], step, layer["cast"] + layer["write"], batches
    )


def _layer_seconds(job: Job, rates: Rates, tokens: Tensor | None, hidden: int) -> dict[str, float]:
    """Seconds of one decoder layer, by what is done."""
    nbytes = max(job.layer_bytes(index) for index in range(len(job.plans))) / 1e9
    written = sum(tensor.nbytes for tensor in job.layout([0]).values()) / 1e9
    flops = 0.0 if tokens is None else _flops(job, tokens)
    return {
        "read": nbytes * (1 / rates.read + (1 / rates.link if rates.link else 0)),
        "calibrate": flops / rates.product / 1e12,
        "cast": nbytes / rates.cast,
        "write": written / rates.write + hidden / 1e9 / rates.write,
    }


def _flops(job: Job, tokens: Tensor) -> float:
    """Floating point operations of a decoder layer's calibration, in products of BF16."""
    once = layer_flops(job, tokens)
    if job.scheme.rounding == "nearest":
        return once
    # The samples run up to each group of linear layers, then through the whole, what attention gives out computed
    # once more; second moments of what some of them see (one half, being symmetric); and each weight's rounding, in
    # float32.
    plan = job.plans[0]
    turns = canonical.turns(plan)
    shapes = [[job.checkpoint[f"{name}.weight"].shape for name in turn] for turn in turns]
    sizes = [sum(map(_elements, turn)) for turn in shapes]
    inside = sum(turn[0].startswith(plan.attention) for turn in turns)
    up_to = [
        sum(sizes[inside if number > inside else 0 : number]) for number in range(1, len(sizes))
    ]
    passes = sizes[0] + sum(up_to) - sum(sizes[:inside])
    moments = min(tokens.numel(), MOMENT_TOKENS) * sum(turn[0][1] ** 2 for turn in shapes)
    feedback = sum(3 * rows * columns**2 for turn in shapes for rows, columns in turn)
    flops = once + tokens.numel() * 2.0 * passes + moments + _FLOAT32 * feedback
    if job.scheme.rounding == "learned":
        batches = -(-tokens.numel() // max(BATCH_TOKENS["cpu"], tokens.shape[1]))
        flops += once * Learning.of(len(job.plans), batches, tokens.numel()).passes
    return flops


def layer_flops(job: Job, tokens: Tensor) -> float:
    """Floating point operations of a decoder layer for all samples: linear layers and causal attention."""
    names = [*job.plans[0].linears, *job.plans[0].kept]
    weights = sum(_elements(job.checkpoint[f"{name}.weight"].shape) for name in names)
    queries = next(job.checkpoint[f"{name}.weight"].shape[0] for name in names if "q_proj" in name)
    return float(2 * tokens.numel() * (weights + tokens.shape[1] * queries))


def _rates(job: Job, device: str, cores: int, tokens: Tensor | None) -> Rates:
    if device in DEVICES:
        found = DEVICES[device]
        cast = found.memory_gb_s * MEMORY_SHARE / 2
        return Rates(DISK_READ, DISK_WRITE, found.tflop_s * PRODUCT_SHARE, cast, LINK)
    read, write = _probe_disk()
    product = 1.0 if tokens is None else _probe_layer(job, cores, tokens.shape[1])
    return Rates(read, write, product, _probe_cast(cores), None)


def _probe_disk() -> tuple[float, float]:
    """GB/s read from and written to the disk under the current directory."""
    data = memoryview(os.urandom(_PROBE_BYTES))
    with tempfile.TemporaryFile(dir=Path.cwd()) as file:
        begin = time.perf_counter()
        os.pwrite(file.fileno(), data, 0)
        os.fdatasync(file.fileno())
        written = time.perf_counter()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        middle = time.perf_counter()
        os.preadv(file.fileno(), [bytearray(_PROBE_BYTES)], 0)
        end = time.perf_counter()
    return _PROBE_BYTES / (end - middle) / 1e9, _PROBE_BYTES / (written - begin) / 1e9


def _probe_cast(cores: int) -> float:
    """GB/s of BF16 weights that are measured and cast."""
    weight = torch.randn(_PROBE_ELEMENTS // 4096, 4096).bfloat16()
    with one_thread_each(), ThreadPoolExecutor(cores) as pool:

        def cast() -> None:
            amax = canonical.finite_amax("probe", weight, pool.map)
            fp8.quantize_and_measure(weight, fp8.scale_from_amax(amax), pool.map)

        return weight.nbytes / _seconds_of(cast) / 1e9


def _probe_layer(job: Job, cores: int, seq_len: int) -> float:
    """TFLOP/s of the model's own decoder layer on all cores, a batch to each; of wide models a narrower
    one."""
    config = dict(job.checkpoint.config)
    scale = max(config["hidden_size"] // _PROBE_WIDTH, 1)
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        config[key] = max(config[key] // scale, 1)
    config |= {"num_hidden_layers": 1, "vocab_size": 8, "pad_token_id": None}
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:1]
    with _hollow(config) as directory:
        small = open_job(directory, Scheme(), "modelopt", torch.device("cpu"))
        try:
            names = small.plans[0].tensors
            weights = {
                name: torch.randn(small.checkpoint[name].shape).mul_(0.02).bfloat16()
                for name in names
            }
            samples = max(BATCH_TOKENS["cpu"] // seq_len, 1)
            tokens = torch.zeros(samples, seq_len, dtype=torch.int64)
            hidden = torch.randn(samples, seq_len, config["hidden_size"]).bfloat16()
            kwargs = small.decoder.call_arguments(seq_len)[0]
            layer = small.decoder.load(0, weights)
            with one_thread_each(), fused_kernels(layer), ThreadPoolExecutor(cores) as pool:

                @torch.inference_mode()
                def forward(_: int) -> None:
                    layer(hidden.clone(), **kwargs)

                seconds = _seconds_of(lambda: list(pool.map(forward, range(2 * cores))))
            return 2 * cores * layer_flops(small, tokens) / seconds / 1e12
        finally:
            small.checkpoint.close()


def _seconds_of(work: Callable[[], object]) -> float:
    """Seconds of the second of two runs; the first compiles."""
    work()
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _tokens(job: Job, calibration: Calibration) -> Tensor | None:
    """The shape of the calibration samples, without any."""
    if not job.scheme.needs_calibration:
        return None
    longest = job.decoder.config.max_position_embeddings
    size = (calibration.samples or 128, calibration.seq_len or min(512, longest))
    return torch.empty(size, dtype=torch.int64, device="meta")


@contextmanager
def _laid_out(model: str | Path) -> Iterator[tuple[str, Path]]:
    """A model's name, and a directory with its config and its weights or their place holder."""
    name = str(model)
    if name.lower() in SHAPES and not Path(model).exists():
        with _hollow({**shape_called(name), "torch_dtype": "bfloat16"}) as directory:
            yield name, directory
        return
    source = resolve_model(model)
    if any(source.glob("*.safetensors")):
        yield source.resolve().name, source
        return
    with _hollow(read_json(source / "config.json")) as directory:
        yield source.resolve().name, directory


@dataclass(frozen=True)
class _Described:
    """A config, and no weights."""

    directory: Path
    config: dict[str, Any]

    def file_of(self, name: str) -> Path:
        return self.directory

    def __contains__(self, name: str) -> bool:
        return False

    def __getitem__(self, name: str) -> Any:
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())


@contextmanager
def _hollow(config: dict[str, Any]) -> Iterator[Path]:
    """A checkpoint of this config whose weights take no space: a header, and a hole."""
    directory = Path(tempfile.mkdtemp(prefix="octavo-plan-"))
    try:
        _, model = build_skeleton(_Described(directory, config))
        described = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
        dtype = getattr(torch, str(described), torch.bfloat16)
        parameters = [
            (name, dtype, tuple(tensor.shape)) for name, tensor in model.named_parameters()
        ]
        header, entries = build_header(parameters)
        (directory / "model.safetensors").write_bytes(header)
        os.truncate(directory / "model.safetensors", max(e.end for e in entries.values()))
        (directory / "config.json").write_text(json.dumps(config))
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _elements(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _assumptions(
    device: str, workers: int, disk_read: float | None, disk_write: float | None
) -> list[str]:
    if device in DEVICES:
        told = [
            f"{device.upper()}: {DEVICES[device].source}; {PRODUCT_SHARE:.0%} of its peak BF16 products and "
            f"{MEMORY_SHARE:.0%} of its memory bandwidth are reached; host link {LINK:g} GB/s.",
        ]
        if not disk_read or not disk_write:
            told.append(f"Disks read {DISK_READ:g} and write {DISK_WRITE:g} GB/s.")
    else:
        told = [
            "Rates are those measured on this machine a moment ago, while nothing else was running."
        ]
    if workers > 1:
        told.append(
            "Every worker has a disk of its own, or its share of one that is that much faster."
        )
    return told
