"""Ways to damage a model's folder."""

from __future__ import annotations

import json


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite(folder, change):
    """Save the weights anew, as ``change`` leaves them."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def without(folder, *names):
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in names])
