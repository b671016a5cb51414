"""What tests of sessions share: comparing two, and damaging a file."""

import json
from pathlib import Path

import numpy as np
import torch

from infworld.checkpoint import read_metadata, read_tensors, save_tensors
from infworld.session import Session
from infworld.world import Chunk


def state(session: Session) -> dict[str, torch.Tensor]:
    """Copies of all tensors of a session by name."""
    tensors = {"history": session.history, "generator": session.generator_state, "picture": session.picture}
    tensors |= {f"encoder.{name}": tensor for name, tensor in session.encoder_state.items()}
    tensors |= {f"chunk.{i}": tensor for i, tensor in enumerate(session.chunk_latents)}
    return {name: torch.as_tensor(tensor).clone() for name, tensor in tensors.items()}


def values(session: Session) -> dict:
    """All other fields of a session."""
    return {"model": session.model, "num_frames": session.num_frames, **vars(session.settings)}


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_same_chunk(a: Chunk, b: Chunk) -> None:
    """Bit for bit, with everything that follows from it."""
    assert a.index == b.index and torch.equal(a.latents, b.latents) and np.array_equal(a.frames, b.frames)
    assert same_state(state(a.session), state(b.session)) and values(a.session) == values(b.session)


def rewrite(path: Path, tensors=lambda t: t, values=lambda v: v) -> None:
    """Changes a session file's tensors and plain values, both dicts, in place."""
    found, metadata = read_tensors(path), read_metadata(path)
    session = json.dumps(values(json.loads(metadata["session"])))
    save_tensors(path, tensors(dict(found)), {**metadata, "session": session})
