"""Memory that the server shares with its policy's process: nobody writes where somebody still reads."""

import gc
import os
from typing import Any

import numpy as np
import pytest

from triune.policies.serve.channel import HEADER, SMALL, Arena, Coder


def sides(size: int = 1 << 20) -> tuple[Coder, Coder]:
    """The server's and the policy's end of one channel."""
    asks, answers = Arena.new(size), Arena.new(size)
    return Coder(asks, answers), Coder(Arena(answers.fd, size), Arena(asks.fd, size), in_place=True)


def sent(one: Coder, other: Coder, message: Any) -> Any:
    return other.decode(one.encode(message)[HEADER.size :])


def picture(value: int, size: int = 3 * SMALL) -> np.ndarray:
    return np.full(size, value, np.uint8)


def taken(arena: Arena, size: int, end: int | None = None) -> tuple[int, np.ndarray]:
    got = arena.take(size, end)
    assert got is not None
    return got


def test_a_block_is_taken_for_as_long_as_anything_reads_in_it() -> None:
    arena = Arena.new(1 << 16)
    place, block = taken(arena, 1000)
    view = np.ndarray((10, 10), np.uint8, memoryview(block).toreadonly(), 100)[2:, ::2].reshape(-1, 1).T
    del block
    assert place == 0 and taken(arena, 1000)[0] == 1024, "a view of a view does not hold its block"
    del view
    assert taken(arena, 1000)[0] == 0


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="there is no /dev/shm")
def test_the_memory_needs_no_room_in_a_file_system() -> None:
    arena = Arena.new(1 << 14)
    assert os.fstat(arena.fd).st_dev != os.stat("/dev/shm").st_dev


def test_the_lowest_gap_that_is_large_enough_is_taken() -> None:
    arena = Arena.new(1 << 14)
    blocks: list[Any] = [taken(arena, size) for size in (100, 1000, 100, 500)]
    assert [place for place, _ in blocks] == [0, 128, 1152, 1280]
    blocks[1] = None
    large, fitting = taken(arena, 1025), taken(arena, 1024)
    assert (large[0], fitting[0]) == (1792, 128)
    assert arena.take(1 << 14) is None and arena.take(100, end=1792) is None and taken(arena, 100)[0] == 2880


def test_what_lies_in_the_arena_is_not_copied_and_what_does_not_is() -> None:
    server, policy = sides()
    _, block = taken(server.mine, 4 * SMALL)
    block[:] = 7
    inside, outside, small = block[SMALL : 3 * SMALL], picture(8), np.arange(5.0)
    got = sent(server, policy, {"inside": inside, "outside": outside, "small": small, "word": [1, "a", None]})
    assert got["word"] == [1, "a", None] and np.array_equal(got["small"], small)
    assert np.array_equal(got["inside"], inside) and np.array_equal(got["outside"], outside)
    block[:] = 9  # the policy reads the same memory
    assert (got["inside"] == 9).all() and (got["outside"] == 8).all()
    with pytest.raises(ValueError, match="read-only"):
        got["inside"][0] = 1


def test_what_the_policy_keeps_is_not_written_over() -> None:
    server, policy = sides()
    kept = []
    for step in range(20):
        got = sent(server, policy, {"a": picture(step), "b": picture(100 + step)})
        if step % 3 == 0:
            kept.append(got["a"][::2])
        del got
        assert sent(policy, server, {"actions": picture(200 + step)})["actions"][0] == 200 + step
    assert [int(view[0]) for view in kept] == list(range(0, 20, 3)) and all((view == view[0]).all() for view in kept)
    assert len(server._lent) == len(kept)
    kept.clear()
    sent(server, policy, {})
    sent(policy, server, {})
    assert not server._lent


def test_what_stands_twice_in_a_message_is_kept_by_either() -> None:
    for kept in (0, 1):
        server, policy = sides()
        _, block = taken(server.mine, 3 * SMALL)
        block[:] = 1
        view = sent(server, policy, [block, block])[kept]
        del block
        sent(policy, server, {})
        for step in range(5):
            sent(server, policy, picture(2 + step))
            sent(policy, server, {})
        assert (view == 1).all()


def test_answers_are_the_servers_own() -> None:
    server, policy = sides()
    sent(server, policy, {})
    first = sent(policy, server, {"actions": picture(1)})["actions"]
    sent(server, policy, {})
    sent(policy, server, {"actions": picture(2)})
    assert (first == 1).all() and first.flags.writeable


def test_without_room_arrays_travel_in_the_message() -> None:
    server, policy = sides(size=1 << 14)
    many = [picture(i, 2 * SMALL) for i in range(4)]
    body = server.encode(many)
    assert len(body) > 2 * 2 * SMALL
    assert all(np.array_equal(a, b) for a, b in zip(policy.decode(body[HEADER.size :]), many, strict=True))


def test_an_arena_that_is_closed_can_still_be_read() -> None:
    arena = Arena.new(1 << 14)
    _, block = taken(arena, 5000)
    block[:] = 3
    os.close(arena.fd)
    arena.close()
    del arena
    gc.collect()
    assert (block == 3).all()
