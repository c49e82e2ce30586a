"""`qmix serve`: a model for programs that speak OpenAI's or Anthropic's interface."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qmix.commands.options import (
    batch_gpu_option,
    clip_option,
    context_option,
    dtype_option,
    live_option,
    plan_option,
    precision_option,
    ram_option,
)
from qmix.commands.settings import set_by, variable
from qmix.commands.shared import (
    LOADING_PATIENCE,
    batch_gpus,
    hold_to,
    live_screen,
    load_libraries,
    model_or_default,
    read_plan_option,
    warn_of_drive,
)
from qmix.disk.places import state_directory
from qmix.errors import QmixError, UsageError, arg
from qmix.terminal.voice import say
from qmix.units import plural

if TYPE_CHECKING:
    from socket import socket

    from qmix.serve.guard import Access
    from qmix.serve.server import Settings
    from qmix.store.layout import StoreLayout
    from qmix.store.opened import Store
    from qmix.terminal.live import LiveScreen

LOCAL = "127.0.0.1"
KEY_VARIABLE = "QMIX_API_KEY"
LIBRARIES = ("starlette", "uvicorn", "httptools", "prometheus_client", "python_multipart")
KV_HELP = "tokens of prompts and answers of all requests at once [4 contexts]"
BATCH_HELP = "requests computed together"
HOST_HELP = "address to listen on; other than this machine's own takes --api-key or --insecure"
KEY_HELP = f"key that clients must send [{KEY_VARIABLE}]"
NAME_HELP = "name by which clients ask for the model; repeatable [the model's own]"
CORS_HELP = "origin whose web pages may use the server, such as http://localhost:3000; repeatable"
FOLDER_HELP = "uploaded files and batches [the user's state directory]"


@click.command()
@click.argument("model", required=False)
@click.option("--host", default=LOCAL, show_default=True, metavar="ADDRESS", help=HOST_HELP)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes any free one")
@click.option("--api-key", metavar="KEY", help=KEY_HELP)
@click.option("--insecure", is_flag=True, help="let everybody on the network use the server")
@click.option("--cors", "origins", multiple=True, metavar="ORIGIN", help=CORS_HELP)
@click.option("--model-name", "names", multiple=True, metavar="NAME", help=NAME_HELP)
@click.option("--batch", type=click.IntRange(1, 256), default=32, show_default=True, metavar="N", help=BATCH_HELP)
@click.option("--queue", type=click.IntRange(0, 4096), default=128, show_default=True, help="requests that may wait")
@ram_option
@batch_gpu_option
@context_option
@click.option("--kv-cache", type=click.IntRange(min=1), metavar="TOKENS", help=KV_HELP)
@precision_option
@clip_option
@dtype_option
@plan_option
@click.option("--directory", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help=FOLDER_HELP)
@live_option
def serve(model: str | None, host: str, port: int, live: bool, **options: Any) -> None:
    """Serve MODEL over HTTP, as OpenAI and Anthropic do.

    Paths: /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, /v1/models, /v1/files, /v1/batches,
    /health and /metrics. The page at / tries the model and shows it at work. Requests are computed together. Ctrl-C
    lets running requests end, a second one cuts them; the exit code is 130. Batches continue when the server is started
    again.
    """
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"serve: the package {missing[0]} is not installed; pip install 'qmix-moe[serve]'")
    from qmix.plan.memory import REQUESTS_BYTES
    from qmix.serve.server import Settings, listen

    access = _access(host, options["api_key"], options["insecure"], options["origins"])
    loading = {name: options[name] for name in ("ram", "context", "kv_cache", "batch", "precision", "clip", "dtype")}
    loading["plan"] = read_plan_option(options["plan_path"], ram=options["ram"], context=options["context"])
    _tell_of_service_link()
    with listen(host, port) as listening:
        name = model_or_default(model)
        screen = live_screen(live, f"qmix serve: {name}")
        store, plan, context = _planned(name, gpu=options["gpu"], **loading)
        hold_to(plan.ram)
        warn_of_drive(store.directory)
        settings = Settings(
            names=frozenset(options["names"] or [store.source_name]),
            context=context,
            queue=options["queue"],
            memory=REQUESTS_BYTES,
            access=access,
            directory=_writable(options["directory"] or state_directory() / "serve" / _identity(store)),
        )
        _run(name, store, plan, settings, listening, f"[{host}]" if ":" in host else host, screen)


def _run(
    name: str, store: Store, plan: Any, settings: Settings, listening: socket, host: str, screen: LiveScreen | None
) -> None:
    """Load the model and serve it until a signal comes. `host` is as in an address."""
    from qmix.engine.batch import BatchRunner
    from qmix.serve.server import serve as run
    from qmix.terminal.progress import ProgressDisplay

    with ProgressDisplay(f"loading {name}", LOADING_PATIENCE) as load:
        runner = BatchRunner(store, plan, load)
    with runner:
        ready = (
            f"serving {', '.join(sorted(settings.names))} at http://{host}:{listening.getsockname()[1]}: "
            f"{plural(plan.batch, 'request')} at once, {settings.context} tokens each, {runner.capacity} together"
        )
        if screen is None:
            run(runner, settings, listening, ready, say)
        else:
            run(runner, settings, listening, ready, screen.say, lambda watch: screen.showing(watch.figures))


def _tell_of_service_link() -> None:
    """Say that QMIX_PORT is not used where Kubernetes set it, unless `--port` was typed."""
    text = os.environ.get(variable("port"), "")
    typed = click.get_current_context().get_parameter_source("port") is click.core.ParameterSource.COMMANDLINE
    if text and not set_by(os.environ, "port") and not typed:
        say(f"{variable('port')} is {text}, which Kubernetes sets for a service called qmix: not used, give --port")


def _writable(directory: Path) -> Path:
    """Return a directory for files, made if need be. Raises QmixError, before the model is loaded."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise QmixError(f"{directory}: {error.strerror}; choose another {arg('directory')}") from None
    return directory


def _identity(store: Store) -> str:
    """Return a name for the directory of a store's batches, which only the same weights can continue."""
    parts = json.dumps(sorted(store.parts.items()))
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _access(host: str, key: str | None, insecure: bool, origins: tuple[str, ...]) -> Access:
    """Return who may use the server. Raises UsageError where the network could use it without a key."""
    from qmix.serve.guard import Access
    from qmix.serve.server import is_local, local_hosts

    if insecure and (key is not None or is_local(host)):
        raise UsageError(f"{arg('insecure')}: only for another {arg('host')} without a key; leave it out")
    if not is_local(host) and key is None and not insecure:
        raise UsageError(f"{arg('host')} {host}: anybody on the network could use it; give {arg('api_key', 'KEY')}")
    if key is not None and not (key and key.isascii() and key.isprintable() and key.strip() == key):
        raise UsageError(f"{arg('api_key')}: must be printable ASCII, not empty, without spaces at its ends")
    for origin in origins:
        if origin == "*" or "://" not in origin or origin.endswith("/"):
            raise UsageError(f"--cors {origin}: must be an origin such as http://localhost:3000")
    return Access(key, local_hosts(host) if is_local(host) else None, origins)


def _planned(
    name: str,
    gpu: tuple[str, ...],
    ram: int | None,
    context: int | None,
    kv_cache: int | None,
    batch: int,
    precision: str | None,
    clip: bool,
    dtype: str | None,
    plan: Any,
) -> tuple[Store, Any, int]:
    """Return the store, its plan, and the context of a request."""
    if plan is not None and gpu:
        raise UsageError("--plan and --gpu: the plan sets it already; leave one of them out")
    gpus = batch_gpus(plan, gpu, ram)
    load_libraries()
    from qmix.engine.resolve import prepare_store
    from qmix.plan.batching import plan_server
    from qmix.plan.here import default_context
    from qmix.terminal.progress import ProgressDisplay

    if plan is not None:
        ram, context, precision = plan.plan.ram, plan.plan.context, precision or plan.precision

    def planned(layout: StoreLayout, fingerprint: str | None = None, use: Any = None) -> tuple[Any, int]:
        if plan is not None:
            plan.plan_of(layout, fingerprint)
        longest = layout.geometry.max_position
        if context is not None and context > longest:
            raise UsageError(f"{arg('context')} {context}: must be 1 to {longest}, the model's longest")
        tokens = context or default_context(layout.geometry)
        if kv_cache is not None and kv_cache < tokens:
            raise UsageError(f"{arg('kv_cache')} {kv_cache}: must be at least the {arg('context')}, {tokens}")
        return plan_server(layout, tokens, ram, batch, kv_cache, use, gpus), tokens

    with ProgressDisplay(f"quantizing {name}, once") as making:
        store = prepare_store(name, precision, dtype, making, planned, clip)
    return store, *planned(store.layout, store.fingerprint, store.use)
