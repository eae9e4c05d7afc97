"""What each constant of the engine does: :class:`jaxrefine.Tuning`, one at a time.

A data set of :mod:`datasets` is refined with the defaults, and again with each constant
about half and about twice as large (a share or a correlation: clearly lower and clearly
higher), from the same start and with the same key. Every refinement is a process of its
own, compilation included, as in :mod:`refinement`.

``stalled`` is a matter of half sets alone; so it is compared with a refinement of half
sets. ``least_per_group`` is left out: these data sets have one optics group, which
makes up the whole sample, whatever this constant is.

``hjc32`` is for a quick look.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmark import Settings
from datasets import DATA_SETS, describe, simulate
from records import Record, markdown_table
from refine_dataset import refine

import jaxrefine as jr

CASES = ("hjc64", "ptch64", "hjc64-low", "hjc32")
NEIGHBOURS = {
    "supported_fsc": (0.3, 0.7),
    "settled": (0.15, 0.6),
    "progress": (0.5, 0.9),
    "stalled": (1e-3, 4e-3),
    "sample": (500, 4000),
    "shifts_per_period": (4, 16),
    "local_shift_steps": (2, 6),
    "decided": (0.95, 0.998),
    "negligible": (5e-3, 2e-2),
    "final_rounds": (1, 6),
}
"""The other values of each constant."""
OF_HALF_SETS = ("stalled",)
PARTS = tuple(NEIGHBOURS)
FIGURES = ("mean_fsc", "fraction_within_10_degrees", "angle_error_in_degrees_median")
FIGURES += ("iterations",)


def measure(case: str, settings: Settings) -> dict[str, Any]:
    """Refine a data set with the defaults, and with the other values of constants."""
    data = simulate(DATA_SETS[case], settings.data)
    refinements = []
    for half_sets in (False, True):
        changes = [
            {name: value}
            for name, values in NEIGHBOURS.items()
            if settings.measures(name) and (name in OF_HALF_SETS) == half_sets
            for value in values
        ]
        for change in [{}, *changes] if changes else []:
            config = jr.RefineConfig(half_sets=half_sets, tuning=jr.Tuning(**change))
            refined = refine(data, config)
            refined["iterations"] = len(refined["r_max"])
            figures = {name: refined[name] for name in FIGURES}
            refinements.append({"half_sets": half_sets, "change": change, **figures})
    return {
        **DATA_SETS[case]._asdict(),
        "defaults": asdict(jr.Tuning()),
        "refinements": refinements,
    }


def table(records: Sequence[Record]) -> str:
    """Return, for each case, the defaults' figures and how each constant changes them.

    Those of a constant are differences from those of the defaults above it.
    """
    header = ("constant", "value", "mean FSC", "within 10 degrees")
    header += ("median error (degrees)", "iterations")
    tables = []
    for each in records:
        figures, rows, before = each["figures"], [], {}
        for refined in figures["refinements"]:
            if not refined["change"]:
                before = refined
                name = "defaults, half sets" if refined["half_sets"] else "defaults"
                rows.append((name, "", *_cells(refined, "")))
                continue
            ((name, value),) = refined["change"].items()
            difference = {name: refined[name] - before[name] for name in FIGURES}
            change = f"{figures['defaults'][name]:g} → {value:g}"
            rows.append((f"`{name}`", change, *_cells(difference, "+")))
        title = describe(each["case"], figures)
        tables.append(f"{title}:\n\n{markdown_table(header, rows)}")
    return "\n".join(tables)


def _cells(figures: Mapping[str, Any], sign: str) -> tuple[str, ...]:
    return (
        f"{figures['mean_fsc']:{sign}.3f}",
        f"{100 * figures['fraction_within_10_degrees']:{sign}.1f} %",
        f"{figures['angle_error_in_degrees_median']:{sign}.2f}",
        f"{figures['iterations']:{sign}d}",
    )
