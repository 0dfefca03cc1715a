"""Video files to RGB frames with PyAV (FFmpeg).

A file of ordinary size is first read through without decoding, which tells when every frame is shown, because
headers lie about counts and durations. Then only the stretches from a key frame to the last wanted frame behind
it are decoded. A larger file is entered by seeking.

What stays as stored: pixels that are not square (a note says so), and both fields of an interlaced picture,
woven into one (a note, too). More than eight bits per channel are reduced to eight. Rotation is applied. Times
count from the first frame of the video stream. Where an AVI has B-frames, times are made from the order of its
frames and its duration, because it stores none.
"""

from __future__ import annotations

import itertools
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from ..errors import CorruptMedia, UnsupportedMedia
from ..models.interface import Frames, Progress, ProgressFn
from .config import Video
from .frame_picker import FramePicker, TimesLie
from .frame_sampling import choose, chosen_range, limit_count, num_wanted, spread
from .media_file import (
    FileKind,
    MediaLimits,
    check_size,
    expect_kind,
    is_cut,
    make_frames,
    open_local,
    read_head,
    shown,
)

# White lists; the reader of the sniffed container is also named outright, so that nothing else is tried. Without
# them a playlist opened as a video fetches the addresses it names, and a stream of an obscure codec reaches its
# decoder while the file is still being opened.
_PROTOCOLS = "file"
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts"
_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg")
_DECODERS = ",".join((*_CODECS, "libdav1d"))

_PACKETS_PER_PROGRESS = 1000
_MAX_TICK = 2**61  # differences of times stay within 64 bits
_SEEK_BACK_S = (0.0, 1.0, 10.0, 100.0)  # how much earlier to try when a seek lands behind the wanted frame

# FFmpeg's own errors, and what PyAV lets out on text that it cannot decode and on streams that appear later in a
# file. Their words are never shown.
_AV_ERRORS = (av.error.FFmpegError, ValueError, OSError, IndexError)


class _SeekFailed(Exception):
    """Seeking did not find every wanted frame: the file must be read through."""


def read_video(
    video: Video, default_frames: int, progress: ProgressFn, limits: MediaLimits, default_fps: float | None = None
) -> Frames:
    """Video -> Frames, rgb (T, H, W, 3) uint8. Raises MediaError or InvalidRequest; see `media.load_video`."""
    with open_local(video.source) as file:
        kind = expect_kind(video.source, read_head(file), "video")
        cut = is_cut(file, kind, video.source)
        num_bytes = os.fstat(file.fileno()).st_size
    if not cut and num_bytes > limits.index_bytes:
        try:
            return _Reading(video, default_frames, progress, limits, kind, cut, default_fps).by_seeking()
        except (_SeekFailed, TimesLie):
            pass
    try:
        return _Reading(video, default_frames, progress, limits, kind, cut, default_fps).by_index(counted=False)
    except TimesLie:
        return _Reading(video, default_frames, progress, limits, kind, cut, default_fps).by_index(counted=True)


@dataclass(frozen=True)
class _Index:
    """When each packet of the video stream is shown, found without decoding.

    `ticks` are the stream's own times, or 0, 1, 2, ... where frames have to be counted because it has none.
    """

    ticks: np.ndarray  # (P,) int64, of each packet in the order of the file
    is_key: np.ndarray  # (P,) bool
    shown: np.ndarray  # (F,) int64, distinct, of the frames that are shown, increasing
    tick_s: float  # seconds per tick
    duration_s: float  # from the first frame to the end of the last that is in the file
    counted: bool

    def times_s(self, ticks: np.ndarray) -> np.ndarray:
        """Seconds from the first frame that is shown."""
        return (ticks - self.shown[0]) * self.tick_s

    @cached_property
    def _keys(self) -> tuple[np.ndarray, np.ndarray]:
        """Ticks of the key frames, increasing, and their positions in the file."""
        positions = np.flatnonzero(self.is_key)
        order = np.argsort(self.ticks[positions], kind="stable")
        return self.ticks[positions][order], positions[order]

    def entry(self, tick: int) -> int:
        """Position in the file of the packet from which the frame shown at `tick` can be decoded."""
        ticks, positions = self._keys
        found = int(np.searchsorted(ticks, tick, side="right")) - 1
        return int(positions[found]) if found >= 0 and not self.counted else 0


class _Reading:
    """One attempt at one video: what the limits allow, what was asked for, and what turned out to be damaged."""

    def __init__(
        self,
        video: Video,
        default_frames: int,
        progress: ProgressFn,
        limits: MediaLimits,
        kind: FileKind,
        cut: bool,
        default_fps: float | None = None,
    ) -> None:
        self._video, self._limits, self._kind = video, limits, kind
        self._default_frames, self._default_fps = default_frames, default_fps
        self._progress = progress
        self._name = shown(video.source)
        self._cut = cut  # the file is shorter than its container states
        self._header_s = 0.0  # the container's own duration, 0 where it states none
        self._packets_decoded = 0
        self._bad_packets = 0  # gave an error, or a frame that the decoder marked as patched
        self._picker: FramePicker | None = None

    # ---- opening

    def _open(self) -> InputContainer:
        options = {
            "protocol_whitelist": _PROTOCOLS,
            "format_whitelist": _CONTAINERS,
            "codec_whitelist": _DECODERS,
            "max_pixels": str(self._limits.frame_pixels),  # a stream may hold larger pictures than its header says
            "enable_drefs": "0",  # an MP4 may name other files that hold its data
        }
        # `file:` keeps a name with a colon in it from being taken for another protocol.
        name = f"file:{os.fspath(self._video.source)}"
        try:
            return av.open(name, format=self._kind.format, options=options, metadata_errors="replace")
        except _AV_ERRORS:
            raise self._corrupt(f"expected {self._kind.name}, but it cannot be opened") from None

    def _stream(self, container: InputContainer) -> VideoStream:
        """The first video stream, checked before anything depends on its numbers."""
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]  # cover art
        if not streams and not container.streams:
            raise self._corrupt("no stream can be read")
        if not streams:
            raise UnsupportedMedia(f"{self._name}: expected a video stream, found none; is it sound only?")
        stream, context = streams[0], streams[0].codec_context
        codec = "unknown" if context is None else context.codec.canonical_name
        if codec not in _CODECS:
            hint = "convert the clip to H.264"
            raise UnsupportedMedia(f"{self._name}: codec {codec}, expected one of {', '.join(_CODECS)}", hint=hint)
        if stream.frames > self._limits.header_frames:
            raise UnsupportedMedia(
                f"{self._name}: the header claims {stream.frames} frames, expected at most {self._limits.header_frames}"
            )
        if not (context.width and context.height):
            raise self._corrupt("no picture size can be found")
        check_size(context.width, context.height, self._video.source, self._limits.frame_pixels, self._limits)
        context.options = {"max_pixels": str(self._limits.frame_pixels)}
        self._header_s = max(0.0, (container.duration or 0) / av.time_base)
        return stream

    # ---- reading through

    def by_index(self, *, counted: bool) -> Frames:
        """Two passes: find every frame time, then decode what is wanted. Raises TimesLie unless `counted`."""
        with self._open() as container:
            index = self._index(container, self._stream(container), counted)
        with self._open() as container:
            stream = self._stream(container)
            size = (stream.codec_context.height, stream.codec_context.width)
            choice = choose(
                self._video,
                index.times_s(index.shown),
                index.duration_s,
                size,
                self._default_frames,
                self._limits,
                self._default_fps,
            )
            picker = self._start(index.shown[choice.indices].tolist())
            self._decode_indexed(container, stream, index, picker)
            notes = (*choice.notes, *_stream_notes(stream))
        return self._finish(picker, index.times_s(np.array(picker.kept, np.int64)), index.duration_s, notes)

    def _index(self, container: InputContainer, stream: VideoStream, counted: bool) -> _Index:
        ticks, keys, hidden = array("q"), bytearray(), set[int]()
        end = -_MAX_TICK
        for packet in self._packets(container, stream):
            tick = packet.pts if packet.pts is not None else packet.dts
            if tick is None or abs(tick) > _MAX_TICK:
                counted, tick = True, 0
            if packet.is_discard:  # before the first frame of an edited clip: decoded, not shown
                hidden.add(tick)
            end = max(end, tick + min(packet.duration or 0, _MAX_TICK))
            ticks.append(tick)
            keys.append(packet.is_keyframe)
            if len(ticks) > self._limits.index_packets:
                raise UnsupportedMedia(f"{self._name}: expected at most {self._limits.index_packets} frames, got more")
        if not ticks:
            raise self._corrupt("no frame can be read")
        all_ticks, is_key = np.frombuffer(ticks, np.int64), np.frombuffer(keys, np.bool_)
        visible = np.setdiff1d(all_ticks, np.fromiter(hidden, np.int64, len(hidden)))  # sorted, distinct
        rate = float(stream.average_rate or 0) or 25.0
        is_avi = self._kind.format == "avi"
        # AVI stores no times: FFmpeg makes them from the order in the file, which is not that of showing. Joined
        # transport streams start again at 0: then a key frame is not shown after the one before it.
        counted = counted or (is_avi and stream.codec_context.has_b_frames) or not len(visible)
        if counted or np.any(np.diff(all_ticks[is_key]) <= 0):
            order = np.arange(len(ticks), dtype=np.int64)
            trust_header = is_avi and not self._cut and self._header_s > 0  # an AVI's rate may count empty frames
            duration_s = self._header_s if trust_header else len(order) / rate
            return _Index(order, is_key, order, duration_s / len(order), duration_s, True)
        tick_s = float(stream.time_base or 1)
        duration_s = float(end - visible[0]) * tick_s
        if end <= visible[-1]:  # no durations stored: the last frame is as long as the others
            mean_s = float(visible[-1] - visible[0]) * tick_s / (len(visible) - 1) if len(visible) > 1 else 1 / rate
            duration_s = float(visible[-1] - visible[0]) * tick_s + mean_s
        return _Index(all_ticks, is_key, visible, tick_s, duration_s, False)

    def _decode_indexed(
        self, container: InputContainer, stream: VideoStream, index: _Index, picker: FramePicker
    ) -> None:
        """Decodes from key frames on, in file order; packets in between are read and dropped."""
        codec = stream.codec_context
        entry = index.entry(picker.target)
        order = 0
        for position, packet in enumerate(self._packets(container, stream)):
            if position < entry:
                continue
            if position == entry > 0:
                if self._packets_decoded:
                    codec.flush_buffers()
                picker.jump(not_before=int(index.ticks[position]))
            for frame in self._decode(codec, packet):
                picker.offer(order if index.counted else frame.pts, frame)
                order += 1
                if picker.done:
                    return
                entry = max(entry, index.entry(picker.target))
        for frame in self._decode(codec, None):
            picker.offer(order if index.counted else frame.pts, frame)
            order += 1
        picker.end()

    # ---- seeking

    def by_seeking(self) -> Frames:
        """One pass that jumps to the key frame before each wanted time, trusting the header's duration and rate.

        Raises _SeekFailed or TimesLie where the file does not keep what its header promises.
        """
        with self._open() as container:
            stream = self._stream(container)
            rate, codec = stream.average_rate, stream.codec_context
            tick_s = float(stream.time_base or 1)
            duration_s = stream.duration * tick_s if stream.duration else self._header_s
            if not rate or duration_s <= 0 or (self._kind.format == "avi" and codec.has_b_frames):
                raise _SeekFailed
            start, end, notes = chosen_range(self._video, duration_s)
            wanted = num_wanted(self._video, end - start, self._default_frames, self._default_fps)
            available = max(1, round((end - start) * float(rate)))
            count, short = limit_count(self._video, wanted, available, (codec.height, codec.width), self._limits)
            origin = stream.start_time or 0
            targets = spread(self._video, start, end, count, frame_s=1 / float(rate))
            picker = self._start([origin + round(t / tick_s) for t in targets.tolist()])
            while not picker.done:
                self._seek_and_decode(container, stream, picker, origin, tick_s)
            notes = (*notes, *short, *_stream_notes(stream))
        timestamps = (np.array(picker.kept, np.int64) - origin) * tick_s
        if len(timestamps) < count or timestamps[-1] >= duration_s:
            raise _SeekFailed
        return self._finish(picker, timestamps, duration_s, notes)

    def _seek_and_decode(
        self, container: InputContainer, stream: VideoStream, picker: FramePicker, origin: int, tick_s: float
    ) -> None:
        """Serves the open wanted time, and those after it while they are near."""
        for back_s in _SEEK_BACK_S:
            goal = max(origin, picker.target - round(back_s / tick_s))
            try:
                container.seek(goal, stream=stream, backward=True)
            except _AV_ERRORS:
                raise _SeekFailed from None
            picker.jump()
            if self._decode_from(container, stream, picker, landed_early=goal == origin, tick_s=tick_s):
                return
        raise _SeekFailed

    def _decode_from(
        self, container: InputContainer, stream: VideoStream, picker: FramePicker, landed_early: bool, tick_s: float
    ) -> bool:
        """Whether the first frame came before the open wanted time; if so, decodes until the next one is far."""
        for packet in itertools.chain(self._packets(container, stream), [None]):
            for frame in self._decode(stream.codec_context, packet):
                if frame.pts is None:
                    raise TimesLie
                if not landed_early and frame.pts > picker.target:
                    return False
                landed_early, open_before = True, picker.num_open
                picker.offer(frame.pts, frame)
                if picker.done:
                    return True
                is_far = (picker.target - frame.pts) * tick_s > self._limits.scan_gap_s
                if is_far and picker.num_open < open_before:  # otherwise this stretch is what leads to the target
                    return True
        picker.end()
        return True

    # ---- packets and frames

    def _start(self, wanted: list[int]) -> FramePicker:
        self._picker = FramePicker(wanted, self._video.source, self._limits)
        self._report()
        return self._picker

    def _report(self) -> None:
        if self._picker is None:
            self._progress(Progress("decode", 0, None, "frames"))
        else:
            self._progress(Progress("decode", len(self._picker.kept), len(self._picker.wanted), "frames"))

    def _packets(self, container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
        """The stream's packets in file order, up to where the file cannot be read on."""
        packets = container.demux(stream)
        count = 0
        while True:
            try:
                packet = next(packets, None)
            except _AV_ERRORS:
                self._cut, packet = True, None
            if packet is None:
                return
            if packet.size:  # the last one is empty, the library's sign to flush
                yield packet
                count += 1
            if count % _PACKETS_PER_PROGRESS == 0:
                self._report()

    def _decode(self, codec: av.VideoCodecContext, packet: Packet | None) -> Iterator[VideoFrame]:
        """What comes out for one packet (None: the decoder's rest). A bad packet is counted and gives nothing."""
        try:
            frames = codec.decode(packet)
        except _AV_ERRORS:
            frames = []
            self._bad_packets += 1
        self._packets_decoded += packet is not None
        for frame in frames:
            self._bad_packets += frame.is_corrupt
            yield frame
            self._report()

    # ---- the result

    def _finish(self, picker: FramePicker, timestamps: np.ndarray, duration_s: float, notes: tuple[str, ...]) -> Frames:
        damage = self._damage_notes(duration_s)
        if damage and self._video.strict:
            raise self._corrupt("; ".join(damage), hint="without strict the readable part is used")
        if not picker.kept:
            raise self._corrupt("no frame can be decoded")
        if self._bad_packets > self._limits.damaged_share * self._packets_decoded:
            bad = self._bad_packets / max(1, self._packets_decoded)
            raise self._corrupt(f"{bad:.0%} of the packets read, expected at most {self._limits.damaged_share:.0%}")
        if len(picker.kept) < len(picker.wanted):
            notes = (*notes, f"{len(picker.kept)} of {len(picker.wanted)} frames used: the others cannot be decoded")
        return make_frames(
            "video", picker.rgb(), timestamps, self._video.source, duration_s, (*notes, *picker.notes, *damage)
        )

    def _damage_notes(self, duration_s: float) -> list[str]:
        notes = []
        if self._cut:
            stated = max(self._header_s, duration_s)
            share = duration_s / stated
            notes.append(
                f"the file is cut or damaged: readable up to {duration_s:.2f} s of {stated:.2f} s ({share:.0%})"
            )
        if self._bad_packets:
            notes.append(
                f"{self._bad_packets} of {self._packets_decoded} packets read are damaged; they were skipped or patched"
            )
        return notes

    def _corrupt(self, what: str, hint: str = "") -> CorruptMedia:
        return CorruptMedia(f"{self._name}: damaged or incomplete: {what}", hint=hint)


def _stream_notes(stream: VideoStream) -> tuple[str, ...]:
    ratio = stream.sample_aspect_ratio
    if not ratio or ratio == 1:
        return ()
    shape = f"{ratio.numerator}:{ratio.denominator}"
    return (f"pixels are not square ({shape}); the picture is used as stored, not stretched",)
