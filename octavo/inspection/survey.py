"""One pass over an edition's bytes: what every check, and every table, is computed from.

Tensors are read in strips and forgotten; what stays is a few numbers for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from octavo import fp8
from octavo.checkpoint import read_json
from octavo.checkpoint.reader import INDEX_NAME
from octavo.edition import Edition, TensorInfo
from octavo.errors import OctavoError
from octavo.inspection import codes
from octavo.inspection.outline import Outline, outline
from octavo.inspection.strips import strips
from octavo.scheme import BLOCK, Granularity, Scheme
from octavo.skeleton import FLOATS

T = TypeVar("T")

SCALES = (".weight_scale", ".input_scale", ".k_scale", ".v_scale")


class Progress(NamedTuple):
    """``done`` of ``total``, counted in ``unit``."""

    done: int
    total: int
    unit: str


OnProgress: TypeAlias = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Scales:
    """The values of one scale tensor.

    Attributes:
        count: how many there are.
        low: the smallest that is positive and finite; None if none is.
        high: the largest.
        invalid: how many are not positive and finite.
        worst: the first of these.
    """

    count: int
    low: float | None
    high: float | None
    invalid: int
    worst: str | None

    @property
    def single(self) -> float | None:
        """The one value there is, repeated or not; None if there are several, or invalid ones."""
        return self.low if self.low == self.high and not self.invalid else None


@dataclass(frozen=True)
class Codes:
    """The E4M3 codes of one weight. A tile is what shares a scale: with a scale repeated for every
    channel it is the whole tensor.

    Attributes:
        counts: how often each of the 256 codes occurs.
        granularity: by the shape of the weight's scales; None if they are missing or of no known shape.
        tiles: how many there are.
        narrow: tiles whose largest magnitude is below 224, those of zeros only left out.
        unscaled: tiles with a scale of exactly 1, those of zeros only left out.
        amax: largest magnitude of the weight; None if a scale or a code makes it unknown.
    """

    counts: tuple[int, ...]
    granularity: Granularity | None
    tiles: int
    narrow: int
    unscaled: int
    amax: float | None

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def largest(self) -> float:
        """The largest magnitude, of at most 448."""
        return codes.largest_value(self.counts)


@dataclass(frozen=True)
class Survey:
    """What an edition holds.

    Attributes:
        dialect: None if it is not quantized.
        scheme: what its config promises; None if it is not quantized.
        outline: what its config calls for.
        tensors: dtype and shape of every tensor, by canonical name, as all below.
        scales: of every scale.
        codes: of every FP8 weight, by module.
        amax: largest magnitude of every other tensor of BF16, FP16 or FP32; NaN or infinite if any
            element is.
        untied: tensors that differ from the one they are tied to.
        stale: safetensors files in the directory that do not belong to the checkpoint.
        unlisted: stored tensors that the index does not name.
    """

    dialect: str | None
    scheme: Scheme | None
    outline: Outline
    tensors: Mapping[str, TensorInfo]
    scales: Mapping[str, Scales]
    codes: Mapping[str, Codes]
    amax: Mapping[str, float]
    untied: tuple[str, ...]
    stale: tuple[str, ...]
    unlisted: tuple[str, ...]

    @property
    def quantized(self) -> list[str]:
        """The linear layers with an FP8 weight."""
        linears = (*self.outline.linears, *self.outline.outer_linears)
        return [module for module in linears if module in self.codes]


def take_survey(edition: Edition, on_progress: OnProgress = silent) -> Survey:
    """Read all of ``edition`` once, as many tensors at a time as there are cores.

    Raises:
        OctavoError: Octavo does not know the architecture, or a file changed while it was read.
    """
    model = outline(edition)
    tensors = {name: edition[name] for name in _in_order(edition, model.shapes)}
    scales = {name: scale_values(edition, name) for name in tensors if name.endswith(SCALES)}
    quantized = {f"{module}.weight" for module in edition.quantized_modules()}
    weights = [name for name in tensors if name in quantized]
    plain = [
        name
        for name, info in tensors.items()
        if name not in scales and name not in quantized and info.dtype in FLOATS
    ]
    names = [*weights, *plain]

    def examine(name: str) -> Codes | float:
        if name in quantized:
            return tally_weight(edition, name.removesuffix(".weight"))
        return amax_of(edition, name)

    sizes = (tensors[name].nbytes for name in names)
    found = dict(zip(names, in_parallel(examine, names, sizes, on_progress), strict=True))
    return Survey(
        dialect=edition.dialect,
        scheme=edition.scheme,
        outline=model,
        tensors=tensors,
        scales=scales,
        codes={
            name.removesuffix(".weight"): one
            for name, one in found.items()
            if isinstance(one, Codes)
        },
        amax={name: one for name, one in found.items() if isinstance(one, float)},
        untied=tuple(
            name
            for name, other in model.tied.items()
            if name in tensors and other in tensors and not _same(edition, name, other)
        ),
        stale=_stale(edition),
        unlisted=_unlisted(edition),
    )


def _in_order(names: Iterable[str], model: Iterable[str]) -> list[str]:
    """``names`` in the order of the model's tensors: each where the first of its module is."""
    places: dict[str, int] = {}
    for place, name in enumerate(model):
        module = name.rpartition(".")[0]
        while module:
            places.setdefault(module, place)
            module = module.rpartition(".")[0]
    return sorted(names, key=lambda name: places.get(name.rpartition(".")[0], len(places)))


def in_parallel(
    function: Callable[[str], T],
    names: Iterable[str],
    sizes: Iterable[int],
    on_progress: OnProgress,
) -> list[T]:
    """``function`` of each name, on all cores, with progress in megabytes of ``sizes`` (bytes)."""
    sizes, results = list(sizes), []
    total, done = -(-sum(sizes) // 10**6), 0
    pool = ThreadPoolExecutor(torch.get_num_threads(), "octavo-inspection")
    try:
        for size, result in zip(sizes, pool.map(function, names), strict=True):
            results.append(result)
            done += size
            on_progress(Progress(-(-done // 10**6), total, "MB"))
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def scale_values(edition: Edition, name: str) -> Scales:
    """The values of the scale with the canonical name ``name``."""
    values = torch.cat([strip.float().reshape(-1) for _, strip in strips(edition, name)])
    valid = values.isfinite() & (values > 0)
    good, bad = values[valid], values[~valid]
    return Scales(
        count=values.numel(),
        low=good.min().item() if good.numel() else None,
        high=good.max().item() if good.numel() else None,
        invalid=bad.numel(),
        worst=f"{bad[0].item():g}" if bad.numel() else None,
    )


def tally_weight(edition: Edition, module: str) -> Codes:
    """The codes of the FP8 weight of ``module``."""
    name = f"{module}.weight"
    shape = edition[name].shape
    granularity = granularity_of(edition, module)
    width = math.prod(shape[1:])
    # Rows of one scale a tensor are put together afterwards.
    tile = (BLOCK, BLOCK) if granularity == "block" else (1, width)
    counts, largest = torch.zeros(256, dtype=torch.int64), []
    for _, strip in strips(edition, name):
        matrix = strip.view(torch.uint8).reshape(-1, max(width, 1))
        some, most = codes.tally(matrix, tile)
        counts += some
        largest.append(most)
    tiles, scale = torch.cat(largest), _scale(edition, module, granularity)
    if tiles.numel() and (scale.numel() == 1 or (scale == scale[0, 0]).all()):
        tiles, scale = tiles.amax(dim=(0, 1), keepdim=True), scale[:1, :1]
    used = tiles > 0
    amax = (tiles.view(fp8.E4M3).float() * scale).amax().item() if tiles.numel() else 0.0
    return Codes(
        counts=tuple(counts.tolist()),
        granularity=granularity,
        tiles=tiles.numel(),
        narrow=int((used & (tiles < codes.HALF_RANGE)).sum()),
        unscaled=int((used & (scale == 1)).sum()),
        amax=amax if granularity is not None and math.isfinite(amax) else None,
    )


def granularity_of(edition: Edition, module: str) -> Granularity | None:
    """What a weight scale of ``module`` is for; None if it has none of a known shape."""
    name = f"{module}.weight_scale"
    if name not in edition:
        return None
    try:
        shape = edition.weight_scale_shape(module)
    except OctavoError:
        return None
    if not shape:
        return "tensor"
    return "channel" if shape == (edition[f"{module}.weight"].shape[0], 1) else "block"


def amax_of(edition: Edition, name: str) -> float:
    """The largest magnitude in an unquantized tensor; NaN if any element is NaN."""
    found = [fp8.amax(strip.contiguous()) for _, strip in strips(edition, name) if strip.numel()]
    return torch.stack(found).amax().item() if found else 0.0


def _scale(edition: Edition, module: str, granularity: Granularity | None) -> Tensor:
    """The weight scale as a matrix; a single 0 where there is none to trust."""
    if granularity is None:
        return torch.zeros(1, 1)
    scale = edition.read_unchecked(f"{module}.weight_scale")
    return scale if scale.ndim else scale.reshape(1, 1)


def _same(edition: Edition, name: str, other: str) -> bool:
    if edition[name] != edition[other]:
        return False
    return all(
        torch.equal(one.view(torch.uint8), two.view(torch.uint8))
        for (_, one), (_, two) in zip(strips(edition, name), strips(edition, other), strict=True)
    )


def _stale(edition: Edition) -> tuple[str, ...]:
    files = set(edition.checkpoint.files)
    found = sorted(edition.directory.glob("*.safetensors"))
    return tuple(path.name for path in found if path not in files)


def _unlisted(edition: Edition) -> tuple[str, ...]:
    index = edition.directory / INDEX_NAME
    if not index.exists():
        return ()
    listed = read_json(index)["weight_map"]
    return tuple(name for name in edition.checkpoint if name not in listed)
