"""The names that options take, as their help lists them and a shell completes them.

The tables that they come from take seconds to import, and help must answer at once: a test compares them.
"""

from collections.abc import Callable

from ..checks import DTYPES


DEVICES = ("auto", "cpu", "cuda", "xpu", "mps")  # and those with a number
DTYPE_NAMES = tuple(name for pair in DTYPES.items() for name in pair)
VIDEO_CODECS = ("libx264", "libx265", "libvpx-vp9", "libsvtav1", "prores_ks", "ffv1", "h264_nvenc", "hevc_nvenc")
STREAM_FORMATS = ("mkv", "webm", "y4m")
FILE_FORMATS = ("mp4", "m4v", "mkv", "mov", "webm", "y4m", "gif", "webp", "apng")
IMAGE_FORMATS = ("png", "jpg", "jpeg", "bmp", "tif", "tiff")
PROTOCOLS = ("val-17x256", "davis-17x256", "ucf101-17x256", "fvd2048_16f")  # and files
METRICS = (
    "psnr",
    "psnr_in_group",
    "ssim",
    "ms_ssim",
    "lpips_vgg16",
    "lpips_alexnet",
    "rfvd_i3d",
    "rfvd_features",
    "vmaf",
    "xpsnr",
    "flicker",
    "warp",
    "grid",
    "ghost",
)
EXPORT_FORMATS = ("onnx", "torch-export", "aoti")
EXPORT_PARTS = ("encoder", "decoder", "both")
EXPORT_WEIGHTS = ("same", "float16")
RATE_CODECS = ("x264", "x264-444", "x265", "x265-444", "av1")
SCHEDULERS = ("ddpm", "ddim", "dpm++", "flow")


def complete(*names: str) -> Callable[[str], list[str]]:
    """Let a shell complete an option from names; others stay legal."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]
