"""From whatever names a model to an opened store, quantising a checkpoint once into the user's cache.

The quantiser runs in a process of its own: its compiler and buffers would otherwise stay in the memory of the
run that follows, and count against its budget.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from qmix.checkpoint import Checkpoint, hub, open_checkpoint
from qmix.checkpoint.foreign import check_file, hub_snapshot
from qmix.checkpoint.reader import check_tokenizer
from qmix.checkpoint.source import HubSource, LocalSource, Source
from qmix.errors import REMAKE, HubError, QmixError, StoreError, UsageError
from qmix.files import decode_json
from qmix.geometry import Geometry
from qmix.machine.found import (
    cache_directory,
    default_budget,
    found_gpus,
    free_disk,
    interpreter_memory,
)
from qmix.machine.measured import four_bit_products, measured_rates
from qmix.machine.rates import Machine
from qmix.models import EMBEDDED
from qmix.models.published import PUBLISHED
from qmix.plan import Plan, default_context, make_plan
from qmix.precision.formats import DTYPES, FOUR_BITS, uses_kernels
from qmix.progress import OnProgress, Progress, counted, ignore
from qmix.store.expert_frequency import Use
from qmix.store.layout import StoreLayout, has_blocks, parse_precisions
from qmix.store.opened import MANIFEST, Store, is_store, open_store, partial_directory, read_manifest
from qmix.store.profile import Profile
from qmix.store.request import Message, Request
from qmix.store.writer import bring_small_files
from qmix.units import parse_bytes

DEFAULT_PRECISION = "nf4"
CHECKPOINTS = "checkpoints"  # in the cache: fingerprints of checkpoints that were read
IDENTITY_LENGTH = 12  # of the identity's digits, in a store's name
# `-m` would take a qmix that lies in the working directory, and its embedded model, for the one that runs
SAME_QMIX = (
    "import runpy, sys; sys.path[0] = sys.argv.pop(1); "
    "runpy.run_module('qmix.store.child', run_name='__main__', alter_sys=True)"
)
SLUG_LENGTH = 100  # of the 255 bytes that a file's name may have, four to a character at worst
AS_IT_IS = "leave it out, or quantize its checkpoint"
NOTHING_TO_CLIP = f"has no expert in {' or '.join(FOUR_BITS)}, whose scales it chooses; leave it out"
COMPARING = "comparing its weights with those that were read before"
INTERRUPTED = "interrupted; the same command goes on where it was stopped"


def open_source(model: str | Path, scratch: Path | None = None) -> Source:
    """The files of a checkpoint: an embedded model, a directory, or `org/name[@revision]` on the hub.

    With `scratch`, weight files from the hub pass through there and are deleted when used. Raises UsageError
    where the name is none of these.
    """
    if not str(model):
        raise UsageError("the model's name is empty; leave it out for the embedded one")
    embedded = EMBEDDED.get(str(model))
    path = embedded or Path(model).expanduser()
    if is_store(path):
        raise UsageError(f"{model}: is a store already; name the checkpoint that it was made from")
    if path.is_dir():
        return LocalSource(hub_snapshot(path), cache_directory() / CHECKPOINTS)
    check_file(path)
    if str(model) in PUBLISHED:
        known = PUBLISHED[str(model)].hub_id
        raise UsageError(f"{model}: is known by its sizes only, for plans; its weights are {known} on the hub")
    if hub.parse(str(model)) is None:
        raise UsageError(f"{model}: no such directory, nor a hub id (org/name), nor one of {', '.join(EMBEDDED)}")
    return HubSource(hub.HubRepo.open(str(model)), scratch)


def layout_for(
    checkpoint: Checkpoint, precision: str | None, dtype: str | None, clip: bool = False, option: str = "--precision"
) -> StoreLayout:
    """The layout of a checkpoint's store.

    Raises UsageError for a precision, which `option` gave, or a dtype that is none, and where there is nothing to clip.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"{dtype!r} is not a half precision; choose one of {', '.join(DTYPES)}")
    precisions = _precisions(DEFAULT_PRECISION if precision is None else precision, checkpoint.geometry, option)
    if clip and not has_blocks(precisions):
        raise UsageError(f"--clip: {precision} {NOTHING_TO_CLIP}")
    return StoreLayout(checkpoint.geometry, precisions, dtype or checkpoint.half_dtype, clip)


def _precisions(spec: str, geometry: Geometry, option: str = "--precision") -> tuple[tuple[str, ...], ...]:
    try:
        return parse_precisions(spec, geometry)
    except UsageError as error:
        raise UsageError(f"{option}: {error}") from None


def prepare_store(
    model: str | Path,
    precision: str | None = None,
    dtype: str | None = None,
    on_progress: OnProgress = ignore,
    check: Callable[[StoreLayout], object] = lambda layout: None,
    clip: bool = False,
) -> Store:
    """The store of a model, made first if there is none yet; `check` may refuse its layout before that."""
    store = _named_store(model, precision, dtype, clip)
    if store is not None:
        return store
    cache = cache_directory()
    try:
        checkpoint = open_checkpoint(open_source(model))
    except HubError:
        made = sorted(cache.glob(f"{_slug(model, precision, dtype, clip)}-*/"), key=lambda store: store.stat().st_mtime)
        finished = [store for store in made if is_store(store)]
        if not finished:
            raise
        return open_store(finished[-1])
    layout = layout_for(checkpoint, precision, dtype, clip)
    slug = _slug(model, precision, dtype, clip)
    directory = _place(checkpoint, slug, on_progress)
    if not is_store(directory):
        check(layout)
        check_tokenizer(checkpoint.source)
        from qmix.engine.usable import check_usable  # loads transformers, which a plan does without

        check_usable(checkpoint, layout.dtype)
        _quantize_in_child(checkpoint, model, precision, dtype, clip, directory, on_progress)
    known = checkpoint.known_fingerprint
    store = open_store(directory) if known is None else bring_small_files(checkpoint, known, directory)
    if known is not None and store.fingerprint != known:
        raise StoreError(f"{directory}: was not made from {model} as it is now; {REMAKE}")
    assert store.layout == layout
    return store


def _place(checkpoint: Checkpoint, slug: str, on_progress: OnProgress) -> Path:
    """Return where the cache has the store of a checkpoint, or is to have it.

    It is found by the checkpoint's identity. Where that is new, as of a copy, but there are stores of the same name and
    precision, the checkpoint is read, to compare its weights with those that they were made from.
    """
    directory = cache_directory() / f"{slug}-{checkpoint.identity[:IDENTITY_LENGTH]}"
    others = _fingerprints(slug)
    if is_store(directory) or not others:
        return directory
    return others.get(fingerprint_of(checkpoint, on_progress), directory)


def fingerprint_of(checkpoint: Checkpoint, on_progress: OnProgress = ignore) -> str:
    """Return a checkpoint's fingerprint, for which all of it is read where it is not known."""
    known = checkpoint.known_fingerprint
    if known is not None:
        return known
    from qmix.checkpoint.fingerprint import read_fingerprint  # loads torch, which a plan does without

    total = sum(weight.nbytes for weight in checkpoint.weights.values())
    return read_fingerprint(checkpoint, counted(total, on_progress, COMPARING))


def _fingerprints(slug: str) -> dict[str, Path]:
    """Return the stores of this name and precision in the cache, by the fingerprint of what they were made from."""
    found = {}
    for path in cache_directory().glob(f"{slug}-{'[0-9a-f]' * IDENTITY_LENGTH}"):
        with suppress(StoreError):  # a damaged one is nobody's
            if is_store(path):
                found[read_manifest(path / MANIFEST)[1].source.fingerprint] = path
    return found


def _named_store(model: str | Path, precision: str | None, dtype: str | None, clip: bool = False) -> Store | None:
    """The store that `model` names, None where it names no store. Raises StoreError if it is unfinished."""
    path = Path(model).expanduser()
    if not str(model) or str(model) in EMBEDDED or not (is_store(path) or partial_directory(path).is_dir()):
        return None
    store = open_store(path)
    if precision is not None and _precisions(precision, store.geometry) != store.layout.precisions:
        raise UsageError(f"--precision {precision}: the store {store.directory} has another; {AS_IT_IS}")
    if dtype and dtype != store.layout.dtype:
        raise UsageError(f"--dtype {dtype}: the store {store.directory} has {store.layout.dtype}; {AS_IT_IS}")
    if clip and not store.layout.clip:
        raise UsageError(f"--clip: the store {store.directory} was made without; {AS_IT_IS}")
    return store


def _slug(model: str | Path, precision: str | None, dtype: str | None, clip: bool) -> str:
    named = str(model) if hub.parse(str(model)) else Path(model).expanduser().absolute().name
    asked = f"{named.replace('/', '--')}-{precision or DEFAULT_PRECISION}{'-clip' * clip}-{dtype or 'half'}"
    plain = re.sub(r"[^\w.@-]+", "_", asked)
    if plain == asked and len(plain) <= SLUG_LENGTH:
        return plain
    return f"{plain[:SLUG_LENGTH]}-{hashlib.sha256(os.fsencode(asked)).hexdigest()[:8]}"


def _quantize_in_child(
    checkpoint: Checkpoint,
    model: str | Path,
    precision: str | None,
    dtype: str | None,
    clip: bool,
    directory: Path,
    on_progress: OnProgress,
) -> None:
    request = Request(str(model), checkpoint.identity, str(directory), precision, dtype, clip)
    command = [
        sys.executable,
        "-c",
        SAME_QMIX,
        str(Path(__file__).parents[2]),
        msgspec.json.encode(request).decode(),
    ]
    pipe = subprocess.PIPE
    # in a session of its own: a Ctrl-C reaches it once, from here, and not a second time while it is ending
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, start_new_session=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        try:
            for line in child.stdout:
                message = decode_json(line, Message, f"quantizing {model}", QmixError, "report this as a bug of qmix")
                if message.error:
                    error = QmixError(message.error)
                    error.exit_code = message.exit_code
                    raise error
                on_progress(Progress(message.done, message.total, message.note))
        except BaseException as error:
            child.send_signal(signal.SIGINT)  # it notes what it has finished, and ends
            child.wait()  # or the same command, given again at once, would find it writing
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(INTERRUPTED) from None
            raise
        complaint = child.stderr.read().decode(errors="replace").strip().splitlines()[-1:]
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        raise QmixError(f"quantizing {model}: ended by {name}; the same command goes on where it was stopped")
    if child.returncode != 0:
        raise QmixError(f"quantizing {model} ended with status {child.returncode}: {''.join(complaint)}")


@dataclass(frozen=True)
class Subject:
    """What a plan is about: a model as it was named, the layout of its store, and a digest of its weights if known.

    `use` is how often each expert is used, where that was measured; `is_store` says whether it is made already.
    """

    name: str
    layout: StoreLayout
    fingerprint: str | None
    use: Use | None = None
    is_store: bool = False

    @property
    def geometry(self) -> Geometry:
        return self.layout.geometry

    def calibrated(self, profile: Profile, precision: str | None) -> Subject:
        """With a profile's use, in a precision of which it says more than was known; a store's cannot be changed."""
        if precision is None:
            return replace(self, use=profile.use)
        precisions = _precisions(precision, self.geometry)
        if self.is_store and precisions != self.layout.precisions:
            raise UsageError(f"--precision {precision}: the store {self.name} has another; {AS_IT_IS}")
        return replace(self, use=profile.use, layout=replace(self.layout, precisions=precisions))


def subject_of(model: str | Path, precision: str | None, dtype: str | None) -> Subject:
    """From config and headers alone, or from what is known of a published model by its name."""
    published = PUBLISHED.get(str(model))
    if published is not None and not Path(model).is_dir():
        precisions = _precisions(DEFAULT_PRECISION if precision is None else precision, published.geometry)
        return Subject(str(model), StoreLayout(published.geometry, precisions, dtype or "bf16"), None)
    store = _named_store(model, precision, dtype)
    if store is not None:
        return Subject(str(model), store.layout, store.fingerprint, store.use, is_store=True)
    checkpoint = open_checkpoint(open_source(model))
    return Subject(str(model), layout_for(checkpoint, precision, dtype), checkpoint.known_fingerprint)


def this_machine(ram: int | str | None = None, gpus: Sequence[int] | None = None) -> Machine:
    """This machine as it is found and was measured, with the memory that is given."""
    budget = default_budget() if ram is None else parse_bytes(ram)
    return Machine(
        ram=budget,
        gpus=found_gpus() if gpus is None else tuple(gpus),
        disk=free_disk(cache_directory()),
        rates=measured_rates(),
        four_bit=four_bit_products(),
    )


def plan_for(
    layout: StoreLayout,
    ram: int | str | None,
    context: int | None,
    attention: str = "sdpa",
    batch: int = 1,
    *,
    machine: Machine | None = None,
    use: Use | None = None,
) -> Plan:
    """The plan of a store on a machine, by default this one, with the defaults that `qmix.load` has."""
    longest = layout.geometry.max_position
    if context is not None and not 1 <= context <= longest:
        raise UsageError(f"--context {context}: must be 1 to {longest}, the model's longest")
    on = machine or this_machine(ram)
    tokens = context or default_context(layout.geometry)
    own = interpreter_memory(kernels=uses_kernels(layout.geometry))
    return make_plan(layout, on.ram, tokens, own, attention, batch, gpus=on.gpus, rates=on.speeds, use=use)
