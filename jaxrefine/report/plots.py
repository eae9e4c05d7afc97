"""Pictures for reports: slices, resolution curves, pose errors, particles.

A function that takes a path writes one PNG file there, whatever its suffix, complete or
not at all. The others are building blocks of such pictures. Figures are made without
pyplot, so that no backend is chosen and no global state is changed.
"""

import itertools
import textwrap
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from jaxrefine.io.atomic import atomic_path
from jaxrefine.maps.fsc import resolution_in_angstroms
from jaxrefine.maps.postprocess import Curve, Postprocessed
from jaxrefine.maps.scale import at_unit_scale
from jaxrefine.operators.resample import resample

Volumes = Mapping[str, Float[Array | np.ndarray, "n n n"]]
"""Maps by name."""

Curves = Mapping[str, Float[Array | np.ndarray, " shells"]]
"""Fourier shell correlations by name."""

Errors = Mapping[str, Float[Array | np.ndarray, " particles"]]
"""Errors of the particles' poses by name."""

Style = tuple[str, Any]
"""A curve's colour and line style, in Matplotlib's terms."""

# Okabe and Ito's colours, which colour-blind readers can tell apart, darkest first.
_COLOURS = ("#0072B2", "#D55E00", "#000000", "#009E73", "#CC79A7", "#E69F00")
_DASHES = ("-", "--", "-.", ":", (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))

TEXT_SIZE = 11
"""Size of labels in points."""

_DPI = 120
_CHARACTERS_PER_INCH = 12
_BINS = 50
_PER_CELL = 4  # Fewest particles in a cell of uniformly distributed viewing directions.
_LEVELS = 256  # of the histogram that the level of a surface is chosen in
_MOST = 0.5  # of the positive voxels of a map: more are not within its surface
_SPECK = 0.02  # of the largest component of a surface: smaller ones are not shown
_SIDE = 200  # rays of a surface along either side
_SURFACE = LinearSegmentedColormap.from_list(
    "surface", [(0, "#0b1a2b"), (0.45, "#3f6f9f"), (0.9, "#dce9f5"), (1, "white")]
)


def orthogonal_slices(path: str | Path, volumes: Volumes, caption: str) -> None:
    """Draw the central slices of maps, one row for each map, on a common grey scale.

    The columns are the planes xy, xz and yz through the origin ``n // 2``. The scale
    extends from the 1st to the 99.8th percentile of all slices.
    """
    rows = [central_slices(np.asarray(volume)) for volume in volumes.values()]
    low, high = np.percentile(np.array(rows), (1, 99.8))
    figure = captioned_figure(7.6, 2.15 * len(rows) + 0.75, caption)
    grid = figure.subplots(len(rows), 3, squeeze=False)
    pictures = []
    for axes_row, name, slices in zip(grid, volumes, rows, strict=True):
        axes_row[0].set_ylabel(
            textwrap.fill(_drawable(name), 20),
            size=TEXT_SIZE + 1,
            fontweight="bold",
            parse_math=False,
        )
        for axes, picture in zip(axes_row, slices, strict=True):
            pictures.append(show_picture(axes, picture, low, high))
    for axes, plane in zip(grid[0], ("xy", "xz", "yz"), strict=True):
        axes.set_title(f"{plane[0]} →, {plane[1]} ↑", size=TEXT_SIZE)
    bar = figure.colorbar(pictures[0], ax=grid, shrink=0.8, aspect=30, extend="both")
    bar.set_label("density", size=TEXT_SIZE)
    bar.ax.tick_params(labelsize=TEXT_SIZE - 2)
    save(figure, path)


def fsc_curves(
    path: str | Path,
    curves: Curves,
    n: int,
    voxel_size_in_angstroms: float | None,
    caption: str,
) -> None:
    """Draw Fourier shell correlations, with the thresholds 0.5 and 0.143.

    Parameters
    ----------
    path
        The PNG to write.
    curves
        The correlation at the shells 0, 1, ..., by name.
    n
        Side of the box in voxels.
    voxel_size_in_angstroms
        If given, the upper axis shows the shells' periods in angstroms.
    caption
        Text below the curves.
    """
    figure = captioned_figure(7.2, 4.8, caption)
    axes = figure.subplots()
    draw_fsc(axes, curves, _styles(), n, voxel_size_in_angstroms)
    _add_legend(axes)
    save(figure, path)


def half_map_curves(result: Postprocessed) -> dict[str, Curve]:
    """Return the correlations of post-processed half maps, by the names in pictures."""
    return {
        "corrected": result.fsc_true,
        "masked": result.fsc_masked,
        "phases randomised": result.fsc_randomised,
        "unmasked": result.fsc_unmasked,
    }


def draw_fsc(
    axes: Axes,
    curves: Curves,
    styles: Iterable[Style],
    n: int,
    voxel_size_in_angstroms: float | None,
) -> None:
    """Draw the curves of `fsc_curves` with the given styles and without a legend.

    Shell 0, which holds the means of the maps, is left out.
    """
    last = max(len(curve) for curve in curves.values()) - 1
    for (name, curve), (colour, dash) in zip(curves.items(), styles, strict=False):
        label = _drawable(name)
        axes.plot(np.asarray(curve), color=colour, linestyle=dash, lw=2, label=label)
    lowest = min(float(np.nanmin(curve[1:])) for curve in curves.values())
    axes.set(xlim=(1, last), ylim=(min(-0.05, lowest - 0.05), 1.05))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    for threshold in (0.5, 0.143):
        axes.axhline(threshold, color="0.6", lw=1, zorder=1)
        axes.annotate(
            f"{threshold}",
            (1.01, threshold),
            xycoords=("axes fraction", "data"),
            va="center",
            color="0.35",
            size=TEXT_SIZE - 2,
        )
    label_axes(axes, "Fourier shell", "Fourier shell correlation")
    if voxel_size_in_angstroms is not None:
        shells = [shell for shell in axes.get_xticks() if 0 < shell <= last]
        periods = [
            resolution_in_angstroms(shell, n, voxel_size_in_angstroms)
            for shell in shells
        ]
        above = axes.secondary_xaxis("top")
        above.set_xticks(shells, [f"{float(period):.3g}" for period in periods])
        above.tick_params(labelsize=TEXT_SIZE - 1)
        above.set_xlabel("period (Å)", size=TEXT_SIZE)


def error_histograms(
    path: str | Path,
    errors: Errors,
    unit_label: str,
    caption: str,
    limit: float | None = None,
) -> None:
    """Draw histograms of pose errors in one plot, with their medians.

    Parameters
    ----------
    path
        The PNG to write.
    errors
        Non-negative errors of the particles, by name.
    unit_label
        Quantity and unit, such as ``"angular error (degrees)"``.
    caption
        Text below the histograms.
    limit
        End of the axis; the largest error by default. The last bin also counts all
        errors beyond it.
    """
    largest = max(float(np.max(values)) for values in errors.values())
    end = (limit or largest) or 1.0
    edges = np.linspace(0, end, _BINS + 1)
    figure = captioned_figure(7.2, 4.4, caption)
    axes = figure.subplots()
    for (name, values), (colour, dash) in zip(errors.items(), _styles(), strict=False):
        density, _ = np.histogram(np.clip(values, 0, end), edges, density=True)
        label = f"{_drawable(name)} (median {np.median(values):.3g})"
        axes.stairs(
            density, edges, color=colour, linestyle=dash, lw=2, label=label, zorder=3
        )
        axes.stairs(density, edges, color=colour, alpha=0.12, fill=True)
    axes.set(xlim=(0, end))
    axes.set_ylim(bottom=0)
    beyond = f"; last bin: {end:g} and more" if largest > end else ""
    label_axes(axes, unit_label + beyond, "density of particles")
    _add_legend(axes)
    save(figure, path)


def view_directions(
    path: str | Path, directions: Float[np.ndarray, "particles 3"], caption: str
) -> None:
    """Draw the density of directions (unit vectors), in Mollweide's projection.

    Areas on the map are in proportion to solid angles. The density is `view_density`.
    """
    density, heights, longitudes = view_density(directions)
    cells = zip(heights, longitudes, strict=True)
    figure = captioned_figure(7.2, 4.2, caption)
    axes: Any = figure.add_subplot(projection="mollweide")
    mesh = PolyCollection(
        [_outline(*cell) for cell in cells], array=density, edgecolors="face", lw=0.3
    )
    mesh.set_clim(0, density.max())
    axes.add_collection(mesh, autolim=False)
    rots, tilts = range(-120, 121, 60), range(30, 180, 30)
    axes.set_xticks(np.deg2rad(rots), [f"{rot}°" for rot in rots])
    axes.set_yticks(np.pi / 2 - np.deg2rad(tilts), [f"{tilt}°" for tilt in tilts])
    axes.tick_params(labelsize=TEXT_SIZE - 2)
    for label in axes.get_xticklabels():  # These are within the map.
        label.set(color="white", path_effects=[withStroke(linewidth=2, foreground="k")])
    axes.grid(color="white", alpha=0.3, lw=0.6)
    axes.set_xlabel("rot", size=TEXT_SIZE)
    axes.set_ylabel("tilt", size=TEXT_SIZE)
    bar = figure.colorbar(mesh, shrink=0.8)
    bar.set_label("density relative to uniform", size=TEXT_SIZE)
    bar.ax.tick_params(labelsize=TEXT_SIZE - 2)
    save(figure, path)


def _outline(
    heights: Float[np.ndarray, "2"], longitudes: Float[np.ndarray, "2"]
) -> Float[np.ndarray, "points 2"]:
    """Return the longitudes and latitudes along the border of a cell."""
    latitudes = np.arcsin(heights)
    along = np.linspace(longitudes[0], longitudes[1], 20)
    up = np.linspace(latitudes[0], latitudes[1], 20)
    low, left = np.full_like(along, up[0]), np.full_like(up, along[0])
    high, right = np.full_like(along, up[-1]), np.full_like(up, along[-1])
    longitude = np.concatenate([along, right, along[::-1], left])
    return np.stack([longitude, np.concatenate([low, up, high, up[::-1]])], axis=1)


def view_density(
    directions: Float[np.ndarray, "particles 3"],
) -> tuple[
    Float[np.ndarray, " cells"],
    Float[np.ndarray, "cells 2"],
    Float[np.ndarray, "cells 2"],
]:
    """Count directions in cells of equal area, with at least 4 in each on average.

    The cells lie in rows, which are nearly equally high on the sphere, with as many
    cells in each as make them nearly square. As areas are in proportion to differences
    of z (Archimedes), the rows divide the axis z as the numbers of their cells are.

    Parameters
    ----------
    directions
        Unit vectors ``(x, y, z)``.

    Returns
    -------
    density
        The number of directions in each cell, over the mean.
    heights, longitudes
        The interval of z, and that of the angle about z from x in radians, of each
        cell.
    """
    x, y, z = np.asarray(directions, np.float64).T
    count = int(np.clip(np.sqrt(np.pi / 4 * len(x) / _PER_CELL), 4, 24))
    tilts = (np.arange(count) + 0.5) * np.pi / count
    sizes = np.maximum(np.rint(2 * count * np.sin(tilts)).astype(int), 3)
    first = np.append(0, np.cumsum(sizes))  # cell of each row
    edges = 1 - 2 * first / first[-1]
    row = np.searchsorted(-edges[1:-1], -z)
    turn = (np.arctan2(y, x) + np.pi) / (2 * np.pi)
    column = np.minimum((turn * sizes[row]).astype(int), sizes[row] - 1)
    counts = np.bincount(first[row] + column, minlength=first[-1])
    heights = np.repeat(np.stack([edges[1:], edges[:-1]], axis=1), sizes, axis=0)
    starts = np.concatenate([np.arange(size) / size for size in sizes])
    ends = starts + np.repeat(1 / sizes, sizes)
    longitudes = 2 * np.pi * np.stack([starts, ends], axis=1) - np.pi
    return counts / counts.mean(), heights, longitudes


def convergence(
    path: str | Path,
    series: Mapping[str, Float[Array | np.ndarray, " iterations"]],
    unit_label: str,
    caption: str,
) -> None:
    """Draw series of numbers against the outer iteration, counted from 1."""
    figure = captioned_figure(7.2, 4.8, caption)
    axes = figure.subplots()
    for (name, values), (colour, dash) in zip(series.items(), _styles(), strict=False):
        iterations = np.arange(1, len(values) + 1)
        label = _drawable(name)
        axes.plot(iterations, values, color=colour, linestyle=dash, lw=2, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    label_axes(axes, "outer iteration", unit_label)
    _add_legend(axes)
    save(figure, path)


def image_gallery(
    path: str | Path,
    images: Float[Array | np.ndarray, "particles m m"],
    caption: str,
    count: int = 8,
) -> None:
    """Draw ``count`` particles, evenly spaced in the stack, on a common grey scale.

    Titles count particles from 1, as in RELION.
    """
    count = min(count, len(images))
    chosen = np.linspace(0, len(images) - 1, count).round().astype(int)
    pictures = np.stack([np.asarray(images[index]) for index in chosen])
    low, high = np.percentile(pictures, (0.5, 99.5))
    columns = min(4, count)
    rows = -(-count // columns)
    figure = captioned_figure(1.9 * columns + 0.2, 2.05 * rows + 0.45, caption)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, picture, index in zip(grid, pictures, chosen, strict=False):
        show_picture(axes, picture, low, high)
        axes.set_title(f"particle {index + 1}", size=TEXT_SIZE - 1)
    for axes in grid[count:]:
        axes.set_axis_off()
    save(figure, path)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as a PNG file, which appears complete or not at all.

    Characters that the font lacks are drawn as boxes.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(temporary, format="png")


def captioned_figure(width: float, height: float, caption: str) -> Figure:
    """Return a figure of the given size in inches, with a caption below its plots.

    The caption is drawn as it is, since the names of files in it may have any
    characters.
    """
    figure = Figure((width, height), dpi=_DPI, layout="constrained")
    lines = textwrap.fill(_drawable(caption), int(_CHARACTERS_PER_INCH * width))
    figure.supxlabel(lines, size=TEXT_SIZE - 1, parse_math=False)
    return figure


def _drawable(text: str) -> str:
    """Return text with a mark for what is no character, as in some names of files."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _styles():
    """Return an endless iterator of pairs of a colour and a line style."""
    return itertools.cycle(zip(_COLOURS, _DASHES, strict=True))


def label_axes(axes: Axes, x: str, y: str) -> None:
    """Label the axes, and remove the upper and the right spine."""
    axes.set_xlabel(x, size=TEXT_SIZE)
    axes.set_ylabel(y, size=TEXT_SIZE)
    axes.tick_params(labelsize=TEXT_SIZE - 1)
    axes.spines[["top", "right"]].set_visible(False)


def _add_legend(axes: Axes) -> None:
    legend = axes.legend(fontsize=TEXT_SIZE - 1, framealpha=0.9)
    for text in legend.get_texts():  # A name may have dollars.
        text.set_parse_math(False)


def central_slices(
    volume: Float[np.ndarray, "n n n"],
) -> tuple[Float[np.ndarray, "n n"], ...]:
    """Return the xy, xz and yz planes through the origin.

    They are indexed ``[y, x]``, ``[z, x]`` and ``[z, y]``.
    """
    centre = volume.shape[0] // 2
    return volume[centre], volume[:, centre], volume[:, :, centre]


def show_picture(
    axes: Axes, picture: Float[np.ndarray, "h w"], low: float, high: float
) -> AxesImage:
    """Show a picture in grey, with its first axis pointing upwards."""
    axes.set_xticks([])
    axes.set_yticks([])
    return axes.imshow(picture, cmap="gray", origin="lower", vmin=low, vmax=high)


def surfaces(path: str | Path, volumes: Volumes, caption: str) -> None:
    """Draw the surfaces of maps from three sides, one row for each map.

    The first map's surface is at `surface_level`, and the others' hold as many voxels.
    Where that is most of a map's positive voxels, as in noise, or in a mask that is
    smaller than the first surface, its surface is at the `surface_level` of the map
    without its negative densities. Every map must have a positive density. Specks, of
    less than a fiftieth of the largest component, are left out. The viewer looks along
    y, x and z.
    """
    maps = {
        name: np.asarray(at_unit_scale(jnp.asarray(volume)))
        for name, volume in volumes.items()
    }
    first = next(iter(maps.values()))
    share = float(np.mean(first >= surface_level(first)))
    figure = captioned_figure(7.6, 2.45 * len(maps) + 0.4, caption)
    grid = figure.subplots(len(maps), 3, squeeze=False)
    for place, axes in enumerate(grid[0]):
        right, up = "xzy"[place], "zyx"[place]
        axes.set_title(f"{right} →, {up} ↑", size=TEXT_SIZE)
    for axes_row, (name, volume) in zip(grid, maps.items(), strict=True):
        level = float(np.quantile(volume, 1 - share))
        if share > _MOST * np.mean(volume > 0):
            level = surface_level(np.clip(volume, 0, None))
        fine = _around(volume, level)
        for place, axes in enumerate(axes_row):
            # A cyclic permutation of the axes is a rotation: it keeps the hand.
            turned = np.transpose(fine, [(place + axis) % 3 for axis in range(3)])
            axes.imshow(
                isosurface(turned, level, 1),
                cmap=_SURFACE,
                origin="lower",
                vmin=0,
                vmax=1,
                interpolation="antialiased",
            )
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        axes_row[0].set_ylabel(
            _drawable(name), size=TEXT_SIZE, fontweight="bold", parse_math=False
        )
    save(figure, path)


def surface_level(volume: Float[np.ndarray, "n n n"]) -> float:
    """Return the density that best divides a map's voxels into two classes.

    The variance between the classes is the largest (Otsu, IEEE Trans. Syst. Man Cybern.
    9, 1979); in the middle of a gap, if there is one.
    """
    count, edges = np.histogram(volume, _LEVELS)
    middle = (edges[1:] + edges[:-1]) / 2
    below, sums = np.cumsum(count)[:-1], np.cumsum(count * middle)[:-1]
    total = float(count @ middle)
    above = volume.size - below
    between = (volume.size * sums - below * total) ** 2 / (below * above)
    best = 1 + np.flatnonzero(np.isclose(between, between.max(), rtol=1e-9, atol=0))
    return float(edges[best[0]] + edges[best[-1]]) / 2


def _around(
    volume: Float[np.ndarray, "n n n"], level: float
) -> Float[np.ndarray, "m m m"]:
    """Sample the cube about the origin that holds the particle, finely.

    What reaches the level apart from the particle is removed.
    """
    n = len(volume)
    places = np.argwhere(_is_particle(volume, level)) - n // 2
    half = min(int(np.abs(places).max(initial=1)) + 2, n // 2)
    fine = resample(jnp.asarray(volume), 1.0, _SIDE, 2 * half / _SIDE)
    fine = np.asarray(fine)
    is_shown = (fine < level) | _is_particle(fine, level)
    return np.where(is_shown, fine, fine.min())


def _is_particle(
    volume: Float[np.ndarray, "n n n"], level: float
) -> Bool[np.ndarray, "n n n"]:
    """Return which voxels reach a level, but for small components of these."""
    from scipy import ndimage  # slow to import

    labelled: Any = ndimage.label(volume >= level)
    sizes = np.bincount(labelled[0].ravel())
    is_large = sizes >= _SPECK * sizes[1:].max(initial=0)
    is_large[0] = False
    return is_large[labelled[0]]


def isosurface(
    volume: Float[Array | np.ndarray, "n n n"], level: float, upsampling: int = 3
) -> Float[np.ndarray, "m m"]:
    """Render the isosurface of a map, as seen along +y.

    The map is upsampled by cubic splines, three times by default, so
    ``m = upsampling (n - 1) + 1``. The surface scatters the light of a lamp at the
    upper left behind the viewer, and a soft light from the front; points that are
    farther away are darker.

    Returns
    -------
    image
        Brightness indexed ``[z, x]``: up to 0.9 on the surface, and 1 in the
        background.
    """
    hit, depth, normals = find_surface(volume, level, upsampling)
    lamp = np.clip(_TOWARDS_LAMP @ normals, 0, None)
    front = np.clip(-normals[1], 0, None)
    fog = 1 - 0.5 * depth / len(volume)
    image = np.ones(hit.shape)
    image[hit] = 0.9 * np.clip(fog * (0.1 + 0.7 * lamp + 0.4 * front), 0, 1)
    return image


_TOWARDS_LAMP = np.array([-1.0, -2.0, 1.5]) / 7.25**0.5  # (x, y, z), a unit vector


def find_surface(
    volume: Float[Array | np.ndarray, "n n n"], level: float, upsampling: int = 3
) -> tuple[
    Bool[np.ndarray, "m m"],
    Float[np.ndarray, " points"],
    Float[np.ndarray, "3 points"],
]:
    """Find the points where rays along +y first reach a density of at least a level.

    Returns
    -------
    hit
        Which rays, indexed ``[z, x]``, reach it; there are `upsampling` of them per
        voxel.
    depth
        Coordinate y of each point in voxels, interpolated linearly between samples.
    normals
        Outward unit normals (x, y, z) at these points, from the map's gradient; zero
        where the gradient is zero.
    """
    from scipy import ndimage  # slow to import

    n = len(volume)
    fine = np.moveaxis(np.asarray(volume), 1, 0)
    if upsampling > 1:
        fine = np.asarray(ndimage.zoom(fine, (upsampling * (n - 1) + 1) / n))
    inside = fine >= level
    hit = np.asarray(inside.any(axis=0))
    z, x = np.nonzero(hit)
    first = inside.argmax(axis=0)[hit]
    density = fine[first, z, x]
    rise = density - fine[np.maximum(first - 1, 0), z, x]
    back = np.divide(density - level, rise, out=np.zeros_like(rise), where=rise > 0)
    points = np.stack([first - back, z, x])
    ahead, behind = (
        [
            ndimage.map_coordinates(fine, moved, order=1, mode="nearest")
            for moved in points + sign * np.eye(3)[[2, 0, 1], :, None]
        ]
        for sign in (0.5, -0.5)
    )
    slopes = np.subtract(ahead, behind)
    steepness = np.linalg.norm(slopes, axis=0)
    return hit, points[0] / upsampling, -slopes / np.where(steepness, steepness, 1)
