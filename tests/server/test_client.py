from __future__ import annotations

import pytest

from server.client import ServerError, connect


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "http://127.0.0.1:8000", "http://127.0.0.1:8000/v1/"])
def test_an_address_may_come_without_its_scheme_and_with_v1(address: str) -> None:
    with connect(address, "key") as client:
        assert str(client.base_url).rstrip("/") == "http://127.0.0.1:8000"
        assert client.headers["authorization"] == "Bearer key"


@pytest.mark.parametrize("key", ["é", "a\nb"])
def test_a_key_that_cannot_be_sent_is_refused(key: str) -> None:
    with pytest.raises(ServerError, match="API key"):
        connect("http://127.0.0.1:8000", key)


def test_what_is_no_server_address() -> None:
    with pytest.raises(ServerError, match="ftp://a"):
        connect("ftp://a", "")
