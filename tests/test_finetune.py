"""Fine-tuning: batches decided by the step alone, a run that goes on as if it had not stopped, alone or with others."""

import dataclasses
import json
import sys

import pytest
import torch
import yaml
from conftest import SMALL_MODEL

import infworld
from infworld.checkpoint import read_tensors, save_tensors
from infworld.cli import finetune as command
from infworld.config import ModelConfig, from_dict, load_config
from infworld.dit import InfiniteWorldTransformer
from infworld.lora import Lora
from infworld.text import ByteTextEncoder, TextEmbedding
from infworld.training import tracking
from infworld.training.clips import ClipSampler
from infworld.training.finetune import Finetuning, Settings
from infworld.training.run_folder import RunFolder
from infworld.vae import build_vae
from infworld.video import read_mp4
from infworld.videos.dataset import Clip, ClipInfo, open_data, vae_fingerprint, write_clip

CHUNK, LATENTS = 8, 2  # frames and new latents of a chunk, so that a test takes seconds
SETTINGS = SMALL_MODEL | {"validation_data": {"num_frames": CHUNK + 1}, "buckets": [[16, 32], [32, 16]]}
FAST = Settings(batch=2, lr=1e-3, warmup=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The config of a model of random weights, and a folder of clips that its VAE could have made."""
    folder = tmp_path_factory.mktemp("finetuned")
    config = from_dict(ModelConfig, SETTINGS, "SETTINGS")
    torch.manual_seed(0)
    transformer = InfiniteWorldTransformer(config.model_cfg)
    save_tensors(folder / "world.safetensors", transformer.state_dict(), dtype=torch.float16)
    save_tensors(folder / "vae.safetensors", build_vae(config.vae_cfg).state_dict())
    save_tensors(folder / "text.safetensors", ByteTextEncoder(config.text_encoder_cfg).state_dict())
    (folder / "small.yaml").write_text(yaml.safe_dump(SETTINGS))
    config = load_config(folder / "small.yaml")
    fingerprint = vae_fingerprint(config)
    for name, chunks, caption in (("a", 6, "a wood"), ("b", 4, ""), ("c", 5, "")):
        write_random_clip(folder / "data/clips" / f"{name}.safetensors", chunks, fingerprint, caption)
    return config, folder / "data"


def write_random_clip(path, chunks: int, fingerprint: str = "", caption: str = "", size=(16, 32)) -> None:
    generator = torch.Generator().manual_seed(chunks)
    frames, latents = 1 + CHUNK * chunks, (16, size[0] // 8, size[1] // 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "history": torch.randn(1 + LATENTS * chunks, *latents, generator=generator),
        "targets": torch.randn(chunks, 1 + LATENTS, *latents, generator=generator),
        "picture": torch.randint(256, (*size, 3), generator=generator),
        "move": torch.randint(10, (frames,), generator=generator),
        "view": torch.randint(10, (frames,), generator=generator),
        "poses": torch.eye(4).repeat(frames, 1, 1),
        "returns": torch.full((frames,), -1),
    }
    write_clip(path, ClipInfo(path.stem, 0.0, frames / 30, "small", fingerprint, caption), tensors)


def make(small, settings: Settings = FAST, way: str = "ddp") -> Finetuning:
    config, data = small
    return command.make_training(config, open_data(data, config), settings, torch.device("cpu"), way)


def options(small, out, *more) -> list[str]:
    config, data = small
    words = ["--model", config.source, "--data", data, "--out", out, "--batch", 2, "--lr", 1e-3, *more]
    return [str(word) for word in words]


def log_of(folder, event: str) -> list[dict]:
    lines = (json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


# --- the data


@pytest.fixture
def sampler(small) -> ClipSampler:
    return make(small).sampler


def test_what_is_held_out_is_no_target_of_training(sampler):
    held = {(clip.name, end) for clip, end in sampler.held_out}
    assert held == {("c", 3), ("c", 4)}
    met = {(p.clip.name, p.start + p.chunks) for step in range(300) for p in sampler.places(step, 4)}
    assert not met & held
    assert met == {("a", end) for end in range(6)} | {("b", end) for end in range(4)} | {("c", end) for end in range(3)}
    measured = sampler.measured(2)
    assert {(p.clip.name, p.start + p.chunks) for p in measured} == held and {p.chunks for p in measured} == {2}
    assert {p.chunks for p in sampler.measured(100)} == {3}  # as long as two of them have it


def test_a_step_has_histories_of_one_length_and_of_all_lengths(small):
    sampler = make(small, dataclasses.replace(FAST, stage=2)).sampler
    lengths = [{p.chunks for p in sampler.places(step, 4)} for step in range(200)]
    assert all(len(length) == 1 for length in lengths)
    assert set.union(*lengths) == set(range(6)) and sampler.most == 5
    assert make(small).sampler.most == 4  # stage 1


def test_clips_of_different_sizes_are_not_mixed(small, tmp_path):
    config, _ = small
    for name, chunks, size in (("a", 6, (16, 32)), ("b", 5, (32, 16))):
        write_random_clip(tmp_path / "clips" / f"{name}.safetensors", chunks, size=size)
    empty = TextEmbedding(torch.zeros(1, 16, 16), torch.ones(1, 16, dtype=torch.long))
    sampler = ClipSampler(open_data(tmp_path), {"": empty}, 3.0, 4, 0)
    sizes = [{p.clip.name for p in sampler.places(step, 4)} for step in range(60)]
    assert all(len(names) == 1 for names in sizes) and set.union(*sizes) == {"a", "b"}


def test_places_to_come_back_to_are_drawn_more_often(small, sampler, monkeypatch):
    monkeypatch.setattr(Clip, "needs", lambda clip, chunks: torch.arange(clip.chunks - chunks).eq(1).float())
    drawn = [p.start for step in range(400) for p in sampler.places(step, 8) if p.chunks == 3 and p.clip.name == "a"]
    assert drawn.count(1) / len(drawn) == pytest.approx(5 / 7, abs=0.08)


def test_a_sample_is_the_same_in_any_share_of_the_batch(sampler):
    places = sampler.places(5, 4)
    together, alone = sampler.batch(places, 5), sampler.batch(places[2:3], 5, 2)
    for name, tensor in vars(alone).items():
        assert torch.equal(tensor[0], vars(together)[name][2]), name
    assert not torch.equal(sampler.batch(places, 6).noise, together.noise)


def test_some_captions_are_left_out(sampler):
    place = next(p for p in sampler.places(0, 4) + sampler.places(1, 4) if p.clip.name == "a")
    empty = sum(torch.equal(sampler.batch([place], step).text[0], sampler.texts[""].hidden[0]) for step in range(200))
    assert 5 < empty < 40


def test_too_few_chunks_are_said(small, tmp_path):
    for name in "abc":
        write_random_clip(tmp_path / "clips" / f"{name}.safetensors", 2)
    with pytest.raises(ValueError, match="3 chunks of the clips have a chunk before them and 4 are needed"):
        ClipSampler(open_data(tmp_path), {}, 3.0, 4, 0)


# --- what learns


@pytest.mark.parametrize("rank", [0, 2])
def test_only_the_chosen_parts_learn(small, rank):
    parts = ("actions", "self-attention") if rank else ("compressor", "actions", "self-attention")
    training = make(small, dataclasses.replace(FAST, rank=rank, parts=parts))
    before = {name: tensor.clone() for name, tensor in training.learner.state_dict().items()}
    for _ in range(3):
        training.step()
    changed = {name for name, tensor in training.learner.state_dict().items() if not torch.equal(tensor, before[name])}
    changed = {name.removeprefix("transformer.") for name in changed}
    assert changed == set(training.trained)
    starts = {"latent_encoder", "action_encoder", "blocks"} if not rank else {"action_encoder", "blocks"}
    assert {name.split(".")[0] for name in changed} == starts
    assert all(("lora_" in name) == bool(rank) for name in changed)
    assert all(".self_attn." in name for name in changed if name.startswith("blocks"))


def test_it_learns_what_it_sees(small):
    """The same few samples again and again: their loss falls."""
    training = make(small, dataclasses.replace(FAST, lr=3e-3))
    training.sampler.places = lambda step, count, places=training.sampler.places: places(1, count)
    training.sampler.batch = lambda places, step, first=0, batch=training.sampler.batch: batch(places, 1, first)
    losses = [training.step() for _ in range(15)]
    assert losses[-1] < 0.95 * losses[0]


def test_accumulated_samples_give_the_gradients_of_one_batch(small):
    losses = []
    for at_once in (1, 2, 4):
        training = make(small, dataclasses.replace(FAST, batch=4, at_once=at_once))
        losses.append([training.step() for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][0] != losses[0][1]


def test_a_rehearsal_changes_nothing(small):
    rehearsed, other = make(small), make(small)
    found = rehearsed.rehearse(4)
    assert found.chunks == 4 and found.seconds > 0 and "4 chunks of history" in str(found)
    assert [rehearsed.step() for _ in range(2)] == [other.step() for _ in range(2)]


def test_steps_that_are_not_finite_are_left_out(small, caplog):
    training = make(small)
    before = {name: parameter.detach().clone() for name, parameter in training.trained.items()}
    batch = training.sampler.batch
    training.sampler.batch = lambda *args: dataclasses.replace(batch(*args), noise=batch(*args).noise * torch.nan)
    training.step()
    assert "not finite" in caplog.text
    assert all(torch.equal(parameter, before[name]) for name, parameter in training.trained.items())


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"parts": ("head",)}, "unknown part 'head'"),
        ({"stage": 3}, "the stage is 1"),
        ({"batch": 0}, "batch must be 1 or more"),
        ({"lr": 2.0}, r"lr \(2.0\)"),
    ],
)
def test_settings_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)


def test_a_batch_that_cannot_be_shared_is_said(small):
    with pytest.raises(ValueError, match="a batch of 3 cannot be shared by 1 GPUs with 2 samples"):
        make(small, dataclasses.replace(FAST, batch=3, at_once=2))


# --- the run


@pytest.mark.parametrize("rank", [0, 2])
def test_interrupted_and_resumed_is_uninterrupted(small, tmp_path, rank):
    more = ["--lora-rank", rank] if rank else []
    assert command.main(options(small, tmp_path / "whole", "--steps", 4, "--every", 2, *more)) == 0
    assert command.main(options(small, tmp_path / "parts", "--steps", 2, "--every", 2, *more)) == 0
    assert command.main(options(small, tmp_path / "parts", "--steps", 4, "--every", 2, *more)) == 0
    whole, parts = (log_of(tmp_path / name, "step") for name in ("whole", "parts"))
    assert [line["loss"] for line in parts] == [line["loss"] for line in whole]
    assert [line["step"] for line in parts] == list(range(1, 5))
    reports = [log_of(tmp_path / name, "report") for name in ("whole", "parts")]
    assert [line["gap"] for line in reports[0]] == [line["gap"] for line in reports[1]]
    file = "lora.safetensors" if rank else "world.safetensors"
    ours, theirs = (read_tensors(tmp_path / name / file) for name in ("whole", "parts"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("rank", [0, 2])
def test_the_trained_model_films(small, tmp_path, rank):
    """What is saved is the averaged model: loading it gives its weights, and a film of a held-out walk is there."""
    config, _ = small
    more = ["--lora-rank", rank] if rank else []
    assert command.main(options(small, tmp_path / "run", "--steps", 2, "--every", 2, *more)) == 0
    world = infworld.load(tmp_path / "run" / "model.yaml", "cpu")
    assert world.config.name == "small-run"
    plain = infworld.load(config, "cpu").transformer.state_dict()
    parts = ("self-attention",) if rank else FAST.parts
    training = make(small, dataclasses.replace(FAST, rank=rank, parts=parts, warmup=20))
    training.load_state(RunFolder(tmp_path / "run", config).state())
    changed = {name for name, tensor in world.transformer.state_dict().items() if not torch.equal(tensor, plain[name])}
    assert changed and all(name.startswith(("blocks", "action", "latent")) for name in changed)
    batch = training.sampler.batch(training.sampler.places(0, 2), 0)
    noisy, level = batch.noise, torch.full((2,), 1000.0)
    with torch.no_grad(), training.averaged():
        expected = training.learner(noisy, level, batch)
        given = world.transformer(noisy, level, batch.history, batch.move, batch.view, batch.text, batch.mask)
    torch.testing.assert_close(given, expected, atol=2e-3, rtol=2e-3)  # the files are float16
    assert read_mp4(tmp_path / "run/films/step-000002.mp4").shape == (1 + 2 * CHUNK, 16, 32, 3)
    if rank:
        lora = Lora.load(tmp_path / "run/lora.safetensors")
        assert lora.model == "small" and lora.alpha == rank and lora.metadata["steps"] == "2"
        assert set(lora.layers) == {f"blocks.{i}.self_attn.{part}" for i in range(2) for part in "qkvo"}


def test_a_run_of_other_settings_does_not_go_on(small, tmp_path, capsys):
    assert command.main(options(small, tmp_path, "--steps", 1)) == 0
    assert command.main(options(small, tmp_path, "--steps", 2, "--seed", 5)) == 2
    assert "begun with seed 0 and not 5" in capsys.readouterr().err


def test_a_stopped_run_saves_and_goes_on(small, tmp_path, monkeypatch, capsys):
    """Ctrl-C after the second step: the step is finished and kept."""
    import signal

    step = Finetuning.step

    def interrupted(training):
        if training.step_number == 1:
            signal.raise_signal(signal.SIGINT)
        return step(training)

    with monkeypatch.context() as patch:
        patch.setattr(Finetuning, "step", interrupted)
        assert command.main(options(small, tmp_path, "--steps", 4)) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert command.main(options(small, tmp_path, "--steps", 4)) == 0
    assert [line["step"] for line in log_of(tmp_path, "step")] == [1, 2, 3, 4]


def test_a_dry_run_only_says_what_it_takes(small, tmp_path, capsys):
    assert command.main(options(small, tmp_path / "run", "--dry-run", "--stage", 2)) == 0
    said = capsys.readouterr().out
    assert "5 chunks of history" in said and "1 chunks of history" in said and "s a step" in said
    assert not log_of(tmp_path / "run", "step") and not (tmp_path / "run/state.pt").exists()


def test_the_benchmark_measures_every_part(small, tmp_path, capsys):
    from infworld.cli.benchmark import finetune as benchmark

    arguments = ["--model", str(small[0].source), "--histories", "1,4", "--lora-rank", "2"]
    assert benchmark.main([*arguments, "--out", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [figure["part"] for figure in figures] == [
        *["lora"] * 2,
        *["paper"] * 2,
        "distill, consistency",
        "distill, matching",
    ]
    assert [figure.get("history_chunks") for figure in figures[:4]] == [1, 4, 1, 4]
    assert all(figure["seconds_a_step"] > 0 for figure in figures)


def test_films_of_a_style_teach_it(small, tmp_path, capsys):
    """The experiment of the docs, whose clips are those of prepared videos: they fit, and a run of them is measured."""
    from infworld.training import own_style

    config, _ = small
    films = ["films", "--model", config.source, "--out", tmp_path / "style", "--places", 2, "--walks", 1, "--chunks", 4]
    own_style.main([str(word) for word in films])
    clips = open_data(tmp_path / "style", config)
    assert [clip.chunks for clip in clips] == [4, 4] and len({clip.info.source for clip in clips}) == 2
    assert command.main(options((config, tmp_path / "style"), tmp_path / "run", "--steps", 1)) == 0
    capsys.readouterr()
    own_style.main(["measure", "--places", "2", "--models", str(config.source), str(tmp_path / "run/model.yaml")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["same places"] * 2 + ["other places"] * 2
    assert all("error_right" in line and "return" in line for line in lines) and lines[0] != lines[1]


def test_a_full_disk_keeps_the_state_before(small, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path, small[0])
    folder.save({"step": 1, "average": {}})

    def full(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match="No space left on device; the one before is kept"):
        folder.save({"step": 2, "average": {}})
    assert folder.state()["step"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.yaml", "state.pt", "world.safetensors"]


def test_a_damaged_state_is_said(small, tmp_path):
    (tmp_path / "state.pt").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="state.pt is damaged: delete it to begin anew"):
        RunFolder(tmp_path, small[0]).state()


def test_curves_go_to_trackio_or_tensorboard(tmp_path, monkeypatch):
    """Whichever is installed, Trackio first."""
    import types

    heard = []
    fake = types.SimpleNamespace(
        init=lambda **kwargs: heard.append(kwargs["name"]),
        log=lambda values, step: heard.append((step, values)),
        finish=lambda: heard.append("end"),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: name == "trackio" or None)
    tracker = tracking.Tracker(tmp_path / "run")
    tracker.add(3, {"loss": 0.5})
    tracker.close()
    assert heard == ["run", (3, {"loss": 0.5}), "end"]
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    tracker = tracking.Tracker(tmp_path / "run")
    tracker.add(3, {"loss": 0.5})
    tracker.close()
    assert len(heard) == 3
