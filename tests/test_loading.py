"""``octavo.load``: FP8 layers against float64, whole models against float32 fake quantization."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tiny
from octavo import Calibration, OctavoError, Scheme, kernels, linear, load, quantize
from octavo.formats import FORMATS
from octavo.linear import Fp8Linear
from octavo.scheme import Inputs, scheme_called
from reference import fake_quantized
from spoiling import edit_json, edit_tensors, hide_quantization

E4M3 = torch.float8_e4m3fn
STATIC = Scheme()
DYNAMIC = Scheme(weights="channel", inputs="dynamic", kv_cache="none")
BLOCK = Scheme(weights="block", inputs="dynamic", kv_cache="none")


def all_codes() -> Tensor:
    return torch.arange(256).to(torch.uint8).view(E4M3)


class TestKernels:
    def test_every_code_decodes_as_torch_decodes_it(self) -> None:
        codes, out = all_codes(), torch.empty(256, dtype=torch.bfloat16)
        kernels.from_e4m3(codes, out)
        assert torch.equal(out.view(torch.int16)[:127], codes.bfloat16().view(torch.int16)[:127])
        torch.testing.assert_close(out, codes.bfloat16(), rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("scale", [1.0, 0.013, 37.5, 2.0**-20])
    def test_every_bf16_number_rounds_as_torch_rounds_it(self, scale: float) -> None:
        x = torch.arange(65536).to(torch.uint16).view(torch.bfloat16)
        x = x[x.isfinite()]
        expected = (x.float() / scale).clamp(-448, 448).to(E4M3)
        values, stored = torch.empty_like(x), torch.empty_like(x)
        kernels.round_to_e4m3(x, scale, values)
        kernels.through_e4m3(x, scale, stored)
        assert torch.equal(values, expected.bfloat16())
        assert torch.equal(stored, (expected.float() * scale).bfloat16())

    @pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
    def test_scores_are_those_of_log_softmax(self, spread: float) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = (torch.randn(20, 999, generator=generator) * spread).bfloat16()
        targets = torch.randint(999, (20,), generator=generator)
        targets[:5] = logits[:5].argmax(-1)
        logits[6, 3] = torch.inf
        logits[7, 3] = -torch.inf
        logprobs, greedy = kernels.score(logits, targets)
        expected = torch.log_softmax(logits.double(), -1).gather(1, targets[:, None])[:, 0]
        keep = torch.arange(20) != 6
        torch.testing.assert_close(logprobs[keep].double(), expected[keep], rtol=1e-6, atol=1e-5)
        assert not logprobs[6].isfinite()
        chosen = logits.gather(1, targets[:, None])[:, 0]
        assert torch.equal(greedy, chosen >= logits.amax(-1))

    def test_a_nan_among_logits_shows(self) -> None:
        logits = torch.zeros(2, 50, dtype=torch.bfloat16)
        logits[1, 7] = torch.nan
        logprobs, _ = kernels.score(logits, torch.tensor([0, 0]))
        assert logprobs.isnan().tolist() == [False, True]


SHAPES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "tensor": lambda rows, columns: (),
    "channel": lambda rows, columns: (rows, 1),
    "block": lambda rows, columns: (-(-rows // 128), -(-columns // 128)),
}


def layer(
    dtype: torch.dtype, *, inputs: Inputs, weights: str, bias: bool, size: tuple[int, int]
) -> Fp8Linear:
    generator = torch.Generator().manual_seed(1)
    shape = SHAPES[weights](*size)
    with torch.device("meta"):
        module = Fp8Linear(nn.Linear(size[1], size[0], bias=bias), inputs, shape)
    module.weight = (torch.randn(size, generator=generator) * 60).clamp(-448, 448).to(E4M3)
    module.weight_scale = torch.rand(shape, generator=generator) * 1e-3 + 1e-4
    module.input_scale = torch.tensor(0.0123) if inputs == "static" else None
    if bias:
        module.bias = nn.Parameter(torch.randn(size[0], generator=generator).to(dtype), False)
    return module


def exact(module: Fp8Linear, x: Tensor) -> Tensor:
    """The layer in float64, from its definition."""
    scale = module.input_scale
    if scale is None:
        scale = x.float().abs().amax(-1, keepdim=True) / 448
    codes = (x.float() / scale).clamp(-448, 448).to(E4M3)
    result = (codes.double() * scale.double()) @ (
        module.weight.double() * module.weight_scale.double()
    ).T
    return result if module.bias is None else result + module.bias.double()


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def far(found: Tensor, expected: Tensor, bias: Tensor | None, roundings: int) -> Tensor:
    """Where a result is further from the exact one than its roundings explain."""
    bound = roundings * torch.finfo(found.dtype).eps / 2 * 1.01
    away = (found.double() - expected).abs()
    # The product alone, which the first of two roundings rounds, may be larger than the sum.
    product = expected if bias is None else expected - bias.double()
    size = torch.maximum(expected.abs(), product.abs()) + away
    return away > bound * size + 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inputs", ["static", "dynamic"])
@pytest.mark.parametrize("weights", ["channel", "tensor"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("tile", [1 << 24, 1000], ids=["one tile", "many tiles"])
def test_a_layer_computes_its_definition(
    dtype: torch.dtype,
    inputs: Inputs,
    weights: str,
    bias: bool,
    tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "_TILE", tile)
    module = layer(dtype, inputs=inputs, weights=weights, bias=bias, size=(48, 80))
    x = torch.randn(2, 9, 80, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected, found = exact(module, x), module(x)
    assert found.dtype == dtype
    assert found.shape == (2, 9, 48)
    # One rounding to the result's dtype; with a scale for each row or column, BF16 takes a second.
    twice = dtype == torch.bfloat16 and (weights == "channel" or inputs == "dynamic")
    assert not far(found, expected, module.bias, 2 if twice else 1).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("tile", [1 << 24, 1000], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("size", [(256, 384), (300, 200), (40, 60)], ids=str)
def test_a_layer_of_blocks_computes_its_definition(
    dtype: torch.dtype,
    bias: bool,
    tile: int,
    size: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "_TILE", tile)
    module = layer(dtype, inputs="dynamic", weights="block", bias=bias, size=size)
    x = torch.randn(2, 9, size[1], generator=torch.Generator().manual_seed(2)).to(dtype)
    rows, columns = size
    groups = torch.split(x.double(), 128, dim=-1)
    rounded = torch.cat(
        [
            _rounded(part, (part.abs().amax(-1, keepdim=True).float() / 448).double())
            for part in groups
        ],
        dim=-1,
    )
    scale = module.weight_scale.double()
    weight = module.weight.double()
    for i in range(rows):
        for j in range(0, columns, 128):
            weight[i, j : j + 128] *= scale[i // 128, j // 128]
    expected = rounded @ weight.T + (0 if module.bias is None else module.bias.double())
    assert not far(module(x), expected, module.bias, 1).any()


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    codes = (x.float() / scale.float()).clamp(-448, 448).to(E4M3)
    return codes.double() * scale


def test_one_scale_is_applied_before_the_only_rounding() -> None:
    module = layer(torch.bfloat16, inputs="static", weights="tensor", bias=False, size=(256, 512))
    x = torch.randn(300, 512, generator=torch.Generator().manual_seed(3)).bfloat16()
    same = module(x) == exact(module, x).bfloat16()
    # All but where float32 accumulation lands on the other side of a tie.
    assert same.float().mean() > 0.999


def edition(kind: str, directory: Path, **options: Any) -> tuple[Path, Path]:
    """A tiny checkpoint of architecture ``kind`` and its edition."""
    dtype = options.pop("dtype", torch.float32)
    model = tiny.build(kind, directory / "model", dtype=dtype)
    ids = tiny.save_ids(directory / "ids.npy", samples=16, seq_len=32)
    out = directory / "edition"
    quantize(model, out, **{"calibration": Calibration(source=str(ids)), **options})
    return model, out


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("scheme", [STATIC, DYNAMIC, BLOCK], ids=lambda scheme: scheme.kind)
def test_a_loaded_edition_is_the_fake_quantized_model(
    kind: str, scheme: Scheme, tmp_path: Path
) -> None:
    format = "compressed-tensors" if scheme == BLOCK else "modelopt"
    source, out = edition(kind, tmp_path, scheme=scheme, format=format)
    reference = fake_quantized(source, load_file(out / "model.safetensors"))
    model, tokenizer = load(out)
    assert tokenizer is None
    # So many that one value on the other side of a tie between two codes weighs little: it moves the tokens behind it too.
    ids = torch.randint(tiny.VOCAB_SIZE, (32, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = reference(ids).logits, model(ids).logits
        plain = load(source)[0](ids).logits
    error, cost = ((one - expected).norm() / expected.norm() for one in (found, plain))
    assert error < 0.1 * cost, f"{error=} {cost=}"
    distances = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert distances.median() < 1e-5


@pytest.mark.parametrize(
    ("format", "kind"),
    [(format, kind) for format, dialect in FORMATS.items() for kind in dialect.carries],
)
def test_dialects_hold_the_same_model(format: str, kind: str, tmp_path: Path) -> None:
    scheme = scheme_called(kind, kv_cache="fp8", merge_scales=FORMATS[format].merges)
    _, ours = edition(
        "llama", tmp_path / "a", dtype=torch.bfloat16, scheme=scheme, format="compressed-tensors"
    )
    _, other = edition("llama", tmp_path / "b", dtype=torch.bfloat16, scheme=scheme, format=format)
    ids = torch.arange(20).reshape(1, -1)
    with torch.inference_mode():
        assert torch.equal(load(ours)[0](ids).logits, load(other)[0](ids).logits)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_unquantized_checkpoint_loads_as_transformers_loads_it(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    source = tiny.build(kind, tmp_path / "model", tie_word_embeddings=tied, shards=3)
    auto: Any = AutoModelForCausalLM
    ids = torch.arange(20).reshape(1, -1)
    with torch.inference_mode():
        expected = auto.from_pretrained(source, dtype="auto")(ids).logits
        assert torch.equal(load(source)[0](ids).logits, expected)


def test_weights_are_held_in_fp8(tmp_path: Path) -> None:
    _, out = edition("llama", tmp_path, dtype=torch.bfloat16)
    model, _ = load(out)
    held = {name: tensor for name, tensor in model.state_dict().items() if "proj" in name}
    weights = [tensor for name, tensor in held.items() if name.endswith(".weight")]
    assert len(weights) == 14
    assert all(weight.dtype == E4M3 for weight in weights)
    assert model.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A loaded edition in float32."""
    return load(edition("llama", tmp_path_factory.mktemp("generate"))[1])[0]


class TestGenerate:
    def test_the_cache_changes_nothing(self, model: Any) -> None:
        prompt = torch.arange(3, 15).reshape(1, -1)
        with torch.inference_mode():
            cached = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
            tokens = prompt
            for _ in range(12):
                after = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
                tokens = torch.cat([tokens, after], dim=1)
        assert torch.equal(cached, tokens)

    def test_the_cache_holds_rounded_keys_and_values(self, model: Any) -> None:
        with torch.inference_mode():
            cache = model(torch.arange(10).reshape(1, -1), use_cache=True).past_key_values
        for held, block in zip(cache.layers, model.model.layers, strict=True):
            for tensor, scale in (
                (held.keys, block.self_attn.kv_cache.k_scale),
                (held.values, block.self_attn.kv_cache.v_scale),
            ):
                assert torch.equal(((tensor / scale).to(E4M3).float() * scale), tensor)

    def test_a_left_padded_batch_gives_what_each_prompt_gives(self, model: Any) -> None:
        prompts = [torch.arange(5, 9), torch.arange(30, 47)]
        width = max(len(prompt) for prompt in prompts)
        ids = torch.stack([nn.functional.pad(p, (width - len(p), 0)) for p in prompts])
        mask = torch.stack(
            [nn.functional.pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts]
        )
        options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            together = model.generate(ids, attention_mask=mask, **options)[:, width:]
            for row, prompt in zip(together, prompts, strict=True):
                alone = model.generate(prompt.reshape(1, -1), **options)[0, len(prompt) :]
                assert torch.equal(row, alone)


def test_memory_while_loading_is_the_checkpoint_and_little_more(tmp_path: Path) -> None:
    """Peak above the imports, in a process of its own."""
    model = tiny.build(
        "llama",
        tmp_path / "model",
        layers=8,
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        head_dim=64,
    )
    out = tmp_path / "edition"
    quantize(model, out, scheme=DYNAMIC)
    script = """
import sys
from octavo import load
def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
from octavo.loading import load
before = peak()
model = load(sys.argv[1])
print(peak() - before)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script, out], capture_output=True, text=True, check=True
    )
    size = (out / "model.safetensors").stat().st_size
    layer_bytes = size / 8
    assert int(ran.stdout) < size + 2 * layer_bytes + 30e6, f"{ran.stdout=} {size=}"


Q_PROJ = "model.layers.1.self_attn.q_proj"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unknown dialect": (
        lambda out: edit_json(
            out / "config.json",
            lambda c: c["quantization_config"].update(quant_method="gguf"),
        ),
        r"unknown dialect.*gguf.*modelopt",
    ),
    "two dialects": (
        lambda out: edit_json(
            out / "config.json",
            lambda c: c["quantization_config"].update(
                quant_method="fp8", activation_scheme="static"
            ),
        ),
        r"several dialects: modelopt, vllm-fp8",
    ),
    "a section that is no object": (
        lambda out: edit_json(out / "config.json", lambda c: c.update(quantization_config=[1])),
        r"quantization_config that is a list",
    ),
    "another algorithm": (
        lambda out: edit_json(
            out / "config.json", lambda c: c["quantization_config"].update(quant_algo="NVFP4")
        ),
        r"quant_algo 'NVFP4'",
    ),
    "missing weight scale": (
        lambda out: edit_tensors(out, lambda t: t.pop(f"{Q_PROJ}.weight_scale")),
        rf"no tensor '{Q_PROJ}.weight_scale'",
    ),
    "missing input scale": (
        lambda out: edit_tensors(out, lambda t: t.pop(f"{Q_PROJ}.input_scale")),
        rf"no tensor '{Q_PROJ}.input_scale'",
    ),
    "missing cache scale": (
        lambda out: edit_tensors(out, lambda t: t.pop("model.layers.0.self_attn.k_proj.k_scale")),
        r"no tensor 'model.layers.0.self_attn.k_scale'",
    ),
    **{
        f"a scale of {value}": (
            lambda out, value=value: edit_tensors(  # type: ignore[misc]
                out, lambda t: t.update({f"{Q_PROJ}.weight_scale": torch.tensor(value)})
            ),
            rf"{Q_PROJ}.weight_scale.*{value}.*positive",
        )
        for value in (0.0, -1.0, float("nan"), float("inf"))
    },
    "a scale of another shape": (
        lambda out: edit_tensors(out, lambda t: t.update({f"{Q_PROJ}.input_scale": torch.ones(3)})),
        rf"{Q_PROJ}.input_scale.*shape \[3\]",
    ),
    "a weight of another shape": (
        lambda out: edit_tensors(
            out, lambda t: t.update({f"{Q_PROJ}.weight": t[f"{Q_PROJ}.weight"][:8].clone()})
        ),
        rf"{Q_PROJ}.weight.*shape \[8, 64\].*\[64, 64\]",
    ),
    "a missing tensor": (
        lambda out: edit_tensors(out, lambda t: t.pop("model.norm.weight")),
        r"no tensor 'model.norm.weight'",
    ),
    "FP8 weights that no config mentions": (
        hide_quantization,
        r"float8_e4m3fn",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An edition to be copied and spoiled."""
    return edition("llama", tmp_path_factory.mktemp("bad"), dtype=torch.bfloat16)[1]


class TestBadEditions:
    @pytest.mark.parametrize("case", BAD)
    def test_is_refused_with_a_reason(self, case: str, good: Path, tmp_path: Path) -> None:
        out = Path(shutil.copytree(good, tmp_path / "edition"))
        spoil, reason = BAD[case]
        spoil(out)
        with pytest.raises(OctavoError, match=reason):
            load(out)

    def test_the_older_config_file_is_enough(self, good: Path, tmp_path: Path) -> None:
        out = Path(shutil.copytree(good, tmp_path / "edition"))
        edit_json(out / "config.json", lambda c: c.pop("quantization_config"))
        ids = torch.arange(9).reshape(1, -1)
        with torch.inference_mode():
            assert torch.equal(load(out)[0](ids).logits, load(good)[0](ids).logits)
