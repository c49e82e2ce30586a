"""Calibrate a checkpoint: measure its routing and its experts in one layer-wise pass of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from calibration.corpus import Passage
from calibration.routing import RoutingRecorder, RoutingStatistics
from calibration.sensitivity import KINDS, SAMPLES, SensitivityMeter, Table
from qmix.checkpoint import Checkpoint
from qmix.engine.checkpoint_weights import CheckpointWeights
from qmix.engine.layerwise import run_layers
from qmix.engine.passes import plain_pass
from qmix.engine.variants import Quantised
from qmix.geometry import Geometry
from qmix.plan.memory import calibration_bytes, layerwise_bytes
from qmix.pool.prefetch import DEPTH
from qmix.pool.replay import Replay, replay
from qmix.progress import OnProgress, ignore
from qmix.store.allocation import Allocation, Allocator
from qmix.store.layout import StoreLayout, parse_precisions
from qmix.store.profile import Profile
from qmix.store.sources import DEFAULT_PRECISION

UNKNOWN = "text"  # language of text without a named one


@dataclass(frozen=True)
class Calibration:
    """Measurements of a model: its routing, and by format each expert's quantisation error, [layer][expert].

    `dtype` is the type of half precision. `budget` is the bytes of all experts for which to choose precisions, if any.
    """

    name: str
    fingerprint: str
    geometry: Geometry
    dtype: str
    routing: RoutingStatistics
    errors: Mapping[str, Table]
    sampled: Sequence[Sequence[int]]
    budget: int | None = None

    @cached_property
    def replay(self) -> Replay:
        """Hit rates of the recorded routing in pools of every size."""
        return replay(self.routing.trace, self.geometry.num_layers, self.geometry.num_experts)

    @cached_property
    def allocator(self) -> Allocator:
        """Chooses precisions by the measured errors."""
        return self._profile.allocator(self.geometry, self.dtype)

    @cached_property
    def chosen(self) -> Allocation | None:
        """The precisions of least error within the budget."""
        return None if self.budget is None else self.allocator.within(self.budget)

    @cached_property
    def profile(self) -> Profile:
        """The part of the measurements that plans and runs use."""
        return replace(self._profile, precisions=None if self.chosen is None else self.chosen.precisions)

    @property
    def layout(self) -> StoreLayout:
        """Layout of a store in the profile's precisions."""
        precisions = self.profile.precisions or parse_precisions(DEFAULT_PRECISION, self.geometry)
        return StoreLayout(self.geometry, precisions, self.dtype)

    @property
    def uniform(self) -> dict[str, tuple[int, float]]:
        """Bytes of all experts and the sum of their errors, by format, if all have that format."""
        records = self.geometry.num_records
        weights = sum(rows * cols for rows, cols in self.geometry.expert_matrices.values())
        found = {kind.name: (records * kind.nbytes(weights), sum(map(sum, self.errors[kind.name]))) for kind in KINDS}
        return {**found, "half": (2 * records * weights, 0.0)}

    def to_json(self) -> dict[str, Any]:
        """Return the content of a profile's file: the profile, and further figures for people to read."""
        return self.profile.to_json() | {
            "budget": self.budget,
            "routing": self.routing.to_json(),
            "sampled": [list(row) for row in self.sampled],
            "replay": self.replay.to_json(),
        }

    @cached_property
    def _profile(self) -> Profile:
        errors = {name: tuple(map(tuple, table)) for name, table in self.errors.items()}
        use = tuple(map(tuple, self.routing.use.tolist()))
        return Profile(self.name, self.fingerprint, use, errors, policy=self.replay.recommended())


def half(checkpoint: Checkpoint, dtype: str) -> Quantised:
    """Return the variant to calibrate: all experts in half precision."""
    geometry = checkpoint.geometry
    precisions = tuple(("half",) * geometry.num_experts for _ in range(geometry.num_layers))
    return Quantised("half", geometry, precisions, dtype)


def bytes_needed(checkpoint: Checkpoint, dtype: str, tokens: int, window: int) -> int:
    """Return the bytes that calibrating takes besides Python, for tokens in windows of at most `window`."""
    measuring = calibration_bytes(checkpoint.geometry, tokens, SAMPLES, DEPTH)
    return measuring + layerwise_bytes(checkpoint, tokens, window, [half(checkpoint, dtype).held])


def calibrate(
    checkpoint: Checkpoint,
    dtype: str,
    passages: Sequence[Passage],
    budget: int | None = None,
    on_progress: OnProgress = ignore,
) -> Calibration:
    """Run passages through a checkpoint once and measure it. Raises CheckpointError or HubError."""
    geometry = checkpoint.geometry
    sequences = [passage.ids for passage in passages]
    languages = [passage.language or UNKNOWN for passage in passages]
    with CheckpointWeights(checkpoint, dtype, [half(checkpoint, dtype)], on_progress) as weights:
        recorder = RoutingRecorder(geometry, *weights.routers(), sequences, languages)
        meter = SensitivityMeter(geometry, weights.activation)
        run_layers(weights, plain_pass(sequences), [recorder, meter])
        fingerprint = weights.fingerprint()
    name = Path(checkpoint.source.name).absolute().name
    model = name, fingerprint, geometry, dtype
    return Calibration(*model, recorder.result(), meter.errors, meter.sampled, budget)
