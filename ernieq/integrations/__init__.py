"""Packed checkpoints in programs of others; each imports its host only when that has called it."""
