"""Ctrl-C happens in the user's code at once, and never in the middle of the library's own."""

import os
import signal
import threading
import time

import pytest

from autoaccum.interrupts import _Held, check_interrupt, interruptible, uninterrupted
from tests.interrupting import events_in, interrupted_at, python_handles_it


@pytest.fixture(autouse=True)
def _handled():
    with python_handles_it():
        yield


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


class Work:
    """Takes something and puts it back, with a part between that may be broken off."""

    def __init__(self):
        self.held, self.balance, self.inside = [], 0, 0

    def pair(self, step):
        self.balance += 1
        self.held.append(step)
        len(self.held)
        self.balance -= 1

    def users_code(self):
        for number in range(5):
            self.inside = number

    @uninterrupted
    def run(self):
        self.pair("begin")
        try:
            interruptible(self.users_code)
            self.pair("middle")
        finally:
            self.pair("end")
            self.held.clear()


def test_at_whatever_moment_it_comes_what_was_begun_is_ended():
    events = events_in(Work().run)
    assert events > 50
    for number in range(1, events + 1):
        work = Work()
        assert interrupted_at(number, work.run) is not False, "one that comes is raised, in the end"
        assert (work.held, work.balance) == ([], 0), number
        assert _Held.before is None, number
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_users_code_is_broken_off_at_once():
    @uninterrupted
    def work():
        interruptible(sleeps)

    def sleeps():
        interrupt()
        time.sleep(30)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        work()
    assert time.monotonic() - started < 20


def test_one_that_came_in_our_code_is_raised_where_it_is_asked_for():
    @uninterrupted
    def work():
        interrupt()
        seen.append("ours")
        check_interrupt()
        seen.append("more")

    seen = []
    with pytest.raises(KeyboardInterrupt):
        work()
    assert seen == ["ours"]


def test_our_code_inside_the_users_is_not_broken_off_either():
    @uninterrupted
    def ours():
        interrupt()
        seen.append("ours")

    def theirs():
        ours()
        seen.append("theirs")

    seen = []
    with pytest.raises(KeyboardInterrupt):
        uninterrupted(interruptible)(theirs)
    assert seen == ["ours", "theirs"]


class Ends:
    def __del__(self):
        interrupt()
        len("")


def weak_key_ends():
    from torch._dynamo.utils import ExactWeakKeyDictionary

    class Keys(ExactWeakKeyDictionary):
        def _remove_id(self, key):
            interrupt()
            len("")

    class Key:
        pass

    kept, key = Keys(), Key()
    kept[key] = 1
    del key


@pytest.mark.parametrize("ends", [Ends, weak_key_ends], ids=["an object", "a weak key of torch's compiler"])
def test_one_that_comes_where_python_would_drop_it_is_raised_later(ends):
    @uninterrupted
    def work():
        interruptible(ends)
        seen.append("ours")
        check_interrupt()

    seen = []
    with pytest.raises(KeyboardInterrupt):
        work()
    assert seen == ["ours"]


def test_an_error_of_the_users_is_the_context_of_one_that_came_beside_it():
    @uninterrupted
    def work():
        interrupt()
        raise ValueError("mine")

    with pytest.raises(KeyboardInterrupt) as caught:
        work()
    assert str(caught.value.__context__) == "mine"


def test_whoever_handled_it_before_still_does():
    @uninterrupted
    def work():
        interrupt()
        check_interrupt()
        interruptible(heard.append, "theirs")
        return 1

    heard = []
    signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    assert work() == 1
    assert heard == [signal.SIGINT, "theirs"]


def test_in_another_thread_nothing_is_taken_over():
    seen = []
    thread = threading.Thread(target=uninterrupted(lambda: seen.append(signal.getsignal(signal.SIGINT))))
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_one_that_is_ignored_stays_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    uninterrupted(interrupt)()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_function_that_is_uninterrupted_keeps_its_name_and_its_words():
    assert Work.run.__name__ == "run"
