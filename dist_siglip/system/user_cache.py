"""Where does a user keep what can be made again?"""

import os


def user_cache_folder(name: str) -> str:
    """Name a folder of ours in the user's cache: ``XDG_CACHE_HOME``, else ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "dist_siglip", name)
