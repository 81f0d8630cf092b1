"""A decoder's weights as compiled code reads them: one stretch of memory, and tables of what lies where.

Every linear layer is a row of a table: where its numbers begin, E4M3 or BF16, how its inputs are rounded, and where
its scales are. Which layers an edition left in BF16 and which scheme it has are entries of that table, not branches
of the program.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from octavo import fp8
from octavo.edition import Edition
from octavo.engines.torch import dots
from octavo.engines.torch.strips import STRIP
from octavo.engines.torch.vectors import E4M3_UNIT, LANES
from octavo.errors import OctavoError
from octavo.linear import Fp8Linear
from octavo.loading import fp8_skeleton
from octavo.scheme import BLOCK

Array = np.ndarray[Any, Any]

# The linear layers of a decoder layer, in the order they are computed in.
PROJECTIONS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
# Those that share an input, as ranges of the above.
QKV, OUT, GATE_UP, DOWN = (0, 3), (3, 4), (4, 6), (6, 7)

# How an input is rounded: not at all; with one scale; with one for each token; with one for each 128 channels of each.
AS_IT_IS, STATIC, BY_TOKEN, BY_GROUP = range(4)

LINEAR = np.dtype(
    [
        ("weight", np.int64),  # where it begins, in bytes
        ("nbytes", np.int64),  # of a number: 1 is E4M3, 2 is BF16
        ("rows", np.int64),  # outputs, made a multiple of STRIP
        ("columns", np.int64),  # inputs, made a multiple of LANES
        ("inputs", np.int64),  # how they are rounded
        ("input_scale", np.float32),
        (
            "place",
            np.int64,
        ),  # which of the rounded inputs is its own: layers with equal scales share one
        ("halves", np.bool_),  # whether it takes them in BF16
        ("scales", np.int64),  # where its scales begin, one for each row and block of columns
        ("width", np.int64),  # columns of a block
        ("bias", np.int64),  # where it begins, or -1
    ],
    align=True,
)

# Ways to make tables of rotary embedding that do not depend on how long a sequence gets.
_ROTARY = ("default", "linear", "llama3", "yarn")


class Shape(NamedTuple):
    """Sizes of a decoder.

    Attributes:
        layers: decoder layers.
        hidden: channels of hidden states.
        inner: channels inside the MLP.
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: channels of a head.
        vocab: token ids are below.
        positions: tokens of a sequence, at most.
        eps: what RMSNorm adds.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    positions: int
    eps: float


class Weights(NamedTuple):
    """All of a decoder; a named tuple, as compiled code takes it. BF16 is uint16.

    Attributes:
        arena: uint8, the numbers of all linear layers and the embedding.
        linears: :data:`LINEAR` ``[layers, 7]``, in the order of :data:`PROJECTIONS`.
        head: :data:`LINEAR` ``[1]``, the output head.
        scales: float32; each a weight scale, times what decoding leaves to be multiplied.
        biases: float32, likewise.
        embedding: BF16 ``[vocab, hidden]``.
        norms: BF16 ``[layers, 2, hidden]``, before attention and before the MLP.
        head_norms: BF16 ``[layers, 2, head_dim]``, of queries and keys; ``[0, 2, head_dim]`` where there are none.
        final_norm: BF16 ``[1, hidden]``.
        windows: int64 ``[layers]``: tokens that a token sees, itself included.
        cache_scales: float32 ``[layers, 2]``, of keys and values; ``[0, 2]`` if the cache is BF16.
        cos: float32 ``[positions, head_dim / 2]``, rounded to BF16.
        sin: likewise.
        shape: sizes.
    """

    arena: Array
    linears: Array
    head: Array
    scales: Array
    biases: Array
    embedding: Array
    norms: Array
    head_norms: Array
    final_norm: Array
    windows: Array
    cache_scales: Array
    cos: Array
    sin: Array
    shape: Shape

    def numbers(self, linear: Any) -> Tensor:
        """The numbers of a linear layer ``[rows, columns]``, E4M3 or BF16, padding included."""
        size = int(linear["rows"] * linear["columns"] * linear["nbytes"])
        start = int(linear["weight"])
        raw = torch.from_numpy(self.arena[start : start + size])
        dtype = fp8.E4M3 if linear["nbytes"] == 1 else torch.bfloat16
        return raw.view(dtype).view(int(linear["rows"]), int(linear["columns"]))


def load_weights(edition: Edition) -> Weights:
    """Read a checkpoint, BF16 or FP8 in any dialect. FP16 and float32 numbers are rounded to BF16.

    Raises:
        OctavoError: not a model the embedded engine computes; names the file and what is the matter.
    """
    model: Any = fp8_skeleton(edition)
    path = edition.directory / "config.json"
    shape = shape_of(model.config, path)
    cos, sin = rotary_tables(model, shape, path)
    loader = _Loader(edition)
    modules = dict(model.named_modules())
    names = [f"model.layers.{layer}.{one}" for layer in range(shape.layers) for one in PROJECTIONS]
    for name in names:
        loader.plan(name, modules[name])
    tied = "lm_head.weight" not in edition
    loader.plan("model.embed_tokens", modules["model.embed_tokens"])
    if not tied:
        loader.plan("lm_head", modules["lm_head"])
    rows = loader.read()
    linears = np.stack([rows[name] for name in names]).reshape(shape.layers, len(PROJECTIONS))
    for first, last in (QKV, OUT, GATE_UP, DOWN):
        _share_inputs(linears[:, first:last])
    embedding = rows["model.embed_tokens"]
    head = rows["model.embed_tokens" if tied else "lm_head"]
    layers = [f"model.layers.{layer}" for layer in range(shape.layers)]

    def read(names: list[str], *sizes: int) -> Array:
        found = [_bf16(edition.read(name)).view(torch.uint16).numpy() for name in names]
        return np.stack(found).reshape(*sizes) if found else np.empty(sizes, np.uint16)

    norms = [f"{one}.{at}.weight" for one in layers for at in _NORMS]
    head_norms = [f"{one}.self_attn.{at}_norm.weight" for one in layers for at in "qk"]
    head_norms = [name for name in head_norms if name in edition]
    cached = edition.scheme is not None and edition.scheme.kv_cache == "fp8"
    return Weights(
        arena=loader.arena,
        linears=linears,
        head=head.reshape(1),
        scales=np.concatenate(loader.scales),
        biases=np.concatenate(loader.biases),
        embedding=_embedding(loader.arena, embedding, shape),
        norms=read(norms, shape.layers, 2, shape.hidden),
        head_norms=read(head_norms, len(head_norms) // 2, 2, shape.head_dim),
        final_norm=read(["model.norm.weight"], 1, shape.hidden),
        windows=windows_of(model.config, shape),
        cache_scales=_cache_scales(edition, layers if cached else []),
        cos=cos,
        sin=sin,
        shape=shape,
    )


_NORMS = ("input_layernorm", "post_attention_layernorm")


class _Loader:
    """Lays linear layers out in one stretch of memory, then reads them there."""

    def __init__(self, edition: Edition) -> None:
        self._edition = edition
        self._modules: dict[str, Any] = {}
        self._rows: dict[str, Any] = {}
        self._end = 0
        self.arena = np.empty(0, np.uint8)
        self.scales: list[Array] = [np.ones(0, np.float32)]
        self.biases: list[Array] = [np.zeros(0, np.float32)]

    def plan(self, name: str, module: Any) -> None:
        """Reserve memory for a linear layer, or an embedding."""
        shape = self._edition[f"{name}.weight"].shape
        nbytes = 1 if isinstance(module, Fp8Linear) else 2
        row = np.zeros((), dtype=LINEAR)
        row["weight"], row["nbytes"] = self._end, nbytes
        row["rows"], row["columns"] = _ceil(shape[0], STRIP), _ceil(shape[1], LANES)
        # Two vectors of 64 bytes: rows of neighbours share no line.
        self._end += _ceil(int(row["rows"] * row["columns"]) * nbytes, 128)
        self._rows[name], self._modules[name] = row, module

    def read(self) -> dict[str, Any]:
        """All that was planned: the rows of :data:`LINEAR`, by name."""
        self.arena = huge_pages(self._end)
        for name, row in self._rows.items():
            weight = self._edition.read(f"{name}.weight")
            if row["nbytes"] == 1:
                check_codes(self._edition, f"{name}.weight", weight)
            self._fill(row, weight)
            self._describe(row, name)
        return self._rows

    def _fill(self, row: Any, weight: Tensor) -> None:
        size = int(row["rows"] * row["columns"] * row["nbytes"])
        raw = torch.from_numpy(self.arena[int(row["weight"]) : int(row["weight"]) + size])
        place = raw.view(fp8.E4M3 if row["nbytes"] == 1 else torch.bfloat16)
        place = place.view(int(row["rows"]), int(row["columns"]))
        source = weight if row["nbytes"] == 1 else _bf16(weight)
        place[: weight.shape[0], : weight.shape[1]].copy_(source)

    def _describe(self, row: Any, name: str) -> None:
        """Scales, bias and inputs."""
        module, edition = self._modules[name], self._edition
        rows, columns = int(row["rows"]), int(row["columns"])
        scale, row["width"] = torch.ones(rows, 1), columns
        if isinstance(module, Fp8Linear):
            found = edition.read(f"{name}.weight_scale")
            in_blocks = found.ndim == 2 and found.shape != (module.out_features, 1)
            if in_blocks:
                scale = found.repeat_interleave(BLOCK, dim=0)[: module.out_features]
                row["width"], row["inputs"] = BLOCK, BY_GROUP
            else:
                scale = found.expand(module.out_features, 1) if not found.ndim else found
                row["inputs"] = BY_TOKEN
            scale = torch.nn.functional.pad(scale, (0, 0, 0, rows - len(scale)), value=1.0)
            scale = scale * E4M3_UNIT
            if (
                not in_blocks
                and f"{name}.input_scale" in edition
                and module.input_scale is not None
            ):
                row["inputs"] = STATIC
                row["input_scale"] = edition.read(f"{name}.input_scale").item()
        # Scaled group by group, inputs are no BF16 numbers.
        row["halves"] = dots.AVAILABLE and columns % dots.DEPTH == 0 and row["inputs"] != BY_GROUP
        row["scales"] = sum(map(len, self.scales))
        self.scales.append(scale.contiguous().view(-1).numpy())
        row["bias"] = -1
        if f"{name}.bias" in edition:
            bias = torch.zeros(rows)
            own = _bf16(edition.read(f"{name}.bias")).float()
            bias[: len(own)] = own
            row["bias"] = sum(map(len, self.biases))
            self.biases.append(bias.numpy())


def check_codes(edition: Edition, name: str, codes: Tensor) -> None:
    """Raise if E4M3 codes of the tensor called ``name`` are not all numbers.

    Raises:
        OctavoError: some are NaN.
    """
    if (codes.view(torch.uint8) & 0x7F == 0x7F).any():
        raise OctavoError(
            f"tensor '{name}' in {edition.file_of(name)} holds NaN; expected numbers. "
            "The edition is damaged: quantize the original checkpoint again."
        )


def huge_pages(nbytes: int) -> Array:
    """Zeros, uint8, on huge pages: with small ones, reading gigabytes in order waits for page tables half the time."""
    memory = mmap.mmap(-1, max(nbytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def shape_of(config: Any, path: Path) -> Shape:
    """Sizes of the decoder that a ``transformers`` config describes.

    Args:
        config: of a family of :data:`octavo.skeleton.SUPPORTED`.
        path: its file.

    Raises:
        OctavoError: not a decoder the embedded engine computes.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.hidden_act != "silu":
        raise OctavoError(
            f"{path} has hidden_act {config.hidden_act!r}; the embedded engine computes silu. "
            "Use --engine transformers."
        )
    if head_dim % LANES:
        raise OctavoError(
            f"{path} has heads of {head_dim} channels; the embedded engine takes multiples of {LANES}. "
            "Use --engine transformers."
        )
    if config.hidden_size % STRIP or config.intermediate_size % STRIP:
        raise OctavoError(
            f"{path} has hidden_size {config.hidden_size} and intermediate_size "
            f"{config.intermediate_size}; the embedded engine takes multiples of {STRIP}. "
            "Use --engine transformers."
        )
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocab=config.vocab_size,
        positions=config.max_position_embeddings,
        eps=config.rms_norm_eps,
    )


def windows_of(config: Any, shape: Shape) -> Array:
    """Tokens that a token sees in each layer, itself included: int64 ``[layers]``."""
    everywhere = "sliding_attention" if config.model_type == "mistral" else "full_attention"
    kinds = getattr(config, "layer_types", None) or [everywhere] * shape.layers
    sliding = getattr(config, "sliding_window", None) or shape.positions
    sizes = [sliding if kind == "sliding_attention" else shape.positions for kind in kinds]
    return np.array(sizes, dtype=np.int64)


def rotary_tables(model: Any, shape: Shape, path: Path) -> tuple[Array, Array]:
    """Cosines and sines ``[positions, head_dim / 2]`` as BF16 numbers in float32, by ``transformers``.

    Raises:
        OctavoError: they would depend on how long a sequence gets.
    """
    module = next(one for one in model.modules() if type(one).__name__.endswith("RotaryEmbedding"))
    if module.rope_type not in _ROTARY:
        raise OctavoError(
            f"{path} has rotary embedding of the type {module.rope_type!r}; the embedded engine computes "
            f"{', '.join(_ROTARY)}. Use --engine transformers."
        )
    build: Any = type(module)
    like = torch.empty(0, dtype=torch.bfloat16)
    tables = build(model.config)(like, torch.arange(shape.positions).unsqueeze(0))
    cos, sin = (table[0, :, : shape.head_dim // 2].float().numpy().copy() for table in tables)
    return cos, sin


def _cache_scales(edition: Edition, layers: list[str]) -> Array:
    found = [edition.read(f"{one}.self_attn.{at}_scale").item() for one in layers for at in "kv"]
    return np.array(found, dtype=np.float32).reshape(-1, 2)


def _embedding(arena: Array, row: Any, shape: Shape) -> Array:
    start, columns = int(row["weight"]), int(row["columns"])
    table = arena[start : start + int(row["rows"]) * columns * 2].view(np.uint16)
    return table.reshape(-1, columns)[: shape.vocab, : shape.hidden]


def _share_inputs(group: Array) -> None:
    """Say of each linear layer of a group, ``[layers, group]``, whose rounded input it takes."""
    for rows in group:
        for index, row in enumerate(rows):
            alike: Iterator[int] = (
                other
                for other in range(index + 1)
                if all(rows[other][key] == row[key] for key in ("inputs", "input_scale"))
            )
            rows[index]["place"] = next(alike)


def _bf16(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16)


def _ceil(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
