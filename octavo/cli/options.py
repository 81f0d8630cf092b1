"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

TextField: TypeAlias = Annotated[
    str, typer.Option(help="Field or column with the text, in .jsonl and .parquet.")
]
SeqLen: TypeAlias = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens in each; 512 unless the .npy file has its own."),
]
Seed: TypeAlias = Annotated[int, typer.Option(min=0, help="Seed of the draw of samples.")]
ShardSize: TypeAlias = Annotated[str, typer.Option(help="Largest file.")]
Overwrite: TypeAlias = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output if it exists.")
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet: TypeAlias = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")]
