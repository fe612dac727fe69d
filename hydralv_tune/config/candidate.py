"""The candidate: everything that determines one fine-tuning, under PyTorch Connectomics' keys.

Values are frozen and unknown keys refused. A file may be partial: what it does not say comes
from `trials/baseline.yaml`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from hydralv_tune.config.strict_model import (
    Count,
    Filters,
    Finite,
    Names,
    NotNegative,
    Numbers,
    OpenModel,
    Pad3,
    Paths,
    Positive,
    Share,
    Side,
    Size3,
    StrictModel,
    Whole,
    spelled,
)


class Training(StrictModel):
    """`system.training`."""

    batch_size: Count = Field(8, description="Patches per optimizer micro-step.")
    num_gpus: Whole = Field(1, description="No effect: a trial uses one device.")
    num_cpus: Whole = Field(1, description="No effect: see `run --cpus-per-trial`.")
    num_workers: Whole = Field(0, description="No effect: no loader processes are used.")


class InferenceSystem(Training):
    """`system.inference`."""

    batch_size: Count = Field(1, description="Windows predicted at once.")


class System(StrictModel):
    """`system`."""

    seed: Whole = Field(42, description="Seed of weights, patches and augmentation.")
    cpu_threads: Count | None = Field(None, description="CPU threads of a trial; null: all.")
    training: Training = Field(default_factory=Training)
    inference: InferenceSystem = Field(default_factory=InferenceSystem)


class LossBalancing(StrictModel):
    """`model.loss_balancing`."""

    strategy: Literal["none", "uncertainty", "gradnorm"] = Field(
        "none", description="How the loss terms are weighted while training; null is none."
    )
    gradnorm_alpha: NotNegative = Field(0.5, description="Pull toward equal training rates.")
    gradnorm_lambda: NotNegative = Field(
        1.0, description="Factor on the step of the task weights; 0: none."
    )
    gradnorm_parameter_strategy: Literal["first", "last"] = Field(
        "last", description="Which shared weights the gradient norms are measured on."
    )

    @field_validator("strategy", mode="before")
    @classmethod
    def _null_is_none(cls, value: Any) -> Any:
        """Return `none` for null, as today's PyTorch Connectomics writes it."""
        return "none" if value is None else value


class Model(OpenModel):
    """`model`; an architecture may declare keys of its own beside these."""

    architecture: str = Field("rsunet", description="A name of the table of architectures.")
    in_channels: Literal[1] = Field(1, description="An image has one channel.")
    out_channels: Literal[3] = Field(3, description="Binary, boundary, distance.")
    input_size: Size3 | None = Field(None, description="No effect: `data.patch_size` decides.")
    output_size: Size3 | None = Field(None, description="No effect: `data.patch_size` decides.")
    filters: Filters = Field((32, 64, 128, 256, 512), description="Channels of each level.")
    deep_supervision: bool = Field(False, description="Train the coarser levels too.")
    deep_supervision_weights: Numbers | None = Field(
        None, description="From fine to coarse; null: 1, 0.5, 0.25, …"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Share of channels dropped while training; null: none."
    )
    norm: str | None = Field(None, description="null: the architecture's own.")
    num_groups: Count | None = Field(
        None, description="norm group: the largest divisor of the channels up to it; null: 8."
    )
    activation: str | None = Field(None, description="null: the architecture's own.")
    kernel_size: Side | Size3 | None = Field(None, description="Odd; null: the architecture's own.")
    strides: list[int | list[int]] | None = Field(
        None,
        description="monai_unet, monai_segresnet: one per step between levels; null: "
        "[1, 2, 2] each.",
    )
    num_res_units: Whole | None = Field(None, description="monai_unet: per block; null: 2.")
    down_factors: list[list[int]] | None = Field(
        None, description="rsunet: pooling between levels; null: [1, 2, 2] each."
    )
    depth_2d: Whole | None = Field(
        None, description="rsunet: how many of the finest levels use kernel_2d; null: 0."
    )
    kernel_2d: Size3 | None = Field(None, description="rsunet; null: [1, 3, 3].")
    upsample: str | None = Field(None, description="deconv, nontrainable or pixelshuffle.")
    mednext_size: Literal["S", "B", "M", "L"] | None = Field(None, description="mednext; null: S.")
    mednext_kernel_size: Literal[3, 5, 7] | None = Field(None, description="mednext; null: 3.")
    loss_functions: Names = Field(
        ("DiceLoss", "WeightedBCEWithLogitsLoss", "DiceLoss", "WeightedBCEWithLogitsLoss",
         "SmoothL1Loss"),
        description="Names of the table of losses.",
    )  # fmt: skip
    loss_weights: Numbers = Field((1.0, 1.0, 1.0, 1.0, 1.0), description="One per loss.")
    loss_kwargs: list[dict[str, Any]] = Field(
        default_factory=list, description="One mapping per loss; empty: the loss' defaults."
    )
    multi_task_config: list[list[Any]] = Field(
        default_factory=lambda: [
            [0, 1, "label", [0, 1]], [1, 2, "boundary", [2, 3]], [2, 3, "edt", [4]],
        ],
        description="[first channel, end, task, losses] of each task.",
    )  # fmt: skip
    loss_balancing: LossBalancing = Field(default_factory=LossBalancing)
    external_weights_path: str | None = Field(
        None, description="Pretrained weights: a file, or `phantom`, which ships."
    )
    external_weights_key_prefix: str = Field("model.", description="Prefix in that file.")
    external_weights_strict: bool = Field(
        True, description="Refuse weights that match only in part."
    )

    @classmethod
    def open_keys(cls) -> frozenset[str]:
        """Return the keys that architectures declare."""
        from hydralv_tune.numerics.networks.registry import own_keys

        return own_keys()


class ImageTransform(StrictModel):
    """`data.image_transform`: the same in training and in prediction."""

    normalize: Annotated[
        Literal["0-1", "z_volume", "z_section", "clahe", "none"],
        spelled({"normal": "z_volume", "z-score": "z_volume", "zscore": "z_volume"}),
    ] = Field(
        "0-1",
        description="0–1 per volume; standardisation per volume (`normal` is its other name) or "
        "per section; CLAHE, which equalises each section in 7 x 7 tiles at a clip limit of 2, "
        "to 0–1; none.",
    )
    fill: Literal["constant", "zeros"] = Field(
        "constant",
        description="What is left out of range and statistics where it takes 5 % of a section or "
        "more: constant regions, as padding; zeros alone, as checkpoints before version 2.",
    )
    clip_percentile_low: Share = Field(0.0, description="Share of voxels clipped below.")
    clip_percentile_high: Share = Field(1.0, description="Share from which on is clipped above.")


class Target(StrictModel):
    """One entry of `data.label_transform.targets`."""

    name: Literal["binary", "instance_boundary", "instance_edt"] = Field(
        description="The three, in this order."
    )
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="thickness, edge_mode, mode; mode, quantize."
    )


class LabelTransform(StrictModel):
    """`data.label_transform`."""

    targets: list[Target] = Field(
        default_factory=lambda: [
            Target(name="binary"),
            Target(name="instance_boundary",
                   kwargs={"thickness": 1, "edge_mode": "all", "mode": "2d"}),
            Target(name="instance_edt", kwargs={"mode": "3d", "quantize": False}),
        ],
        description="What the three channels learn, in this order.",
    )  # fmt: skip
    edt_voxel_size: Literal["unit", "volume"] = Field(
        "unit", description="Distances in voxels, or in nm by the volume's voxel size."
    )


class Sampling(StrictModel):
    """`data.sampling`: where training patches are taken from."""

    foreground_share: Share = Field(0.5, description="Share of patches centred on an instance.")


class AugmentationSettings(StrictModel):
    """`data.augmentation`: the preset, and the knobs of each by its name."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)
    preset: Literal["none", "some", "all"] = Field(
        "some", description="none; those enabled; all that are not switched off."
    )

    @property
    def settings(self) -> dict[str, Any]:
        """Return the knobs said for each augmentation, `enabled` among them."""
        return dict(self.model_extra or {})


class Split(StrictModel):
    """`data.split`: what is trained on and what is scored."""

    kind: Literal["none", "holdout", "volumes", "cross_validation", "blocks"] = Field(
        "none", description="none scores on the training volume."
    )
    axis: Annotated[int, Field(ge=0, le=2)] = Field(0, description="Axis of the slabs.")
    fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.25, description="Share of the axis held out."
    )
    side: Literal["low", "high"] = Field("high", description="Which end is held out.")
    margin: Whole | None = Field(None, description="Voxels between; null: a receptive field.")
    volumes: list[str] = Field(default_factory=list, description="Names of held-out volumes.")
    folds: Annotated[int, Field(ge=2)] = Field(3, description="Of a cross-validation; at most 64.")
    blocks: Size3 = Field(
        (1, 2, 2),
        description="blocks: in how many each volume is cut (z, y, x); each is held out in turn. "
        "At most 64 in all.",
    )

    @property
    def networks(self) -> int:
        """Return how many networks a trial trains at most."""
        if self.kind == "cross_validation":
            return self.folds
        return math.prod(self.blocks) if self.kind == "blocks" else 1


class Data(StrictModel):
    """`data`."""

    train_path: str | None = Field(None, description="No effect: `--image` decides.")
    train_image: Paths = Field(None, description="No effect: `--image` decides.")
    train_label: Paths = Field(None, description="No effect: `--label` decides.")
    train_mask: Paths = Field(None, description="No effect: `--mask` decides.")
    train_resolution: list[float] | None = Field(None, description="Voxel size in nm (z, y, x).")
    val_image: Paths = Field(
        None, description="Held-out volumes of their own, for `data.split.kind: volumes`."
    )
    val_label: Paths = Field(None, description="Their labels.")
    val_mask: Paths = Field(None, description="Their masks.")
    val_resolution: list[float] | None = Field(
        None, description="No effect: no score depends on a voxel size."
    )
    use_preloaded_cache: bool | None = Field(None, description="No effect: always resident.")
    cache_rate: Share | None = Field(None, description="No effect: always resident.")
    persistent_workers: bool | None = Field(
        None, description="No effect: no loader processes are used."
    )
    patch_size: Size3 = Field((32, 128, 128), description="Voxels (z, y, x).")
    pad_size: Pad3 = Field((0, 0, 0), description="Voxels added around the volume.")
    pad_mode: Literal["reflect", "constant", "replicate"] = Field("reflect", description="How.")
    iter_num_per_epoch: Count = Field(1280, description="Patches per epoch.")
    image_transform: ImageTransform = Field(default_factory=ImageTransform)
    label_transform: LabelTransform = Field(default_factory=LabelTransform)
    sampling: Sampling = Field(default_factory=Sampling)
    augmentation: AugmentationSettings = Field(default_factory=AugmentationSettings)
    split: Split = Field(default_factory=Split)
    memory_limit_gb: Positive = Field(
        8.0,
        description="Of each volume; larger ones are read lazily. Folds that are slabs of one "
        "volume hold it `split.folds` - 1 times.",
    )


class Optimizer(StrictModel):
    """`optimization.optimizer`."""

    name: Literal["AdamW"] = Field("AdamW", description="The only one.")
    lr: Annotated[float, Field(gt=0, lt=10, allow_inf_nan=False)] = Field(
        1e-4, description="Highest learning rate."
    )
    weight_decay: NotNegative = Field(0.01, description="Decoupled, as in AdamW.")
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = Field(
        (0.9, 0.999), description="Decay of the two moments."
    )
    eps: Positive = Field(1e-8, description="Added to the denominator.")


class Scheduler(StrictModel):
    """`optimization.scheduler`."""

    name: Annotated[
        Literal["WarmupCosineLR", "constant"],
        spelled(
            {
                "warmupcosine": "WarmupCosineLR",
                "ConstantLR": "constant",
                "WarmupCosine": "WarmupCosineLR",
                "warmup_cosine": "WarmupCosineLR",
            }
        ),
    ] = Field("WarmupCosineLR", description="`warmupcosine` and `ConstantLR` are other names.")
    warmup_epochs: Whole = Field(0, description="Epochs of rising rate; 0: none.")
    warmup_start_lr: Annotated[float, Field(gt=0, le=1)] = Field(
        0.001, description="Factor of the rate at the start of the warm-up."
    )
    min_lr: NotNegative = Field(0.0, description="Rate at the end of the cosine.")


class Ema(StrictModel):
    """`optimization.ema`: an exponential moving average of the weights."""

    enabled: bool = Field(False, description="Whether it acts.")
    decay: Annotated[float, Field(gt=0, lt=1)] = Field(0.999, description="Share that is kept.")
    warmup_steps: Whole = Field(0, description="Optimizer steps before averaging begins.")
    validate_with_ema: bool = Field(True, description="Evaluate and keep the average.")


class Optimization(StrictModel):
    """`optimization`."""

    max_epochs: Count = Field(500, description="Epochs of `data.iter_num_per_epoch` patches.")
    gradient_clip_val: NotNegative = Field(0.5, description="Largest gradient norm; 0: off.")
    accumulate_grad_batches: Count = Field(1, description="Batches of one optimizer step.")
    precision: Annotated[
        Literal["32", "bf16-mixed"],
        spelled(
            {
                32: "32",
                "32-true": "32",
                "16-mixed": "bf16-mixed",
                16: "bf16-mixed",
                "bf16": "bf16-mixed",
            }
        ),
    ] = Field(
        "bf16-mixed",
        description="bf16-mixed acts on a GPU alone; `16-mixed` is read as it, since it needs no "
        "loss scaling.",
    )
    optimizer: Optimizer = Field(default_factory=Optimizer)
    scheduler: Scheduler = Field(default_factory=Scheduler)
    ema: Ema = Field(default_factory=Ema)


class EarlyStopping(StrictModel):
    """`monitor.early_stopping`, watched on the total training loss of each epoch."""

    enabled: bool = Field(False, description="Whether it acts.")
    monitor: str = Field(
        "train_loss_total_epoch", description="No other is watched, so any other is refused."
    )
    mode: Literal["min"] = Field("min", description="The only one.")
    patience: Count = Field(100, description="Epochs without a better loss.")
    min_delta: NotNegative = Field(0.0, description="What counts as better.")
    threshold: Finite | None = Field(None, description="Stop once the loss is under it.")
    divergence_threshold: Finite | None = Field(None, description="Stop once it is above.")
    check_finite: bool = Field(
        True, description="No effect: a loss that is not finite fails the trial."
    )


class EvaluationSettings(StrictModel):
    """`monitor.evaluation`: predict, sweep, report while training."""

    count: Count = Field(10, description="Evaluations over the training, the last included.")
    sweep_time_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="Share of the training time so far that a sweep may take."
    )


class Monitor(StrictModel):
    """`monitor`."""

    detect_anomaly: bool = Field(
        False,
        description="No effect: a loss that is not finite "
        "fails the trial with the step and the parts named.",
    )
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    early_stopping: EarlyStopping = Field(default_factory=EarlyStopping)
    checkpoint: dict[str, Any] = Field(
        default_factory=dict, description="No effect: last and best are always kept."
    )
    logging: dict[str, Any] = Field(
        default_factory=dict, description="No effect: every evaluation is logged."
    )


class SlidingWindow(StrictModel):
    """`inference.sliding_window`."""

    window_size: Size3 | None = Field(None, description="null: the patch size.")
    sw_batch_size: Count | None = Field(None, description="null: `system.inference.batch_size`.")
    overlap: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.25, description="Share of a window that the next one covers again."
    )
    blending: Literal["gaussian", "constant"] = Field(
        "gaussian", description="Weight of a voxel by its place in the window."
    )
    sigma_scale: Positive = Field(0.125, description="Width of the Gaussian, in windows.")
    padding_mode: Literal["constant", "reflect", "replicate", "circular"] = Field(
        "reflect", description="What surrounds a volume smaller than a window."
    )


class TestTimeAugmentation(StrictModel):
    """`inference.test_time_augmentation`."""

    __test__ = False  # no test class, whatever pytest thinks of the name
    enabled: bool = Field(False, description="Whether it acts.")
    flip_axes: Literal["all"] | list[int | list[int]] | None = Field(
        None, description="all: every subset of z, y, x; or a list of axes (0 is z)."
    )
    rotation90_axes: Literal["all"] | list[list[int]] | None = Field(
        None, description="Planes of quarter turns, like [[1, 2]]; all: every plane."
    )
    rotate90_k: list[int] | None = Field(None, description="Quarter turns; null: 0 to 3.")
    channel_activations: list[list[Any]] = Field(
        default_factory=lambda: [[0, 1, "sigmoid"], [1, 2, "sigmoid"], [2, 3, "tanh"]],
        description="[first channel, end, activation].",
    )
    select_channel: str | int | list[int] | None = Field(None, description="No effect.")
    ensemble_mode: Literal["mean", "min", "max"] = Field(
        "mean", description="How the transforms are joined."
    )
    apply_mask: bool = Field(False, description="Write background outside the mask.")


class Inference(StrictModel):
    """`inference`."""

    sliding_window: SlidingWindow = Field(default_factory=SlidingWindow)
    test_time_augmentation: TestTimeAugmentation = Field(default_factory=TestTimeAugmentation)
    save_prediction: dict[str, Any] = Field(
        default_factory=dict, description="No effect: `predict` writes probabilities."
    )


DISTANCE_DECODERS = ("decode_instance_watershed_distance", "decode_distance_watershed")


class DecodingStep(StrictModel):
    """One entry of `test.decoding`."""

    name: str = Field(
        "decode_instance_binary_contour_distance", description="A name of the table of decoders."
    )
    enabled: bool = Field(True, description="The first enabled step decodes.")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Of the decoder.")

    def decoder_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of our decoder.

        Channel choices, which are fixed, go. A single distance threshold is the seed's, as
        PyTorch Connectomics' fine-tuning plans write it for the distance-only decoder.
        """
        found = {key: v for key, v in self.kwargs.items() if not key.endswith("_channels")}
        seed = found.get("distance_threshold")
        single = isinstance(seed, int | float) and not isinstance(seed, bool)
        if single and self.name in DISTANCE_DECODERS:
            found["distance_threshold"] = [seed, min(float(seed or 0), 0.0)]
        return found


class DecodingGrid(StrictModel):
    """The combinations that a sweep scores; what is not said takes the decoder's default."""

    decoder: str = Field(
        "decode_instance_binary_contour_distance", description="A name of the table of decoders."
    )
    grid: dict[str, Any] = Field(
        default_factory=dict,
        description="`binary_threshold: {seed: [...], foreground: [...]}`, `min_seed_size: [...]`",
    )
    fixed: dict[str, Any] = Field(
        default_factory=dict,
        description="Decoder arguments without an axis: `flood`, `floor`, `split_components`.",
    )
    refine: Whole = Field(0, description="Rounds of refinement around the winner.")

    @property
    def entries(self) -> dict[str, Any]:
        """Return what is given for each axis, `binary_threshold.seed` and the like, unchecked."""
        entries: dict[str, Any] = {}
        for name, values in self.grid.items():
            if isinstance(values, dict):
                entries.update({f"{name}.{part}": given for part, given in values.items()})
            else:
                entries[name] = values
        return entries

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """Return the values of each axis."""
        return {name: tuple(values) for name, values in self.entries.items()}


class TestSection(StrictModel):
    """`test`."""

    __test__ = False
    data: dict[str, Any] = Field(default_factory=dict, description="No effect: `--image` decides.")
    decoding: Annotated[list[DecodingStep], Field(min_length=1)] = Field(
        default_factory=lambda: [DecodingStep()],
        description="Thresholds of `decode` and of an export; a trial sweeps its own.",
    )
    decoding_grid: DecodingGrid | None = Field(
        None, description="The grid that is swept; null: that of the search space."
    )
    evaluation: dict[str, Any] = Field(default_factory=dict, description="No effect.")


class Candidate(StrictModel):
    """Everything that determines one fine-tuning and its score, apart from the volumes."""

    experiment_name: str | None = Field(None, description="A name for people.")
    description: str | None = Field(None, description="A sentence for people.")
    system: System = Field(default_factory=System)
    model: Model = Field(default_factory=Model)
    data: Data = Field(default_factory=Data)
    optimization: Optimization = Field(default_factory=Optimization)
    monitor: Monitor = Field(default_factory=Monitor)
    inference: Inference = Field(default_factory=Inference)
    test: TestSection = Field(default_factory=TestSection)

    def as_mapping(self) -> dict[str, Any]:
        """Return the candidate as plain JSON types, defaults included."""
        return self.model_dump(mode="json")
