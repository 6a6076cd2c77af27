"""What the modules with the shared suite have in common, and folders to be damaged."""

import shutil

import pytest
import torch

from var_moe.errors import UsageError, VarMoeError
from var_moe.execution.dispatch import experts_modules
from var_moe.models.loading import load_model

# Failures inside the suite are explained as in a test module.
pytest.register_assert_rewrite("contract", "seam_contract")


@pytest.fixture(scope="module")
def backend():
    """Who executes the pairs, unless a module says otherwise."""
    return "sorted"


@pytest.fixture
def module(make_tiny_mixtral):
    return experts_modules(make_tiny_mixtral(top_k=2))[0][1]


@pytest.fixture
def pairs(module):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(30, module.gate_up_proj.shape[2], generator=generator)
    index = torch.rand(30, module.num_experts, generator=generator).argsort(dim=1)[:, :2]
    index[::3, 1] = -1
    index[7] = -1  # a token without any expert
    index[index == 1] = 0  # an expert without any token; also a token with one expert twice
    return hidden, index


@pytest.fixture
def refused():
    """The one line of a refusal."""

    def run(name, *, kind=UsageError, **options):
        with pytest.raises(VarMoeError) as caught:
            load_model(str(name), **options)
        assert type(caught.value) is kind
        line = str(caught.value)
        assert "\n" not in line
        assert len(line) < 500
        return line

    return run


@pytest.fixture
def folder(tiny_model_folder, tmp_path):
    """A copy of the tiny model's folder, to be damaged."""
    return shutil.copytree(tiny_model_folder, tmp_path / "model")


@pytest.fixture
def cached_model(tiny_model_folder, tmp_path, monkeypatch):
    """The tiny model as the Hub's client leaves it in its cache, and no network."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_model_folder, place / "snapshots" / revision)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("var_moe.hub.reachable", lambda: False)
    return place / "snapshots" / revision
