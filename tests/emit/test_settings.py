"""Settings that transformers reads: paths in checkpoints are left out, what an attacker adds is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Glm46VForConditionalGeneration, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.glmga.configuration_glmga import GlmgaConfig

from qpcompile.emit.artifact.settings import check_settings, leave_out_leads, read_config, write_config
from qpcompile.errors import ArtifactError

# As configurations on a hub have them.
PUBLISHED: dict[str, Any] = {
    "model_type": "llava",
    "_name_or_path": "somebody/a-model",
    "auto_map": {"AutoConfig": "somebody/a-model--configuration.Config"},
    "mm_vision_tower": "somebody/a-tower-336",
    "projector_hidden_act": "gelu",
    "text_config": {
        "model_type": "llama",
        "_name_or_path": "somebody/a-decoder",
        "vocab_size": 99,
        "rms_norm_eps": 0.5,
    },
    "vision_config": {"model_type": "clip_vision_model", "_name_or_path": "/home/me/tower", "patch_size": 14},
}


def test_a_published_configuration_is_written_without_paths_and_read_back(tmp_path: Path) -> None:
    config = LlavaConfig.from_dict(PUBLISHED)
    write_config(config, tmp_path)
    leave_out_leads(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "somebody" not in text and "/home" not in text
    check_settings(tmp_path, ["config.json"])
    found = read_config(LlavaForConditionalGeneration, tmp_path)
    assert found.text_config.vocab_size == 99 and found.text_config.rms_norm_eps == 0.5
    assert found.vision_config.patch_size == 14 and found.projector_hidden_act == "gelu"


def test_a_class_of_models_may_have_several_configurations(tmp_path: Path) -> None:
    write_config(GlmgaConfig(), tmp_path)
    leave_out_leads(tmp_path)
    assert isinstance(read_config(Glm46VForConditionalGeneration, tmp_path), GlmgaConfig)
    with pytest.raises(ArtifactError, match="the model type is 'glmga', not llava"):
        read_config(LlavaForConditionalGeneration, tmp_path)


def test_a_part_of_the_model_that_is_called_an_adapter_stays(tmp_path: Path) -> None:
    adapter = {"vision_feature_layer": [-1], "_name_or_path": "somebody/an-adapter"}
    written = {"adapter_config": adapter, "adapter_name": "somebody", "adapter_in_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(written))
    leave_out_leads(tmp_path)
    kept = {"adapter_config": {"vision_feature_layer": [-1]}, "adapter_in_dim": 64}
    assert json.loads((tmp_path / "config.json").read_text()) == kept
    check_settings(tmp_path, ["config.json"])


def test_numbers_that_json_lacks_are_read_back(tmp_path: Path) -> None:
    config = LlavaConfig()
    limits = [0.0, float("inf"), float("-inf")]
    config.get_text_config().limits = limits
    write_config(config, tmp_path)
    assert '"__float__"' in (tmp_path / "config.json").read_text()
    check_settings(tmp_path, ["config.json"])
    assert read_config(LlavaForConditionalGeneration, tmp_path).get_text_config().limits == limits


@pytest.mark.parametrize(
    "added",
    [
        {"adapter_config": "somebody"},
        {"trust_remote_code": 1},
        {"use_kernels": 1.0},
        {"vocab_file": 3},
        {"anything": {"tokenizer_file": 0}},
        {"adapter_in": True},
        {"downsample_rate": "somebody/8"},
        {"downsample": "4/8"},
        {"adapter_config": {"adapter_config": {"auto_map": {"AutoConfig": "somebody--code.Config"}}}},
        {"_name_or_path": "somebody/a-decoder"},
        {"vision_config": {"architecture": "hf-hub:somebody/a-tower"}},
        {"anything": ["fine", "../../outside"]},
        {"anything": {"deeper": "C:\\models"}},
        {"use_pretrained_backbone": True},
        {"audio_tokenizer": {"audio_tokenizer_name_or_path": "somebody"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["config.json", "processor_config.json"])
def test_a_setting_that_leads_elsewhere_is_refused_by_name(added: dict[str, Any], name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(added))
    with pytest.raises(ArtifactError, match="leads to code or to another file") as caught:
        check_settings(tmp_path, [name])
    assert caught.value.where == name


def test_tokens_templates_and_labels_may_have_slashes(tmp_path: Path) -> None:
    free = {
        "eos_token": "</s>",
        "extra_special_tokens": ["</image>", "a/b"],
        "added_tokens_decoder": {"7": {"content": "/"}},
        "chat_template": "{{ '1/2' }}",
        "id2label": {"0": "cat/dog"},
        "downsample_rate": "4/8",
        "end_of_image": "</img>",
        "use_pretrained_backbone": False,
        "_name_or_path": None,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(free))
    check_settings(tmp_path, ["tokenizer_config.json"])


def test_of_a_saved_tokenizer_only_what_leads_elsewhere_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["a/b--c.D", None]}, "eos_token": "</s>", "padding": "left"})
    )
    (tmp_path / "tokenizer.json").write_text('{"vocab": {"a/b": 0}}')
    leave_out_leads(tmp_path)
    assert json.loads(path.read_text()) == {"eos_token": "</s>", "padding": "left"}
    assert (tmp_path / "tokenizer.json").read_text() == '{"vocab": {"a/b": 0}}'


def test_a_text_that_a_processor_may_work_with_is_not_left_out_but_refused(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text('{"instruction": "answer yes/no"}')
    leave_out_leads(tmp_path)
    with pytest.raises(ArtifactError, match="instruction"):
        check_settings(tmp_path, ["processor_config.json"])


def test_an_audio_tokenizer_is_not_left_out_but_refused(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text('{"audio_tokenizer": {"name_or_path": "somebody/a-codec"}}')
    leave_out_leads(tmp_path)
    with pytest.raises(ArtifactError, match="audio_tokenizer"):
        check_settings(tmp_path, ["processor_config.json"])
