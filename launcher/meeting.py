"""Where the ranks of a job meet before they train, and tell one another that they have returned.

All know the job's id, and so a few ports at which rank 0 may be asked, the first that is free there. Whoever listens
there says which life of which job it belongs to, so nobody joins strangers or an earlier life that has not ended yet.
Rank 0 answers with the port of its store, which the system chose: it cannot be taken.
"""

import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from launcher.place import Place

PORTS = range(20000, 32768)  # below those that Linux gives to outgoing connections
CHOICES = 16
LIMIT = 600.0
"""Seconds that ranks wait for one another at the start: nodes may load Python slowly from a shared disk."""
LOOK = 0.2
"""Seconds between two looks whether all have come."""


class Meeting(NamedTuple):
    """A store that all ranks of a life share, held by rank 0."""

    place: Place
    store: Any  # torch's TCPStore
    port: int

    def tell(self, what: str) -> None:
        """Let the others know that this rank has come so far."""
        self.store.set(f"{what}/{self.place.rank}", "")

    def all_told(self, what: str, limit: float) -> bool:
        """Wait until every rank has told `what`; False if one has not in so many seconds."""
        keys, end = [f"{what}/{rank}" for rank in range(self.place.ranks)], time.monotonic() + limit
        while not self.store.check(keys):
            if time.monotonic() > end:
                return False
            time.sleep(LOOK)  # the store's own wait would hear no signals
        return True


def ports_of(life: str) -> list[int]:
    """Where rank 0 of a life may be asked, in the order of its choice; the same list on every rank."""
    return random.Random(life).sample(PORTS, CHOICES)


def meet(place: Place, limit: float = LIMIT) -> Meeting:
    """Find the other ranks. Raises TimeoutError if rank 0 is not found in so many seconds."""
    from torch._C._distributed_c10d import TCPStore

    if place.rank == 0:
        # Within this process the group's own store is this very one: the port is the same, and it may have tenants.
        store = TCPStore(place.first_host, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        answer(place.life, store.port)
        return Meeting(place, store, store.port)
    port = ask(place.first_host, place.life, limit)
    return Meeting(place, TCPStore(place.first_host, port, is_master=False, wait_for_workers=False), port)


def answer(life: str, port: int) -> None:
    """Tell whoever asks, as long as this process lives, that the store of `life` is at `port`.

    Raises OSError if all of the life's ports are taken.
    """
    listener = _first_free(ports_of(life))
    said = f"{life} {port}\n".encode()

    def serve() -> None:
        while True:
            asking, _ = listener.accept()
            with asking:
                asking.sendall(said)

    threading.Thread(target=serve, name="meeting", daemon=True).start()


def _first_free(ports: list[int]) -> socket.socket:
    for port in ports:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
            listener.listen(1024)
        except OSError:
            listener.close()
            continue
        return listener
    raise OSError(f"none of the ports {', '.join(map(str, ports))} is free on this host")


def ask(host: str, life: str, limit: float, sleep: Callable[[float], None] = time.sleep) -> int:
    """The port of the store of `life`, whose rank 0 is on `host`."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        for port in ports_of(life):
            name, _, told = _said(host, port).partition(" ")
            if name == life and told.endswith("\n"):
                return int(told)
        sleep(0.2)
    raise TimeoutError(f"rank 0 of job {life} was not found on {host} in {limit:.0f} s")


def _said(host: str, port: int) -> str:
    """The first line of whoever listens there; nothing if nobody does, or it is mute."""
    said = b""
    try:
        with socket.create_connection((host, port), timeout=2) as line:
            while not said.endswith(b"\n") and len(said) < 1000 and (part := line.recv(1000)):
                said += part
    except OSError:
        return ""
    return said.decode(errors="replace")
