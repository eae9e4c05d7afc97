"""The report of a refinement: one self-contained HTML file.

Pictures are embedded, and nothing is loaded from elsewhere. The page is built as an
element tree, so that the names of files are always escaped.
"""

import base64
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, final
from xml.etree.ElementTree import Element, indent, tostring

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxrefine.geometry import Poses
from jaxrefine.io.atomic import atomic_path
from jaxrefine.maps.fsc import HALF_MAP_THRESHOLD, resolution
from jaxrefine.maps.postprocess import Postprocessed
from jaxrefine.report import plots

Row = Mapping[str, Any]
"""Numbers, lists of numbers or None, by name."""

_CYCLES = "cycles per box"
_INCHES, _DPI = (5.4, 3.6), 160

_HEADINGS = {
    "r_max": f"band limit ({_CYCLES})",
    "search_r_max": f"band limit of the search ({_CYCLES})",
    "searched": "particles searched",
    "decided": "fraction of particles with one hypothesis",
    "evaluations": "evaluations of the likelihood for a particle",
    "angle_change_in_degrees": "median rotation (degrees)",
    "shift_change_in_pixels": "median shift (pixels)",
    "tau": "regularisation weight tau of each set",
    "fold_score": "mean FSC of the folds",
    "gold_score": "mean FSC of the half sets' regularised maps",
    "is_kept": "kept",
    "cg_residual": "relative residual of the last CG solution",
    "angle_moves": "accepted angle steps",
    "shift_moves": "accepted shift steps",
    "elapsed_s": "time (s)",
}

_STYLE = """
:root { color-scheme: light dark; --line: #d0d4da; --soft: #f3f5f7; --quiet: #57606a }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a4048; --soft: #1d2126; --quiet: #a3acb7 }
  html { background: #121417; color: #e6e8eb }
}
* { box-sizing: border-box }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto;
  padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25 }
h2 { font-size: 1.15rem; margin: 2rem 0 .75rem }
code { font-family: ui-monospace, monospace; font-size: .9em }
dl { display: grid; gap: .75rem; margin: 0;
  grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)) }
dl > div { background: var(--soft); border-radius: .5rem; padding: .5rem .75rem }
dt, figcaption { color: var(--quiet); font-size: .875rem }
dd { margin: 0; font-weight: 600 }
section > div { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)) }
figure { margin: 0; break-inside: avoid }
img { display: block; width: 100%; height: auto; padding: .4rem; background: white;
  border: 1px solid var(--line); border-radius: .5rem }
section > div[role] { display: block; overflow-x: auto; margin-top: 1rem }
table { border-collapse: collapse; font-size: .875rem }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem;
  border-bottom: 1px solid var(--line); overflow-wrap: normal }
tbody th { font-weight: normal; color: var(--quiet) }
[role] td { font-variant-numeric: tabular-nums }
@media print {
  :root { color-scheme: light; --line: #d0d4da; --soft: #fff; --quiet: #333 }
  html { background: white; color: black }
  body { max-width: none; padding: 0; font-size: .8rem }
  section > div { grid-template-columns: 1fr 1fr }
  section > div[role] { overflow: visible }
  [role] table { font-size: .6rem }
  [role] :is(th, td) { padding: .15rem .25rem }
  tr { break-inside: avoid }
  h2 { break-after: avoid }
}
"""


@final
@dataclass(frozen=True)
class Report:
    """The content of a report. Entries that are None or empty are left out.

    Attributes
    ----------
    title
        Title of the page.
    command
        Command line of the run.
    pixel_size_in_angstroms
        Pixel size of the images and the maps.
    poses
        Refined poses.
    angle_change_in_degrees, shift_change_in_pixels
        Distance of each pose from the initial one.
    initial_map, volume
        The initial map and the refined one; their scales may differ.
    rows
        A row of ``metrics.jsonl`` for every outer iteration.
    settings
        The values that the options have, with their units, by their flags.
    versions, device
        Versions of the software, and the device of the run.
    wall_s
        Wall time of the run in seconds.
    peak_rss_mib, peak_device_mib
        Peak memory in MiB on the host and on the device.
    half_set_fsc
        Correlation of the maps of the half sets at the shells 0, ..., n // 2.
    postprocessed
        What was made of these maps.
    mask
        Which mask that is, in words.
    remarks
        Sentences on what was not done, and why.
    fold_fsc
        Without half sets, the correlation of the maps of the two folds.
    angle_std_in_degrees, shift_std_in_pixels
        Estimated standard errors of the poses.
    undetermined
        Which particles have undetermined poses; the pictures leave them out.
    left_out
        How many of these were not refined at all.
    """

    title: str
    command: str
    pixel_size_in_angstroms: float
    poses: Poses
    angle_change_in_degrees: Float[np.ndarray, " particles"]
    shift_change_in_pixels: Float[np.ndarray, " particles"]
    initial_map: Float[np.ndarray, "n n n"]
    volume: Float[np.ndarray, "n n n"]
    rows: Sequence[Row]
    settings: Mapping[str, str]
    versions: Mapping[str, str]
    device: str
    wall_s: float
    peak_rss_mib: float | None = None
    peak_device_mib: float | None = None
    half_set_fsc: Float[np.ndarray, " shells"] | None = None
    postprocessed: Postprocessed | None = None
    mask: str = "an automatic mask"
    remarks: Sequence[str] = ()
    fold_fsc: Float[np.ndarray, " shells"] | None = None
    angle_std_in_degrees: Float[np.ndarray, " particles"] | None = None
    shift_std_in_pixels: Float[np.ndarray, " particles"] | None = None
    undetermined: Bool[np.ndarray, " particles"] | None = None
    left_out: int = 0

    @property
    def box_in_angstroms(self) -> float:
        """Side of the box in angstroms."""
        return len(self.volume) * self.pixel_size_in_angstroms

    @property
    def determined(self) -> Bool[np.ndarray, " particles"]:
        """Which particles have determined poses; the pictures show these."""
        if self.undetermined is None:
            return np.ones(len(self.poses), bool)
        return ~self.undetermined

    @property
    def undetermined_count(self) -> int:
        """How many poses were refined and are undetermined."""
        return len(self.poses) - int(self.determined.sum()) - self.left_out


def write(path: str | Path, report: Report) -> None:
    """Write a report as one HTML file, which appears complete or not at all.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    head = [
        _element("meta", charset="utf-8"),
        _element(
            "meta", name="viewport", content="width=device-width, initial-scale=1"
        ),
        _element("title", report.title),
        _element("style", _STYLE),
    ]
    sections = (
        _element("section", [_element("h2", heading), *content])
        for heading, content in _sections(report)
        if content
    )
    body = [_element("h1", report.title), _element("main", sections)]
    page = _element("html", [_element("head", head), _element("body", body)], lang="en")
    indent(page, " ")
    text = "<!DOCTYPE html>\n" + tostring(page, "unicode", "html")
    with atomic_path(path) as temporary:
        # File names may contain characters that UTF-8 cannot encode.
        temporary.write_text(text, "utf-8", "replace")


def _sections(report: Report) -> Iterator[tuple[str, list[Element]]]:
    """Yield the headings and the content of the sections, which may be empty."""
    remarks = [_element("p", remark) for remark in report.remarks]
    yield "Result", [_headlines(report), *remarks]
    measured = report.half_set_fsc is not None
    heading = "Resolution" if measured else "Correlation of the folds"
    yield heading, _grid(_resolution_pictures(report))
    yield "Map", _grid(_map_pictures(report))
    yield "Poses", _grid(_pose_pictures(report))
    yield "Iterations", _grid(_band_pictures(report)) + _iteration_table(report.rows)
    yield "Settings", _pairs(report.settings)
    yield "Command", [_element("p", [_element("code", report.command)])]
    yield "Software and device", _pairs({**report.versions, "device": report.device})


def _headlines(report: Report) -> Element:
    """Return the most important numbers with their names."""
    count, n = len(report.poses), len(report.volume)
    figures = {
        "Particles": f"{count}",
        "Box": f"{n} px, {report.box_in_angstroms:.4g} Å",
        "Pixel size": f"{report.pixel_size_in_angstroms:.4g} Å",
        **_resolutions(report),
        "Outer iterations": f"{len(report.rows)}",
        "Wall time (h:min:s)": f"{timedelta(seconds=round(report.wall_s))}",
    }
    if report.undetermined is not None:
        number = report.undetermined_count
        figures["Undetermined particles"] = f"{number} ({100 * number / count:.3g} %)"
    if report.left_out:
        figures["Particles left out"] = f"{report.left_out}"
    for where, peak in (
        ("", report.peak_rss_mib),
        (", device", report.peak_device_mib),
    ):
        if peak is not None:
            figures[f"Peak memory{where}"] = f"{peak:.0f} MiB"
    cards = (
        _element("div", [_element("dt", name), _element("dd", value)])
        for name, value in figures.items()
    )
    return _element("dl", cards)


def _resolutions(report: Report) -> dict[str, str]:
    """Return the resolutions that the half maps have, by their names."""
    name, processed = f"Resolution, FSC {HALF_MAP_THRESHOLD}", report.postprocessed
    if report.half_set_fsc is None:
        return {name: "not measured (no half sets)"}
    if processed is None:
        return {name: _resolution(report, report.half_set_fsc)}
    figures = {
        name: _resolution(report, processed.fsc_true),
        "Resolution without a mask": _resolution(report, processed.fsc_unmasked),
    }
    if processed.b_factor_in_square_angstroms is not None:
        figures["B factor"] = f"{processed.b_factor_in_square_angstroms:.1f} Å²"
    return figures


def _resolution(report: Report, curve: Float[np.ndarray, " shells"]) -> str:
    size = report.pixel_size_in_angstroms
    return resolution(curve, len(report.volume), size).text("Å")


def _resolution_pictures(report: Report) -> Iterator[Element]:
    if report.postprocessed is not None:
        yield _processed_curves(report, report.postprocessed)
    elif report.half_set_fsc is not None:
        yield _figure(
            "Fourier shell correlation of the unmasked, unregularised maps of the two "
            "half sets, which were refined independently.",
            "Curve of the Fourier shell correlation of the half maps against the "
            f"Fourier shell. Resolution at {HALF_MAP_THRESHOLD}: "
            f"{_resolution(report, report.half_set_fsc)}.",
            plots.fsc_curves,
            {"half maps": report.half_set_fsc},
            len(report.volume),
            report.pixel_size_in_angstroms,
            "",
        )
    elif report.fold_fsc is not None:
        yield _figure(
            "Fourier shell correlation of the unmasked maps of the two folds in the "
            "last iteration that was kept. The poses of each fold were refined against "
            "the map of the other, so this is no resolution: where noise is strong it "
            "may rise while the map gets worse. Refine with --half-sets for a "
            "resolution.",
            "Curve of the Fourier shell correlation of the folds against the Fourier "
            "shell.",
            plots.fsc_curves,
            {"folds": report.fold_fsc},
            len(report.volume),
            report.pixel_size_in_angstroms,
            "",
        )


def _processed_curves(report: Report, result: Postprocessed) -> Element:
    """Return the curves of the half maps, and say which is which."""
    n, size = len(report.volume), report.pixel_size_in_angstroms
    randomised = "None have random phases, as the unmasked curve stays above 0.8."
    if result.randomised_from <= n // 2:
        period = report.box_in_angstroms / result.randomised_from
        randomised = (
            f"Phases randomised: of the masked maps with random phases from "
            f"{period:.3g} Å on, which agree there by the mask alone."
        )
    return _figure(
        "Fourier shell correlations of the unregularised maps of the two half sets, "
        "which were refined independently. Unmasked: of these maps as they are. "
        f"Masked: within {report.mask}. {randomised} Corrected: the masked curve "
        "without what the mask adds (Chen et al., 2013); where it falls below "
        f"{HALF_MAP_THRESHOLD} is the resolution.",
        "Curves of the Fourier shell correlation of the half maps against the Fourier "
        "shell: corrected, masked, with randomised phases, and unmasked. Resolution at "
        f"{HALF_MAP_THRESHOLD}: {_resolution(report, result.fsc_true)}, without a mask "
        f"{_resolution(report, result.fsc_unmasked)}.",
        plots.fsc_curves,
        plots.half_map_curves(result),
        n,
        size,
        "",
    )


def _map_pictures(report: Report) -> Iterator[Element]:
    volumes, result = {"refined": report.volume}, report.postprocessed
    told = "Surface of the refined map"
    if result is not None:
        sharpened = result.b_factor_in_square_angstroms is not None
        name = "sharpened" if sharpened else "filtered"
        volumes[name] = np.asarray(result.masked_volume)
        told = (
            "Surfaces of the refined map, which is regularised, and of the mean of the "
            f"half maps, {name} and masked, around as many voxels, or around fewer if "
            "these are most of its positive ones"
        )
    shown = {name: each for name, each in volumes.items() if _has_surface(each)}
    without = "".join(
        f" The {name} map is constant or nowhere positive, and has no surface."
        for name in volumes.keys() - shown.keys()
    )
    if shown:
        yield _figure(
            f"{told}, from three sides. Specks apart from the particle are left out."
            f"{without}",
            f"{told}, as seen along y, x and z.",
            plots.surfaces,
            shown,
            "",
        )
    else:
        yield _element("p", without.strip())
    volumes["initial"] = report.initial_map
    for name, volume in volumes.items():
        yield _figure(
            f"Central slices of the {name} map, with its own grey scale.",
            f"Central xy, xz and yz slices of the {name} map.",
            plots.orthogonal_slices,
            {name: volume},
            "",
        )


def _has_surface(volume: Float[np.ndarray, "n n n"]) -> bool:
    return bool(np.ptp(volume) > 0 and volume.max() > 0)


def _pose_pictures(report: Report) -> Iterator[Element]:
    determined = report.determined
    if not determined.any():
        return
    yield _figure(
        f"Distribution of the viewing directions of {determined.sum()} particles, on "
        "an equal-area map of the sphere (Mollweide's). All cells have the same solid "
        "angle.",
        f"Map of the viewing directions (rot, tilt) of {determined.sum()} particles: "
        "their density relative to a uniform distribution.",
        plots.view_directions,
        np.asarray(report.poses.rotations)[determined, 2],
        "",
    )
    for values, quantity, unit in (
        (report.angle_change_in_degrees, "change of orientation", "degrees"),
        (report.shift_change_in_pixels, "change of shift", "pixels"),
        (report.angle_std_in_degrees, "standard error of orientation", "degrees"),
        (report.shift_std_in_pixels, "standard error of shift", "pixels"),
    ):
        if values is not None:
            finite = determined & np.isfinite(values)
            if finite.any():
                yield _histogram(np.asarray(values)[finite], quantity, unit)


def _histogram(
    values: Float[np.ndarray, " particles"], quantity: str, unit: str
) -> Element:
    return _figure(
        f"{quantity.capitalize()}, {len(values)} particles.",
        f"Histogram of the {quantity}: median {np.median(values):.3g} {unit}, "
        f"90th percentile {np.percentile(values, 90):.3g} {unit}.",
        plots.error_histograms,
        {"particles": values},
        f"{quantity} ({unit})",
        "",
        float(f"{np.percentile(values, 99):.2g}"),
    )


def _band_pictures(report: Report) -> Iterator[Element]:
    kept = (row for row in report.rows if row.get("is_kept", True))
    rows = [row for row in kept if "r_max" in row]
    if rows:
        yield _figure(
            "Band limits of the poses and of the search. Iterations without a search "
            "have no limit for it.",
            "Steps of the band limits over the outer iterations, from "
            f"{rows[0]['r_max']} to {rows[-1]['r_max']} {_CYCLES}.",
            _draw_bands,
            rows,
            report.box_in_angstroms,
        )


def _iteration_table(rows: Sequence[Row]) -> list[Element]:
    """Return a table of the columns that have values, which scrolls horizontally."""
    names = dict.fromkeys(name for row in rows for name in row)
    names = [name for name in names if any(row.get(name) is not None for row in rows)]
    if not names:
        return []
    titles = [_HEADINGS.get(name, name) for name in names]
    head = _element("tr", [_element("th", title, scope="col") for title in titles])
    body = [
        _element("tr", [_element("td", _text(row.get(name))) for name in names])
        for row in rows
    ]
    table = _element("table", [_element("thead", [head]), _element("tbody", body)])
    label = {"role": "region", "tabindex": "0", "aria-label": "Outer iterations"}
    return [_element("div", [table], **label)]


def _pairs(texts: Mapping[str, str]) -> list[Element]:
    """Return a table of names and values, or nothing if there are none."""
    rows = [
        _element("tr", [_element("th", name, scope="row"), _element("td", text)])
        for name, text in texts.items()
    ]
    return [_element("table", [_element("tbody", rows)])] if rows else []


def _text(value: Any) -> str:
    """Format a number, a list of numbers, None or any other value for a table."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return str(value)


def _draw_bands(path: Path, rows: Sequence[Row], box_in_angstroms: float) -> None:
    """Draw the band limits as steps, with their periods on the right."""
    figure = Figure(_INCHES, dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    edges = [rows[0]["iteration"] - 0.5, *(row["iteration"] + 0.5 for row in rows)]
    for name, label, colour, dash in (
        ("r_max", "poses", "#0072B2", "-"),
        ("search_r_max", "search", "#D55E00", "--"),
    ):
        limits = np.array([row[name] or np.nan for row in rows], float)
        axes.stairs(
            limits, edges, baseline=None, color=colour, ls=dash, lw=2, label=label
        )
    axes.set(xlabel="outer iteration", ylabel=f"band limit ({_CYCLES})")
    axes.set_ylim(bottom=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    shells = [shell for shell in axes.get_yticks() if shell > 0]
    right = axes.secondary_yaxis("right")
    right.set_yticks(shells, [f"{box_in_angstroms / shell:.3g}" for shell in shells])
    right.set_ylabel("period (Å)")
    axes.legend()
    plots.save(figure, path)


def _figure(
    caption: str, description: str, draw: Callable[..., None], *arguments: Any
) -> Element:
    """Return the picture that ``draw(path, *arguments)`` writes, with its caption."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        draw(path, *arguments)
        data = base64.b64encode(path.read_bytes()).decode()
    image = _element("img", src=f"data:image/png;base64,{data}", alt=description)
    return _element("figure", [image, _element("figcaption", caption)])


def _grid(pictures: Iterable[Element]) -> list[Element]:
    """Return pictures side by side, or nothing if there are none."""
    elements = list(pictures)
    return [_element("div", elements)] if elements else []


def _element(
    tag: str, children: str | Iterable[Element] = (), /, **attributes: str
) -> Element:
    """Return an element that holds text or other elements."""
    element = Element(tag, attributes)
    if isinstance(children, str):
        element.text = children
    else:
        element.extend(list(children))
    return element
