"""Checkpoints: ours (safetensors with the configuration inside) and the published ones.

Published files are PyTorch pickles. They are read with PyTorch's restricted unpickler, which
executes nothing; parts it refuses (the training framework's metadata) are not needed.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsgnn.config import CONFIGS, Config, config_from_dict, get_config
from dsgnn.model import DSGNN, build_model

SCHEMA = "dsgnn.checkpoint/1"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what to do."""


# upstream's name → ours, first match wins; parts not listed keep their name
_ATTENTION = ((r"attentions\.0\.attn\.", "cross_attention."), (r"attentions\.1\.attn\.", "self_attention."))
_RENAMES = {
    "backbone.": (
        (r"^backbone\.patch_embed\.projection\.", "backbone.body.patch_embed.proj."),
        (r"^backbone\.norm(\d)\.", r"backbone.norms.\1."),
        (r"\.attn\.w_msa\.", ".attn."),
        (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
        (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
        (r"^backbone\.stages\.(\d)\.blocks\.", r"backbone.body.layers_\1.blocks."),
        (r"^backbone\.(?!body|norms)", "backbone.body."),
    ),
    "panoptic_head.pixel_decoder.": (
        (r"^panoptic_head\.", ""),
        (r"input_convs\.(\d)\.conv\.", r"inputs.\1.0."),
        (r"input_convs\.(\d)\.gn\.", r"inputs.\1.1."),
        (r"lateral_convs\.0\.conv\.", "lateral.0."),
        (r"lateral_convs\.0\.gn\.", "lateral.1."),
        (r"output_convs\.0\.conv\.", "fuse.0."),
        (r"output_convs\.0\.gn\.", "fuse.1."),
        (r"mask_feature\.", "embed."),
        (r"level_encoding\.weight", "levels"),
        (r"encoder\.layers", "layers"),
        (r"attentions\.0\.", "attention."),
        (r"ffns\.0\.layers\.0\.0\.", "ffn.0."),
        (r"ffns\.0\.layers\.1\.", "ffn.2."),
        (r"norms\.0\.", "norm1."),
        (r"norms\.1\.", "norm2."),
    ),
    "panoptic_head.rank_head.": (
        (r"^panoptic_head\.rank_head\.", "graph."),
        (r"hf_rank_gnn_enc\.", "encode_s."),
        (r"lf_rank_gnn_enc\.", "encode_t."),
        (r"hf_shared_gnn_enc\.", "fuse_s."),
        (r"lf_shared_gnn_enc\.", "fuse_t."),
        (r"hf_private_gnn_enc\.", "private_s."),
        (r"lf_private_gnn_enc\.", "private_t."),
        (r"shared_gnn_enc\.", "common."),
        (r"shared_gnn_dec\.", "decode."),
        (r"gnn_sep\.squ\.", "separate.squeeze."),
        (r"gnn_sep\.enc\.", "separate.encode."),
        (r"rank_embed\.", "fuse."),
        (r"restore_hf\.", "restore_s."),
        (r"restore_lf\.", "restore_t."),
        (r"(fuse|restore_s|restore_t|squeeze)\.fc\.", r"\1.1."),
        (r"(fuse|restore_s|restore_t|squeeze)\.bn\.", r"\1.2."),
        (r"rank_head_final\.", "rank."),
        (r"rank_head_hf\.", "rank_s."),
        (r"rank_head_lf\.", "rank_t."),
        (r"cls_head_final\.", "classify."),
        (r"cls_head_hf\.", "class_s."),
        (r"cls_head_lf\.", "class_t."),
        (r"global_layer\.gfe1\.", "summary.gather."),
        (r"global_layer\.gfe2\.", "summary.squeeze."),
        (r"global_layer\.norm", "summary.norm"),
        (r"edge_extractor\.FAM\.", "edges.node_attention."),
        (r"edge_extractor\.ARM\.", "edges.edge_attention."),
        (r"edge_extractor\.edge_proj\.", "edges.project."),
        (r"layers\.bnv1\.", "layers.0.norm_node."),
        (r"layers\.bnv2\.", "layers.1.norm_node."),
        (r"layers\.bne1\.", "layers.0.norm_edge."),
        (r"layers\.bne2\.", "layers.1.norm_edge."),
        (r"layers\.([UVABE])1\.", r"layers.0.\1."),
        (r"layers\.([UVABE])2\.", r"layers.1.\1."),
    ),
    "panoptic_head.": (
        (r"^panoptic_head\.", ""),
        (r"^level_embed\.weight", "levels"),
        (r"^structure_", "shape_"),
        (r"^(shape|texture)_query_feat\.weight", r"\1.seeds.features"),
        (r"^(shape|texture)_query_embed\.weight", r"\1.seeds.positions"),
        (r"^(shape|texture)_cls_embed\.", r"\1.heads.classify."),
        (r"^(shape|texture)_rank_embed\.", r"\1.heads.rank."),
        (r"^(shape|texture)_mask_embed\.", r"\1.heads.embed."),
        (r"^(shape|texture)_transformer_decoder\.post_norm\.", r"\1.heads.norm."),
        (r"^(shape|texture)_transformer_decoder\.", r"\1."),
        *_ATTENTION,
        (r"ffns\.0\.layers\.0\.0\.", "ffn.0."),
        (r"ffns\.0\.layers\.1\.", "ffn.2."),
        (r"norms\.0\.", "norm1."),
        (r"norms\.1\.", "norm2."),
        (r"norms\.2\.", "norm3."),
    ),
}  # fmt: skip


def upstream_name(name: str) -> str:
    """Our name of an upstream parameter."""
    for prefix, rules in _RENAMES.items():
        if name.startswith(prefix):
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            break
    # the published Swin merges at the end of a stage, timm at the start of the next
    return re.sub(
        r"^backbone\.body\.stages\.(\d)\.downsample\.",
        lambda m: f"backbone.body.layers_{int(m[1]) + 1}.downsample.",
        name,
    )


def _convert(name: str, value: Tensor) -> Tensor:
    """Layout changes: graph convolution over the nodes → linear; Swin's merge order."""
    if ".global_layer.gfe" in name and name.endswith("weight"):
        return value.transpose(1, 2).flatten(1)  # (4C, C, Q) → (4C, Q·C)
    if ".downsample." in name and name.startswith("backbone.stages."):
        # upstream's 4C axis is (c, dy, dx), timm's (dx, dy, c)
        grouped = value.unflatten(-1, (-1, 2, 2))
        return grouped.movedim((-3, -2, -1), (-1, -2, -3)).flatten(-3)
    return value


def load_upstream(model: DSGNN, state_dict: Mapping[str, Tensor]) -> None:
    """Load published weights, every upstream tensor used exactly once.

    CheckpointError lists the missing, unexpected and mis-shaped names.
    """
    own = model.state_dict()
    converted: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    unexpected, shapes = [], []
    for name, value in state_dict.items():
        if name.endswith("relative_position_index"):
            continue  # computed, not learned
        ours = upstream_name(name)
        if ours not in own or ours in converted:
            unexpected.append(name)
            continue
        value = _convert(name, value)
        if value.shape != own[ours].shape:
            shapes.append(f"{name}: {tuple(value.shape)}, expected {tuple(own[ours].shape)}")
        converted[ours], source[ours] = value, name
    missing = sorted(set(own) - set(converted))
    report = [
        f"{title} ({len(names)}): {', '.join(names[:20])}{' …' if len(names) > 20 else ''}"
        for title, names in (("missing", missing), ("unexpected", unexpected),
                             ("mis-shaped", shapes))
        if names
    ]  # fmt: skip
    if report:
        raise CheckpointError(
            f"not a published {model.config.name} checkpoint; " + "; ".join(report)
        )
    model.load_state_dict(converted)


def infer_config(state_dict: Mapping[str, Tensor]) -> Config:
    """The published configuration whose shapes these are.

    Two configurations can share shapes only if they differ in training alone; none do.
    """
    features = state_dict.get("panoptic_head.structure_query_feat.weight")
    if features is None:
        raise CheckpointError(
            "this does not look like a DSGNN checkpoint: panoptic_head.structure_query_feat.weight "
            f"is missing; the file holds {', '.join(list(state_dict)[:3]) or 'nothing'} …"
        )
    data = {5: "assr", 8: "irsr"}.get(len(features))
    patch = state_dict.get("backbone.patch_embed.projection.weight")
    if patch is None:
        kind: str | None = "r50"
    else:
        blocks = len({n for n in state_dict if re.match(r"backbone\.stages\.2\.blocks\.\d+\.norm1\.w", n)})
        kind = {(96, 6): "swin-t", (96, 18): "swin-s", (128, 18): "swin-b",
                (192, 18): "swin-l"}.get((len(patch), blocks))  # fmt: skip
    if data is None or kind is None:
        raise CheckpointError(
            f"no published configuration has {len(features)} queries"
            + (f" and a Swin of width {len(patch)}" if patch is not None else "")
            + "; name one with --config"
        )
    return CONFIGS[f"{kind}-{data}"]


def read_upstream(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a published `.pth` file, without running any code in it.

    Accepts {"state_dict": …, "meta": …} and a bare mapping. Objects that are no tensors or plain
    values are replaced by inert placeholders and dropped. CheckpointError otherwise.
    """
    path = Path(path)
    try:
        content = _load_without_code(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:
        raise CheckpointError(
            f"{path}: not a PyTorch checkpoint that can be read safely "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from None
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    tensors = (
        {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
        if isinstance(state, Mapping)
        else {}
    )
    if not tensors:
        raise CheckpointError(f'{path}: holds no tensors under "state_dict"')
    return tensors


class _Inert:
    """Stands in for whatever object a pickle names that is no tensor: takes anything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...


_ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
}


class _TensorsOnly(pickle.Unpickler):
    """Every name a pickle can call goes through `find_class`: only these few exist here."""

    def find_class(self, module: str, name: str) -> Any:
        storage = module == "torch" and name.endswith("Storage")
        if storage or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        return _Inert


class _tensors_only:
    """What `torch.load` expects of a pickle module."""

    Unpickler = _TensorsOnly

    @staticmethod
    def load(file: Any, **kwargs: Any) -> Any:
        return _TensorsOnly(file, **kwargs).load()


def _load_without_code(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_tensors_only)


def convert(source: str | Path, target: str | Path, config: str | None = None) -> Config:
    """Published `.pth` → our safetensors; the configuration is inferred when not named."""
    state = read_upstream(source)
    chosen = get_config(config) if config else infer_config(state)
    model = build_model(chosen)
    load_upstream(model, state)
    save_checkpoint(target, model, weights="published")
    return chosen


def save_checkpoint(path: str | Path, model: DSGNN, weights: str = "trained") -> None:
    """Write a checkpoint, whole or not at all. weights: "trained", "published" or "synthetic"."""
    path = Path(path)
    header = {"schema": SCHEMA, "weights": weights, "config": json.dumps(model.config.to_dict())}
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata=header)
    part.replace(path)


def load_checkpoint(path: str | Path) -> tuple[DSGNN, str]:
    """A model in eval mode from `save_checkpoint`, and where its weights are from.

    CheckpointError when the file is not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a safetensors checkpoint ({error}); published .pth files are converted "
            "with dsgnn-convert first"
        ) from None
    if header.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{path}: schema is {header.get('schema')!r}, expected {SCHEMA!r}; "
            "was it written by dsgnn?"
        )
    model = build_model(config_from_dict(json.loads(header["config"])))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return model, header["weights"]
