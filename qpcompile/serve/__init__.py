"""A compiled model over HTTP: `qpcompile serve FOLDER`, or several replicas with `serve run qpcompile.serve:app`."""

from __future__ import annotations

from qpcompile.serve.replicas import app

__all__ = ["app"]
