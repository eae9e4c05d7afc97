"""Every picture is written, shows something, and leaves no global state behind."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.image
import numpy as np
import pytest
from scipy import ndimage

from jaxrefine.errors import InputError
from jaxrefine.euler import euler_to_matrix
from jaxrefine.report import plots

RNG = np.random.default_rng(0)
N = 16
VOLUME = RNG.uniform(size=(N, N, N))
CURVE = np.linspace(1, -0.1, N // 2 + 1)
ERRORS = RNG.rayleigh(2, 200)

PICTURES = {
    "slices": lambda path: plots.orthogonal_slices(
        path, {"truth": VOLUME, "a map in JAX": jnp.asarray(VOLUME) / 2}, "Slices."
    ),
    "one map": lambda path: plots.orthogonal_slices(path, {"map": VOLUME}, "One."),
    "empty map": lambda path: plots.orthogonal_slices(path, {"0": 0 * VOLUME}, "None."),
    "curves": lambda path: plots.fsc_curves(
        path, {"a": CURVE, "b": CURVE**2}, N, None, "Curves against the shell."
    ),
    "resolution": lambda path: plots.fsc_curves(path, {"a": CURVE}, N, 2.9, "In A."),
    "many curves": lambda path: plots.fsc_curves(
        path, {str(i): CURVE / i for i in range(1, 9)}, N, 2.9, "Eight."
    ),
    "errors": lambda path: plots.error_histograms(
        path, {"before": 4 * ERRORS, "after": ERRORS}, "error (degrees)", "Errors."
    ),
    "limit": lambda path: plots.error_histograms(
        path, {"after": ERRORS}, "error (degrees)", "Errors.", limit=3.0
    ),
    "no errors": lambda path: plots.error_histograms(
        path, {"exact": np.zeros(5)}, "error (pixels)", "All poses are exact."
    ),
    "views": lambda path: plots.view_directions(path, even_views(300), "Even."),
    "one view": lambda path: plots.view_directions(path, even_views(1), "One."),
    "surfaces": lambda path: plots.surfaces(
        path, {"a ball $": 1e20 * ball(5.0), "noise": 1e-20 * VOLUME}, "Two maps."
    ),
    "gallery": lambda path: plots.image_gallery(path, VOLUME, "Particles."),
    "few images": lambda path: plots.image_gallery(path, VOLUME[:1], "One particle."),
}


@pytest.mark.parametrize("name", PICTURES)
def test_picture_is_written_and_not_blank(name, tmp_path):
    settings = dict(matplotlib.rcParams)
    path = tmp_path / "picture.png"
    PICTURES[name](path)
    assert path.stat().st_size > 5000
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) >= 200
    assert np.mean(pixels[..., :3].min(axis=-1) < 0.9) > 0.01
    assert dict(matplotlib.rcParams) == settings


@pytest.mark.parametrize("name", ["picture", "picture.pdf", "picture.png"])
def test_pictures_are_png_whatever_the_suffix(name, tmp_path):
    plots.fsc_curves(tmp_path / name, {"a": CURVE}, N, None, "A curve.")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written_is_a_sentence(tmp_path):
    path = tmp_path / "absent" / "curve.png"
    with pytest.raises(InputError, match="cannot write .*absent"):
        plots.fsc_curves(path, {"a": CURVE}, N, None, "A curve.")


def test_slices_show_x_to_the_right_and_the_second_axis_upwards(tmp_path):
    """A bright voxel at +x, +y, +z is in the upper right quarter of all panels."""
    volume = np.zeros((N, N, N))
    volume[N // 2 :, N // 2 :, N // 2 :] = 1
    slices = plots.central_slices(volume)
    assert all(picture[-1, -1] == 1 and picture[0, 0] == 0 for picture in slices)
    path = tmp_path / "corner.png"
    plots.orthogonal_slices(path, {"corner": volume}, "A corner.")
    # The left third of the figure, without its labels, is the xy panel.
    panel = matplotlib.image.imread(path)[:, 60:250, 0]
    rows = np.flatnonzero(panel.mean(axis=1) < 0.7)
    top, bottom = rows[0], rows[-1]
    dark = panel[top:bottom] < 0.2
    half = dark.shape[0] // 2
    assert dark[half + 5 :].mean() > 0.9 > dark[: half - 5].mean()


def test_errors_beyond_the_limit_stand_in_the_last_bin(tmp_path):
    written = []
    for last in (2.99, 50.0):
        path = tmp_path / f"{last}.png"
        errors = np.append(np.linspace(0, 2.5, 50), last)
        plots.error_histograms(path, {"a": errors}, "(deg)", "x", limit=3.0)
        written.append(matplotlib.image.imread(path))
    # The steps are the same; the label below the axis says that the bin is open.
    height = int(0.85 * len(written[0]))
    np.testing.assert_array_equal(written[0][:height], written[1][:height])
    assert not np.array_equal(*written)


def test_pyplot_is_never_imported(tmp_path):
    code = (
        "import sys, numpy; from jaxrefine.report import plots; "
        f"plots.image_gallery({str(tmp_path / 'a.png')!r}, numpy.eye(8)[None], 'x'); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_volumes_of_jax_in_single_precision_are_accepted(tmp_path):
    volume = jax.random.uniform(jax.random.key(0), (N, N, N), jnp.float32)
    plots.orthogonal_slices(tmp_path / "a.png", {"single": volume}, "Single.")
    plots.image_gallery(tmp_path / "b.png", volume, "Single.")


# --- viewing directions


def even_views(count):
    """The Fibonacci lattice of the sphere."""
    index = np.arange(count)
    z = 1 - (2 * index + 1) / count
    longitude = np.pi * (1 + 5**0.5) * index
    ring = np.sqrt(1 - z**2)
    return np.stack([ring * np.cos(longitude), ring * np.sin(longitude), z], axis=-1)


@pytest.mark.parametrize("count", [1, 100, 3000, 40000])
def test_cells_have_equal_areas_and_cover_the_sphere(count):
    """The area of a cell is that of its interval of z times that of longitudes."""
    density, heights, longitudes = plots.view_density(even_views(count))
    areas = np.diff(heights)[:, 0] * np.diff(longitudes)[:, 0]
    np.testing.assert_allclose(areas, 4 * np.pi / len(density))
    middles = heights.mean(axis=1), longitudes.mean(axis=1)
    assert len(set(zip(*middles, strict=True))) == len(density)
    assert heights.min() == -1 and heights.max() == 1
    assert density.mean() == pytest.approx(1)
    # Nearly square where there are many: no needles at the poles.
    rings = np.sqrt(1 - middles[0] ** 2) * np.diff(longitudes)[:, 0]
    shape = rings / np.diff(np.arcsin(heights))[:, 0]
    assert shape.min() > 0.5 and shape.max() < 2.5


def test_views_are_counted_where_they_are():
    """Even views fill all cells alike, one view a single cell."""
    density, *_ = plots.view_density(even_views(20000))
    assert abs(density - 1).max() < 0.35
    # (rot, tilt) = (100, 30) degrees; the tilt's sign turns the view by half a turn.
    for sign, rot in ((1, 100.0), (-1, -80.0)):
        angles = jnp.deg2rad(jnp.asarray([[100.0, 30.0 * sign, 7.0]] * 100))
        direction = np.asarray(euler_to_matrix(angles))[:, 2]
        density, heights, longitudes = plots.view_density(direction)
        (cell,) = np.flatnonzero(density)
        assert density[cell] == pytest.approx(density.size)
        low, high = heights[cell]
        assert low <= np.cos(np.deg2rad(30)) <= high
        left, right = longitudes[cell]
        assert left <= np.deg2rad(rot) <= right


def test_poles_and_the_seam_of_the_map_are_counted():
    edge = np.array([[0, 0, 1 + 1e-7], [0, 0, -1 - 1e-7], [-1, 0, 0], [-1, -0.0, 0]])
    density, *_ = plots.view_density(edge)
    assert density.sum() * len(edge) / density.size == pytest.approx(4)


# --- isosurfaces


def ball(radius, *, n=20, shift=(0, 0, 0)):
    """Density 0 on a sphere about the origin moved by (x, y, z), rising inwards."""
    axes = np.meshgrid(*(3 * [np.arange(n) - n // 2]), indexing="ij")
    squares = [(axis - move) ** 2 for axis, move in zip(axes, shift[::-1], strict=True)]
    return radius**2 - np.sum(squares, axis=0)


def test_the_surface_of_a_ball_has_its_depth_and_normals():
    """The density is a square, which a straight line misses by 1/36 at the most.

    That is 0.006 voxels where it falls by at least 5 in a voxel. The box is so wide
    that what splines make of its border does not reach the ball.
    """
    radius, shift, n = 6.0, np.array([1.0, -0.5, 2.0]), 28
    hit, depth, normals = plots.find_surface(ball(radius, n=n, shift=shift), 0.0)
    assert hit.shape == (3 * n - 2, 3 * n - 2)
    z, x = np.nonzero(hit)
    across = np.stack([x, z]) / 3 - n // 2 - shift[[0, 2], None]
    assert hit.sum() / 9 == pytest.approx(np.pi * radius**2, rel=0.02)
    inner = np.hypot(*across) < 0.9 * radius
    ahead = np.sqrt(radius**2 - np.sum(across[:, inner] ** 2, axis=0))
    expected = n // 2 + shift[1] - ahead
    np.testing.assert_allclose(depth[inner], expected, atol=0.007)
    outward = np.stack([across[0, inner], -ahead, across[1, inner]]) / radius
    np.testing.assert_allclose(normals[:, inner], outward, atol=0.01)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=0), 1)


def test_the_nearest_of_two_surfaces_is_seen():
    far, near = ball(2.0, shift=(0, 5, 0)), ball(3.0, shift=(0, -5, 0))
    depths = []
    for density in (near, np.maximum(far, near)):
        hit, depth, _ = plots.find_surface(density, 0.0)
        depths.append(np.full(hit.shape, 99.0))
        depths[-1][hit] = depth
    inner = depths[0] < 4.5  # not the rim, which is steep
    np.testing.assert_allclose(depths[1][inner], depths[0][inner], atol=0.01)


def test_isosurfaces_are_lit_from_the_upper_left_and_dim_with_distance():
    images = [plots.isosurface(ball(5.0, shift=(0, y, 0)), 0.0) for y in (-4, 0, 4)]
    for image in images:
        middle = len(image) // 2
        left_and_right = image[middle, middle - 8], image[middle, middle + 8]
        above_and_below = image[middle + 8, middle], image[middle - 8, middle]
        assert left_and_right[0] > left_and_right[1] > 0
        assert above_and_below[0] > above_and_below[1] > 0
        assert image[0, 0] == 1 and image[middle, middle] <= 0.9
    brightness = [image[image < 1].mean() for image in images]
    assert brightness == sorted(brightness, reverse=True)


@pytest.mark.parametrize(("level", "met"), [(-1e6, True), (1e6, False)])
def test_levels_beyond_all_densities_are_met_at_once_or_never(level, met):
    hit, depth, _ = plots.find_surface(ball(5.0), level)
    assert (hit == met).all() and (depth == 0).all()
    image = plots.isosurface(np.full((5, 5, 5), 2.0), 1.0)
    assert ((image >= 0) & (image <= 0.9)).all()


def test_the_level_of_a_surface_divides_the_voxels():
    """By definition, against every level between two values."""
    values = np.random.default_rng(0).normal(size=(6, 6, 6))
    values[2:5, 2:5, 2:5] += 4
    level = plots.surface_level(values)
    ranked = np.sort(values.ravel())
    between = [
        k * (216 - k) * (ranked[:k].mean() - ranked[k:].mean()) ** 2
        for k in range(1, 216)
    ]
    best = 1 + int(np.argmax(between))
    assert ranked[best - 1] < level < ranked[best]
    assert plots.surface_level(np.where(values > 2, 3.0, 1.0)) == pytest.approx(2, 0.01)


@pytest.fixture
def rendered(tmp_path, monkeypatch):
    """Where the three views of maps show something; indices grow right and upwards."""

    def render(*volumes):
        shown, isosurface = [], plots.isosurface

        def record(*words):
            shown.append(isosurface(*words))
            return shown[-1]

        with monkeypatch.context() as patch:
            patch.setattr(plots, "isosurface", record)
            maps = {f"map {place}": volume for place, volume in enumerate(volumes)}
            plots.surfaces(tmp_path / "a.png", maps, "")
        return [image < 1 for image in shown]

    return render


def test_surfaces_are_seen_as_their_titles_say(rendered):
    """x, z; z, y; y, x: to the right and upwards, each of them right-handed."""
    place = np.array([5, -3, 1])  # (x, y, z)
    views = rendered(np.exp(ball(0.0, shift=place) / 4))
    for view, axes in zip(views, ([0, 2], [2, 1], [1, 0]), strict=True):
        middle = np.argwhere(view).mean(axis=0)[::-1] - len(view) // 2
        scale = np.abs(middle).max() / np.abs(place[axes]).max()
        np.testing.assert_allclose(middle / scale, place[axes], atol=0.2)


def test_specks_are_not_drawn(rendered):
    """A second, small ball is, which is more than a fiftieth of the first."""
    large = np.where(ball(5.0, shift=(-3, 0, 0)) > 0, 1.0, 0.0)
    small = np.where(ball(2.0, shift=(6, 0, 0)) > 0, 1.0, 0.0)
    counts = []
    for volume in (large, large + small):
        volume[14, 15, 16] = 1.0
        labelled: Any = ndimage.label(rendered(volume)[0])
        counts.append(labelled[1])
    assert counts == [1, 2]


@pytest.mark.parametrize("solvent", [0.0, -1e-3])
def test_the_surface_of_a_masked_map_is_no_box_after_a_noisy_one(rendered, solvent):
    """Half of the voxels of noise are above its level, but few of those in a mask."""
    noise = np.random.default_rng(0).normal(size=(20, 20, 20))
    mask, particle = ball(6.0) > 0, np.clip(ball(4.0), 0, None)
    masked = np.where(mask, particle + np.abs(noise), solvent)
    assert np.mean(noise >= plots.surface_level(noise)) > np.mean(mask)
    alone, after = rendered(masked), rendered(noise, masked)[3:]
    for view, expected in zip(after, alone, strict=True):
        assert np.mean(view != expected) < 0.02  # the steps of two histograms differ
        # The view is of the particle and a margin, of which a disc is about 0.4.
        assert 0.2 < view.mean() < 0.7
