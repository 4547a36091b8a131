"""Make diffusers find our classes by name: in `model_index.json`, in `AutoModel`, in pipelines from the Hub.

To import this package must be enough for that, and must stay cheap. So nothing is imported here, neither diffusers nor
a model: the parts of diffusers that look classes up are told of ours when they are imported, or at once if they are
there already, and a class is imported when somebody asks for it by name.

diffusers 0.42 loads a component of a pipeline only from libraries in `LOADABLE_CLASSES`; this table is not public, so
the dependency on diffusers is capped and `tests/test_registration.py` guards what we use of it.
"""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


# Public class -> module.
MODELS = {
    "AutoencoderKLIVVAE": "diffusers_leanvae.models.autoencoder_kl_ivvae",
    "AutoencoderKLLeanVAE": "diffusers_leanvae.models.autoencoder_kl_leanvae",
    "AutoencoderKLWFVAE": "diffusers_leanvae.models.autoencoder_kl_wfvae",
    "LeanVAELatteTransformer3DModel": "diffusers_leanvae.models.transformer_latte",
}
PIPELINES = {
    "LeanVAELattePipeline": "diffusers_leanvae.pipelines.pipeline_leanvae_latte",
    "LeanVAELatteTextToVideoPipeline": "diffusers_leanvae.pipelines.pipeline_leanvae_latte_text_to_video",
}

# Module that is pushed with a model or pipeline and imports this package (see `hub.make_shims`). The index of a pushed
# pipeline names it as the library of our classes.
SHIM = "modeling_leanvae"


def register() -> None:
    """Tell diffusers of our classes, now or when it is imported; runs when `diffusers_leanvae` is imported."""
    for name, tell in _LISTENERS.items():
        if name in sys.modules:
            tell(sys.modules[name])
    if not any(isinstance(finder, _ImportHook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ImportHook())


def _answer_for(classes: Mapping[str, str]) -> Callable[[ModuleType], None]:
    """Make a function that lets a module of diffusers answer for some of our classes as if they were its own."""

    def tell(module: ModuleType) -> None:
        ask_others = vars(module).get("__getattr__")
        if getattr(ask_others, "__module__", None) == __name__:
            return  # it knows already

        def __getattr__(name: str) -> Any:  # what the module does not have itself is looked up here (PEP 562)
            if name in classes:
                found = import_module(classes[name])
                return found if name == SHIM else getattr(found, name)
            if ask_others is not None:
                return ask_others(name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        vars(module)["__getattr__"] = __getattr__

    return tell


def _list_package(module: ModuleType) -> None:
    """List this package where diffusers lists the libraries from which it loads components."""
    module.LOADABLE_CLASSES["diffusers_leanvae"] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}


# diffusers takes the class of a model and of a saved pipeline from `diffusers`, and its source from
# `diffusers.pipelines`.
_LISTENERS: dict[str, Callable[[ModuleType], None]] = {
    "diffusers": _answer_for(MODELS | PIPELINES),
    # With this package, the name of the shim is that of a module of pipelines, so that no code of a repository is run.
    "diffusers.pipelines": _answer_for(PIPELINES | {SHIM: "diffusers_leanvae"}),
    "diffusers.pipelines.pipeline_loading_utils": _list_package,
}


class _ImportHook:
    """Tells a module of diffusers of us once it has run; to find and load it is left to the other finders."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in _LISTENERS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None:
            _call_afterwards(spec, _LISTENERS[name])
        return spec


def _call_afterwards(spec: ModuleSpec, tell: Callable[[ModuleType], None]) -> None:
    loader: Any = spec.loader
    if loader is None:  # a namespace has nothing to run
        return
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        if module.__name__ == spec.name:  # a loader may be shared
            tell(sys.modules[spec.name])  # diffusers puts another module in its own place

    loader.exec_module = exec_module
