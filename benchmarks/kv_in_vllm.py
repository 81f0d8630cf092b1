"""What an FP8 KV cache costs in vLLM on a CPU, where that comes from, and what other scales would do.

An edition is run in vLLM and in Octavo's own engine, on the same windows, with its KV cache in BF16 and in
FP8; and in FP8 with one thing changed at a time: how keys and values are rounded when they are stored, their
scales, the kernel. The changes are made in the running engine, so that nothing else differs.

Usage, in the environment of `make test-vllm`, on a CPU with AMX:
.venv/vllm/bin/python -m benchmarks.kv_in_vllm WIKI.test.raw [--edition EDITION ...]
"""

from __future__ import annotations

import argparse
import base64
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import CACHE, ROOT, sample_model, save
from octavo.engines import vllm as vllm_engine
from octavo.engines.vllm_loaded import WorkerExtension

# What imports Numba is imported where it is used: vLLM's worker imports this module too, and registers its
# kernels after that, which fails if Numba is there first.
if TYPE_CHECKING:
    from octavo.engines.engine import TokenIds
    from octavo.evaluation.journal import Journal

# vLLM reads a token more than is scored.
SEQ_LEN = 2047

OPTIONS = {
    "enforce_eager": True,
    "max_model_len": SEQ_LEN + 2,
    "max_num_batched_tokens": SEQ_LEN + 2,
    "distributed_executor_backend": "mp",
}
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    # The scheduler in this process, the model in one of its own.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Its kernel for CPUs with AMX leaves the inputs of linear layers in BF16.
    "VLLM_DISABLED_KERNELS": "CPUFp8PerTensorScaledMMLinearKernel",
}

_E4M3_MAX = 448.0
# What least squares would multiply a number by that was cut off to three bits of mantissa, for numbers spread
# evenly over the logarithms.
UNCUT = 1.044


class Cache(NamedTuple):
    """How keys and values are kept.

    Attributes:
        fp8: which of them are kept in FP8: "kv", "k", "v" or none. vLLM knows both and none only.
        nearest: which of those are rounded to the nearest number, the others towards zero, as vLLM does.
        k: what the scale of keys is multiplied by.
        v: likewise of values.
        unscaled: with scales of 1 instead, as vLLM has them where a checkpoint brings none.
        read: what they are multiplied by when they are read.
        isa: vLLM's kernel, if not the one it chooses.
    """

    fp8: str = "kv"
    nearest: str = ""
    k: float = 1.0
    v: float = 1.0
    unscaled: bool = False
    read: float = 1.0
    isa: str = ""


AS_IT_IS = Cache()
BF16 = Cache(fp8="")
# What shows the cause, for every edition.
CAUSE_IN_VLLM = {"FP8": AS_IT_IS, "FP8, both to nearest": Cache(nearest="kv")}
CAUSE_IN_OCTAVO = {"FP8": Cache(nearest="kv"), "FP8, towards zero": AS_IT_IS}
IN_VLLM = {
    **CAUSE_IN_VLLM,
    "FP8, K to nearest": Cache(nearest="k"),
    "FP8, V to nearest": Cache(nearest="v"),
    f"FP8, read × {UNCUT}": Cache(read=UNCUT),
    **{f"FP8, scales × {one:g}": Cache(k=one, v=one) for one in (1 / 2, 2, 4)},
    "FP8, scales of 1": Cache(unscaled=True),
    "FP8, the kernel without AMX": Cache(isa="vec"),
    "FP8, scales of 1, the kernel without AMX": Cache(unscaled=True, isa="vec"),
}
IN_OCTAVO = {
    **CAUSE_IN_OCTAVO,
    "FP8, K only": Cache(fp8="k", nearest="kv"),
    "FP8, V only": Cache(fp8="v", nearest="kv"),
    "FP8, K only, towards zero": Cache(fp8="k"),
    "FP8, V only, towards zero": Cache(fp8="v"),
    **{
        f"FP8, scales × {one:g}": Cache(nearest="kv", k=one, v=one)
        for one in (1 / 4, 1 / 2, 3 / 4, 3 / 2, 2, 4)
    },
    **{f"FP8, K's scales × {one:g}": Cache(nearest="kv", k=one) for one in (1 / 2, 2)},
    **{f"FP8, V's scales × {one:g}": Cache(nearest="kv", v=one) for one in (1 / 2, 2)},
    "FP8, scales of 1": Cache(nearest="kv", unscaled=True),
}


class Scores(NamedTuple):
    """What windows cost: a token's mean negative log-likelihood in each, and KL(BF16 ‖ FP8)."""

    nll: list[float]
    kl: list[float]


def to_e4m3(values: Tensor, nearest: bool) -> Tensor:
    """E4M3 codes, uint8, of float32 ``values``: the nearest, or the next towards zero."""
    values = values.clamp(-_E4M3_MAX, _E4M3_MAX)
    codes = values.to(torch.float8_e4m3fn)
    beyond = codes.float().abs() > values.abs()
    return codes.view(torch.uint8) - (beyond & (not nearest)).to(torch.uint8)


def from_e4m3(codes: Tensor) -> Tensor:
    """As BF16, which holds every E4M3 number."""
    return codes.view(torch.float8_e4m3fn).bfloat16()


class Worker(WorkerExtension):
    """Changes how vLLM's worker keeps keys and values."""

    def keep(self, cache: dict[str, Any]) -> None:
        """From now on as ``cache`` says, the fields of a :class:`Cache`."""
        wanted = Cache(**cache)
        ops: Any = import_module("vllm._custom_ops")
        originals: dict[str, Any] = vars(ops).setdefault(
            "_originals",
            {
                name: getattr(ops, name)
                for name in (
                    "cpu_attn_reshape_and_cache",
                    "cpu_attention_with_kv_cache",
                    "cpu_attn_get_scheduler_metadata",
                )
            },
        )
        write, read, schedule = originals.values()

        def scale(own: float, factor: float) -> float:
            return 1.0 if wanted.unscaled else own * factor

        def written(
            key: Tensor, value: Tensor, *cache: Any, k_scale: float, v_scale: float, **rest: Any
        ) -> None:
            *places, isa = cache
            k_scale, v_scale = scale(k_scale, wanted.k), scale(v_scale, wanted.v)
            # An E4M3 number is not moved by being cut off.
            if "k" in wanted.nearest:
                key, k_scale = from_e4m3(to_e4m3(key.float() / k_scale, True)), 1.0
            if "v" in wanted.nearest:
                value, v_scale = from_e4m3(to_e4m3(value.float() / v_scale, True)), 1.0
            scales = {"k_scale": k_scale, "v_scale": v_scale}
            write(key, value, *places, wanted.isa or isa, **scales, **rest)

        def attention(*, k_scale: float, v_scale: float, **rest: Any) -> None:
            read(
                k_scale=scale(k_scale, wanted.k) * wanted.read,
                v_scale=scale(v_scale, wanted.v) * wanted.read,
                **rest,
            )

        def scheduled(*, isa: str, **rest: Any) -> Tensor:
            metadata: Tensor = schedule(isa=wanted.isa or isa, **rest)
            return metadata

        changed = (written, attention, scheduled) if wanted.fp8 else originals.values()
        for name, function in zip(originals, changed, strict=True):
            setattr(ops, name, function)


def values_of(journal: Journal, windows: int) -> list[Any]:
    """What a journal keeps of each window."""
    keys = [f"{window * SEQ_LEN}" for window in range(windows)]
    return list(journal.run(keys, lambda missing: iter(())))


def in_vllm(
    edition: Path, tokens: Tensor, windows: int, caches: dict[str, Cache]
) -> Iterator[tuple[str, Scores]]:
    """Run an edition in vLLM, with each of ``caches``; BF16 comes first."""
    from octavo.evaluation.journal import Journal
    from octavo.evaluation.perplexity import perplexity

    for kind, wanted in (("bfloat16", {"BF16": BF16}), ("fp8", caches)):
        with patch.object(
            vllm_engine, "WORKER_EXTENSION", f"benchmarks.kv_in_vllm.{Worker.__name__}"
        ):
            engine = vllm_engine.start(edition, "auto", kv_cache_dtype=kind, **OPTIONS)
        with closing(engine):
            for name, cache in wanted.items():
                engine._llm.collective_rpc("keep", args=(cache._asdict(),))
                engine._llm.reset_prefix_cache()
                journal = Journal()
                perplexity(engine, tokens, seq_len=SEQ_LEN, limit=windows, journal=journal)
                sums = values_of(journal, windows)
                yield name, Scores([one / (SEQ_LEN - 1) for one in sums], [])


@contextmanager
def kept(cache: Cache) -> Iterator[None]:
    """Octavo's engine keeps keys and values as ``cache`` says."""
    from octavo.loading import Fp8KeyValueCache

    def one(tensor: Tensor, name: str, scale: Tensor, factor: float) -> Tensor:
        if name not in cache.fp8:
            return tensor
        scale = torch.ones_like(scale) if cache.unscaled else scale * factor
        by_token = tensor.transpose(1, 2).contiguous()
        codes = to_e4m3(by_token.float() / scale, name in cache.nearest)
        return (from_e4m3(codes).float() * scale).to(tensor.dtype).transpose(1, 2)

    def forward(self: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return one(key, "k", self.k_scale, cache.k), one(value, "v", self.v_scale, cache.v)

    with patch.object(Fp8KeyValueCache, "forward", forward):
        yield


def remembered(compute: Callable[[TokenIds], Tensor]) -> Callable[[TokenIds], Tensor]:
    """``compute``, once for each window."""
    known: dict[bytes, Tensor] = {}

    def hidden(window: TokenIds) -> Tensor:
        key = torch.as_tensor(window).numpy().tobytes()
        if key not in known:
            known[key] = compute(window)
        return known[key]

    return hidden


def in_octavo(
    edition: Path, reference: Path, tokens: Tensor, windows: int, caches: dict[str, Cache]
) -> Iterator[tuple[str, Scores]]:
    """Run an edition in Octavo's engine, beside the model it was made from; BF16 comes first."""
    from octavo.engines.transformers import start
    from octavo.evaluation import divergence
    from octavo.evaluation.journal import Journal

    with (
        closing(start(edition, "cpu")) as engine,
        closing(start(reference, "cpu")) as original,
        patch.object(original, "hidden", remembered(original.hidden)),
    ):
        for name, cache in {"BF16": BF16, **caches}.items():
            journal = Journal()
            with kept(cache):
                divergence(
                    engine, original, tokens, seq_len=SEQ_LEN, limit=windows, journal=journal
                )
            records = values_of(journal, windows)
            kls = [np.frombuffer(base64.b64decode(one["kl"]), dtype="<f4") for one in records]
            yield (
                name,
                Scores(
                    [one["nll"] / (SEQ_LEN - 1) for one in records],
                    [float(one.mean(dtype=np.float64)) for one in kls],
                ),
            )


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def compared(found: Scores, others: dict[str, Scores]) -> dict[str, Any]:
    """What was found, and how far it is from others on the same windows (standard errors of the differences)."""
    result: dict[str, Any] = {"perplexity": math.exp(statistics.mean(found.nll))}
    if found.kl:
        result["kl"], result["kl_standard_error"] = mean_and_error(found.kl)
    for name, other in others.items():
        mean, error = mean_and_error([a - b for a, b in zip(found.nll, other.nll, strict=True)])
        result[f"percent_over_{name}"] = 100 * math.expm1(mean)
        result[f"percent_over_{name}_standard_error"] = 100 * error
        if found.kl and other.kl:
            mean, error = mean_and_error([a - b for a, b in zip(found.kl, other.kl, strict=True)])
            result[f"kl_over_{name}"], result[f"kl_over_{name}_standard_error"] = mean, error
    return result


def measure(
    edition: Path, reference: Path, tokens: Tensor, windows: int, everything: bool
) -> dict[str, dict[str, Any]]:
    """Both engines with each cache, compared with BF16's and FP8's in the same engine."""
    of_vllm, of_octavo = (IN_VLLM, IN_OCTAVO) if everything else (CAUSE_IN_VLLM, CAUSE_IN_OCTAVO)
    runs = {
        "vllm": in_vllm(edition, tokens, windows, of_vllm),
        "octavo": in_octavo(edition, reference, tokens, windows, of_octavo),
    }
    result: dict[str, dict[str, Any]] = {}
    for engine, run in runs.items():
        result[engine], bases = {}, {}
        for name, scores in run:
            if name in ("BF16", "FP8"):
                bases[name] = scores
            row = compared(scores, {k: v for k, v in bases.items() if k != name})
            result[engine][name] = row
            kl = f"  KL {row['kl']:.5f}" if "kl" in row else ""
            changes = "".join(
                f"  over {base} {row[key]:+.2f} % ± {row[f'{key}_standard_error']:.2f}"
                for base in ("BF16", "FP8")
                if (key := f"percent_over_{base}") in row
            )
            print(
                f"{edition.name:16} {engine:7} {name:42} {row['perplexity']:.3f}{kl}{changes}",
                flush=True,
            )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="WikiText-2's test text")
    parser.add_argument(
        "--edition",
        type=Path,
        nargs="*",
        default=[],
        help="further editions, for what shows the cause",
    )
    parser.add_argument("--windows", type=int, default=8)
    options = parser.parse_args()
    os.environ.update(SETTINGS)
    from octavo import quantize
    from octavo.evaluation import load_tokens
    from octavo.scheme import scheme_called

    model = sample_model()
    tokens = load_tokens(str(options.text), model)[: options.windows * SEQ_LEN]
    result: dict[str, Any] = {"windows": options.windows, "seq_len": SEQ_LEN, "editions": {}}
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        own = Path(scratch) / "octavo"
        # Merged, since vLLM would round q/k/v and gate/up again.
        quantize(model, own, scheme=scheme_called("fp8", "fp8", merge_scales=True))
        for edition in (own, *options.edition):
            found = measure(edition, model, tokens, options.windows, edition == own)
            result["editions"][edition.name] = found
    print(f"saved {save('kv_in_vllm', result).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
