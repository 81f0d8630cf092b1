"""Bytes on disk: a lazy, sharded safetensors reader, and a sharded writer that never leaves half a
checkpoint behind."""

from octavo.checkpoint.journal import Journal
from octavo.checkpoint.reader import Checkpoint, read_json
from octavo.checkpoint.safetensors import Entry
from octavo.checkpoint.workspace import Workspace
from octavo.checkpoint.writer import CheckpointWriter, Layout, Place

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "Entry",
    "Journal",
    "Layout",
    "Place",
    "Workspace",
    "read_json",
]
