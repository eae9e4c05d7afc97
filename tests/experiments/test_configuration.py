"""Settings are read from files, presets and ``--set`` as they are declared."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from jaxrefine.errors import InputError
from jaxrefine.io import write_mrc
from jaxrefine.runs.options import declared

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
STUDIES = {
    "hjc_init1": ("init1", "Init1Settings"),
    "hjc_released": ("init1", "Init1Settings"),
    "ptch1_init1": ("init1", "Init1Settings"),
    "hjc_init2": ("init2", "Init2Settings"),
    "sweeps": ("sweeps", "SweepSettings"),
    "ablation": ("ablation", "AblationSettings"),
    "constants": ("constants", "ConstantsSettings"),
    "cost": ("cost", "CostSettings"),
}


@pytest.fixture
def read(load):
    """Read the settings of a file of ``configs``."""

    def read(*overrides, config="hjc_init1", preset="smoke", volume=None, file=None):
        module, name = STUDIES[config]
        return load("configuration").read(
            getattr(load(module), name),
            file or Path(f"configs/{config}.toml"),
            preset,
            overrides,
            volume,
        )

    return read


def test_every_file_has_a_study():
    assert set(STUDIES) == {path.stem for path in EXPERIMENTS.glob("configs/*.toml")}


@pytest.mark.parametrize("config", STUDIES)
def test_every_preset_of_every_file_is_complete(read, config):
    text = (EXPERIMENTS / f"configs/{config}.toml").read_text()
    for preset, entries in tomllib.loads(text)["preset"].items():
        settings = read(config=config, preset=preset)
        for name, value in entries.items():
            kept = getattr(settings, name)
            assert kept == (tuple(value) if isinstance(value, list) else value)


def test_every_option_is_described(load):
    for module, name in STUDIES.values():
        for option in declared(getattr(load(module), name)):
            assert option.help and not option.help.endswith(".")
            # The texts that TOML files hold are titles and names of choices.
            assert option.kind is not str or option.choices or option.name == "title"


def test_a_map_brings_its_size(read, tmp_path):
    path = tmp_path / "map.mrc"
    write_mrc(path, np.ones((18, 18, 18)), 1.0)
    settings = read(volume=path)
    assert (settings.size, settings.map_name, settings.title) == (
        18,
        "map.mrc",
        "HJC, Init-1",
    )
    phantom = read()
    assert (phantom.size, phantom.title) == (16, "HJC, Init-1 (phantom)")
    assert "stand-in" in phantom.map_name


def test_a_map_of_other_voxels_must_be_accepted(read, tmp_path):
    """1 A is what programs write that do not know; the preset knows."""
    path, key = tmp_path / "map.mrc", "voxel_size_in_angstroms"
    own = read().voxel_size_in_angstroms
    for voxel in (1.0, 1.005 * own):
        write_mrc(path, np.ones((18, 18, 18)), voxel)
        assert read(volume=path).voxel_size_in_angstroms == own
    write_mrc(path, np.ones((18, 18, 18)), 2.5)
    with pytest.raises(InputError, match=rf"voxels of {own:g} A, got 2.5 A"):
        read(volume=path)
    assert read(f"{key}=2.5", volume=path).voxel_size_in_angstroms == 2.5


def test_values_have_the_declared_types(read):
    words = ["snr_db=1", "particles=7", "title='x'", "methods=['matching', 'paper']"]
    settings = read(*words)
    assert settings.methods == ("matching", "paper")
    assert isinstance(settings.snr_db, float) and isinstance(settings.particles, int)
    assert settings.title == "x (phantom)"


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("nonsense=1", "--set must name one of title, seed, particles"),
        ("volume='map.mrc'", "--set must name one of"),
        ("particles=many", "must be given KEY=VALUE in TOML, got particles=many"),
        ("particles=6.5", "particles must be a whole number, got 6.5"),
        ("particles=true", "particles must be a whole number, got True"),
        ("particles=0", "particles must be at least 1, got 0"),
        ("snr_db='0.1'", "snr_db must be a number, got '0.1'"),
        ("methods='paper'", "methods must be a list, got 'paper'"),
        ("seed=-1", "seed must be from 0 to 2147483646, got -1"),
        ("seed=9223372036854775808", "got 9223372036854775808"),
        ("matching_rounds=0", "matching_rounds must be at least 1, got 0"),
        ("voxel_size_in_angstroms=0.0", "must be more than 0 angstroms, got 0"),
        ("voxel_size_in_angstroms=nan", "must be a finite number of angstroms"),
        ("matching_step_in_degrees=inf", "must be a finite number of degrees, got inf"),
        ("initial_blur=nan", "initial_blur must be a finite number of voxels"),
        ("methods=['engine', 'magic']", "methods must be one of engine, paper"),
    ],
)
def test_a_value_that_no_study_can_work_with_is_refused(read, word, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        read(word)


@pytest.mark.parametrize(
    ("config", "word", "sentence"),
    [
        ("hjc_init2", "ab_initio_iterations=[1, 2]", "a list of 3 numbers, got [1, 2]"),
        ("hjc_init2", "ab_initio_resolutions=[35.0]", "a list of 2 numbers"),
        ("sweeps", "snr_db_values=[]", "snr_db_values must not be empty"),
        ("sweeps", "snr_db_values=5.0", "snr_db_values must be a list, got 5.0"),
        ("sweeps", "snr_db_values=['1']", "snr_db_values must be a number, got '1'"),
        ("sweeps", "snr_db_values=[1.0, inf]", "must be a finite number"),
        ("hjc_init2", "ab_initio_resolutions=[0.0, 1.0]", "more than 0"),
        ("sweeps", "axis='noise'", "axis must be one of snr_db, particles, max_angle"),
        ("sweeps", "particles_values=[0]", "particles_values must be at least 1"),
        ("cost", "sizes=[16]", "at least 2 different sizes, got [16]"),
        ("cost", "sizes=[16, 8]", "sizes must be at least 16 pixels, got 8"),
        ("cost", "repetitions=0", "repetitions must be at least 1, got 0"),
    ],
)
def test_a_value_that_one_study_cannot_work_with_is_refused(
    read, config, word, sentence
):
    with pytest.raises(InputError, match=re.escape(sentence)):
        read(word, config=config)


def test_a_file_that_cannot_be_read_is_refused(read, tmp_path):
    with pytest.raises(InputError, match="absent.toml does not exist, here or in"):
        read(file=Path("absent.toml"))
    with pytest.raises(InputError, match="Cannot read .*: Is a directory"):
        read(file=tmp_path)
    with pytest.raises(InputError, match="--preset must be one of smoke, small"):
        read(preset="large")
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xff\xfe = 1")
    with pytest.raises(InputError, match="is not a TOML file"):
        read(file=path)
    text = (EXPERIMENTS / "configs/hjc_init1.toml").read_text()
    path.write_text(re.sub("^(seed|snr_db) = .*\n", "", text, flags=re.MULTILINE))
    with pytest.raises(InputError, match="lacks seed"):
        read(file=path)
    path.write_text(f"sed = 1\n{text}")
    with pytest.raises(InputError, match=r"config.toml must be one of .*, got sed"):
        read(file=path)
