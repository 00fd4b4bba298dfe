from __future__ import annotations

import pytest
from pydantic import ValidationError

from server.config import SettingsError, load_settings


def test_options_go_over_variables_and_these_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X2L_PORT", "9001")
    monkeypatch.setenv("X2L_HOST", "0.0.0.0")
    monkeypatch.setenv("X2L_STORE_QUOTA_BYTES", "5GB")
    monkeypatch.setenv("X2L_API_KEY", "one, two")
    monkeypatch.setenv("X2L_ALLOWED_MEDIA_DOMAINS", "Media.example.com, 10.0.0.1")
    settings = load_settings(port="9002", keep_video=None)
    assert (settings.port, settings.host, settings.keep_video) == (9002, "0.0.0.0", True)
    assert settings.store_quota_bytes == 5 * 10**9
    assert settings.api_key == ("one", "two")
    assert settings.allowed_media_domains == ("media.example.com", "10.0.0.1")


def test_lists_of_options_are_split_at_commas_too() -> None:
    given = load_settings(allowed_media_domains=["a.example,B.example", "::1"], api_key=["one,two", "three"])
    assert given.allowed_media_domains == ("a.example", "b.example", "::1")
    assert given.api_key == ("one,two", "three")


def test_the_default_store_is_a_folder_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere")
    assert load_settings().store == "disk:/somewhere/x2l"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X2L_PROT", "8000"),
        ("X2L_PORT", "eighty"),
        ("X2L_PORT", "70000"),
        ("X2L_MAX_UPLOAD_BYTES", "much"),
        ("X2L_DEVICE", "abacus"),
        ("X2L_PREFILL_MODE", "recent-0"),
        ("X2L_API_KEY", "one,,two"),
        ("X2L_API_KEY", "one,é"),
        ("X2L_SERVED_MODEL_NAME", ""),
        ("X2L_ALLOWED_LOCAL_MEDIA_PATH", "/no/such/folder"),
    ],
)
def test_a_bad_variable_is_named_in_one_line(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as error:
        load_settings()
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_option_is_named_as_such() -> None:
    with pytest.raises(SettingsError, match="--max-queue"):
        load_settings(max_queue="0")
    with pytest.raises(SettingsError, match="--prefill-share"):
        load_settings(prefill_share="1")
    with pytest.raises(SettingsError, match="low_ratio"):
        load_settings(low_ratio=16, high_ratio=2)


@pytest.mark.parametrize(
    ("option", "value", "hint"),
    [
        ("gpu_kv_budget", "-1", "a size such as 512MiB, not '-1'"),
        ("store_cache_bytes", "lots", "a size such as 512MiB, not 'lots'"),
        ("allowed_media_domains", "https://example.com", "the whole name of a host"),
        ("allowed_media_domains", ["example.com", "*.example.com"], "not '*.example.com'"),
        ("allowed_media_domains", "example.com:80", "not 'example.com:80'"),
        ("prefill_mode", "fast", "exact, recent-N, high-memory or bounded-N"),
    ],
)
def test_a_bad_option_tells_what_would_be_good(option: str, value: str, hint: str) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings(**{option: value})
    assert hint in str(error.value) and f"--{option.replace('_', '-')}" in str(error.value)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        load_settings().port = 1  # type: ignore[misc]
