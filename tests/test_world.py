"""The story: same seed, same film; a session carries on exactly; what ends a call costs nothing made before."""

import copy
import dataclasses
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sessions import assert_same_chunk, same_state, state

import infworld
from infworld.actions import ActionScript
from infworld.devices import pick_device, pick_threads, pick_vae_dtype
from infworld.pictures import prepare_image, to_uint8
from infworld.session import Session
from infworld.settings import MAX_SEED, MAX_STEPS
from infworld.text import TextEmbedding, load_text_encoder
from infworld.training.render import render
from infworld.training.worlds import EVAL_SEEDS, make_worlds, spawn
from infworld.world import Chunk, World

ROOT = Path(__file__).parent.parent
ACTIONS = ActionScript.parse("forward 100, left+back 50")
STAGES = ("text", "memory", "sample", "decode")


@pytest.fixture(scope="module")
def begun(world, picture) -> Session:
    """A film of one frame, the picture."""
    return world.start(picture, ACTIONS, "a meadow", seed=3)


@pytest.fixture(scope="module")
def told() -> list:
    """Every Progress of `film`."""
    return []


@pytest.fixture(scope="module")
def film(world, begun, told) -> list[Chunk]:
    """The film's first three chunks: 241 frames."""
    return list(world.extend(begun, 3, told.append))


@pytest.fixture(scope="module")
def session(film) -> Session:
    """The film after two chunks; `film[2]` is what comes next."""
    return film[1].session


# ------------------------------------------------------------------------------------------------------------- the film


def test_chunks_are_the_picture_and_80_frames_and_then_80_frames(film, begun):
    assert [chunk.frames.shape for chunk in film] == [(81, 32, 48, 3), (80, 32, 48, 3), (80, 32, 48, 3)]
    assert all(chunk.frames.dtype == np.uint8 for chunk in film)
    assert np.array_equal(film[0].frames[0], begun.picture[0])
    assert [chunk.index for chunk in film] == [0, 1, 2]
    assert [chunk.session.num_frames for chunk in film] == [81, 161, 241]
    assert [chunk.session.history.shape[2] for chunk in film] == [21, 41, 61]
    assert all(chunk.latents.shape == (1, 16, 21, 4, 6) for chunk in film)


def test_rollout_is_a_start_and_its_chunks(world, picture, film):
    chunks = list(world.rollout(picture, ACTIONS, "a meadow", num_frames=161, seed=3))
    assert len(chunks) == 2
    for ours, theirs in zip(chunks, film, strict=False):
        assert_same_chunk(ours, theirs)


def test_same_seed_same_chunk_and_another_seed_another(world, session, film):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    assert_same_chunk(world.next_chunk(session), film[2])
    assert torch.equal(torch.get_rng_state(), before)  # the noise is the session's own
    assert not torch.equal(world.next_chunk(session.with_seed(4)).latents, film[2].latents)


def test_chunks_of_a_film_have_different_noise(film):
    assert not torch.equal(film[1].latents, film[2].latents)
    assert not torch.equal(film[0].session.generator_state, film[1].session.generator_state)


def test_given_noise_takes_the_place_of_the_sessions_own(world, session, film):
    generator = torch.Generator()
    generator.set_state(session.generator_state)
    noise = torch.randn(1, 16, 21, 4, 6, generator=generator)
    assert torch.equal(world.next_chunk(session, noise=noise).latents, film[2].latents)
    assert not torch.equal(world.next_chunk(session, noise=-noise).latents, film[2].latents)


@torch.inference_mode()
def test_the_streamed_history_equals_encoding_every_frame_again(world, picture, film):
    parts = [prepare_image(picture, world.config.buckets)]
    parts += [world.vae.decode(chunk.latents)[:, :, 1:] for chunk in film]
    video = torch.cat(parts, dim=2)
    assert np.array_equal(to_uint8(video), np.concatenate([chunk.frames for chunk in film]))
    whole, _ = world.vae.encode(video)
    streamed = film[-1].session.history
    assert (streamed - whole).abs().max() < 1e-4 * whole.abs().max()


def test_replay_is_the_film_within_one_level(world, film):
    replayed = list(world.replay(film[-1].session))
    assert [chunk.index for chunk in replayed] == [0, 1, 2]
    for again, chunk in zip(replayed, film, strict=True):
        assert again.frames.shape == chunk.frames.shape
        assert np.abs(again.frames.astype(int) - chunk.frames).max() <= 1
    assert list(world.replay(world.start(film[0].frames[0]))) == []


def test_interleaved_films_do_not_meet(world, begun, film):
    chunks = world.extend(begun, 2)
    next(chunks)
    world.next_chunk(begun.with_seed(99).with_prompt("a desert"))
    assert_same_chunk(next(chunks), film[1])


# --------------------------------------------------------------------------------------------- settings reach the model


def test_actions_of_this_chunk_reach_the_model_and_no_others(world, session, film):
    """The chunk after frame 161 is told the actions 160 to 240 (spec section 9)."""
    pairs = ACTIONS.pairs(0, 400)

    def latents(*changed: int) -> torch.Tensor:
        script = ActionScript.from_pairs((4, 4) if frame in changed else pair for frame, pair in enumerate(pairs))
        return world.next_chunk(session.replace_settings(actions=script)).latents

    assert torch.equal(latents(0, 80, 159, 241, 399), film[2].latents)
    assert not torch.equal(latents(160), film[2].latents)
    assert not torch.equal(latents(240), film[2].latents)


def test_new_actions_are_for_the_frames_to_come(world, film):
    changed = film[0].session.with_actions("right 30")
    assert changed.settings.actions.text() == "forward 80, right 30"
    assert same_state(state(changed), state(film[0].session))
    assert not torch.equal(world.next_chunk(changed).latents, film[1].latents)


def test_a_short_script_is_padded_with_doing_nothing(world, session, film):
    assert len(session.settings.actions) == 150 < session.num_frames
    padded = session.replace_settings(actions=session.settings.actions.cut(500))
    assert torch.equal(world.next_chunk(padded).latents, film[2].latents)


def test_prompts_reach_the_model(world, session, film):
    other = session.with_prompt("a city at night")
    assert (other.settings.prompt, other.settings.negative_prompt) == (
        "a city at night",
        session.settings.negative_prompt,
    )
    assert session.with_prompt("", "blur").settings.negative_prompt == "blur"
    assert not torch.equal(world.next_chunk(other).latents, film[2].latents)


def test_guidance_1_needs_no_negative_prompt_and_more_goes_away_from_it(world, session, film):
    assert session.settings.guidance == 1
    assert torch.equal(world.next_chunk(session.with_prompt("a meadow", "blur")).latents, film[2].latents)
    guided = session.replace_settings(guidance=3.0)
    assert torch.equal(world.next_chunk(guided.with_prompt("a meadow", "a meadow")).latents, film[2].latents)
    away = [world.next_chunk(guided.with_prompt("a meadow", negative)).latents for negative in ("blur", "a desert")]
    assert not torch.equal(away[0], film[2].latents) and not torch.equal(away[0], away[1])


def test_a_network_of_the_other_sign_makes_the_same_film_with_the_flag_off(world, session, film):
    scheduler = dataclasses.replace(world.config.val_scheduler_cfg, use_reversed_velocity=False)
    config = dataclasses.replace(world.config, val_scheduler_cfg=scheduler)
    negated = copy.deepcopy(world.transformer)
    for parameter in negated.head.head.parameters():
        parameter.data.neg_()
    text_encoder = load_text_encoder(config, world.device, world.transformer.dtype)
    other = World(config, negated, world.vae, text_encoder)
    # Not bit for bit: copied weights lie otherwise in memory than mapped ones, and a CPU's matrix products mind that.
    torch.testing.assert_close(other.next_chunk(session).latents, film[2].latents, atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------------------- progress and interruption


def test_progress_goes_forward_and_says_where_it_stands(film, told):
    assert [(p.chunk, p.stage, p.step) for p in told] == [
        (chunk, stage, step)
        for chunk in (1, 2, 3)
        for stage, step in (("text", 0), ("memory", 0), ("sample", 1), ("sample", 2), ("decode", 2))
    ]
    assert {(p.chunks, p.steps, p.total_frames) for p in told} == {(3, 2, 241)}
    assert [p.frames for p in told] == [1] * 5 + [81] * 5 + [161] * 5
    assert all(before.seconds <= after.seconds for before, after in zip(told, told[1:], strict=False))


def test_the_time_left_goes_to_nearly_nothing(told):
    remaining = [p.remaining for p in told]
    assert remaining[:2] == [None, None]
    assert all(left is not None and left >= 0 for left in remaining[2:])
    assert remaining[-1] < 0.25 * told[-1].seconds  # what is left then is to encode the last of three chunks
    assert remaining[-1] < remaining[7]  # in the second chunk, when each stage had been seen once


def test_progress_of_one_chunk_counts_the_frames_before_it(world, session):
    told = []
    world.next_chunk(session, told.append)
    assert {(p.chunk, p.chunks, p.frames, p.total_frames) for p in told} == {(1, 1, 161, 241)}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("stage", STAGES)
def test_what_a_callback_raises_ends_the_call_and_loses_nothing(world, session, stage, error):
    def stop(progress):
        if progress.stage == stage:
            raise error("enough")

    before = state(session)
    with pytest.raises(error, match="enough"):
        world.next_chunk(session, stop)
    assert same_state(state(session), before)


def test_a_stopped_film_goes_on_from_its_last_chunk(world, begun, film):
    def stop(progress):
        if progress.chunk == 2 and progress.stage == "sample":
            raise KeyboardInterrupt

    made = []
    with pytest.raises(KeyboardInterrupt):
        for chunk in world.extend(begun, 3, stop):
            made.append(chunk)  # what came before the interruption is kept
    assert len(made) == 1
    assert_same_chunk(made[0], film[0])
    assert_same_chunk(world.next_chunk(made[0].session), film[1])


# --------------------------------------------------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frames": 0}, "at least 81 frames"),
        ({"num_frames": -80}, "at least 81 frames"),
        ({"num_frames": 100}, "81 or 161 frames, not 100"),
        ({"num_frames": 8001}, "at most 4001 frames"),
        ({"num_frames": 161.0}, "must be a whole number"),
        ({"seed": -1}, f"the seed must be a whole number from 0 to {MAX_SEED}, not -1"),
        ({"seed": MAX_SEED + 1}, "the seed must be"),
        ({"seed": 1.5}, "the seed must be .*, not 1.5"),
        ({"seed": "7"}, "the seed must be .*, not '7'"),
        ({"steps": 0}, "steps must be a whole number from 1 to 100, not 0"),
        ({"steps": MAX_STEPS + 1}, "steps must be"),
        ({"steps": 2.5}, "steps must be"),
        ({"guidance": math.nan}, "guidance must be a finite number, not nan"),
        ({"guidance": math.inf}, "guidance must be"),
        ({"guidance": "high"}, "guidance must be a finite number, not 'high'"),
        ({"actions": "fly 80"}, "unknown action 'fly'"),
        ({"actions": {"move": "no-op"}}, "actions must be a list"),
        ({"image": np.zeros((1, 1, 3), np.uint8)}, "1 x 1 pixels"),
        ({"image": Image.new("RGB", (20_000, 20))}, "20000 x 20 pixels"),
        ({"image": __file__}, "not a picture"),
        ({"image": None}, "not NoneType"),
    ],
)
def test_bad_wishes_are_refused_before_anything_is_computed(world, picture, monkeypatch, settings, message):
    monkeypatch.setattr(World, "encode", lambda *_: pytest.fail("encoded"))
    with pytest.raises(ValueError, match=message):
        world.rollout(**{"image": picture, **settings})


def test_largest_and_smallest_wishes_are_taken(world, picture):
    for seed in (0, MAX_SEED):
        assert world.start(picture, seed=seed, steps=1, guidance=0).settings.guidance == 0.0
    with pytest.raises(ValueError, match="the seed must be"):
        world.start(picture).with_seed(-1)


def test_a_picture_is_the_same_from_every_source(world, picture):
    image = Image.open(picture)
    histories = [world.start(source).history for source in (picture, str(picture), image, np.asarray(image))]
    assert all(torch.equal(history, histories[0]) for history in histories)


def test_an_upright_picture_gets_an_upright_film(world):
    assert world.start(Image.new("RGB", (40, 70), "teal")).picture.shape == (1, 48, 32, 3)


def test_the_defaults_are_the_models_own(world, picture):
    session = world.start(picture)
    scheduler = world.config.val_scheduler_cfg
    assert (session.settings.steps, session.settings.guidance) == (
        scheduler.num_sampling_steps,
        scheduler.text_cfg_scale,
    )
    assert session.settings.negative_prompt == world.config.negative_prompt
    assert world.start(picture, negative_prompt="").settings.negative_prompt == ""


# -------------------------------------------------------------------------------------------------------------- loading


@pytest.fixture
def copied(small_model, tmp_path) -> Path:
    """A copy of the small model, to be damaged."""
    return Path(shutil.copytree(small_model.parent, tmp_path / "model")) / small_model.name


@pytest.mark.parametrize("name", ["world", "vae", "text"])
def test_weights_that_are_missing_truncated_or_foreign_are_named(copied, name):
    weights = copied.parent / f"{name}.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{weights} is truncated or not a safetensors checkpoint"):
        infworld.load(copied)
    other = {"world": "vae", "vae": "text", "text": "world"}[name]
    shutil.copy(copied.parent / f"{other}.safetensors", weights)
    with pytest.raises(ValueError, match=f"{weights} does not fit the model.*missing: .*extra: "):
        infworld.load(copied)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=f"no weight file at .*{name}.safetensors"):
        infworld.load(copied)


def test_weights_of_other_sizes_are_named(copied):
    settings = yaml.safe_load(copied.read_text())
    settings["model_cfg"]["ffn_dim"] += 1
    copied.write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=r"misshapen: blocks.0.ffn.0.weight is \(96, 48\) instead of \(97, 48\)"):
        infworld.load(copied)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "mps", "meta", "cuda:99", ""])
def test_devices_that_are_not_there_are_named(small_model, device):
    with pytest.raises(ValueError, match=f"device '{device}'.*use auto"):
        infworld.load(small_model, device=device)


def test_auto_takes_what_is_there(small_model):
    world = infworld.load(small_model)
    assert world.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_films_texts_are_encoded_together_and_once(world, picture):
    """A large text encoder is loaded for them, and perhaps dropped afterwards."""
    asked = []

    class Encoder:
        def encode(self, texts: list[str]):
            asked.append(list(texts))
            hidden = torch.randn(len(texts), 8, world.config.text_encoder_cfg.dim)
            return TextEmbedding(hidden, torch.ones(len(texts), 8, dtype=torch.long))

    other = World(world.config, world.transformer, world.vae, Encoder())
    list(other.rollout(picture, prompt="a meadow", num_frames=161, steps=1, guidance=3, negative_prompt="fog"))
    assert asked == [["a meadow", "fog"]]


@pytest.mark.parametrize(("name", "expected"), [("auto", 1), ("cuda", 1), ("cuda:0", 0)])
def test_a_gpu_is_picked_with_its_number(name, expected, monkeypatch):
    """Torch asks for it where a process's memory is limited."""
    for asked, answer in {"is_available": True, "device_count": 2, "current_device": 1}.items():
        monkeypatch.setattr(torch.cuda, asked, lambda answer=answer: answer)
    assert pick_device(name) == torch.device("cuda", expected)


def test_the_vae_is_rounded_where_the_transformer_is_but_never_to_float16():
    assert pick_vae_dtype(torch.bfloat16) == torch.bfloat16
    assert pick_vae_dtype(torch.float16) == pick_vae_dtype(torch.float32) == torch.float32


def test_unknown_models_are_named():
    with pytest.raises(ValueError, match="unknown model 'huge'"):
        infworld.load("huge")
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = infworld.lode


def test_importing_the_package_is_quick_and_needs_no_torch():
    code = (
        "import sys, time; start = time.perf_counter(); import infworld; seconds = time.perf_counter() - start;"
        "heavy = {'torch', 'numpy', 'transformers', 'diffusers', 'gradio', 'imageio_ffmpeg'} & set(sys.modules);"
        "print(sorted(heavy), seconds < 2)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["[]", "True"], done.stderr
    assert all(getattr(infworld, name) for name in infworld.__all__)


# ---------------------------------------------------------------------------------------------------- the shipped model


@pytest.fixture(scope="module")
def tiny() -> World:
    return infworld.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    """A picture of the worlds that the shipped model knows, one it was not trained on."""
    worlds = make_worlds(EVAL_SEEDS[:1])
    return render(worlds, spawn(worlds)[:, None], supersample=1)[0, 0].numpy()


def drift(frames: np.ndarray, gap: int = 4, reach: int = 16) -> float:
    """How far the picture moves to the right in `gap` frames, in pixels: the median of the best whole shifts."""
    grey = frames.astype(np.float32).mean(axis=-1)
    middle = slice(reach, grey.shape[2] - reach)

    def shift(before: np.ndarray, after: np.ndarray) -> int:
        errors = {s: np.square(np.roll(before, s, axis=1) - after)[:, middle].mean() for s in range(-reach, reach + 1)}
        return min(errors, key=errors.get)

    return float(np.median([shift(grey[t], grey[t + gap]) for t in range(0, len(grey) - gap, gap)]))


def test_the_shipped_model_turns_as_it_is_told(tiny, scene):
    """A quarter turn in 80 frames moves a picture of 128 pixels, half the model's, by some 7 pixels every 4 frames."""
    left, right = (
        drift(tiny.next_chunk(tiny.start(scene, f"{turn} 80", steps=2)).frames[:61, ::2, ::2])
        for turn in ("left", "right")
    )
    assert 4 <= left <= 10
    assert -10 <= right <= -4


@pytest.mark.parametrize(
    ("quota", "threads"),
    [("200000 100000", 2), ("20000 100000", 1), ("9900000 100000", 8), ("max 100000", 8), ("", 8)],
)
def test_a_container_gets_the_threads_that_it_has_time_for(quota, threads, tmp_path):
    (tmp_path / "cpu.max").write_text(quota)
    assert pick_threads(8, tmp_path / "cpu.max") == threads
    assert pick_threads(8, tmp_path / "gone") == 8
