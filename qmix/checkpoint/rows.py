"""Reading a checkpoint's rows: straight reads of byte ranges, nothing mapped, nothing kept in the cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qmix.checkpoint.reader import Weight, load_pickle
from qmix.disk import read_fully
from qmix.errors import CheckpointError
from qmix.torch_dtypes import TORCH

if TYPE_CHECKING:
    from types import TracebackType


class WeightFile:
    """One weight file, open for reading rows; several threads may read at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pickle = load_pickle(path) if path.suffix != ".safetensors" else None
        try:
            self._fd = os.open(path, os.O_RDONLY) if self._pickle is None else -1
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pickle = None
        if self._fd >= 0:
            os.close(self._fd)

    def rows(self, weight: Weight, start: int, stop: int, head_dim: int = 0) -> torch.Tensor:
        """Rows [start, stop) of a weight, [stop - start, cols], in the checkpoint's own type.

        Rows of an interleaved weight are put in Hugging Face order; `start` and `stop` must then be multiples
        of `head_dim`.
        """
        raw = self._read(weight, start, stop)
        if not weight.piece.interleaved:
            return raw
        # [heads, head_dim / 2 pairs, 2, H] -> [heads, 2, head_dim / 2, H]
        return raw.view(-1, head_dim // 2, 2, weight.cols).transpose(1, 2).reshape(-1, weight.cols)

    def _read(self, weight: Weight, start: int, stop: int) -> torch.Tensor:
        if self._pickle is not None:
            tensor = self._pickle[weight.piece.tensor]
            first = weight.piece.first_row
            return tensor.reshape(-1, weight.cols)[first + start : first + stop]
        assert weight.offset is not None
        dtype = TORCH[weight.dtype]
        rows = torch.empty((stop - start, weight.cols), dtype=dtype)
        begin = weight.offset + start * weight.cols * dtype.itemsize
        try:
            read_fully(self._fd, rows.view(torch.uint8).numpy().data.cast("B"), begin)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror} while reading {weight.piece.tensor!r}") from None
        except EOFError:
            raise CheckpointError(f"{self.path}: cut short inside {weight.piece.tensor!r}; fetch it again") from None
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, begin, rows.nbytes, os.POSIX_FADV_DONTNEED)
        return rows
