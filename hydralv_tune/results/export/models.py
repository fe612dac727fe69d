"""The network of a trial for programs without this package: TorchScript, safetensors, bioimage.io.

All of them give probabilities: the activations are part of the network. Intensities are to be
normalised before, as the candidate says; `rdf.yaml` tells it to programs of bioimage.io.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hydralv_tune.artifacts.writing import write_atomically
from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.errors import InputError, VolumeError
from hydralv_tune.config.yaml_io import dump_yaml
from hydralv_tune.data.formats.files import open_lazy
from hydralv_tune.numerics.networks.registry import divisor, network_arguments
from hydralv_tune.numerics.test_time_augmentation import activate
from hydralv_tune.results.best_trial import BestTrial
from hydralv_tune.trial.fitted_normalisation import fit_image
from hydralv_tune.trial.scoring.prediction import load_network

Array = npt.NDArray[Any]
CHANNELS = ("binary", "boundary", "distance")
RDF_VERSION = "0.5.12"
SPREAD = 1e-6
"""Added to what the reader of `rdf.yaml` divides by; it must be above 0 there."""
AGREEMENT = 1e-4
"""How far the traced network may be from the network itself."""
SIZE_DEPENDS: type[Warning] = torch.jit.TracerWarning  # type: ignore[attr-defined]


class Probabilities(nn.Module):
    """A network and its activations: (B, 1, z, y, x) to (B, 3, z, y, x)."""

    def __init__(self, network: nn.Module, candidate: Candidate) -> None:
        super().__init__()
        self.network = network
        self._activations = candidate.inference.test_time_augmentation.channel_activations

    def forward(self, image: Tensor) -> Tensor:
        """Return probabilities, float32."""
        return activate(self.network(image), self._activations)


def export_torchscript(best: BestTrial, out: Path) -> dict[str, Any]:
    """Write a network that `torch.jit.load` opens, with what it must be given in an extra file.

    Returns:
        `out`, `checkpoint`, `safetensors` and `commands`, here the Python that loads it.
    """
    network, candidate = load_network(best.checkpoint)
    traced, any_size = traced_network(network, candidate)
    extra = {"hydralv.json": json.dumps(model_facts(best, candidate, any_size))}
    write_atomically(out, torchscript_of(traced, extra))
    weights = write_safetensors(out.with_suffix(".safetensors"), network, candidate)
    return {
        "out": str(out),
        "checkpoint": str(out),
        "safetensors": str(weights),
        "commands": [f'python -c "import torch; print(torch.jit.load({str(out)!r}))"'],
    }


def export_bioimageio(best: BestTrial, out: Path) -> dict[str, Any]:
    """Write a model of bioimage.io: `rdf.yaml`, weights, a tested input and its output, a page.

    Returns:
        `out`, `checkpoint`, and `commands`, which tests the file.

    Raises:
        InputError: The network sees equalised sections, which the format has no word for.
    """
    network, candidate = load_network(best.checkpoint)
    if candidate.data.image_transform.normalize == "clahe":
        raise InputError(
            "bioimage.io has no word for data.image_transform.normalize clahe, so its programs "
            "would show the network other images. Use --format torchscript, and equalise first."
        )
    traced, any_size = traced_network(network, candidate)
    raw = _picture(best, window_of(candidate))
    with torch.inference_mode():
        image, fitted = fit_image(raw, candidate.data)
        shown = fitted.apply(image)
        result = traced(torch.from_numpy(shown)[None, None]).numpy()
    facts = model_facts(best, candidate, any_size)
    files = {
        "weights.pt": torchscript_of(traced, {}),
        "weights.safetensors": safetensors_of(network, candidate),
        "test_input.npy": _npy(raw[None, None]),
        "test_output.npy": _npy(result),
        "README.md": _page(best, facts).encode(),
        "hydralv.json": json.dumps(facts, indent=1).encode(),
    }
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    rdf = rdf_of(best, candidate, raw, sums, any_size)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as package:
        package.writestr("rdf.yaml", dump_yaml(rdf))
        for name, content in files.items():
            package.writestr(name, content)
    write_atomically(out, buffer.getvalue())
    return {
        "out": str(out),
        "checkpoint": str(out),
        "commands": [f"bioimageio test {out}"],
    }


def window_of(candidate: Candidate) -> tuple[int, int, int]:
    """Return the size of a window, (z, y, x)."""
    return candidate.inference.sliding_window.window_size or candidate.data.patch_size


def traced_network(network: nn.Module, candidate: Candidate) -> tuple[torch.jit.ScriptModule, bool]:
    """Return the traced network with its activations, and whether it takes other sizes too.

    Args:
        network: In evaluation mode.
        candidate: Its window is what the network is traced with.
    """
    module = Probabilities(network.to(memory_format=torch.contiguous_format), candidate).eval()  # type: ignore[call-overload]
    size = window_of(candidate)
    step = divisor(candidate.model.architecture, network_arguments(candidate.model.model_dump()))
    larger = [side + further for side, further in zip(size, step, strict=True)]
    generator = torch.Generator().manual_seed(0)
    examples = [torch.rand((1, 1, *sides), generator=generator) for sides in (size, larger)]
    with torch.inference_mode(), warnings.catch_warnings():
        # Whether what it warns of matters is tried below.
        warnings.simplefilter("ignore", SIZE_DEPENDS)
        traced = cast(torch.jit.ScriptModule, torch.jit.trace(module, examples[0]))  # type: ignore[no-untyped-call]
        assert _agrees(module, traced, examples[0]), "the traced network is another function"
        return traced, _agrees(module, traced, examples[1])


def torchscript_of(traced: torch.jit.ScriptModule, extra: dict[str, str]) -> bytes:
    """Return a traced network as `torch.jit.load` opens it, without its debug records.

    Those name the source files of this machine, with their folders.

    Args:
        traced: The network.
        extra: Text by the name of an extra file.
    """
    full, stripped = io.BytesIO(), io.BytesIO()
    torch.jit.save(traced, full, _extra_files=extra)
    with zipfile.ZipFile(full) as source, zipfile.ZipFile(stripped, "w") as target:
        for name in source.namelist():
            if not name.endswith(".debug_pkl"):
                target.writestr(zipfile.ZipInfo(name), source.read(name))
    return stripped.getvalue()


def _agrees(module: nn.Module, traced: nn.Module, example: Tensor) -> bool:
    """Return whether two networks say the same of an input."""
    try:
        return bool((module(example) - traced(example)).abs().max() < AGREEMENT)
    except RuntimeError:
        return False


def model_facts(best: BestTrial, candidate: Candidate, any_size: bool) -> dict[str, Any]:
    """Return what a program must know beside the weights, as plain values."""
    chosen = candidate.data.image_transform
    return {
        "input": "(B, 1, z, y, x) float32, normalised",
        "output": "(B, 3, z, y, x): binary and boundary in [0, 1], distance in [-1, 1]",
        "normalize": chosen.normalize,
        "clip_percentile_low": chosen.clip_percentile_low,
        "clip_percentile_high": chosen.clip_percentile_high,
        "window_size": list(window_of(candidate)),
        "takes_other_sizes": any_size,
        "overlap": candidate.inference.sliding_window.overlap,
        "blending": candidate.inference.sliding_window.blending,
        "pad_size": list(candidate.data.pad_size),
        "pad_mode": candidate.data.pad_mode,
        "voxel_size_nm": None if best.voxel_size_nm is None else list(best.voxel_size_nm),
        "decoding": best.step.model_dump(mode="json"),
        "study": best.study.name,
        "trial": best.view.number,
    }


def safetensors_of(network: nn.Module, candidate: Candidate) -> bytes:
    """Return the weights as safetensors, with the candidate among its metadata."""
    from safetensors.torch import save

    tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
    told = {"format": "pt", "candidate": json.dumps(candidate.as_mapping(), default=list)}
    return save(tensors, metadata=told)


def write_safetensors(path: Path, network: nn.Module, candidate: Candidate) -> Path:
    """Write the weights as safetensors, and return the path."""
    return write_atomically(path, safetensors_of(network, candidate))


def _picture(best: BestTrial, size: Sequence[int]) -> Array:
    """Return a window from the middle of the study's first image, or noise where it is gone."""
    try:
        with open_lazy(best.volumes[0].image, ndim=3) as image:
            starts = [max(n - side, 0) // 2 for n, side in zip(image.shape, size, strict=True)]
            box = tuple(slice(a, a + side) for a, side in zip(starts, size, strict=True))
            part = image[box]
            missing = [(0, side - n) for side, n in zip(size, part.shape, strict=True)]
            part = np.pad(part, missing, mode="wrap")
            return part if part.dtype in (np.uint8, np.uint16) else part.astype(np.float32)
    except (IndexError, VolumeError):
        noise = np.random.default_rng(0).integers(0, 256, tuple(size))
        return noise.astype(np.uint8)


def _npy(array: Array) -> bytes:
    """Return an array as the content of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array))
    return buffer.getvalue()


def preprocessing_of(candidate: Candidate) -> list[dict[str, Any]]:
    """Return the normalisation in the words of bioimage.io; fill is not left out there."""
    chosen = candidate.data.image_transform
    low, high = chosen.clip_percentile_low, chosen.clip_percentile_high
    steps: list[dict[str, Any]] = [{"id": "ensure_dtype", "kwargs": {"dtype": "float32"}}]
    space = ["z", "y", "x"]
    if (low, high) != (0.0, 1.0):
        limits = {"min_percentile": 100 * low, "max_percentile": 100 * high}
        steps.append({"id": "clip", "kwargs": {**limits, "axes": space}})
    if chosen.normalize == "0-1":
        steps.append({"id": "scale_range", "kwargs": {"axes": space, "eps": SPREAD}})
    if chosen.normalize in ("z_volume", "z_section"):
        axes = space if chosen.normalize == "z_volume" else ["y", "x"]
        steps.append({"id": "zero_mean_unit_variance", "kwargs": {"axes": axes, "eps": SPREAD}})
    # Where the last step is another, readers turn the result back into the type of the image.
    if len(steps) > 1:
        steps.append({"id": "ensure_dtype", "kwargs": {"dtype": "float32"}})
    return steps


def rdf_of(
    best: BestTrial, candidate: Candidate, raw: Array, sums: Mapping[str, str], any_size: bool
) -> dict[str, Any]:
    """Return the description of the model, version 0.5 of bioimage.io's format.

    Args:
        best: The trial.
        candidate: What was trained.
        raw: (z, y, x), the tested input.
        sums: SHA-256 by the name of a file.
        any_size: Whether the network takes other sizes than that.
    """
    step = divisor(candidate.model.architecture, network_arguments(candidate.model.model_dump()))
    size_nm = best.voxel_size_nm

    def space(of_input: bool) -> list[dict[str, Any]]:
        axes: list[dict[str, Any]] = []
        for i, axis in enumerate("zyx"):
            entry: dict[str, Any] = {"type": "space", "id": axis}
            if size_nm is not None:
                entry |= {"unit": "nanometer", "scale": float(size_nm[i])}
            if not any_size:
                entry["size"] = int(raw.shape[i])
            elif of_input:
                entry["size"] = {"min": int(raw.shape[i]), "step": int(step[i])}
            else:
                entry["size"] = {"tensor_id": "raw", "axis_id": axis}
            axes.append(entry)
        return axes

    def file(name: str) -> dict[str, str]:
        return {"source": name, "sha256": sums[name]}

    metrics = best.record.metrics
    return {
        "type": "model",
        "format_version": RDF_VERSION,
        "name": f"hydralv-tune {best.study.name} trial {best.view.number}"[:128],
        "description": "Probabilities of vesicles in electron microscopy, in 3D: binary, boundary "
        f"and distance. Adapted Rand error {float(metrics['adapted_rand_error']):.4f} on the "
        "volume that it was scored on.",
        "tags": ["3d", "electron-microscopy", "instance-segmentation", "vesicles"],
        "documentation": file("README.md"),
        "attachments": [file("weights.safetensors"), file("hydralv.json")],
        "timestamp": datetime.now(UTC).isoformat(),
        "inputs": [
            {
                "id": "raw",
                "axes": [
                    {"type": "batch"},
                    {"type": "channel", "channel_names": ["intensity"]},
                    *space(True),
                ],
                "data": {"type": str(raw.dtype)},
                "test_tensor": file("test_input.npy"),
                "preprocessing": preprocessing_of(candidate),
            }
        ],
        "outputs": [
            {
                "id": "probabilities",
                "axes": [
                    {"type": "batch"},
                    {"type": "channel", "channel_names": list(CHANNELS)},
                    *space(False),
                ],
                "data": {"type": "float32"},
                "test_tensor": file("test_output.npy"),
                "postprocessing": [{"id": "ensure_dtype", "kwargs": {"dtype": "float32"}}],
            }
        ],
        "weights": {
            "torchscript": {
                **file("weights.pt"),
                "pytorch_version": torch.__version__.split("+")[0],
            }
        },
    }


def _page(best: BestTrial, facts: Mapping[str, Any]) -> str:
    """Return the page that the format asks for."""
    step = best.step
    return (
        f"# Trial {best.view.number} of study {best.study.name}\n\n"
        "A network that gives three maps of electron microscopy: whether a voxel lies in a vesicle "
        "(binary), whether at its boundary, and its distance from the outside. The activations are "
        "part of the weights. Instances come from the decoder "
        f"`{step.name}` of hydralv-tune with `{json.dumps(step.decoder_arguments())}`.\n\n"
        "## Validation\n\n"
        + "".join(
            f"- {name}: {float(best.record.metrics[name]):.4f}\n"
            for name in ("adapted_rand_error", "adapted_rand_error_foreground", "f1_iou50")
            if best.record.metrics.get(name) is not None
        )
        + f"\nSplit: {best.record.split.get('sentence') or best.record.split.get('kind')}.\n\n"
        "hydralv-tune normalises over the whole volume and leaves padding out of the range; "
        "`hydralv.json` says how windows are padded, overlapped and blended there. The test input "
        "is a window of the first image of the study. Before you upload this, put in authors and "
        "licence, and ask whether that image may be public.\n\n"
        f"```json\n{json.dumps(facts, indent=1)}\n```\n"
    )
