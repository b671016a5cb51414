"""A session is a value that carries on exactly; a damaged file is refused with a plain reason."""

import dataclasses
import json
import multiprocessing
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
from conftest import SMALL_MODEL, make_small_model
from sessions import assert_same_chunk, rewrite, same_state, state, values

import infworld
from infworld.actions import ActionScript
from infworld.checkpoint import read_metadata, read_tensors, save_tensors
from infworld.session import Session, check_session
from infworld.settings import FilmSettings
from infworld.vae import FeatureCache
from infworld.world import Chunk

ACTIONS = ActionScript.parse("forward 100, left+back 50")


@pytest.fixture(scope="module")
def begun(world, picture) -> Session:
    """A film of one frame, the picture."""
    return world.start(picture, ACTIONS, "a meadow", seed=3)


@pytest.fixture(scope="module")
def film(world, begun) -> list[Chunk]:
    """The film's first three chunks: 241 frames."""
    return list(world.extend(begun, 3))


@pytest.fixture(scope="module")
def session(film) -> Session:
    """The film after two chunks; `film[2]` is what comes next."""
    return film[1].session


# ------------------------------------------------------------------------------------------------- a session is a value


def test_the_next_chunk_leaves_its_session_as_it_was(world, session):
    before, plain = state(session), values(session)
    world.next_chunk(session)
    assert same_state(state(session), before) and values(session) == plain
    with pytest.raises(dataclasses.FrozenInstanceError):
        session.settings = None


def test_a_session_is_on_the_cpu_and_holds_no_more_than_it_must(session):
    assert all(tensor.device.type == "cpu" and not tensor.requires_grad for tensor in state(session).values())
    assert all(z.dtype == torch.float16 for z in session.chunk_latents)
    tensors = [session.history, *session.encoder_state.values(), *session.chunk_latents]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


def test_a_saved_session_gives_the_identical_next_chunk(world, session, film, tmp_path):
    session.save(tmp_path / "new" / "film.safetensors")
    loaded = Session.load(tmp_path / "new" / "film.safetensors")
    assert same_state(state(loaded), state(session)) and values(loaded) == values(session)
    assert_same_chunk(world.next_chunk(loaded), film[2])


def test_a_film_of_one_frame_can_be_saved(world, begun, film, tmp_path):
    begun.save(tmp_path / "film.safetensors")
    assert_same_chunk(world.next_chunk(Session.load(tmp_path / "film.safetensors")), film[0])


def test_a_session_that_is_read_while_it_is_saved_is_one_or_the_other(film, tmp_path):
    """The file of a film in the making, which another program reads."""
    path = tmp_path / "film.safetensors"
    sessions = {chunk.session.num_frames: chunk.session for chunk in film}
    film[0].session.save(path)
    enough = threading.Event()

    def go_on() -> None:
        while not enough.is_set():
            for session in sessions.values():
                session.save(path)

    saving = threading.Thread(target=go_on)
    saving.start()
    try:
        for _ in range(500):
            loaded = Session.load(path)
            assert same_state(state(loaded), state(sessions[loaded.num_frames]))
            assert read_tensors(path).keys() >= {"history", "picture"}
            assert read_metadata(path).keys() == {"format", "session"}
    finally:
        enough.set()
        saving.join()


def continue_elsewhere(model: str, pickled: bytes, threads: int) -> bytes:
    torch.set_num_threads(threads)  # another number of threads rounds otherwise
    return pickle.dumps(infworld.load(model, device="cpu").next_chunk(pickle.loads(pickled)))


def test_another_process_makes_the_same_chunk(small_model, session, film):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        task = (str(small_model), pickle.dumps(session), torch.get_num_threads())
        assert_same_chunk(pickle.loads(pool.apply(continue_elsewhere, task)), film[2])


# ------------------------------------------------------------------------------------------------------- wrong sessions


@pytest.fixture
def saved(begun, film, tmp_path) -> Path:
    path = tmp_path / "film.safetensors"
    film[0].session.save(path)
    return path


@pytest.mark.parametrize("keep", [0, 7, 500, -100])
def test_a_truncated_session_is_named(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ValueError, match="^film.safetensors is (empty|truncated)"):
        Session.load(saved)


def test_files_that_are_no_session_are_named(small_model, picture, tmp_path):
    with pytest.raises(FileNotFoundError, match="no session file at .*gone.safetensors"):
        Session.load(tmp_path / "gone.safetensors")
    with pytest.raises(ValueError, match="world.safetensors is not a session file of this program"):
        Session.load(small_model.parent / "world.safetensors")
    with pytest.raises(ValueError, match="truncated or not a session file"):
        Session.load(picture)
    shutil.copy(picture, tmp_path / "picture.safetensors")
    with pytest.raises(ValueError, match="^picture.safetensors is truncated or not a session file"):
        Session.load(tmp_path / "picture.safetensors")
    with pytest.raises(FileNotFoundError, match="gone.safetensors"):
        Session.load(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("name", ["history", "picture", "generator_state"])
def test_a_session_file_that_lacks_a_tensor_is_refused(saved, name):
    rewrite(saved, tensors=lambda t: {key: value for key, value in t.items() if key != name})
    with pytest.raises(ValueError, match=f"^the session file film.safetensors is damaged: it has no {name}"):
        Session.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        *({name: None} for name in ("model", "prompt", "negative_prompt", "seed", "steps", "guidance", "num_frames")),
        {"seed": "3"},
        {"guidance": [1]},
        {"actions": None},
        {"actions": [[0, 0]]},
        {"actions": [[0, 99, 5]]},
        {"unknown": 1},
    ],
)
def test_a_session_file_with_wrong_values_is_refused(saved, change):
    rewrite(saved, values=lambda v: {**v, **change})
    with pytest.raises(ValueError, match="^the session file film.safetensors is damaged"):
        Session.load(saved)


@pytest.mark.parametrize("content", [None, [], "x", {}])
def test_a_session_file_without_its_fields_is_refused(saved, content):
    rewrite(saved, values=lambda v: content)
    with pytest.raises(ValueError, match="^the session file film.safetensors is damaged: it lacks fields"):
        Session.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"history": lambda t: t[:, :, :-1]}, "its history is .*20, 4, 6.* and not .*21, 4, 6"),
        ({"history": lambda t: t[:, :8]}, "its history"),
        ({"picture": lambda t: t[:, :16]}, "its picture is .* and not .*32, 48, 3"),
        ({"picture": lambda t: t[0]}, "its picture"),
        ({"chunk_latents.0": lambda t: t[:, :, :5]}, "its chunks have 4 latents for 20"),
    ],
)
def test_a_session_that_is_inconsistent_is_refused(world, saved, change, message):
    rewrite(saved, tensors=lambda t: t | {name: to(t[name]) for name, to in change.items()})
    with pytest.raises(ValueError, match=f"damaged: {message}"):
        world.next_chunk(Session.load(saved))


def test_a_session_with_a_wrong_count_is_refused(world, session):
    wrong = dataclasses.replace(session, num_frames=81)
    for use in (world.next_chunk, lambda s: list(world.extend(s, 1)), lambda s: list(world.replay(s))):
        with pytest.raises(ValueError, match="damaged: 2 chunks do not make 81 frames"):
            use(wrong)


def test_a_session_of_another_model_is_refused(world, session):
    with pytest.raises(ValueError, match="made with the model 'huge', but 'small' is loaded"):
        world.next_chunk(dataclasses.replace(session, model="huge"))


def test_a_model_with_another_vae_continues_its_saved_films(tmp_path, picture):
    """Latents of another number of channels, and squares of pixels that its VAE takes as one."""
    vae = {**SMALL_MODEL["vae_cfg"], "z_dim": 24, "fold": 2, "dim_mult": [1, 2, 4]}
    vae |= {"latents_mean": [0.0] * 24, "latents_std": [1.0] * 24}
    sizes = {**SMALL_MODEL["model_cfg"], "in_channels": 28, "out_channels": 24, "memory_hidden_dim": 64}
    world = infworld.load(make_small_model(tmp_path, {**SMALL_MODEL, "vae_cfg": vae, "model_cfg": sizes}), "cpu")
    first, second = world.extend(world.start(picture, "right 160"), 2)
    assert second.frames.shape == (80, 32, 48, 3)
    first.session.save(tmp_path / "film.safetensors")
    assert_same_chunk(world.next_chunk(Session.load(tmp_path / "film.safetensors")), second)


def test_a_session_of_an_earlier_model_of_that_name_is_refused(world, session):
    config = dataclasses.replace(world.config, buckets=((64, 96),))
    with pytest.raises(ValueError, match="pictures have 32x48 pixels, but 'small' makes pictures of 64x96: an earlier"):
        check_session(session, config)
    larger = dataclasses.replace(session, picture=session.picture.repeat(2, axis=1).repeat(2, axis=2))
    with pytest.raises(ValueError, match="pictures have 64x96 pixels, but 'small' makes pictures of 32x48"):
        check_session(larger, world.config)


@pytest.mark.parametrize("name", ["film.txt", "film", "taken/film.safetensors"])
def test_a_session_that_cannot_be_written_says_so(begun, tmp_path, name):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ValueError, match="saved as .safetensors|cannot write"):
        begun.save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


# ------------------------------------------------------------------------------------------------ every kind of damage


def number(name: str, value: float):
    """Damage: one number of a tensor."""

    def change(tensors: dict) -> dict:
        tensor = tensors[name].clone()
        tensor.view(-1)[-1] = value
        return tensors | {name: tensor}

    return change


def damages(tensors: dict[str, torch.Tensor]) -> dict[str, object]:
    """By what it is: changes of a session file's tensors, each of which makes the session invalid."""
    found = {"extra": lambda t: t | {"more": torch.zeros(1)}}
    found["extra encoder tensor"] = lambda t: t | {"encoder_state.features99": torch.zeros(1, 2, 4, 6, 8)}
    found["extra chunk"] = lambda t: t | {"chunk_latents.1": t["chunk_latents.0"]}
    found["chunk's number"] = lambda t: t | {"chunk_latents.x": t["chunk_latents.0"]}
    for name, tensor in tensors.items():
        found[f"{name} missing"] = lambda t, name=name: {key: value for key, value in t.items() if key != name}
        found[f"{name} empty"] = lambda t, name=name: t | {name: t[name][:0].clone()}
        found[f"{name} int64"] = lambda t, name=name: t | {name: t[name].long()}
        if tensor.dim() == 5:
            for axis in range(5):
                found[f"{name} axis {axis}"] = lambda t, name=name, axis=axis: (
                    t | {name: torch.cat([t[name]] * 2, axis)}
                )
        if tensor.is_floating_point():
            for value in (float("nan"), float("inf"), -float("inf")):
                found[f"{name} {value}"] = number(name, value)
    return found


def refusal(path: Path, config) -> str | None:
    """What is said of a session file, if it is refused."""
    try:
        check_session(Session.load(path), config)
    except ValueError as error:
        return str(error)
    return None


def test_every_damage_of_a_tensor_is_refused(world, film, tmp_path):
    path = tmp_path / "whole.safetensors"
    film[0].session.save(path)
    tensors, metadata = read_tensors(path), read_metadata(path)
    assert refusal(path, world.config) is None
    for what, damage in damages(tensors).items():
        path = tmp_path / "damaged.safetensors"
        save_tensors(path, damage(tensors), metadata)
        message = refusal(path, world.config)
        assert message and "damaged: " in message, what
        assert str(tmp_path) not in message and "Error" not in message and len(message) < 300, (what, message)


OTHER = (None, True, -1, 0, 2.5, 10**30, 1e300, float("nan"), float("inf"), "x" * 5000, [], {}, [[0, 0, 10**12]])
VALID = {("seed", 0), ("guidance", 0), ("guidance", 2.5), ("guidance", -1), ("actions", "[]")}


def test_every_damage_of_a_value_is_refused(world, film, tmp_path):
    path = tmp_path / "damaged.safetensors"
    film[0].session.save(path)
    tensors, metadata = read_tensors(path), read_metadata(path)
    plain = json.loads(metadata["session"])
    for name in plain:
        for value in OTHER:
            session = json.dumps(plain | {name: value})
            save_tensors(path, tensors, metadata | {"session": session})
            message = refusal(path, world.config)
            allowed = value is not True and (name, value if isinstance(value, int | float) else str(value)) in VALID
            assert (message is None) == allowed, (name, value)
            if message and name != "model":  # which is a valid name, but of another model
                assert str(tmp_path) not in message and len(message) < 300, message


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, "[]" * 10**6, '{"actions": [' + ",".join(["[0,0,1]"] * 10**6) + "]}"],
    ids=["empty", "open", "deep", "long", "million"],
)
def test_settings_that_are_not_json_or_too_long_are_refused(saved, text):
    save_tensors(saved, read_tensors(saved), read_metadata(saved) | {"session": text})
    with pytest.raises(ValueError, match="damaged: its settings are not valid JSON or too long"):
        Session.load(saved)


def test_a_state_of_an_earlier_version_is_taken(world, begun, film):
    """It has the features of all layers in place of the last frames."""
    video = torch.from_numpy(film[0].frames).movedim(-1, 0).unsqueeze(0).float() / 127.5 - 1
    cache = FeatureCache()
    with torch.inference_mode():
        world.vae.encoder(video.movedim(1, -1), cache)
    check_session(dataclasses.replace(film[0].session, encoder_state=cache.state), world.config)
    few = dict(list(cache.state.items())[:-1])
    with pytest.raises(ValueError, match="its encoder state has no features"):
        check_session(dataclasses.replace(film[0].session, encoder_state=few), world.config)


# ------------------------------------------------------------------------------------------------------------- settings


def test_other_settings_are_for_the_frames_to_come(film):
    session = film[0].session
    script = ActionScript.parse("left 100, down 60")
    settings = FilmSettings(script, "night", "fog", seed=99, steps=1, guidance=2, preset="fast")
    changed = session.with_settings(settings)
    assert changed.settings.actions.text() == "forward 80, left 20, down 60"
    assert changed.settings == dataclasses.replace(settings, actions=changed.settings.actions, seed=3)
    assert same_state(state(changed), state(session))


def test_the_models_own_values_are_the_defaults(world):
    sampler = world.config.val_scheduler_cfg
    settings = FilmSettings.for_model(world.config, "forward 3")
    assert settings == FilmSettings(
        ActionScript.parse("forward 3"), "", world.config.negative_prompt, 0, sampler.num_sampling_steps,
        sampler.text_cfg_scale, sampler.preset,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "the prompt must be text, not None"),
        ({"negative_prompt": 5}, "the negative prompt must be text, not 5"),
        ({"prompt": "x" * 1001}, "at most 1000 characters, not 1001"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
        ({"seed": True}, "the seed must be"),
        ({"seed": "5"}, "the seed must be a whole number from 0 to 9223372036854775807, not '5'"),
        ({"steps": 101}, "steps must be a whole number from 1 to 100, not 101"),
        ({"steps": None}, "steps must be"),
        ({"guidance": 100.5}, "guidance must be from -100 to 100, not 100.5"),
        ({"guidance": 1e300}, "guidance must be from -100 to 100, not 1e"),
        ({"guidance": None}, "guidance must be a finite number, not None"),
        ({"preset": ["fast"]}, "unknown preset"),
        ({"actions": "forward 80"}, "actions must be an ActionScript, not str"),
    ],
)
def test_settings_beyond_the_limits_are_refused(begun, change, message):
    with pytest.raises(ValueError, match=message):
        begun.replace_settings(**change)
