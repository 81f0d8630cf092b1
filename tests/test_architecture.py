"""The rooms of the design import in one direction, and nothing runs code from a checkpoint."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import octavo

ROOT = Path(octavo.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
ROOMS = {file.relative_to(ROOT).parts[0].removesuffix(".py") for file in FILES} - {"__init__"}

# What each room may import besides itself.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "version": {"errors"},
    "units": {"errors"},
    "files": set(),
    "stopwatch": {"errors"},
    "allocator": {"errors"},
    "fp8": {"kernels", "scheme"},
    "scheme": {"errors"},
    "checkpoint": {"errors"},
    "attention": set(),
    "skeleton": {"errors", "attention", "checkpoint"},
    "decoder": {"errors", "attention", "checkpoint", "skeleton"},
    "fused": {"fp8", "kernels"},
    "formats": {"errors", "scheme"},
    "rounding": {"errors", "fp8", "kernels", "scheme"},
    "alignment": set(),
    "canonical": {"errors", "alignment", "fp8", "rounding", "scheme"},
    "bits": set(),
    "kernels": {"bits"},
    "calibration": {
        *("errors", "checkpoint", "decoder", "fp8", "fused", "kernels", "scheme", "tokenizer"),
    },
    "preflight": {"errors", "checkpoint"},
    "threads": set(),
    "memory": {"errors", "calibration", "units"},
    "resumption": {"errors", "checkpoint", "version"},
    "job": {
        *("errors", "alignment", "calibration", "canonical", "checkpoint", "decoder", "edition"),
        *("formats", "memory", "preflight", "scheme", "transfer"),
    },
    "reconstruction": {"attention", "calibration", "fp8", "linear", "rounding"},
    "rotation": {"errors", "calibration", "canonical", "checkpoint", "decoder", "transfer"},
    "rotating": {
        *("calibration", "checkpoint", "decoder", "edition", "preflight", "rotation", "stopwatch"),
        *("threads", "transfer", "version"),
    },
    "lane": set(),
    "read_ahead": {"checkpoint"},
    "in_turn": {
        *("calibration", "canonical", "fp8", "job", "loading", "reconstruction", "rounding"),
        "stopwatch",
    },
    "stage": {
        *("calibration", "canonical", "checkpoint", "in_turn", "job", "lane", "memory"),
        *("read_ahead", "stopwatch", "transfer"),
    },
    "cluster": {
        *("errors", "allocator", "calibration", "checkpoint", "job", "memory", "preflight"),
        *("scheme", "stage", "stopwatch", "threads"),
    },
    "shapes": {"errors"},
    "devices": set(),
    "planning": {
        *("errors", "calibration", "canonical", "checkpoint", "cluster", "devices", "fp8", "fused"),
        *(
            "job",
            "memory",
            "preflight",
            "reconstruction",
            "scheme",
            "shapes",
            "skeleton",
            "threads",
        ),
    },
    "synthesis": {"errors", "checkpoint", "shapes", "stopwatch"},
    "edition": {"errors", "checkpoint", "formats", "scheme"},
    "transfer": {"errors", "checkpoint", "edition"},
    "consistency": {"errors", "canonical", "edition", "scheme", "skeleton"},
    "conversion": {
        "errors",
        "canonical",
        "checkpoint",
        "consistency",
        "edition",
        "formats",
        "fp8",
        "preflight",
        "scheme",
        "skeleton",
        "stopwatch",
        "threads",
        "transfer",
    },
    "linear": {"fp8", "kernels", "scheme"},
    "tokenizer": {"errors"},
    "loading": {
        "errors",
        "attention",
        "checkpoint",
        "edition",
        "fp8",
        "linear",
        "preflight",
        "skeleton",
        "tokenizer",
    },
    "engines": {
        *(
            "errors",
            "attention",
            "bits",
            "checkpoint",
            "edition",
            "fp8",
            "fused",
            "kernels",
            "linear",
        ),
        *("loading", "preflight", "scheme"),
    },
    "evaluation": {"errors", "checkpoint", "calibration", "engines", "tokenizer", "version"},
    "serving": {"checkpoint", "servers"},
    "servers": {"errors", "checkpoint", "edition", "formats", "scheme"},
    "reporting": {"errors", "checkpoint", "files", "scheme", "servers", "units", "version"},
    "inspection": {
        "errors",
        "alignment",
        "canonical",
        "checkpoint",
        "consistency",
        "edition",
        "formats",
        "fp8",
        "scheme",
        "skeleton",
    },
    "verification": {
        "errors",
        "calibration",
        "checkpoint",
        "engines",
        "evaluation",
        "inspection",
        "tokenizer",
    },
    "analysis": {
        *(
            "errors",
            "calibration",
            "canonical",
            "checkpoint",
            "decoder",
            "evaluation",
            "job",
            "linear",
        ),
        *(
            "loading",
            "memory",
            "preflight",
            "reporting",
            "scheme",
            "threads",
            "transfer",
            "version",
        ),
    },
    "throughput": {"errors", "files", "reporting"},
    "benchmarking": {"checkpoint", "errors", "servers", "throughput", "version"},
    "detokenizing": set(),
    "generation": {"errors", "checkpoint"},
    "completion": {
        *("errors", "checkpoint", "detokenizing", "engines", "generation", "tokenizer"),
    },
    "conversation": {"completion", "tokenizer"},
    "self_calibration": {
        *("errors", "calibration", "checkpoint", "engines", "files", "stopwatch", "tokenizer"),
    },
    "api": {
        *("errors", "allocator", "checkpoint", "detokenizing", "edition", "engines", "generation"),
        *("tokenizer", "units", "version"),
    },
    "publishing": ROOMS
    - {
        *("cli", "console", "pipeline", "throughput", "benchmarking", "serving"),
        *("analysis", "api", "conversation", "inspection", "verification"),
    },
    "pipeline": ROOMS
    - {
        *("cli", "console", "engines", "evaluation", "publishing", "reporting"),
        *("throughput", "benchmarking", "servers", "serving", "inspection", "verification"),
        *("analysis", "api", "completion", "conversation", "planning", "devices", "shapes"),
        *("synthesis", "rotation", "rotating", "self_calibration"),
    },
}


def nodes(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


def imports(file: Path) -> Iterator[str]:
    """Every imported module of ``file``, and every name imported from one, with its dots."""
    for node in nodes(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_rooms(files: list[Path]) -> set[str]:
    parts = (name.split(".") for file in files for name in imports(file))
    return {part[1] for part in parts if part[0] == "octavo" and len(part) > 1} & ROOMS


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_lies_below_it(room: str) -> None:
    files = [file for file in FILES if file.relative_to(ROOT).parts[0] in {room, f"{room}.py"}]
    assert files
    assert imported_rooms(files) <= ALLOWED[room] | {room}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
class TestEveryFile:
    def test_nothing_imports_the_command_line(self, file: Path) -> None:
        assert "cli" not in imported_rooms([file]) or file.parent.name == "cli"

    def test_nothing_unpickles(self, file: Path) -> None:
        modules = {name.split(".")[0] for name in imports(file)}
        assert not modules & {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
        assert "torch.load" not in {ast.unparse(node) for node in nodes(file)} | set(imports(file))

    def test_nothing_runs_foreign_code(self, file: Path) -> None:
        calls = [node for node in nodes(file) if isinstance(node, ast.Call)]
        assert not {ast.unparse(call.func) for call in calls} & {"eval", "exec"}
        keywords = [keyword for call in calls for keyword in call.keywords]
        unsafe = {keyword.arg for keyword in keywords if ast.unparse(keyword.value) != "False"}
        assert not unsafe & {"allow_pickle", "trust_remote_code"}
