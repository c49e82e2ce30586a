"""`qmix batch merge`: join the answers of several machines."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from qmix.commands.shared import EXIT_SOME_REFUSED
from qmix.errors import UsageError
from qmix.units import plural

ORDER_HELP = "write the answers in the order of these requests [shard after shard]"


@click.command()
@click.argument("shards", metavar="SHARD.jsonl...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", metavar="OUT.jsonl", type=click.Path(path_type=Path), required=True, help="all answers")
@click.option("--order", metavar="IN.jsonl", type=click.Path(path_type=Path), help=ORDER_HELP)
def merge(shards: tuple[Path, ...], output: Path, order: Path | None) -> None:
    """Join the answers of all shards of a batch.

    The SHARD.jsonl files are the outputs of `qmix batch --shard`, in any order. Each is checked: that it is finished,
    and that its input, model and options are those of the others. Without --shard, `qmix batch` with the same options
    takes OUT.jsonl for its own output. Exit code: 4 if some lines could not be answered.
    """
    from qmix.batch.lines import Requests
    from qmix.batch.merge import merge_shards
    from qmix.terminal.voice import say

    with ExitStack() as stack:
        requests = None
        if order is not None:
            try:
                requests = Requests(stack.enter_context(order.open("rb")))
            except OSError as error:
                raise UsageError(f"{order}: {error.strerror}; give the file that the shards answered") from None
        done = merge_shards(shards, output, requests)
    refused = f", {plural(done.refused, 'error')}" if done.refused else ""
    say(f"{output}: {plural(done.lines, 'line')} of {plural(done.shards, 'shard')}{refused}")
    if done.refused:
        raise click.exceptions.Exit(EXIT_SOME_REFUSED)
