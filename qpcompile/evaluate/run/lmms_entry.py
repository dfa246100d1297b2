"""How lmms-eval finds the model class: it loads this through the entry point `lmms_eval.models` of this package.

Kept apart from the class so that listing models does not load torch graphs.
"""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """The model called `qpcompile`."""
    return ModelManifest(model_id="qpcompile", chat_class_path="qpcompile.evaluate.run.lmms_model.LmmsModel")
