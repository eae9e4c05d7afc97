"""The report of a refinement: a page that is whole, safe, and says what it was told."""

import base64
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from xml.etree.ElementTree import tostring

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from jaxrefine.errors import InputError
from jaxrefine.euler import euler_to_matrix
from jaxrefine.geometry import Poses
from jaxrefine.maps.fsc import Resolution
from jaxrefine.maps.postprocess import Postprocessed
from jaxrefine.report import html

COUNT, N, PIXEL = 200, 64, 2.5
EVIL = """<script>alert("a & b")</script> 'x'.star"""
VOID = {"meta", "img", "br", "link", "input", "hr"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), "")


class Page(HTMLParser):
    """The tags of a page, which must be balanced, and the text in some of them."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def all(self, tag):
        return [text for inside, text in self.texts if inside == tag]

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def figures(self):
        return dict(zip(self.all("dt"), self.all("dd"), strict=True))


def published(rng):
    """What the presets paper and released have: no error bars, other rows."""
    angles = jnp.asarray(rng.uniform(-3, 3, size=(COUNT, 3)))
    shifts = rng.normal(size=(COUNT, 2))
    radius = np.linalg.norm(np.mgrid[-N // 2 : N // 2, -N // 2 : N // 2], axis=0)
    volume = np.exp(-(radius**2) / 50) * np.ones((N, 1, 1))
    return html.Report(
        title=f"Refinement of {EVIL}",
        command=f"jaxrefine refine '{EVIL}'",
        pixel_size_in_angstroms=PIXEL,
        poses=Poses(euler_to_matrix(angles), shifts),
        angle_change_in_degrees=np.full(COUNT, 14.3),
        shift_change_in_pixels=np.full(COUNT, 4.24),
        initial_map=1e-3 * volume,
        volume=volume + 0.1 * rng.normal(size=(N, N, N)),
        rows=[{"iteration": i, "objective": 10.0 / i, "new": None} for i in (1, 2)],
        settings={"--iterations": "2", "--regulariser": EVIL},
        versions={"jaxrefine": "1.2.3"},
        device="cpu, <one>",
        wall_s=3725.4,
    )


def row(iteration, r_max, search_r_max, gold):
    return {
        "iteration": iteration,
        "r_max": r_max,
        "search_r_max": search_r_max,
        "evaluations": 2.123456,
        "angle_change_in_degrees": 3.14159,
        "tau": [1.0, None],
        "gold_score": gold,
    }


def default(rng):
    """What the default engine has, with half sets."""
    lost = np.arange(COUNT) >= COUNT - 50
    return replace(
        published(rng),
        rows=[row(1, 7, 7, None), row(2, 11, 11, 0.75), row(3, 20, 0, 0.8)],
        settings={"--max-angle": "30 degrees", "--tau": "chosen"},
        peak_rss_mib=1448.2,
        peak_device_mib=99.9,
        half_set_fsc=np.linspace(1, 0, N // 2 + 1),
        angle_std_in_degrees=rng.rayleigh(1, COUNT),
        shift_std_in_pixels=np.where(lost, 9.0, 1.0),
        undetermined=lost,
    )


def processed(rng):
    """What half maps have that could be sharpened."""
    report = default(rng)
    volume, curve = jnp.asarray(report.volume), np.linspace(1, 0, N // 2 + 1)
    result = Postprocessed(
        volume=volume,
        masked_volume=volume,
        mask=jnp.ones_like(volume),
        fsc_unmasked=curve**2,
        fsc_masked=curve**0.9,
        fsc_randomised=curve**4,
        fsc_true=curve,
        randomised_from=5,
        resolution=Resolution(9.0, False, False),
        b_factor_in_square_angstroms=-87.0,
        not_sharpened_because=None,
    )
    return replace(report, postprocessed=result, mask="the given mask, moved")


@pytest.fixture(scope="module")
def reports():
    kinds = (published, default, processed)
    return {kind.__name__: kind(np.random.default_rng(0)) for kind in kinds}


@pytest.fixture(scope="module")
def files(reports, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    for name, one in reports.items():
        html.write(folder / f"{name}.html", one)
    assert len(list(folder.iterdir())) == 3
    return {name: folder / f"{name}.html" for name in reports}


@pytest.fixture(scope="module")
def pages(files):
    return {name: Page(path.read_text("utf-8")) for name, path in files.items()}


@pytest.mark.parametrize("name", ["published", "default", "processed"])
def test_the_page_needs_nothing_else_and_is_small(name, files, pages):
    text = files[name].read_text("utf-8")
    assert files[name].stat().st_size < 2e6
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|url\(|@import|<script|<link", text)
    assert re.search(r'<meta name="viewport" content="width=device-width.*"', text)
    for image in pages[name].attributes("img"):
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(data)))
        assert min(pixels.shape[:2]) > 200
        assert np.mean(pixels[..., :3].min(axis=-1) < 0.9) > 0.01
        assert len(image["alt"]) > 20


@pytest.mark.parametrize("name", ["published", "default"])
def test_names_stay_text(name, reports, files, pages):
    page = pages[name]
    assert page.all("title") == page.all("h1") == [f"Refinement of {EVIL}"]
    assert page.all("code") == [reports[name].command]
    assert EVIL not in files[name].read_text("utf-8")


def test_sections_are_there_or_left_out_as_the_data_say(pages):
    always = ["Result", "Map", "Poses", "Iterations", "Settings", "Command"]
    always.append("Software and device")
    assert pages["published"].all("h2") == always
    for name in ("default", "processed"):
        assert pages[name].all("h2") == [always[0], "Resolution", *always[1:]]
    pictures = {name: len(page.attributes("img")) for name, page in pages.items()}
    # Slices of two maps, a surface, views, two changes; with two error bars, the curve
    # and the bands; with slices of the sharpened map.
    assert pictures == {"published": 6, "default": 10, "processed": 11}
    for page in pages.values():
        assert len(page.all("figcaption")) == len(page.attributes("img"))


def test_headline_figures(pages):
    figures = pages["published"].figures()
    assert figures == {
        "Particles": f"{COUNT}",
        "Box": "64 px, 160 Å",
        "Pixel size": "2.5 Å",
        "Resolution, FSC 0.143": "not measured (no half sets)",
        "Outer iterations": "2",
        "Wall time (h:min:s)": "1:02:05",
    }
    # The line from 1 to 0 over 32 shells is at 0.143 at the shell 32 (1 - 0.143).
    expected = f"{160 / (32 * 0.857):.2f} Å"
    assert pages["default"].figures() == figures | {
        "Resolution, FSC 0.143": expected,
        "Outer iterations": "3",
        "Undetermined particles": "50 (25 %)",
        "Peak memory": "1448 MiB",
        "Peak memory, device": "100 MiB",
    }
    assert any(expected in image["alt"] for image in pages["default"].attributes("img"))


def test_the_resolution_is_that_with_the_mask_and_each_curve_is_named(pages):
    """The line from 1 to 0 is the corrected curve, and its square the unmasked one."""
    figures, page = pages["processed"].figures(), pages["processed"]
    corrected = 160 / (32 * (1 - 0.143))
    assert figures["Resolution, FSC 0.143"] == f"{corrected:.2f} Å"
    before, after = (13 / 32) ** 2, (12 / 32) ** 2  # at the shells 19 and 20
    unmasked = 160 / (19 + (before - 0.143) / (before - after))
    assert figures["Resolution without a mask"] == f"{unmasked:.2f} Å"
    assert figures["B factor"] == "-87.0 Å²"
    (caption,) = (text for text in page.all("figcaption") if "Chen et al." in text)
    for words in (
        "Unmasked: of these maps as they are.",
        "Masked: within the given mask, moved.",
        "random phases from 32 Å on",
        "Corrected: the masked curve without what the mask adds",
    ):
        assert words in caption
    assert any(
        f"Resolution at 0.143: {corrected:.2f} Å, without a mask" in image["alt"]
        for image in page.attributes("img")
    )
    assert any("sharpened and masked" in text for text in page.all("figcaption"))


def test_the_correlation_of_folds_is_called_what_it_is(reports, tmp_path):
    """Nothing but the line that none was measured is called a resolution."""
    folds = np.linspace(1, 0, N // 2 + 1)
    report = replace(reports["default"], half_set_fsc=None, fold_fsc=folds)
    html.write(tmp_path / "report.html", report)
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "Correlation of the folds" in page.all("h2")
    assert page.figures()["Resolution, FSC 0.143"] == "not measured (no half sets)"
    told = [text for text in page.all("figcaption") if "resolution" in text.lower()]
    (caption,) = told
    assert "this is no resolution" in caption
    assert "Refine with --half-sets for a resolution." in caption
    assert not any("resolution" in i["alt"].lower() for i in page.attributes("img"))


def test_pose_changes_are_those_of_the_poses(pages):
    """Every particle was turned by 0.25 rad about the beam and moved by 3 (1, 1)."""
    for page in pages.values():
        (turn,) = (
            i["alt"]
            for i in page.attributes("img")
            if "change of orientation" in i["alt"]
        )
        (move,) = (
            i["alt"] for i in page.attributes("img") if "change of shift" in i["alt"]
        )
        assert f"median {np.rad2deg(0.25):.3g} degrees" in turn
        assert f"median {3 * 2**0.5:.3g} pixels" in move


def test_the_band_limits_are_those_of_iterations_that_were_kept(reports):
    kept = [row(1, 7, 7, 0.7) | {"is_kept": True}, row(2, 11, 0, 0.8)]
    discarded = row(3, 20, 0, 0.75) | {"is_kept": False}
    pictures = [
        tostring(picture)
        for rows in (kept, [*kept, discarded])
        for picture in html._band_pictures(replace(reports["default"], rows=rows))
    ]
    assert pictures[0] == pictures[1] and b"from 7 to 11 cycles" in pictures[0]


def test_undetermined_particles_are_left_out_of_the_pictures(pages):
    for name, count in (("published", COUNT), ("default", COUNT - 50)):
        captions = pages[name].all("figcaption")
        shown = sum(f"{count} particles" in caption for caption in captions)
        assert shown == {"published": 3, "default": 5}[name]
    texts = [image["alt"] for image in pages["default"].attributes("img")]
    bars = "standard error of shift: median 1 pixels, 90th percentile 1 pixels."
    assert sum(bars in text for text in texts) == 1


def test_tables(pages):
    page = pages["default"]
    heads, cells = page.all("th"), page.all("td")
    names = "iteration|band limit (cycles per box)|band limit of the search (cycles "
    names += "per box)|evaluations of the likelihood for a particle|"
    names += "median rotation (degrees)|regularisation weight tau of each set|"
    names += "mean FSC of the half sets' regularised maps"
    assert heads[:7] == names.split("|")
    assert cells[:7] == ["1", "7", "7", "2.123", "3.142", "1, –", "–"]
    assert cells[14:21] == ["3", "20", "0", "2.123", "3.142", "1, –", "0.8"]
    assert heads[7:] == ["--max-angle", "--tau", "jaxrefine", "device"]
    assert cells[21:] == ["30 degrees", "chosen", "1.2.3", "cpu, <one>"]
    page = pages["published"]
    assert page.all("th")[:3] == ["iteration", "objective", "--iterations"]
    assert page.all("td")[:5] == ["1", "10", "2", "5", "2"]


def test_a_report_without_poses_and_with_an_odd_name(reports, tmp_path):
    """No particle is determined, nothing was iterated, and the name is not text."""
    odd = replace(
        reports["default"],
        title="\udcff.star",
        undetermined=np.ones(COUNT, bool),
        half_set_fsc=None,
        rows=[],
    )
    with pytest.raises(InputError, match="cannot write"):
        html.write(tmp_path / "no" / "report.html", odd)
    html.write(tmp_path / "report.html", odd)
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert page.all("h2") == [
        "Result",
        "Map",
        "Settings",
        "Command",
        "Software and device",
    ]
    assert page.all("h1") == ["?.star"]
    assert page.figures()["Undetermined particles"] == f"{COUNT} (100 %)"


@pytest.mark.skipif(not BROWSER, reason="no Chromium to show the page in")
def test_a_browser_shows_it_on_a_phone_without_scrolling_sideways(files, tmp_path):
    frames = "".join(
        f'<iframe width="{width}" height="800" srcdoc="{escape(path.read_text())}">'
        "</iframe>"
        for path in files.values()
        for width in (360, 1200)
    )
    measure = """<script>onload = () => document.body.replaceChildren(JSON.stringify(
      [...document.querySelectorAll("iframe")].map(frame => {
        const page = frame.contentDocument, root = page.documentElement;
        return [root.scrollWidth - root.clientWidth,
                [...page.images].every(i => i.complete && i.naturalWidth > 200)];
      })))</script>"""
    path = tmp_path / "frames.html"
    path.write_text(f"<!DOCTYPE html><meta charset='utf-8'><body>{frames}{measure}")
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    arguments += [f"--user-data-dir={tmp_path / 'browser'}", path.as_uri()]
    shown = subprocess.run(
        [BROWSER, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    (found,) = re.findall(r"<body>(\[\[.*\]\])", shown.stdout)
    assert json.loads(found) == [[0, True]] * 6


def test_what_was_not_done_is_said(reports, tmp_path):
    """In the words of the command, and of a map without a surface."""
    report = reports["processed"]
    result = report.postprocessed
    nothing = replace(result, masked_volume=-jnp.abs(result.masked_volume))
    remark = "the origin was not moved: it must stay"
    changed = replace(report, postprocessed=nothing, remarks=[remark])
    for name, one in (("before", report), ("after", changed)):
        html.write(tmp_path / name, one)
    before, after = (Page((tmp_path / x).read_text()) for x in ("before", "after"))
    assert remark in after.all("p") and remark not in before.all("p")
    said = "The sharpened map is constant or nowhere positive, and has no surface."
    told = ["".join(page.all("figcaption")) for page in (before, after)]
    assert [said in each for each in told] == [False, True]
    assert all("within the given mask, moved." in each for each in told)


def test_maps_without_a_surface_are_no_picture(reports, tmp_path):
    report = reports["published"]
    html.write(tmp_path / "a.html", replace(report, volume=-np.abs(report.volume)))
    page = Page((tmp_path / "a.html").read_text())
    assert len(page.attributes("img")) == 5
    said = "The refined map is constant or nowhere positive, and has no surface."
    assert said in page.all("p")
