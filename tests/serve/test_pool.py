import threading
import time

import pytest
import torch
from moments import moments

from mergekit_mediator.serve.pool import Pool


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_every_item_is_worked_on_once_on_threads_of_their_own():
    done = []
    Pool(
        lambda i: done.append((i, threading.get_ident(), torch.get_num_threads())), range(50), 2
    ).run()
    assert sorted(i for i, _, _ in done) == list(range(50))
    assert threading.get_ident() not in {thread for _, thread, _ in done}
    assert {threads for _, _, threads in done} == {1}


def test_an_error_is_raised_and_ends_the_work():
    done = []

    def work(item):
        done.append(item)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Pool(work, range(50), 2).run()
    assert len(done) <= 2


def test_a_pool_that_is_stopped_begins_nothing():
    done = []
    pool = Pool(done.append, range(50), 2)
    pool.stop()
    pool.run()
    assert done == []


def test_nobody_works_on_when_a_pool_is_stopped_wherever_it_was_interrupted():
    working, done = [], []

    def work(item):
        working.append(item)
        time.sleep(1e-4)
        working.remove(item)
        done.append(item)

    pools = [Pool(work, (), 2)]

    def run():
        pools.append(Pool(work, range(20), 2))
        pools[-1].run()

    for moment in moments(run, KeyboardInterrupt):
        for _ in range(2):
            pools[-1].stop()
        before = len(done)
        assert working == [], moment
        time.sleep(1e-3)
        assert len(done) == before, moment
        assert working == [], moment
    assert moment > 15
