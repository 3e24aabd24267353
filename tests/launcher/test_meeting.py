"""Ranks find one another by the name of their life, whoever else listens on their ports."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from launcher.meeting import CHOICES, answer, ask, meet, ports_of
from launcher.place import Place


def place(rank: int, life: str, ranks: int = 3) -> Place:
    return Place(rank, ranks, rank, ranks, "127.0.0.1", life)


def stranger(port: int, words: bytes = b"") -> socket.socket:
    """Someone else's service: it says something, or accepts and is silent."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("", port))
    listener.listen()
    kept = []

    def serve() -> None:
        while True:
            try:
                kept.append(listener.accept()[0])
            except OSError:
                return
            kept[-1].sendall(words)

    threading.Thread(target=serve, daemon=True).start()
    return listener


def test_all_ranks_of_a_life_share_a_store_and_know_when_all_have_come():
    with ThreadPoolExecutor(3) as threads:
        meetings = list(threads.map(lambda rank: meet(place(rank, "together"), 30), range(3)))
        assert len({meeting.port for meeting in meetings}) == 1
        for meeting in meetings[1:]:
            meeting.tell("here")
        assert not meetings[0].all_told("here", 0.2)
        meetings[0].tell("here")
        assert all(threads.map(lambda meeting: meeting.all_told("here", 10), meetings))


def test_ports_that_are_taken_are_passed_over_by_those_who_answer_and_those_who_ask():
    first, second, *_ = ports_of("crowded")
    with stranger(first, b"SSH-2.0-OpenSSH\r\n"), stranger(second, b"220 mail\n"):
        answer("crowded", 1234)
        assert ask("127.0.0.1", "crowded", 20) == 1234


def test_an_earlier_life_that_still_listens_is_not_joined(monkeypatch):
    monkeypatch.setattr("launcher.meeting.ports_of", lambda life: [first, second])
    first, second = ports_of("anywhere")[:2]
    answer("7.0.0", 1)
    with pytest.raises(TimeoutError, match=r"rank 0 of job 7.0.1 was not found on 127.0.0.1"):
        ask("127.0.0.1", "7.0.1", 0.5)
    answer("7.0.1", 2)
    assert ask("127.0.0.1", "7.0.1", 5) == 2


def test_the_ports_of_a_life_are_the_same_everywhere_and_differ_from_those_of_others():
    assert ports_of("7.0.0") == ports_of("7.0.0")
    assert len(set(ports_of("7.0.0"))) == CHOICES
    assert ports_of("7.0.0")[0] != ports_of("7.0.1")[0]
    assert all(20000 <= port < 32768 for port in ports_of("8.0.0"))
