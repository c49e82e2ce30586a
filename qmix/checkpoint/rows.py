"""Read rows of a checkpoint's weights past the page cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from qmix.checkpoint.reader import Weight, load_pickle
from qmix.checkpoint.torch_dtypes import TORCH
from qmix.disk.direct import DirectFile, DirectMemory
from qmix.disk.faults import disk_advice
from qmix.errors import CheckpointError

if TYPE_CHECKING:
    from types import TracebackType


class WeightFile:
    """A weight file open for reading rows, from several threads at once if need be."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pickle = load_pickle(path) if path.suffix != ".safetensors" else None
        try:
            self._file = DirectFile(path) if self._pickle is None else None
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}; {disk_advice(error)}") from None

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pickle = None
        if self._file is not None:
            self._file.close()

    def rows(
        self, weight: Weight, start: int, stop: int, head_dim: int = 0, memory: DirectMemory | None = None
    ) -> torch.Tensor:
        """Return rows [start, stop) of a weight, [stop - start, cols], in the checkpoint's own type.

        They lie in `memory` if it is given, and are valid until it is used again. Rows of an interleaved weight are put
        in Hugging Face order; `start` and `stop` must then be multiples of `head_dim`.
        """
        raw = self._columns(weight, start, stop) if weight.piece.transposed else self._read(weight, start, stop, memory)
        if not weight.piece.interleaved:
            return raw
        # [heads, head_dim / 2 pairs, 2, H] -> [heads, 2, head_dim / 2, H]
        return raw.view(-1, head_dim // 2, 2, weight.cols).transpose(1, 2).reshape(-1, weight.cols)

    def _columns(self, weight: Weight, start: int, stop: int) -> torch.Tensor:
        """Return rows of a transposed weight, [cols, rows] in the file; mapped, since each row touches all of it."""
        piece = weight.piece
        last = piece.first_row + weight.cols
        if self._pickle is not None:
            return self._pickle[piece.tensor][piece.first_row : last, start:stop].T.contiguous()
        with safe_open(self.path, "pt") as file:
            columns: torch.Tensor = file.get_slice(piece.tensor)[piece.first_row : last, start:stop]
        return columns.T.contiguous()

    def _read(self, weight: Weight, start: int, stop: int, memory: DirectMemory | None) -> torch.Tensor:
        if self._pickle is not None:
            tensor = self._pickle[weight.piece.tensor]
            first = weight.piece.first_row
            return tensor.reshape(-1, weight.cols)[first + start : first + stop]
        assert self._file is not None
        assert weight.offset is not None
        dtype = TORCH[weight.dtype]
        begin = weight.offset + start * weight.cols * dtype.itemsize
        nbytes = (stop - start) * weight.cols * dtype.itemsize
        memory = memory or DirectMemory(nbytes)
        try:
            data = self._file.read(memory, begin, nbytes)
        except OSError as error:
            what = f"{error.strerror} while reading {weight.piece.tensor!r}"
            raise CheckpointError(f"{self.path}: {what}; {disk_advice(error)}, and fetch the file again") from None
        except EOFError as error:
            what = f"cut short inside {weight.piece.tensor!r}, {error}"
            raise CheckpointError(f"{self.path}: {what}; fetch it again") from None
        if begin % dtype.itemsize:  # after a header of odd length: kernels need aligned numbers
            memory.view[:nbytes] = data
            data = memory.view[:nbytes]
        return torch.frombuffer(data, dtype=dtype).view(-1, weight.cols)
