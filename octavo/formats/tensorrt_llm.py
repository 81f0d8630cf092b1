"""TensorRT-LLM's checkpoint, as ModelOpt 0.47 exports it: a config, and a file for each rank.

The format is ``docs/source/architecture/checkpoint.md`` of TensorRT-LLM. Its names are its own modules':
``attention.qkv`` has the rows of q, k and v one after the other, ``mlp.fc`` is ``gate_proj``, ``mlp.gate``
is ``up_proj``. Tensor parallel ranks divide the rows of these, of the embedding and of ``lm_head`` (zeros
fill up a vocabulary that does not divide), and the columns of ``attention.dense`` and ``mlp.proj``, whose
biases every rank has, like norms and scales. Where there are more ranks than key/value heads, several
have the same. Pipeline stages take equal runs of layers, numbered from 0 on each rank.

Scales mean what they mean everywhere, a number is its code times the scale: the engine divides inputs
by ``activation_scaling_factor`` and takes the reciprocal of ``kv_cache_scaling_factor`` itself. ModelOpt
writes no KV scale below 1.0; here they are the calibrated ones. The engine caches keys and values
alike with the larger of the two.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, FiniteFloat, PositiveFloat, PositiveInt, ValidationError

from octavo.errors import OctavoError
from octavo.formats.dialect import (
    MODEL_CONFIG,
    Decoded,
    Described,
    Dialect,
    Files,
    Json,
    Modules,
    Piece,
    Stored,
    Target,
    Tensors,
    unsupported,
    without_quantization,
)
from octavo.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor


class _Linear(NamedTuple):
    """A linear layer of TensorRT-LLM.

    Attributes:
        stored: its name in a decoder layer.
        members: the canonical modules whose rows it holds, in order; they share its scales.
        axis: what tensor parallel ranks divide: 0 the rows of each member, 1 the columns.
    """

    stored: str
    members: tuple[str, ...]
    axis: int


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LINEARS = (
    _Linear("attention.qkv", _QKV, axis=0),
    _Linear("attention.dense", ("self_attn.o_proj",), axis=1),
    _Linear("mlp.fc", ("mlp.gate_proj",), axis=0),
    _Linear("mlp.gate", ("mlp.up_proj",), axis=0),
    _Linear("mlp.proj", ("mlp.down_proj",), axis=1),
)
# What the engine computes in one product; it concatenates fc and gate itself.
_TOGETHER = (_QKV, ("mlp.gate_proj", "mlp.up_proj"))
_BY_STORED = {linear.stored: linear for linear in _LINEARS}
_SCALES = {"weight_scale": "weights_scaling_factor", "input_scale": "activation_scaling_factor"}
_SUFFIXES = {"weight": "weight", "bias": "bias", **_SCALES}
_NORMS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_layernorm.weight",
    "self_attn.q_norm.weight": "attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "attention.k_layernorm.weight",
}
_K_SCALE, _V_SCALE = "self_attn.k_scale", "self_attn.v_scale"
_K_CACHE = "attention.k_cache_scaling_factor"
_V_CACHE = "attention.v_cache_scaling_factor"
# The larger of the two, for engines up to 0.17, and all there is in checkpoints of their time.
_KV_CACHE = "attention.kv_cache_scaling_factor"
_KV_SCALES = {_K_CACHE: (_K_SCALE,), _V_CACHE: (_V_SCALE,), _KV_CACHE: (_K_SCALE, _V_SCALE)}
_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_VOCAB_EMBEDDING, _LN_F = "transformer.vocab_embedding.weight", "transformer.ln_f.weight"
_IN_LAYER = {
    f"{member}.{suffix}" for linear in _LINEARS for member in linear.members for suffix in _SUFFIXES
} | {*_NORMS, _K_SCALE, _V_SCALE}

_RANKED = re.compile(r"rank(\d{1,9})/(.+)")
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.(.+)")
_STORED_LAYER = re.compile(r"transformer\.layers\.(\d{1,9})\.(.+)")

# TensorRT-LLM's architecture and ModelOpt's kind of decoder, by `transformers`' model_type.
_FAMILIES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "mistral": ("MistralForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen"),
    "qwen3": ("Qwen3ForCausalLM", "qwen"),
}


class _Strict(BaseModel):
    """Fields a config must have, of the types they must have; others are none of our concern."""

    model_config = ConfigDict(strict=True, frozen=True)


class _Mapping(_Strict):
    tp_size: PositiveInt = 1
    pp_size: PositiveInt = 1


class _Quantization(_Strict):
    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None
    exclude_modules: list[str] | None = None


class _Config(_Strict):
    """TensorRT-LLM's ``config.json``, as much of it as says what the tensors are."""

    architecture: Literal[
        "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
    ]
    dtype: Literal["bfloat16", "float16", "float32"]
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_size: PositiveInt | None = None
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt
    norm_epsilon: FiniteFloat
    hidden_act: str
    position_embedding_type: Literal["rope_gpt_neox"]
    rotary_base: PositiveFloat | None = None
    rotary_scaling: dict[str, Any] | None = None
    use_parallel_embedding: bool = False
    embedding_sharding_dim: Literal[0] = 0
    mapping: _Mapping = _Mapping()
    quantization: _Quantization

    @property
    def tp(self) -> int:
        return self.mapping.tp_size

    @property
    def pp(self) -> int:
        return self.mapping.pp_size

    @property
    def layers_of_a_stage(self) -> int:
        return self.num_hidden_layers // self.pp

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden_size // self.num_attention_heads

    def shares(self, member: str) -> tuple[int, int]:
        """Into how many parts the rows of a module are divided, and the rows of a part."""
        if member in ("self_attn.k_proj", "self_attn.v_proj"):
            parts = min(self.tp, self.kv_heads)
            return parts, self.kv_heads // parts * self.head_dim
        if member.startswith("mlp."):
            return self.tp, self.intermediate_size // self.tp
        return self.tp, self.num_attention_heads // self.tp * self.head_dim

    def divides(self, tp: int) -> bool:
        """Whether so many tensor parallel ranks get equal shares of everything."""
        few, many = sorted((tp, self.kv_heads))
        return not (self.num_attention_heads % tp or self.intermediate_size % tp or many % few)


def encode(tensors: Tensors, target: Target) -> dict[str, Tensor]:
    """Canonical tensors to those of each rank that holds a share of them.

    Scales of q/k/v become one: weight scales must be equal already, of input scales it is the largest.

    Raises:
        OctavoError: TensorRT-LLM has no such model, no place for a tensor, or no way to divide the
            model among so many ranks.
    """
    config = _validated(_config_json(target), "The model's config.json")
    tied = target.config.get("tie_word_embeddings") is True
    layers: dict[int, dict[str, Tensor]] = {}
    encoded: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        if match and match[2] in _IN_LAYER:
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
        else:
            encoded |= _encode_outside(name, tensor, config, tied)
    for number, layer in layers.items():
        stage, local = divmod(number, config.layers_of_a_stage)
        for rank in range(config.tp):
            prefix = f"rank{stage * config.tp + rank}/transformer.layers.{local}"
            share = _encode_layer(number, layer, rank, config)
            encoded |= {f"{prefix}.{name}": tensor for name, tensor in share.items()}
    return encoded


def _encode_outside(name: str, tensor: Tensor, config: _Config, tied: bool) -> dict[str, Tensor]:
    """A tensor outside the decoder layers: the embedding on the first stage, the rest on the last."""
    first, last = 0, (config.pp - 1) * config.tp
    ranks = range(config.tp)
    if name == _NORM:
        return {f"rank{last + rank}/{_LN_F}": tensor for rank in ranks}
    if name not in (_EMBEDDING, _HEAD):
        raise OctavoError(
            f"tensor {name!r} has no place in a TensorRT-LLM checkpoint of {config.architecture}. "
            "Convert the edition to another format."
        )
    shares = [_rows_of_vocabulary(tensor, rank, config.tp) for rank in ranks]
    # The engine has no tied embeddings across ranks; ModelOpt stores the head beside the embedding.
    heads = {f"rank{last + rank}/{_HEAD}": share for rank, share in enumerate(shares)}
    if name == _HEAD:
        return {} if tied else heads
    embedding = {f"rank{first + rank}/{_VOCAB_EMBEDDING}": s for rank, s in enumerate(shares)}
    return {**embedding, **heads} if tied else embedding


def _rows_of_vocabulary(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """A rank's rows, zeros behind the last."""
    from torch.nn.functional import pad

    rows = -(-tensor.shape[0] // ranks)
    share = tensor[rank * rows : (rank + 1) * rows]
    return pad(share, (0, 0, 0, rows - len(share))) if len(share) < rows else share


def _encode_layer(
    number: int, layer: Mapping[str, Tensor], rank: int, config: _Config
) -> dict[str, Tensor]:
    """What tensor parallel rank ``rank`` holds of a decoder layer."""
    import torch

    encoded = {stored: layer[name] for name, stored in _NORMS.items() if name in layer}
    for group in _TOGETHER:
        given = [member for member in group if f"{member}.weight" in layer]
        scaled = [member for member in given if f"{member}.weight_scale" in layer]
        _refuse_some_of(given, scaled, number)
    for linear in _LINEARS:
        for suffix, stored in _SUFFIXES.items():
            if not any(f"{member}.{suffix}" in layer for member in linear.members):
                continue
            if suffix in _SCALES:
                scales = torch.stack([layer[f"{member}.{suffix}"] for member in linear.members])
                assert suffix == "input_scale" or scales.is_meta or (scales == scales[0]).all()
                encoded[f"{linear.stored}.{stored}"] = scales.amax().reshape(1)
            else:
                shares = [
                    _share(f"{member}.{suffix}", layer[f"{member}.{suffix}"], linear, rank, config)
                    for member in linear.members
                ]
                encoded[f"{linear.stored}.{stored}"] = (
                    torch.cat(shares) if len(shares) > 1 else shares[0]
                )
    if _K_SCALE in layer or _V_SCALE in layer:
        keys, values = layer[_K_SCALE].reshape(1), layer[_V_SCALE].reshape(1)
        larger = torch.maximum(keys, values)
        encoded |= {_K_CACHE: keys, _V_CACHE: values, _KV_CACHE: larger}
    return encoded


def _share(name: str, tensor: Tensor, linear: _Linear, rank: int, config: _Config) -> Tensor:
    """A rank's rows or columns of a weight or bias."""
    if linear.axis == 1:
        if tensor.ndim == 1:  # Added after the ranks' products, once.
            return tensor
        columns = tensor.shape[1] // config.tp
        return tensor[:, rank * columns : (rank + 1) * columns].contiguous()
    parts, rows = config.shares(name.rpartition(".")[0])
    if tensor.shape[0] != parts * rows:
        raise OctavoError(
            f"tensor {name!r} has {tensor.shape[0]} rows, {parts * rows} were expected by the heads and "
            "sizes in the model's config.json. Restore the file that belongs to the tensors."
        )
    part = rank * parts // config.tp
    return tensor[part * rows : (part + 1) * rows]


def configs(target: Target, modules: Modules) -> dict[str, Json]:
    """``config.json`` as ModelOpt writes it with what it leaves out, and the model's own.

    Raises:
        OctavoError: TensorRT-LLM has no such model, or no way to leave out just these modules.
    """
    written = _config_json(target)
    config = _validated(written, "The model's config.json")
    # A config.json of `transformers` may leave these two to be derived.
    written |= {"num_key_value_heads": config.kv_heads, "head_size": config.head_dim}
    written["quantization"]["exclude_modules"] += _exclusions(modules.unquantized, config)
    return {"config.json": written, MODEL_CONFIG: target.config}


def _config_json(target: Target) -> Json:
    config = target.config
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise OctavoError(
            f"The model's config.json has the model_type {kind!r}, for which Octavo knows no "
            f"TensorRT-LLM checkpoint. It writes and reads {', '.join(_FAMILIES)}. "
            "Convert to another format."
        )
    architecture, decoder = _FAMILIES[kind]
    # Mistral has no biases and qwen2 always the same, whatever their configs say.
    bias = kind == "llama" and config.get("attention_bias") is True
    if kind == "qwen3" and config.get("attention_bias") is True:
        raise OctavoError(
            f"The model's config.json has attention_bias true, and TensorRT-LLM's {architecture} has no "
            "bias on o_proj. Convert to another format."
        )
    dtype = config.get("dtype", config.get("torch_dtype"))
    base, scaling = _rotary(config)
    return {
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "architecture": architecture,
        "dtype": dtype,
        "logits_dtype": "float16" if dtype == "bfloat16" else dtype,
        "num_hidden_layers": config.get("num_hidden_layers"),
        "num_attention_heads": config.get("num_attention_heads"),
        "num_key_value_heads": config.get("num_key_value_heads"),
        "hidden_size": config.get("hidden_size"),
        "norm_epsilon": config.get("rms_norm_eps"),
        "vocab_size": config.get("vocab_size"),
        "max_position_embeddings": config.get("max_position_embeddings"),
        "hidden_act": config.get("hidden_act"),
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "head_size": config.get("head_dim"),
        "intermediate_size": config.get("intermediate_size"),
        "position_embedding_type": "rope_gpt_neox",
        "share_embedding_table": False,
        "residual_mlp": False,
        "bias": bias,
        "rotary_pct": 1.0,
        # ModelOpt writes the config along with its last rank. Engines overwrite it.
        "rank": target.tp * target.pp - 1,
        "decoder": decoder,
        "rmsnorm": True,
        "lm_head_bias": False,
        # What TensorRT-LLM's own config class adds where ModelOpt finds it installed. Without the base
        # (which ModelOpt 0.47 does not find in a config of transformers 5) an engine rotates with
        # 10000, without the biases it drops them, without qwen_type there is none.
        "rotary_base": base,
        "rotary_scaling": scaling,
        "attn_bias": bias or kind == "qwen2",
        "mlp_bias": kind == "llama" and config.get("mlp_bias") is True,
        **({"qwen_type": kind} if decoder == "qwen" else {}),
        "mapping": {
            "world_size": target.tp * target.pp,
            "tp_size": target.tp,
            "pp_size": target.pp,
        },
        "quantization": {
            "quant_algo": "FP8",
            "kv_cache_quant_algo": "FP8" if target.scheme.kv_cache == "fp8" else None,
            "exclude_modules": ["lm_head"],
        },
    }


def _rotary(config: Json) -> tuple[Any, Json | None]:
    """Base and scaling of the rotary embedding, from ``rope_parameters`` or the fields before it."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    rope = rope if isinstance(rope, dict) else {}
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return base, None
    return base, {key: value for key, value in rope.items() if key != "rope_theta"}


def _exclusions(unquantized: Sequence[str], config: _Config) -> list[str]:
    """Modules left unquantized, under the names they have on every rank."""
    layers: dict[int, set[str]] = {}
    for name in unquantized:
        if match := _LAYER.fullmatch(name):
            layers.setdefault(int(match[1]), set()).add(match[2])
    stages: list[list[str]] = [[] for _ in range(config.pp)]
    for number in sorted(layers):
        stage, local = divmod(number, config.layers_of_a_stage)
        for group in _TOGETHER:
            _refuse_some_of(group, layers[number].intersection(group), number)
        stages[stage] += [
            f"transformer.layers.{local}.{linear.stored}"
            for linear in _LINEARS
            if linear.members[0] in layers[number]
        ]
    if any(stage != stages[0] for stage in stages):
        raise OctavoError(
            f"The modules left unquantized ({', '.join(unquantized)}) are not the same on each of the "
            f"{config.pp} pipeline stages, and TensorRT-LLM's exclude_modules counts layers from 0 on every "
            f"stage, {config.layers_of_a_stage} on each. Write the checkpoint with --pp 1, or exclude the same "
            "layers of every stage."
        )
    return stages[0]


def _refuse_some_of(group: Collection[str], some: Collection[str], number: int) -> None:
    if some and len(some) < len(group):
        raise OctavoError(
            f"In model.layers.{number} only some of {', '.join(group)} are in FP8, and TensorRT-LLM "
            "computes them as one. Quantize with all of them excluded or none, or choose another format."
        )


def recognizes(files: Files) -> bool:
    """By the fields of TensorRT-LLM's config, which Hugging Face's has not."""
    config = files["config.json"]
    return isinstance(config.get("architecture"), str) and isinstance(
        config.get("quantization"), dict
    )


def decode(files: Files, tensors: Mapping[str, Described]) -> Decoded:
    """What the config says and the ranks hold.

    The model's config is in ``model_config.json``; other tools' checkpoints have none, and it is put
    together from TensorRT-LLM's.

    Raises:
        OctavoError: the config contradicts itself, the tensors or the model's config, asks for other
            arithmetic, or lacks what Octavo needs to know.
    """
    config = _validated(files["config.json"], "The checkpoint's config.json")
    algorithms = config.quantization
    if algorithms.quant_algo != "FP8":
        raise unsupported("tensorrt-llm", f"quant_algo {algorithms.quant_algo!r}")
    if algorithms.kv_cache_quant_algo not in (None, "FP8"):
        raise unsupported("tensorrt-llm", f"kv_cache_quant_algo {algorithms.kv_cache_quant_algo!r}")
    stored: dict[str, Stored] = {}
    exclude: list[str] = []
    for stage in _stages(tensors, config):
        for name in stage.tensors:
            found = _decode_tensor(stage, name)
            stored |= found
            if name.endswith(".weight") and _excluded(name, config):
                exclude += [weight.removesuffix(".weight") for weight in found]
    scheme = Scheme(
        kv_cache="fp8" if algorithms.kv_cache_quant_algo else "none", exclude=tuple(exclude)
    )
    model_config = _model_config(files, config, scheme, stored)
    if model_config.get("tie_word_embeddings") is True:
        stored.pop(_HEAD, None)
    return Decoded(model_config, scheme, stored)


class _Stage(NamedTuple):
    """A pipeline stage, whose tensor parallel ranks hold tensors of the same names and shapes."""

    config: _Config
    number: int
    tensors: Mapping[str, Described]

    @property
    def first_rank(self) -> int:
        return self.number * self.config.tp

    def pieces(
        self, name: str, ranks: Iterable[int], rows: tuple[int, int] | None = None
    ) -> tuple[Piece, ...]:
        """The tensor ``name`` of some of the stage's ranks, counted from 0."""
        return tuple(Piece(f"rank{self.first_rank + rank}/{name}", rows) for rank in ranks)

    def refuse(self, name: str, what: str) -> OctavoError:
        return OctavoError(
            f"tensor {name!r} in rank{self.first_rank}.safetensors {what}. The checkpoint is damaged, or "
            "its config.json is another's: export it again."
        )


def _stages(tensors: Mapping[str, Described], config: _Config) -> list[_Stage]:
    """The pipeline stages, compared rank by rank."""
    ranks: dict[int, dict[str, Described]] = {}
    for name, tensor in tensors.items():
        match = _RANKED.fullmatch(name)
        if match is None:
            raise OctavoError(
                f"tensor {name!r} lies in no file rank<N>.safetensors, which is where a TensorRT-LLM "
                "checkpoint has its tensors. Remove other safetensors files from the directory."
            )
        ranks.setdefault(int(match[1]), {})[match[2]] = tensor
    size = config.tp * config.pp
    if len(ranks) != size or max(ranks) != size - 1:
        raise OctavoError(
            f"The checkpoint's config.json divides the model among {config.tp} x {config.pp} ranks "
            f"(tp_size x pp_size), and the directory has tensors of the ranks {reprlib.repr(sorted(ranks))}. "
            "Copy the missing files rank<N>.safetensors, or restore the config that belongs to these."
        )
    for rank, held in ranks.items():
        first = rank - rank % config.tp
        for name in ranks[first].keys() | held.keys():
            one, other = ranks[first].get(name), held.get(name)
            if one is None or other is None or _described(one) != _described(other):
                raise OctavoError(
                    f"tensor {name!r} is not alike in rank{first}.safetensors and rank{rank}.safetensors: "
                    f"{_described(one)} and {_described(other)}. The checkpoint is damaged: export it again."
                )
    return [_Stage(config, number, ranks[number * config.tp]) for number in range(config.pp)]


def _described(tensor: Described | None) -> str:
    return "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _decode_tensor(stage: _Stage, name: str) -> dict[str, Stored]:
    """The canonical tensors that the tensor ``name`` of a stage's ranks holds."""
    config = stage.config
    match = _STORED_LAYER.fullmatch(name)
    if match is None:
        return _decode_outside(stage, name)
    prefix = f"model.layers.{stage.number * config.layers_of_a_stage + int(match[1])}"
    module, _, suffix = match[2].rpartition(".")
    suffixes = {stored: canonical for canonical, stored in _SUFFIXES.items()}
    norms = {stored: canonical for canonical, stored in _NORMS.items()}
    once = Stored(stage.pieces(name, (0,)))
    if int(match[1]) >= config.layers_of_a_stage:
        raise stage.refuse(name, f"is beyond the {config.layers_of_a_stage} layers of a stage")
    if module in _BY_STORED and suffix in suffixes:
        found = _decode_linear(stage, name, _BY_STORED[module], suffixes[suffix])
        return {f"{prefix}.{member}.{suffixes[suffix]}": where for member, where in found.items()}
    if match[2] in norms:
        return {f"{prefix}.{norms[match[2]]}": once}
    if match[2] in _KV_SCALES:
        _check_scale(stage, name)
        if match[2] == _KV_CACHE and name.replace(_KV_CACHE, _K_CACHE) in stage.tensors:
            return {}
        return {f"{prefix}.{scale}": once for scale in _KV_SCALES[match[2]]}
    raise stage.refuse(name, f"is none of {config.architecture}")


def _decode_linear(stage: _Stage, name: str, linear: _Linear, suffix: str) -> dict[str, Stored]:
    """Where each member's weight, bias or scale lies."""
    config, shape = stage.config, stage.tensors[name].shape
    if suffix in _SCALES:
        _check_scale(stage, name)
    elif len(shape) != (2 if suffix == "weight" else 1):
        raise stage.refuse(name, f"has the shape {list(shape)}, which is not that of a {suffix}")
    if suffix in _SCALES or (suffix == "bias" and linear.axis == 1):
        return {member: Stored(stage.pieces(name, (0,))) for member in linear.members}
    if linear.axis == 1:
        joined = Stored(stage.pieces(name, range(config.tp)), axis=1)
        return dict.fromkeys(linear.members, joined)
    found: dict[str, Stored] = {}
    begin = 0
    for member in linear.members:
        parts, rows = config.shares(member)
        holders = (part * config.tp // parts for part in range(parts))
        found[member] = Stored(stage.pieces(name, holders, (begin, begin + rows)))
        begin += rows
    if begin != shape[0]:
        raise stage.refuse(name, f"has {shape[0]} rows and should have {begin}")
    return found


def _check_scale(stage: _Stage, name: str) -> None:
    shape = tuple(stage.tensors[name].shape)
    if shape not in ((), (1,)):
        raise stage.refuse(name, f"has the shape {list(shape)} and should be one number")


def _decode_outside(stage: _Stage, name: str) -> dict[str, Stored]:
    config = stage.config
    if name == _LN_F and stage.number == config.pp - 1:
        return {_NORM: Stored(stage.pieces(name, (0,)))}
    if name == _VOCAB_EMBEDDING and stage.number == 0:
        ranks = config.tp if config.use_parallel_embedding else 1
        return {_EMBEDDING: _decode_vocabulary(stage, name, ranks)}
    if name == _HEAD and stage.number == config.pp - 1:
        return {_HEAD: _decode_vocabulary(stage, name, config.tp)}
    raise stage.refuse(name, f"is none of {config.architecture} on pipeline stage {stage.number}")


def _decode_vocabulary(stage: _Stage, name: str, ranks: int) -> Stored:
    """The rows of the vocabulary on ``ranks`` ranks, without what pads the last."""
    shape, size = stage.tensors[name].shape, stage.config.vocab_size
    rows = -(-size // ranks)
    if len(shape) != 2 or shape[0] != rows:
        raise stage.refuse(name, f"has the shape {list(shape)} and should have {rows} rows")
    pieces: list[Piece] = []
    for rank in range(ranks):
        # With few tokens the last ranks are all padding.
        if count := max(0, min(rows, size - rank * rows)):
            pieces += stage.pieces(name, (rank,), (0, count))
    return Stored(tuple(pieces))


def _excluded(weight: str, config: _Config) -> bool:
    module = weight.removesuffix(".weight")
    patterns = config.quantization.exclude_modules or []
    return any(fnmatchcase(module, pattern) for pattern in patterns)


def _model_config(files: Files, config: _Config, scheme: Scheme, stored: Collection[str]) -> Json:
    """The model's ``config.json`` in Hugging Face's terms."""
    given = files.get(MODEL_CONFIG)
    if given is None:
        return _rebuilt(config, stored)
    origin = f"The model's config ({MODEL_CONFIG}, or what --config names)"
    model = _validated(_config_json(Target(given, scheme, config.tp, config.pp)), origin)
    for field in (
        "architecture",
        "num_hidden_layers",
        "num_attention_heads",
        "kv_heads",
        "head_dim",
        "hidden_size",
        "intermediate_size",
        "vocab_size",
    ):
        if getattr(model, field) != getattr(config, field):
            raise OctavoError(
                f"{origin} is not of the model in the checkpoint: {field} is {getattr(model, field)!r}, "
                f"in the checkpoint's config.json it is {getattr(config, field)!r}. Pass the config.json of "
                "the checkpoint's own model."
            )
    return without_quantization(given)


def _rebuilt(config: _Config, stored: Collection[str]) -> Json:
    """A model's config from what TensorRT-LLM's says."""
    if config.rotary_base is None:
        raise OctavoError(
            "The checkpoint's config.json has no rotary_base (ModelOpt leaves it out where it runs without "
            "TensorRT-LLM), so that the model's rotary embedding is not known. Pass the original model's "
            "config.json: octavo convert --config FILE."
        )
    kinds = {architecture: kind for kind, (architecture, _) in _FAMILIES.items()}
    return {
        "architectures": [config.architecture],
        "model_type": kinds[config.architecture],
        "dtype": config.dtype,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.norm_epsilon,
        # The fields every version of `transformers` reads.
        "rope_theta": config.rotary_base,
        "rope_scaling": config.rotary_scaling,
        "attention_bias": "model.layers.0.self_attn.o_proj.bias" in stored,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in stored,
        "sliding_window": None,  # TensorRT-LLM takes one at run time only.
        "tie_word_embeddings": _HEAD not in stored,
    }


def _validated(config: Json, origin: str) -> _Config:
    """A TensorRT-LLM config whose fields agree with each other."""
    try:
        found = _Config.model_validate(config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        missing = first["type"] == "missing"
        what = "is missing" if missing else f"is {reprlib.repr(first['input'])} ({first['msg']})"
        raise OctavoError(
            f"{origin} describes no TensorRT-LLM checkpoint that Octavo reads or writes: {field} {what}. "
            "Restore the file, or choose another format."
        ) from error
    if not found.divides(found.tp):
        able = [
            str(tp) for tp in range(1, min(found.num_attention_heads, 64) + 1) if found.divides(tp)
        ]
        raise OctavoError(
            f"{found.tp} tensor parallel ranks do not divide a model of {found.num_attention_heads} "
            f"attention heads, {found.kv_heads} key/value heads and an intermediate size of "
            f"{found.intermediate_size}. These do: {', '.join(able)}."
        )
    if found.num_hidden_layers % found.pp:
        # TensorRT-LLM before 0.20 drops the layers left over, ModelOpt refuses them.
        raise OctavoError(
            f"{found.pp} pipeline stages do not divide {found.num_hidden_layers} decoder layers. "
            "Choose a number of stages that does."
        )
    return found


DIALECT = Dialect(
    ("fp8",),
    encode,
    configs,
    recognizes,
    decode,
    merges=True,
    fuses=(("q_proj", "k_proj", "v_proj"),),
    ranks=True,
)
