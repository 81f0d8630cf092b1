"""The embedded engine behind an OpenAI-compatible API: ``python -m octavo.api CHECKPOINT``."""
