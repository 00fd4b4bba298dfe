"""Telling files apart by their first bytes."""

from __future__ import annotations

import pytest

from server.video.errors import NotAVideo, VideoError, VideoUnsupported
from server.video.sniff import SNIFF_NBYTES, check_container


@pytest.mark.parametrize(
    "arguments",
    [("mp4", {}), ("mov", {}), ("m4v", {}), ("mkv", {}), ("webm", {"codec": "vp9"}), ("mp4", {"faststart": True})],
    ids=str,
)
def test_real_videos_pass(clips, arguments) -> None:
    suffix, options = arguments
    check_container(clips(suffix, **options).path.read_bytes()[:SNIFF_NBYTES])


@pytest.mark.parametrize("suffix", ["avi", "ts", "flv"])
def test_other_containers_are_named(clips, suffix: str) -> None:
    with pytest.raises(VideoUnsupported, match="MP4, MOV, MKV and WebM"):
        check_container(clips(suffix).path.read_bytes()[:SNIFF_NBYTES])


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"", "empty"),
        (b"hello, world\n", "text"),
        ("Grüße, \N{CLAPPER BOARD}\n".encode() * 400, "text"),
        ("Grüße".encode()[:3], "text"),  # cut off within a character
        (b"\xe0\xff\xa7" * 1000, "not a video of a known kind"),
        (b"x264 - H.264/MPEG-4 AVC codec" * 30 + b"\0\0\0\1\x65", "not a video of a known kind"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:10\nhttp://internal/a.ts\n", "playlist"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "playlist"),
        (b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n", "text"),
        (b'<?xml version="1.0"?><MPD></MPD>', "text"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "PNG"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "JPEG"),
        (b"GIF89a\x01\0", "GIF"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "WebP"),
        (b"RIFF\0\0\0\0WAVEfmt ", "WAV"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIF"),
        (bytes(range(256)), "not a video of a known kind"),
    ],
)
def test_others_are_refused_with_their_kind(head: bytes, kind: str) -> None:
    with pytest.raises(NotAVideo, match=kind) as refusal:
        check_container(head)
    assert refusal.value.code == "invalid_video"
    assert isinstance(refusal.value, VideoError)
