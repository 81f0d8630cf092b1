"""What bad input gets: one paragraph on stderr, exit code 2, nothing left on disk."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from datasets import Dataset
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import tiny
from octavo import cli

INDEX = "model.safetensors.index.json"


class Workplace:
    """A directory with a copy of the tiny checkpoint to damage, token ids, and the command line.

    Attributes:
        root: holds everything else; nothing may appear in it.
        model: the checkpoint.
        output: where the edition would go.
        ids: calibration tokens.
    """

    def __init__(self, root: Path, checkpoint: Path) -> None:
        self.root = root
        self.model = root / "model"
        self.output = root / "out"
        shutil.copytree(checkpoint, self.model)
        self.ids = tiny.save_ids(root / "ids.npy")

    @property
    def config(self) -> Path:
        return self.model / "config.json"

    @property
    def shard(self) -> Path:
        """The first shard, or the only one."""
        return min(self.model.glob("*.safetensors"))

    def refused(self, *options: object, model: object = None, output: object = None) -> str:
        """Run ``octavo quantize``, check how it refuses, and return the message."""
        before = tiny.contents(self.root)
        arguments = ["quantize", model or self.model, "-o", output or self.output, "--quiet"]
        if "--calib" not in options:
            arguments += ["--calib", self.ids]
        result = CliRunner().invoke(cli.app, [*map(str, arguments), *map(str, options)])
        # A SystemExit is what a clean exit looks like here; anything else was not handled.
        assert isinstance(result.exception, SystemExit), repr(result.exception)
        assert result.exit_code == 2
        assert re.fullmatch(r"error: \S[^\n]*\S\n", result.stderr), result.stderr
        assert "Traceback" not in result.stderr
        assert result.stdout == ""
        assert tiny.contents(self.root) == before
        return result.stderr


@pytest.fixture
def place(tmp_path: Path, tiny_llama: Path) -> Workplace:
    return Workplace(tmp_path, tiny_llama)


@pytest.fixture
def sharded(tmp_path: Path) -> Workplace:
    """The same with a checkpoint of several shards."""
    return Workplace(tmp_path / "work", tiny.build("llama", tmp_path / "sharded", shards=3))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def edit_header(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    edit(header)
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + raw[end:])


def set_offsets(path: Path, begin: int, end: int) -> None:
    """Give the final norm, 64 numbers of BF16, other offsets."""
    edit_header(path, lambda h: h["model.norm.weight"].update(data_offsets=[begin, end]))


NORM, Q_PROJ = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"

# What is done to the checkpoint, and what the message must say.
DAMAGE: dict[str, tuple[Callable[[Workplace], object], tuple[str, ...]]] = {
    "no such directory": (
        lambda place: shutil.rmtree(place.model),
        ("model is not a directory", "checkpoint directory", "hub id"),
    ),
    "a file": (
        lambda place: place.model.rename(place.root / "moved") and place.model.write_text(""),
        ("model is not a directory",),
    ),
    "no config": (
        lambda place: os.remove(place.config),
        ("config.json does not exist",),
    ),
    "config is a directory": (
        lambda place: [step() for step in (place.config.unlink, place.config.mkdir)],
        ("config.json",),
    ),
    "config not JSON": (
        lambda place: place.config.write_text("{'model_type': 'llama'}"),
        ("config.json is not JSON", "line 1"),
    ),
    "config not UTF-8": (
        lambda place: place.config.write_bytes(b'{"model_type": "\xff"}'),
        ("config.json is not JSON",),
    ),
    "config a list": (
        lambda place: place.config.write_text("[]"),
        ("config.json holds a JSON list", "expected an object"),
    ),
    "config of the wrong types": (
        lambda place: edit_json(place.config, num_hidden_layers="two"),
        ("config.json is not a valid llama configuration", "num_hidden_layers"),
    ),
    "config that builds no model": (
        lambda place: edit_json(place.config, hidden_act="no_such_activation"),
        ("config.json", "no_such_activation"),
    ),
    "config without attention heads": (
        lambda place: edit_json(place.config, num_attention_heads=0),
        ("config.json is not a valid llama configuration",),
    ),
    "config without layers": (
        lambda place: edit_json(place.config, num_hidden_layers=0),
        ("config.json", "num_hidden_layers"),
    ),
    "unsupported architecture": (
        lambda place: edit_json(place.config, model_type="gpt2"),
        ("'gpt2'", "llama, mistral, qwen2, qwen3", "--trust-remote-code does not exist"),
    ),
    "architecture in its own code": (
        lambda place: edit_json(
            place.config, model_type="mine", auto_map={"AutoConfig": "mine.Config"}
        ),
        ("'mine'", "--trust-remote-code does not exist"),
    ),
    "no architecture": (
        lambda place: place.config.write_text("{}"),
        ("config.json", "model_type", "llama, mistral, qwen2, qwen3"),
    ),
    "no weights": (
        lambda place: place.shard.unlink(),
        ("model has neither model.safetensors nor", "safetensors only"),
    ),
    "truncated": (
        lambda place: os.truncate(place.shard, place.shard.stat().st_size - 1),
        ("model.safetensors is truncated", "191,208 bytes", "191,207"),
    ),
    "empty weights": (
        lambda place: place.shard.write_bytes(b""),
        ("model.safetensors is not a valid safetensors file",),
    ),
    "overlapping offsets": (
        lambda place: set_offsets(place.shard, 0, 128),
        ("model.safetensors is not a valid safetensors file", "overlaps"),
    ),
    "offsets out of range": (
        lambda place: set_offsets(place.shard, 10**9, 10**9 + 128),
        ("model.safetensors is not a valid safetensors file", NORM),
    ),
    "offsets that contradict the shape": (
        lambda place: set_offsets(place.shard, 0, 127),
        ("model.safetensors is not a valid safetensors file", NORM, "takes 128 bytes"),
    ),
    "missing tensor": (
        lambda place: edit_tensors(place.shard, lambda tensors: tensors.pop(Q_PROJ)),
        ("model has no tensor", Q_PROJ),
    ),
    "wrong shape": (
        lambda place: edit_tensors(
            place.shard, lambda tensors: tensors.update({Q_PROJ: torch.ones(3, 64)})
        ),
        (Q_PROJ, "model.safetensors", "[3, 64]", "config.json calls for [64, 64]"),
    ),
    "config of another size": (
        lambda place: edit_json(place.config, intermediate_size=128),
        ("mlp.gate_proj.weight", "[96, 64]", "config.json calls for [128, 64]"),
    ),
    "integer weights": (
        lambda place: edit_tensors(
            place.shard, lambda tensors: tensors.update({Q_PROJ: torch.ones(64, 64).int()})
        ),
        (Q_PROJ, "torch.int32", "expected bfloat16, float16 or float32"),
    ),
    "FP8 weights": (
        lambda place: edit_tensors(
            place.shard,
            lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(torch.float8_e4m3fn)}),
        ),
        (Q_PROJ, "float8_e4m3fn", "unquantized"),
    ),
    "quantization_config": (
        lambda place: edit_json(place.config, quantization_config={"quant_method": "gptq"}),
        ("config.json", "gptq", "already quantized"),
    ),
    "compression_config": (
        lambda place: edit_json(place.config, compression_config={}),
        ("config.json", "compression_config", "already quantized"),
    ),
    "hf_quant_config": (
        lambda place: (place.model / "hf_quant_config.json").write_text("{}"),
        ("hf_quant_config.json", "already quantized"),
    ),
    "index not JSON": (
        lambda place: (place.model / INDEX).write_text("{"),
        (f"{INDEX} is not JSON",),
    ),
    "index without a map": (
        lambda place: (place.model / INDEX).write_text("{}"),
        (INDEX, "weight_map"),
    ),
    "index leading outside": (
        lambda place: (place.model / INDEX).write_text(
            json.dumps({"weight_map": {NORM: "../evil.safetensors"}})
        ),
        (INDEX, "'../evil.safetensors'", "plain file name"),
    ),
    "index with an absolute path": (
        lambda place: (place.model / INDEX).write_text(
            json.dumps({"weight_map": {NORM: "/evil.safetensors"}})
        ),
        (INDEX, "'/evil.safetensors'", "plain file name"),
    ),
    "index of a tensor that is elsewhere": (
        lambda place: (place.model / INDEX).write_text(
            json.dumps({"weight_map": {"model.absent.weight": "model.safetensors"}})
        ),
        (INDEX, "model.absent.weight", "model.safetensors"),
    ),
}


@pytest.mark.parametrize(("damage", "fragments"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoint(
    damage: Callable[[Workplace], object], fragments: tuple[str, ...], place: Workplace
) -> None:
    damage(place)
    message = place.refused()
    assert [fragment for fragment in fragments if fragment not in message] == [], message


@pytest.mark.parametrize("scheme", ["fp8", "fp8-dynamic"])
@pytest.mark.parametrize(("value", "told"), [(torch.nan, "NaN"), (-torch.inf, "infinity")])
@pytest.mark.parametrize(
    ("name", "index"),
    [
        # The first row of the embedding belongs to a token that occurs, the last one does not.
        ("model.embed_tokens.weight", 0),
        ("model.embed_tokens.weight", -1),
        ("model.layers.0.input_layernorm.weight", 0),
        ("model.layers.0.self_attn.q_proj.weight", 0),
        ("model.layers.0.self_attn.k_proj.weight", 0),
        ("model.layers.0.mlp.up_proj.weight", 0),
        ("model.layers.1.mlp.down_proj.weight", -1),
        ("model.norm.weight", 0),
        ("lm_head.weight", -1),
    ],
)
def test_weights_that_are_not_finite(
    name: str, index: int, value: float, told: str, scheme: str, place: Workplace
) -> None:
    np.save(place.ids, ids(2, 8, first=0))
    edit_tensors(place.shard, lambda tensors: tensors[name].view(-1)[index].fill_(value))
    message = place.refused("--scheme", scheme, "--calib", place.ids)
    assert name in message
    assert told in message


def test_missing_shard(sharded: Workplace) -> None:
    sharded.shard.unlink()
    assert f"{sharded.model}/model-00001-of-" in sharded.refused()


def test_truncated_shard(sharded: Workplace) -> None:
    os.truncate(sharded.shard, 5000)
    assert f"{sharded.shard} is truncated" in sharded.refused()


def test_tensor_in_two_shards(sharded: Workplace) -> None:
    # Any tensor of the first shard, put into the last one as well.
    name, tensor = load_file(sharded.shard).popitem()
    last = max(sharded.model.glob("*.safetensors"))
    edit_tensors(last, lambda tensors: tensors.update({name: tensor}))
    message = sharded.refused()
    assert name in message
    assert sharded.shard.name in message
    assert last.name in message


def lines(*content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text("\n".join(content))


def npy_bytes(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npy(array: NDArray[Any]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(npy_bytes(array))


def ids(*shape: int, first: int = 7) -> NDArray[np.int64]:
    """Token ids, all 7 but the first."""
    array = np.full(shape, 7)
    array.flat[0] = first
    return array


# A calibration file's ending, how it is made, further options, and what the message must say.
CALIBRATION: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...], tuple[str, ...]]] = {
    "empty text": (".txt", Path.touch, (), ("calib.txt holds 0 tokens", "more text")),
    "blank text": (".txt", lambda path: path.write_text(" \n\n"), (), ("holds 0 tokens",)),
    "too little text": (
        ".txt",
        lambda path: path.write_text("x" * 15),
        ("--seq-len", "16"),
        ("calib.txt holds 15 tokens", "sequence of 16", "--seq-len"),
    ),
    "text not UTF-8": (
        ".txt",
        lambda path: path.write_bytes(b"\xff" * 100),
        (),
        ("calib.txt is not UTF-8",),
    ),
    "text absent": (".txt", lambda path: None, (), ("calib.txt does not exist",)),
    "text a directory": (".txt", Path.mkdir, (), ("calib.txt",)),
    "text beyond the positions": (
        ".txt",
        lambda path: path.write_text("x" * 1000),
        ("--seq-len", "129"),
        ("--seq-len 129", "128 positions", "max_position_embeddings"),
    ),
    "empty jsonl": (".jsonl", Path.touch, (), ("calib.jsonl holds 0 tokens",)),
    "malformed jsonl line": (
        ".jsonl",
        lines('{"text": "fine"}', "", "{'text': 'bad'}"),
        (),
        ("calib.jsonl, line 3 is not JSON",),
    ),
    "jsonl not UTF-8": (
        ".jsonl",
        lambda path: path.write_bytes(b'{"text": "\xff"}'),
        (),
        ("calib.jsonl, line 1 is not JSON",),
    ),
    "jsonl line not an object": (
        ".jsonl",
        lines('{"text": "fine"}', '["bad"]'),
        (),
        ("calib.jsonl, line 2", "'text'", "--text-field"),
    ),
    "jsonl without the text field": (
        ".jsonl",
        lines('{"text": "fine"}'),
        ("--text-field", "body"),
        ("calib.jsonl, line 1", "'body'", "--text-field"),
    ),
    "jsonl text not a string": (
        ".jsonl",
        lines('{"text": 5}'),
        (),
        ("calib.jsonl, line 1", "'text'"),
    ),
    "jsonl text not Unicode": (
        ".jsonl",
        lines('{"text": "half a pair: \\ud800"}'),
        (),
        ("calib.jsonl, line 1",),
    ),
    "parquet not parquet": (
        ".parquet",
        lambda path: path.write_text("not parquet"),
        (),
        ("calib.parquet cannot be read as parquet",),
    ),
    "parquet without the column": (
        ".parquet",
        lambda path: Dataset.from_dict({"body": ["x"]}).to_parquet(path),
        (),
        ("calib.parquet has no column 'text'", "body", "--text-field"),
    ),
    "parquet column not text": (
        ".parquet",
        lambda path: Dataset.from_dict({"text": [1, 2]}).to_parquet(path),
        (),
        ("calib.parquet, row 1 has int", "expected text"),
    ),
    "npy absent": (".npy", lambda path: None, (), ("calib.npy does not exist",)),
    "npy empty": (".npy", Path.touch, (), ("calib.npy is not a NumPy array file",)),
    "npy not NumPy's": (
        ".npy",
        lambda path: path.write_text("1 2 3"),
        (),
        ("calib.npy is not a NumPy array file",),
    ),
    "npy an archive": (
        ".npy",
        lambda path: zipfile.ZipFile(path, "w").close(),
        (),
        ("calib.npy",),
    ),
    "npy truncated": (
        ".npy",
        lambda path: path.write_bytes(npy_bytes(ids(4, 16))[:200]),
        (),
        ("calib.npy is not a NumPy array file",),
    ),
    "npy of pickled objects": (
        ".npy",
        npy(np.array([[{}]], dtype=object)),
        (),
        ("calib.npy is not a NumPy array file",),
    ),
    "npy of floats": (
        ".npy",
        npy(np.ones((2, 8))),
        (),
        ("calib.npy holds float64 of shape [2, 8]", "integer token ids", "[samples, seq_len]"),
    ),
    "npy of one dimension": (
        ".npy",
        npy(ids(8)),
        (),
        ("calib.npy holds int64 of shape [8]", "[samples, seq_len]"),
    ),
    "npy of no samples": (".npy", npy(np.ones((0, 8), int)), (), ("shape [0, 8]",)),
    "ids beyond the vocabulary": (
        ".npy",
        npy(ids(2, 8, first=256)),
        (),
        ("calib.npy", "7 to 256", "expected 0 to 255"),
    ),
    "ids negative": (
        ".npy",
        npy(ids(2, 8, first=-1)),
        (),
        ("calib.npy", "-1 to 7", "expected 0 to 255"),
    ),
    "ids beyond the positions": (
        ".npy",
        npy(ids(2, 129)),
        (),
        ("129", "128 positions", "max_position_embeddings"),
    ),
    "ids too short": (
        ".npy",
        npy(ids(2, 8)),
        ("--seq-len", "9"),
        ("calib.npy", "8 tokens", "--seq-len asks for 9"),
    ),
    "unknown ending": (
        ".csv",
        Path.touch,
        (),
        ("Unknown calibration source", "calib.csv", "builtin", "wikitext2", ".parquet"),
    ),
}


@pytest.mark.parametrize(
    ("suffix", "make", "options", "fragments"), CALIBRATION.values(), ids=CALIBRATION
)
def test_calibration_data(
    suffix: str,
    make: Callable[[Path], object],
    options: tuple[str, ...],
    fragments: tuple[str, ...],
    place: Workplace,
) -> None:
    tiny.save_tokenizer(place.model)
    path = place.root / f"calib{suffix}"
    make(path)
    message = place.refused("--calib", path, *options)
    assert [fragment for fragment in fragments if fragment not in message] == [], message


def test_a_text_needs_a_tokenizer(place: Workplace) -> None:
    message = place.refused("--calib", "builtin")
    assert "model has no usable tokenizer" in message
    assert "--calib FILE.npy" in message


def test_a_hub_set_out_of_reach(place: Workplace) -> None:
    tiny.save_tokenizer(place.model)
    message = place.refused("--calib", "wikitext2")
    assert "Salesforce/wikitext" in message
    assert "--calib builtin" in message


OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown calibration source": (("--calib", "c4"), ("'c4'", "builtin", "cnn_dailymail")),
    "unknown device": (("--device", "tpu"), ("'tpu'", "auto, cpu, cuda")),
    "device without memory": (("--device", "meta"), ("'meta'", "auto, cpu, cuda")),
    "absent device": (("--device", "cuda:99"), ("cuda:99", "--device cpu")),
    "shard size not a size": (("--shard-size", "5 apples"), ("'5 apples'", "5GB")),
    "shard size zero": (("--shard-size", "0"), ("'0'", "5GB")),
    "shard size negative": (("--shard-size=-1GB",), ("'-1GB'", "5GB")),
    "shard size endless": (("--shard-size", "9" * 400), ("99999", "5GB")),
    "unknown scheme": (("--scheme", "int4"), ("'int4'", "fp8-dynamic", "fp8-block")),
    "unknown format": (("--format", "gguf"), ("'gguf'", "modelopt", "compressed-tensors")),
    "a scheme the format has no layout for": (
        ("--scheme", "fp8-block", "--format", "quark"),
        ("quark", "fp8-block", "compressed-tensors, block-fp8"),
    ),
    "merged scales of channels": (
        ("--scheme", "fp8-dynamic", "--merge-scales"),
        ("fp8-dynamic", "merge_scales", "one per channel"),
    ),
    "everything excluded": (
        ("--exclude", "*"),
        ("--exclude *", "no linear layer"),
    ),
}


@pytest.mark.parametrize(("options", "fragments"), OPTIONS.values(), ids=OPTIONS)
def test_options(options: tuple[str, ...], fragments: tuple[str, ...], place: Workplace) -> None:
    tiny.save_tokenizer(place.model)
    message = place.refused(*options)
    assert [fragment for fragment in fragments if fragment not in message] == [], message


@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=["", "overwrite"])
@pytest.mark.parametrize("output", ["model", "model/out", "model/../model/deeper/out", "."])
def test_output_and_input_inside_one_another(
    output: str, options: tuple[str, ...], place: Workplace
) -> None:
    message = place.refused(*options, output=place.root / output)
    assert "inside one another" in message
    assert str(place.model) in message


def test_output_inside_the_input_through_a_link(place: Workplace) -> None:
    (place.root / "link").symlink_to(place.model)
    assert "inside one another" in place.refused(output=place.root / "link" / "out")


@pytest.mark.parametrize("kind", ["file", "directory", "empty directory"])
def test_an_existing_output_is_left_alone(kind: str, place: Workplace) -> None:
    if kind == "file":
        place.output.write_text("precious")
    else:
        place.output.mkdir()
    if kind == "directory":
        (place.output / "model.safetensors").write_text("precious")
    message = place.refused()
    assert "out already exists" in message
    assert "--overwrite" in message


def test_an_unwritable_output(place: Workplace) -> None:
    (place.root / "file").write_text("")
    assert "Cannot write" in place.refused(output=place.root / "file" / "out")


@pytest.mark.parametrize("call", ["posix_fallocate", "pwritev"])
def test_a_full_disk(call: str, place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, no_space)
    message = place.refused()
    assert re.search(r"The disk that holds .* is full: .*[\d,]+ are free now", message)
    if call == "pwritev":
        return
    needed = re.search(r"out needs ([\d,]+) bytes", message)
    assert needed
    # The embedding and lm_head stay in BF16: at least their bytes, and less than the input's.
    assert 65536 < int(needed[1].replace(",", "")) < place.shard.stat().st_size


@pytest.mark.parametrize("model", ["no-such-org/no-such-model", "./no-such-directory"])
def test_a_hub_out_of_reach(model: str, place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> NoReturn:
        raise ConnectionError("Name or service not known\nand more lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    message = place.refused(model=model)
    assert model in message
    assert "pass its directory" in message


@pytest.mark.parametrize("name", ["[bold]model", "model[/bold]", "modèle", "two words"])
def test_any_directory_name_is_shown_as_it_is(name: str, place: Workplace) -> None:
    model = place.root / name
    model.mkdir(parents=True)
    assert f"{model}/config.json does not exist" in place.refused(model=model)


# The real program, as a process of its own.


def octavo(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "octavo.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has made its children deaf to SIGINT.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def test_the_program_exits_with_2(place: Workplace) -> None:
    place.config.unlink()
    before = tiny.contents(place.root)
    process = octavo("quantize", place.model, "-o", place.output)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]*config\.json does not exist[^\n]*\n", stderr)
    assert tiny.contents(place.root) == before


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_leaves_what_can_be_resumed(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    model = tiny.build("llama", tmp_path / "model", layers=48)
    ids = tiny.save_ids(tmp_path / "ids.npy", samples=3000, seq_len=128)
    process = octavo("quantize", model, "-o", tmp_path / "out", "--calib", ids)
    journal = tmp_path / ".out.octavo" / "journal"
    while not (journal.exists() and b'"layer"' in journal.read_bytes()) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    assert re.search(r"error: interrupted; \d+ of 48 layers are finished .*--resume", stderr)
    assert journal.exists()
    assert not (tmp_path / "out").exists()


def test_a_signal_before_anything_is_finished_leaves_nothing(tmp_path: Path) -> None:
    model = tiny.build("llama", tmp_path / "model", layers=1)
    ids = tiny.save_ids(tmp_path / "ids.npy", samples=30000, seq_len=128)
    before = tiny.contents(tmp_path)
    process = octavo("quantize", model, "-o", tmp_path / "out", "--calib", ids)
    while not (tmp_path / ".out.octavo" / "hidden-1").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert stderr.splitlines()[-1] == "error: interrupted; nothing is left behind."
    assert tiny.contents(tmp_path) == before
