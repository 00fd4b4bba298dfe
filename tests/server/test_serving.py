from __future__ import annotations

import socket

import pytest

from server.serving import _listen


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_what_is_written_second_does_not_wait_for_the_first_to_be_acknowledged(host: str) -> None:
    """An answer's body behind its head; 40 ms of every request to a connection that is used again."""
    with _listen(host, 0) as listening, socket.create_connection(listening.getsockname()[:2]):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
