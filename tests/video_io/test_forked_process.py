"""A process that was forked from one that has read videos, as the workers of a `DataLoader` are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from encoded_clips import encode, moving_picture


# Decoders of several threads that nobody closed, only the collector frees, and meets in the child at the latest.
SCRIPT = """
import gc, os, sys
import av
import diffusers_leanvae.video_io

gc.disable()
for _ in range(3):
    container = av.open(sys.argv[1])
    stream = container.streams.video[0]
    stream.thread_type, stream.codec_context.thread_count = "FRAME", 4
    frames = [next(container.decode(video=0)) for _ in range(2)]
del container, stream, frames
if not (child := os.fork()):
    gc.collect()
    os._exit(7)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_its_collector_does_not_wait_for_threads_of_the_parent(tmp_path: Path):
    encode(tmp_path / "a.mp4", moving_picture(8))
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "a.mp4")], timeout=60, capture_output=True)
    assert done.returncode == 7, done.stderr
