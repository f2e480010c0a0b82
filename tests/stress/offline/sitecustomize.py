"""Without network: every connection and name lookup but on this machine itself is an error.

    PYTHONPATH=tests/stress/offline pytest -n 2

Python imports a module of this name at its start, so that processes of processes are included.
"""

import sys
from typing import Any

HERE = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "", None)


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook; raises OSError."""
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event == "socket.gethostbyname":
        host = arguments[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in HERE:
        raise OSError(f"offline: {event} {host!r}")


sys.addaudithook(refuse)
