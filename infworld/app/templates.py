"""Scripts to begin with, for the row of buttons above the timeline."""

from __future__ import annotations

from infworld.actions import ActionScript

# Structure of the two example walks that were published with the released model; frames per segment.
CAMPUS_WALK = (
    "forward 81, right 81, forward 81, right 81, left 243, forward 162, right 162, forward 162, right 343"  # 1396
)
FANTASY_STREET = (
    "right 81, forward 81, left 162, forward 162, left 162, right 243, "
    "up 81, down 81, left 81, forward 162, left 81, right 181"  # 1558
)


def walk_templates(turn_degrees: float, chunk_frames: int = 80) -> dict[str, ActionScript]:
    """Named scripts, shortest first, for a camera that turns `turn_degrees` a frame and walks a chunk per straight.

    The closed walks end where they began, as far as a quarter turn is a whole number of frames. Raises ValueError
    for a turn of 0 degrees or less.
    """
    if turn_degrees <= 0:
        raise ValueError(f"turn_degrees must be above 0, not {turn_degrees!r}")
    quarter, straight = round(90 / turn_degrees), chunk_frames
    texts = {
        "Look around": f"right {quarter}, left {2 * quarter}, right {quarter}",
        "Full circle": f"right {4 * quarter}",
        "Walk and return": f"forward {straight}, right {2 * quarter}, forward {straight}, right {2 * quarter}",
        "Square": ", ".join([f"forward {straight}, right {quarter}"] * 4),
        "Figure eight": f"forward+right {4 * quarter}, forward+left {4 * quarter}",
        "Campus walk": CAMPUS_WALK,
        "Fantasy street": FANTASY_STREET,
    }
    return {name: ActionScript.parse(text) for name, text in texts.items()}
