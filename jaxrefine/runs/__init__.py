"""One way of running things: options, folder, checkpoints, progress, provenance.

- :mod:`jaxrefine.runs.options` declares what a run can be told, and
  :mod:`jaxrefine.runs.fingerprint` what of it identifies the run;
- :mod:`jaxrefine.runs.folder` is the folder that belongs to one run, and
  :mod:`jaxrefine.runs.history` its iterations and checkpoints;
- :mod:`jaxrefine.runs.entries` puts values into the types of JSON, for its report;
- :mod:`jaxrefine.runs.provenance` and :mod:`jaxrefine.runs.progress` tell what a run
  is made with, and how far it is.
"""
