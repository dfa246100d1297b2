"""What a model or a sample that cannot be captured gets: one error that says what, where and what to do."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from qpcompile.capture.capture import capture
from qpcompile.errors import CalibrationError, CaptureError, ModelError
from qpcompile.recipe import Recipe

from families import llava, qwen2_5_vl
