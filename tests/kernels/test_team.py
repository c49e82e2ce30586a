"""The team of threads: every piece of work is done once, whoever comes; nobody is waited for who has not begun."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numba import carray, cfunc

from qmix.kernels.cpu import workers
from qmix.kernels.cpu.addresses import next_piece
from qmix.kernels.cpu.compiled import KERNEL_SIGNATURE
from qmix.kernels.cpu.futex import FUTEX
from qmix.kernels.cpu.products import multiply_packed
from qmix.kernels.cpu.team import Team
from qmix.kernels.cpu.threads import GRAIN, choose_threads, one_for_torch, threads
from qmix.kernels.cpu.workers import cycles, read

PIECES = 500
ARGUMENTS, ((ARGUMENT,), RESULT) = 3, KERNEL_SIGNATURE
pytestmark = pytest.mark.skipif(not FUTEX, reason="a system without futexes has no team")


@cfunc(RESULT(ARGUMENT))
def mark(block):
    """Add 1 to the word of each piece, after some work. Words: counter, pieces, cycles of a piece, then the pieces."""
    pieces, work = carray(block, ARGUMENTS)[1:]
    marks = carray(block, ARGUMENTS + pieces)
    piece = next_piece(block)
    while piece < pieces:
        began = cycles()
        while cycles() - began < work:
            pass
        marks[ARGUMENTS + piece] += 1
        piece = next_piece(block)


@cfunc(RESULT(ARGUMENT))
def meet(block):
    """Wait until two threads are in the kernel. Words: counter, threads that came."""
    came = carray(block, 2).ctypes.data + 8
    next_piece(block)
    workers.add(came, 1)
    while read(came) < 2:
        pass


def marked(team: Team, helpers: int, work: int = 0, pieces: int = PIECES) -> np.ndarray:
    block = np.zeros(ARGUMENTS + pieces, np.int64)
    block[1:ARGUMENTS] = pieces, work
    team.run(mark.address, block.ctypes.data, helpers)
    return block[ARGUMENTS:]


@pytest.fixture(scope="module")
def team() -> Team:
    return Team()


@pytest.mark.parametrize(("helpers", "work"), [(1, 0), (1, 5000), (3, 5000), (7, 100)])
def test_every_piece_is_done_once_when_the_call_returns(team, helpers, work):
    for _ in range(20):
        assert (marked(team, helpers, work) == 1).all()


def test_helpers_sleep_between_kernels_and_come_again(team):
    for _ in range(3):
        block = np.zeros(2, np.int64)
        team.run(meet.address, block.ctypes.data, 1)  # returns only if a helper comes
        assert block[1] >= 2  # helpers of earlier kernels that still look may come one after the other
        while not read_word(team, workers.SLEEPING):
            threading.Event().wait(0.01)


def test_a_helper_that_never_comes_is_not_waited_for():
    lonely = Team()
    lonely._started = 3  # as if three threads ran and the system gave none of them a core
    assert (marked(lonely, 3) == 1).all()


def test_no_more_helpers_than_the_caller_wants(team):
    marked(team, 3)
    before = threading.active_count()
    assert (marked(team, 1) == 1).all()
    assert threading.active_count() == before
    assert read_word(team, workers.LIMIT) == 1


def test_kernels_are_counted_from_zero_again(team):
    for number in (workers.NUMBERS - 2, workers.NUMBERS - 1):
        shared(team)[workers.GATE : workers.GATE + 4].view(np.int32)[0] = number * workers.NUMBER
        for _ in range(4):
            assert (marked(team, 1, 1000, 50) == 1).all()


def test_two_callers_at_once(team):
    with ThreadPoolExecutor(2) as callers:
        calls = [callers.submit(marked, team, 1, 2000) for _ in range(40)]
        assert all((call.result() == 1).all() for call in calls)


def test_a_forked_process_makes_its_own_team(team):
    x, codes = torch.ones(1, 64, dtype=torch.bfloat16), torch.full((32 * 32,), 0x77, dtype=torch.uint8)
    absmax = torch.ones(1, 32, dtype=torch.bfloat16)
    choose_threads(2)
    try:
        multiply_packed(x, "nf4", codes.data_ptr(), absmax.data_ptr(), 32, 64)
        child = os.fork()
        if not child:
            out = multiply_packed(x, "nf4", codes.data_ptr(), absmax.data_ptr(), 32, 64)
            os._exit(0 if (out == 0).all() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        choose_threads(torch.get_num_threads())


def test_threads_are_torchs_unless_the_thread_chose():
    with ThreadPoolExecutor(1) as other:
        assert other.submit(threads).result() == torch.get_num_threads()
        other.submit(choose_threads, 5).result()
        assert other.submit(threads).result() == 5
    assert threads() == torch.get_num_threads()


def test_a_team_is_kept_as_long_as_its_threads_look_at_its_memory():
    """Two callers that are first at the same time make two teams, of which the process keeps one."""
    made = Team()
    marked(made, 1)
    kept = weakref.ref(made)
    del made
    gc.collect()
    assert kept() is not None


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("chosen", [None, 2])
def test_small_operations_have_one_thread_of_torch_and_kernels_all(three_threads, chosen):
    """Also after what is raised in them, and in a thread that chose no number for kernels."""
    with ThreadPoolExecutor(1) as caller:

        def numbers() -> tuple[int, int]:
            return torch.get_num_threads(), threads()

        def within(elements: int) -> tuple[int, int]:
            torch.set_num_threads(3)
            choose_threads(chosen)
            with one_for_torch(elements):
                return numbers()

        def interrupted() -> None:
            with one_for_torch(1):
                raise KeyboardInterrupt

        outside = (3, chosen or 3)
        assert caller.submit(within, GRAIN - 1).result() == (1, chosen or 3)
        assert caller.submit(numbers).result() == outside
        assert caller.submit(within, GRAIN).result() == outside
        assert isinstance(caller.submit(interrupted).exception(), KeyboardInterrupt)
        assert caller.submit(numbers).result() == outside


def shared(team: Team) -> np.ndarray:
    return team._shared


def read_word(team: Team, offset: int) -> int:
    return int(shared(team)[offset : offset + 4].view(np.int32)[0])
