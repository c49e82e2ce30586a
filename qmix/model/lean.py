"""Import transformers, accelerate and bitsandbytes without the parts of torch that only training and compiling need.

transformers' modules import torch's compiler, its distributed tensors and checkpoints, sympy and scipy: half of a
command's start, and 120 MB. A run uses none of them. While the three libraries are imported, placeholders stand in for
those modules; afterwards the placeholders are gone, and a later import of such a module is the real one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

UNUSED = (
    "PIL",
    "scipy",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed._composable",
    "torch.distributed.checkpoint",
    "torch.distributed.device_mesh",
    "torch.distributed.elastic",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch.nn.attention.flex_attention",
    "torch.onnx",
)
USED = (  # what a run imports of the three, in part only when it is under way
    "qmix.precision.bitsandbytes",
    "accelerate.utils",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.tokenization_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.generation.candidate_generator",
    "transformers.generation.streamers",
)
MODELS = ("auto", "llama", "mixtral")  # the tokenizers that stores have, and the model
DECORATORS = frozenset({"allow_in_graph", "assume_constant_result", "disable"})


def import_libraries() -> None:
    """Import the libraries that a model needs, unless transformers is there already.

    For processes that belong to qmix alone: whoever uses qmix as a library may want transformers whole. A transformers
    that cannot be imported so, of a later version perhaps, is imported whole.
    """
    if "transformers" in sys.modules:
        return
    before = set(sys.modules)
    try:
        with _placeholders():
            _short_table()
            _without_distributed()
            for name in USED:
                import_module(name)
    except Exception:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "transformers":
                del sys.modules[name]
        import_module("transformers.models.mixtral.modeling_mixtral")


def _short_table() -> None:
    """Let transformers' table of what it can import list the models in MODELS only.

    For the whole table it reads 3,300 files, at each start. Its utilities are imported first, in a package that stands
    in for transformers until then.
    """
    spec = find_spec("transformers")
    assert spec is not None
    package = ModuleType("transformers")
    package.__path__ = list(spec.submodule_search_locations or ())
    package.__version__ = version("transformers")  # type: ignore[attr-defined]
    sys.modules["transformers"] = package
    try:
        utilities = import_module("transformers.utils.import_utils")
    finally:
        del sys.modules["transformers"]
    whole = utilities.create_import_structure_from_path

    def listed(path: Any) -> Any:
        folder = Path(path)
        return {} if folder.parent.name == "models" and folder.name not in MODELS and folder.is_dir() else whole(path)

    utilities.create_import_structure_from_path = listed  # type: ignore[attr-defined]


def _without_distributed() -> None:
    """Let transformers take torch for a build without `torch.distributed`, such as those for macOS."""
    for name in ("transformers.utils.import_utils", "transformers.utils"):
        import_module(name).is_torch_distributed_available = lambda: False  # type: ignore[attr-defined]


class _Kind(type):
    """The type of placeholder classes: any attribute is a placeholder too."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _placeholder(cls.__module__, f"{cls.__qualname__}.{name}")

    def __or__(cls, other: object) -> Any:
        return cls

    __ror__ = __or__


def _placeholder(module: str, name: str) -> Any:
    """Return a class that no object is an instance of; annotations, defaults and registrations may name it."""
    body = {
        "__module__": module,
        "__qualname__": name,
        "__init__": lambda self, *arguments, **options: None,
        "__class_getitem__": classmethod(lambda cls, item: cls),
    }
    return _Kind(name.rpartition(".")[2], (), body)


def _undecorated(function: Any = None, *arguments: Any, **options: Any) -> Any:
    """Stand in for a decorator of the compiler, with options or without: the function as it is."""
    return function if function is not None else _undecorated


class _Finder:
    """Finds placeholders for the modules in UNUSED."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        unused = any(name == each or name.startswith(f"{each}.") for each in UNUSED)
        return ModuleSpec(name, self, is_package=True) if unused else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return _undecorated if name in DECORATORS else _placeholder(spec.name, name)

        module = ModuleType(spec.name)
        module.__getattr__ = attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def _placeholders() -> Iterator[None]:
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name, module in list(sys.modules.items()):
            if getattr(module, "__loader__", None) is finder:
                del sys.modules[name]
                parent, _, child = name.rpartition(".")
                if parent in sys.modules and vars(sys.modules[parent]).get(child) is module:
                    delattr(sys.modules[parent], child)
