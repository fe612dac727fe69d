"""Windows join to what the network says, and test-time transforms are what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn

from hydralv_tune.artifacts.records import save_checkpoint
from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.errors import CheckpointError, ConfigError, InputError, TrialFailed
from hydralv_tune.numerics.normalisation import fit_normalisation, normalise
from hydralv_tune.numerics.test_time_augmentation import (
    Transform,
    activate,
    distinct_transforms,
    join_transforms,
)
from hydralv_tune.trial.scoring.prediction import (
    load_network,
    network_of,
    pick_device,
    plan_windows,
    predict,
    transforms_of,
)


def candidate(**blocks: Any) -> Candidate:
    """Return a candidate of a tiny network and small windows."""
    model = {"filters": [4, 8], **blocks.pop("model", {})}
    data = {"patch_size": [4, 16, 16], **blocks.pop("data", {})}
    return Candidate.model_validate({"model": model, "data": data, **blocks})


def tta(**settings: Any) -> dict[str, Any]:
    """Return an `inference` block with test-time augmentation."""
    return {"test_time_augmentation": {"enabled": True, **settings}}


class Voxelwise(nn.Module):
    """A network without neighbourhood: it commutes with every transform."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([4 * image - 2, 1 - image, 2 * image - 1], dim=1)


class Ramps(nn.Module):
    """A network that answers with the position in its window, along z, y and x."""

    def forward(self, image: Tensor) -> Tensor:
        ramps = [
            torch.linspace(-1, 1, side).view([-1 if axis == k else 1 for k in range(3)])
            for axis, side in enumerate(image.shape[2:])
        ]
        return torch.stack([ramp.expand(image.shape[2:]) for ramp in ramps])[None].expand(
            image.shape[0], -1, -1, -1, -1
        )


def picture(shape: tuple[int, int, int] = (11, 37, 41), seed: int = 0) -> np.ndarray:
    """Return random intensities."""
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def expected(image: np.ndarray) -> np.ndarray:
    """Return what `Voxelwise` says of a whole volume."""
    logits = Voxelwise()(torch.from_numpy(normalise(image))[None, None])
    return activate(logits, [[0, 2, "sigmoid"], [2, 3, "tanh"]])[0].numpy()


@pytest.mark.parametrize("blending", ["gaussian", "constant"])
@pytest.mark.parametrize("shape", [(11, 37, 41), (2, 9, 50), (4, 16, 16), (1, 1, 1)])
def test_blended_windows_equal_the_network_on_the_whole(
    shape: tuple[int, int, int], blending: str
) -> None:
    image = picture(shape)
    setting = candidate(inference={"sliding_window": {"blending": blending, "overlap": 0.5}})
    maps = predict(Voxelwise(), image, setting)
    assert maps.dtype == np.float16
    assert maps.shape == (3, *shape)
    assert np.abs(maps - expected(image)).max() < 2e-3


@pytest.mark.parametrize("blending", ["gaussian", "constant"])
@pytest.mark.parametrize("overlap", [0.25, 0.6])
def test_windows_are_joined_as_monai_joins_them(blending: str, overlap: float) -> None:
    setting = candidate(
        data={"pad_size": [0, 0, 0]},
        inference={
            "sliding_window": {"blending": blending, "overlap": overlap},
            "test_time_augmentation": {"enabled": False},
        },
    )
    torch.manual_seed(0)
    network = network_of(setting).eval()
    image = picture((7, 21, 25))
    with torch.inference_mode():
        joined = sliding_window_inference(
            torch.from_numpy(normalise(image))[None, None], (4, 16, 16), 3,
            lambda windows: activate(network(windows), [[0, 2, "sigmoid"], [2, 3, "tanh"]]),
            overlap=overlap, mode=blending,
            sigma_scale=setting.inference.sliding_window.sigma_scale,
        )  # fmt: skip
    assert np.abs(predict(network, image, setting) - joined[0].numpy()).max() < 1e-3


def test_a_convolution_sees_padding_as_in_training() -> None:
    image = picture((6, 20, 20))
    network = nn.Conv3d(1, 3, 3, padding=1)
    plain = predict(network, image, candidate(data={"patch_size": [8, 32, 32]}))
    for mode, name in (("reflect", "reflect"), ("replicate", "edge")):
        setting = candidate(
            data={"patch_size": [8, 32, 32], "pad_size": [1, 6, 6], "pad_mode": mode}
        )
        padded = np.pad(normalise(image), [(1, 1), (6, 6), (6, 6)], mode=name)
        logits = network(torch.from_numpy(padded)[None, None])
        whole = activate(logits, [[0, 2, "sigmoid"], [2, 3, "tanh"]])[0, :, 1:-1, 6:-6, 6:-6]
        maps = predict(network, image, setting)
        assert np.abs(maps - whole.detach().numpy()).max() < 2e-3
        assert np.abs(maps[:, 2:-2, 2:-2, 2:-2] - plain[:, 2:-2, 2:-2, 2:-2]).max() < 2e-3


def test_a_rim_of_zeros_is_black_as_in_training() -> None:
    image = picture((4, 12, 12)) // 2 + 100
    settings = {"pad_size": [2, 2, 2], "pad_mode": "constant",
                "image_transform": {"normalize": "z_volume"}}  # fmt: skip
    setting = candidate(data={"patch_size": [8, 16, 16], **settings})
    network = nn.Conv3d(1, 3, 3, padding=1)
    fitted = fit_normalisation(image, mode="z_volume")
    # Clipped to the darkest voxel of the volume, then normalised like every other.
    black = float((fitted.low[0] - fitted.offset[0]) * fitted.scale[0])
    volume = np.pad(fitted.apply(image), 2, constant_values=black)
    logits = network(torch.from_numpy(volume)[None, None])
    whole = activate(logits, [[0, 2, "sigmoid"], [2, 3, "tanh"]])[0, :, 2:-2, 2:-2, 2:-2]
    assert black < -1
    assert np.abs(predict(network, image, setting) - whole.detach().numpy()).max() < 2e-3


def test_intensities_are_normalised_as_in_training() -> None:
    image = picture() // 2 + np.arange(11, dtype=np.uint8)[:, None, None] * 10
    for mode in ("0-1", "z_volume", "z_section"):
        clipped = {"clip_percentile_low": 0.05, "clip_percentile_high": 0.95}
        setting = candidate(data={"image_transform": {"normalize": mode, **clipped}})
        volume = normalise(image, mode=mode, clip_low=0.05, clip_high=0.95)
        logits = Voxelwise()(torch.from_numpy(volume)[None, None])
        whole = activate(logits, [[0, 2, "sigmoid"], [2, 3, "tanh"]])[0].numpy()
        assert np.abs(predict(Voxelwise(), image, setting) - whole).max() < 2e-3


def test_a_part_is_predicted_as_in_the_whole_where_its_normalisation_comes_along() -> None:
    image = picture() // 2 + np.arange(11, dtype=np.uint8)[:, None, None] * 10
    for mode in ("0-1", "z_volume", "z_section"):
        for pad in ([0, 0, 0], [2, 3, 3]):
            setting = candidate(data={"image_transform": {"normalize": mode}, "pad_size": pad})
            whole = predict(Voxelwise(), image, setting)
            fitted = fit_normalisation(image, mode=mode).of_sections(7, 11)
            part = predict(Voxelwise(), image[7:], setting, normalisation=fitted)
            assert np.abs(part - whole[:, 7:]).max() < 2e-3
            again = predict(Voxelwise(), image, setting, normalisation=fit_normalisation(
                image, mode=mode))  # fmt: skip
            assert np.array_equal(again, whole)


def test_progress_counts_every_window_once() -> None:
    for shape in ((11, 37, 41), (4, 16, 16), (3, 100, 17)):
        for overlap in (0.0, 0.25, 0.6):
            setting = candidate(
                inference={"sliding_window": {"overlap": overlap, "sw_batch_size": 3}}
            )
            seen: list[tuple[int, int]] = []
            predict(
                Voxelwise(), picture(shape), setting, progress=lambda *at, to=seen: to.append(at)
            )
            count = plan_windows(shape, setting).count
            assert seen[-1] == (count, count)
            steps = np.diff([0, *(done for done, _ in seen)])
            assert steps.min() >= 1
            assert steps.max() <= 3


def test_all_flips_and_quarter_turns_are_sixteen_distinct_transforms() -> None:
    transforms = distinct_transforms("all", [[1, 2]])
    volume = torch.arange(2 * 3 * 3).view(1, 1, 2, 3, 3)
    results = {tuple(t.apply(volume).flatten().tolist()) for t in transforms}
    assert len(transforms) == len(results) == 16
    assert transforms[0] == Transform()
    assert len(distinct_transforms("all", None)) == 8
    assert len(distinct_transforms([1, 2], [[1, 2]])) == 8
    assert len(distinct_transforms([0], None)) == 2
    assert len(distinct_transforms([[0, 1], [2]], None)) == 3
    assert len(distinct_transforms(None, [[1, 2]])) == 4
    assert len(distinct_transforms(None, [[1, 2]], [0, 2])) == 2
    assert len(distinct_transforms(None, None)) == 1
    # Every plane by quarter turns, every flip: 8 flips of 4 orders of the axes.
    assert len(distinct_transforms("all", "all")) == 32


def test_each_transform_is_undone() -> None:
    volume = torch.randn(2, 3, 4, 5, 6)
    for transform in distinct_transforms("all", "all"):
        turned = transform.apply(volume)
        assert tuple(turned.shape[2:]) == transform.shape((4, 5, 6))
        assert torch.equal(transform.invert(turned), volume)


def test_quarter_turns_are_those_of_torch() -> None:
    volume = torch.randn(1, 1, 3, 4, 4)
    for plane in ((1, 2), (0, 1), (2, 0)):
        ours = {
            tuple(t.apply(volume).flatten().tolist()) for t in distinct_transforms(None, [plane])
        }
        theirs = {
            tuple(torch.rot90(volume, k, [a + 2 for a in plane]).flatten().tolist())
            for k in range(4)
        }
        assert ours == theirs


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_flip_reverses_its_own_axis_and_no_other(axis: int) -> None:
    """Axis 0 is z, not the channel: a ramp along it averages out, the others stay."""
    setting = candidate(
        inference=tta(flip_axes=[axis], channel_activations=[[0, 3, "tanh"]]),
        data={"patch_size": [4, 16, 16]},
    )
    plain = candidate(
        inference={"test_time_augmentation": {"channel_activations": [[0, 3, "tanh"]]}}
    )
    image = picture((4, 16, 16))
    ramps, alone = predict(Ramps(), image, setting), predict(Ramps(), image, plain)
    for channel in range(3):
        if channel == axis:
            assert np.abs(alone[channel]).max() > 0.7
            assert np.abs(ramps[channel]).max() < 2e-3
        elif channel == 2:  # distance alone may be below 0
            assert np.abs(ramps[channel] - alone[channel]).max() < 2e-3
        else:
            assert np.abs(ramps[channel] - alone[channel].clip(0)).max() < 2e-3


@pytest.mark.parametrize("mode", ["mean", "min", "max"])
def test_an_equivariant_network_says_the_same_under_all_transforms(mode: str) -> None:
    image = picture()
    augmented = candidate(
        inference=tta(flip_axes="all", rotation90_axes=[[1, 2]], ensemble_mode=mode)
    )
    assert len(transforms_of(augmented)) == 16
    plain = predict(Voxelwise(), image, candidate())
    assert np.abs(predict(Voxelwise(), image, augmented) - plain).max() < 1e-3


def test_a_symmetric_convolution_is_equivariant_in_windows_that_are_not_square() -> None:
    torch.manual_seed(0)
    network = nn.Conv3d(1, 3, 3, padding=1)
    with torch.no_grad():
        kernel = torch.randn(3, 1, 1, 1, 1) + torch.randn(3, 1, 3, 1, 1)
        kernel = kernel + kernel.flip(2)
        in_plane = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])
        network.weight.copy_(kernel * in_plane)
    image = picture()
    shape = {"patch_size": [4, 16, 24]}
    augmented = candidate(data=shape, inference=tta(flip_axes="all", rotation90_axes=[[1, 2]]))
    assert (
        np.abs(predict(network, image, augmented) - predict(network, image, candidate(data=shape)))
        .max() < 2e-3
    )  # fmt: skip


def test_transforms_of_a_real_network_are_joined_as_told() -> None:
    torch.manual_seed(0)
    image = picture((4, 16, 16))
    network = network_of(candidate()).eval()
    volume = torch.from_numpy(normalise(image))[None, None]
    activations = [[0, 2, "sigmoid"], [2, 3, "tanh"]]
    parts = []
    with torch.no_grad():
        for flip in ([], [2], [3], [4], [2, 3], [2, 4], [3, 4], [2, 3, 4]):
            for k in (0, 1):
                turned = torch.rot90(volume.flip(flip), k, [3, 4])
                maps = torch.rot90(activate(network(turned), activations), -k, [3, 4])
                parts.append(maps.flip(flip)[0])
    whole = torch.stack(parts)
    assert float(whole.std(0).max()) > 1e-3  # the network is not equivariant
    for mode, joined in (("mean", whole.mean(0)), ("min", whole.amin(0)), ("max", whole.amax(0))):
        setting = candidate(inference=tta(
            flip_axes="all", rotation90_axes=[[1, 2]], ensemble_mode=mode))  # fmt: skip
        assert np.abs(predict(network, image, setting) - joined.numpy()).max() < 2e-3


def test_inside_the_mask_the_result_is_the_same_and_fewer_windows_are_computed() -> None:
    torch.manual_seed(0)
    computed: list[int] = []
    network = network_of(candidate())
    network.register_forward_hook(lambda module, inputs, output: computed.append(len(inputs[0])))
    image, setting = picture((12, 64, 64)), candidate(system={"inference": {"batch_size": 4}})
    mask = np.zeros(image.shape, np.uint8)
    mask[5:7, 10:20, 30:34] = 255
    whole = predict(network, image, setting)
    all_windows = sum(computed)
    computed.clear()
    seen: list[tuple[int, int]] = []
    masked = predict(network, image, setting, mask=mask, progress=lambda *at: seen.append(at))
    assert np.abs(masked - whole)[:, mask > 0].max() < 2e-3
    assert masked[:, 0, 60, 60].tolist() == [0, 0, -1]
    assert sum(computed) < all_windows / 2
    assert seen[-1] == (all_windows, all_windows)
    strict = candidate(inference=tta(apply_mask=True))
    cut = predict(network, image, strict, mask=mask)
    assert (cut[2][mask == 0] == -1).all()
    assert np.abs(cut - whole)[:, mask > 0].max() < 2e-3


def test_results_stay_in_their_ranges_and_the_network_in_its_mode() -> None:
    network = Voxelwise().train()
    linear = candidate(inference=tta(channel_activations=[[0, 3, "none"]]))
    image = picture()
    maps = predict(network, image, linear)
    assert maps[:2].min() == 0
    assert maps[:2].max() == 1
    assert maps[2].min() == -1
    assert network.training
    assert np.array_equal(image, picture())


def test_prediction_is_deterministic_with_dropout() -> None:
    setting = candidate(model={"dropout": 0.5, "filters": [4, 8]})
    network = network_of(setting).train()
    first = predict(network, picture(), setting)
    assert np.array_equal(first, predict(network, picture(), setting))


def test_values_that_are_not_finite_fail_the_trial() -> None:
    class Diverged(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return torch.full((len(image), 3, *image.shape[2:]), torch.nan)

    with pytest.raises(TrialFailed, match="not finite") as failure:
        predict(Diverged(), picture(), candidate())
    assert not failure.value.retry


def test_wrong_input_is_refused_with_a_reason() -> None:
    network = Voxelwise()
    with pytest.raises(ValueError, match=r"image has shape \(37, 41\)"):
        predict(network, picture()[0], candidate())
    with pytest.raises(ValueError, match="mask has shape"):
        predict(network, picture(), candidate(), mask=np.ones((1, 2, 3)))
    odd = candidate(inference={"sliding_window": {"window_size": [4, 15, 16]}})
    with pytest.raises(ValueError, match=r"multiples of \(1, 2, 2\)\. Try \(4, 16, 16\)"):
        predict(network, picture(), odd)
    turned = candidate(data={"patch_size": [3, 16, 16]}, inference=tta(rotation90_axes="all"))
    with pytest.raises(ValueError, match=r"rotation90_axes turns the window"):
        predict(network, picture(), turned)
    for wrong, message in (
        ({"flip_axes": [3]}, "flip_axes holds"),
        ({"rotation90_axes": [[1, 1]]}, "pairs of axes"),
        ({"rotation90_axes": [[1, 2]], "rotate90_k": [4]}, "quarter turns must be 0 to 3"),
        ({"channel_activations": [[0, 1, "sigmoid"]]}, "nothing of channel 1"),
        ({"channel_activations": [[0, 3, "sigmoid"], [2, 3, "tanh"]]}, "channel 2 twice"),
        ({"channel_activations": [[0, 3, "relu6"]]}, "Unknown activation 'relu6'"),
        ({"channel_activations": [[0, "sigmoid"]]}, r"\[first channel, end, name\]"),
    ):
        with pytest.raises(ValueError, match=message):
            predict(network, picture(), candidate(inference=tta(**wrong)))
    with pytest.raises(ValueError, match="Unknown ensemble_mode"):
        join_transforms(network, torch.zeros(1, 1, 2, 2, 2), distinct_transforms(), "median")


def state_of(setting: Candidate, network: nn.Module) -> dict[str, Any]:
    """Return what a trial writes as best.ckpt."""
    return {"format": "hydralv_tune", "version": 1, "candidate": setting.as_mapping(),
            "weights": network.state_dict(), "step": 3}  # fmt: skip


@pytest.mark.parametrize(
    "model",
    [
        {"filters": [4, 8], "dropout": 0.1, "norm": "group", "deep_supervision": True},
        {"architecture": "mednext", "filters": [2, 4, 8, 16, 32], "mednext_kernel_size": 5},
        {"architecture": "monai_unet", "filters": [4, 8, 16], "strides": [2, [1, 2, 2]]},
    ],
)
def test_a_checkpoint_gives_back_network_and_candidate(
    tmp_path: Path, model: dict[str, Any]
) -> None:
    setting = candidate(model=model, data={"patch_size": [16, 32, 32]})
    network = network_of(setting)
    path = save_checkpoint(tmp_path / "best.ckpt", state_of(setting, network))
    loaded, its_candidate = load_network(path)
    assert its_candidate == setting
    assert not loaded.training
    weights = network.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in loaded.state_dict().items())
    image = picture((16, 32, 32))
    again = predict(loaded, image, its_candidate)
    # Its memory is laid out otherwise, so sums are rounded in another order.
    assert np.abs(again - predict(network, image, setting)).max() < 2e-3


def test_a_wrong_checkpoint_is_refused_with_a_reason(tmp_path: Path) -> None:
    setting = candidate()
    good = state_of(setting, network_of(setting))
    wider = network_of(candidate(model={"filters": [8, 16]}))
    for content, message in (
        ({"state_dict": {"model.x": torch.zeros(1)}}, "external_weights_path"),
        ({**good, "format": "other"}, "no checkpoint of hydralv-tune"),
        ({key: value for key, value in good.items() if key != "weights"}, "candidate and weights"),
        ({**good, "weights": wider.state_dict()}, "no weight fits|only in part"),
        ({**good, "candidate": {"model": {"architecture": "mednxt"}}}, "mednxt"),
    ):
        path = save_checkpoint(tmp_path / f"{len(list(tmp_path.iterdir()))}.ckpt", content)
        with pytest.raises(CheckpointError, match=message) as refusal:
            load_network(path)
        assert str(path) in str(refusal.value)
    for name, content in (("text.ckpt", b"no checkpoint"), ("half.ckpt", path.read_bytes()[:200])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            load_network(tmp_path / name)
    with pytest.raises(CheckpointError, match="no such"):
        load_network(tmp_path / "missing.ckpt")


class Trap:
    """An object that would run code where a checkpoint is unpickled carelessly."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('ran code of a checkpoint')",))


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    torch.save({"format": "hydralv_tune", "candidate": Trap()}, tmp_path / "trap.ckpt")
    with pytest.raises(CheckpointError, match=r"trap\.ckpt"):
        load_network(tmp_path / "trap.ckpt")


def test_a_network_that_does_not_fit_its_keys_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="strides is"):
        network_of(candidate(model={"strides": [2]}))
    with pytest.raises(ConfigError, match="Unknown architecture 'mednxt'"):
        network_of(candidate(model={"architecture": "mednxt"}))


def test_devices_are_found_or_refused() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99", "meta"):
        with pytest.raises(InputError, match=f"device is '{name}'"):
            pick_device(name)
