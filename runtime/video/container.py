"""Open a video by PyAV, from a file, an address or standard input, and choose its streams."""

from __future__ import annotations

import io
import struct
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

from dsgnn.runtime.disk import signatures
from dsgnn.runtime.disk.files import check_unicode
from dsgnn.runtime.disk.sources import Source, standard_input
from dsgnn.runtime.errors import InputError
from dsgnn.runtime.photo.headers import PLAYLIST

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.video.stream import VideoStream

MISSING = "reading videos needs PyAV, which is not installed: pip install 'dsgnn[video]'"
UNREADABLE = "no frame can be read: it is damaged or cut short, or no video that FFmpeg decodes"
FRONT_BYTES = 1 << 20  # what may stand before the index of an MP4 that is read from a pipe
# A playlist or a script names other files and addresses, which FFmpeg would open. What a file or a
# pipe names is never opened, and what an address names is no file of this machine.
NOTHING_ELSE = {"protocol_whitelist": "none"}
NETWORK = (
    "crypto,data,http,httpproxy,https,rtmp,rtmpe,rtmps,rtmpt,rtmpte,rtmpts,rtp,srt,srtp,tcp,tls,udp"
)
TIMEOUT_S = 10.0  # for opening a stream, and for each read from it


def opened(source: Source) -> InputContainer:
    """A file, an address or standard input. Raises InputError, and OSError."""
    if source.path is not None:
        return opened_file(source.path)
    av = _library()
    options = NOTHING_ELSE
    timeout = None
    if source.feed == "url":
        check_unicode(source.address)
        file: Any = source.address
        timeout = (TIMEOUT_S, TIMEOUT_S)
        options = {"protocol_whitelist": NETWORK}
        if file.startswith("rtsp"):
            options["rtsp_transport"] = "tcp"
    else:
        file = standard_video()
    try:
        return av.open(file, "r", options=options, metadata_errors="replace", timeout=timeout)
    except av.FFmpegError as error:
        raise InputError("no answer" if source.feed == "url" else UNREADABLE) from error


def opened_file(path: Path) -> InputContainer:
    """Open a file of pictures or sound. Raises InputError, and OSError."""
    check_unicode(str(path))
    av = _library()
    file = _File(path)
    try:
        if not file.read(1):
            raise InputError("the file is empty (0 bytes)")
        file.seek(0)
        if signatures.kind(file) == "playlist":
            raise InputError(PLAYLIST)
        return av.open(file, "r", options=NOTHING_ELSE, metadata_errors="replace")
    except av.FFmpegError as error:
        raise InputError(UNREADABLE) from error


class _File(io.FileIO):
    """A file that closes with the last who uses it, which is FFmpeg."""

    def __del__(self) -> None:
        self.close()


def _library() -> Any:
    """PyAV. Raises InputError where it is missing."""
    try:
        import av
    except ImportError:
        raise InputError(MISSING) from None
    return av


def sound_of(path: Path) -> tuple[InputContainer, AudioStream | None, float]:
    """The sound of a video file: the opened file, the stream that players take or None, and the
    second at which the video begins, see `origin_s`. Raises InputError, and OSError."""
    container = opened_file(path)
    try:
        video, _ = chosen(container)
        return container, cast(Any, container.streams.best("audio")), origin_s(container, video)
    except BaseException:
        container.close()
        raise


def chosen(container: InputContainer) -> tuple[VideoStream, list[str]]:
    """The video stream to rank, and what to say where there was a choice.

    It is the default one, or the largest if several are or none is. Pictures that belong to sound,
    such as covers, are none. Raises InputError if there is no such stream.
    """
    from av.stream import Disposition

    still = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    videos = list(container.streams.video)
    moving = [stream for stream in videos if not stream.disposition & still]
    moving = [stream for stream in moving if stream.frames != 1] or moving
    if not moving:
        cover = " with a cover picture" if videos else ""
        holds = f"sound{cover} and no video" if container.streams.audio else "no video"
        raise InputError(f"it holds {holds}")
    known = [stream for stream in moving if stream.codec_context is not None and stream.width]
    if not known:
        if any(stream.codec_context is not None for stream in moving):
            raise InputError("no picture of it can be decoded: it is damaged, or only a part of it")
        raise InputError("its video is of a kind that FFmpeg does not decode: convert it")
    default = [stream for stream in known if stream.disposition & Disposition.default] or known
    taken = max(default, key=lambda stream: stream.width * stream.height)
    if len(moving) == 1:
        return taken, []
    what = f"stream {taken.index}, of {taken.width}×{taken.height} pixels"
    return taken, [f"it has {len(moving)} video streams: {what}, was ranked"]


def decoder(stream: VideoStream) -> Any:
    """What decodes a stream's packets: FFmpeg's choice, but VP8 and VP9 with transparency, which
    only libvpx reads."""
    from av import CodecContext

    transparent = stream.metadata.get("alpha_mode") == "1"
    libraries = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
    name = libraries.get(stream.codec_context.name) if transparent else None
    if name is None:
        return stream
    return CodecContext.create(name, "r")


def origin_s(container: InputContainer, stream: VideoStream) -> float:
    """The time stamp, in seconds, at which a source begins: with its first picture or sound.

    Sound that only prepares its decoder may come before 0, and does not count.
    """
    begins = (container.start_time or 0) / 1e6
    first = float((stream.start_time or 0) * (stream.time_base or 0))
    if abs(begins - first) < 2e-6:  # FFmpeg rounds the beginning to microseconds
        return first
    return max(begins, min(0.0, first))


class Pipe:
    """A pipe of which the first bytes can be looked at. It is read without Python's buffer: a
    thread that waits inside the buffer when Python exits would crash it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream: BinaryIO = getattr(stream, "raw", stream)
        # What the buffer has read already.
        self._front = stream.read(len(stream.peek())) if hasattr(stream, "peek") else b""

    def front(self, size: int) -> bytes:
        """The next `size` bytes, which stay in the pipe; fewer at its end."""
        while len(self._front) < size and (part := self._stream.read(size - len(self._front))):
            self._front += part
        return self._front[:size]

    def read(self, size: int) -> bytes:
        part = self._front[:size] or self._stream.read(size) or b""
        self._front = self._front[size:]
        return part


def standard_video() -> IO[bytes] | Pipe:
    """Standard input as PyAV can read it.

    An MP4 whose index stands behind its pictures is copied from a pipe to a temporary file first.
    Raises InputError where there is no standard input, and OSError.
    """
    stream = standard_input()
    if stream.seekable():
        return stream
    pipe = Pipe(stream)
    if not _index_comes_last(pipe):
        return pipe
    copy = tempfile.TemporaryFile(prefix="dsgnn-")  # noqa: SIM115 PyAV reads it to its end
    while part := pipe.read(1 << 20):
        copy.write(part)
    copy.seek(0)
    return copy


def _index_comes_last(pipe: Pipe) -> bool:
    """Whether it is an MP4 or MOV with its pictures before its index. Source: ISO/IEC 14496-12."""
    if pipe.front(8)[4:] != b"ftyp":
        return False
    at = 0
    while at < FRONT_BYTES and len(head := pipe.front(at + 8)[at:]) == 8:
        size, name = struct.unpack(">I4s", head)
        if name in (b"moov", b"moof"):
            return False
        if name == b"mdat" or size < 8:
            return True
        at += size
    return False
