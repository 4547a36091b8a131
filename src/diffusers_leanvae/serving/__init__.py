"""An autoencoder over HTTP, by the protocol of diffusers' `remote_decode` and `remote_encode`.

All of this folder needs the extra `serve`.
"""

from .app import check_page, create_app
from .protocol import Limits


__all__ = ["Limits", "check_page", "create_app"]
