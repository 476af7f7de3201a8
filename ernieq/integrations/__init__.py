"""Packed checkpoints inside other people's programs, one folder each."""
