"""The file: one safetensors file whose metadata say what its tensors are."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ._errors import AdapterError

FORMAT = 1
_KEY = "peftlib"

Header = dict[str, Any]
Path = str | os.PathLike[str]


def read_header(path: Path) -> Header:
    """What a file says of itself, checked, without reading a tensor.

    Args:
        path: a file that `save` wrote.

    Returns:
        dict: `format`, `version` (of peftlib), `name`, `configs` (a list of `{"kind", "config"}`), `hosts` (for each,
        positions in `configs`), `base` (a fingerprint for each host), `metadata` (the user's own), `tensors` (for
        each key, `{"dtype", "shape"}`).

    Raises:
        AdapterError: not a safetensors file, not one of peftlib, a damaged header, a later format.
        OSError: the file cannot be read.

    Example:
        >>> import torch, peftlib, tempfile, os
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> path = os.path.join(tempfile.mkdtemp(), "adapter.safetensors")
        >>> peftlib.save(model, path, metadata={"task": "reviews"})
        >>> peftlib.read_header(path)["metadata"]
        {'task': 'reviews'}
    """
    with opened(path) as file:
        return header_of(file, path)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    with open(path, "rb"):  # a missing or unreadable file raises OSError, not a parser's error
        pass
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise AdapterError(
            f"{os.fspath(path)}: not a sound safetensors file ({error}). Save or copy it again."
        ) from None


def header_of(file: Any, path: Path) -> Header:
    text = (file.metadata() or {}).get(_KEY)
    if text is None:
        raise AdapterError(
            f"{os.fspath(path)}: a safetensors file without peftlib's header. Load it with the tool that wrote it."
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{os.fspath(path)}: its header is not JSON ({error}). Save it again.") from None
    problem = _problem(header)
    if problem:
        raise AdapterError(f"{os.fspath(path)}: {problem}. Save it again, with this version of peftlib if need be.")
    slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    tensors = {key: {"dtype": item.get_dtype(), "shape": list(item.get_shape())} for key, item in slices.items()}
    return {**header, "tensors": tensors}


def _problem(header: Any) -> str | None:
    """What is wrong with the header's form, or None."""
    if not isinstance(header, dict) or header.get("format") != FORMAT or isinstance(header["format"], bool):
        found = header.get("format") if isinstance(header, dict) else header
        return f"its header has format {found!r}, this version reads {FORMAT}"
    shape = {"version": str, "name": str, "configs": list, "hosts": dict, "base": dict, "metadata": dict}
    for key, kind in shape.items():
        if not isinstance(header.get(key), kind):
            return f"its header has no sound {key!r}"
    for one in header["configs"]:
        if not (isinstance(one, dict) and isinstance(one.get("kind"), str) and isinstance(one.get("config"), dict)):
            return "its header has a configuration that is not a kind with keywords"
    for host, positions in header["hosts"].items():
        sound = isinstance(positions, list) and positions and all(type(at) is int for at in positions)
        if not sound or not all(0 <= at < len(header["configs"]) for at in positions):
            return f"its header names no sound configuration for host {host!r}"
        if not _is_fingerprint(header["base"].get(host)):
            return f"its header has no sound fingerprint for host {host!r}"
    return None


def _is_fingerprint(found: Any) -> bool:
    if not isinstance(found, dict) or not isinstance(found.get("weights"), dict):
        return False
    described = all(isinstance(one, list) and one and isinstance(one[0], str) for one in found["weights"].values())
    return described and isinstance(found.get("hash", {}), dict)


def write(path: Path, tensors: dict[str, Tensor], header: Header) -> None:
    """Beside the target, synced, then renamed over it: the file is the old one or the new one, whole."""
    target = os.path.realpath(path)
    folder, base = os.path.split(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: there is no such folder to save {base} in")
    temporary = os.path.join(folder, f".{base}.{uuid.uuid4().hex}.tmp")
    text = json.dumps({"format": FORMAT, "version": version("peftlib"), **header}, allow_nan=False)
    try:
        save_file(tensors, temporary, {"format": "pt", _KEY: text})
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, target)
        _sync(folder, os.O_RDONLY)
    except SafetensorError as error:
        raise AdapterError(f"{target}: cannot be written ({error}). Check the folder and its free space.") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _sync(path: str, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
