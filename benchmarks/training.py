"""Time the training loop: what is lost outside the network, and how a loader-fed loop compares.

Run it alone: `.venv/bin/python benchmarks/training.py [--steps N]`. The reference loop trains the
same network with the same losses and optimizer, fed by `torch.utils.data.DataLoader` workers with
MONAI's dictionary transforms and targets computed per patch, which is how PyTorch Connectomics
feeds; both networks lie in memory channels last. Augmentations that MONAI has no transform for
(misalignment, missing sections, pasted instances) are left out there and act in ours. Ratios are of
wall time in this run, on this machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from _targets import verdict
from monai.transforms import (
    Compose,
    Rand3DElasticd,
    RandAffined,
    RandCoarseDropoutd,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandRotate90d,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSpatialCropd,
)
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.files import load_candidate
from hydralv_tune.data.volumes import Volume
from hydralv_tune.numerics.cores import usable_cores
from hydralv_tune.numerics.phantom.volume import make_phantom
from hydralv_tune.numerics.randomness import seeded
from hydralv_tune.numerics.targets import binary_target, instance_boundary, instance_edt
from hydralv_tune.trial.scoring.prediction import network_of
from hydralv_tune.trial.training.loop import Trainer, build_loss
from hydralv_tune.trial.training.optimization import build_optimizer
from hydralv_tune.trial.training.sampling import PatchSampler, ResidentVolume

WARM_UP = 4
"""Steps before the clock runs: memory is allocated, kernels are chosen."""

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "V100": 125e12}
"""Dense bf16 (V100: fp16) peak in FLOP/s, by a part of the GPU's name; from the data sheets."""


def main() -> None:
    """Print the figures of the CPU and, where there is one, of the GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--concurrent", action="store_true", help="only several trials at once")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.concurrent:
        if torch.cuda.is_available():
            concurrent("cuda", arguments.steps, (1, 2, 4))
        else:
            concurrent("cpu", arguments.steps, (1, 2))
        return
    smoke = {"data": {"augmentation": {"preset": "all", **_unsaid()}}}
    report("smoke", smoke, "cpu", arguments.steps, share_limit=0.08, ratio_limit=2.0)
    concurrent("cpu", arguments.steps, (1, 2))
    if not torch.cuda.is_available():
        print("GPU: torch.cuda is not available here, so that part is not measured.")
        return
    baseline = {
        "data": {"augmentation": {"preset": "all", **_unsaid()}, "patch_size": [32, 128, 128]}
    }
    report("baseline", baseline, "cuda", arguments.steps, share_limit=0.05, ratio_limit=2.0)
    concurrent("cuda", arguments.steps, (1, 2, 4))


def _unsaid() -> dict[str, Any]:
    """Return settings that let every augmentation act, whatever the candidate switched off."""
    from hydralv_tune.numerics.augmentation.registry import AUGMENTATIONS

    return {name: {"enabled": True} for name in AUGMENTATIONS}


def volume() -> Volume:
    """Return the phantom that both loops train on."""
    phantom = make_phantom((24, 256, 256), instances=28)
    return Volume("phantom", phantom.image, phantom.label, phantom.mask > 0, phantom.voxel_size_nm)


def trainer_of(candidate: Candidate, device: torch.device) -> Trainer:
    """Return our trainer at its start."""
    data = candidate.data
    sampler = PatchSampler(
        [ResidentVolume(volume(), data, device, 0)],
        patch_size=data.patch_size,
        foreground_share=data.sampling.foreground_share,
        seed=0,
    )
    with seeded(0, device):
        network = network_of(candidate)
    network.to(device).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return Trainer(candidate, network, sampler, device, seed=0)


def report(
    name: str,
    overrides: Mapping[str, Any],
    where: str,
    steps: int,
    *,
    share_limit: float,
    ratio_limit: float,
) -> None:
    """Print share, speed and ratio of one candidate on one device."""
    candidate = load_candidate(name, overrides)
    device = torch.device(where)
    label = (
        torch.cuda.get_device_name()
        if where == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    trainer = trainer_of(candidate, device)
    trainer.run_to(WARM_UP)
    trainer.clock.seconds.clear()
    before = trainer.patches
    started = time.perf_counter()
    trainer.run_to(WARM_UP + steps)
    if where == "cuda":
        torch.cuda.synchronize()
    wall = time.perf_counter() - started
    parts = trainer.clock.seconds
    ours = (trainer.patches - before) / wall
    inside = parts["forward_backward"] + parts["optimizer"]
    share = max(1 - inside / wall, 0.0)
    patch = "×".join(str(side) for side in candidate.data.patch_size)
    print(f"{label}: {name}, {candidate.model.architecture} {list(candidate.model.filters)}, "
          f"patches of {patch}, preset all")  # fmt: skip
    show("step outside forward, backward, optimizer", share, "", share_limit, below=True)
    show("patches per second", ours, "/s")
    flops(candidate, trainer, inside / steps, device)
    rates = {workers: reference(candidate, device, steps, workers) for workers in (1, 2)}
    workers, rate = max(rates.items(), key=lambda item: item[1])
    show(f"reference loop, its better of 1 and 2 workers ({workers})", rate, "/s")
    show("ratio to the reference loop", ours / rate, "times", ratio_limit, below=False)


def show(
    what: str, value: float, unit: str, limit: float | None = None, below: bool = True
) -> None:
    """Print one figure, and whether it meets its target."""
    said = verdict(value, at_most=limit) if below else verdict(value, at_least=limit)
    print(f"  {what:<58} {value:9.3f} {unit}{said}", flush=True)


def flops(candidate: Candidate, trainer: Trainer, seconds: float, device: torch.device) -> None:
    """Print the arithmetic of forward and backward per second, and its share of the peak."""
    batch = trainer.sampler.draw(trainer.plan.batch_size)
    counter = FlopCounterMode(display=False)
    with counter:
        outputs = trainer.network(batch.image)
        head = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        head.float().square().mean().backward()
    trainer.optimizer.zero_grad(set_to_none=True)
    rate = counter.get_total_flops() * trainer.plan.accumulate / seconds
    show("forward and backward arithmetic", rate / 1e12, "TFLOP/s")
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        peak = next((value for part, value in PEAKS.items() if part in name), None)
        if peak is None:
            print(f"  the peak of {name} is not in the table, so its share is not stated")
        else:
            show(f"share of the peak, {peak / 1e12:g} TFLOP/s", rate / peak, "")


class PatchDataset(Dataset[dict[str, torch.Tensor]]):
    """One patch per item: cropped, augmented and made into targets in a loader's process."""

    def __init__(self, candidate: Candidate, length: int) -> None:
        source = volume()
        image = source.image.astype(np.float32)
        mean, std = image.mean((1, 2), keepdims=True), image.std((1, 2), keepdims=True)
        assert source.label is not None
        assert source.mask is not None
        self.whole = {
            "image": torch.from_numpy((image - mean) / std)[None],
            "label": torch.from_numpy(source.label.astype(np.int32))[None],
            "mask": torch.from_numpy(source.mask.astype(np.uint8))[None],
        }
        self.length = length
        keys = ("image", "label", "mask")
        nearest = ("bilinear", "nearest", "nearest")
        self.transform = Compose(
            [
                RandSpatialCropd(keys, candidate.data.patch_size, random_size=False),
                *[RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)],
                RandRotate90d(keys, prob=0.5, spatial_axes=(1, 2)),
                RandAffined(
                    keys, prob=0.5, mode=nearest, padding_mode="border", rotate_range=(0.1,) * 3,
                    scale_range=(0.1,) * 3, shear_range=(0.05,) * 3,
                ),
                Rand3DElasticd(
                    keys, prob=0.3, sigma_range=(3, 6), magnitude_range=(10, 20), mode=nearest,
                    padding_mode="border",
                ),
                RandGaussianNoised("image", prob=0.5, std=0.1),
                RandShiftIntensityd("image", prob=0.5, offsets=0.1),
                RandScaleIntensityd("image", prob=0.5, factors=0.2),
                RandGaussianSmoothd("image", prob=0.3),
                RandCoarseDropoutd("image", prob=0.3, holes=2, spatial_size=(4, 16, 16)),
            ]
        )  # fmt: skip

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return image, targets and mask of a patch."""
        patch: Any = self.transform(self.whole)
        labels = np.asarray(patch["label"][0]).astype(np.int32)
        targets = np.stack(
            [
                binary_target(labels).astype(np.float32),
                instance_boundary(labels).astype(np.float32),
                instance_edt(labels),
            ]
        )
        return {
            "image": torch.as_tensor(np.asarray(patch["image"]), dtype=torch.float32),
            "targets": torch.from_numpy(targets),
            "mask": torch.as_tensor(np.asarray(patch["mask"])) > 0,
        }


def reference(candidate: Candidate, device: torch.device, steps: int, workers: int) -> float:
    """Return the patches per second of the loader-fed loop."""
    accumulate = candidate.optimization.accumulate_grad_batches
    batch = candidate.system.training.batch_size
    length = (WARM_UP + steps) * accumulate * batch
    with seeded(0, device):
        network = network_of(candidate)
    # In the memory format of ours, so that the ratio is of the feeding alone.
    network.to(device).to(memory_format=torch.channels_last_3d).train()  # type: ignore[call-overload]
    loss = build_loss(candidate.model).to(device)
    optimizer = build_optimizer(network, loss.parameters(), candidate.optimization)
    loader = DataLoader(
        PatchDataset(candidate, length), batch_size=batch, num_workers=workers,
        pin_memory=device.type == "cuda", prefetch_factor=4, persistent_workers=True,
    )  # fmt: skip
    mixed = device.type == "cuda" and candidate.optimization.precision == "bf16-mixed"
    started = time.perf_counter()
    for number, item in enumerate(loader):
        image, targets, mask = (
            item[key].to(device, non_blocking=True) for key in ("image", "targets", "mask")
        )
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
            outputs = network(image)
        heads = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        total = loss([head.float() for head in heads], targets, mask).total / accumulate
        total.backward()
        if (number + 1) % accumulate == 0:
            torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if number + 1 == WARM_UP * accumulate:
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return steps * accumulate * batch / (time.perf_counter() - started)


def _one_of_many(where: str, steps: int, threads: int, ready: Any, rates: Any) -> None:
    """Train beside others in a process of its own; put patches and seconds in the queue."""
    torch.set_num_threads(threads)
    trainer = trainer_of(load_candidate("smoke"), torch.device(where))
    trainer.run_to(WARM_UP)
    ready.wait()
    before, started = trainer.patches, time.perf_counter()
    trainer.run_to(WARM_UP + steps)
    if where == "cuda":
        torch.cuda.synchronize()
    rates.put((trainer.patches - before, time.perf_counter() - started))


def concurrent(where: str, steps: int, counts: tuple[int, ...]) -> None:
    """Print the total patches per second of several small trials side by side on one device."""
    context = multiprocessing.get_context("spawn")
    cores = torch.get_num_threads()
    alone = 0.0
    for count in counts:
        ready, rates = context.Barrier(count), context.Queue()
        threads = max(cores // count, 1)
        processes = [
            context.Process(target=_one_of_many, args=(where, steps, threads, ready, rates))
            for _ in range(count)
        ]
        for process in processes:
            process.start()
        found = [rates.get(timeout=120) for _ in processes]
        for process in processes:
            process.join()
        total = sum(patches for patches, _ in found) / max(seconds for _, seconds in found)
        alone = alone or total
        show(f"{count} smoke trials at once on {where}, {threads} threads each", total, "patches/s")
        if count > 1:
            show("  of what one trial alone reaches", total / alone, "times")


if __name__ == "__main__":
    main()
