"""Downloads by pooch: from several mirrors in turn, under the final name only once the MD5 is right."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastlayers.data.files import DataError

CHUNK = 1 << 20
TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class Remote:
    """A file to be had from any of `urls`, the official one first; all serve the content with this MD5."""

    name: str
    md5: str
    urls: tuple[str, ...]

    @classmethod
    def on(cls, mirrors: Sequence[str], name: str, md5: str) -> Remote:
        """The file `name` in each of `mirrors`, addresses of folders that end with a slash."""
        return cls(name, md5, tuple(mirror + name for mirror in mirrors))


def fetch(remote: Remote, folder: Path) -> Path:
    """Downloads `remote` into `folder`, which is made where there is none, and returns the file.

    An interruption or a wrong content leaves nothing under the file's name.

    Raises DataError with what each mirror answered where none serves the file, and where pooch is not installed.
    """
    try:
        import pooch
    except ModuleNotFoundError as error:
        raise DataError(f"{error.name} is missing. Downloads need it: pip install 'fastlayers[studies]'") from error
    # A bar in a log file is no help.
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=CHUNK, timeout=TIMEOUT_SECONDS)
    failures = []
    for url in remote.urls:
        try:
            return Path(pooch.retrieve(url, f"md5:{remote.md5}", remote.name, folder, downloader=downloader))
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong MD5 is a ValueError
            failures.append(f"  {url}: {error}")
    answers = "\n".join(failures)
    raise DataError(f"{folder / remote.name}: could not be downloaded.\n{answers}\n")


def default_folder() -> Path:
    """Pooch's folder for fastlayers in the user's cache.

    Raises DataError where pooch, which knows where that is, is not installed.
    """
    try:
        import pooch
    except ModuleNotFoundError as error:
        raise DataError(
            f"data_dir: expected a folder (--data-dir DIR, or the environment variable FASTLAYERS_DATA), found none; "
            f"there is a default with pip install 'fastlayers[studies]', but {error.name} is missing"
        ) from error
    return Path(pooch.os_cache("fastlayers"))
