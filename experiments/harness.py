"""What every study shares: its configuration, its run directory, its provenance.

A run directory holds ``config.json`` (the resolved configuration), ``provenance.json``
(commit, versions, device, of every call that computed something), ``metrics.json`` (one
entry per method, with the commit that made it), ``maps``, ``poses``, the checkpoint
``work/METHOD/state.eqx`` of the method that is running, ``table.md`` and ``done``,
which says what was left out because RELION was not installed. The same command resumes
an interrupted run; a finished run is not repeated; another configuration in the same
directory is an error, but for time limits: with more time, what a limit stopped is
carried on.
"""

import argparse
import hashlib
import json
import math
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import relion

from jaxrefine import io
from jaxrefine.errors import InputError

HERE = Path(__file__).resolve().parent

_LIMIT = "_limit_min"  # how the names of time limits end
_SAME_VOXEL = 0.01  # relative difference of sizes that are given in five digits
_UNSET = 1.0  # what many programs write as voxel size, whatever it is

_POSITIVE = (
    "voxel_size_in_angstroms",
    "batch_size",
    "paper_iterations",
    "released_iterations",
    "matching_rounds",
    "matching_step_deg",
    "auto_refine_low_pass",
)
_SEEDS = 2**31 - 1  # RELION takes no more
_LENGTHS = {"ab_initio_iterations": 3, "ab_initio_resolutions": 2}


def parse(description: str | None, presets: Sequence[str]) -> argparse.Namespace:
    """Read the command line that all studies share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="TOML file, e.g. configs/X.toml")
    parser.add_argument(
        "--preset", choices=presets, default=presets[0], help="default: %(default)s"
    )
    parser.add_argument(
        "--volume", type=Path, help="true map (MRC); the built-in phantom if left out"
    )
    parser.add_argument("--out", type=Path, help="run directory (default: runs/...)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="another value of a key of the file, in TOML; may be repeated",
    )
    return parser.parse_args()


def resolve(options: argparse.Namespace, required: Sequence[str]) -> dict:
    """Merge the file, the preset and ``--set`` into one flat configuration.

    A map given by ``--volume`` brings its own ``size``.

    Raises
    ------
    InputError
        If the file or the map cannot be used, if the map's voxels are of another size
        than the configuration's (1 A counts as not given), if a required key is
        missing, if ``--set`` names an unknown key or gives a value of another type, or
        if a value is out of range.
    """
    path = options.config
    if not path.exists():
        path = HERE / options.config
    if not path.exists():
        raise InputError(f"{options.config} does not exist, here or in {HERE}.")
    try:
        config = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not a TOML file: {error}.") from error
    presets = config.pop("preset", {})
    if options.preset not in presets:
        raise InputError(f"{path} has no preset {options.preset}.")
    plain = dict(config)
    config |= presets[options.preset]
    missing = [key for key in required if key not in config]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}.")
    for override in options.overrides:
        key, _, value = override.partition("=")
        if key not in config:
            names = ", ".join(sorted(config))
            raise InputError(f"--set knows {names}, not {key}.")
        try:
            given = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"--set {override} is not KEY=VALUE.") from error
        try:
            # A preset's empty list does not say what it may hold.
            config[key] = _as_type_of(config[key] or plain[key], given)
        except TypeError:
            example = json.dumps(config[key])
            raise InputError(
                f"--set {override} wants a value of the type of {example}."
            ) from None
    _check(config)
    config["config"] = path.stem
    config["preset"] = options.preset
    if options.volume is None:
        config["map"] = "built-in phantom (stand-in for the real map)"
        config["title"] += " (phantom)"
    else:
        volume, voxel = io.read_mrc(options.volume)
        wanted = config.get("voxel_size_in_angstroms", voxel)
        if voxel != _UNSET and abs(voxel / wanted - 1) > _SAME_VOXEL:
            raise InputError(
                f"{options.volume} has voxels of {voxel:g} A, and the preset "
                f"{options.preset} of {wanted:g} A; --set "
                f"voxel_size_in_angstroms={voxel:g} takes the map's."
            )
        config["size"] = len(volume)
        config["map"] = options.volume.name
        config["map_sha256"] = hashlib.sha256(options.volume.read_bytes()).hexdigest()
    return config


def _check(config: Mapping[str, Any]) -> None:
    """Refuse, in a sentence, what no study can work with."""
    for key in _POSITIVE:
        value = config.get(key, 1)
        if not value > 0:
            raise InputError(f"{key} is {value}; a positive number is wanted.")
    if not 0 <= config["seed"] < _SEEDS:
        raise InputError(f"seed is {config['seed']}; 0 to {_SEEDS - 1} is wanted.")
    for key, value in config.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(math.isfinite(x) for x in numbers if isinstance(x, float)):
            raise InputError(f"{key} is {value}; what is finite is wanted.")
    if any(scale <= 0 for scale in config.get("paper_step_scales", ())):
        scales = config["paper_step_scales"]
        raise InputError(f"paper_step_scales is {scales}; positive ones are wanted.")
    for key, length in _LENGTHS.items():
        if len(config.get(key, range(length))) != length:
            raise InputError(f"{key} is {config[key]}; {length} numbers are wanted.")
    for key in (key for key in config if key.endswith("_values")):
        if not config[key]:
            raise InputError(f"{key} is empty; one value at least is wanted.")


def _as_type_of(old: Any, new: Any) -> Any:
    """Return the new value with the type of the old, or raise ``TypeError``."""
    if isinstance(old, float) and type(new) is int:
        return float(new)
    if type(new) is not type(old):
        raise TypeError
    if isinstance(old, list) and old:
        return [_as_type_of(old[0], entry) for entry in new]
    return new


def open_run(options: argparse.Namespace, config: dict) -> Path:
    """Make or reopen the run directory of a configuration.

    Time limits may be others than before, and the run is then not done.

    Raises
    ------
    InputError
        If the directory holds a run of another configuration, or other files.
    """
    out = folder(options, config)
    stored, old = out / "config.json", stored_config(options, config)
    if old:
        if _but_limits(old) != _but_limits(config):
            raise InputError(
                f"{out} holds a run of another configuration; name another --out."
            )
        if old != config:
            (out / "done").unlink(missing_ok=True)
            io.write_json(stored, config)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder nor a run; name another --out.")
    else:
        out.mkdir(parents=True, exist_ok=True)
        io.write_json(stored, config)
    return out


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Give a run directory back if what it was opened for is refused."""
    try:
        yield
    except InputError:
        give_back(out)
        raise


def give_back(out: Path) -> None:
    """Remove a run directory that holds no more than its configuration."""
    own = [out / "config.json", out / "provenance.json"]
    if set(out.iterdir()) <= set(own):
        for path in own:
            path.unlink(missing_ok=True)
        with suppress(OSError):
            out.rmdir()


def folder(options: argparse.Namespace, config: Mapping[str, Any]) -> Path:
    """Return the run directory of a configuration, which need not exist."""
    name = options.volume.stem if options.volume else "phantom"
    default = Path("runs") / f"{config['config']}_{config['preset']}_{name}"
    return options.out or default


def stored_config(
    options: argparse.Namespace, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the configuration that the run directory holds; nothing if it is new."""
    path = folder(options, config) / "config.json"
    return io.read_json(path) if path.exists() else {}


def _but_limits(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.endswith(_LIMIT)}


def caption(config: Mapping[str, Any]) -> str:
    """Say under which conditions a result was found."""
    start = config.get("start") or (
        f"Euler angles off by up to {config['max_angle_error']:g} rad, initial map = "
        f"truth blurred by {config['initial_blur']:g} voxels"
    )
    return (
        f"{config['title']}: {config['map']}, {config['size']}³ voxels, "
        f"{config['particles']} particles at {config['snr_db']:g} dB, shifts up to "
        f"{config['max_shift']:g} px unknown, {start}, seed {config['seed']}."
    )


def write_provenance(out: Path) -> dict[str, Any]:
    """Add what computes the results to the list of what has; return it."""
    now, path = _provenance(), out / "provenance.json"
    old = io.read_json(path) if path.exists() else {"calls": []}
    earlier = old.get("calls", [old])  # one call alone, in runs of before
    if now not in earlier:
        io.write_json(path, {"calls": [*earlier, now]})
    return now


@cache
def commit() -> dict[str, Any]:
    """Return the commit of this program, and whether files differ from it.

    As it was when this was first asked for: later ones are not what runs.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(HERE), *words]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": git("status", "--porcelain", "--untracked-files=no") != "",
    }


def _provenance() -> dict[str, Any]:
    device = jax.devices()[0]
    packages = ("jaxrefine", "jax", "jaxlib", "equinox", "optax", "numpy")
    return {
        **commit(),
        "versions": {name: version(name) for name in packages},
        "relion": relion.version(),
        "python": sys.version.split()[0],
        "platform": device.platform,
        "device": device.device_kind,
    }


def finish(out: Path, *, without_relion: bool = False) -> None:
    """Mark a run as done, with or without what RELION would have added."""
    said = "RELION is not installed; what it would add is left out.\n"
    (out / "done").write_text(said if without_relion else "", encoding="utf-8")


def finished(out: Path) -> bool:
    """Return whether there is nothing left to do: RELION may be there by now."""
    done = out / "done"
    return done.exists() and not (done.read_text() and relion.available())


def read_metrics(out: Path) -> dict:
    """Return what the run has measured so far, by method, with NaN for null."""
    path = out / "metrics.json"
    return _with_nans(io.read_json(path)) if path.exists() else {}


def _with_nans(content: Any) -> Any:
    """Undo what `io.write_json` does to NaN."""
    if isinstance(content, dict):
        return {key: _with_nans(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_with_nans(value) for value in content]
    return float("nan") if content is None else content


def main(study: Callable[[], None]) -> int:
    """Run a study's function; return the exit code.

    Bad input ends with a sentence and code 2, an interruption with code 130.
    """
    program = Path(sys.argv[0]).name
    # As an interruption, after which the programs of RELION's are ended, too.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        study()
    except InputError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{program}: The system refused: {error}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command resumes", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0
