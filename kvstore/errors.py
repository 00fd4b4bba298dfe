"""Everything that can go wrong in this package; a miss is None and no error.

StoreError
├── InvalidStoreURL         not a store that this version knows
├── InvalidKey              a key outside the alphabet, or one that tries to leave the store
├── StoreUnavailable        the store cannot be reached, read or written
├── StoreFull               no room left; nothing was half written
│   └── QuotaExceeded       the medium has room, but the quota does not
├── FormatVersionError      written by a newer version of this software; nothing was touched
├── DamagedVideo            a committed video or file that cannot be read whole
│   ├── CorruptBlob         bytes are there, and they are not the bytes that were written
│   └── MissingBlob         the manifest names a blob that is gone
└── PoolError               the books of the device pool do not balance
    ├── PoolFull            no room now: what is resident is leased; try again when a lease ends
    └── VideoTooLarge       no room ever: the video is larger than the pool's budget
"""

from __future__ import annotations


class StoreError(Exception):
    """Root of the tree above."""


class InvalidStoreURL(StoreError):  # noqa: N818 - errors are named for what is wrong
    """Not a store that this version knows. The message never repeats a password."""


class InvalidKey(StoreError):  # noqa: N818
    """A key outside the alphabet, or one that tries to leave the store."""


class StoreUnavailable(StoreError):  # noqa: N818
    """The store cannot be reached, read or written."""


class StoreFull(StoreError):  # noqa: N818
    """No room left. Nothing was half written."""


class QuotaExceeded(StoreFull):
    """The medium may have room, but the quota has none, even without every video that may go. Nothing was removed."""


class FormatVersionError(StoreError):
    """Written by a newer version of this software. Nothing was touched."""


class DamagedVideo(StoreError):  # noqa: N818
    """A committed video (or its kept file) cannot be read whole; making it again heals it."""


class CorruptBlob(DamagedVideo):
    """Bytes are there, and they are not the bytes that were written."""


class MissingBlob(DamagedVideo):
    """The manifest names a blob that is gone."""


class PoolError(StoreError):
    """The books of the device pool do not balance."""


class PoolFull(PoolError):  # noqa: N818
    """No room now: everything resident is leased. Try again when a lease ends."""


class VideoTooLarge(PoolError):  # noqa: N818
    """No room ever: the video is larger than the pool's whole budget."""
