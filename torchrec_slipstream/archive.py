"""Files of ours: a JSON header and numpy arrays in one ``.npz``, checked before anything in it is believed.

``numpy.load`` opens them too. Members: ``header.json`` with the format's name and version, and one ``.npy`` an array,
each with its length in the header. zipfile's checksums tell a flipped bit, the lengths a truncated array.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from torchrec_slipstream.errors import SlipstreamError
from torchrec_slipstream.writing import whole_file

_HEADER = "header.json"
# Level 1 of zlib: counts compress nearly as well as at 6, in a fifth of the time.
_LEVEL = 1
T = TypeVar("T")
GetArray = Callable[[str], npt.NDArray[Any]]


@dataclass(frozen=True)
class FileFormat:
    """One kind of file.

    Attributes:
        name: written into the header; a file with another is foreign.
        version: of what this release writes, and the only one that it reads.
        what: for messages, say ``"an access profile"``.
        writer: for messages, what writes such files.
        remedy: for messages, how to come by a new one.
        error: raised for files that cannot be written or believed.
    """

    name: str
    version: int
    what: str
    writer: str
    remedy: str
    error: type[SlipstreamError]

    def write(
        self,
        path: str | Path,
        header: Mapping[str, Any],
        arrays: Mapping[str, npt.NDArray[Any]],
        *,
        compressed: bool = True,
    ) -> None:
        """Write a file; it appears whole or not at all.

        Raises:
            the format's error: the path cannot be written.
        """
        whole = {
            "format": self.name,
            "version": self.version,
            **header,
            "lengths": {name: len(array) for name, array in arrays.items()},
        }
        method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
        with (
            whole_file(path, self.error) as temporary,
            open(temporary, "xb") as file,
            zipfile.ZipFile(file, "w", method, compresslevel=_LEVEL) as archive,
        ):
            archive.writestr(_HEADER, json.dumps(whole))
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)

    def read(self, path: str | Path, parse: Callable[[dict[str, Any], GetArray], T]) -> T:
        """Read a file: ``parse`` gets its header, and a function that reads an array by name.

        Raises:
            the format's error: the file is missing, foreign, of another version, or damaged, or ``parse`` raised.
        """
        path = Path(path)
        if not path.is_file():
            raise self.error(f"{path} is no file; give the path of {self.what} that {self.writer} wrote")
        try:
            with zipfile.ZipFile(path) as archive:
                header = self._header(archive)
                return parse(header, lambda name: self._array(archive, name, header["lengths"]))
        except self.error as error:
            raise self.error(f"{path}: {error}") from error.__cause__
        except Exception as error:  # zipfile, zlib, numpy and json raise nearly everything where a byte has flipped
            raise self.error(
                f"{path} is not {self.what}, or is damaged ({type(error).__name__}: {error}); give what {self.writer} "
                f"wrote, or {self.remedy}"
            ) from error

    def _header(self, archive: zipfile.ZipFile) -> dict[str, Any]:
        header = json.loads(archive.read(_HEADER)) if _HEADER in archive.namelist() else None
        if not isinstance(header, dict) or header.get("format") != self.name:
            raise self.error(f"it is not {self.what}; give what {self.writer} wrote")
        version = header["version"]
        if version != self.version:
            newer = isinstance(version, int) and version > self.version
            remedy = "update torchrec_slipstream" if newer else self.remedy
            raise self.error(f"it is of version {version!r}, and this release reads version {self.version}; {remedy}")
        return header

    def _array(self, archive: zipfile.ZipFile, name: str, lengths: Mapping[str, int]) -> npt.NDArray[Any]:
        if f"{name}.npy" not in archive.namelist():
            raise self.error(f"{name}.npy is missing; {self.remedy}")
        with archive.open(f"{name}.npy") as member:
            values = np.lib.format.read_array(member, allow_pickle=False)
            # Reading to the end is what makes zipfile compare the checksum.
            if member.read(1) or len(values) != lengths[name]:
                raise self.error(
                    f"{name}.npy holds {len(values)} values or more, and the header says {lengths[name]}; {self.remedy}"
                )
        return values
