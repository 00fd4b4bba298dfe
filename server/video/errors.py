"""What can go wrong with a video.

VideoError
|-- NotAVideo         invalid_video            empty, text, image, sound only ...
|-- VideoUnsupported  unsupported_video        a container or codec this server does not read
|-- VideoDamaged      video_damaged            cut off, or frames that cannot be decoded
|-- VideoTooLarge     video_too_many_bytes, video_too_long, video_too_many_pixels, video_too_many_frames,
|                     video_needs_too_much_memory
|-- VideoTimeout      video_timeout            the decoder hung, or took longer than its wall-clock limit
|-- DecoderCrashed    video_decoder_crashed    the decoder process died or broke its protocol
`-- VideoCancelled    video_cancelled          the reader was closed

Messages are for the person who sent the video and never name a path of the server.
"""

# ruff: noqa: N818 - these names say what happened
from __future__ import annotations


class VideoError(Exception):
    """A video could not be read; ``code`` is stable, ``message`` is for the sender."""

    code = "video_error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code


class NotAVideo(VideoError):
    code = "invalid_video"


class VideoUnsupported(VideoError):
    code = "unsupported_video"


class VideoDamaged(VideoError):
    code = "video_damaged"


class VideoTooLarge(VideoError):
    code = "video_too_large"


class VideoTimeout(VideoError):
    code = "video_timeout"


class DecoderCrashed(VideoError):
    code = "video_decoder_crashed"


class VideoCancelled(VideoError):
    code = "video_cancelled"
