"""diffusers finds our classes by name, whichever of the two is imported first, and to import them costs nothing."""

import ast
import importlib
import sys
from pathlib import Path
from types import ModuleType

import diffusers
import pytest
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines import pipeline_loading_utils
from processes import run_python

import diffusers_leanvae
from diffusers_leanvae import registration


def test_the_table_of_diffusers_is_what_we_take_it_for():
    # Not public: if this fails after an update, see registration.py before lifting the cap on diffusers.
    table = pipeline_loading_utils.LOADABLE_CLASSES
    assert table["diffusers"]["ModelMixin"] == ["save_pretrained", "from_pretrained"]
    assert table["diffusers_leanvae"] == {"ModelMixin": ["save_pretrained", "from_pretrained"]}
    assert diffusers_leanvae.ModelMixin is ModelMixin  # diffusers looks base classes up in the package itself


def test_public_classes_are_names_of_diffusers():
    for name, module in (registration.MODELS | registration.PIPELINES).items():
        found = getattr(diffusers, name)
        assert found is getattr(diffusers_leanvae, name) and found.__name__ == name and found.__module__ == module
    for name in registration.PIPELINES:
        assert getattr(diffusers.pipelines, name) is getattr(diffusers_leanvae, name)
    for module in (diffusers, diffusers.pipelines, diffusers_leanvae):
        with pytest.raises(AttributeError, match="NoSuchPipeline"):
            _ = module.NoSuchPipeline
    assert diffusers.DDIMPipeline.__name__ == "DDIMPipeline"


def test_registering_again_changes_nothing():
    before = dict(pipeline_loading_utils.LOADABLE_CLASSES), list(sys.meta_path), vars(diffusers)["__getattr__"]
    registration.register()
    assert (pipeline_loading_utils.LOADABLE_CLASSES, sys.meta_path, vars(diffusers)["__getattr__"]) == before


def test_public_names_are_what_type_checkers_see():
    tree = ast.parse(Path(diffusers_leanvae.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    checked = [alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted([*checked, "__version__"]) == diffusers_leanvae.__all__
    for name in diffusers_leanvae.__all__:
        assert getattr(diffusers_leanvae, name) is not None and name in dir(diffusers_leanvae)


def test_importing_the_package_imports_nothing_heavy():
    # Neither does the command line, so that `leanvae --help` answers at once.
    code = """
import sys
import diffusers_leanvae, diffusers_leanvae.cli
print(*sorted({"av", "diffusers", "huggingface_hub", "numpy", "safetensors", "torch"} & sys.modules.keys()))
"""
    assert run_python(code, HF_HUB_OFFLINE="1") == "\n"


ORDERS = {
    # As if neither transformers nor peft, which needs it, were installed: the pipelines do without.
    "package first": """
import importlib.util
import sys
find_spec = importlib.util.find_spec
hidden = {"transformers", "peft"}
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in hidden else find_spec(name, *rest)
sys.modules.update(dict.fromkeys(hidden))
import diffusers_leanvae
import diffusers
assert not diffusers.utils.is_transformers_available()
""",
    "class first": """
import pickle
pickle.loads(b"cdiffusers_leanvae.models.autoencoder_kl_leanvae\\nAutoencoderKLLeanVAE\\n.")
""",
    "diffusers first": "import diffusers; import diffusers_leanvae",
    "all of diffusers first": "from diffusers import DiffusionPipeline; import diffusers_leanvae",
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_imports_does_not_matter(order, make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    code = """
import sys
assert not [name for name in sys.modules if name.startswith("diffusers_leanvae.pipelines.")]
from diffusers import AutoencoderKLLeanVAE, AutoModel, LeanVAELattePipeline, LeanVAELatteTextToVideoPipeline
from diffusers.pipelines import LeanVAELattePipeline as again, pipeline_loading_utils
import diffusers_leanvae
assert pipeline_loading_utils.LOADABLE_CLASSES["diffusers_leanvae"]["ModelMixin"]
assert type(AutoModel.from_pretrained(sys.argv[1])) is AutoencoderKLLeanVAE is diffusers_leanvae.AutoencoderKLLeanVAE
assert LeanVAELattePipeline is again is diffusers_leanvae.LeanVAELattePipeline
assert diffusers_leanvae.hub.push_to_hub and diffusers_leanvae.loading.load_autoencoder  # imported nowhere before
"""
    run_python(ORDERS[order] + code, tmp_path, HF_HUB_OFFLINE="1")


def test_a_module_is_told_after_it_has_run(tmp_path, monkeypatch):
    (tmp_path / "observed.py").write_text("value = 1\n")
    (tmp_path / "broken.py").write_text("raise RuntimeError('broken')\n")
    monkeypatch.syspath_prepend(tmp_path)
    told: list[ModuleType] = []
    for name in ("observed", "broken"):
        monkeypatch.setitem(registration._LISTENERS, name, told.append)
    module = importlib.import_module("observed")
    monkeypatch.setitem(sys.modules, "observed", module)  # taken out again after the test
    assert told == [module] and module.value == 1
    assert module.__loader__ is not None and "value = 1" in module.__loader__.get_source("observed")  # a common loader
    importlib.reload(module)
    assert told == [module, module]
    with pytest.raises(RuntimeError, match="broken"):
        importlib.import_module("broken")
    assert len(told) == 2
    with pytest.raises(ModuleNotFoundError, match="No module named 'nowhere'"):
        monkeypatch.setitem(registration._LISTENERS, "nowhere", told.append)
        importlib.import_module("nowhere")


def test_others_who_answer_for_a_module_are_asked_as_well():
    module = ModuleType("module")
    vars(module)["__getattr__"] = {"theirs": 2}.__getitem__
    tell = registration._answer_for({"TemporalCache": "diffusers_leanvae.models.temporal_cache"})
    tell(module)
    tell(module)
    assert module.theirs == 2 and module.TemporalCache is diffusers_leanvae.TemporalCache
