"""Every picture is written, shows something, and leaves no global state behind."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.image
import numpy as np
import pytest

from jaxrefine import plots

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


def test_slices_show_x_to_the_right_and_the_second_axis_upwards(tmp_path):
    """A bright voxel at +x, +y, +z is in the upper right quarter of all panels."""
    volume = np.zeros((N, N, N))
    volume[N // 2 :, N // 2 :, N // 2 :] = 1
    slices = plots._central_slices(volume)
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
        "import sys, numpy; from jaxrefine import plots; "
        f"plots.image_gallery({str(tmp_path / 'a.png')!r}, numpy.eye(8)[None], 'x'); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_volumes_of_jax_in_single_precision_are_accepted(tmp_path):
    volume = jax.random.uniform(jax.random.key(0), (N, N, N), jnp.float32)
    plots.orthogonal_slices(tmp_path / "a.png", {"single": volume}, "Single.")
    plots.image_gallery(tmp_path / "b.png", volume, "Single.")
