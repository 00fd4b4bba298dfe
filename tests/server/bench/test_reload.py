"""The re-load benchmark: every tier in one run, nothing left behind."""

from __future__ import annotations

import json

import redis
from redis_servers import RedisServer

from server.bench.circumstances import to_json
from server.bench.reload import LEAST_SHARE, run_reload


def test_every_tier_and_nothing_left_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with RedisServer(tmp_path) as server:
        before = sorted(tmp_path.iterdir())
        result = run_reload(chunk_mb=9.0, top=2, repeats=3, follow_ups=0, redis_url=server.url, tell=lambda text: None)
        assert sorted(tmp_path.iterdir()) == before
        with redis.Redis(port=server.port) as client:
            assert client.keys() == [b"x2l:layout"]
    rows = json.loads(to_json(result))["throughput"]
    assert [row["tier"] for row in rows] == ["memory", "disk", "redis"]
    for row in rows:
        assert row["reload_mb"] == 17.9
        assert row["met"] == (row["share"] >= LEAST_SHARE[row["tier"]])
        assert abs(row["share"] - row["reload_gb_s"] / max(row["floor_gb_s"].values())) < 0.2 * row["share"]
        arrival = row["arrival"]
        assert min(arrival["ms"], arrival["in_turn_ms"], arrival["floor_ms"]) > 0
        assert arrival["times_in_turn"] == round(arrival["in_turn_ms"] / arrival["ms"], 2)
    assert "follow_up" not in result


def test_a_redis_of_its_own_and_where_none_is_to_be_had(tmp_path, monkeypatch):
    def tiers():
        told = []
        result = run_reload(chunk_mb=0.1, top=1, repeats=1, follow_ups=0, redis_url=None, tell=told.append)
        return [row["tier"] for row in result["throughput"]], told

    assert tiers() == (["memory", "disk", "redis"], ["throughput"])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("server.bench.redis_server._of_the_wheel", lambda: None)
    found, told = tiers()
    assert found == ["memory", "disk"]
    assert told[0].startswith("without Redis: no redis-server")
