"""A walk that is played, without a browser: what steers it, its pace, what is kept of it, whose turn it is."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
import time

import numpy as np
import pytest
from gpu_border import other_process

from infworld.actions import ActionScript, Segment
from infworld.app import compute, model_pool
from infworld.app import runner as runs
from infworld.app.compute import Live, Opening, Walk, perform
from infworld.app.films import FilmStore, PieceWriter, Recorder
from infworld.app.model_pool import ModelPool, SingleModelPool
from infworld.app.pace import MARGIN, Pace
from infworld.app.runner import Ended, Played, Runner, Waiting
from infworld.app.steering import MAX_TAP_FRAMES, Helm, Steering, SteeringFile, Tap
from infworld.app.studio import Studio
from infworld.settings import FilmSettings
from infworld.video import read_mp4
from infworld.world import Chunk, Frames

SETTINGS = FilmSettings(ActionScript(), "a hill", "", 3, 2, 1.0, "exact")
FORWARD, RIGHT = (1, 0), (0, 4)


# ------------------------------------------------------------------------------------------------------------ steering


@pytest.mark.parametrize(
    "message",
    [
        None,
        [],
        "w",
        {"number": -1},
        {"number": 1.5},
        {"number": True},
        {"move": 10},
        {"view": "left"},
        {"shown": 2**60},
        {"taps": [[1, 0, 4]]},
        {"taps": [[1, 0, 4, 0]]},
        {"taps": [[1, 0, 44, 3]]},
        {"taps": [3]},
        {"taps": [[1, 0, 4, 3]] * 17},
    ],
)
def test_a_malformed_message_is_refused(message):
    with pytest.raises(ValueError):
        Steering.of_message(message)


def test_steering_passes_through_its_file_whole_while_it_is_written_anew(tmp_path):
    file = SteeringFile(tmp_path / "steering.json")
    assert file.read() == Steering()
    message = {"number": 7, "move": 1, "view": 4, "taps": [[6, 0, 3, 5]], "paused": True, "shown": 90, "stalls": 2}
    steering = Steering.of_message(message)
    assert steering.taps == (Tap(6, 0, 3, 5),) and steering.at == pytest.approx(time.monotonic(), abs=5)
    stop = threading.Event()

    def write():
        while not stop.is_set():
            file.write(steering)

    file.write(steering)
    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(file.read() == steering for _ in range(300))
    finally:
        stop.set()
        writer.join()
    assert [path.name for path in tmp_path.iterdir()] == ["steering.json"]


def test_what_is_held_is_done_for_the_whole_chunk():
    helm = Helm()
    assert helm.actions(Steering(1, *FORWARD), 16) == ActionScript([Segment(*FORWARD, 16)])
    assert helm.actions(Steering(2), 8) == ActionScript([Segment(0, 0, 8)])


def test_a_press_between_two_chunks_is_not_lost_and_one_that_a_chunk_saw_is_not_repeated():
    helm = Helm()
    missed = Steering(2, taps=(Tap(1, *RIGHT, 5),))
    assert helm.actions(missed, 16) == ActionScript([Segment(*RIGHT, 5), Segment(0, 0, 11)])
    assert helm.actions(missed, 16) == ActionScript([Segment(0, 0, 16)])  # the message repeats it
    held = Steering(3, *FORWARD, taps=missed.taps)
    assert helm.actions(held, 16) == ActionScript([Segment(*FORWARD, 16)])
    released = Steering(4, taps=(*missed.taps, Tap(3, *FORWARD, 20)))
    assert helm.actions(released, 16) == ActionScript([Segment(0, 0, 16)])


def test_looking_far_about_takes_several_chunks_but_not_for_ever():
    helm = Helm()
    look = Steering(1, taps=(Tap(1, *RIGHT, 40),))
    lengths = [helm.actions(look, 16) for _ in range(4)]
    assert [script.pairs(0, 16).count(RIGHT) for script in lengths] == [16, 16, 8, 0]
    wild = Steering(3, taps=tuple(Tap(2, *RIGHT, 100) for _ in range(16)))
    turned = sum(helm.actions(wild, 80).pairs(0, 80).count(RIGHT) for _ in range(20))
    assert 0 < turned <= MAX_TAP_FRAMES


# ---------------------------------------------------------------------------------------------------------------- pace


class Machine:
    """A computer whose chunks take `fixed` seconds and `per_frame` more, every third one `refresh` seconds longer after
    it is shown, and a browser 20 ms away that draws as `frames.js` does."""

    def __init__(self, fixed: float, per_frame: float, refresh: float = 0.0, lengths=(16, 24, 32, 48)):
        self.fixed, self.per_frame, self.refresh = fixed, per_frame, refresh
        self.pace = Pace(lengths, 30)
        self.now, self.made, self.waited = 0.0, 0, 0.0
        self.chunks: list[tuple[float, int]] = []  # when it was begun, its frames
        self.begins: list[float] = []  # when the first frame of each is drawn
        self.arriving: list[tuple[float, int, float]] = []  # when, how many frames, how long they have to last
        self.drawn, self.there, self.rate, self.at = 0.0, 0, 30.0, 0.0  # the browser's, at this time
        self.rates: list[float] = []
        self.stalls: list[float] = []  # seconds

    def play(self, seconds: float) -> None:
        """Makes chunks whenever they are due; what the browser has drawn is known as it is drawn."""
        end = self.now + seconds
        while self.now < end:
            self.draw()
            if not self.pace.is_due(self.made, int(self.drawn), 0.0):
                self.now += 0.02
                self.waited += 0.02
                continue
            began, frames = self.now, self.pace.frames
            took = self.fixed + self.per_frame * frames
            self.now += 0.8 * took
            self.chunks.append((began, frames))
            self.arriving.append((self.now + 0.02, frames, self.pace.until_next(0.8 * took)))
            self.made += frames
            self.now += 0.2 * took + self.refresh * (len(self.chunks) % 3 == 0)
            self.draw()
            self.pace.took(self.now - began, 0.8 * took, len(self.stalls))

    def draw(self) -> None:
        """What the browser does until now."""
        while self.arriving and self.arriving[0][0] <= self.now:
            arrived, frames, lasts = self.arriving.pop(0)
            self._draw_until(arrived)
            if self.there and arrived > self.at + 0.034:
                self.stalls.append(arrived - self.at)
            self.rate = min(30, (self.there + frames - self.drawn) / lasts)
            self.begins.append(arrived + (self.there - self.drawn) / self.rate)
            self.at, self.there = arrived, self.there + frames
            self.rates.append(self.rate)
        self._draw_until(self.now)

    def _draw_until(self, now: float) -> None:
        """Stops at the time when there is nothing left."""
        drawn = min(self.there, self.drawn + (now - self.at) * self.rate)
        self.at, self.drawn = (now if drawn < self.there else self.at + (drawn - self.drawn) / self.rate), drawn

    def lengths(self, last: int) -> set[int]:
        return {frames for _, frames in self.chunks[-last:]}

    def delays(self, last: int) -> list[float]:
        """From a chunk's beginning to the first frame of it that is drawn."""
        return [begin - began for begin, (began, _) in zip(self.begins, self.chunks, strict=False)][-last:]


def test_a_quick_machine_plays_the_shortest_chunks_without_waiting_and_is_hardly_ahead():
    machine = Machine(0.1, 0.01)
    machine.play(20)
    assert machine.lengths(99) == {16} and set(machine.rates[-10:]) == {30}
    assert len(machine.stalls) <= 2  # at the beginning, until it is known how long a chunk takes
    assert machine.waited > 5  # a chunk is not begun before it has to be
    assert max(machine.delays(20)) < 0.208 + 4 * MARGIN


def test_a_machine_with_much_to_do_for_each_chunk_makes_longer_ones():
    machine = Machine(0.45, 0.012)  # 16 frames take 0.64 s and last 0.53 s; 32 frames 0.83 s and 1.07 s
    machine.play(40)
    assert machine.lengths(5) <= {24, 32} and set(machine.rates[-5:]) == {30}
    before = len(machine.stalls)
    machine.play(20)
    assert len(machine.stalls) - before <= 1


@pytest.mark.parametrize("per_frame, refresh", [(0.1, 0.0), (0.06, 0.0), (0.05, 0.3), (0.04, 0.2), (0.035, 0.0)])
def test_a_slow_machine_plays_slowly_but_evenly_with_short_chunks_and_never_rests(per_frame, refresh):
    machine = Machine(0.0, per_frame, refresh)
    machine.play(40)
    assert machine.lengths(5) == {16}
    before, waited, made = len(machine.stalls), machine.waited, machine.made
    machine.play(60)
    chunk = 16 * per_frame + refresh / 3
    assert len(machine.stalls) - before <= 1
    assert machine.waited - waited < 0.05 * 60
    assert machine.made - made > 0.9 * 16 * 60 / chunk  # all that the machine makes is shown
    rates = machine.rates[-40:]
    assert max(rates) < 1.5 * min(rates)
    # As long as it takes to make, and what one that takes longer may need: no queue of frames besides.
    assert max(machine.delays(40)) < 0.8 * 16 * per_frame + 1.1 * refresh + 4 * MARGIN


def test_no_chunk_is_so_long_that_keys_take_long_where_the_film_stays_slow_all_the_same():
    """24 frames would be made a third faster, but a key would have to wait for two seconds."""
    machine = Machine(1.0, 0.02)
    machine.play(60)
    assert machine.lengths(99) == {16}


def test_a_machine_that_has_become_free_makes_short_chunks_again():
    machine = Machine(0.5, 0.012)
    machine.play(40)
    assert min(machine.lengths(5)) > 16
    machine.fixed = 0.1
    machine.play(60)
    assert machine.lengths(5) == {16}


def test_a_pause_of_the_machine_does_not_leave_a_queue_behind():
    machine = Machine(0.0, 0.05)
    machine.play(20)
    usual = max(machine.delays(10))
    machine.now += 3  # another program had the cores
    machine.play(40)
    assert max(machine.delays(10)) < usual + 0.2


def test_stalls_make_the_next_chunks_earlier_until_there_are_none():
    pace = Pace([16], 30)

    def earliest() -> int:
        return next(ahead for ahead in range(60, -1, -1) if pace.is_due(100 + ahead, 100, 0.0))

    pace.took(0.2, 0.1)
    late = earliest()
    pace.took(0.2, 0.1, stalls=1)
    assert earliest() == pytest.approx(late + MARGIN * 30, abs=1)
    for _ in range(20):
        pace.took(0.2, 0.1, stalls=1)
    assert earliest() == late


# ------------------------------------------------------------------------------------------------------------- keeping


@pytest.fixture
def store(tmp_path) -> FilmStore:
    return FilmStore(tmp_path / "films", lifetime=60, fps=30)


@pytest.fixture
def studio(world, store) -> Studio:
    return Studio(SingleModelPool(world), store)


@pytest.fixture
def walked(world, store, picture):
    """A film of three chunks of 8 frames, kept as a walk is; the chunks."""
    film, session, chunks = store.new(), world.start(picture, SETTINGS), []
    film.begin(session)
    with Recorder(film) as recorder:
        for _ in range(3):
            chunks.append(world.next_chunk(session, frames=8))
            session = chunks[-1].session
            recorder.add(chunks[-1])
    return film, chunks


def test_a_walk_is_one_piece_with_the_sessions_of_its_end(walked):
    film, chunks = walked
    (piece,) = film.pieces()
    assert (piece.index, piece.chunks, piece.frames, film.num_frames, film.num_chunks) == (0, 3, 25, 25, 3)
    assert film.session().num_frames == 25 and film.previous().num_frames == 17
    assert len(read_mp4(film.finish()["film"])) == 25
    made = np.concatenate([chunk.frames for chunk in chunks])
    assert np.corrcoef(read_mp4(film.finish()["film"])[..., 1].ravel(), made[..., 1].ravel())[0, 1] > 0.9


def test_the_last_chunk_of_a_walk_is_made_again_and_the_rest_stays(walked, world):
    film, chunks = walked
    before = read_mp4(film.finish()["film"])
    again = world.next_chunk(chunks[1].session.with_seed(9), frames=8)
    film.add(again)
    assert [(piece.index, piece.chunks, piece.frames) for piece in film.pieces()] == [(0, 2, 17), (2, 1, 8)]
    after = read_mp4(film.finish()["film"])
    assert len(after) == 25 and np.array_equal(after[:17], before[:17])
    assert film.session().num_frames == 25 and film.previous().num_frames == 17


def test_pieces_of_a_walk_are_as_long_as_asked_for(world, store, picture):
    film, session = store.new(), world.start(picture, SETTINGS)
    film.begin(session)
    with PieceWriter(film, 16) as pieces:
        for expected in (False, True, False):
            chunk = world.next_chunk(session, frames=8)
            session = chunk.session
            assert pieces.add(chunk) is expected
    assert [(piece.index, piece.chunks, piece.frames) for piece in film.pieces()] == [(0, 2, 17), (2, 1, 8)]


def test_what_a_killed_server_had_not_written_is_decoded_again(walked, studio, runner):
    film, chunks = walked
    for piece in film.pieces():
        piece.path.unlink()
    (film._pieces / "unfinished-ab.mp4").write_bytes(b"half")  # not whole, and nobody's any more
    asyncio.run(listen(runner.submit(studio.go_on(film, 1, SETTINGS))))
    assert film.num_frames == 25 + 80 and film.num_chunks == 4
    assert len(read_mp4(film.finish()["film"])) == 105


# ------------------------------------------------------------------------------------------------------------- playing


@pytest.fixture
def runner(studio):
    runner = Runner(studio.models)
    yield runner
    runner.close()


async def listen(run) -> list:
    return [update async for update in run.updates()]


class Player:
    """A browser that draws what it gets at once, and steers."""

    def __init__(self, runner: Runner, job):
        self.run = runner.submit(job)
        self.film = job.film
        self.heard: list = []
        self.steering = Steering()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._listen()))
        self._thread.start()

    async def _listen(self) -> None:
        async for update in self.run.updates(pause=0.05):
            self.heard.append(update)
            if not isinstance(update, Ended):
                self.steer(shown=sum(strip.frames for strip in self.strips.values()))
        self.ended = update

    @property
    def strips(self) -> dict:
        self._strips = {**getattr(self, "_strips", {}), **{strip.number: strip for strip in list(self.run.strips)}}
        return self._strips

    def steer(self, **changes) -> None:
        with self._lock:
            self.steering = dataclasses.replace(self.steering, at=time.monotonic(), **changes)
            if self.film.folder.is_dir():
                SteeringFile(self.film.steering_path).write(self.steering)

    def until(self, condition, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not condition(self):
            assert time.monotonic() < deadline, self.heard[-3:]
            time.sleep(0.01)

    def leave(self) -> Ended:
        self.run.cancel()
        return self.wait()

    def wait(self, seconds: float = 240) -> Ended:
        self._thread.join(seconds)
        assert not self._thread.is_alive()
        return self.ended


def actions_of(player: Player) -> list[tuple[int, int]]:
    session = player.film.session()
    return session.settings.actions.pairs(0, session.num_frames - 1)


def test_a_walk_does_what_is_steered_and_is_a_film_like_any_other(studio, runner, picture):
    player = Player(runner, studio.play(picture, SETTINGS))
    player.until(lambda p: len(p.strips) >= 2)
    player.steer(number=1, move=FORWARD[0], view=FORWARD[1])
    player.until(lambda p: any(strip.steered == 1 for strip in p.strips.values()))
    player.steer(number=2, move=RIGHT[0], view=RIGHT[1])
    player.until(lambda p: any(strip.steered == 2 for strip in p.strips.values()))
    assert player.leave() == Ended(stopped=True)
    film, strips = player.film, player.strips
    done = actions_of(player)
    assert [*dict.fromkeys(done)] == [(0, 0), FORWARD, RIGHT]
    said = [(move, view) for number in sorted(strips) for move, view, n in strips[number].actions for _ in range(n)]
    assert said == done  # what was shown is kept
    assert film.num_frames == film.session().num_frames == len(read_mp4(film.finish()["film"]))
    assert sum(strip.frames for strip in strips.values()) == film.num_frames
    assert not list(film._pieces.glob("unfinished*"))
    asyncio.run(listen(runner.submit(studio.go_on(film, 1, SETTINGS))))  # Continue
    asyncio.run(listen(runner.submit(studio.redo(film, dataclasses.replace(SETTINGS, seed=5)))))
    assert film.num_frames == len(done) + 1 + 80
    more = Player(runner, studio.play_on(film, SETTINGS))
    more.until(lambda p: len(p.strips) >= 1)
    more.leave()
    assert film.num_frames > len(done) + 81 and actions_of(more)[: len(done)] == done


def test_the_thread_that_loads_a_model_keeps_no_threads_of_its_own(world, monkeypatch):
    """Or two pools of them would share the cores, and sleep whenever they wait for each other."""
    loaders = []
    monkeypatch.setattr(
        model_pool.infworld, "load", lambda *_, **__: loaders.append(threading.current_thread()) or world
    )
    pool = ModelPool({world.config.name: world.config}, "cpu")
    assert pool.is_loaded(world.config.name)
    (loader,) = loaders
    assert not loader.is_alive()


def test_a_model_that_cannot_be_loaded_is_an_error_at_once(world):
    broken = dataclasses.replace(world.config, checkpoint_path="nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ModelPool({broken.name: broken}, "cpu")


def test_a_walk_takes_no_more_steps_than_its_model_wants_for_that(world, store, picture, walked, monkeypatch):
    many = dataclasses.replace(SETTINGS, steps=5)
    assert Studio(SingleModelPool(world), store).play(picture, many).settings.steps == 5
    lengths = dataclasses.replace(world.config.validation_data, live_steps=3)
    monkeypatch.setattr(world, "config", dataclasses.replace(world.config, validation_data=lengths))
    studio = Studio(SingleModelPool(world), store)
    assert studio.play(picture, many).settings.steps == studio.play_on(walked[0], many).settings.steps == 3
    assert studio.play(picture, SETTINGS).settings.steps == 2
    assert studio.begin(picture, 81, many).settings.steps == studio.go_on(walked[0], 1, many).settings.steps == 5


def test_strips_hold_the_frames_of_the_film(studio, runner, picture):
    import io

    from PIL import Image

    player = Player(runner, studio.play(picture, SETTINGS))
    player.until(lambda p: len(p.strips) >= 2)
    player.leave()
    frames, shown = read_mp4(player.film.finish()["film"]), []
    for number in sorted(player.strips):
        strip = player.strips[number]
        width, height = strip.size
        sheet = np.array(Image.open(io.BytesIO(strip.jpeg)))
        cells = [(i // runs.COLUMNS * height, i % runs.COLUMNS * width) for i in range(strip.frames)]
        shown += [sheet[y : y + height, x : x + width] for y, x in cells]
    both = min(len(frames), len(shown))
    assert both >= 9
    assert np.corrcoef(frames[:both].ravel(), np.stack(shown[:both]).ravel())[0, 1] > 0.95


def test_generating_is_at_most_a_chunk_or_two_ahead_of_what_is_shown(studio, runner, picture):
    """A browser that shows nothing gets no more than the beginning, and after a while the place is free."""
    run = runner.submit(studio.play(picture, SETTINGS))
    deadline = time.monotonic() + 30
    while not run.strips and time.monotonic() < deadline:
        time.sleep(0.02)
    SteeringFile(run.job.film.steering_path).write(Steering(shown=0, at=time.monotonic(), paused=True))
    time.sleep(1)
    made = len([update for update in run._updates if isinstance(update, Played)])
    time.sleep(1)
    assert made == len([update for update in run._updates if isinstance(update, Played)]) <= 3
    run.cancel()
    asyncio.run(listen(run))


def test_who_is_not_heard_of_loses_the_place_but_not_the_walk(studio, runner, picture, monkeypatch):
    monkeypatch.setattr(runs, "ASLEEP", 0.5)
    run = runner.submit(studio.play(picture, SETTINGS))
    *_, ended = asyncio.run(listen(run))
    assert ended.stopped and "Nothing was heard" in ended.why
    assert run.job.film.num_frames == run.job.film.session().num_frames > 1


def test_the_turn_ends_when_somebody_waits_and_the_next_one_is_told_when(studio, runner, picture, monkeypatch):
    monkeypatch.setattr(runs, "TURN", 1.0)
    monkeypatch.setattr(runs, "NOTICE", 2.0)
    first = Player(runner, studio.play(picture, SETTINGS))
    first.until(lambda p: len(p.strips) >= 1)
    time.sleep(1.2)
    assert not first.run.is_over  # nobody waits, so that it may go on
    assert all(update.seconds_left is None for update in first.heard if isinstance(update, Played))
    second = Player(runner, studio.play(picture, SETTINGS))
    ended = first.wait()
    assert "Somebody else waits" in ended.why and ended.stopped
    left = [update.seconds_left for update in first.heard if isinstance(update, Played) and update.seconds_left]
    assert left and max(left) <= 2.0 and sorted(left, reverse=True) == left
    waited = [update for update in second.heard if isinstance(update, Waiting)]
    assert waited and waited[0].place == 1 and waited[0].seconds <= 2.0
    second.until(lambda p: len(p.strips) >= 1)
    second.leave()
    assert first.film.num_frames == first.film.session().num_frames > 1


def test_a_walk_ends_where_the_film_is_full(world, studio, runner, picture, monkeypatch):
    lengths = dataclasses.replace(world.config.validation_data, max_chunks=1)
    monkeypatch.setattr(world, "config", dataclasses.replace(world.config, validation_data=lengths))
    player = Player(runner, studio.play(picture, SETTINGS))
    ended = player.wait()
    assert "as long as it can be" in ended.why and player.film.num_frames == 81


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ZeroGPU forks")
def test_steering_reaches_a_process_that_was_forked_before_it(world, store, picture, monkeypatch):
    """And a call that is over is followed by the next, with the same walk."""
    calls = []

    def gpu(duration):
        def decorate(function):
            call = other_process(function)

            def wrapped(task):
                calls.append((task.made, duration(task)))
                return call(task)

            return wrapped

        return decorate

    monkeypatch.setattr(compute.spaces, "GPU", gpu)
    monkeypatch.setattr(compute, "ON_ZERO_GPU", True)
    monkeypatch.setattr(compute, "WALK_SECONDS", 3.0)
    models = SingleModelPool(world)
    studio, runner = Studio(models, store), Runner(models)
    player = Player(runner, studio.play(picture, SETTINGS))
    player.until(lambda p: p.strips)
    player.steer(number=1, move=FORWARD[0], view=FORWARD[1])
    player.until(lambda p: any(strip.steered == 1 for strip in p.strips.values()))
    player.until(lambda p: len(calls) >= 2 and len(p.strips) >= 3)
    player.leave()
    runner.close()
    assert FORWARD in actions_of(player)
    assert calls[0][0] == 0 and calls[1][0] > 0 and all(seconds >= 3 for _, seconds in calls)
    assert len(read_mp4(player.film.finish()["film"])) == player.film.session().num_frames


def test_an_error_in_the_middle_keeps_what_was_walked(world, studio, runner, picture, monkeypatch):
    iterate, calls = world.iterate, []

    def breaks(*arguments, **options):
        calls.append(1)
        if len(calls) > 3:
            raise OSError("the disk is gone")
        return iterate(*arguments, **options)

    monkeypatch.setattr(world, "iterate", breaks)
    player = Player(runner, studio.play(picture, SETTINGS))
    ended = player.wait()
    assert "the disk is gone" in str(ended.error)
    assert player.film.num_frames == player.film.session().num_frames == 25


def test_a_call_of_limited_time_ends_after_a_chunk(world, picture, tmp_path):
    """As on ZeroGPU, where the next call goes on with what the last one made."""
    prepared = world.start(picture, SETTINGS)
    task = Walk(Opening(prepared.picture[0], SETTINGS), tmp_path / "steering.json", seconds=0.01)
    opened, *lives, frames, chunk = perform(world, task)
    assert all(isinstance(live, Live) for live in lives) and lives[0].actions is not None
    assert isinstance(frames, Frames) and isinstance(chunk, Chunk)
    assert opened.num_frames == 1 and chunk.session.num_frames == 9
    again = Walk(chunk.session, tmp_path / "steering.json", made=9, seconds=0.05)
    assert not [result for result in perform(world, again) if isinstance(result, Chunk)]  # two chunks' time is ahead
