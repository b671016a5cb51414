"""The page: choose a picture, plan a walk, watch the film while it is made. Layout and handlers; knows no tensors.

What a person asks is checked in `studio.py` and done by `runner.py`. A film lives in a folder of its own, of which the
page keeps only the path. Every event that films is an async generator: it reads what its run tells, and blocks no
thread.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
from gradio.context import LocalContext
from PIL import Image

from infworld.actions import ActionScript
from infworld.app import status
from infworld.app.editor import ActionEditor, script_of, value_of
from infworld.app.films import Film
from infworld.app.gallery import Gallery, find_examples
from infworld.app.inputs import Argument, CheckedBlocks, Picture, SessionUpload, script, text, whole_number
from infworld.app.memory_check import memory_check
from infworld.app.modules import read_static
from infworld.app.play import PlayScreen, playing, resting
from infworld.app.player import FilmPlayer, film_value, still_of, still_value
from infworld.app.runner import Ended, Job, Loading, NewChunk, Played, Run, Runner, RunProgress, Visitor, Waiting
from infworld.app.steering import Steering, SteeringFile
from infworld.app.studio import Studio
from infworld.config import PROJECT_ROOT, ModelConfig
from infworld.devices import device_name
from infworld.memory_plan import NotEnoughMemory
from infworld.pictures import crop_image
from infworld.presets import PRESETS, find_preset
from infworld.session import Session
from infworld.settings import MAX_PROMPT, MAX_STEPS, FilmSettings

EXAMPLES = PROJECT_ROOT / "examples"
RANDOM_SEEDS = 2**31  # short enough to write down
AWAY = 2.0  # seconds that a walk goes on when its page is gone
LINGER = 30.0  # seconds that a run goes on when its page is gone: time to come back after a cut, or a reload

MEMORY_HINT = (
    '<div class="memory"><p>When the film comes back to a view, its first look and its return are shown here side by '
    "side. Try the plan <em>Look around</em> or <em>Walk and return</em>.</p></div>"
)

STOPPING = status.message("Stopping", "What has been made stays.")

REMEMBERED = "infinite-world-film"  # what the browser calls the film's name that it keeps, for all tabs and for each
KEEP = f"(name) => window.hasFoundFilm && sessionStorage.setItem('{REMEMBERED}', name)"
FIND = f"""(latest) => {{
  const name = sessionStorage.getItem('{REMEMBERED}') ?? latest;
  if (name) sessionStorage.setItem('{REMEMBERED}', name);
  document.body.inert = Boolean(name && !window.hasFoundFilm);  // the found film replaces what is planned
  window.hasFoundFilm = true;  // before, the latest film of all tabs is no change
  return name;
}}"""
FOUND = "() => { document.body.inert = false; }"
# A page also tells of the tab that it begins with, which is no choice.
KEEP_TAB = "() => window.hasFoundTab && sessionStorage.setItem('infinite-world-tab', '{}')"
FIND_TAB = """() => {{
  const name = sessionStorage.getItem('infinite-world-tab');
  window.hasFoundTab = true;
  return {}.includes(name) ? {{__type__: 'update', selected: name}} : {{__type__: 'update'}};
}}"""
# A button is off in the browser at once, before the server answers, and on again after an error.
OFF = "(...values) => {{ document.getElementById('{}').disabled = true; return values; }}"
ON = "() => {{ document.getElementById('{}').disabled = false; }}"

Update = dict[Any, Any]


@contextmanager
def plainly(to_program: bool = False) -> Iterator[None]:
    """What a person can do something about is shown to them as it is worded. Also a decorator of handlers.

    The page reads an error as HTML, and the words may come from a file.
    """
    try:
        yield
    except (ValueError, OSError, NotEnoughMemory) as error:
        words = sentence(error)
        raise gr.Error(words if to_program else escape(words, quote=False), print_exception=False) from error


@dataclass(frozen=True, eq=False)
class Begun:
    """What a handler asks the runner for, and what the page shows at once."""

    job: Job
    update: Update


class Page:
    """The page's parts and handlers. A handler takes the values of parts and returns updates by part."""

    def __init__(self, studio: Studio, runner: Runner):
        self.studio = studio
        self.runner = runner
        self.models = studio.models
        self.config = self.models.config(self.models.first)  # the page is laid out for the first model's lengths
        self.examples = find_examples(EXAMPLES)
        self._runs = itertools.count(1)  # of walks that are played

    def blocks(self) -> CheckedBlocks:
        """The whole page, ready to launch."""
        with CheckedBlocks(title="Infinite-World", fill_width=True) as blocks:
            self.film = gr.State(None)  # a Film
            # The film's name, with which a page that was cut off or loaded again finds it. It is no secret from the
            # browser's owner, so that the key need not be one; it has to outlive the server.
            self.remembered = gr.BrowserState(None, storage_key=REMEMBERED, secret="infinite-world")
            self.has_come_back = gr.State(False)
            self._header()
            self.gallery = Gallery(self.examples, opens="#picture input[type=file]", elem_id="examples")
            with gr.Row(elem_id="stage"):
                with gr.Column(scale=8, min_width=320), gr.Tabs(elem_id="tabs") as self.tabs:
                    with gr.Tab("Play", id="play", elem_id="play-tab", render_children=True) as play:
                        self._play()
                    with gr.Tab("Film", id="film", elem_id="film-tab", render_children=True) as film:
                        self._screen()
                        self._plan()
                with gr.Column(scale=3, min_width=280):
                    self._scene()
            self._wire(blocks)
            self._remember_tab(blocks, {"play": play, "film": film})
            self._doors()
        return blocks

    # ------------------------------------------------------------------------------------------------------ layout

    def _header(self) -> None:
        with gr.Row(elem_id="top"):
            gr.HTML(
                read_static("header.html"),
                js_on_load=read_static("header.js"),
                apply_default_css=False,
                elem_id="header",
            )
            self.running = gr.HTML(self._running(self.models.first), apply_default_css=False, elem_id="running")
            gr.DuplicateButton(visible="SPACE_ID" in os.environ, scale=0, min_width=160)

    def _play(self) -> None:
        rollout = self.config.validation_data
        self.play = PlayScreen(
            fps=rollout.fps, camera=self.config.camera, chunk_frames=self.config.chunk_frames, elem_id="play"
        )

    def _scene(self) -> None:
        defaults = FilmSettings.for_model(self.config)
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
        sources = ["upload", "clipboard", "webcam"]
        self.image = Picture(label="Picture", format="png", sources=sources, height=220, buttons=[], elem_id="picture")
        self.prompt = gr.Textbox(
            "", label="What the world looks like", placeholder="optional", max_length=MAX_PROMPT, elem_id="prompt"
        )
        self.negative_prompt = gr.Textbox(
            self.config.negative_prompt, label="What to avoid", max_length=MAX_PROMPT, visible=guided
        )
        with gr.Accordion("Seed and quality", open=False):
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
            self.randomise = gr.Checkbox(True, label="A new seed every time", elem_id="randomise")
            self.preset = gr.Radio(
                speeds(self.config),
                value=defaults.preset,
                label="Speed",
                info="Faster films come close to the exact one, but are not the same.",
                elem_id="speed",
            )
            self.steps = gr.Slider(
                1, MAX_STEPS, defaults.steps, step=1, label="Steps", info="More are slower and finer."
            )
            self.guidance = gr.Slider(1, 10, defaults.guidance, step=0.5, label="Guidance", visible=guided)
        self.session_file = SessionUpload(
            "Resume a film from its session file", file_types=[".safetensors"], size="sm", elem_id="resume"
        )

    def _screen(self) -> None:
        self.player = FilmPlayer(elem_id="film")
        self.status = gr.HTML(status.message("Ready"), elem_id="status")
        step = self.config.chunk_frames
        with gr.Row(elem_id="make", equal_height=True):
            self.frames = gr.Slider(
                1 + step,
                longest(self.config),
                1 + 2 * step,
                step=step,
                label="Length in frames",
                scale=3,
                min_width=180,
                elem_id="frames",
            )
            self.generate = gr.Button("Generate", variant="primary", scale=3, min_width=140, elem_id="generate")
            self.stop = gr.Button("Stop", variant="stop", interactive=False, scale=1, min_width=90, elem_id="stop")
        with gr.Row(elem_id="go-on", equal_height=True):
            self.extra = gr.Slider(
                1, 16, 2, step=1, label="Chunks to add", interactive=False, scale=2, min_width=180, elem_id="extra"
            )
            self.more = gr.Button("Continue", interactive=False, min_width=110, elem_id="more")
            self.redo = gr.Button("Redo last chunk", interactive=False, min_width=150, elem_id="redo")
        self.downloads = gr.HTML("", apply_default_css=False, elem_id="downloads")

    def _plan(self) -> None:
        rollout, step = self.config.validation_data, self.config.chunk_frames
        self.editor = ActionEditor(
            ActionScript.parse(f"forward {step}, right {step}"),
            num_frames=1 + 2 * step,
            horizon_frames=1 + rollout.trained_chunks * step,
            chunk_frames=step,
            fps=rollout.fps,
            camera=self.config.camera,
            follow="#film video",
            elem_id="actions",
        )
        with gr.Accordion("Memory check", open=True, elem_id="memory-panel"):
            self.memory = gr.HTML(MEMORY_HINT, apply_default_css=False, elem_id="memory")

    def _wire(self, blocks: gr.Blocks) -> None:
        settings = [self.editor, self.prompt, self.negative_prompt, self.seed, self.randomise]
        settings += [self.steps, self.guidance, self.preset]
        self.buttons = [self.generate, self.stop, self.more, self.redo, self.extra, self.session_file]
        filming = [
            self.film,
            self.remembered,
            self.seed,
            self.status,
            self.player,
            self.downloads,
            self.editor,
            self.play,
        ]
        filming += self.buttons
        chosen = [self.running, self.negative_prompt, self.steps, self.guidance, self.preset]
        # The queue is the runner's alone. Gradio's is gone through all the same: errors of events outside of it are
        # errors in the console.
        at_once = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}

        shown = [self.player, self.play]
        self.image.change(self.choose, [self.image, self.film, self.model], shown, **at_once)
        self.model.input(self.choose_model, self.model, chosen, **at_once).then(
            self.choose, [self.image, self.film, self.model], shown, **at_once
        )
        self.preset.input(self.choose_speed, [self.preset, self.model], self.steps, **at_once)
        self.gallery.pick(self.take_example, None, [self.image, self.prompt, self.editor, self.frames], **at_once)
        self.frames.change(self.plan_length, self.frames, self.editor, **at_once)
        resumed = [*filming, self.prompt, self.randomise, self.model, *chosen]
        buttons = {self.begin: "generate", self.go_on: "more", self.make_again: "redo"}
        for event, begin, inputs, outputs in (
            (self.generate.click, self.begin, [self.image, self.frames, self.model, *settings], filming),
            (self.more.click, self.go_on, [self.extra, self.model, *settings], filming),
            (self.redo.click, self.make_again, [self.model, *settings], filming),
            (self.session_file.upload, self.resume, [self.session_file], resumed),
        ):
            button = buttons.get(begin)
            off = button and OFF.format(button)
            made = event(self.filming(begin), [self.film, *inputs], outputs, js=off, **at_once)
            made.then(self.check_memory, self.film, self.memory, **at_once)
            if button:
                made.failure(None, js=ON.format(button), api_visibility="private")
        quality = settings[1:]
        for event, begin, inputs in (
            (self.play.begin, self.play_anew, [self.image, self.model, *quality]),
            (self.play.go_on, self.play_on, [self.model, *quality]),
        ):
            event(self.walking(begin), [self.film, *inputs], filming, **at_once).then(
                self.check_memory, self.film, self.memory, **at_once
            )
        self.play.leave(self.leave, self.film, None, **at_once)
        self.play.steer(self.steer, self.film, None, queue=False, **at_once)
        found = [*resumed, self.image, self.frames, self.has_come_back]
        # A tab that is loaded again has its own film, another one that of the browser's latest.
        self.remembered.change(None, self.remembered, None, js=KEEP, api_visibility="private")
        coming_back = blocks.load(self.come_back, self.remembered, found, js=FIND, **at_once)
        coming_back.then(self.check_memory, self.film, self.memory, **at_once)
        coming_back.failure(None, js=FOUND, api_visibility="private")
        self.has_come_back.change(None, js=FOUND, api_visibility="private")
        self.stop.click(self.stop_filming, self.film, [self.status, self.stop], **at_once)

    def _remember_tab(self, blocks: gr.Blocks, tabs: dict[str, gr.Tab]) -> None:
        """A page that is loaded again shows the tab that was open."""
        for name, tab in tabs.items():
            tab.select(None, js=KEEP_TAB.format(name), api_visibility="private")
        # The first tab is there already.
        blocks.load(None, None, self.tabs, js=FIND_TAB.format(list(tabs)[1:]), api_visibility="private")

    def _doors(self) -> None:
        """The one endpoint for programs, which is also the MCP tool. Its parts are seen by nobody."""
        with gr.Row(visible=False):
            inputs = [
                Picture(label="image"),
                Argument(label="actions", kinds=("string", "array")),
                Argument(1 + self.config.chunk_frames, label="frames", kinds=("integer", "string")),
                Argument(0, label="seed", kinds=("integer", "string")),
                Argument(label="prompt"),
                Argument(label="model"),
                Argument(label="preset"),
            ]
            gr.Button().click(
                self.make_film,
                inputs,
                gr.File(label="film"),
                api_name="film",
                concurrency_limit=None,
            )

    # ---------------------------------------------------------------------------------------------------- handlers

    @plainly()
    def choose(self, image: str | None, film: Film | None, model: str) -> Update:
        """Shows a picture as the model will see it, where no film is shown or made."""
        if image is None or (film and self.runner.run_of(film)):
            return {self.play: gr.skip()}
        cut = crop_image(image, self.models.config(model).buckets)
        update: Update = {self.play: resting("", self._walked(film), still_of(cut))}
        return update if film else update | {self.player: still_value(cut)}

    @plainly()
    def choose_model(self, model: str) -> Update:
        """Another model for new films, with its own preset, steps, guidance and negative prompt."""
        config = self.models.config(model)
        return self._chosen(config, FilmSettings.for_model(config))

    @plainly()
    def choose_speed(self, preset: str, model: str) -> Update:
        """A preset, with its own steps."""
        return {self.steps: find_preset(preset).sampler_steps(self.models.config(model).val_scheduler_cfg)}

    def _chosen(self, config: ModelConfig, settings: FilmSettings) -> Update:
        guided = is_guided(config)
        return {
            self.running: self._running(config.name),
            self.negative_prompt: gr.update(value=settings.negative_prompt, visible=guided),
            self.steps: settings.steps,
            self.guidance: gr.update(value=settings.guidance, visible=guided),
            self.preset: gr.update(choices=speeds(config), value=settings.preset),
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

    def begin(self, film: Film | None, image: str | None, frames: int, model: str, *settings: Any) -> Begun:
        """A new film of the picture."""
        if image is None:
            raise ValueError("Choose a picture first: upload one, or take an example.")
        job = self.studio.begin(image, int(frames), self._settings(*settings), model)
        return Begun(job, {self.player: still_value(Image.fromarray(job.picture))})

    def go_on(self, film: Film | None, chunks: int, model: str, *settings: Any) -> Begun:
        """More chunks for the film that is there."""
        session = _there(film).session()
        job = self.studio.go_on(film, int(chunks), for_film(self._settings(*settings), session, model))
        frames = film.num_frames + int(chunks) * self.config.chunk_frames
        return Begun(job, {self.editor: gr.update(num_frames=frames)})

    def make_again(self, film: Film | None, model: str, *settings: Any) -> Begun:
        """The film's last chunk with another seed."""
        session = _there(film).session()
        wanted = for_film(self._settings(*settings), session, model)
        if wanted.seed == session.settings.seed:
            wanted = dataclasses.replace(wanted, seed=random.randrange(RANDOM_SEEDS))
        return Begun(self.studio.redo(film, wanted), {})

    def play_anew(self, film: Film | None, image: str | None, model: str, *quality: Any) -> Job:
        """A walk that begins with the picture."""
        if image is None:
            raise ValueError("Choose a picture first: upload one, or take an example.")
        return self.studio.play(image, self._settings(None, *quality), model)

    def play_on(self, film: Film | None, model: str, *quality: Any) -> Job:
        """A walk that goes on where the film ends."""
        session = _there(film).session()
        return self.studio.play_on(film, for_film(self._settings(None, *quality), session, model))

    async def steer(self, film: Film | None, event: gr.EventData) -> None:
        """What the person does now. Not in a thread, so that one message follows the other."""
        run = film and self.runner.run_of(film)
        if not run:
            return
        steering = Steering.of_message(event._data)
        if steering.number >= run.steered:
            run.steered, run.heard = steering.number, time.monotonic()
            with suppress(FileNotFoundError):  # the film has not begun, so that there is nothing to steer
                SteeringFile(film.steering_path).write(steering)

    def leave(self, film: Film | None) -> None:
        if run := film and self.runner.run_of(film):
            run.cancel()

    def walking(self, begin: Callable[..., Job]) -> Callable[..., AsyncGenerator[Update]]:
        """The handler that plays what `begin` asks for, until the person leaves. Errors are shown on the screen."""

        async def handler(film: Film | None, *values: Any) -> AsyncGenerator[Update]:
            visitor = visitor_of_event(most=1)
            try:
                job = await asyncio.to_thread(begin, film, *values)
                run = self.runner.submit(job, visitor)
            except (ValueError, OSError) as error:
                yield {self.play: resting(sentence(error), await asyncio.to_thread(self._walked, film))}
                return
            number, before = next(self._runs), await asyncio.to_thread(self._walked, job.film)
            try:
                yield self._busy(job) | {self.play: playing(number, [], "Beginning …", before)}
                async with aclosing(run.updates(linger=AWAY)) as updates:
                    async for update in updates:
                        if isinstance(update, Ended):
                            yield await asyncio.to_thread(self.settle, job.film, update, film, True)
                        elif isinstance(update, Played):
                            screen = playing(number, list(run.strips), "", before, update.seconds_left)
                            yield {self.play: screen}
                        elif isinstance(update, Waiting | Loading) and not run.strips:
                            yield {self.play: playing(number, [], status.words(update), before)}
            finally:
                run.leave(AWAY)

        return handler

    def _walked(self, film: Film | None) -> list[list[int]] | None:
        """What was done in a film, as [move, view, frames]; None where there is none to go on with."""
        if film is None or not film.has_begun:
            return None
        session = film.session()
        done = session.settings.actions.cut(session.num_frames - 1)
        return value_of(done)["segments"]

    def resume(self, film: Film | None, path: str) -> Begun:
        """The film of an uploaded session file, with its model."""
        job, session = self.studio.resume(path)
        fields = {
            self.editor: gr.update(value=session.settings.actions, num_frames=session.num_frames),
            self.prompt: session.settings.prompt,
            self.model: session.model,
            self.seed: session.settings.seed,
        }
        return Begun(job, fields | self._chosen(self.models.config(session.model), session.settings))

    def _settings(
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

    def filming(self, begin: Callable[..., Begun]) -> Callable[..., AsyncGenerator[Update]]:
        """The handler that has done what `begin` asks for, and shows each step and each new piece of the film.

        Closing it, as Gradio does when the page is closed, cancels the run if the page does not come back. A new film
        that was stopped before it began leaves the page with the film that it had.
        """

        async def handler(film: Film | None, *values: Any) -> AsyncGenerator[Update]:
            visitor = visitor_of_event(most=1)
            with plainly():
                begun = await asyncio.to_thread(begin, film, *values)
                run = self.runner.submit(begun.job, visitor)
            try:
                yield self._busy(begun.job) | begun.update
                async with aclosing(self._watch(run, film)) as updates:
                    async for update in updates:
                        yield update
            finally:
                run.leave(LINGER)

        return handler

    async def _watch(self, run: Run, before: Film | None) -> AsyncGenerator[Update]:
        """What a run does, until it is over and settled."""
        async with aclosing(run.updates(linger=LINGER)) as updates:
            async for update in updates:
                if isinstance(update, Ended):
                    yield await asyncio.to_thread(self.settle, run.job.film, update, before)
                elif isinstance(update, NewChunk):
                    yield await asyncio.to_thread(self._grown, run.job.film)
                else:
                    yield {self.status: STOPPING if run.is_cancelled else status.of(update)}

    async def come_back(self, name: Any) -> AsyncGenerator[Update]:
        """The film that this browser has made last, with its plan, and its progress if it is in the making; the page
        waits for the first update."""
        film = self.studio.store.find(name)
        run = film and self.runner.run_of(film)
        if run and run.job.played:
            # Played by the page that was loaded again, which is silent now, or by another one beside it.
            for _ in range(100):
                if time.monotonic() - run.heard > AWAY:
                    run.cancel()
                await asyncio.sleep(0.1)
                if run.is_over:
                    break
            film = film if run.is_over else None
            run = None
        if not film or not (run or film.has_begun):
            yield {self.has_come_back: True}
        else:
            yield await asyncio.to_thread(self._found, film, run) | {self.has_come_back: True}
            if run:
                async with aclosing(self._watch(run, None)) as updates:
                    async for update in updates:
                        yield update

    @plainly()
    def _found(self, film: Film, run: Run | None) -> Update:
        job = run.job if run else Job(film, film.session().model, 0)
        settings = job.settings or film.session().settings
        config = self.models.config(job.model)
        planned = film.num_frames if job.picture is None else 1 + job.chunks * config.chunk_frames
        update = self._busy(job) if run else self.settle(film, Ended(stopped=not film.num_frames))
        update |= {
            self.editor: gr.update(value=settings.actions, num_frames=planned),
            self.prompt: settings.prompt,
            self.model: job.model,
            self.seed: settings.seed,
        }
        update |= self._chosen(config, settings)
        picture = film.picture() if job.picture is None else job.picture
        if picture is not None:
            update[self.image] = picture
        if run and film.num_frames:
            update |= self._grown(film)
        elif run and picture is not None:
            update[self.player] = still_value(Image.fromarray(picture))
        if job.picture is not None:
            update[self.frames] = planned
        return update

    def _busy(self, job: Job) -> Update:
        """A run has begun, or waits for its turn."""
        busy = {part: gr.update(interactive=part is self.stop) for part in self.buttons}
        seed = {self.seed: job.settings.seed} if job.settings else {}
        return {self.film: job.film, self.remembered: job.film.folder.name, self.downloads: ""} | seed | busy

    def _grown(self, film: Film) -> Update:
        """A chunk more, which can be downloaded at once."""
        return {self.player: film_value(film), self.downloads: status.downloads(film.finish())}

    @plainly()
    def stop_filming(self, film: Film | None) -> Update:
        """Asks the film's run to end after the step it is in; `settle` follows when it has."""
        if run := self.runner.run_of(_there(film)):
            run.cancel()
        return {self.status: STOPPING, self.stop: gr.update(interactive=False)}

    @plainly()
    def settle(self, film: Film, ended: Ended, before: Film | None = None, walked: bool = False) -> Update:
        """After a run, however it ended: the whole film, its files, and what can be done next. before: the film that
        the page had; walked: whether it was played, so that the plan has to follow."""
        if before and not film.has_begun:
            film = before
        frames, can_go_on = film.num_frames, film.has_begun
        outcome = sentence(ended.error) if ended.error else "stopped" if ended.stopped else "done"
        update: Update = {
            self.film: film,
            self.remembered: film.folder.name,
            self.status: status.ended(outcome, frames, film.fps),
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
        if walked:
            update[self.editor] = gr.update(value=film.session().settings.actions, num_frames=frames)
        says = outcome if ended.error else ended.why
        update[self.play] = resting(says, self._walked(film), self._last_frame(film) if frames else None)
        return update

    def _last_frame(self, film: Film) -> str:
        last = film.num_frames - 1
        return still_of(Image.fromarray(film.frames([last])[last]))

    @plainly()
    def check_memory(self, film: Film | None) -> str:
        if film is None or not film.num_frames:
            return MEMORY_HINT
        return memory_check(film, lambda model: self.models.config(model).camera)

    async def make_film(
        self,
        image: str,
        actions: str | list = "",
        frames: int | str = 81,
        seed: int | str = 0,
        prompt: str = "",
        model: str = "",
        preset: str = "",
        progress=gr.Progress(),  # noqa: B008  (how Gradio hands one over)
    ) -> str:
        """
        Films a walk that begins with a picture, and returns an mp4 file.

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
        with plainly(to_program=True):
            visitor = visitor_of_event()
            job = await asyncio.to_thread(self._asked, image, actions, frames, seed, prompt, model, preset)
            run = self.runner.submit(job, visitor)
        try:
            async with aclosing(run.updates()) as updates:
                async for update in updates:
                    if isinstance(update, Waiting):
                        progress(0, f"waiting for {update.place} other films")
                    elif isinstance(update, Loading):
                        progress(0, f"the model {update.model} is loaded")
                    elif isinstance(update, RunProgress):
                        progress(update.share, f"chunk {update.chunk} of {update.chunks}")
                    if client_is_gone():
                        run.cancel()
        finally:
            run.cancel()
        if update.error or update.stopped:
            words = sentence(update.error) if update.error else "The film was cancelled."
            raise gr.Error(words, print_exception=False) from update.error
        return str((await asyncio.to_thread(job.film.finish))["film"])

    def _asked(self, image: str | None, actions, frames, seed, prompt, model, preset) -> Job:
        """What a program asks for, checked."""
        if image is None:
            raise ValueError("there is no picture")
        config = self.models.config(text("model", model) or self.models.first)
        settings = FilmSettings.for_model(
            config,
            script(actions),
            text("prompt", prompt),
            seed=whole_number("seed", seed),
            preset=text("preset", preset) or None,
        )
        return self.studio.begin(image, whole_number("frames", frames), settings, config.name)


def visitor_of_event(**limits: int) -> Visitor | None:
    """Who fired the present event."""
    request = LocalContext.request.get(None)
    if request is None:
        return None
    return Visitor(request.session_hash or "", request.client.host if request.client else "", **limits)


def client_is_gone() -> bool:
    """Whether the client of the present event has hung up, which Gradio tells generators only."""
    blocks, event_id = LocalContext.blocks.get(None), LocalContext.event_id.get(None)
    event = blocks and blocks._queue.event_ids_to_events.get(event_id)
    return event is not None and not event.alive


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


def speeds(config: ModelConfig) -> list[tuple[str, str]]:
    """The presets, labelled with how many times as fast as exact the model's own part of the work is."""
    sampler = config.val_scheduler_cfg
    passes = [
        preset.passes(sampler, preset.sampler_steps(sampler), sampler.text_cfg_scale) for preset in PRESETS.values()
    ]
    times = [passes[0] / each for each in passes]
    return [
        (f"{name.capitalize()}, {x:.1f}x as fast" if x > 1 else name.capitalize(), name)
        for name, x in zip(PRESETS, times, strict=True)
    ]


def is_guided(config: ModelConfig) -> bool:
    """Whether the model uses a negative prompt."""
    return config.val_scheduler_cfg.text_cfg_scale != 1


def sentence(error: Exception) -> str:
    """What an error says, as a sentence."""
    words = str(getattr(error, "message", error)) or type(error).__name__
    return words[0].upper() + words[1:]


def longest(config: ModelConfig) -> int:
    """The most frames that the page offers: the trained horizon."""
    rollout = config.validation_data
    return 1 + config.chunk_frames * min(rollout.trained_chunks, rollout.max_chunks)
