"""The command `leanvae`."""

from .commands import app


__all__ = ["app"]
