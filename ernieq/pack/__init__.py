"""The packed checkpoint: FORMAT.md beside this file, its writer, reader and checker. Imports no torch."""

from ernieq.pack.atomic import REPLACED, AtomicDirectory, storage_errors
from ernieq.pack.compare import TensorError
from ernieq.pack.durable import write_durably
from ernieq.pack.header import RawTensor, TensorEntry, build_header, read_header
from ernieq.pack.layout import FORMAT_VERSION, MANIFEST_NAME, ModuleSpec, little_endian_bytes
from ernieq.pack.manifest import CalibrationRecord, Coverage, Manifest, Source
from ernieq.pack.reader import PackedReader, is_packed, read_shards
from ernieq.pack.shards import DEFAULT_SHARD_BYTES, ShardWriter
from ernieq.pack.sweep import file_sha256
from ernieq.pack.verify import Progress, VerifyReport, verify_packed
from ernieq.pack.writer import PackedWriter

__all__ = [
    "DEFAULT_SHARD_BYTES",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "REPLACED",
    "AtomicDirectory",
    "CalibrationRecord",
    "Coverage",
    "Manifest",
    "ModuleSpec",
    "PackedReader",
    "PackedWriter",
    "Progress",
    "RawTensor",
    "ShardWriter",
    "Source",
    "TensorEntry",
    "TensorError",
    "VerifyReport",
    "build_header",
    "file_sha256",
    "is_packed",
    "little_endian_bytes",
    "read_header",
    "read_shards",
    "storage_errors",
    "verify_packed",
    "write_durably",
]
