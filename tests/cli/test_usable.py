"""Images and maps that spoil a refinement are named, before it begins."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrefine import cli, refinement, simulate
from jaxrefine.cli import match, reconstruct, refine
from jaxrefine.cli._usable import Findings
from jaxrefine.cli.commands.match import MATCH
from jaxrefine.cli.commands.reconstruct import RECONSTRUCT
from jaxrefine.cli.commands.refine import REFINE
from jaxrefine.cli.engine import Engine
from jaxrefine.data.particles import Particles
from jaxrefine.io import read_mrc, read_particles, write_mrc
from jaxrefine.maps.fsc import fsc, mean_fsc

N, COUNT = 24, 60
BAD = np.array([6, 20, 41])


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """A data set in which nothing is wrong."""
    folder = tmp_path_factory.mktemp("sound")
    write_mrc(folder / "map.mrc", simulate.phantom(jax.random.key(0), N), 4.0)
    words = ["simulate", folder / "map.mrc", "--out", folder / "data"]
    words += ["--particles", COUNT, "--snr-db", 0, "--initial-blur", 2]
    assert cli.main([str(word) for word in words]) == 0
    return folder / "data"


class Set:
    """A copy of the data set that can be spoilt, and commands on it."""

    def __init__(self, sound, folder, run):
        self.folder, self._run = folder, run
        for path in sound.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        self.calls = []
        engine = Engine(self._stop, self._stop, self._stop)
        self._commands = [
            replace(REFINE, run=partial(refine.run, engine=engine)),
            replace(RECONSTRUCT, run=partial(reconstruct.run, engine=engine)),
            replace(MATCH, run=partial(match.run, match=self._stop)),
        ]

    def _stop(self, *arguments, **_):
        self.calls.append(arguments)
        raise KeyboardInterrupt

    def __call__(self, name, *options):
        words = [name, self.folder / "particles.star", "--out", self.folder / "out"]
        words += [] if name == "reconstruct" else ["--map", self.folder / "init.mrc"]
        return self._run(*words, *options, commands=self._commands)

    @property
    def images(self):
        source = read_particles(self.folder / "particles.star")
        return np.array(source.particles.batch(np.arange(len(source)))[0])

    @images.setter
    def images(self, values):
        path = self.folder / "particles.mrcs"
        content = path.read_bytes()[:1024] + np.asarray(values, np.float32).tobytes()
        path.write_bytes(content)

    @property
    def volume(self):
        return read_mrc(self.folder / "init.mrc")[0]

    @volume.setter
    def volume(self, values):
        write_mrc(self.folder / "init.mrc", np.asarray(values, np.float32), 4.0)

    def assert_goes_on(self, result):
        """It comes to the engine, with all images as they are."""
        assert result.code == 130, result.err
        given = self.calls[-1][0].batch(np.arange(COUNT))[0]
        np.testing.assert_array_equal(given, self.images)

    def assert_refused(self, result, *words):
        result.assert_refused(*words)
        assert not self.calls and not (self.folder / "out").exists()


@pytest.fixture
def data(sound, tmp_path, run):
    return Set(sound, tmp_path, run)


@pytest.mark.parametrize("name", ["refine", "reconstruct", "match"])
def test_sound_images_are_used_as_they_are(data, name):
    result = data(name)
    data.assert_goes_on(result)
    assert "unlike" not in result.err and "hot" not in result.err


@pytest.mark.parametrize("name", ["refine", "reconstruct", "match"])
def test_images_that_are_unlike_the_others_are_left_out(data, name):
    images = data.images
    images[BAD] *= 5
    data.images = images
    result = data(name)
    words = "3 of 60 images are unlike the others: number 7 has too strong a background"
    assert result.code == 130 and words in result.err
    assert "42 has" in result.err and "these particles are left out" in result.err
    others = np.setdiff1d(np.arange(COUNT), BAD)
    given = data.calls[-1][0]
    assert len(given) == len(others)
    np.testing.assert_array_equal(given.batch(np.arange(57))[0], images[others])
    data.assert_goes_on(data(name, "--trust-contrast", "--out", data.folder / "other"))


@pytest.mark.parametrize("name", ["refine", "reconstruct", "match"])
@pytest.mark.parametrize("options", [[], ["--normalise"]])
def test_hot_pixels_are_replaced(data, name, options):
    images = data.images
    images[BAD, 3, 4] = 1e6
    data.images = images
    result = data(name, *options)
    words = "3 of 60 images have hot pixels, the first number 7; they are replaced"
    assert result.code == 130 and words in result.err and "left out" not in result.err
    given = np.asarray(data.calls[-1][0].batch(np.arange(COUNT))[0])
    assert np.abs(given).max() < 20
    if not options:
        images[BAD, 3, 4] = given[BAD, 3, 4]
        np.testing.assert_array_equal(given, images)


NOT_NORMALISED = {
    "mean": (lambda x: x + 10 * x.std(), "a mean of 9"),
    "deviation": (
        lambda x: x * np.exp(np.linspace(-1.5, 1.5, COUNT))[:, None, None],
        "is less than half or more than twice",
    ),
}


@pytest.mark.parametrize("name", ["refine", "reconstruct", "match"])
@pytest.mark.parametrize("kind", NOT_NORMALISED)
def test_images_that_are_not_normalised_are_refused(data, name, kind):
    spoil, words = NOT_NORMALISED[kind]
    data.images = spoil(data.images)
    expected = "images must be normalised, but", words, ": --normalise, or --trust"
    data.assert_refused(data(name), *expected)
    assert data(name, "--normalise", "--out", data.folder / "normal").code == 130
    data.assert_goes_on(data(name, "--trust-contrast", "--out", data.folder / "any"))


@pytest.mark.parametrize("name", ["refine", "reconstruct", "match"])
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_images_of_any_scale_are_refused_or_normalised(data, name, scale):
    data.images = data.images * scale
    for options in ([], ["--trust-contrast"]):
        words = "must have a standard deviation from 1e-09 to 1e+09, got", "--normalise"
        data.assert_refused(data(name, *options), *words)
    assert data(name, "--normalise").code == 130
    given = np.asarray(data.calls[-1][0].batch(np.arange(COUNT))[0])
    assert 0.5 < given.std() < 2


@pytest.mark.parametrize("name", ["refine", "match"])
def test_dark_protein_is_refused(data, name):
    data.images = -data.images
    words = "particles.star seems to have dark protein (correlation -0."
    data.assert_refused(data(name), words, "over 60 particles): --invert, or --tr")
    result = data(name, "--invert")
    assert result.code == 130, result.err
    data.assert_goes_on(data(name, "--trust-contrast", "--out", data.folder / "o"))


@pytest.mark.parametrize("name", ["refine", "match"])
def test_bright_protein_is_not_to_be_inverted(data, name):
    words = "before --invert (correlation -0.", ": leave out --invert, or --trust-"
    data.assert_refused(data(name, "--invert"), *words)


IMPLAUSIBLE = {
    "constant": (lambda v: 0 * v + 2, "must not be constant, got 2 everywhere"),
    "raised": (lambda v: v + 1e5, "must have a solvent near 0, got one of 100000"),
    "hot": (lambda v: np.where(v == v.max(), 1e4, v), "hot voxels of up to 10000"),
    "noise": (
        lambda v: np.random.default_rng(0).normal(size=v.shape),
        "whose corners are as strong, as of noise",
    ),
}


@pytest.mark.parametrize("name", ["refine", "match"])
@pytest.mark.parametrize("kind", IMPLAUSIBLE)
def test_maps_that_no_refinement_can_start_from_are_refused(data, name, kind):
    spoil, words = IMPLAUSIBLE[kind]
    data.volume = spoil(data.volume)
    data.assert_refused(data(name), "init.mrc must ", words)
    trusted = data(name, "--trust-contrast")
    assert trusted.code == (2 if kind == "constant" else 130)


@pytest.mark.parametrize("name", ["refine", "match"])
def test_a_negative_map_is_refused(data, name):
    data.volume = -data.volume
    words = "init.mrc seems to have dark protein, unlike", "multiply it by -1, or --tr"
    data.assert_refused(data(name), *words)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_a_map_of_any_scale_is_the_same_start(data, scale):
    """The state that a refinement starts from."""
    source = read_particles(data.folder / "particles.star")
    states = [
        refinement.init(
            source.particles, source.poses, volume, key=jax.random.key(0)
        ).set_states[0]
        for volume in (jnp.asarray(data.volume), jnp.asarray(data.volume * scale))
    ]
    first, second = (np.asarray(state.maps[0].coefficients) for state in states)
    np.testing.assert_allclose(second, first, rtol=1e-4, atol=1e-5 * first.max())


# --- what a run remembers


def test_a_run_that_carries_on_does_not_look_at_all_images_again(data, monkeypatch):
    images = data.images
    images[BAD[:2]] *= 5
    images[BAD[2], 3, 4] = 1e6
    data.images = images
    looks = []
    unusable = Particles.unusable

    def counted(self, *arguments):
        looks.append(len(self))
        return unusable(self, *arguments)

    monkeypatch.setattr(Particles, "unusable", counted)
    first = data("refine")
    again = data("refine")
    assert looks == [COUNT]
    for result in (first, again):
        assert result.code == 130 and "2 of 60 images are unlike" in result.err
        assert "1 of 60 images have hot pixels" in result.err
    chosen = [call[0].batch(np.arange(58))[0] for call in data.calls]
    np.testing.assert_array_equal(*chosen[-2:])
    # Neither of stacks that may have changed nor of a damaged report it is trusted.
    report = data.folder / "out" / "run.json"
    for damage in ({"stacks_written": "other"}, {"images": {"bad": []}}):
        content = json.loads(report.read_text())
        content["kept"] |= damage
        report.write_text(json.dumps(content))
        assert data("refine").code == 130
    assert looks == [COUNT] * 3


@pytest.mark.parametrize(
    "content",
    [None, [], "x", {}, {"bad": {}, "unlike": {}, "hot": [7], "hot_limit": 1.0}],
)
def test_findings_that_are_not_those_of_the_images_are_not_used(content):
    assert Findings.of_json(content, 7) is None


def test_findings_survive_json():
    found = Findings({1: "a", 5: "b"}, {2: "c"}, [3, 6], np.inf)
    assert Findings.of_json(json.loads(json.dumps(found.as_json())), 7) == found


# --- what it is good for


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.01, 0.05])
def test_a_few_bad_images_do_not_ruin_a_map(sound, tmp_path, share):
    """Of those of every kind, it stays within 0.01 of the mean FSC without them."""
    many = tmp_path / "many"
    words = ["simulate", sound.parent / "map.mrc", "--out", many, "--particles", 400]
    assert cli.main([str(word) for word in [*words, "--snr-db", "-3"]]) == 0
    truth = jnp.asarray(read_mrc(many / "truth.mrc")[0])

    def figure(name):
        out = tmp_path / f"{name}.mrc"
        words = ["reconstruct", many / "truth.star", "--out", out, "--tau", 1]
        assert cli.main([str(word) for word in words]) == 0
        return float(mean_fsc(fsc(jnp.asarray(read_mrc(out)[0]), truth)))

    reference = figure("sound")
    path = many / "particles.mrcs"
    content = path.read_bytes()
    images = np.frombuffer(content[1024:], np.float32).reshape(400, N, N).copy()
    rng = np.random.default_rng(4)
    deviation = images.std()
    for i, place in enumerate(rng.permutation(400)[: int(share * 400)]):
        image = images[place]
        if i % 5 == 0:
            image[rng.integers(N, size=3), rng.integers(N, size=3)] = 1e6, 1e3, -1e4
        elif i % 5 == 1:
            image[:] = np.minimum(10 * image, 5)
        elif i % 5 == 2:
            image[:, : N // 3] = 0
        elif i % 5 == 3:
            image *= 30
        else:
            image[:, N // 2 :] += 5 * deviation * (1 + rng.normal(size=(N, N // 2)))
    path.write_bytes(content[:1024] + images.tobytes())
    assert reference > 0.5
    assert figure("spoilt") == pytest.approx(reference, abs=0.01)
