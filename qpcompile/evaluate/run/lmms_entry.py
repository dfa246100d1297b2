"""Entry point `lmms_eval.models`, through which lmms-eval finds the model class.

Separate from the class, so that listing models does not import it.
"""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """The model called `qpcompile`."""
    return ModelManifest(model_id="qpcompile", chat_class_path="qpcompile.evaluate.run.lmms_model.LmmsModel")
