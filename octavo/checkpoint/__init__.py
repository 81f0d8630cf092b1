"""Bytes on disk: a lazy, sharded safetensors reader and an atomic, sharded writer."""

from octavo.checkpoint.reader import Checkpoint, read_json
from octavo.checkpoint.safetensors import Entry
from octavo.checkpoint.writer import CheckpointWriter, Layout

__all__ = ["Checkpoint", "CheckpointWriter", "Entry", "Layout", "read_json"]
