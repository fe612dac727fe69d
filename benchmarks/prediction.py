"""Time the prediction of the plan's volume: bare windows, ours, the mask, test-time augmentation.

Run it alone: `.venv/bin/python benchmarks/prediction.py [--shape 24 240 240]`. Ratios are of
wall time in this run, on this machine; the reference is MONAI's sliding window with one window
at a time and no mask, which is how PyTorch Connectomics predicts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference

from hydralv_tune.config.candidate import Candidate
from hydralv_tune.numerics.cores import usable_cores
from hydralv_tune.numerics.normalisation import normalise
from hydralv_tune.numerics.phantom.volume import Phantom, make_phantom
from hydralv_tune.numerics.test_time_augmentation import activate
from hydralv_tune.trial.scoring.prediction import network_of, plan_windows, predict, transforms_of

ALL = {"enabled": True, "flip_axes": "all", "rotation90_axes": [[1, 2]]}


def main() -> None:
    """Print the figures of the CPU and, where there is one, of the GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shape", nargs=3, type=int, default=(51, 516, 516), metavar=("Z", "Y", "X")
    )
    parser.add_argument("--threads", type=int, default=usable_cores())
    arguments = parser.parse_args()
    z, y, x = arguments.shape
    instances = max(1, 51 * z * y * x // (51 * 516 * 516))
    phantom = make_phantom(shape=(z, y, x), instances=instances)
    print(f"Prediction of {phantom.image.shape} voxels")
    torch.set_num_threads(arguments.threads)
    small = {"architecture": "monai_unet", "filters": (8, 16, 24)}
    report(phantom, small, (12, 96, 96), "cpu", f"CPU, {arguments.threads} threads")
    if torch.cuda.is_available():
        baseline = {"architecture": "rsunet", "filters": (32, 64, 128, 256, 512)}
        report(phantom, baseline, (32, 128, 128), "cuda", torch.cuda.get_device_name())
    else:
        print("GPU: torch.cuda is not available here, so that part is not measured.")


def report(
    phantom: Phantom,
    model: dict[str, object],
    window: tuple[int, int, int],
    device: str,
    where: str,
) -> None:
    """Print seconds and ratios of the four ways on one device."""

    def candidate(tta: dict[str, object]) -> Candidate:
        return Candidate.model_validate(
            {"model": model, "data": {"patch_size": window},
             "inference": {"test_time_augmentation": tta}}
        )  # fmt: skip

    plain, augmented = candidate({}), candidate(ALL)
    torch.manual_seed(0)
    network = network_of(plain).to(device).to(memory_format=torch.channels_last_3d).eval()
    image, mask = phantom.image, phantom.mask
    count, passes = plan_windows(image.shape, plain).count, len(transforms_of(augmented))
    print(
        f"\n{where}: {model['architecture']} {model['filters']}, {count} windows of {window}",
        flush=True,
    )
    predict(network, image[: window[0], :256, :256], plain, device=device)  # warm-up
    reference, theirs = timed(lambda: bare(network, image, plain, device), device)
    seconds, ours = timed(lambda: predict(network, image, plain, device=device), device)
    masked, inside = timed(lambda: predict(network, image, plain, device=device, mask=mask), device)
    turned, _ = timed(lambda: predict(network, image, augmented, device=device), device)
    both, _ = timed(lambda: predict(network, image, augmented, device=device, mask=mask), device)
    apart = np.abs(ours.astype(np.float32) - theirs).max()
    within = np.abs(ours - inside)[:, mask > 0].max()
    rows = (
        ("bare windows, one at a time (reference)", reference, ""),
        ("predict", seconds, f"greatest difference to the reference {apart:.4f}"),
        ("predict, with the mask", masked, f"greatest difference inside it {within:.4f}"),
        (f"predict, {passes} transforms", turned,
         f"{turned / seconds / passes:.2f} of a plain prediction for each"),
        (f"predict, {passes} transforms, with the mask", both, ""),
    )  # fmt: skip
    for name, value, note in rows:
        print(f"  {name:42s} {value:8.2f} s  {reference / value:6.2f} x the reference  {note}")


def bare(network: torch.nn.Module, image: np.ndarray, plain: Candidate, device: str) -> np.ndarray:
    """Return the probabilities as MONAI alone gives them, one window at a time."""
    window = plain.inference.sliding_window
    mixed = device != "cpu"
    volume = torch.from_numpy(normalise(image))[None, None].to(device)

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=mixed):
            return network(inputs).float()

    with torch.inference_mode():
        joined = sliding_window_inference(
            volume,
            plain.data.patch_size,
            1,
            lambda inputs: activate(
                logits(inputs), plain.inference.test_time_augmentation.channel_activations
            ),
            overlap=window.overlap,
            mode=window.blending,
            sigma_scale=window.sigma_scale,
        )
    return joined[0].cpu().numpy()


def timed(work: Callable[[], np.ndarray], device: str) -> tuple[float, np.ndarray]:
    """Return wall seconds and result."""
    started = time.perf_counter()
    result = work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()
