"""`qmix show`: the details of one store."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qmix.commands.shared import out
from qmix.errors import DoesNotFitError, StoreError
from qmix.units import format_bytes, plural, size_option

if TYPE_CHECKING:
    from qmix.store.listing import StoreEntry
    from qmix.store.opened import Store

TEMPLATES = ("chat_template.jinja", "tokenizer_config.json")


@click.command()
@click.argument("store")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object instead of a table")
def show(store: str, as_json: bool) -> None:
    """Show a store: its model, precisions, sizes and needs.

    STORE is a store's path, or its id or model as `qmix ls` shows them. Reads no weights: `qmix verify` checks them.
    """
    from qmix.disk.places import cache_directory
    from qmix.store.listing import find_store
    from qmix.store.opened import open_store

    entry = find_store(store, cache_directory())
    if entry.state == "partial":
        raise StoreError(
            f"{entry.directory}: unfinished, {format_bytes(entry.nbytes)} so far; the command that began it continues "
            f"it (`qmix pull {entry.model}`, or the same `qmix quantize`), `qmix rm {entry.id}` removes it"
        )
    found = details(entry, open_store(entry.directory))
    if as_json:
        out(json.dumps({"schema": "qmix-store-details-1", **found}) + "\n")
        return
    from rich.table import Table
    from rich.text import Text

    from qmix.terminal.tables import print_table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, text in _rows(entry, found):
        table.add_row(name, Text(text, overflow="fold"))
    print_table(table)


def details(entry: StoreEntry, store: Store) -> dict[str, Any]:
    """Return what is known of a store without reading its weights; sizes in bytes."""
    counts = Counter(name for row in store.layout.precisions for name in row)
    return {
        **entry.to_json(),
        "source": store.source_name,
        "fingerprint": store.fingerprint,
        "digest": store.digest,
        "geometry": asdict(store.geometry),
        "experts": dict(counts.most_common()),
        "clip": store.layout.clip,
        "profile": store.profile is not None,
        "chat_template": _has_template(store.directory),
        "bytes_by_kind": _bytes_by_kind(store),
        "made": datetime.fromtimestamp((store.directory / "qmix.json").stat().st_mtime).astimezone().isoformat(),
        "smallest_ram": smallest_ram(store),
    }


def smallest_ram(store: Store) -> int:
    """Return the least --ram that a run takes, in bytes, with the default context and no GPU."""
    from qmix.plan.here import plan_for, this_machine

    try:
        return plan_for(store.layout, None, None, machine=this_machine("1MiB", ["none"])).total
    except DoesNotFitError as error:
        return error.smallest


def _has_template(directory: Path) -> bool:
    """Return True if a conversation is rendered by a template of the model."""
    from qmix.files import read_json

    if (directory / TEMPLATES[0]).is_file():
        return True
    path = directory / TEMPLATES[1]
    return path.is_file() and bool(read_json(path, dict[str, Any], StoreError, "").get("chat_template"))


def _bytes_by_kind(store: Store) -> dict[str, int]:
    """Return the sizes of the files: dense weights, experts, and all others."""
    sizes = {path.name: path.stat().st_size for path in store.directory.iterdir() if path.is_file()}
    dense = sizes.pop(store.layout.dense.name)
    experts = sum(sizes.pop(file.name) for file in store.layout.files if file.name in sizes)
    return {"dense": dense, "experts": experts, "small_files": sum(sizes.values())}


def _rows(entry: StoreEntry, found: dict[str, Any]) -> list[tuple[str, str]]:
    from qmix.commands.ls import used

    geometry, kinds = found["geometry"], found["bytes_by_kind"]
    experts = ", ".join(f"{count} in {name}" for name, count in found["experts"].items())
    clip = ", scales of least squared error (--clip)" if found["clip"] else ""
    return [
        ("model", found["model"]),
        ("directory", found["directory"]),
        ("made", found["made"][:16].replace("T", " ")),
        ("last use", used(entry.last_use, entry.in_use)),
        (
            "geometry",
            f"{plural(geometry['num_layers'], 'layer')} of {plural(geometry['num_experts'], 'expert')}, "
            f"{geometry['experts_per_token']} for each token; hidden size {geometry['hidden_size']}, "
            f"intermediate size {geometry['intermediate_size']}, vocabulary {geometry['vocab_size']}, "
            f"longest context {geometry['max_position']}",
        ),
        ("experts", f"{experts}{clip}, {format_bytes(kinds['experts'])}"),
        ("dense weights", f"{found['dtype']}, {format_bytes(kinds['dense'])}"),
        ("small files", format_bytes(kinds["small_files"])),
        ("profile", "yes: which experts are used most is known" if found["profile"] else "none"),
        ("chat template", "yes" if found["chat_template"] else "none: a base model, it continues text"),
        ("least memory", f"--ram {size_option(found['smallest_ram'])}, without a GPU"),
        ("fingerprint", found["fingerprint"]),
        ("digest", found["digest"]),
    ]
