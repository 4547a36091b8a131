"""A process that was forked from one that has read videos, as the workers of a `DataLoader` are."""

import gc
import os
import sys
from pathlib import Path

import av
import pytest
from encoded_clips import encode, moving_picture
from processes import start


def meet_decoders_of_the_parent(path: Path) -> None:
    # Decoders of several threads that nobody closed, only the collector frees, and meets in the child at the latest.
    gc.disable()
    for _ in range(3):
        container = av.open(str(path))
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "FRAME", 4
        frames = [next(container.decode(video=0)) for _ in range(2)]
    del container, stream, frames
    if not (child := os.fork()):
        gc.collect()
        os._exit(7)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_its_collector_does_not_wait_for_threads_of_the_parent(tmp_path: Path):
    encode(tmp_path / "a.mp4", moving_picture(8))
    process = start(meet_decoders_of_the_parent, tmp_path / "a.mp4", output=tmp_path / "said.txt")
    process.join(60)
    process.kill()  # if it waits
    assert process.exitcode == 7, (tmp_path / "said.txt").read_text()
