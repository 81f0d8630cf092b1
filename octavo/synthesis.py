"""Checkpoints of random weights in the exact shape of known models, to try everything on.

A value is 16 random bits looked up in a table of the 65,536 quantiles of a normal distribution, in
BF16. Weights are made in pieces, a thread for each core; every piece has a random stream of its own,
named by the seed, its tensor and its place there, so that neither threads nor shards nor how many
layers there are change a value.
"""

from __future__ import annotations

import copy
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from octavo.checkpoint import CheckpointWriter, Workspace
from octavo.errors import OctavoError
from octavo.shapes import SHAPES, shape_called
from octavo.stopwatch import Stopwatch

_PIECE = 2 << 20
"""Values made by one task: 4 MiB."""

_STRIP = 64 << 10
"""Values made at once: their bits, indices and the table stay in a core's cache."""

_AHEAD = 64
"""Pieces that may be under way: 256 MiB on their way to the disk, of which a few in memory."""

_ONE = 0x3F80
"""1.0 in BF16."""


class SynthResult(NamedTuple):
    """What was made.

    Attributes:
        output: the checkpoint's directory.
        like: the model whose shape it has.
        layers: decoder layers.
        tensors: tensors written.
        parameters: values in them; what is tied counts once.
        nbytes: bytes of them.
        seconds: wall-clock time by stage, in order, and ``total``.
    """

    output: str
    like: str
    layers: int
    tensors: int
    parameters: int
    nbytes: int
    seconds: dict[str, float]


class _Piece(NamedTuple):
    """``size`` values of tensor ``name`` from ``start`` on; ``last`` where the tensor ends with them."""

    name: str
    start: int
    size: int
    last: bool


def synth(
    like: str,
    output: str | Path,
    *,
    layers: int | None = None,
    seed: int = 0,
    shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> SynthResult:
    """Write a checkpoint of random BF16 weights in the shape of a known model.

    Weights, embeddings and biases are normal, with the config's ``initializer_range`` for their
    standard deviation; norms' weights are 1. The tokenizer makes one token of each byte of UTF-8.

    Args:
        like: a name of :data:`octavo.shapes.SHAPES`.
        output: the directory to create; it appears only when complete.
        layers: decoder layers; as many as the model has by default.
        seed: of the values, not negative.
        shard_size: bytes of tensors in one file, at most.
        overwrite: replace ``output`` if it exists.
        on_progress: called with bytes done and bytes in all.

    Returns:
        Sizes, counts, times.

    Raises:
        OctavoError: the model is not known, an option is wrong, or the disk does not allow it;
            nothing is left behind.
    """
    clock = Stopwatch()
    with clock("lay out"):
        config = shape_called(like)
        if layers is not None:
            config["num_hidden_layers"] = layers
        if config["num_hidden_layers"] < 1 or seed < 0:
            raise OctavoError(
                f"layers is {config['num_hidden_layers']} and seed is {seed}; "
                "expected at least 1 layer and a seed that is not negative."
            )
        # What the weights are here, whatever the model was published in.
        config["torch_dtype"] = "bfloat16"
        tensors = _layout(config)
    with (
        Workspace(Path(output), overwrite=overwrite) as work,
        CheckpointWriter(work.place, tensors, shard_size=shard_size) as writer,
    ):
        with clock("write"):
            _write_weights(
                writer, tensors, _quantiles(config["initializer_range"]), seed, on_progress
            )
        with clock("sync"):
            for name, content in _small_files(config).items():
                writer.write_json(name, content)
            writer.seal()
            work.publish()
    return SynthResult(
        output=str(output),
        like=like,
        layers=config["num_hidden_layers"],
        tensors=len(tensors),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
        seconds=clock.seconds(),
    )


def parameter_counts() -> dict[str, int]:
    """For each known name, how many parameters the whole model has; what is tied counts once."""
    counts = {}
    for name, config in SHAPES.items():
        # All layers have the same tensors.
        tensors = _layout({**config, "num_hidden_layers": 1})
        repeats = {key: config["num_hidden_layers"] if ".layers." in key else 1 for key in tensors}
        counts[name] = sum(tensor.numel() * repeats[key] for key, tensor in tensors.items())
    return counts


def _layout(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the model that ``config`` describes, BF16, on the meta device, in its order."""
    # A copy: from_dict writes into what it is given.
    built = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
    build: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(built)]
    with torch.device("meta"):
        model = build(built).to(torch.bfloat16)
    # Of tensors that are tied, the first.
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _write_weights(
    writer: CheckpointWriter,
    tensors: Mapping[str, Tensor],
    table: NDArray[np.uint16],
    seed: int,
    on_progress: Callable[[int, int], None],
) -> None:
    """Make every tensor's values and write them."""

    def write(piece: _Piece) -> _Piece:
        values = _values(piece, table, seed).view(np.uint8)
        writer.write_bytes(piece.name, 2 * piece.start, torch.from_numpy(values))
        return piece

    done = synced = 0
    total = sum(tensor.nbytes for tensor in tensors.values())
    with ThreadPoolExecutor(torch.get_num_threads(), "octavo-synth") as pool:
        for piece in _in_order(pool, write, _pieces(tensors)):
            if piece.last:
                writer.finish(piece.name)
            done += 2 * piece.size
            if done - synced >= 2 * _PIECE * _AHEAD:
                # Now, while the threads go on, rather than all at the end.
                writer.sync()
                synced = done
            on_progress(done, total)


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[_Piece]:
    for name, tensor in tensors.items():
        end = tensor.numel()
        for start in range(0, end, _PIECE):
            size = min(_PIECE, end - start)
            yield _Piece(name, start, size, start + size == end)


def _in_order(
    pool: Executor, work: Callable[[_Piece], _Piece], pieces: Iterable[_Piece]
) -> Iterator[_Piece]:
    """Each piece once ``work`` is done with it, while those ahead of it are under way."""
    under_way: deque[Future[_Piece]] = deque()
    for piece in pieces:
        under_way.append(pool.submit(work, piece))
        if len(under_way) == _AHEAD:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def _values(piece: _Piece, table: NDArray[np.uint16], seed: int) -> NDArray[np.uint16]:
    """The bits of a piece's values, BF16."""
    if piece.name.endswith("norm.weight"):
        return np.full(piece.size, _ONE, dtype=np.uint16)
    stream = (int.from_bytes(piece.name.encode()), piece.start)
    bits = np.random.SFC64(np.random.SeedSequence(seed, spawn_key=stream))
    values = np.empty(piece.size, dtype=np.uint16)
    # take() would convert any other type of index, the whole piece at once.
    index = np.empty(_STRIP, dtype=np.intp)
    for start in range(0, piece.size, _STRIP):
        strip = values[start : start + _STRIP]
        words = bits.random_raw(-(-len(strip) // 4))
        index[: len(strip)] = words.view(np.uint16)[: len(strip)]
        # Every index is within the table: "clip" only spares a copy that "raise" makes.
        np.take(table, index[: len(strip)], out=strip, mode="clip")
    return values


def _quantiles(std: float) -> NDArray[np.uint16]:
    """The bits of 65,536 equally likely values of a normal distribution around 0, BF16."""
    probabilities = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    values = (torch.special.ndtri(probabilities) * std).bfloat16()
    table: NDArray[np.uint16] = values.view(torch.uint16).numpy()
    return table


def _small_files(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The JSON files beside the weights."""
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {
        "config.json": dict(sorted(config.items())),
        "generation_config.json": {key: config[key] for key in ids if key in config},
        "tokenizer.json": _byte_tokenizer(),
        "tokenizer_config.json": {
            "model_max_length": config["max_position_embeddings"],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    }


def _byte_tokenizer() -> dict[str, Any]:
    """One token for each byte of UTF-8: byte-level BPE that merges nothing."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={byte: id for id, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content
