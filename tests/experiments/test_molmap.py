"""Maps of atomic models: against sums of Gaussians, at every voxel."""

import gzip
import sys

import numpy as np
import pytest

from jaxrefine.errors import InputError
from jaxrefine.io import read_mrc

# Name, element, (x, y, z) in Angstrom, occupancy, atomic number, alternative location.
ATOMS = (
    ("CA", "C", (1.25, -3.5, 10.0), 1.0, 6, " "),
    ("N", "N", (4.5, 2.125, 6.0), 1.0, 7, " "),
    ("P", "P", (-2.0, 5.5, 12.75), 1.0, 15, " "),
    ("OG", "O", (0.0, 0.0, 5.0), 0.75, 8, "A"),
    ("OG", "O", (1.5, 0.5, 5.5), 0.25, 8, "B"),
    ("H", "H", (3.0, 1.0, 9.0), 1.0, 1, " "),
)
CENTRE = np.array([1.25, 1.0, 8.875])
RESOLUTION = 4.0
SIGMA = 0.225 * RESOLUTION


@pytest.fixture
def molmap(load):
    pytest.importorskip("gemmi", reason="gemmi, of the extra experiments, is absent")
    return load("molmap")


@pytest.fixture
def model(tmp_path):
    lines = [
        f"ATOM  {i:5d}  {name:<3s}{place}SER A   1    {x:8.3f}{y:8.3f}{z:8.3f}"
        f"{occupancy:6.2f}{20:6.2f}          {element:>2s}"
        for i, (name, element, (x, y, z), occupancy, _, place) in enumerate(ATOMS, 1)
    ]
    path = tmp_path / "model.pdb"
    path.write_text("\n".join([*lines, "END", ""]))
    return path


def gaussians(n, spacing):
    """Every atom at every voxel, by the formula."""
    axis = (np.arange(n) - n // 2) * spacing
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    total = np.zeros((n, n, n))
    for _, _, place, occupancy, number, _ in ATOMS:
        px, py, pz = np.array(place) - CENTRE
        squared = (x - px) ** 2 + (y - py) ** 2 + (z - pz) ** 2
        total += occupancy * number * np.exp(-squared / 2 / SIGMA**2)
    return total / (2 * np.pi * SIGMA**2) ** 1.5


@pytest.mark.parametrize("spacing", [None, 1.0])
def test_a_map_is_a_sum_of_gaussians(molmap, model, spacing):
    volume, voxel = molmap.molmap(model, RESOLUTION, spacing)
    assert voxel == pytest.approx(spacing or RESOLUTION / 3)
    assert volume.dtype == np.float32
    # The longest edge is 9 A in y; 12 A are added on both sides.
    n = volume.shape[0]
    assert 33 <= n * voxel < 33 + 3 * voxel
    expected = gaussians(n, voxel)
    # Cut at five standard deviations: exp(-12.5), of the six atoms.
    bound = 45 * np.exp(-12.5) / (2 * np.pi * SIGMA**2) ** 1.5
    np.testing.assert_allclose(volume, expected, atol=bound)
    electrons = sum(atom[3] * atom[4] for atom in ATOMS)
    assert volume.sum(dtype=float) * voxel**3 == pytest.approx(electrons, rel=1e-3)
    fine, _ = molmap.molmap(model, RESOLUTION, 0.5)
    assert fine.sum(dtype=float) / 8 == pytest.approx(electrons, rel=1e-5)


@pytest.mark.parametrize("size", [16, 17, 40, 41])
def test_a_box_of_another_size_has_the_same_origin(molmap, model, size):
    volume, voxel = molmap.molmap(model, RESOLUTION, 1.0, size)
    assert volume.shape == (size,) * 3 and voxel == 1.0
    np.testing.assert_allclose(volume, gaussians(size, 1.0), atol=1e-4)


def test_files_of_all_kinds_are_the_same(molmap, model):
    import gemmi

    expected, _ = molmap.molmap(model, RESOLUTION)
    zipped = model.with_suffix(".pdb.gz")
    zipped.write_bytes(gzip.compress(model.read_bytes()))
    cif = model.with_suffix(".cif")
    gemmi.read_structure(str(model)).make_mmcif_document().write_file(str(cif))
    for path in (zipped, cif):
        np.testing.assert_allclose(molmap.molmap(path, RESOLUTION)[0], expected)


def test_bad_input_is_a_sentence(molmap, model, tmp_path):
    empty, wrong = tmp_path / "empty.pdb", tmp_path / "wrong.cif"
    empty.write_text("REMARK nothing\nEND\n")
    wrong.write_text("this is not a model\n")
    for arguments, words in (
        ((tmp_path / "absent.pdb", 4.0), "absent.pdb: there is no such file"),
        ((tmp_path, 4.0), "must be a PDB or mmCIF file, got"),
        ((empty, 4.0), "empty.pdb must hold atoms"),
        ((wrong, 4.0), "must be a PDB or mmCIF file, got .*wrong.cif"),
        ((model, 0.0), "The resolution must be positive, got 0 A"),
        ((model, 4.0, -1.0), "The spacing must be positive, got -1 A"),
        ((model, 4.0, 1.0, 0), "The size must be at least 1 voxel, got 0"),
    ):
        with pytest.raises(InputError, match=words):
            molmap.molmap(*arguments)


def test_a_machine_without_gemmi(molmap, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "gemmi", None)
    with pytest.raises(InputError, match=r"jaxrefine\[experiments\]"):
        molmap.molmap(model, RESOLUTION)


def test_the_command(molmap, model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "map.mrc"
    words = ["--resolution", "4", "--spacing", "1", "--size", "20", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["molmap.py", str(model), *words])
    assert molmap.harness.main(molmap.main) == 0
    assert "20^3 voxels of 1 A" in capsys.readouterr().out
    volume, voxel = read_mrc(out)
    np.testing.assert_array_equal(volume, molmap.molmap(model, 4.0, 1.0, 20)[0])
    assert voxel == 1.0
    monkeypatch.setattr(sys, "argv", ["molmap.py", "absent.pdb", *words])
    assert molmap.harness.main(molmap.main) == 2
    assert capsys.readouterr().err.count("\n") == 1
