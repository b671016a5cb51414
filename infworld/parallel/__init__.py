"""One film on several devices of a host, one process each.

`torchrun --nproc-per-node N` starts the processes; `join_team` makes a Team of them, which a World takes. With an even
number of ranks each half evaluates one of guidance's two texts, with the tokens split over its ranks; with an odd
number, or without guidance, the tokens are split over all. All ranks keep the same latents, and nothing is
approximated: results differ from one device's by rounding.

Rank 0 decides: it alone hears callbacks, writes and stops, and the others follow.

tensors: sharding. control: the Team. supervision: sockets between the processes.
"""

from infworld.parallel.control import Team, device_of_rank, join_team, rank, world_size
from infworld.parallel.supervision import LOST, Abandoned
from infworld.parallel.tensors import shares

__all__ = ["LOST", "Abandoned", "Team", "device_of_rank", "join_team", "rank", "shares", "world_size"]
