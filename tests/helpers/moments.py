"""Every moment of a call at which Python may raise an interrupt."""

import itertools
import sys
from collections.abc import Callable, Iterator

_CO_GENERATOR = 0x20


def moments(
    function: Callable[[], object], error: type[BaseException], step: int = 1
) -> Iterator[int]:
    """Call a function again and again, each time with an error raised at a later moment of it; gives the
    number of the moment each time that the error has come out of it.

    Python handles signals, and raises what another thread asks for, where a function begins and after a
    call of C: a profiler is told of the same moments. A generator that is closed does not begin.
    """
    for moment in itertools.count(step=step):
        if not _interrupted(function, error, moment):
            return
        yield moment


def _interrupted(function: Callable[[], object], error: type[BaseException], moment: int) -> bool:
    passed = itertools.count()

    def profile(frame, event, _argument):
        begins = event == "call" and not frame.f_code.co_flags & _CO_GENERATOR
        if (begins or event == "c_return") and next(passed) == moment:
            sys.setprofile(None)
            raise error

    try:
        sys.setprofile(profile)
        function()
    except error:
        return True
    finally:
        sys.setprofile(None)
    return next(passed) > moment
