"""The model that a plan is for: the layout of its store, made or not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from qmix.checkpoint import open_checkpoint
from qmix.errors import UsageError, arg
from qmix.geometry import Geometry
from qmix.models.published import PUBLISHED
from qmix.store.expert_frequency import ExpertFrequency
from qmix.store.layout import StoreLayout
from qmix.store.profile import Profile
from qmix.store.sources import AS_IT_IS, DEFAULT_PRECISION, layout_for, named_store, open_source, precisions_of


@dataclass(frozen=True)
class PlanTarget:
    """A model as it was named, the layout of its store, and a digest of its weights if known.

    `use` is how often each expert is used, if measured; `is_store` is true for a store that exists.
    """

    name: str
    layout: StoreLayout
    fingerprint: str | None
    use: ExpertFrequency | None = None
    is_store: bool = False

    @property
    def geometry(self) -> Geometry:
        return self.layout.geometry

    def calibrated(self, profile: Profile, precision: str | None) -> PlanTarget:
        """Return the target with a profile's use and, if given, another precision.

        Raises UsageError where it is a store of another precision, which cannot be changed.
        """
        if precision is None:
            return replace(self, use=profile.use)
        precisions = precisions_of(precision, self.geometry)
        if self.is_store and precisions != self.layout.precisions:
            raise UsageError(f"{arg('precision')} {precision}: not that of the store {self.name}; {AS_IT_IS}")
        return replace(self, use=profile.use, layout=replace(self.layout, precisions=precisions))


def target_of(model: str | Path, precision: str | None, dtype: str | None) -> PlanTarget:
    """Return the target of a model from its config and headers alone, or from the table of published models."""
    published = PUBLISHED.get(str(model))
    if published is not None and not Path(model).is_dir():
        precisions = precisions_of(DEFAULT_PRECISION if precision is None else precision, published.geometry)
        return PlanTarget(str(model), StoreLayout(published.geometry, precisions, dtype or "bf16"), None)
    store = named_store(model, precision, dtype)
    if store is not None:
        return PlanTarget(str(model), store.layout, store.fingerprint, store.use, is_store=True)
    checkpoint = open_checkpoint(open_source(model))
    return PlanTarget(str(model), layout_for(checkpoint, precision, dtype), checkpoint.known_fingerprint)
