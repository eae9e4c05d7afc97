# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From a STAR file to half maps, and back
#
# Particles come as a RELION table, with contrast-transfer functions, and go back as
# one. In between: a refinement of two half sets, their FSC, a mask, and error bars of
# the poses, which here can be held against the truth.

# %%
import contextlib
import io as streams
import os
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

import jaxrefine as jr
from jaxrefine import cli, io
from jaxrefine.maps.mask import soft_mask
from jaxrefine.maps.postprocess import postprocess

plt.rcParams["figure.dpi"] = 80
home, folder = os.getcwd(), tempfile.TemporaryDirectory()
os.chdir(folder.name)


def run(line):
    """Run a command as a shell would, without its progress bar."""
    print("$ jaxrefine", line)
    with contextlib.redirect_stderr(streams.StringIO()) as stderr:
        code = cli.main(line.split())
    assert code == 0, stderr.getvalue()


# %% [markdown]
# ## A data set that RELION reads
#
# 400 particles of the phantom, 32 pixels of 4 angstroms, each with a defocus of its
# own. `truth.star` has the true poses; those of `particles.star` are off by up to 0.7
# rad, with no shifts.

# %%
phantom = jr.simulate.phantom(jax.random.key(0), 32)
io.write_mrc("phantom.mrc", phantom, 4.0)
run(
    "simulate phantom.mrc --out data --particles 400 --snr-db -7 "
    "--max-shift 2 --initial-blur 3 --ctf"
)

source = io.read_particles("data/particles.star")
truth = io.read_particles("data/truth.star").poses
start, _ = io.read_mrc("data/init.mrc")
particles = source.particles  # images are read when they are asked for
pixel = particles.pixel_size_in_angstroms
N = particles.image_size
images, optics = particles.batch(np.arange(6))
assert optics is not None  # the table has defoci
print(f"{len(source)} particles of {N} pixels of {pixel:g} A")

figure, axes = plt.subplots(1, 6, figsize=(11, 2.2), layout="constrained")
for panel, image, defocus in zip(axes, images, optics.defocus_u, strict=True):
    panel.imshow(image, origin="lower", cmap="gray")
    panel.set(xticks=[], yticks=[], title=f"{float(defocus) / 1e4:.2f} µm")
plt.show()

# %% [markdown]
# What is read is in the package's own terms: rotation matrices, and the particle at
# $+t$ pixels. The file's Euler angles in degrees, and its origins at $-t$ angstroms,
# stay in the file.
#
# ## Two half sets
#
# Each half is refined by itself, from the same start, up to the end. The halves are
# dealt here, so that they can be written to the table; without `subsets` they are
# dealt at random.

# %%
subsets = 1 + np.arange(len(source)) % 2
config = jr.RefineConfig(half_sets=True, first_r_max=8, search_r_max=8)
result = jr.refine(
    particles,
    source.poses,
    jnp.asarray(start),
    config,
    key=jax.random.key(1),
    subsets=subsets,
    callback=lambda state, info: print(
        f"iteration {info.iteration}: {info.r_max} cycles per box, "
        f"FSC of the half sets' regularised maps {info.gold_score:.3f}"
    ),
)
assert result.half_maps is not None  # they are there with half sets
half1, half2 = (jnp.asarray(half) for half in result.half_maps)

# %% [markdown]
# ## Mask, resolution, a map to look at
#
# The mask is found in the mean of the half maps. What it does to their FSC by itself
# is measured with half maps of random phases, and taken out.

# %%
mask = soft_mask((half1 + half2) / 2, pixel, extend=1, edge=3)
final = postprocess(half1, half2, mask, pixel, key=jax.random.key(2))
print(f"half maps agree to {final.resolution.in_angstroms:.1f} A, FSC 0.143")
print(f"(two pixels are {2 * pixel:.1f} A); the mask fills {float(mask.mean()):.0%}")

figure, axes = plt.subplots(1, 6, figsize=(12, 2.4), layout="constrained")
pictures = {
    "truth": phantom,
    "initial map": start,
    "half map 1": half1,
    "mean, filtered": final.volume,
    "regularised": result.volume,
    "mask": mask,
}
for panel, (name, volume) in zip(axes, pictures.items(), strict=True):
    panel.imshow(volume[N // 2], origin="lower", cmap="gray", vmin=0)
    panel.set(title=name, xticks=[], yticks=[])
plt.show()

# %%
figure, panel = plt.subplots(figsize=(7.5, 4), layout="constrained")
mean = (half1 + half2) / 2
# The half maps share a frame, the truth has its own: their motion is undone.
against_truth = jr.evaluation.assess(mean, result.poses, phantom, truth)
regularised = jr.evaluation.assess(result.volume, result.poses, phantom, truth)
for name, curve, style in (
    ("half maps", final.fsc_unmasked, "C0"),
    ("half maps, masked", final.fsc_masked, "C1:"),
    ("random phases, masked", final.fsc_randomised, "0.6"),
    ("half maps, corrected", final.fsc_true, "C1"),
    ("mean with the truth", against_truth.aligned_curve, "k--"),
    ("regularised map with the truth", regularised.aligned_curve, "k"),
):
    panel.plot(curve, style, label=name)
panel.axhline(0.143, color="0.8", lw=1)
panel.set(xlabel="shell (cycles per box)", ylabel="FSC", xlim=(0, N // 2))
panel.legend()
plt.show()

# %% [markdown]
# The half maps are not regularised, as other programs' are not: maps with TV agree
# beyond what the images say, since what the prior fills in is alike in both, and a
# correlation cannot tell that from signal. `result.volume`, of all particles, has TV,
# and is better than the mean of the half maps.
#
# ## Back to a STAR file
#
# Every column that was read is kept; the poses are replaced, and columns added: the
# half of each particle and two error bars. Any program of the field reads the file, and
# the half maps beside it.

# %%
variances = np.diagonal(result.covariances, axis1=1, axis2=2)
angle_std = np.rad2deg(np.sqrt(variances[:, :3].sum(axis=1)))
shift_std = np.sqrt(variances[:, 3:].sum(axis=1))
columns = {
    "rlnRandomSubset": subsets,
    "jaxrefineAngleStd": angle_std,
    "jaxrefineShiftStd": shift_std,
}
io.write_particles("refined.star", source, result.poses, columns)
for name, half in (("half1.mrc", half1), ("half2.mrc", half2)):
    io.write_mrc(name, np.asarray(half), pixel)
run("postprocess half1.mrc half2.mrc --out postprocessed")

again = io.read_particles("refined.star")
turned = jr.geometry.geodesic_distance(again.poses.rotations, result.poses.rotations)
moved = jnp.abs(again.poses.shifts - result.poses.shifts)
assert np.array_equal(np.asarray(again.random_subset), subsets)
print(
    f"lost by writing and reading: at most {float(turned.max()):.0e} radians "
    f"and {float(moved.max()):.0e} pixels"
)
new = set(again.blocks["particles"]) - set(source.blocks["particles"])
print("new columns:", ", ".join(sorted(new)))
run("evaluate data/init.star data/truth.star")
run("evaluate refined.star data/truth.star")

# %% [markdown]
# ## Are the error bars honest?
#
# The covariance of a pose is that of five numbers, a small rotation $w$ and a move of
# the shift. If it is right, the squared length of the error, in units of the
# covariance, follows the $\chi^2$ law of five degrees of freedom. The frame of the
# map, which no image can tell, is taken out first.

# %%
poses = result.poses
motion = jr.evaluation.align_poses(poses, truth)
aligned, translation = np.asarray(motion.aligned), np.asarray(motion.translation)
turn = np.asarray(truth.rotations) @ aligned.swapaxes(1, 2)
move = np.asarray(truth.shifts - poses.shifts) + aligned[:, :2] @ translation
turn = np.asarray(jr.geometry.matrix_to_rotvec(jnp.asarray(turn)))
error = np.concatenate([turn, move], axis=1)
squared = np.einsum("pi,pij,pj->p", error, np.linalg.inv(result.covariances), error)

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
true_error = np.rad2deg(np.linalg.norm(error[:, :3], axis=1))
known = ~result.undetermined  # of the others, the covariance is the prior's
left.plot(angle_std[known], true_error[known], ".", ms=3, color="0.6")
for sixth in np.array_split(np.flatnonzero(known)[np.argsort(angle_std[known])], 6):
    left.plot(np.median(angle_std[sixth]), np.median(true_error[sixth]), "C3o")
line = np.array([angle_std[known].min(), angle_std[known].max()])
left.plot(line, line, "k", lw=1, label="error = error bar")
left.plot([], [], "C3o", label="medians of sixths")
left.set(xlabel="error bar of the rotation (degrees)", yscale="log")
left.set(ylabel="true error (degrees)")
left.legend()
ticks = np.linspace(0, 30, 61)
right.hist(
    np.minimum(squared[known], 29.9), ticks, density=True, alpha=0.5, label="particles"
)
right.plot(ticks, stats.chi2.pdf(ticks, 5), "k", label="χ², 5 degrees of freedom")
right.set(xlabel="squared error / covariance (last bin: all beyond)")
right.legend()
plt.show()

lost = true_error > 5 * angle_std
inside = float(np.mean(squared[known] < stats.chi2.ppf(0.95, 5)))
print(f"within the 95 % ellipsoids: {100 * inside:.1f} % of the true poses")
print(
    f"median squared error: {np.median(squared[known]):.2f}, "
    f"by the law {stats.chi2.median(5):.2f}"
)
print(f"rotations off by more than five error bars: {np.sum(lost & known)}")
print(f"undetermined particles, left out here: {np.sum(~known)}")

# %% [markdown]
# The covariance says what the noise of an image leaves open about the best pose, with
# the map as it is. It does not know of the map's own errors, which makes the ellipsoids
# a little small, nor of a second pose that explains the image nearly as well: a
# particle that sits at the wrong one has a small error bar too.

# %%
os.chdir(home)
folder.cleanup()
