"""The file: one safetensors file whose metadata say what its tensors are, and that none of its bits has changed."""

import contextlib
import functools
import hashlib
import json
import os
import re
import stat
import uuid
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError, TensorSpec, safe_open
from torch import Tensor

from .._errors import AdapterError
from .header import FORMAT, FileHeader, Header, parse, shown, strict_json

_KEY = "peftlib"
_SUM = "peftlib.sha256"
_OF_NUMPY = (torch.float32, torch.float16, torch.float64)

_CONFIG_OF_PEFT = "adapter_config.json"
_TOOLS = {
    r"^base_model\.model\.": "peft",
    r"\.lora_(down|up)\.weight$": "kohya",
    r"\.lora\.(down|up)\.weight$|\.lora_[AB]\.weight$": "diffusers",
    r"\.lora_[ab]\.weight$": "torchtune",
    r"\.lora_[AB]$": "loralib",
}

Path = str | os.PathLike[str]


def read_header(path: Path) -> FileHeader:
    """What a file says of itself, checked, without reading a tensor.

    Args:
        path: a file that `save` wrote.

    Returns:
        FileHeader: a dict, which `print` and a notebook show as a table: `format`, `version` (of peftlib), `name`,
        `configs` (a list of `{"kind", "config"}`), `hosts` (for each, positions in `configs`), `base` (a fingerprint
        for each host), `metadata` (the user's own), `tensors` (for each key, `{"dtype", "shape"}`).

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
        return FileHeader(header_of(file, path))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    if os.path.isfile(os.path.join(path, _CONFIG_OF_PEFT)):
        raise AdapterError(f"{os.fspath(path)}: a directory of HF peft. Call peftlib.hf.load(model, directory).")
    _require_plain(path)
    with open(path, "rb") as raw:  # a missing or unreadable file raises OSError, not a parser's error
        try:
            file = safe_open(path, "pt")
        except (SafetensorError, RuntimeError) as error:  # the latter for a file that does not fit into memory
            raise _unsound(path, error) from None
        length = int.from_bytes(raw.read(8), "little")
        strict_json(raw.read(length).decode(), os.fspath(path))  # the parser takes one of two equal keys
    with file:
        yield file


def _unsound(path: Path, error: Exception) -> AdapterError:
    reason = shown(str(error))
    return AdapterError(f"{os.fspath(path)}: not a valid safetensors file ({reason}). Save or copy it again.")


def header_of(file: Any, path: Path) -> Header:
    text = (file.metadata() or {}).get(_KEY)
    if text is None:
        raise AdapterError(f"{os.fspath(path)}: a safetensors file without peftlib's header. {_loader_of(file, path)}")
    header = parse(text, os.fspath(path))
    tensors = listed(file)
    parts = sum(map(len, header["hosts"].values()))
    if parts > len(tensors) + len(header["hosts"]):  # each would be built: more than the file's size is worth
        raise AdapterError(
            f"{os.fspath(path)}: its header asks for {parts} parts, and there are {len(tensors)} tensors. "
            "Save it again from its model."
        )
    return {**header, "tensors": tensors}


def _loader_of(file: Any, path: Path) -> str:
    """By the names of its tensors, which tell most tools apart."""
    found = (tool for names, tool in _TOOLS.items() if any(re.search(names, key) for key in listed(file)))
    layout = next(found, None)
    if layout is None:
        return "Load it with the tool that wrote it."
    if layout == "peft":
        folder = os.path.dirname(os.fspath(path)) or "."
        return f"Its names are those of HF peft. Call peftlib.hf.load(model, {folder!r})."
    return f'Its names are those of {layout}. Call peftlib.exchange.load(model, path, "{layout}").'


def listed(file: Any) -> dict[str, dict[str, Any]]:
    """What tensors an open file holds, by key, without reading one."""
    slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    return {key: {"dtype": item.get_dtype(), "shape": list(item.get_shape())} for key, item in slices.items()}


def read_tensor(file: Any, key: str) -> Tensor:
    """A copy: what the parser gives lies in the mapped file, and would change, or be gone, with it."""
    try:
        return file.get_tensor(key).clone()
    except SafetensorError as error:  # a dtype that torch does not have
        raise AdapterError(f"{shown(key)}: {shown(str(error))}. Save it again from its model.") from None


def require_unchanged(file: Any, tensors: dict[str, Tensor], path: Path) -> None:
    """The sum finds accidents, in the header and in the values; it is no signature."""
    metadata = file.metadata()
    if metadata.get(_SUM) != _sum(metadata[_KEY], tensors):
        raise AdapterError(f"{os.fspath(path)}: its bits are not those that were saved. Save or copy it again.")


def _sum(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f'[{json.dumps(key)}, "{tensor.dtype}", {[*tensor.shape]}]'.encode())  # 882: 4 ms by one dumps
        digest.update(_memory(tensor))
    return digest.hexdigest()


def _memory(tensor: Tensor) -> memoryview:
    """In a dtype that numpy has, else as bytes: 1 µs, and 3."""
    known = tensor.contiguous() if tensor.dtype in _OF_NUMPY else tensor.reshape(-1).view(torch.uint8)
    return known.numpy().data


@functools.cache  # importlib keeps what it found in a folder for each time at which the folder was changed
def _version() -> str:
    return version("peftlib")


def write(path: Path, tensors: dict[str, Tensor], header: Header) -> None:
    """Beside the target, synced, then renamed over it: the file is the old one or the new one, whole."""
    text = _text(header)
    with replacing(path) as temporary:
        parse(text, _target(path))  # what could not be read back is not written
        write_tensors(temporary, tensors, {"format": "pt", _KEY: text, _SUM: _sum(text, tensors)})


def _text(header: Header) -> str:
    return json.dumps({"format": FORMAT, "version": _version(), **header}, allow_nan=False)


def size_of(header: Header, tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the file that `write` would make, from the shapes alone: 8 for the length of what describes the tensors,
    that padded to a multiple of 8, and the tensors."""
    metadata = {"format": "pt", _KEY: _text(header), _SUM: "0" * hashlib.sha256().digest_size * 2}
    described: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        described[key] = {"dtype": "F32", "shape": [*tensor.shape], "data_offsets": [start, end]}
    return 8 + -(-len(json.dumps(described, separators=(",", ":"))) // 8) * 8 + end


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Tensors on the CPU, to a path that `replacing` gave. (224 of them: 1.2 ms; by `save_file`, which asks ctypes for
    each address, 3.5.)"""
    held = {key: tensor.contiguous() for key, tensor in tensors.items()}  # until the last byte is written
    safetensors.serialize_file({key: _described(key, tensor) for key, tensor in held.items()}, path, metadata)


def _described(key: str, tensor: Tensor) -> TensorSpec:
    dtype = str(tensor.dtype).removeprefix("torch.")
    try:
        return TensorSpec(dtype=dtype, shape=tensor.shape, data_ptr=tensor.data_ptr(), data_len=tensor.nbytes)
    except SafetensorError as error:
        raise AdapterError(f"{key}: {tensor.dtype} is no dtype of the format. Save it in another.") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[str]:
    """A path beside the target to write to: synced, it takes the target's place when the block ends without error."""
    target = _target(path)
    folder, base = os.path.split(target)
    temporary = os.path.join(folder, f".{base[:48]}.{uuid.uuid4().hex}.tmp")
    try:
        mode = _mode(target, temporary)
        yield temporary
        os.chmod(temporary, mode)
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, target)
        _sync(folder, os.O_RDONLY)
    except SafetensorError as error:
        raise _as_os_error(error, target) from None
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} while saving", target) from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _target(path: Path) -> str:
    """Where the bytes go: a link is followed, and only a plain file is replaced."""
    target = os.path.realpath(path)
    folder, base = os.path.split(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: there is no such folder to save {base} in")
    with contextlib.suppress(FileNotFoundError):
        _require_plain(target)
        if not os.access(target, os.W_OK):
            raise PermissionError(f"{target}: the file is read-only. Choose another name, or make it writable.")
    return target


def _require_plain(path: Path) -> None:
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{os.fspath(path)} is a folder. Name a file in it.")
    if not stat.S_ISREG(mode):
        raise AdapterError(f"{os.fspath(path)}: a device or a pipe, not a plain file. Choose another path.")


def _mode(target: str, temporary: str) -> int:
    """The permissions of the old file, else those that the umask leaves: the writer's own are for its user alone."""
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        new = os.fstat(descriptor).st_mode
    finally:
        os.close(descriptor)
    return stat.S_IMODE(os.stat(target).st_mode if os.path.exists(target) else new)


def _as_os_error(error: SafetensorError, target: str) -> Exception:
    """The writer tells the system's errors in words: a full disk should be caught as everywhere."""
    number = re.search(r"os error (\d+)", str(error))
    if number is None:
        return AdapterError(f"{target}: cannot be written ({error}). Check the folder and its free space.")
    return OSError(int(number[1]), f"{os.strerror(int(number[1]))} while saving", target)


def _sync(path: str, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
