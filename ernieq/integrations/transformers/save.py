"""``save_pretrained`` of a packed model: the tensors of the checkpoint bit for bit, and a manifest that holds.

transformers writes the shards, ``config.json`` and ``generation_config.json``; the manifest and the model card,
of which it knows nothing, are added here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from ernieq.decode import TrellisWeight
from ernieq.decode.weight import view_array
from ernieq.errors import FormatError, UsageError
from ernieq.integrations.transformers.modules import checkpoint_name, packed_weights
from ernieq.pack import MANIFEST_NAME, Coverage, Manifest, PackedReader, file_sha256, storage_errors
from ernieq.pack.json_file import dump_json
from ernieq.pack.layout import CARD_NAME, CONFIG_NAME, PACKED_SUFFIXES, pack_signs
from ernieq.pack.shards import INDEX_NAME, SINGLE_SHARD

# What save_pretrained may be asked for and a packed checkpoint can't be, by the value that leaves it out.
_UNSUPPORTED = {"variant": None, "save_original_format": True, "distributed_checkpoint": False}
_HUB_OPTIONS = ("repo_id", "commit_message", "create_pr", "token")


@dataclass
class Origin:
    """Where a model was loaded from.

    Args:
        directory: of the packed checkpoint.
        manifest: its manifest when it was loaded.
        changed: tensors that had other numbers than the checkpoint's when the model was saved last.
    """

    directory: Path
    manifest: Manifest
    changed: frozenset[str] = frozenset()

    def reopen(self) -> PackedReader:
        """Open the checkpoint again.

        Raises:
            FormatError: it is gone, or another one is in its place.
        """
        reader = PackedReader(self.directory)
        if reader.manifest != self.manifest:
            raise FormatError(
                f"{self.directory} has changed since the model was loaded; load it again to save it"
            )
        return reader


def packed_state(model: PreTrainedModel, origin: Origin) -> dict[str, Tensor]:
    """All tensors of the checkpoint, by their names in it.

    Packed matrices come from the model. So do other tensors that have been changed since they were loaded, in
    the dtype of the file; those that have not keep their bytes, whatever dtype they were loaded as.

    Raises:
        FormatError: the checkpoint that the model was loaded from is gone or has changed.
    """
    state: dict[str, Tensor] = {}
    for name, weight in packed_weights(model).items():
        state.update(zip((name + suffix for suffix in PACKED_SUFFIXES), _packed_tensors(weight), strict=True))
    held = {checkpoint_name(name): parameter for name, parameter in model.named_parameters()}
    reader = origin.reopen()
    carried = frozenset(origin.manifest.coverage.carried if origin.manifest.coverage else ())
    changed = set()
    for name, stored in _stored_tensors(reader):
        state[name] = stored
        if name not in carried and not torch.equal(held[name].cpu(), stored.to(held[name].dtype)):
            state[name] = held[name].detach().cpu().to(stored.dtype)
            changed.add(name)
    origin.changed = frozenset(changed)
    return state


def _packed_tensors(weight: TrellisWeight) -> tuple[Tensor, Tensor, Tensor]:
    signs = view_array(pack_signs(weight.signs.cpu().numpy()))
    return weight.packed_tiles().cpu(), weight.scale.cpu(), signs


def _stored_tensors(reader: PackedReader) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are no packed matrix, copied: their file may be about to be written over."""
    names = reader.tensors()
    for file in reader.shard_files():
        with safe_open(reader.path / file, framework="pt") as shard:
            for name in names:
                if reader.file_of(name) == file:
                    yield name, shard.get_tensor(name).clone()


def save_completely(
    model: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: None = None,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """Save as transformers does, then add the manifest and the model card.

    Takes the place of ``model.save_pretrained``, with the same arguments. The tokenizer is left to its own
    ``save_pretrained``, as always.

    Raises:
        UsageError: an option asks for files that are no packed checkpoint.
        FormatError: the checkpoint that the model was loaded from is gone or has changed.
        StorageError: the disk refuses.
    """
    for option, absent in {**_UNSUPPORTED, "state_dict": None}.items():
        value = state_dict if option == "state_dict" else options.get(option, absent)
        if value != absent:
            raise UsageError(f"a packed model is saved whole and in one format; leave {option} out")
    hub_options = {option: options.pop(option) for option in _HUB_OPTIONS if option in options}
    type(model).save_pretrained(model, save_directory, is_main_process=is_main_process, **options)
    if not is_main_process:
        return
    directory = Path(save_directory)
    origin = cast(Origin, cast(Any, model).hf_quantizer.origin)
    with storage_errors(directory):
        _complete(directory, origin, str(model.model.norm.weight.dtype).removeprefix("torch."))
    if directory.samefile(origin.directory):
        origin.manifest = PackedReader(directory).manifest
    if push_to_hub:
        model.push_to_hub(hub_options.pop("repo_id", directory.name), **hub_options)


def _complete(directory: Path, origin: Origin, dtype: str) -> None:
    """Make a directory that transformers has written a packed checkpoint."""
    config = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    # transformers takes the dtype of whichever parameter comes first, which may be a router's float32.
    (directory / CONFIG_NAME).write_bytes(dump_json({**config, "dtype": dtype}))
    card = origin.directory / CARD_NAME
    if card.is_file() and not (directory / CARD_NAME).exists():
        shutil.copyfile(card, directory / CARD_NAME)
    manifest = replace(
        origin.manifest,
        coverage=_coverage(origin),
        shards={name: file_sha256(directory / name) for name in _shard_names(directory)},
        files={
            name: digest
            for name, digest in origin.manifest.files.items()
            if (directory / name).is_file() and file_sha256(directory / name) == digest
        },
    )
    (directory / MANIFEST_NAME).write_bytes(dump_json(manifest.to_json()))


def _coverage(origin: Origin) -> Coverage:
    """What became of every tensor; those that were changed since they were loaded count as tuned."""
    coverage = origin.manifest.coverage
    assert coverage is not None, "a manifest that was read has its coverage"
    kept = tuple(name for name in coverage.kept if name not in origin.changed)
    tuned = (*coverage.tuned, *(name for name in coverage.kept if name in origin.changed))
    return replace(coverage, kept=kept, tuned=tuned)


def _shard_names(directory: Path) -> list[str]:
    """The shards just written; an index or a single shard of what was there before is removed.

    transformers removes old numbered shards itself, but neither of these two.
    """
    index = directory / INDEX_NAME
    if not index.exists():
        return [SINGLE_SHARD]
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if all((directory / name).exists() for name in names):
        (directory / SINGLE_SHARD).unlink(missing_ok=True)
        return names
    index.unlink()
    return [SINGLE_SHARD]
