"""What every study shares: its configuration, its run directory, its provenance.

A run directory holds ``config.json`` (the resolved configuration), ``provenance.json``
(commit, versions, device), ``metrics.json`` (one entry per method), a checkpoint of the
method that is running, and ``done``. The same command resumes an interrupted run; a
finished run is not repeated; another configuration in the same directory is an error.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import jax

from jaxrefine import io
from jaxrefine.errors import InputError

HERE = Path(__file__).resolve().parent


def parse(description: str | None, presets: tuple[str, ...]) -> argparse.Namespace:
    """Read the command line that all studies share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", type=Path, help="TOML file, e.g. configs/X.toml")
    parser.add_argument("--preset", choices=presets, default=presets[0])
    parser.add_argument(
        "--volume", type=Path, help="true map (MRC); the built-in phantom if left out"
    )
    parser.add_argument("--out", type=Path, help="run directory (default: runs/...)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides"
    )
    return parser.parse_args()


def resolve(options: argparse.Namespace) -> dict:
    """Merge the file, the preset and ``--set`` into one flat configuration."""
    path = options.config
    if not path.exists():
        path = HERE / options.config
    if not path.exists():
        raise InputError(f"{options.config} does not exist, here or in {HERE}.")
    try:
        config = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not a TOML file: {error}.") from error
    presets = config.pop("preset", {})
    if options.preset not in presets:
        raise InputError(f"{path} has no preset {options.preset}.")
    config |= presets[options.preset]
    for override in options.overrides:
        key, _, value = override.partition("=")
        if key not in config:
            names = ", ".join(sorted(config))
            raise InputError(f"--set knows {names}, not {key}.")
        try:
            config[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"--set {override} is not KEY=VALUE.") from error
    config["config"] = path.stem
    config["preset"] = options.preset
    if options.volume is None:
        config["map"] = "built-in phantom (stand-in for the real map)"
    else:
        io.read_mrc(options.volume)
        config["map"] = options.volume.name
        config["map_sha256"] = hashlib.sha256(options.volume.read_bytes()).hexdigest()
    return config


def open_run(options: argparse.Namespace, config: dict) -> Path:
    """Make or reopen the run directory of a configuration.

    Raises
    ------
    InputError
        If the directory holds a run of another configuration, or other files.
    """
    name = options.volume.stem if options.volume else "phantom"
    default = Path("runs") / f"{config['config']}_{config['preset']}_{name}"
    out = options.out or default
    stored = out / "config.json"
    if stored.exists():
        if json.loads(stored.read_text()) != config:
            raise InputError(
                f"{out} holds a run of another configuration; name another --out."
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder nor a run; name another --out.")
    else:
        out.mkdir(parents=True)
        io.write_json(stored, config)
    return out


def write_provenance(out: Path) -> None:
    """Record what computed the results."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(HERE), *words]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    device = jax.devices()[0]
    packages = ("jaxrefine", "jax", "jaxlib", "equinox", "optax", "numpy")
    provenance = {
        "commit": git("rev-parse", "HEAD"),
        "dirty": git("status", "--porcelain", "--untracked-files=no") != "",
        "versions": {name: version(name) for name in packages},
        "python": sys.version.split()[0],
        "platform": device.platform,
        "device": device.device_kind,
    }
    io.write_json(out / "provenance.json", provenance)


def read_metrics(out: Path) -> dict:
    """Return what the run has measured so far, by method."""
    path = out / "metrics.json"
    return json.loads(path.read_text()) if path.exists() else {}


def main(study) -> int:
    """Run a study's function; turn bad input into a sentence and exit code 2."""
    try:
        study()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    return 0
