"""What every study shares: its command line, its run folder, its provenance.

A run folder is one of :mod:`jaxrefine.runs.folder`: ``run.json`` holds the settings and
says whether the run is finished, and what was left out because RELION is not installed.
Beside it are ``provenance.json`` (commit, versions and device of every process that
computed something), ``metrics.json`` and ``table.md``. The same command resumes an
interrupted run; a finished run is not repeated; a run with other settings in the same
folder is refused, but for what may change (see :mod:`settings`): with more time, what
a limit stopped is carried on.
"""

import argparse
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import configuration
import relion
from settings import StudySettings

from jaxrefine import io
from jaxrefine.errors import InputError
from jaxrefine.runs import provenance
from jaxrefine.runs.fingerprint import fingerprint
from jaxrefine.runs.folder import RunFolder
from jaxrefine.runs.options import as_json, declared

HERE = Path(__file__).resolve().parent

_PACKAGES = ("jaxrefine", "jax", "jaxlib", "equinox", "optax", "numpy")
_WITHOUT_RELION = "RELION is not installed; what it would add is left out."

S = TypeVar("S", bound=StudySettings)
S_co = TypeVar("S_co", bound=StudySettings, covariant=True)


@dataclass(frozen=True)
class Study(Generic[S_co]):
    """A study as a command line asks for it.

    Attributes
    ----------
    settings
        What to compute.
    config, preset
        Names of the file and of the preset that the settings are from.
    out
        The run folder; None for the default.
    """

    settings: S_co
    config: str
    preset: str
    out: Path | None = None

    @property
    def folder(self) -> Path:
        """The run folder."""
        volume = getattr(self.settings, "volume", None)
        map_name = volume.stem if volume else "phantom"
        default = Path("runs") / f"{self.config}_{self.preset}_{map_name}"
        return self.out or default

    def open(self) -> RunFolder:
        """Make or reopen the run folder.

        A run that RELION was missing for is not finished once RELION is installed.

        Raises
        ------
        InputError
            As `jaxrefine.runs.folder.RunFolder`.
        """
        options = declared(type(self.settings))
        folder = RunFolder(
            self.folder,
            "run.json",
            # Input files count by their content, not by their names.
            as_json(self.settings) | fingerprint(self.settings),
            details={
                "config": self.config,
                "preset": self.preset,
                "volume": as_json(self.settings).get("volume"),
            },
            may_change=[each.name for each in options if not each.affects_results],
        )
        if folder.finished and folder.report()["lacking"] and relion.available():
            folder.reopen()
        return folder


def parse(description: str | None, settings_class: type[S]) -> Study[S]:
    """Read the command line that all studies share.

    Raises
    ------
    InputError
        As `configuration.read`.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="TOML file, e.g. configs/X.toml")
    parser.add_argument(
        "--preset", default="smoke", help="one of the file's (default: %(default)s)"
    )
    if "volume" in (each.name for each in declared(settings_class)):
        parser.add_argument(
            "--volume", type=Path, help="true map, MRC (default: the built-in phantom)"
        )
    parser.add_argument(
        "--out", type=Path, help="run folder (default: runs/CONFIG_PRESET_MAP)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="replaces an entry of the file, in TOML; may be repeated",
    )
    given = parser.parse_args()
    volume: Path | None = getattr(given, "volume", None)
    settings = configuration.read(
        settings_class, given.config, given.preset, given.overrides, volume
    )
    return Study(settings, given.config.stem, given.preset, given.out)


def finish(folder: RunFolder, *, without_relion: bool = False) -> None:
    """Mark a run as finished, with or without what RELION would have added."""
    folder.finish(
        {
            "lacking": _WITHOUT_RELION if without_relion else "",
            "last_process": provenance.usage(folder.history.elapsed_s),
        }
    )


def commit() -> dict[str, Any]:
    """Return the commit that runs, see `jaxrefine.runs.provenance.commit`."""
    return provenance.commit(HERE)


def add_provenance(out: Path) -> None:
    """Add what this process computes with to the list of what has computed."""
    now = commit() | provenance.environment(_PACKAGES) | {"relion": relion.version()}
    path = out / "provenance.json"
    earlier = io.read_json(path)["calls"] if path.exists() else []
    if now not in earlier:
        io.write_json(path, {"calls": [*earlier, now]})


def read_metrics(out: Path) -> dict[str, Any]:
    """Return what a run has measured so far, with NaN for null."""
    path = out / "metrics.json"
    return _with_nans(io.read_json(path)) if path.exists() else {}


def _with_nans(content: Any) -> Any:
    """Undo what `io.write_json` does to NaN."""
    if isinstance(content, dict):
        return {key: _with_nans(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_with_nans(value) for value in content]
    return float("nan") if content is None else content


def main(command: Callable[[], None]) -> int:
    """Run the function of a script; return the exit code.

    Bad input ends with a sentence and code 2, an interruption with code 130.
    """
    program = Path(sys.argv[0]).name
    # As an interruption, after which the programs of RELION are ended, too.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        command()
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
