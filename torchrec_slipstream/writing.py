"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchrec_slipstream.errors import SlipstreamError


@contextmanager
def whole_file(path: str | os.PathLike[str], error: type[SlipstreamError]) -> Iterator[Path]:
    """Gives a path to write to, whose file takes the place of ``path`` at the end; none is left where that fails.

    Raises:
        error: the path cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as failed:
        raise error(f"cannot write {path}: {failed.strerror or failed}; give a path that can be written") from failed
