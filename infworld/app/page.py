"""The page: choose a picture, plan a walk, watch the film while it is made. Start it with `python app.py`.

`--model` or INFWORLD_MODEL name the model; its weights are downloaded if they are not there. Without a choice it is
the released one where its weights are and a GPU that it fits on (24 GB), else the small one that comes along.
`torchrun --nproc-per-node N app.py` films on N GPUs of this machine.

Layout and handlers; what they do is in `ui/studio.py`. What a person makes lives in a folder of its own, of which the
page keeps only the path.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import logging
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import spaces  # noqa: F401  (patches torch on a ZeroGPU Space, so before anything touches CUDA)
from PIL import Image

from infworld import parallel
from infworld.actions import ActionScript
from infworld.app import status
from infworld.app.drive import Drive, driven
from infworld.app.editor import ActionEditor, script_of
from infworld.app.films import Film, FilmStore
from infworld.app.gallery import Gallery, find_examples
from infworld.app.memory_check import memory_check
from infworld.app.model_pool import ModelPool, SingleModelPool
from infworld.app.picture import Picture
from infworld.app.player import FilmPlayer, film_value, still_value
from infworld.app.studio import Job, Loading, RunProgress, Studio
from infworld.app.team import follow
from infworld.camera import STEP, TURN_DEGREES
from infworld.config import PROJECT_ROOT, ModelConfig
from infworld.devices import device_name, pick_device
from infworld.models import available, default_model, prepare
from infworld.pictures import crop_image
from infworld.presets import PRESETS, find_preset
from infworld.session import Session
from infworld.settings import MAX_PROMPT, MAX_STEPS, FilmSettings
from infworld.world import Chunk, World

log = logging.getLogger(__name__)

STATIC = Path(__file__).resolve().parent / "static"
EXAMPLES = PROJECT_ROOT / "examples"
FILMS = Path(tempfile.gettempdir()) / "infinite-world-films"
LIFETIME = 2 * 3600  # seconds that a film is kept after the last change to it
UPLOADS_LIFETIME = 12 * 3600  # seconds; longer than a full queue, as a program's picture is read when its turn comes
UPLOAD_ROOM = 100 * 2**20  # bytes of an upload that any model allows: enough for every picture that is accepted
MAX_QUEUE = 64
RANDOM_SEEDS = 2**31  # short enough to write down

MEMORY_HINT = (
    '<div class="memory"><p>When the film comes back to a view, its first look and its return are shown here side by '
    "side. Try the plan <em>Look around</em> or <em>Walk and return</em>.</p></div>"
)

Update = dict[Any, Any]


def plainly(handler: Callable) -> Callable:
    """A handler whose ValueErrors and file errors are shown to the person as they are worded."""

    @functools.wraps(handler)
    def wrapped(*args: Any) -> Any:
        try:
            return handler(*args)
        except (ValueError, OSError) as error:
            raise gr.Error(_sentence(error), print_exception=False) from error

    return wrapped


class Page:
    """The page's parts and handlers. A handler takes the values of parts and returns updates by part."""

    def __init__(self, studio: Studio):
        self.studio = studio
        self.models = studio.models
        self.config = self.models.config(self.models.first)  # the page is laid out for the first model's lengths
        self.examples = find_examples(EXAMPLES)

    def blocks(self) -> gr.Blocks:
        """The whole page, ready to launch."""
        with gr.Blocks(title="Infinite-World", fill_width=True, delete_cache=(3600, UPLOADS_LIFETIME)) as blocks:
            self.film = gr.State(None)  # a Film
            self.job = gr.State(None)  # a Job: what the run that is on has to do
            self.outcome = gr.State("")  # of the last run: "done", "stopped", or what went wrong
            self._header()
            with gr.Row(elem_id="stage"):
                with gr.Column(scale=4, min_width=300):
                    self._scene()
                with gr.Column(scale=7, min_width=300):
                    self._screen()
            self._plan()
            self._wire()
            self._doors()
        return blocks

    # ------------------------------------------------------------------------------------------------------ layout

    def _header(self) -> None:
        with gr.Row(elem_id="top"):
            gr.HTML(_read("header.html"), js_on_load=_read("header.js"), apply_default_css=False, elem_id="header")
            self.running = gr.HTML(self._running(self.models.first), apply_default_css=False, elem_id="running")
            gr.DuplicateButton(visible="SPACE_ID" in os.environ, scale=0, min_width=160)

    def _scene(self) -> None:
        step = self.config.chunk_frames
        steps, guidance, preset = quality_of(self.config)
        guided = is_guided(self.config)
        names = self.models.names
        self.model = gr.Dropdown(
            names,
            value=self.models.first,
            label="Model for new films",
            info="A film goes on with the model that it was begun with.",
            visible=len(names) > 1,
            elem_id="model",
        )
        with gr.Row():
            sources = ["upload", "clipboard", "webcam"]
            self.image = Picture(label="Picture", sources=sources, height=220, buttons=[], elem_id="picture")
            self.preview = gr.Image(
                label="What the model sees", interactive=False, height=220, buttons=[], visible=False, elem_id="preview"
            )
        self.gallery = Gallery(self.examples, elem_id="examples")
        self.prompt = gr.Textbox(
            label="What the world looks like", placeholder="optional", max_length=MAX_PROMPT, elem_id="prompt"
        )
        self.negative_prompt = gr.Textbox(
            self.config.negative_prompt, label="What to avoid", max_length=MAX_PROMPT, visible=guided
        )
        self.frames = gr.Slider(
            1 + step, longest(self.config), 1 + 2 * step, step=step, label="Length in frames", elem_id="frames"
        )
        with gr.Accordion("Seed and quality", open=False):
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
            self.randomise = gr.Checkbox(True, label="A new seed every time", elem_id="randomise")
            self.preset = gr.Radio(
                speeds(self.config),
                value=preset,
                label="Speed",
                info="Faster films come close to the exact one, but are not the same.",
                elem_id="speed",
            )
            self.steps = gr.Slider(1, MAX_STEPS, steps, step=1, label="Steps", info="More are slower and finer.")
            self.guidance = gr.Slider(1, 10, guidance, step=0.5, label="Guidance", visible=guided)
        self.session_file = gr.UploadButton(
            "Resume a film from its session file", file_types=[".safetensors"], size="sm", elem_id="resume"
        )

    def _screen(self) -> None:
        self.player = FilmPlayer(elem_id="film")
        self.status = gr.HTML(status.message("Ready"), elem_id="status")
        with gr.Row(elem_id="make"):
            self.generate = gr.Button("Generate", variant="primary", scale=3, min_width=140, elem_id="generate")
            self.stop = gr.Button("Stop", variant="stop", interactive=False, scale=1, min_width=90, elem_id="stop")
        with gr.Row(elem_id="go-on", equal_height=True):
            self.extra = gr.Slider(
                1, 16, 2, step=1, label="Chunks to add", interactive=False, scale=2, min_width=180, elem_id="extra"
            )
            self.more = gr.Button("Continue", interactive=False, min_width=110, elem_id="more")
            self.redo = gr.Button("Redo last chunk", interactive=False, min_width=150, elem_id="redo")
        self.downloads = gr.HTML("", apply_default_css=False, elem_id="downloads")
        with gr.Accordion("Drive: steer while the film plays", open=False, elem_id="drive-panel"):
            rollout = self.config.validation_data
            self.drive = Drive(
                chunk_frames=self.config.chunk_frames, fps=rollout.fps, film="#film video", elem_id="drive"
            )

    def _plan(self) -> None:
        rollout, step = self.config.validation_data, self.config.chunk_frames
        self.editor = ActionEditor(
            ActionScript.parse(f"forward {step}, right {step}"),
            num_frames=1 + 2 * step,
            horizon_frames=1 + rollout.trained_chunks * step,
            chunk_frames=step,
            fps=rollout.fps,
            turn_degrees=TURN_DEGREES,
            step_units=STEP,
            follow="#film video",
            elem_id="actions",
        )
        with gr.Accordion("Memory check", open=True, elem_id="memory-panel"):
            self.memory = gr.HTML(MEMORY_HINT, apply_default_css=False, elem_id="memory")

    def _wire(self) -> None:
        settings = [self.editor, self.prompt, self.negative_prompt, self.seed, self.randomise]
        settings += [self.steps, self.guidance, self.preset]
        self.buttons = [self.generate, self.stop, self.more, self.redo, self.extra, self.session_file]
        begun = [self.film, self.job, self.outcome, self.seed, self.status, self.player, self.downloads, *self.buttons]
        settled = [self.status, self.player, self.downloads, self.editor, self.drive, *self.buttons]
        chosen = [self.running, self.negative_prompt, self.steps, self.guidance, self.preset]
        resumed = [self.editor, self.prompt, self.randomise, self.model, *chosen]
        # Through the queue like all, but never waiting: errors of events outside the queue are errors in the console.
        at_once = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}

        shown = [self.preview, self.player]
        self.image.change(self.choose, [self.image, self.film, self.model], shown, **at_once)
        self.model.input(self.choose_model, self.model, chosen, **at_once).then(
            self.choose, [self.image, self.film, self.model], shown, **at_once
        )
        self.preset.input(self.choose_speed, [self.preset, self.model], self.steps, **at_once)
        self.gallery.pick(self.take_example, None, [self.image, self.prompt, self.editor, self.frames], **at_once)
        self.frames.change(self.plan_length, self.frames, self.editor, **at_once)
        starts = [
            self.generate.click(self.begin, [self.image, self.frames, self.model, *settings], begun, **at_once),
            self.more.click(
                self.go_on, [self.film, self.extra, self.model, *settings], [*begun, self.editor], **at_once
            ),
            self.redo.click(self.make_again, [self.film, self.model, *settings], begun, **at_once),
            self.session_file.upload(self.resume, self.session_file, [*begun, *resumed], **at_once),
            self.drive.drive(
                self.drive_on,
                [self.film, self.drive, self.image, self.model, *settings],
                [*begun, self.editor],
                **at_once,
            ),
        ]
        on_gpu = {"concurrency_limit": 1, "concurrency_id": "gpu", "api_visibility": "private"}
        runs = []
        for start in starts:
            run = start.success(
                self.run, [self.film, self.job], [self.status, self.player, self.outcome],
                show_progress_on=self.status, **on_gpu,
            )  # fmt: skip
            settle = run.then(self.settle, [self.film, self.outcome], settled, **at_once)  # after Stop and errors too
            settle.then(self.check_memory, self.film, self.memory, **at_once)
            runs.append(run)
        self.stop.click(self.stopping, None, [self.status, self.stop], cancels=runs, **at_once)

    def _doors(self) -> None:
        """The one endpoint for programs, which is also the MCP tool. Its parts are seen by nobody."""
        with gr.Row(visible=False):
            inputs = [
                Picture(label="image"),
                gr.Textbox("", label="actions"),
                gr.Number(1 + self.config.chunk_frames, label="frames", precision=0),
                gr.Number(0, label="seed", precision=0),
                gr.Textbox("", label="prompt", max_length=MAX_PROMPT),
                gr.Textbox("", label="model"),
                gr.Dropdown(["", *PRESETS], value="", label="preset"),
            ]
            gr.Button().click(
                self.make_film,
                inputs,
                gr.File(label="film"),
                api_name="film",
                concurrency_limit=1,
                concurrency_id="gpu",
            )

    # ---------------------------------------------------------------------------------------------------- handlers

    @plainly
    def choose(self, image: str | None, film: Film | None, model: str) -> Update:
        """Shows a picture as the model will see it."""
        if image is None:
            return {self.preview: gr.update(value=None, visible=False)}
        cut = crop_image(image, self.models.config(model).buckets)
        update = {self.preview: gr.update(value=cut, visible=True)}
        return update if film else update | {self.player: still_value(cut)}

    @plainly
    def choose_model(self, model: str) -> Update:
        """Another model for new films, with its own preset, steps, guidance and negative prompt."""
        config = self.models.config(model)
        return self._chosen(config, config.negative_prompt, *quality_of(config))

    @plainly
    def choose_speed(self, preset: str, model: str) -> Update:
        """A preset, with its own steps."""
        return {self.steps: find_preset(preset).sampler_steps(self.models.config(model).val_scheduler_cfg)}

    def _chosen(self, config: ModelConfig, negative_prompt: str, steps: int, guidance: float, preset: str) -> Update:
        guided = is_guided(config)
        return {
            self.running: self._running(config.name),
            self.negative_prompt: gr.update(value=negative_prompt, visible=guided),
            self.steps: steps,
            self.guidance: gr.update(value=guidance, visible=guided),
            self.preset: gr.update(choices=speeds(config), value=preset),
        }

    def _running(self, model: str) -> str:
        return status.running(model, device_name(self.models.device))

    def take_example(self, event: gr.EventData) -> Update:
        """Picture, prompt and actions of an example, and the length that its actions need."""
        example = self.examples[int(event.index) % len(self.examples)]
        step = self.config.chunk_frames
        frames = min(longest(self.config), 1 + step * max(1, -(-len(example.actions) // step)))
        return {
            self.image: str(example.picture),
            self.prompt: example.prompt,
            self.editor: example.actions,
            self.frames: frames,
        }

    def plan_length(self, frames: int) -> Update:
        return {self.editor: gr.update(num_frames=int(frames))}

    @plainly
    def begin(self, image: str | None, frames: int, model: str, *settings: Any) -> Update:
        """A new film of the picture."""
        if image is None:
            raise ValueError("Choose a picture first: upload one, or take an example.")
        settings = self._wishes(*settings)
        film, job = self.studio.begin(image, int(frames), settings, model)
        still = still_value(Image.fromarray(job.picture))
        return self._begun(job, settings.seed) | {self.film: film, self.player: still}

    @plainly
    def go_on(self, film: Film | None, chunks: int, model: str, *settings: Any) -> Update:
        """More chunks for the film that is there."""
        session = _there(film).session()
        job = self.studio.go_on(film, int(chunks), for_film(self._wishes(*settings), session, model))
        frames = film.num_frames + int(chunks) * self.config.chunk_frames
        return self._begun(job, session.settings.seed) | {self.editor: gr.update(num_frames=frames)}

    @plainly
    def make_again(self, film: Film | None, model: str, *settings: Any) -> Update:
        """The film's last chunk with another seed."""
        session = _there(film).session()
        settings = for_film(self._wishes(*settings), session, model)
        if settings.seed == session.settings.seed:
            settings = dataclasses.replace(settings, seed=random.randrange(RANDOM_SEEDS))
        return self._begun(self.studio.redo(film, settings), settings.seed)

    @plainly
    def drive_on(self, film: Film | None, value: Any, image: str | None, model: str, *settings: Any) -> Update:
        """One more chunk, of what was driven; the first one of a film is made by the plan."""
        step = self.config.chunk_frames
        if film is None or not film.num_frames:
            return self.begin(image, 1 + step, model, *settings)
        session = film.session()
        settings = for_film(self._wishes(*settings), session, model)
        actions = session.with_actions(driven(value, step)).settings.actions
        job = self.studio.go_on(film, 1, dataclasses.replace(settings, actions=actions))
        plan = gr.update(value=actions, num_frames=session.num_frames + step)
        return self._begun(job, session.settings.seed) | {self.editor: plan}

    @plainly
    def resume(self, path: str) -> Update:
        """The film of an uploaded session file, with its model."""
        film, session = self.studio.resume(path)
        fields = {
            self.editor: gr.update(value=session.settings.actions, num_frames=session.num_frames),
            self.prompt: session.settings.prompt,
            self.model: session.model,
        }
        config = self.models.config(session.model)
        settings = session.settings
        quality = settings.steps, settings.guidance, settings.preset
        fields |= self._chosen(config, settings.negative_prompt, *quality)
        return self._begun(Job(session.model, 0), settings.seed) | fields | {self.film: film}

    def _wishes(
        self,
        actions: Any,
        prompt: str,
        negative: str,
        seed: int | None,
        randomise: bool,
        steps: int,
        guidance: float,
        preset: str,
    ) -> FilmSettings:
        seed = random.randrange(RANDOM_SEEDS) if randomise or seed is None else seed
        return FilmSettings(script_of(actions), prompt, negative, seed, steps, float(guidance), preset)

    def _begun(self, job: Job, seed: int) -> Update:
        """A run is about to begin, or to wait for its turn."""
        busy = {part: gr.update(interactive=part is self.stop) for part in self.buttons}
        waiting = status.message("Waiting", "The film is made as soon as it is its turn.")
        empty = {self.downloads: ""}
        return {self.job: job, self.outcome: "stopped", self.seed: seed, self.status: waiting} | empty | busy

    def run(self, film: Film, job: Job) -> Iterator[Update]:
        """Does the job, showing each step and each new piece of the film."""
        try:
            for news in self.studio.run(film, job):
                if isinstance(news, Chunk):
                    yield {self.player: film_value(film)}
                elif isinstance(news, Loading):
                    yield {self.status: status.message("Loading", f"The model {news.model} is loaded first.")}
                else:
                    yield {self.status: status.making(news)}
        except Exception as error:
            log.exception("a run ended early")
            yield {self.outcome: _sentence(error)}
        else:
            yield {self.outcome: "done"}

    def stopping(self) -> Update:
        return {
            self.status: status.message("Stopping", "What has been made stays."),
            self.stop: gr.update(interactive=False),
        }

    @plainly
    def settle(self, film: Film, outcome: str) -> Update:
        """After a run, however it ended: the whole film, its files, and what can be done next."""
        frames, can_go_on = film.num_frames, film.session_path.is_file()
        update = {
            self.status: status.ended(outcome, frames),
            self.generate: gr.update(interactive=True),
            self.stop: gr.update(interactive=False),
            self.more: gr.update(interactive=can_go_on),
            self.redo: gr.update(interactive=film.can_redo),
            self.extra: gr.update(interactive=can_go_on),
            self.session_file: gr.update(interactive=True),
        }
        if frames:
            files = film.finish()
            update[self.player] = film_value(film, files["film"])
            update[self.downloads] = status.downloads(files)
            update[self.editor] = gr.update(num_frames=frames)
        if outcome != "done":
            update[self.drive] = None  # whoever is driving has to stop
        return update

    @plainly
    def check_memory(self, film: Film) -> str:
        return memory_check(film) if film.num_frames else MEMORY_HINT

    @plainly
    def make_film(
        self,
        image: str,
        actions: str = "",
        frames: int = 81,
        seed: int = 0,
        prompt: str = "",
        model: str = "",
        preset: str = "",
        progress=gr.Progress(),  # noqa: B008  (how Gradio hands one over)
    ) -> str:
        """
        Films a walk that begins with a picture, and returns an mp4 file of 30 frames a second.

        The actions are text such as "forward 80, right 40, forward+left 60": what to do and for how many frames. They
        are forward, back, strafe left, strafe right, up, down, left, right and wait, also joined by a plus sign.
        Turning right for 80 frames is a quarter circle. A JSON list with one {"move": ..., "view": ...} per frame is
        understood too. After the last action nothing is done.

        Args:
            image: The picture to begin with (MCP: an http address or a data: address).
            actions: What to do, for example "forward 80, right 80"
            frames: Length of the film in frames: 81, 161, 241 and so on.
            seed: Another number makes another film of the same walk.
            prompt: What the world looks like; may be empty.
            model: One of the models that are here, by name; empty for the page's own.
            preset: exact, or balanced or fast, which are faster and less exact; empty for the model's own.
        """
        if image is None:
            raise ValueError("there is no picture")
        config = self.models.config(model or self.models.first)
        settings = FilmSettings(_script(actions), prompt, config.negative_prompt, seed, *quality_of(config, preset))
        film, job = self.studio.begin(image, frames, settings, config.name)
        for news in self.studio.run(film, job):
            if isinstance(news, Loading):
                progress(0, f"the model {news.model} is loaded")
            elif isinstance(news, RunProgress):
                progress(news.share, f"chunk {news.chunk} of {news.chunks}")
        return str(film.finish()["film"])


def _script(text: str) -> ActionScript:
    """From JSON or the text form. Not from a path: that would be one on the server."""
    return ActionScript.from_json(text) if text.lstrip().startswith(("[", "{")) else ActionScript.parse(text)


def _there(film: Film | None) -> Film:
    if film is None:
        raise ValueError("There is no film yet: press Generate first.")
    return film


def for_film(settings: FilmSettings, session: Session, model: str) -> FilmSettings:
    """Settings of a film's further frames; those about quality are for the chosen model, which may be another."""
    if model == session.model:
        return settings
    kept = {name: getattr(session.settings, name) for name in ("negative_prompt", "steps", "guidance", "preset")}
    return dataclasses.replace(settings, **kept)


def quality_of(config: ModelConfig, preset: str = "") -> tuple[int, float, str]:
    """Steps, guidance and name of a preset of this model; of its own if none is named."""
    sampler = config.val_scheduler_cfg
    found = find_preset(preset or sampler.preset)
    return found.sampler_steps(sampler), sampler.text_cfg_scale, found.name


def speeds(config: ModelConfig) -> list[tuple[str, str]]:
    """The presets, labelled with how many times as fast as exact the model's own part of the work is."""
    sampler = config.val_scheduler_cfg
    passes = [preset.passes(preset.sampler_steps(sampler), sampler.text_cfg_scale) for preset in PRESETS.values()]
    times = [passes[0] / each for each in passes]
    return [
        (f"{name.capitalize()}, {x:.1f}x as fast" if x > 1 else name.capitalize(), name)
        for name, x in zip(PRESETS, times, strict=True)
    ]


def is_guided(config: ModelConfig) -> bool:
    """Whether the model uses a negative prompt."""
    return config.val_scheduler_cfg.text_cfg_scale != 1


def _sentence(error: Exception) -> str:
    """What an error says, as a sentence."""
    words = str(getattr(error, "message", error)) or type(error).__name__
    return words[0].upper() + words[1:]


def longest(config: ModelConfig) -> int:
    """The most frames that the page offers: the trained horizon."""
    rollout = config.validation_data
    return 1 + config.chunk_frames * min(rollout.trained_chunks, rollout.max_chunks)


def upload_limit(config: ModelConfig) -> int:
    """Bytes: the largest session file of the longest film, and some room.

    A session holds what the VAE's encoder carries on (about 15 numbers a pixel and channel) and all latents, twice.
    """
    pixels = math.prod(config.largest_bucket)
    carried = 20 * pixels * config.vae_cfg.dim
    latents = 2 * config.validation_data.max_chunks * config.chunk_latents * config.vae_cfg.z_dim * pixels // 64
    return UPLOAD_ROOM + 4 * (carried + latents)


def _read(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def serve(models: ModelPool | World, films: Path = FILMS, **launching: Any) -> gr.Blocks:
    """Builds and launches the page for one or more models; films go below `films`. Returns the running page."""
    models = SingleModelPool(models) if isinstance(models, World) else models
    store = FilmStore(films, LIFETIME)
    store.keep_sweeping()
    blocks = Page(Studio(models, store)).blocks()
    blocks.queue(max_size=MAX_QUEUE)
    blocks.launch(
        theme=theme(),
        css=_read("page.css"),
        allowed_paths=[str(store.root)],
        max_file_size=max(upload_limit(models.config(name)) for name in models.names),
        mcp_server=importlib.util.find_spec("mcp") is not None,
        ssr_mode=False,
        footer_links=["api", "settings"],
        **launching,
    )
    return blocks


def theme() -> gr.Theme:
    """Fonts of the system, so that the page needs nothing from elsewhere."""
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The page on which a picture becomes a walk.")
    parser.add_argument(
        "--model",
        help="infinite-world, tiny, or the path of a YAML file; missing weights are downloaded. Default: "
        "INFWORLD_MODEL, else infinite-world if its weights are here and a GPU that it fits on, else tiny",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--host", help="address to listen on: 0.0.0.0 for all (default: only this machine)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        device = parallel.device_of_rank(args.device)
        with parallel.join_team(pick_device(device)) as team:
            models = load_models(args.model, device, team)
            if team is None:
                serve(models, server_name=args.host, server_port=args.port)
            elif team.is_rank0:
                serve(models, server_name=args.host, server_port=args.port)
                team.end()
            else:
                follow(team, models.world)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def load_models(name: str | None, device: str, team: parallel.Team | None) -> ModelPool:
    """The models that are here, the one of this name or the default one first; it may be downloaded."""

    def first() -> ModelConfig:
        return prepare(name or default_model(device))

    config = first() if team is None else team.broadcast_from_rank0(first)
    others = {name: other for name, other in available().items() if name != config.name}
    return ModelPool({config.name: config, **others}, device, team)


if __name__ == "__main__":
    main()
