"""Models, pipelines and adapters on the Hub: their card, the files that load them unimported, push and pull."""

from .cards import CardOptions, render_hub_card
from .pulling import pull
from .pushing import check_push, check_repo_id, push_folder, push_to_hub
from .shims import make_shims


__all__ = [
    "CardOptions",
    "check_push",
    "check_repo_id",
    "make_shims",
    "pull",
    "push_folder",
    "push_to_hub",
    "render_hub_card",
]
