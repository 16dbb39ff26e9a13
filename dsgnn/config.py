"""Every network configuration as a frozen dataclass in a plain dict, and the model zoo.

The published configurations follow DSGNN (CVPR 2024); `nano` is the small model that ships in the
package. Use `dataclasses.replace(CONFIGS["r50-assr"], backbone="convnext_tiny")` for variants: any
timm `features_only` backbone with strides 4, 8, 16 and 32 works by name.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any

from dsgnn.runtime.errors import CheckpointError, OptionError


@dataclass(frozen=True)
class Config:
    """One network and how it is trained.

    name: as given to the commands. backbone: a timm model name. backbone_options: keyword
    arguments for `timm.create_model`. frozen_norm: BatchNorm statistics and affine terms of the
    backbone stay as loaded. frozen: parts of the backbone whose weights do. size: S, longest side
    in pixels after the letterbox. queries: Q, the most objects. threshold: an object is kept when
    its score exceeds it. class_weights: [object, none] in the classification loss.

    width: C, channels of every head. pixel_decoder: "deformable" (the published multi-scale
    deformable attention) or "fpn" (convolutions only). seeds: "learned" query vectors as
    published, or "peaks": queries are the features at the peaks of a predicted centre heatmap.
    texture: with the texture branch and domain separation, as published; without it one decoder
    feeds the graph head. layers: L, decoder layers. rank_loss: "published", or "balanced": pairs
    of two objects and pairs of object and none are normalised separately. attention: with a map of
    where people look. nms_iou: of two objects whose masks have a larger IoU only the one with the
    higher score is kept; 1 = both, as published. augmentation: "jitter"
    (flip, large-scale jitter, crop, pad), "flip" or "photo", see `dsgnn.data.transforms.augment`.
    """

    name: str
    backbone: str
    size: int
    queries: int
    threshold: float
    class_weights: tuple[float, float]
    augmentation: str
    backbone_options: dict[str, Any] = field(default_factory=dict)
    frozen_norm: bool = False
    frozen: tuple[str, ...] = ()
    width: int = 256
    pixel_decoder: str = "deformable"
    encoder_layers: int = 6
    layers: int = 9
    feedforward: int = 2048
    seeds: str = "learned"
    texture: bool = True
    rank_loss: str = "published"
    attention: bool = False
    nms_iou: float = 1.0

    def __post_init__(self) -> None:
        choices = {
            "pixel_decoder": ("deformable", "fpn"),
            "seeds": ("learned", "peaks"),
            "rank_loss": ("published", "balanced"),
            "augmentation": ("jitter", "flip", "photo"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise OptionError(
                    f"config {self.name}: {name} must be one of {', '.join(allowed)}, "
                    f"got {getattr(self, name)!r}"
                )
        if self.seeds == "peaks" and self.texture:
            raise OptionError(
                f"config {self.name}: seeds='peaks' needs texture=False, the texture "
                "branch has learned seeds only"
            )
        if self.width % 32:
            raise OptionError(
                f"config {self.name}: width must be a multiple of 32, got {self.width}"
            )

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of `dsgnn.model.Output.answers`."""
        found = ("saliency", "score", "masks")
        return (*found, "attention") if self.attention else found

    @property
    def order(self) -> str:
        """What orders the objects: "attention", each one's share of it, where there is such a map,
        else "saliency"."""
        return "attention" if self.attention else "saliency"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `config_from_dict` is the inverse."""
        return asdict(self)


def config_from_dict(values: dict[str, Any]) -> Config:
    """The `Config` that `to_dict` wrote.

    Raises CheckpointError that names fields that are unknown or missing, and OptionError for values
    that cannot be.
    """
    if not isinstance(values, dict):
        raise CheckpointError(f"expected the fields of a configuration, got {values!r}")
    known = {f.name for f in fields(Config)}
    needed = {f.name for f in fields(Config) if f.default is f.default_factory is MISSING}
    if missing := sorted(needed - set(values)):
        raise CheckpointError(f"the configuration has no {', '.join(missing)}")
    if unknown := sorted(set(values) - known):
        raise CheckpointError(
            f"unknown fields in the configuration: {', '.join(unknown)}; "
            "was this checkpoint written by a newer version of dsgnn?"
        )
    options = {k: tuple(v) if isinstance(v, list) else v  # JSON has no tuples
               for k, v in values.get("backbone_options", {}).items()}  # fmt: skip
    tuples = {name: tuple(values.get(name, ())) for name in ("class_weights", "frozen")}
    return Config(**{**values, "backbone_options": options, **tuples})


_R50_ASSR = Config(
    name="r50-assr", backbone="resnet50", frozen_norm=True, size=576, queries=5, threshold=0.4,
    class_weights=(0.1, 1.0), augmentation="jitter",
)  # fmt: skip
_R50_IRSR = replace(
    _R50_ASSR, name="r50-irsr", size=640, queries=8, threshold=0.75, class_weights=(1.0, 0.1),
    augmentation="flip",
)  # fmt: skip


def _swin(config: Config, letter: str, backbone: str) -> Config:
    return replace(
        config, name=config.name.replace("r50", f"swin-{letter}"), backbone=backbone,
        frozen_norm=False, size=640, threshold=0.75, backbone_options={"drop_path_rate": 0.3},
    )  # fmt: skip


_SWIN = {
    "t": "swin_tiny_patch4_window7_224",
    "s": "swin_small_patch4_window7_224",
    "b": "swin_base_patch4_window12_384",
    "l": "swin_large_patch4_window12_384",
}

_NANO = Config(
    name="nano", backbone="efficientnet_lite2", backbone_options={"bn_eps": 1e-3},
    frozen_norm=True, frozen=("conv_stem", "blocks.0", "blocks.1"), size=288, queries=10,
    threshold=0.5, class_weights=(1.0, 0.5), augmentation="photo", width=96, pixel_decoder="fpn",
    layers=3, feedforward=384, seeds="peaks", texture=False, rank_loss="balanced", attention=True,
    nms_iou=0.8,
)  # fmt: skip

CONFIGS: dict[str, Config] = {
    config.name: config
    for config in (
        _NANO,
        _R50_ASSR,
        _R50_IRSR,
        *(
            _swin(base, letter, backbone)
            for letter, backbone in _SWIN.items()
            for base in (_R50_ASSR, _R50_IRSR)
        ),
    )
}
"""name → configuration: `nano`, and `r50`, `swin-t`, `-s`, `-b`, `-l` for both data sets."""


def get_config(config: str | Config) -> Config:
    """A configuration by name (or itself). OptionError lists the names there are."""
    if isinstance(config, Config):
        return config
    if config not in CONFIGS:
        raise OptionError(f"unknown configuration {config!r}; choose one of {', '.join(CONFIGS)}")
    return CONFIGS[config]


@dataclass(frozen=True)
class Weights:
    """Where the trained weights of one configuration are, and how good they are said to be.

    config, data: what they are and were trained on. sa_sor: as published by the authors, on the
    test split; None where nothing is published. source: where the file is. convert: the command
    that makes it ours, "" where none is needed. sha256: of the file, None where we do not know it.
    """

    config: str
    data: str
    sa_sor: float | None
    source: str
    convert: str
    sha256: str | None = None


def _published(config: str, data: str, sa_sor: float) -> Weights:
    return Weights(
        config, data, sa_sor, "the authors' release, see the paper's repository",
        f"dsgnn-convert upstream.pth -o {config}.safetensors",
    )  # fmt: skip


ZOO: tuple[Weights, ...] = (
    Weights("nano", "photos and where people look", None, "in the package, as ONNX", ""),
    _published("r50-assr", "ASSR", 0.716),
    _published("r50-irsr", "IRSR", 0.569),
    _published("swin-l-assr", "ASSR", 0.761),
    _published("swin-l-irsr", "IRSR", 0.607),
)
"""The weights there are. Published files are not ours to hand on."""


def zoo_table() -> str:
    """`ZOO` as the Markdown table between <!-- zoo --> and <!-- /zoo --> in docs/export.md."""
    lines = ["| configuration | trained on | SA-SOR, published | weights | convert | sha256 |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for w in ZOO:
        sa_sor = "–" if w.sa_sor is None else f"{w.sa_sor:.3f}".lstrip("0")
        command = f"`{w.convert}`" if w.convert else "not needed"
        lines.append(
            f"| `{w.config}` | {w.data} | {sa_sor} | {w.source} | {command} | "
            f"{f'`{w.sha256}`' if w.sha256 else 'unknown' if w.convert else 'in its sidecar'} |"
        )
    return "\n".join(lines)
