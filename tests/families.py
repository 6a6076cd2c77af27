"""Tiny random models of every family that the experts dispatch can reach.

The families are found in transformers itself: the modeling files with an experts class under
`use_experts_implementation` that also hold a class of the causal language model mapping. What
stands by hand is how to make a configuration small, by the name of the field, and the few
values that no rule gives.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

DECORATOR = "use_experts_implementation"
VOCABULARY, HIDDEN, LAYERS, HEADS, EXPERTS = 300, 64, 4, 4, 8

# The sizes of a tiny model, by the field's name; a field of None keeps its None.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    # attention
    **dict.fromkeys(("num_attention_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "index_head_dim"), 16),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "index_topk"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "d_rel", "gated_norm_rank"), 8),
    **dict.fromkeys(("index_n_heads", "o_groups", "hc_mult", "hc_count"), 2),
    "index_block_size": 8,
    "index_topk_blocks": 2,
    "rel_extent": 32,
    "hc_lowrank": 8,
    "hc_sinkhorn_iters": 4,
    # linear attention and state spaces
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "n_groups"), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_head_dim", "mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size"), 16),
    # feed-forward; experts as wide as whole vectors, as in real models: at the odd end of a
    # tensor CPU kernels for activations round otherwise, wherever that end happens to be
    **dict.fromkeys(("intermediate_size", "dense_intermediate_size"), 128),
    "moe_intermediate_size": 64,
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_experts_intermediate_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    "router_hidden_size": 16,
    # which layers are dense: with the lists, every other one
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
}
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_FIELDS = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
ALTERNATING = ["dense", "sparse"] * (LAYERS // 2)

# What no rule gives: by module, the configuration's odd values.
ODD: dict[str, dict[str, Any]] = {
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "mlp_layer_types": ["hash_moe", "moe", "hash_moe", "moe"],
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"layer_types": ["indexed_attention"] * LAYERS},
    "ernie4_5_moe": {"moe_layer_interval": 2},
    "gemma4": {"enable_moe_block": True, "moe_intermediate_size": 64},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "moe_latent_size": 32,  # its experts need not be as wide as the model
    },
    "qwen4_exp": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
}
# Families whose router can't be told otherwise: by module, K and why.
FIXED_TOP_K: dict[str, tuple[int, str]] = {
    "zaya": (1, "its configuration allows one expert per token only"),
}
# Families that can't be built or run here: by module, why.
UNSERVED: dict[str, str] = {}
# The rows that are no slow tests: one of each kind of router and experts module.
FAST = {"mixtral", "olmoe", "qwen3_moe", "gpt_oss", "deepseek_v3", "deepseek_v4", "nemotron_h"}


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of the contract suite: a modeling module of transformers."""

    module: str  # folder under transformers.models
    model_type: str
    model_class: str

    @property
    def top_k(self) -> int:
        """The K that the suite asks for: 2 unless the family fixes it."""
        return FIXED_TOP_K.get(self.module, (2, ""))[0]

    @property
    def ungrouped(self) -> dict[str, int]:
        """Changes after which a router with groups may choose from all of them."""
        grouped = "topk_group" in _defaults(self) and (_defaults(self)["n_group"] or 1) > 1
        return {"topk_group": 4} if grouped else {}


@cache
def find_modules() -> dict[str, frozenset[str]]:
    """Every modeling module with an experts class under the decorator, and its classes."""
    import transformers

    found = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if DECORATOR not in source:
            continue
        classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
        if any(DECORATOR in ast.unparse(d) for node in classes for d in node.decorator_list):
            found[path.parent.name] = frozenset(node.name for node in classes)
    return found


@cache
def find_families() -> tuple[Family, ...]:
    """The causal language model families, one per modeling module, by name."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    module_of = {name: module for module, names in find_modules().items() for name in names}
    found: dict[str, Family] = {}
    for model_type, model_class in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        module = module_of.get(model_class)
        # A module's text type comes before the one that wraps it with vision or audio.
        if module and (module not in found or model_type.endswith("_text")):
            found[module] = Family(module, model_type, model_class)
    return tuple(found[module] for module in sorted(found))


def tiny_config(
    family: Family, *, top_k: int | None = None, experts: int = EXPERTS, **changes: Any
) -> Any:
    """A small configuration of the family, from its own class."""
    defaults = _defaults(family)
    values: dict[str, Any] = {}
    for name, default in defaults.items():
        if name in SIZES and default is not None:
            values[name] = SIZES[name]
        elif name in EXPERT_FIELDS:
            values[name] = experts
        elif name in TOP_K_FIELDS:
            values[name] = top_k or family.top_k
    if "kv_lora_rank" in defaults and "num_key_value_heads" in values:
        values["num_key_value_heads"] = HEADS  # latent attention has a key for every head
    if (defaults.get("n_group") or 1) > 1:
        values |= {"n_group": 4, "topk_group": 2}
    if "mlp_layer_types" in defaults:
        values["mlp_layer_types"] = ALTERNATING
    if "mlp_only_layers" in defaults:
        values["mlp_only_layers"] = [0, 2]
    return _config_class(family)(**(values | ODD.get(family.module, {}) | changes))


def _config_class(family: Family) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[family.model_type]


def _defaults(family: Family) -> dict[str, Any]:
    """The fields of the family's configuration class, with their defaults."""
    return {field.name: _default(field) for field in dataclasses.fields(_config_class(family))}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def tiny_model(family: Family, *, seed: int = 0, **options: Any) -> Any:
    """A tiny random model in float32, ready for scoring; the same weights each time."""
    import transformers

    torch.manual_seed(seed)
    model_class = getattr(transformers, family.model_class)
    model = model_class(tiny_config(family, **options)).eval().requires_grad_(False)
    _wake(model)
    return model


def _wake(model: Any) -> None:
    """Give what starts as all zeros (biases, correction terms, routing tables) some content."""
    experts = getattr(model.config.get_text_config(), "num_local_experts", EXPERTS)
    for tensor in model.state_dict().values():
        if tensor.numel() < 2 or tensor.any():
            continue
        if tensor.is_floating_point():
            tensor.normal_(0.0, 0.05)
        elif tensor.dim() == 2 and tensor.shape[0] == VOCABULARY:
            # A table of experts by token id, as hash routers have: K different ones each.
            scores = torch.rand((VOCABULARY, experts))
            tensor.copy_(scores.topk(tensor.shape[1]).indices)


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """A copy as `from_pretrained(dtype=...)` would load it: some weights stay in float32."""
    model = copy.deepcopy(model)
    kept = [*(model._keep_in_fp32_modules_strict or ())]
    if dtype == torch.float16:
        kept += model._keep_in_fp32_modules or ()
    pattern = re.compile("|".join(rf"(?:^|\.){name}(?:\.|$)" for name in kept) or r"(?!)")
    saved = model.state_dict()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in saved and tensor.is_floating_point() and not pattern.search(name):
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
    return model


def tiny_ids(rows: int = 3, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Random token ids (rows, length); 0, the padding of some families, left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, length), generator=generator)
