"""A config file is the model's only source of sizes: what is in it is read, what does not belong there is named."""

import dataclasses
import os

import pytest
import yaml

from infworld.config import ModelConfig, RolloutConfig, from_dict, load_config, to_dict

# The keys that files of the released model have (spec section 1), and nothing else.
RELEASED = """
checkpoint_path: checkpoints/infinite_world_model.ckpt
text_encoder_cfg:
  checkpoint_path: checkpoints/models/models_t5_umt5-xxl-enc-bf16.pth
  tokenizer_path: checkpoints/models/google/umt5-xxl
  model_max_length: 512
val_scheduler_cfg:
  shift: 7
  use_reversed_velocity: true
  use_timestep_transform: true
  num_sampling_steps: 30
  text_cfg_scale: 5
model_cfg: {model_type: t2v, dim: 1536, in_channels: 20, ffn_dim: 8960, freq_dim: 256, num_heads: 12, num_layers: 30}
vae_cfg: {vae_pth: checkpoints/models/Wan2.1_VAE.pth}
validation_data: {num_frames: 81}
amp_dtype: bfloat16
"""


@pytest.fixture
def load(tmp_path):
    """Loads the config of a YAML text."""

    def load(text: str) -> ModelConfig:
        (tmp_path / "model.yaml").write_text(text, encoding="utf-8")
        return load_config(tmp_path / "model.yaml")

    return load


def test_a_file_of_the_released_model_loads_as_it_is(load):
    ours = load_config("infinite-world")
    assert dataclasses.replace(load(RELEASED), negative_prompt=ours.negative_prompt, source=ours.source) == ours
    assert ours.negative_prompt.count(",") > 5  # guidance never runs against an empty prompt


def test_an_empty_mapping_is_the_released_model(load):
    assert dataclasses.replace(load("{}"), source=None) == ModelConfig()


@pytest.mark.parametrize("name", ["tiny", "infinite-world"])
def test_a_config_survives_yaml(name, load):
    config = load_config(name)
    again = load(yaml.safe_dump(to_dict(config)))
    assert dataclasses.replace(again, source=config.source) == config
    assert from_dict(ModelConfig, to_dict(config), "here") == dataclasses.replace(config, source=None)


def test_whole_numbers_may_stand_for_fractions(load):
    shift = load("val_scheduler_cfg: {shift: 3}").val_scheduler_cfg.shift
    assert shift == 3 and isinstance(shift, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_name: x", "model.yaml: unknown key 'model_name'; known are .*model_cfg, name"),
        ("model_cfg: {dimm: 4}", "model.yaml: model_cfg: unknown key 'dimm'; known are .*dim, "),
        ("{1: 2, x: 3}", "unknown key 1"),
        ("source: /etc", "unknown key 'source'"),
        ("model_cfg: 4", "model.yaml: model_cfg: expected a mapping of settings, found int"),
        ("", "expected a mapping of settings, found NoneType"),
        ("[1, 2]", "expected a mapping of settings, found list"),
        ("model_cfg: {dim: big}", "model.yaml: model_cfg: dim: expected int, found 'big'"),
        ("model_cfg: {dim: 4.5}", "expected int, found 4.5"),
        ("model_cfg: {dim: true}", "expected int, found True"),
        ("val_scheduler_cfg: {shift: true}", "expected float, found True"),
        ("val_scheduler_cfg: {use_reversed_velocity: 1}", "expected bool, found 1"),
        ("checkpoint_path:", "checkpoint_path: expected str, found None"),
        ("vae_cfg: {dim_mult: 4}", "dim_mult: expected a list, found 4"),
        ("vae_cfg: {latents_mean: [0, x]}", "latents_mean: expected float, found 'x'"),
        ("amp_dtype: int8", "amp_dtype must be bfloat16, float16 or float32, not 'int8'"),
        ("text_encoder_cfg: {type: clip}", "type must be umt5 or bytes, not 'clip'"),
        ("text_encoder_cfg: {dim: 8}", r"text_encoder_cfg.dim \(8\) and model_cfg.caption_channels \(4096\)"),
        ("validation_data: {num_frames: 80}", "num_frames must be 1 \\+ 4n, n at least 1, not 80"),
        ("validation_data: {num_frames: 1}", "num_frames must be 1 \\+ 4n, n at least 1, not 1"),
        ("validation_data: {num_frames: -3}", "num_frames must be 1 \\+ 4n, n at least 1, not -3"),
        ("buckets: 96x128", "buckets: expected a list, found '96x128'"),
        ("buckets: [96, 128]", "buckets: expected a list, found 96"),
        ("buckets: []", r"buckets must be \(height, width\) pairs.*, not \(\)"),
        ("buckets: [[96, 128], [96]]", r"multiples of 16, not \(96,\)"),
        ("buckets: [[96, 128, 3]]", r"multiples of 16, not \(96, 128, 3\)"),
        ("buckets: [[96, 120]]", r"multiples of 16, not \(96, 120\)"),
        ("buckets: [[0, 128]]", r"multiples of 16, not \(0, 128\)"),
        ("buckets: [[-96, 128]]", r"multiples of 16, not \(-96, 128\)"),
        ("a: [", "is not a readable YAML file"),
        ("a: !!python/object:os.system x", "is not a readable YAML file"),
    ],
)
def test_what_does_not_belong_is_named(load, text, message):
    with pytest.raises(ValueError, match=message):
        load(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model_cfg: {num_layers: 1000000000}",
            r"model.yaml: model_cfg: num_layers must be from 1 to 256, not 1000000000",
        ),
        ("model_cfg: {num_layers: 0}", "num_layers must be from 1 to 256, not 0"),
        ("model_cfg: {dim: -384}", "dim must be from 2 to 32768, not -384"),
        ("model_cfg: {num_heads: 0}", "num_heads must be from 1 to 256, not 0"),
        ("model_cfg: {dim: 100, num_heads: 7}", r"dim \(100\) must be an even multiple of num_heads \(7\)"),
        ("model_cfg: {memory_num_heads: 5}", r"memory_hidden_dim \(256\) must be an even multiple of memory_num_heads"),
        ("model_cfg: {memory_hidden_dim: 48}", "memory_hidden_dim must be a multiple of 32, not 48"),
        ("model_cfg: {freq_dim: 255}", "freq_dim must be even, not 255"),
        ("model_cfg: {ffn_dim: 99999999999999999999}", "ffn_dim must be from 1 to 131072, not 99999999999999999999"),
        ("model_cfg: {out_channels: 8}", "must be equal"),
        ("model_cfg: {in_channels: 16}", r"in_channels \(16\) must be more than out_channels \(16\)"),
        ("vae_cfg: {z_dim: 4}", r"vae_cfg.z_dim \(4\).*must be equal"),
        ("vae_cfg: {latents_mean: [0]}", r"latents_mean \(1\).*must be equal"),
        ("vae_cfg: {latents_std: [0]}", "latents_std must be from 1e-06 to 1e\\+06, not 0.0"),
        ("vae_cfg: {dim_mult: [1, 2]}", "dim_mult must have 3 entries or more"),
        ("vae_cfg: {dim_mult: [1, 2, 4, -4]}", "dim_mult must be from 1 to 64, not -4"),
        ("vae_cfg: {dim: 0}", "vae_cfg: dim must be from"),
        ("text_encoder_cfg: {model_max_length: 0}", "model_max_length must be from 1 to 65536, not 0"),
        ("text_encoder_cfg: {num_layers: 1000000000}", "text_encoder_cfg: num_layers must be from"),
        ("text_encoder_cfg: {vocab: -1}", "vocab must be from"),
        ("val_scheduler_cfg: {shift: .nan}", "shift: expected a finite number, found nan"),
        ("val_scheduler_cfg: {shift: 0}", "shift must be from"),
        ("val_scheduler_cfg: {text_cfg_scale: -.inf}", "expected a finite number"),
        (f"val_scheduler_cfg: {{shift: 1{'0' * 400}}}", "expected a finite number|shift must be"),
        ("val_scheduler_cfg: {num_sampling_steps: 0}", "num_sampling_steps must be from 1 to 1000, not 0"),
        ("validation_data: {num_frames: 4000001}", "num_frames must be at most 1001, not 4000001"),
        ("validation_data: {fps: 0}", "fps must be from 1 to 240, not 0"),
        ("validation_data: {max_chunks: 0}", "max_chunks must be from"),
        ("buckets: [[1600000, 1600000]]", "buckets must be at most 4096, not 1600000"),
        (f"buckets: [{'[16, 16], ' * 1001}]", "a list has at most 1000 entries, not 1001"),
        ("[" * 5000, "nested more than 16 deep"),
        ("{a: " * 3000, "nested more than 16 deep"),
        ("- " * 3000 + "x", "nested more than 16 deep"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nname: [*b, *b]", r"has an alias \(\*a\)"),
        ("a: &a {x: 1}\nb: {<<: [*a, *a]}", "has an alias"),
        ("name: " + "x" * 200_000, "it has 200,006 bytes, a config at most 100,000"),
        (f"model_cfg: {{dim: {'9' * 5000}}}", "is not a readable YAML file.*digits"),
        ("name: 2001-99-99", "is not a readable YAML file"),
        ("name: [" + "y, " * 5000 + "]", r"name: expected str, found \['y', 'y'.*\.\.\.\]$"),
        ("? [a, b]\n: 1", "unknown key|is not a readable YAML file"),
        ("? {a: b}\n: 1", "is not a readable YAML file"),
        ("name: \0", "is not a readable YAML file"),
    ],
)
def test_sizes_without_sense_and_bombs_are_refused_at_once(load, text, message):
    with pytest.raises(ValueError, match=message) as refusal:
        load(text)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 600


def test_files_that_are_no_config_are_named(tmp_path):
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ValueError, match="picture.yaml is not a readable YAML file"):
        load_config(tmp_path / "picture.yaml")
    with pytest.raises(FileNotFoundError, match="no config file at .*gone.yaml"):
        load_config(tmp_path / "gone.yaml")
    with pytest.raises(ValueError, match="unknown model 'huge': use infinite-world, tiny or the path of a .yaml file"):
        load_config("huge")


def test_buckets_are_made_of_tokens(load):
    assert ModelConfig().token_pixels == 16
    folded = "vae_cfg: {fold: 4, dim_mult: [1, 2, 3]}\nmodel_cfg: {patch: 1}\n"
    assert load(folded + "buckets: [[48, 80]]").token_pixels == 16
    coarse = load(folded.replace("patch: 1", "patch: 2") + "buckets: [[64, 96]]")
    assert coarse.vae_cfg.space == 16 and coarse.token_pixels == 32
    with pytest.raises(ValueError, match=r"multiples of 32, not \(48, 80\)"):
        load(folded.replace("patch: 1", "patch: 2") + "buckets: [[48, 80]]")


def test_a_chunk_is_80_frames_and_21_latents():
    config = ModelConfig()
    assert (config.chunk_frames, config.chunk_latents) == (80, 21)


@pytest.mark.parametrize(("frames", "chunks"), [(81, 1), (161, 2), (1041, 13), (1281, 16), (4001, 50)])
def test_a_film_is_the_picture_and_whole_chunks(frames, chunks):
    assert ModelConfig().chunks_for(frames) == chunks


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (0, "at least 81 frames \\(one chunk\\), not 0"),
        (1, "at least 81 frames"),
        (80, "at least 81 frames"),
        (-79, "at least 81 frames .*, not -79"),
        (4002, "at most 4001 frames \\(50 chunks\\), not 4002"),
        (10**12, "at most 4001 frames"),
        (82, "ask for 81 or 161 frames, not 82"),
        (160, "ask for 81 or 161 frames, not 160"),
        (True, "whole number, not True"),
        (161.0, "whole number, not 161.0"),
        ("161", "whole number, not '161'"),
        (None, "whole number, not None"),
    ],
)
def test_other_lengths_are_refused_with_the_way_out(frames, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig().chunks_for(frames)


def test_weights_are_looked_up_beside_the_config(load, tmp_path):
    config = load("{}")
    (tmp_path / "world.safetensors").touch()
    assert config.path("world.safetensors") == tmp_path / "world.safetensors"
    assert config.path(str(tmp_path / "gone.ckpt")) == tmp_path / "gone.ckpt"
    assert config.path("gone.ckpt").is_absolute()


def test_a_converted_file_is_taken_in_place_of_the_torch_file_beside_it_unless_that_is_newer(load, tmp_path):
    config = load("{}")
    torch_file, converted = tmp_path / "models" / "x.1.pth", tmp_path / "models" / "x.1.safetensors"
    torch_file.parent.mkdir()
    torch_file.touch()
    assert config.path("models/x.1.pth") == torch_file
    converted.touch()
    for name in ("models/x.1.pth", str(torch_file)):
        assert config.path(name) == converted
    os.utime(converted, (1, 1))
    assert config.path("models/x.1.pth") == torch_file
    torch_file.unlink()  # to save its room
    assert config.path("models/x.1.pth") == converted


@pytest.mark.parametrize("lengths, trained", [((80,), [80]), ((16, 32, 80), [16, 24, 80]), ((80, 80), [80])])
def test_chunks_that_a_model_was_not_trained_on_are_said(lengths, trained):
    config = ModelConfig(validation_data=RolloutConfig(chunk_lengths=lengths))
    assert [frames for frames in (4, 12, 16, 24, 80) if config.untrained_note(frames) is None] == trained
    assert "4" in config.untrained_note(4)
