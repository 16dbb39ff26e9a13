"""Checkpoints: ours (safetensors with the configuration inside) and the published ones.

Published files are pickles; `dsgnn.weights.pickles` takes the tensors out and runs nothing. Every
parameter of ours has one in a published checkpoint and the other way round; only names and three
layouts differ (`upstream_value`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dsgnn.config import CONFIGS, ZOO, Config, config_from_dict, get_config
from dsgnn.model import DSGNN, build_model
from dsgnn.runtime.artifact import WEIGHTS, sha256_of
from dsgnn.runtime.disk.files import write_whole
from dsgnn.runtime.errors import CheckpointError, OptionError
from dsgnn.weights.pickles import read_tensors

SCHEMA = "dsgnn.checkpoint/1"

# A rule for names: a pattern, and what takes its place.
Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]
# Upstream's name → ours: the first prefix that fits, and then all of its rules in order. Parts
# that no rule names are called the same.
_LAYER: Rules = (
    (r"ffns\.0\.layers\.0\.0\.", "ffn.0."),
    (r"ffns\.0\.layers\.1\.", "ffn.2."),
    (r"norms\.(\d)\.", lambda m: f"norm{int(m[1]) + 1}."),
)
_RENAMES: dict[str, Rules] = {
    "backbone.": (
        (r"^backbone\.patch_embed\.projection\.", "backbone.body.patch_embed.proj."),
        (r"^backbone\.norm(\d)\.", r"backbone.norms.\1."),
        (r"\.attn\.w_msa\.", ".attn."),
        (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
        (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
        (r"^backbone\.stages\.(\d)\.blocks\.", r"backbone.body.layers_\1.blocks."),
        # the published Swin merges at the end of a stage, timm at the start of the next
        (r"stages\.(\d)\.downsample\.", lambda m: f"body.layers_{int(m[1]) + 1}.downsample."),
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
        *_LAYER,
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
        (r"layers\.(\w+)(\d)\.", lambda m: f"layers.{int(m[2]) - 1}.{m[1]}."),
        (r"\.bnv\.", ".norm_node."),
        (r"\.bne\.", ".norm_edge."),
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
        (r"attentions\.0\.attn\.", "cross_attention."),
        (r"attentions\.1\.attn\.", "self_attention."),
        *_LAYER,
    ),
}


def renamed(name: str, rules: Rules) -> str:
    """The name after all rules in their order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def upstream_name(name: str) -> str:
    """Our name of an upstream parameter."""
    fitting = (rules for prefix, rules in _RENAMES.items() if name.startswith(prefix))
    return renamed(name, next(fitting, ()))


def upstream_value(name: str, value: Tensor) -> Tensor:
    """In our layout: graph convolution over the nodes → linear; Swin's merge order."""
    if name.endswith((".gfe1.weight", ".gfe2.weight")):
        return value.transpose(1, 2).flatten(1)  # (4C, C, Q) → (4C, Q·C)
    if ".downsample." in name and name.startswith("backbone.stages."):
        # upstream's 4C axis is (c, dy, dx), timm's (dx, dy, c)
        grouped = value.unflatten(-1, (-1, 2, 2))
        return grouped.movedim((-3, -2, -1), (-1, -2, -3)).flatten(-3)
    return value


def load_upstream(model: DSGNN, state_dict: Mapping[str, Tensor]) -> None:
    """Load published weights into `model`, every upstream tensor used exactly once.

    state_dict: upstream name → tensor, as `read_tensors` gives it. Raises CheckpointError that
    lists the missing (by our names), unexpected and mis-shaped ones; the model is then unchanged.
    """
    own = model.state_dict()
    converted: dict[str, Tensor] = {}
    unexpected, shapes = [], []
    for name, value in state_dict.items():
        if name.endswith("relative_position_index"):
            continue  # computed, not learned
        ours = upstream_name(name)
        if ours not in own or ours in converted:
            unexpected.append(name)
            continue
        try:
            same = value.numel() == own[ours].numel()  # else it is not worth a copy
            converted[ours] = upstream_value(name, value) if same else value
        except (IndexError, RuntimeError):  # has not the dimensions that are to be reordered
            converted[ours] = value
        if converted[ours].shape != own[ours].shape:
            shapes.append(
                f"{name} {tuple(value.shape)} gives {tuple(converted[ours].shape)}, "
                f"not {tuple(own[ours].shape)}"
            )
    report = [
        f"{title} ({len(names)}): {', '.join(names[:20])}{' …' if len(names) > 20 else ''}"
        for title, names in (
            ("missing", sorted(set(own) - set(converted))),
            ("unexpected", unexpected),
            ("mis-shaped", shapes),
        )
        if names
    ]
    if report:
        raise CheckpointError(
            f"not a published {model.config.name} checkpoint; " + "; ".join(report)
        )
    model.load_state_dict(converted)


def infer_config(state_dict: Mapping[str, Tensor]) -> Config:
    """The published configuration whose shapes these are (no two share them all).

    Raises CheckpointError when it is none of them.
    """
    queries = state_dict.get("panoptic_head.structure_query_feat.weight")
    if queries is None:
        raise CheckpointError(
            "this is no DSGNN checkpoint: panoptic_head.structure_query_feat.weight is missing; "
            f"the file holds {', '.join(list(state_dict)[:3]) or 'nothing'} …"
        )
    block = re.compile(r"backbone\.(layer3|stages\.2\.blocks)\.\d+\.")
    blocks = {found[0] for found in map(block.match, state_dict) if found}
    stem = state_dict.get(
        "backbone.patch_embed.projection.weight", state_dict.get("backbone.conv1.weight")
    )
    shapes = (0 if stem is None else len(stem), len(blocks), len(queries))
    backbones = {
        (64, 6): "r50",
        (96, 6): "swin-t",
        (96, 18): "swin-s",
        (128, 18): "swin-b",
        (192, 18): "swin-l",
    }
    backbone, data = backbones.get(shapes[:2]), {5: "assr", 8: "irsr"}.get(shapes[2])
    if backbone is None or data is None:
        raise CheckpointError(
            "no published configuration has a backbone of width {} with {} blocks in its third "
            "stage and {} queries; name its configuration to see what differs".format(*shapes)
        )
    return CONFIGS[f"{backbone}-{data}"]


def convert(
    source: str | Path, target: str | Path, config: str | None = None
) -> tuple[Config, str]:
    """Published `.pth` → our safetensors.

    config: its configuration, inferred if not named. → the configuration and what the weights are
    called: "published" only where `dsgnn.config.ZOO` knows the sha256 of the file. Any other file
    of this form is "converted", and nothing is known of its origin.

    Raises CheckpointError when the file is not a published checkpoint, OptionError when the
    configuration is unknown. `target` is written whole or not at all.
    """
    state = read_tensors(source)
    chosen = get_config(config) if config else infer_config(state)
    model = build_model(chosen)
    load_upstream(model, state)
    known = sha256_of(Path(source)) in {weights.sha256 for weights in ZOO}
    weights = "published" if known else "converted"
    save_checkpoint(target, model, weights)
    return chosen, weights


def save_checkpoint(
    path: str | Path,
    model: DSGNN,
    weights: str = "trained",
    origin: str = "",
    compact: bool = False,
) -> None:
    """Write a checkpoint, whole or not at all.

    weights: "trained" by us, "published" by the paper's authors, "converted" from a file of unknown
    origin, or "synthetic" (random). origin: what they were trained on and for how long, in words.
    compact: store as float16 what that holds exactly, such as weights that were rounded to it.
    """
    if weights not in WEIGHTS:
        raise OptionError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    header = {"schema": SCHEMA, "weights": weights, "config": json.dumps(model.config.to_dict())}
    header |= {"origin": origin} if origin else {}
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if compact:
        tensors = {name: _compact(tensor) for name, tensor in tensors.items()}
    write_whole(Path(path), _in_order(save(tensors, metadata=header)))


def _compact(tensor: Tensor) -> Tensor:
    """The same numbers as float16 where that holds all of them."""
    half = tensor.half() if tensor.dtype == torch.float32 else tensor
    return half if torch.equal(half.to(tensor.dtype), tensor) else tensor


def _in_order(data: bytes) -> bytes:
    """The same safetensors file with its metadata in order, so that equal content has one sha256.

    The library writes them in the order of a hash table, which differs from process to process. A
    file is the length of its JSON header in 8 bytes, the header, and the numbers.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    content = json.loads(data[8:end])
    content["__metadata__"] = dict(sorted(content["__metadata__"].items()))
    header = json.dumps(content, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the numbers stay aligned
    return len(header).to_bytes(8, "little") + header + data[end:]


def origin_of(path: str | Path) -> str:
    """What a checkpoint records of the data and the iterations that it was trained on, "" if
    nothing. For files that `load_checkpoint` reads."""
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("origin", "")


def read_safetensors(path: Path, advice: str = "") -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a safetensors file.

    advice: what the message about another file ends with. Raises CheckpointError when the file is
    missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, tensors
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a safetensors file, or cut short ({error}){advice}"
        ) from None


def load_checkpoint(path: str | Path) -> tuple[DSGNN, str]:
    """A model in eval mode from `save_checkpoint`, and where its weights are from.

    Raises CheckpointError when the file is missing, damaged or not one of ours.
    """
    path = Path(path)
    header, tensors = read_safetensors(
        path, "; a published .pth file is converted with dsgnn-convert first"
    )
    if header.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{path}: schema is {header.get('schema')!r}, expected {SCHEMA!r}; was it "
            "written by this version of dsgnn?"
        )
    if missing := {"config", "weights"} - set(header):
        raise CheckpointError(f"{path}: its header has no {', '.join(sorted(missing))}")
    try:
        model = build_model(config_from_dict(json.loads(header["config"])))
    except Exception as error:  # its options reach timm, which may raise anything
        raise CheckpointError(f"{path}: its configuration cannot be used: {error}") from None
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return model, header["weights"]
