"""An adapter file in parts, to be changed and put together again with a checksum that is right."""

import hashlib
import json
import struct
from typing import Any

import torch

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class Forgery:
    """A file in parts that a test may change one by one; its checksum is right unless the test takes care of it."""

    def __init__(self, whole: bytes) -> None:
        (length,) = struct.unpack("<Q", whole[:8])
        entries = json.loads(whole[8 : 8 + length])
        self.metadata: dict[str, Any] = entries.pop("__metadata__")
        self.header: Any = json.loads(self.metadata["peftlib"])
        self.entries: dict[str, Any] = entries
        self.data = whole[8 + length :]
        self.again = b""  # members of the outer JSON that are there once more
        self.length: int | None = None
        self.text: str | None = None
        self.sum: str | None = None

    def blob(self, key: str) -> bytes:
        start, end = self.entries[key]["data_offsets"]
        return self.data[start:end]

    def put(self, key: str, dtype: str, shape: Any, blob: bytes) -> None:
        """Writes the data anew, with this tensor in it."""
        blobs = {other: self.blob(other) for other in self.entries} | {key: blob}
        kept = {other: (one["dtype"], one["shape"]) for other, one in self.entries.items()} | {key: (dtype, shape)}
        self.data, self.entries = b"", {}
        for other, (its_dtype, its_shape) in kept.items():
            end = len(self.data) + len(blobs[other])
            self.entries[other] = {"dtype": its_dtype, "shape": its_shape, "data_offsets": [len(self.data), end]}
            self.data += blobs[other]

    def checksum(self, text: str) -> str:
        digest = hashlib.sha256(text.encode())
        for key, one in sorted(self.entries.items()):
            digest.update(json.dumps([key, str(DTYPES.get(one["dtype"])), one["shape"]]).encode() + self.blob(key))
        return digest.hexdigest()

    def whole(self) -> bytes:
        text = json.dumps(self.header) if self.text is None else self.text
        metadata = {**self.metadata, "peftlib": text}
        del metadata["peftlib.sha256"]
        if self.sum != "none":
            metadata["peftlib.sha256"] = self.sum or self.safe_checksum(text)
        outer = json.dumps({"__metadata__": metadata, **self.entries}).encode()
        outer = outer[:-1] + (b"," + self.again if self.again else b"") + b"}"
        length = len(outer) if self.length is None else self.length
        return struct.pack("<Q", length % 2**64) + outer + self.data

    def safe_checksum(self, text: str) -> str:
        try:
            return self.checksum(text)
        except (TypeError, ValueError, KeyError):  # offsets that no checksum can follow
            return "0" * 64
