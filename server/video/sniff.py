"""Tells a file's kind by its first bytes, before any decoder library sees it.

Only ISO base media (MP4, MOV, M4V) and Matroska (MKV, WebM) pass. Playlists and the like (m3u8, ffconcat, sdp) could
make FFmpeg open other files or the network; each further demuxer is more code that a hostile file can reach.
"""

from __future__ import annotations

import codecs

from server.video.errors import NotAVideo, VideoError, VideoUnsupported

SNIFF_NBYTES = 4096  # encoders write longer texts into a video than 512 bytes
READABLE = "MP4, MOV, MKV and WebM are read"

_ISO_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
_STILL_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"avif", b"avis")
_NOT_VIDEOS = (
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"GIF8", "a GIF image"),
    (8, b"WEBP", "a WebP image"),
    (0, b"BM", "a BMP image"),
    (0, b"II*\0", "a TIFF image"),
    (0, b"MM\0*", "a TIFF image"),
    (8, b"WAVE", "a WAV sound file"),
    (0, b"ID3", "an MP3 sound file"),
    (0, b"\xff\xfb", "an MP3 sound file"),
    (0, b"fLaC", "a FLAC sound file"),
    (0, b"%PDF", "a PDF document"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"#EXTM3U", "a playlist"),
    (0, b"ffconcat", "a playlist"),
)
_OTHER_CONTAINERS = (
    (8, b"AVI ", "AVI"),
    (0, b"OggS", "Ogg"),
    (0, b"FLV", "FLV"),
    (0, b"\x30\x26\xb2\x75", "WMV (ASF)"),
    (0, b"\x00\x00\x01\xba", "MPEG program stream"),
    (0, b"\x47", "MPEG transport stream"),
)


def check_container(head: bytes) -> None:
    """Pass a file that begins with ``head`` (``SNIFF_NBYTES``), or raise NotAVideo or VideoUnsupported saying why."""
    error = _refusal(head)
    if error is not None:
        raise error


def _refusal(head: bytes) -> VideoError | None:
    if not head:
        return NotAVideo("The file is empty.")
    if head.startswith(b"\x1aE\xdf\xa3"):
        return None
    if head[4:8] in _ISO_BOXES:
        still = head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS
        return NotAVideo("The file is an HEIF or AVIF image, not a video.") if still else None
    for offset, magic, kind in _NOT_VIDEOS:
        if head.startswith(magic, offset):
            return NotAVideo(f"The file is {kind}, not a video.")
    if _is_text(head):
        return NotAVideo("The file is text, not a video.")
    for offset, magic, container in _OTHER_CONTAINERS:
        if head.startswith(magic, offset):
            return VideoUnsupported(f"The container {container} is not supported: {READABLE}.")
    return NotAVideo(f"The file is not a video of a known kind: {READABLE}.")


def _is_text(head: bytes) -> bool:
    """Whether all of it is UTF-8 without control characters; the last character may be cut off."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(char >= " " or char in "\t\n\r\f" for char in text)
