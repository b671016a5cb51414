"""Films out: every film can be played and holds what was written."""

import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from infworld import video


def moving(frames=12, height=32, width=48):
    """A bright bar that moves two pixels a frame."""
    film = np.full((frames, height, width, 3), 40, np.uint8)
    for index in range(frames):
        film[index, :, 2 * index : 2 * index + 8] = (220, 180, 60)
    return film


def test_a_film_has_the_frames_that_were_written(tmp_path):
    frames = moving()
    read = video.read_mp4(video.write_mp4(tmp_path / "film.mp4", frames))
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames).mean() < 4
    assert (np.abs(read[:, 16, :, 0].astype(int) - frames[:, 16, :, 0]).max(1) < 60).all()  # each frame in its place


def test_flat_colours_survive(tmp_path):
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (12, 12, 12), (128, 90, 200)], np.uint8)
    frames = np.repeat(colours[:, None, None], 32, 1).repeat(48, 2)
    read = video.read_mp4(video.write_mp4(tmp_path / "film.mp4", frames))
    assert np.abs(read[:, 8:-8, 8:-8].astype(int) - frames[:, 8:-8, 8:-8]).max() <= 6


@pytest.mark.parametrize("fragmented", [False, True])
def test_pieces_join_to_the_whole(tmp_path, fragmented):
    frames = moving()
    paths = [
        video.write_mp4(tmp_path / f"it's {i}.mp4", part, fragmented=fragmented)
        for i, part in enumerate((frames[:1], frames[1:7], frames[7:]))
    ]
    joined = video.read_mp4(video.concat_mp4(paths, tmp_path / "joined.mp4"))
    assert np.array_equal(joined, np.concatenate([video.read_mp4(path) for path in paths]))
    assert len(joined) == len(frames)


def test_a_complete_film_starts_before_it_is_loaded(tmp_path):
    """The index (moov) stands before the pictures (mdat), so that a browser plays while it loads."""
    paths = [video.write_mp4(tmp_path / f"{i}.mp4", moving()) for i in range(2)]
    for path in (paths[0], video.concat_mp4(paths, tmp_path / "joined.mp4")):
        data = path.read_bytes()
        assert 0 < data.index(b"moov") < data.index(b"mdat")
    assert b"moof" in video.write_mp4(tmp_path / "piece.mp4", moving(), fragmented=True).read_bytes()


def test_what_was_written_before_an_interruption_can_be_played(tmp_path):
    path = tmp_path / "film.mp4"
    with pytest.raises(KeyboardInterrupt), video.Mp4Writer(path) as film:
        film.write(moving()[:5])
        film.write(moving()[5:9])
        raise KeyboardInterrupt
    assert film.frames == len(video.read_mp4(path)) == 9
    assert os.listdir(tmp_path) == ["film.mp4"]


def test_an_interruption_before_the_first_frame_keeps_the_old_film(tmp_path):
    old = video.write_mp4(tmp_path / "film.mp4", moving()).read_bytes()
    with pytest.raises(KeyboardInterrupt), video.Mp4Writer(tmp_path / "film.mp4"):
        raise KeyboardInterrupt
    assert (tmp_path / "film.mp4").read_bytes() == old


@pytest.mark.skipif(os.name == "nt", reason="process groups are POSIX")
def test_ctrl_c_in_a_terminal_leaves_a_playable_film(tmp_path):
    """A terminal sends Ctrl-C to the whole process group; the ffmpeg that writes must outlive it."""
    program = """
        import sys, time, numpy as np
        from infworld.video import Mp4Writer
        with Mp4Writer(sys.argv[1]) as film:
            film.write(np.zeros((7, 32, 48, 3), np.uint8))
            print("written", flush=True)
            time.sleep(60)
    """
    path = tmp_path / "film.mp4"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == b"written\n"
    os.killpg(process.pid, 2)
    process.wait(20)
    assert len(video.read_mp4(path)) == 7


@pytest.mark.parametrize("name", ["no/folder.mp4", "folder.mp4", "film.avi", "film"])
def test_an_unwritable_output_is_refused_before_any_work(tmp_path, name):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match="output must be|cannot write"):
        video.Mp4Writer(tmp_path / name)


def test_a_folder_that_cannot_be_written_is_refused():
    with pytest.raises(ValueError, match="cannot write"):
        video.Mp4Writer("/proc/film.mp4")


def test_frames_that_no_film_can_hold_are_refused(tmp_path):
    with video.Mp4Writer(tmp_path / "film.mp4") as film:
        with pytest.raises(ValueError, match="even"):
            film.write(np.zeros((2, 31, 48, 3), np.uint8))
        with pytest.raises(ValueError, match="T H W 3"):
            film.write(np.zeros((2, 32, 48, 4), np.uint8))
        film.write(moving())
        with pytest.raises(ValueError, match="48 x 32"):
            film.write(np.zeros((2, 16, 48, 3), np.uint8))
    assert len(video.read_mp4(tmp_path / "film.mp4")) == 12


def test_a_writer_that_dies_is_an_error_and_no_film(tmp_path):
    with pytest.raises(OSError, match="could not write"), video.Mp4Writer(tmp_path / "film.mp4") as film:
        film.write(moving())
        film._process.kill()
    assert os.listdir(tmp_path) == []


def test_what_is_no_film_cannot_be_joined_or_read(tmp_path):
    (tmp_path / "text.mp4").write_text("no film")
    with pytest.raises(OSError, match="could not join"):
        video.concat_mp4([tmp_path / "text.mp4"], tmp_path / "joined.mp4")
    with pytest.raises(ValueError, match="no film to join"):
        video.concat_mp4([], tmp_path / "joined.mp4")
    with pytest.raises(ValueError, match="text.mp4"):
        video.read_mp4(tmp_path / "text.mp4")
    with pytest.raises(FileNotFoundError):
        video.read_mp4(tmp_path / "gone.mp4")


def tags(path):
    """Primaries, transfer, matrix and full range of an mp4: its `colr` box (ISO 14496-12, section 12.1.5)."""
    data = path.read_bytes()
    box = data.index(b"colrnclx") + 8
    return [int.from_bytes(data[box + 2 * i : box + 2 * i + 2], "big") for i in range(3)] + [data[box + 6] >> 7]


@pytest.mark.parametrize("ffmpeg", ["own", "system"])
def test_colours_are_tagged_so_that_every_player_shows_them_alike(tmp_path, monkeypatch, ffmpeg):
    """All BT.709 (1), limited range: with the ffmpeg that comes along, and with the system's, if there is one."""
    if ffmpeg == "system":
        if shutil.which("ffmpeg") is None:
            pytest.skip("no ffmpeg on PATH")
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", shutil.which("ffmpeg"))
    pieces = [video.write_mp4(tmp_path / f"{i}.mp4", moving(), fragmented=True) for i in range(2)]
    for path in (
        *pieces,
        video.write_mp4(tmp_path / "film.mp4", moving()),
        video.concat_mp4(pieces, tmp_path / "j.mp4"),
    ):
        assert tags(path) == [1, 1, 1, 0]


def test_an_ffmpeg_that_is_not_there_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/no/such/ffmpeg")
    with pytest.raises(OSError, match="/no/such/ffmpeg"):
        video.Mp4Writer(tmp_path / "film.mp4")


def test_films_written_at_once_under_one_name_are_both_whole(tmp_path):
    one, two = (video.Mp4Writer(tmp_path / "film.mp4") for _ in range(2))
    for _ in range(3):
        one.write(moving())
        two.write(moving(4))
    one.close()
    assert len(video.read_mp4(tmp_path / "film.mp4")) == 36
    two.close()
    assert len(video.read_mp4(tmp_path / "film.mp4")) == 12
    assert os.listdir(tmp_path) == ["film.mp4"]


@pytest.mark.parametrize("name", ["a:b.mp4", "%d it's.mp4", f"{'x' * 251}.mp4"])
def test_any_name_is_written_joined_and_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    video.write_mp4(name, moving())
    (tmp_path / "folder").mkdir()
    assert len(video.read_mp4(video.concat_mp4([name, name], f"folder/{name}"))) == 24


# ------------------------------------------------------------------------------------------------------ chunk by chunk


@pytest.fixture
def noise() -> np.ndarray:
    """25 frames that no encoder keeps as they are."""
    return np.random.default_rng(0).integers(0, 256, (25, 32, 48, 3), dtype=np.uint8)


def test_a_film_of_chunks_is_the_joined_pieces_of_its_chunks(tmp_path, noise):
    chunks = [noise[:9], noise[9:17], noise[17:]]
    film = video.JoinedMp4Writer(tmp_path / "film.mp4")
    for chunk in chunks:
        film.write(chunk)
    film.close()
    assert film.frames == len(noise) and os.listdir(tmp_path) == ["film.mp4"]
    pieces = [
        video.write_mp4(tmp_path / f"{number}.mp4", chunk, fragmented=True) for number, chunk in enumerate(chunks)
    ]
    joined = video.concat_mp4(pieces, tmp_path / "joined.mp4")
    assert (tmp_path / "film.mp4").read_bytes() == joined.read_bytes()
    whole = video.write_mp4(tmp_path / "whole.mp4", noise)  # encoded as one, it is another one
    assert not np.array_equal(video.read_mp4(whole), video.read_mp4(joined))


def test_a_film_of_chunks_that_cannot_be_joined_leaves_nothing(tmp_path, noise, monkeypatch):
    film = video.JoinedMp4Writer(tmp_path / "film.mp4")
    film.write(noise[:9])
    assert len(os.listdir(tmp_path)) == 1
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "false")
    with pytest.raises(OSError, match="could not join"):
        film.close()
    assert film.frames == 0 and not os.listdir(tmp_path)


def test_a_film_of_chunks_that_is_discarded_leaves_what_was_there(tmp_path, noise):
    path = video.write_mp4(tmp_path / "film.mp4", noise[:9])
    before = path.read_bytes()
    film = video.JoinedMp4Writer(path)
    film.write(noise)
    film.discard()
    film.close()
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["film.mp4"] and film.frames == 0
