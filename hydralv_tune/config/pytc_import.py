"""A configuration of PyTorch Connectomics as a candidate, a decoding grid and volumes.

Today's form is first put under the names of January 2026, which are ours but for a few. What has
no counterpart is collected, each with what that means for the result, and never dropped in silence.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydralv_tune.config.candidate_rules import TARGETS, WATCHED
from hydralv_tune.config.errors import ConfigError
from hydralv_tune.config.pytc_files import is_todays, leaf_paths, numbers_of, stage_view
from hydralv_tune.config.pytc_portability import VOXEL_WEIGHTED
from hydralv_tune.config.validation import MISSING, merged, nested, value_at

ARCHITECTURES = ("rsunet", "rsunet_iso", "monai_basic_unet3d", "monai_unet", "mednext")
DECODERS = {
    "decode_instance_binary_contour_distance": "decode_instance_binary_contour_distance",
    "decode_binary_contour_distance_watershed": "decode_instance_binary_contour_distance",
    "decode_distance_watershed": "decode_distance_watershed",
}
RENAMED = {"slice_shift_z": "misalignment", "slice_drop_z": "missing_section"}
SCHEDULES = {
    "warmupcosine": "WarmupCosineLR", "warmupcosinelr": "WarmupCosineLR",
    "cosineannealinglr": "WarmupCosineLR", "constant": "constant", "constantlr": "constant",
}  # fmt: skip
OVERLAPS = ("DiceLoss", "TverskyLoss", "DiceCELoss", "DiceFocalLoss")
GRID_VALUES = {"threshold": 5, "size": 3}
"""Values that a range becomes in the decoding grid, for a threshold and for a size."""

WITHOUT_EFFECT = (
    "experiment_name", "description", "save_path", "system", "monitor.checkpoint",
    "monitor.logging", "monitor.wandb", "monitor.nan_detection", "monitor.detect_anomaly",
    "inference.save_prediction", "inference.evaluation", "evaluation", "test.evaluation",
    "data.pin_memory", "data.persistent_workers", "data.use_preloaded_cache", "data.cache_rate",
    "data.use_cache", "data.num_workers", "data.batch_size", "model.input_size",
    "model.output_size", "model.spatial_dims", "optimization.log_every_n_steps",
    "optimization.benchmark", "optimization.deterministic", "optimization.val_check_interval",
    "optimization.val_check_interval_unit", "optimization.num_sanity_val_steps",
    "optimization.val_steps_per_epoch", "tune.output", "tune.logging", "tune.storage",
    "tune.study_name", "tune.load_if_exists", "tune.save_study", "tune.enabled", "tune.n_trials",
    "tune.timeout", "tune.pruner", "tune.sampler", "tune.evaluation", "tune.save_path",
    "tune.save_report", "tune.save_visualizations", "tune.save_best_segmentation",
    "tune.save_all_trials", "tune.save_predictions_path", "tune.save_cache_suffix",
    "tune.optimization", "test.data.output_path", "inference.data.output_path",
    "inference.test_time_augmentation.select_channel", "inference.save_results",
    "inference.save_path", "inference.save_dtype", "inference.memory_cleanup",
    "inference.sliding_window.sw_device", "inference.sliding_window.output_device",
    "inference.sliding_window.keep_input_on_cpu", "inference.system", "inference.execution",
    "data.dataloader.pin_memory", "data.dataloader.persistent_workers",
    "data.dataloader.use_preloaded_cache_train", "data.dataloader.use_preloaded_cache_val",
    "data.dataloader.use_cache", "data.dataloader.cache_rate", "data.dataloader.use_lazy_zarr",
    "data.dataloader.use_lazy_h5", "decoding.enabled", "decoding.save_results",
    "decoding.save_path", "decoding.save_suffix", "decoding.save_intermediate",
    "monitor.early_stopping.check_finite", "optimization.ema.device",
    "optimization.scheduler.t_max",
    "optimization.ema.copy_buffers", "optimization.scheduler.interval",
    "optimization.scheduler.frequency", "optimization.scheduler.params", "model.mednext_dim",
    "model.mednext_checkpoint_style", "model.mednext.checkpoint_style", "model.mednext.dim",
    "tune.data.tune_resolution", "data.dataloader.cached_sampling_sample_nonzero_mask",
    "inference.model.crop_pad", "inference.test_time_augmentation.patch_first_local",
    "data.root_path", "data.label_transform.normalize", "test.data.test_resolution",
    "inference.data.test_resolution", "inference.data.output_name", "data.augmentation.enabled",
    "data.train.label_aux_type",
    "data.val.label_aux_type", "data.val_resolution", "data.cached_sampling_max_attempts",
    "data.dataloader.cached_sampling_max_attempts", "data.label_transform.cache_dir",
    "data.label_transform.keys", "data.label_transform.stack_outputs", "data.stride",
    "data.label_transform.output_dtype", "data.label_transform.output_key_format",
    "data.label_transform.skeleton_distance", "data.label_transform.edge_mode",
    "data.label_transform.boundary_thickness", "inference.batch_size", "inference.num_workers",
    "data.train_image_key", "data.train_label_key", "data.val_image_key", "data.val_label_key",
    "test.data.cache_suffix", "tune.data.cache_suffix", "test.data.image_transform.pad_mode",
)  # fmt: skip
"""Keys that name devices, logs and files, or the tool's own search: a result does not depend on
them here."""

OF_OTHER_NETWORKS = (
    "model.feature_size", "model.hidden_size", "model.mlp_dim", "model.num_heads",
    "model.nnunet_device", "model.external_weights_key_prefix", "optimization.optimizer.momentum",
    "inference.num_gpus", "inference.num_cpus",
)  # fmt: skip
"""Keys of transformers and other networks, of other optimizers, of weights that are not named."""
COARSEST_MASK = 8
"""As many voxels along an axis a voxel of a mask may stand for here."""
MEANINGS = {
    "model.dropout": "its RSUNet ignored it; here it would act",
    "model.norm": "its RSUNet reads rsunet_norm alone",
    "model.kernel_size": "its RSUNet and BasicUNet ignored it",
    "model.strides": "no network of that tool reads it",
    "model.num_res_units": "only its UNet reads it",
    "model.upsample": "only its BasicUNet reads it",
    "model.mednext_size": "only MedNeXt reads it",
    "model.mednext_kernel_size": "only MedNeXt reads it",
    "model.filters": "MedNeXt has widths of its own",
    "model.act": "no network of that tool reads it",
    "model.activation": "only its BasicUNet reads it",
    "data.cellmap": "CellMap volumes are not read here: give --image, --label",
    "data.dataset_type": "volumes alone are read here: give --image and --label",
    "data.label_transform.erosion": "labels are not eroded here; touching instances stay touching",
    "data.augmentation.defect_mutex": "several defects may meet in a patch here",
    "data.data_transform.resize": "volumes are not resized here: resize them first",
    "decoding.postprocessing.instance_cc3d": "instances are split into 6-connected parts alone, "
    "by the decoder (split_components), and min_instance_size is the least size of a part",
    "decoding.postprocessing.enabled": "see its steps",
    "decoding.postprocessing": "instances are not cleaned after decoding here",
    "inference.postprocessing": "segmentations are not cleaned after decoding here",
    "optimization.max_steps": "optimization.max_epochs decides here",
    "inference.model.head": "a network has one head here",
    "model.heads": "a network has one head here, of the three channels",
    "model.primary_head": "a network has one head here",
    "data.split_": "volumes are split by data.split here: say its kind",
    "data.dataloader.cached_sampling_foreground_threshold": "written as data.sampling",
    "model.deep_supervision_clamp_": "logits beyond 20 are not cut off here",
    "model.num_groups": "it is read with norm group alone, and its RSUNet reads rsunet_num_groups",
    "tune.parameter_space": "each range is swept at a few values instead of sampled",
}  # fmt: skip


@dataclass(frozen=True)
class LeftOut:
    """What has no counterpart.

    Args:
        key: The key path in the file.
        meaning: What it means for the result.
        matters: Whether a result may depend on it.
    """

    key: str
    meaning: str
    matters: bool = True

    def __str__(self) -> str:
        """Return the key and what leaving it out means."""
        return f"{self.key}: {self.meaning}"


@dataclass
class Imported:
    """What a configuration becomes here.

    Args:
        candidate: A partial candidate, over the baseline.
        grid: `{decoder, grid}` of a search space, where the file tunes thresholds.
        volumes: Role (`train`, `val`, `test`, `tune`) to image, label and mask paths.
        left_out: What has no counterpart, in the file's order.
    """

    candidate: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] | None = None
    volumes: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Return whether nothing is left out that a result may depend on."""
        return not any(entry.matters for entry in self.left_out)


def import_peer(
    mapping: Mapping[str, Any],
    *,
    place: str,
    folder: Path,
    check: Callable[[Mapping[str, Any]], Any],
) -> Imported:
    """Return a resolved configuration of that tool as a candidate, a grid and volumes.

    Args:
        mapping: As `read_peer_file` returns it, or as a checkpoint keeps it.
        place: The file, for messages.
        folder: Where relative paths of volumes start.
        check: Function of a partial candidate that raises a ConfigError where it breaks a rule.

    Raises:
        ConfigError: Its network has no counterpart, or works in two dimensions.
    """
    if is_todays(mapping):
        mapping, origins = _as_january(mapping)
    else:
        origins = {}
    return _Importer(mapping, place, folder, origins, check).run()


class _Importer:
    """One import: what was used of a mapping, and the candidate as far as it is built."""

    def __init__(
        self,
        mapping: Mapping[str, Any],
        place: str,
        folder: Path,
        origins: Mapping[str, str],
        check: Callable[[Mapping[str, Any]], Any],
    ) -> None:
        self.mapping, self.place, self.folder, self.origins = mapping, place, folder, origins
        self.check = check
        self.used: set[str] = set()
        self.result = Imported()

    def run(self) -> Imported:
        """Return the import, block by block; a block that breaks a rule is left out with it."""
        self._network()
        bcd = self._targets()
        self._losses(bcd)
        self._data()
        self._augmentations()
        self._optimization()
        self._inference(bcd)
        self._decoding(bcd)
        self._grid(bcd)
        self._masks()
        self._rest()
        return self.result

    def at(self, path: str, default: Any = None) -> Any:
        """Return a value and mark it as used."""
        found = value_at(self.mapping, path)
        if found is MISSING or found is None:
            return default
        self.used.add(path)
        return found

    def leave(self, path: str, meaning: str, *, matters: bool = True) -> None:
        """Note that a key has no counterpart."""
        self.used.add(path)
        self.result.left_out.append(LeftOut(self.origins.get(path, path), meaning, matters))

    def lay(self, partial: Mapping[str, Any], key: str) -> bool:
        """Lay a block over the candidate; leave it out, with the rule, where it breaks one."""
        joined = merged(self.result.candidate, partial)
        try:
            self.check(joined)
        except ConfigError as error:
            self.leave(key, str(error))
            return False
        self.result.candidate = joined
        return True

    def refuse(self, key: str, value: Any, reason: str) -> None:
        """Refuse the whole file.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{self.place}: {self.origins.get(key, key)} is {value!r}: {reason}")

    def _network(self) -> None:
        """Take the architecture with patch and window, or refuse the file."""
        name = self.at("model.architecture")
        if name is None:
            self.refuse("model.architecture", None,
                        "the file names no network, so there is nothing to train here. Files that "
                        "decode the predictions of another run cannot be taken over.")  # fmt: skip
        if name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            self.refuse(
                "model.architecture", name, f"there is no such network here. Known: {known}."
            )
        patch = self.at("data.patch_size", [128, 128, 128])
        if len(patch) != 3 or patch[0] == 1 or self.at("data.do_2d") is True:
            self.refuse("data.patch_size", patch, "volumes are segmented in three dimensions here.")
        if self.at("model.in_channels", 1) != 1:
            self.refuse("model.in_channels", self.at("model.in_channels"),
                        "an image has one channel here.")  # fmt: skip
        take = {"rsunet": self._rsunet, "rsunet_iso": self._rsunet,
                "monai_basic_unet3d": self._basic_unet, "monai_unet": self._unet,
                "mednext": self._mednext}  # fmt: skip
        model = {"architecture": name.removesuffix("_iso"), **take[name]()}
        model["deep_supervision"] = bool(self.at("model.deep_supervision", False))
        window = self.at("inference.sliding_window.window_size")
        network = {
            "model": {key: value for key, value in model.items() if value is not None},
            "data": {"patch_size": list(patch)},
            "inference": {"sliding_window": {"window_size": window}},
        }
        try:
            self.check(network)
        except ConfigError:
            network["inference"]["sliding_window"]["window_size"] = None
            self.check(network)
            self.leave("inference.sliding_window.window_size", "the patch size is the window here")
        self.result.candidate = network
        weights = self.at("model.external_weights_path")
        if weights:
            prefix = self.at("model.external_weights_key_prefix", "model.")
            self.lay({"model": {"external_weights_path": weights,
                                "external_weights_key_prefix": prefix}},
                     "model.external_weights_path")  # fmt: skip

    def _filters(self) -> list[int]:
        return list(self.at("model.filters", [32, 64, 128, 256, 512]))

    def _rsunet(self) -> dict[str, Any]:
        """Return the keys of an RSUNet."""
        filters, norm = self._filters(), self.at("model.rsunet_norm", "batch")
        model: dict[str, Any] = {"filters": filters, "norm": norm, "dropout": 0.0}
        if norm == "group":
            model["num_groups"] = self.at("model.rsunet_num_groups", 8)
        if self.at("model.architecture") == "rsunet_iso":
            model["down_factors"] = [[2, 2, 2]] * (len(filters) - 1)
        for key in ("activation", "down_factors"):
            model[key] = self.at(f"model.rsunet_{key}", model.get(key))
        if self.at("model.rsunet_depth_2d", 0):
            model["depth_2d"] = min(self.at("model.rsunet_depth_2d"), len(filters))
            model["kernel_2d"] = self.at("model.rsunet_kernel_2d", [1, 3, 3])
        for path in ("rsunet_kernel_2d", "rsunet_depth_2d", "rsunet_num_groups",
                     "rsunet_act_negative_slope", "rsunet_act_init"):  # fmt: skip
            self.used.add(f"model.{path}")
        return model

    def _monai(self) -> dict[str, Any]:
        """Return the keys that both MONAI networks read."""
        norm = self.at("model.norm", "batch")
        model = {"norm": norm, "dropout": float(self.at("model.dropout", 0.0))}
        if norm == "group":
            model["num_groups"] = self.at("model.num_groups", 8)
        return model

    def _basic_unet(self) -> dict[str, Any]:
        """Return the keys of a BasicUNet, whose widths that tool completes with the last."""
        filters = self._filters()[:6]
        filters += [filters[-1]] * (6 - len(filters))
        return {
            "filters": filters,
            **self._monai(),
            "activation": self.at("model.activation", "relu"),
            "upsample": self.at("model.upsample"),
        }

    def _unet(self) -> dict[str, Any]:
        """Return the keys of a UNet, which halves every axis at every level there."""
        filters = self._filters()
        return {
            "filters": filters,
            **self._monai(),
            "strides": [[2, 2, 2]] * (len(filters) - 1),
            "num_res_units": self.at("model.num_res_units", 2),
            "kernel_size": self.at("model.kernel_size", 3),
        }

    def _mednext(self) -> dict[str, Any]:
        """Return the keys of a MedNeXt; its weights are of another package."""
        self.used |= {"model.filters", "model.dropout"}
        if self.at("model.external_weights_path"):
            self.leave("model.external_weights_path", "MedNeXt of that tool is another package, so "
                       "its weights do not fit; the candidate starts anew")  # fmt: skip
            self.mapping = merged(self.mapping, nested("model.external_weights_path", None))
        return {
            "filters": [32, 64, 128, 256, 512],
            "mednext_size": self.at("model.mednext_size", "S"),
            "mednext_kernel_size": self.at("model.mednext_kernel_size", 3),
        }

    def _targets(self) -> bool:
        """Take the targets; return whether they are the three of this tool."""
        path = "data.label_transform.targets"
        targets = self.at(path, [])
        channels = self.at("model.out_channels", 1)
        names = [target.get("name") for target in targets if isinstance(target, Mapping)]
        if names == list(TARGETS) and channels == 3:
            kept = []
            for target in targets:
                kwargs = dict(target.get("kwargs") or {})
                kwargs.pop("quantize", None)
                known = set(TARGETS[target["name"]]) | {"thickness"}
                lost = sorted(set(kwargs) - known)
                if lost:
                    self.leave(f"{path}.{target['name']}.{lost[0]}", "targets have no such option")
                kwargs = {key: value for key, value in kwargs.items() if key in known}
                kept.append({"name": target["name"], "kwargs": kwargs})
            self.lay({"data": {"label_transform": {"targets": kept}}}, path)
            return True
        shown = ", ".join(map(str, names)) or f"{channels} channels"
        self.leave(
            path,
            f"{shown}: a network here learns binary, instance_boundary and instance_edt, so the "
            "candidate learns those and its weights fit in part",
        )
        if value_at(self.result.candidate, "model.external_weights_path") is not MISSING:
            self.lay({"model": {"external_weights_strict": False}}, "model.external_weights_path")
        return False

    def _losses(self, bcd: bool) -> None:
        """Take the losses where they are of the three channels and known here."""
        names = self.at("model.loss_functions")
        weights, kwargs = self.at("model.loss_weights"), self.at("model.loss_kwargs")
        tasks = self.at("model.multi_task_config")
        balancing = self.at("model.loss_balancing", {})
        if not bcd or names is None or not tasks:
            if names is not None:
                self.leave("model.loss_functions", "they belong to other channels; the baseline's "
                           "losses of the three channels are taken")  # fmt: skip
            return
        kept, lost = [], []
        for name, given in zip(names, kwargs or [{}] * len(names), strict=False):
            known = _loss_arguments(name)
            if known is None:
                self.leave("model.loss_functions", f"there is no {name} here; the baseline's "
                           "losses of the three channels are taken")  # fmt: skip
                return
            own = dict(given or {})
            if name in OVERLAPS and not own.get("sigmoid"):
                # That tool's default, MONAI's, is the overlap of what the network gives.
                own["sigmoid"] = True
                self.leave(f"model.loss_kwargs.{name}.sigmoid", "the overlap was taken of logits "
                           "there; here it is taken of probabilities")  # fmt: skip
            if "balanced" in own.values():
                self.leave(f"model.loss_kwargs.{name}", "foreground is balanced by a factor of 10 "
                           "at most there, of 100 here", matters=False)  # fmt: skip
            elif "foreground_weight" in own:
                self.leave(f"model.loss_kwargs.{name}", "its mean divides by the number of voxels, "
                           "ours by their weights, which makes the loss smaller")  # fmt: skip
            kept.append({key: value for key, value in own.items() if key in known})
            lost += [f"{name}.{key}" for key in own if key not in known]
        for key in lost:
            self.leave(f"model.loss_kwargs.{key}", "the loss has no such argument here")
        strategy = balancing.get("strategy") if isinstance(balancing, Mapping) else None
        self.lay(
            {
                "model": {
                    "loss_functions": list(names),
                    "loss_weights": [float(w) for w in weights or [1.0] * len(names)],
                    "loss_kwargs": kept,
                    "multi_task_config": tasks,
                    "loss_balancing": {**balancing, "strategy": strategy or "none"},
                }
            },
            "model.loss_functions",
        )
        if self.at("model.deep_supervision_weights"):
            self.lay({"model": {"deep_supervision_weights":
                                self.at("model.deep_supervision_weights")}},
                     "model.deep_supervision_weights")  # fmt: skip

    def _data(self) -> None:
        """Take volumes, padding, sampling and normalisation."""
        for role, prefix in (("train", "data.train_"), ("val", "data.val_"),
                             ("test", "test.data.test_"), ("test", "inference.data.test_"),
                             ("tune", "tune.data.tune_")):  # fmt: skip
            found = self._paths(prefix)
            if found:
                self.result.volumes.setdefault(role, found)
        train, val = (self.result.volumes.get(role, {}) for role in ("train", "val"))
        size = self.at("data.train_resolution")
        block: dict[str, Any] = {f"train_{key}": value for key, value in train.items()}
        if size and len(size) == 3:
            block["train_resolution"] = [float(side) for side in size]
        self.lay({"data": block}, "data.train_image")
        if val.get("image") and val.get("label"):
            named = {f"val_{key}": value for key, value in val.items()}
            self.lay({"data": {**named, "split": {"kind": "volumes"}}}, "data.val_image")
        # January trains with the padding of its image transform, where it has one.
        transform_pad = self.at("data.image_transform.pad_size")
        block_of_pad = "data.image_transform" if transform_pad else "data"
        pad = transform_pad or self.at("data.pad_size")
        mode = self.at(f"{block_of_pad}.pad_mode", "reflect")
        self.used |= {"data.image_transform.pad_mode", "data.pad_size", "data.pad_mode"}
        if pad:
            mode = "replicate" if mode == "edge" else mode
            self.lay({"data": {"pad_size": pad, "pad_mode": mode}}, "data.pad_size")
        patches = self.at("data.iter_num_per_epoch")
        if patches and patches > 0:
            self.lay({"data": {"iter_num_per_epoch": patches}}, "data.iter_num_per_epoch")
        transform = "data.image_transform"
        for key in ("normalize", "clip_percentile_low", "clip_percentile_high"):
            value = self.at(f"{transform}.{key}")
            for other in ("test.data", "tune.data", "inference.data"):
                self.used.add(f"{other}.image_transform.{key}")
            if str(value).startswith("divide-"):
                self.leave(f"{transform}.{key}", f"{value}: intensities become 0-1 by their own "
                           "range here")  # fmt: skip
            elif value is not None:
                self.lay({"data": {"image_transform": {key: value}}}, f"{transform}.{key}")
        share = self.at("data.dataloader.cached_sampling_foreground_threshold", 0)
        if share:
            self.lay({"data": {"sampling": {"foreground_share": 0.5}}}, "data.sampling")
            self.leave(
                "data.dataloader.cached_sampling_foreground_threshold",
                f"{share}: half of the patches are centred on an instance here instead",
            )

    def _paths(self, prefix: str) -> dict[str, Any]:
        """Return the image, label and mask paths of a role, its globs expanded where they match."""
        base = self.at(f"{prefix}path", "") or ""
        found = {}
        for key in ("image", "label", "mask"):
            given = self.at(prefix + key)
            if not given:
                continue
            paths: list[str] = []
            for entry in [given] if isinstance(given, str) else given:
                path = str(Path(base) / str(entry)) if base else str(entry)
                paths += sorted(glob.glob(str(self.folder / path))) or [path]
            found[key] = paths[0] if len(paths) == 1 else paths
        return found

    def _augmentations(self) -> None:
        """Take each augmentation that exists here with the knobs that it has here."""
        from hydralv_tune.numerics.augmentation.registry import AUGMENTATIONS

        path = "data.augmentation"
        blocks = value_at(self.mapping, path)
        if not isinstance(blocks, Mapping):
            self.lay({"data": {"augmentation": {"preset": "none"}}}, path)
            return
        preset = self.at(f"{path}.preset", "some")
        self.lay({"data": {"augmentation": {"preset": preset}}}, f"{path}.preset")
        for given, knobs in blocks.items():
            name = RENAMED.get(str(given), str(given))
            if not isinstance(knobs, Mapping):
                continue
            here = f"{path}.{given}"
            on = knobs.get("enabled")
            self.used.add(here)
            if name not in AUGMENTATIONS:
                if on:
                    self.leave(here, "there is no such augmentation here")
                continue
            known = {"enabled", *AUGMENTATIONS[name].defaults}
            lost = sorted(key for key in knobs if key not in known and on)
            if lost:
                self.leave(f"{here}.{lost[0]}", "the augmentation has no such knob here")
            kept = {key: value for key, value in knobs.items()
                    if key in known and value is not None}  # fmt: skip
            if on is not None:
                self.lay({"data": {"augmentation": {name: kept}}}, here)

    def _optimization(self) -> None:
        """Take epochs, rates, schedule, average and stopping rule."""
        epochs = self.at("optimization.max_epochs", 100)
        self.lay({"optimization": {"max_epochs": epochs,
                                   "scheduler": {"name": "constant", "warmup_epochs": 0}}},
                 "optimization.max_epochs")  # fmt: skip
        training: dict[str, Any] = {
            "gradient_clip_val": 1.0, "accumulate_grad_batches": 1, "precision": "32",
        }  # fmt: skip
        for key, default in training.items():
            value = self.at(f"optimization.{key}", default)
            self.lay({"optimization": {key: value}}, f"optimization.{key}")
        self.lay({"system": {"training": {"batch_size": self.at("system.training.batch_size", 4)}}},
                 "system.training.batch_size")  # fmt: skip
        seed = self.at("system.seed")
        if seed is not None:
            self.lay({"system": {"seed": seed}}, "system.seed")
        name = str(self.at("optimization.optimizer.name", "AdamW"))
        if name.lower() != "adamw":
            self.leave("optimization.optimizer.name", f"{name}: AdamW trains here")
        rates: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01, "betas": None, "eps": None}
        for key, default in rates.items():
            value = self.at(f"optimization.optimizer.{key}", default)
            if value is not None:
                self.lay({"optimization": {"optimizer": {key: value}}},
                         f"optimization.optimizer.{key}")  # fmt: skip
        self._schedule()
        ema = {key: self.at(f"optimization.ema.{key}")
               for key in ("enabled", "decay", "warmup_steps", "validate_with_ema")}  # fmt: skip
        given = {key: value for key, value in ema.items() if value is not None}
        self.lay({"optimization": {"ema": {"enabled": False, **given}}}, "optimization.ema")
        stop = "monitor.early_stopping"
        keys = ("enabled", "monitor", "patience", "min_delta", "threshold", "divergence_threshold")
        rules = {key: self.at(f"{stop}.{key}") for key in (*keys, "mode")}
        given = {key: value for key, value in rules.items() if value is not None}
        if given.get("enabled") and given.get("monitor", WATCHED) != WATCHED:
            self.leave(f"{stop}.monitor", f"{given['monitor']}: only the total training loss is "
                       "watched here, so early stopping is off")  # fmt: skip
            given = {"enabled": False}
        given.pop("monitor", None)
        self.lay({"monitor": {"early_stopping": {"enabled": False, **given}}}, stop)

    def _schedule(self) -> None:
        """Take the schedule, or a constant rate where it has no counterpart."""
        path = "optimization.scheduler"
        name = str(self.at(f"{path}.name", "CosineAnnealingLR"))
        ours = SCHEDULES.get(name.lower())
        given = {key: self.at(f"{path}.{key}")
                 for key in ("warmup_epochs", "warmup_start_lr", "min_lr")}  # fmt: skip
        for key in ("monitor", "mode", "factor", "patience", "threshold", "cooldown", "step_size",
                    "gamma"):  # fmt: skip
            self.used.add(f"{path}.{key}")
        if ours is None:
            self.leave(f"{path}.name", f"{name}: the rate stays constant here")
            return
        schedule: dict[str, Any] = {"name": ours}
        if "warmup" in name.lower():
            schedule["warmup_epochs"] = given["warmup_epochs"] or 0
            schedule["warmup_start_lr"] = given["warmup_start_lr"] or 0.001
        if ours == "WarmupCosineLR":
            schedule["min_lr"] = given["min_lr"] or 0.0
        self.lay({"optimization": {"scheduler": schedule}}, f"{path}.name")

    def _inference(self, bcd: bool) -> None:
        """Take window, blending and test-time augmentation."""
        path = "inference.sliding_window"
        overlap = self.at(f"{path}.overlap", 0.5)
        if isinstance(overlap, list):
            overlap = max(overlap)
        self.lay({"inference": {"sliding_window": {"overlap": overlap}}}, f"{path}.overlap")
        blending = self.at(f"{path}.blending", "gaussian")
        if blending not in ("gaussian", "constant"):
            self.leave(f"{path}.blending", f"{blending}: windows are blended by a Gaussian here")
            blending = "gaussian"
        window: dict[str, Any] = {"blending": blending}
        for key in ("sigma_scale", "padding_mode", "sw_batch_size"):
            value = self.at(f"{path}.{key}")
            if value is not None:
                window[key] = value
        self.lay({"inference": {"sliding_window": window}}, path)
        tta = "inference.test_time_augmentation"
        on = self.at(f"{tta}.enabled", True)
        flips, turns = self.at(f"{tta}.flip_axes"), self.at(f"{tta}.rotation90_axes")
        block: dict[str, Any] = {"enabled": bool(on and (flips or turns))}
        if block["enabled"]:
            block |= {"flip_axes": _spatial(flips), "rotation90_axes": turns}
            mode = self.at(f"{tta}.ensemble_mode", "mean")
            block["ensemble_mode"] = mode if isinstance(mode, str) else "mean"
        self.used |= {f"{tta}.ensemble_mode", f"{tta}.channel_activations", f"{tta}.act"}
        if self.at(f"{tta}.apply_mask") is not None:
            block["apply_mask"] = bool(self.at(f"{tta}.apply_mask"))
        self.lay({"inference": {"test_time_augmentation": block}}, tta)
        del bcd

    def _steps(self) -> tuple[str, list[Any]]:
        """Return where the decoding steps stand, and the steps."""
        for path in ("test.decoding", "inference.decoding"):
            steps = self.at(path)
            if isinstance(steps, list) and steps:
                return path, steps
        return "test.decoding", []

    def _decoding(self, bcd: bool) -> None:
        """Take the first step that is a decoder of ours; the others are left out."""
        path, steps = self._steps()
        taken = False
        for step in steps:
            name = DECODERS.get(str(step.get("name")))
            if name is None or taken or not bcd:
                self.leave(f"{path}.{step.get('name')}", "there is no such step for these channels")
                continue
            known = _decoder_arguments(name)
            kwargs = dict(step.get("kwargs") or {})
            lost = [key for key in kwargs if key not in known and not key.endswith("_channels")]
            for key in lost:
                self.leave(f"{path}.{name}.{key}", "the decoder has no such argument here")
            kept = {key: _thresholds(key, kwargs[key]) for key in kwargs if key in known}
            if "flood" in known:
                kept["flood"] = "volume"
            kept |= self._split(kept.get("min_instance_size", 0))
            taken = self.lay({"test": {"decoding": [{"name": name, "kwargs": kept}]}}, path)

    def _split(self, least: int) -> dict[str, Any]:
        """Return the arguments that split instances as the tool's postprocessing does.

        Args:
            least: The decoder's `min_instance_size`, which there is that of a whole instance.
        """
        path = "decoding.postprocessing"
        block = value_or(self.mapping, f"{path}.instance_cc3d", None)
        if not value_or(self.mapping, f"{path}.enabled", False) or not isinstance(block, Mapping):
            return {}
        size = int(block.get("min_size", 0))
        if block.get("connectivity", 6) != 6 or size < least:
            return {}
        self.used |= {f"{path}.enabled", f"{path}.instance_cc3d"}
        return {"split_components": True, "min_instance_size": size}

    def _grid(self, bcd: bool) -> None:
        """Take the ranges of thresholds that the tool would sample as a grid."""
        path = "tune.parameter_space.decoding"
        space = self.at(path)
        if not isinstance(space, Mapping):
            return
        self.used.add("tune.parameter_space")
        name = DECODERS.get(str(space.get("function_name")))
        if name is None or not bcd:
            self.leave(path, f"{space.get('function_name')}: there is no such decoder for these "
                       "channels; hydra_lv's grid is swept")  # fmt: skip
            return
        known = _decoder_arguments(name)
        grid: dict[str, Any] = {}
        for key, spec in (space.get("parameters") or {}).items():
            group, index = spec.get("param_group"), spec.get("tuple_index")
            axis = group or key
            values = _grid_values(spec, axis)
            if axis not in known or not values:
                self.leave(f"{path}.{key}", "there is no such axis here")
            elif group is None:
                grid[axis] = values
            else:
                part = ("seed", "foreground")[int(index or 0)]
                grid.setdefault(axis, {})[part] = sorted(
                    {_off(axis, value) for value in values},
                    key=lambda v: math.inf if v is None else v,
                )
        for axis, value in (space.get("defaults") or {}).items():
            if axis in known and isinstance(value, list) and len(value) == 2:
                filled = grid.setdefault(axis, {})
                for part, fixed in zip(("seed", "foreground"), value, strict=True):
                    filled.setdefault(part, [_off(axis, fixed)])
            elif axis in known and axis not in grid:
                grid[axis] = [value]
        shared: dict[str, Any] = {"flood": "volume"}
        apart = self._split(0)
        if apart:
            least, shared["split_components"] = apart["min_instance_size"], True
            sizes = {max(size, least) for size in grid.get("min_instance_size", [0])}
            grid["min_instance_size"] = sorted(sizes)
        self.result.grid = {"decoder": name, "grid": grid, "fixed": shared}
        self.leave("tune.parameter_space", MEANINGS["tune.parameter_space"], matters=False)

    def _belongs_to_what_is_off(self, path: str) -> bool:
        """Return whether a key is of another network, or of a split that is not made.

        A checkpoint holds the whole configuration, with every default of what is not used.
        """
        network = str(value_at(self.mapping, "model.architecture"))
        if path.startswith("model.mednext_"):
            return network != "mednext"
        if path.startswith("data.split_"):
            return not value_or(self.mapping, "data.split_enabled", False)
        return _under(path, OF_OTHER_NETWORKS)

    def _masks(self) -> None:
        """Take what is done to masks: here one of a lower resolution is enlarged by itself."""
        for place in ("data", "test.data", "tune.data"):
            block = f"{place}.mask_transform"
            factors = self.at(f"{block}.resize", [])
            if all(factor in range(1, COARSEST_MASK + 1) for factor in factors):
                meaning = "a mask of so much lower a resolution is enlarged by itself here"
                if factors:
                    self.leave(f"{block}.resize", meaning, matters=False)
            else:
                self.leave(
                    f"{block}.resize",
                    f"masks are enlarged by whole numbers up to {COARSEST_MASK} here: write this "
                    "one in the image's shape first",
                )
            if self.at(f"{block}.align_to_image", False):
                self.leave(
                    f"{block}.align_to_image",
                    "a mask that then lacks the image's shape is refused here",
                    matters=False,
                )
            if self.at(f"{block}.binarize", False) and self.at(f"{block}.threshold", 0) > 0:
                self.leave(f"{block}.threshold", "a mask is valid above 0 here")

    def _rest(self) -> None:
        """List every key that nothing has used."""
        for path, value in leaf_paths(self.mapping):
            if value in (None, False, "", [], {}) or _under(path, self.used):
                continue
            if _under(path, WITHOUT_EFFECT) or self._belongs_to_what_is_off(path):
                continue
            meaning = next(
                (
                    MEANINGS[key]
                    for key in MEANINGS
                    if _under(path, (key,)) or (key.endswith("_") and path.startswith(key))
                ),
                None,
            )
            ignored = path.startswith("model.") and meaning is not None
            self.leave(path, meaning or "it has no counterpart here", matters=not ignored)


def _as_january(mapping: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return today's form under January's names, and where each key stood."""
    train, test, tune = (stage_view(mapping, stage) for stage in ("train", "test", "tune"))
    others = {"test": test, "tune": tune}
    apart = {where: dict(_apart(view, train)) for where, view in others.items()}
    result: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def move(view: Mapping[str, Any], source: str, target: str, where: str) -> None:
        value = value_at(view, source)
        if value is MISSING:
            return
        result.update(merged(result, nested(target, value)))
        _drop(view, source)
        origins[target] = f"{where}.{source}"

    for source, target in _RENAMES:
        move(train, source, target, "train")
    model = result.setdefault("model", {})
    arch = model.get("architecture")
    for block, prefix in (("rsunet", "rsunet_"), ("mednext", "mednext_"), ("monai", "")):
        values = value_at(train, f"model.{block}")
        for key, value in dict(values if isinstance(values, Mapping) else {}).items():
            name = {"width": "filters", "upsample_mode": "upsample"}.get(key, prefix + key)
            if block == ("monai" if str(arch).startswith("monai") else str(arch)[: len(block)]):
                model[name] = value
                origins[f"model.{name}"] = f"train.model.{block}.{key}"
            _drop(train, f"model.{block}.{key}")
    if arch is not None:
        model.setdefault("filters", [16, 32, 64, 128] if str(arch).startswith("rsunet")
                         else [32, 64, 128, 256, 512])  # fmt: skip
    _losses_of(train, model)
    for role in ("train", "val"):
        _volumes_of(train, role, result, f"data.{role}_", origins)
    _volumes_of(test, "test", result, "test.data.test_", origins)
    _volumes_of(tune, "val", result, "tune.data.tune_", origins)
    for source, target in _TEST_RENAMES:
        move(test, source, target, "test")
    for where, keys in apart.items():
        for path, value in keys.items():
            result.update(merged(result, nested(f"{where}.data.{path}", value)))
    activations = value_at(test, "inference.model.channel_activations")
    if activations is not MISSING:
        _drop(test, "inference.model.channel_activations")
    space = value_at(mapping, "tune.parameter_space")
    if space is not MISSING:
        result.update(merged(result, {"tune": {"parameter_space": space}}))
    steps = value_at(train, "optimization.n_steps_per_epoch")
    if isinstance(steps, int) and steps > 0:
        batch = value_at(train, "data.dataloader.batch_size")
        accumulated = value_at(train, "optimization.accumulate_grad_batches")
        a_step = (batch if isinstance(batch, int) else 4) * (
            accumulated if isinstance(accumulated, int) else 1
        )
        result.update(merged(result, {"data": {"iter_num_per_epoch": steps * a_step}}))
    _drop(train, "optimization.n_steps_per_epoch")
    move(train, "data.dataloader.batch_size", "system.training.batch_size", "train")
    # Prediction and decoding are the test stage's; its copies in the training view go.
    rest = {key: value for key, value in train.items()
            if key not in ("inference", "decoding", "evaluation")}  # fmt: skip
    rest |= {key: test[key] for key in ("inference", "decoding") if key in test}
    own = {key: value for key, value in mapping.items()
           if key not in ("default", "train", "test", "tune", *rest)}  # fmt: skip
    return merged(own, rest, result), origins


def _apart(view: Mapping[str, Any], train: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys of `data` that a stage says otherwise than training, volumes aside."""
    for path, value in leaf_paths(value_or(view, "data", {})):
        role, _, key = path.partition(".")
        volume = role in ("train", "val", "test") and key in VOLUME_KEYS
        if not volume and value_at(train, f"data.{path}") != value:
            yield path, value


VOLUME_KEYS = ("path", "image", "label", "mask", "resolution")
_RENAMES = (
    ("model.arch.type", "model.architecture"),
    ("model.loss.deep_supervision", "model.deep_supervision"),
    ("model.loss.deep_supervision_weights", "model.deep_supervision_weights"),
    ("model.loss.loss_balancing", "model.loss_balancing"),
    ("data.dataloader.patch_size", "data.patch_size"),
    ("data.data_transform.pad_size", "data.pad_size"),
    ("data.data_transform.pad_mode", "data.pad_mode"),
)
_TEST_RENAMES = (
    ("inference.window", "inference.sliding_window"),
    ("decoding.steps", "test.decoding"),
)


def _losses_of(train: Mapping[str, Any], model: dict[str, Any]) -> None:
    """Put a list of loss terms under January's four lists, where each has channels of its own."""
    entries = value_at(train, "model.loss.losses")
    if not isinstance(entries, list):
        return
    channels = int(model.get("out_channels") or value_or(train, "model.out_channels", 1))
    tasks: dict[tuple[int, int], list[int]] = {}
    names, weights, kwargs = [], [], []
    for index, entry in enumerate(entries):
        names.append(entry.get("function"))
        weights.append(float(entry.get("weight", 1.0)))
        kwargs.append({**(entry.get("kwargs") or {}), **_voxel_weight(entry)})
        chosen = numbers_of(entry.get("target_slice", entry.get("pred_slice")), channels)
        if chosen is not None and len(chosen):
            tasks.setdefault((chosen[0], chosen[-1] + 1), []).append(index)
    labels = {(0, 1): "label", (1, 2): "boundary", (2, 3): "edt"}
    model |= {
        "loss_functions": names,
        "loss_weights": weights,
        "loss_kwargs": kwargs,
        "multi_task_config": [
            [first, end, labels.get((first, end), f"channels_{first}_{end}"), indices]
            for (first, end), indices in sorted(tasks.items())
        ],
    }
    _drop(train, "model.loss.losses")


def _voxel_weight(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a loss term of today weighs foreground, as an argument of the loss here."""
    weight = entry.get("pos_weight")
    if entry.get("function") in VOXEL_WEIGHTED:
        weight = "balanced" if weight in (None, "auto") else weight
        return {} if weight == 1 else {"foreground_weight": weight}
    if weight is None:
        return {}
    return {"pos_weight": "balanced" if weight == "auto" else weight}


def _volumes_of(
    view: Mapping[str, Any], role: str, result: dict[str, Any], prefix: str, origins: dict[str, str]
) -> None:
    """Put the volumes of a role under January's flat names."""
    root = value_or(view, "data.root_path", "") or ""
    for key in VOLUME_KEYS:
        value = value_at(view, f"data.{role}.{key}")
        if key == "path" and root:
            value = str(Path(root) / str(value if value is not MISSING and value else ""))
        if value is MISSING:
            continue
        result.update(merged(result, nested(prefix + key, value)))
        origins[prefix + key] = f"data.{role}.{key}"
        _drop(view, f"data.{role}.{key}")


def value_or(mapping: Mapping[str, Any], path: str, default: Any) -> Any:
    """Return the value at a path, or a default."""
    found = value_at(mapping, path)
    return default if found is MISSING else found


def _drop(mapping: Mapping[str, Any], path: str) -> None:
    """Delete a nested key of a mapping that is our own copy."""
    above, _, key = path.rpartition(".")
    block = value_at(mapping, above) if above else mapping
    if isinstance(block, dict):
        block.pop(key, None)


def _under(path: str, keys: Any) -> bool:
    """Return whether a key path is one of the keys or lies under one."""
    return any(path == key or path.startswith((f"{key}.", f"{key}[")) for key in keys)


def _loss_arguments(name: str) -> set[str] | None:
    """Return the arguments of a loss; None where there is none of that name."""
    from hydralv_tune.numerics.losses.registry import LOSSES, loss_arguments

    return set(loss_arguments(name)) if name in LOSSES else None


def _decoder_arguments(name: str) -> set[str]:
    """Return the arguments of a decoder."""
    from hydralv_tune.numerics.watershed.decoders import decoder_arguments

    return set(decoder_arguments(name))


def _spatial(flips: Any) -> Any:
    """Return flip axes with 0 for z: lists that reach 3 counted the channel too."""
    if not isinstance(flips, list):
        return flips
    axes = [axis for entry in flips for axis in (entry if isinstance(entry, list) else [entry])]
    shift = 1 if axes and max(axes) == 3 else 0
    return [
        [axis - shift for axis in entry] if isinstance(entry, list) else entry - shift
        for entry in flips
    ]


def _off(key: str, value: Any) -> Any:
    """Return a threshold; a contour threshold above 1 switches that test off."""
    return None if key == "contour_threshold" and value is not None and value > 1 else value


def _thresholds(key: str, value: Any) -> Any:
    """Return the thresholds of a decoder as this tool writes them."""
    return [_off(key, entry) for entry in value] if isinstance(value, list) else value


def _grid_values(spec: Mapping[str, Any], axis: str) -> list[Any]:
    """Return a few values of a range, spread evenly on its own steps, or its choices."""
    if spec.get("choices"):
        return list(spec["choices"])
    bounds = spec.get("range") or []
    if len(bounds) != 2 or not all(isinstance(bound, int | float) for bound in bounds):
        return list(bounds)
    low, high = bounds
    step = spec.get("step") or (high - low) / 10 or 1
    count = round((high - low) / step) + 1
    wanted = min(GRID_VALUES["size" if axis.endswith("size") else "threshold"], max(count, 1))
    chosen = {round((count - 1) * i / max(wanted - 1, 1)) for i in range(wanted)}
    values = [min(low + index * step, high) for index in sorted(chosen)]
    return [round(v) if axis.endswith("size") else round(float(v), 4) for v in values]


def volume_options(imported: Imported) -> Iterator[str]:
    """Yield the options of the command line that name the volumes of training."""
    train = imported.volumes.get("train", {})
    for key in ("image", "label", "mask"):
        given = train.get(key) or []
        for path in [given] if isinstance(given, str) else given:
            yield f"--{key}"
            yield path
