"""Random views: what they change, what they leave, and that they can be repeated."""

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("kornia")

from pyfeat.ssl.parts import Augmentation, Views, VolumeAugmentation

NOTHING = {
    "jitter": (0, 0, 0, 0),
    "grey": 0,
    "blur": 0,
    "flip": 0,
    "scale": (1, 1),
    "ratio": (1, 1),
}


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_view_has_its_size_and_its_range(channels: int) -> None:
    augment = Augmentation((24, 32), solarize=0.5, vertical_flip=0.5)
    view = augment(torch.rand(6, channels, 40, 40))
    assert view.shape == (6, channels, 24, 32)
    assert view.min() >= 0.0
    assert view.max() <= 1.0


def test_nothing_is_changed_where_nothing_is_asked_for() -> None:
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(
        Augmentation((16, 16), **NOTHING)(images),  # type: ignore[arg-type]
        images,
        atol=1e-5,
        rtol=0,
    )


def test_samples_are_drawn_for_themselves_and_a_seed_repeats_them() -> None:
    augment, images = Augmentation((16, 16)), torch.rand(1, 3, 32, 32).expand(8, -1, -1, -1)
    torch.manual_seed(5)
    first = augment(images)
    assert len({tuple(view.flatten().tolist()) for view in first}) == 8
    torch.manual_seed(5)
    assert torch.equal(augment(images), first)
    assert not torch.equal(augment(images), first)


@pytest.mark.parametrize(
    ("options", "inverse"),
    [({"flip": 1.0}, (3,)), ({"vertical_flip": 1.0}, (2,))],
)
def test_flips_flip(options: dict[str, float], inverse: tuple[int, ...]) -> None:
    images = torch.rand(3, 3, 16, 16)
    flipped = Augmentation((16, 16), **(NOTHING | options))(images)  # type: ignore[arg-type]
    torch.testing.assert_close(flipped.flip(inverse), images, atol=1e-5, rtol=0)


def test_a_grey_view_has_three_equal_channels() -> None:
    view = Augmentation((16, 16), grey=1.0)(torch.rand(3, 3, 16, 16))
    torch.testing.assert_close(view[:, :1].expand(-1, 3, -1, -1), view)


def test_light_changes_without_saturation_leave_grey_images_grey() -> None:
    images = torch.rand(4, 1, 16, 16).expand(-1, 3, -1, -1)
    augment = Augmentation((16, 16), **(NOTHING | {"jitter": (0.4, 0.4, 0, 0)}))  # type: ignore[arg-type]
    view = augment(images)
    torch.testing.assert_close(view[:, :1].expand(-1, 3, -1, -1), view)
    assert (view - images).abs().max() > 0.05


def test_a_blur_smooths_and_a_solarisation_inverts_what_is_bright() -> None:
    images = torch.rand(4, 3, 32, 32)
    blurred = Augmentation((32, 32), **(NOTHING | {"blur": 1.0}))(images)  # type: ignore[arg-type]
    assert blurred.std() < 0.9 * images.std()
    inverted = Augmentation((32, 32), **(NOTHING | {"solarize": 1.0}))(images)  # type: ignore[arg-type]
    assert inverted.max() <= 0.6 + 1e-5


def test_crops_are_of_the_scale_asked_for() -> None:
    ramp = torch.linspace(0, 1, 64).view(1, 1, 1, 64).expand(32, 3, 64, 64)
    options = NOTHING | {"scale": (0.25, 0.25)}
    view = Augmentation((32, 32), **options)(ramp)  # type: ignore[arg-type]
    span = view.amax(dim=(1, 2, 3)) - view.amin(dim=(1, 2, 3))
    torch.testing.assert_close(span, torch.full((32,), 0.5), atol=0.03, rtol=0)


def test_a_volume_is_turned_and_stays_a_volume() -> None:
    volumes = torch.rand(1, 2, 8, 10, 12).expand(3, -1, -1, -1, -1)
    torch.manual_seed(3)
    view = VolumeAugmentation()(volumes)
    assert view.shape == volumes.shape
    assert view.isfinite().all()
    assert len({round(float(x.sum()), 3) for x in view}) == 3
    still = VolumeAugmentation(degrees=0.0, scale=(1, 1), shift=0.0, flip=0.0, jitter=(0, 0))
    torch.testing.assert_close(still(volumes), volumes, atol=1e-4, rtol=0)


def test_slices_are_not_turned_round_unless_asked_for() -> None:
    volumes = torch.arange(6.0).view(1, 1, 6, 1, 1).expand(16, 1, 6, 8, 8) / 5
    still = {"degrees": 0.0, "scale": (1.0, 1.0), "shift": 0.0, "jitter": (0.0, 0.0)}
    for depth_flip, directions in ((0.0, {1}), (1.0, {-1}), (0.5, {-1, 1}), (None, {-1, 1})):
        view = VolumeAugmentation(flip=0.5, depth_flip=depth_flip, **still)(volumes)  # type: ignore[arg-type]
        slopes = (view[:, 0, -1] - view[:, 0, 0]).mean(dim=(1, 2))
        assert set(slopes.sign().int().tolist()) == directions
        torch.testing.assert_close(slopes.abs(), torch.ones(16), atol=1e-4, rtol=0)


def test_intensities_of_volumes_change_as_asked_for() -> None:
    still = {"degrees": 0.0, "scale": (1.0, 1.0), "shift": 0.0, "jitter": (0.0, 0.0), "flip": 0.0}
    volumes = torch.linspace(0.1, 0.9, 4 * 8 * 8).view(1, 1, 4, 8, 8).expand(64, 2, 4, 8, 8)

    def view(**changes: float) -> Tensor:
        changed: Tensor = VolumeAugmentation(**still, **changes)(volumes)  # type: ignore[arg-type]
        assert changed.shape == volumes.shape
        return changed

    powers = view(gamma=0.5).log() / volumes.log()  # one to a volume
    torch.testing.assert_close(
        powers, powers[:, :1, :1, :1, :1].expand_as(powers), atol=0.02, rtol=0
    )
    logs = powers[:, 0, 0, 0, 0].log()
    assert -0.51 < float(logs.min()) < -0.4
    assert 0.4 < float(logs.max()) < 0.51
    fields = (view(bias=0.3) / volumes).log()  # straight but in the middle
    bends = fields[..., 2:] + fields[..., :-2] - 2 * fields[..., 1:-1]
    assert 0.1 < float(fields.std()) < 0.3
    assert float(bends[..., [0, 1, 4, 5]].abs().max()) < 1e-5
    torch.testing.assert_close(fields[:, :1], fields[:, 1:], atol=1e-4, rtol=0)
    noise = (view(noise=0.2) - volumes).std(dim=(1, 2, 3, 4))
    assert float(noise.max()) < 0.21
    assert 0.07 < float(noise.mean()) < 0.13
    blurred = VolumeAugmentation(**still, blur=1.0)(torch.rand(4, 1, 3, 16, 16))  # type: ignore[arg-type]
    assert float(blurred.std()) < 0.2  # of uniform noise 0.29
    apart = torch.zeros(1, 1, 3, 8, 8)
    apart[:, :, 1] = 1.0
    torch.testing.assert_close(VolumeAugmentation(**still, blur=1.0)(apart), apart)  # type: ignore[arg-type]


def test_views_come_in_order() -> None:
    views = Views([nn.Identity(), nn.Flatten()], counts=[2, 3])
    assert [view.ndim for view in views(torch.ones(2, 3, 4, 4))] == [4, 4, 2, 2, 2]
    with pytest.raises(ValueError, match="counts must be as many as augmentations, 1, got 2"):
        Views([nn.Identity()], counts=[1, 2])
    with pytest.raises(ValueError, match=r"counts\[0\] must be at least 1, got 0"):
        Views([nn.Identity()], counts=[0])


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Augmentation: images must have shape \(B, C, H, W\)"):
        Augmentation((8, 8))(torch.zeros(2, 3, 8))
    with pytest.raises(ValueError, match=r"VolumeAugmentation: volumes must have shape"):
        VolumeAugmentation()(torch.zeros(2, 3, 8, 8))
