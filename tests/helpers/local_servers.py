"""Applications served on this machine, in a thread, as uvicorn serves them."""

import threading
import time
from contextlib import contextmanager

import uvicorn
from vllm_server import free_port

_servers = {}


@contextmanager
def running(app, port=None):
    """Serve an application; gives its address. `running.stop(address)` begins its shutdown."""
    port = port or free_port()
    config = uvicorn.Config(app, "127.0.0.1", port, log_level="error", timeout_graceful_shutdown=10)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive(), "the application does not start"
        assert time.monotonic() < end, "the application does not start in time"
        time.sleep(0.01)
    address = f"http://127.0.0.1:{port}"
    _servers[address] = server
    try:
        yield address
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
        _servers.pop(address, None)  # another server may have had the address since


def _stop(address):
    _servers[address].should_exit = True


running.stop = _stop
