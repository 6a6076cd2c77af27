"""Turn a checkpoint into the bundled model and measure it on the validation split.

    python tools/demo/finish.py --checkpoint build/ckpt-latest --train-dir build \
        --demo-dir src/var_moe/demo --results build/results.json

Writes float16 weights and the tokenizer to `<demo-dir>/model`, loads that folder again in
float32 as a user would, and scores validation per source: as it is, and with top-1 everywhere
(the router's `top_k` set to 1: the leading expert alone, its weight 1). Certify and test stay
unopened. Draws the training curve.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scoring import document_losses, perplexity
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

TYPICAL_TOKENS = (128, 300, 512)


def write_model(checkpoint: Path, folder: Path) -> None:
    """An ordinary Hugging Face folder with float16 weights, replaced as a whole."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16)
    model.config.output_router_logits = False
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    for file in partial.iterdir():  # safetensors writes 0600
        file.chmod(0o644)
    partial.rename(folder)


def set_top_k(model: PreTrainedModel, top_k: int) -> int:
    """Set every router's `top_k`; the number of routers. It rescales the weights to sum 1."""
    routers = [m for m in model.modules() if type(m).__name__ == "MixtralTopKRouter"]
    for router in routers:
        router.top_k = top_k
    return len(routers)


def multiply_adds(config: MixtralConfig, tokens: int) -> dict[str, float]:
    """Multiply-adds per token at top-k in a document of `tokens` tokens, by part."""
    hidden, heads, size = config.hidden_size, config.num_attention_heads, config.head_dim
    layers = config.num_hidden_layers
    projections = 2 * hidden * size * (heads + config.num_key_value_heads)
    scores = 2 * heads * size * (tokens + 1) / 2  # causal: half of the square, QK and AV
    expert = 3 * hidden * config.intermediate_size
    parts = {
        "experts": layers * config.num_experts_per_tok * expert,
        "router": layers * hidden * config.num_local_experts,
        "attention": layers * (projections + scores),
        "lm_head": hidden * config.vocab_size,
    }
    parts["experts_share"] = round(parts["experts"] / sum(parts.values()), 4)
    return parts


@torch.inference_mode()
def expert_loads(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> list[list[float]]:
    """Per layer, each expert's share of the leading choices (0.125 = even)."""
    counts: list[torch.Tensor] = []
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids])
        logits = model(input_ids=ids, output_router_logits=True, use_cache=False).router_logits
        counts.append(
            torch.stack([layer.argmax(-1).bincount(minlength=layer.shape[-1]) for layer in logits])
        )
    total = torch.stack(counts).sum(0).double()  # (L, E)
    return (total / total.sum(1, keepdim=True)).round(decimals=3).tolist()


def relative_change(base: np.ndarray, cut: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """PPL(cut)/PPL(base) - 1 and its standard error, documents as units (ratio estimator)."""
    difference = (cut - base).sum() / counts.sum()
    residual = (cut - base) - difference * counts
    error = np.sqrt((residual**2).sum() * len(counts) / max(len(counts) - 1, 1)) / counts.sum()
    return float(np.expm1(difference)), float(np.exp(difference) * error)


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, frame: pd.DataFrame
) -> dict[str, dict]:
    """PPL and the cost of top-1 everywhere, per source and for the in-domain mix."""
    texts = list(frame.text)
    top_k = model.config.num_experts_per_tok
    base, counts = document_losses(model, tokenizer, texts)
    if set_top_k(model, 1) != model.config.num_hidden_layers:
        raise ValueError("expected one router per layer")
    cut, _ = document_losses(model, tokenizer, texts)
    set_top_k(model, top_k)
    groups = {name: (frame.source == name).to_numpy() for name in sorted(frame.source.unique())}
    if len(set(groups) - {"kjv"}) > 1:
        groups["demo"] = (frame.source != "kjv").to_numpy()
    table = {}
    for name, rows in groups.items():
        change, error = relative_change(base[rows], cut[rows], counts[rows])
        table[name] = {
            "documents": int(rows.sum()),
            "tokens": int(counts[rows].sum()),
            "ppl": round(perplexity(base[rows], counts[rows]), 4),
            "ppl_top1": round(perplexity(cut[rows], counts[rows]), 4),
            "top1_change": round(change, 5),
            "top1_change_se": round(error, 5),
        }
    return table


def draw_curve(log: list[dict], file: Path) -> None:
    """Validation PPL per source and training PPL against minutes, log scale."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["svg.hashsalt"] = "demo"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    minutes = [row["elapsed_seconds"] / 60 for row in log]
    lines = {
        "train": [np.exp(row["train_loss"]) for row in log],
        "validation, mix": [row["val_ppl"] for row in log],
    }
    for key in log[-1]:
        if key.startswith("val_ppl_"):
            lines[f"validation, {key.removeprefix('val_ppl_')}"] = [row[key] for row in log]
    for label, values in lines.items():
        axes.plot(minutes, values, marker=".", linewidth=1, label=label)
    axes.set(xlabel="minutes", ylabel="perplexity (log scale)", yscale="log")
    axes.set_ylim(top=100)
    ticks = [5, 7, 10, 15, 20, 30, 50, 100]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--train-dir", type=Path, required=True, help="holds log.jsonl")
    parser.add_argument("--demo-dir", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True, help="JSON to write")
    parser.add_argument("--curve", type=Path, default=Path(__file__).with_name("curve.svg"))
    parser.add_argument("--max-documents", type=int, help="per source; for a quick try")
    options = parser.parse_args()
    torch.set_grad_enabled(False)

    folder = options.demo_dir / "model"
    write_model(options.checkpoint, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    text_dir = options.demo_dir / "text"
    kjv = pd.read_parquet(text_dir / "kjv.parquet")
    kjv = kjv[kjv.split == "validation"].drop(columns="split")
    frame = pd.concat([pd.read_parquet(text_dir / "validation.parquet"), kjv], ignore_index=True)
    if options.max_documents:
        frame = frame.groupby("source").head(options.max_documents).reset_index(drop=True)

    log = [json.loads(line) for line in (options.train_dir / "log.jsonl").open(encoding="utf-8")]
    mix = frame[frame.source != "kjv"]
    results = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "model_bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "demo_bytes": sum(f.stat().st_size for f in options.demo_dir.rglob("*") if f.is_file()),
        "training": log[-1],
        "minutes": round(log[-1]["elapsed_seconds"] / 60, 1),
        "multiply_adds": {n: multiply_adds(model.config, n) for n in TYPICAL_TOKENS},
        "validation": measure(model, tokenizer, frame),
        "leading_expert_share": expert_loads(model, tokenizer, list(mix.text[:100])),
    }
    options.results.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    draw_curve(log, options.curve)
    print(pd.DataFrame(results["validation"]).T.to_string())
    print(f"multiply-adds: {results['multiply_adds']}")
    print(f"{results['minutes']} minutes, {log[-1]['tokens']:,} tokens, all written")


if __name__ == "__main__":
    main()
