"""Source distributions of peers from the package index, unpacked into a folder that git ignores.

pip would build an sdist's metadata to download it, which vLLM's needs torch and a compiler for: only the index is
asked, as PEP 503 describes it, and the file's hash compared.
"""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urldefrag, urljoin

_DEFAULT_INDEX = "https://pypi.org/simple"


class DownloadError(Exception):
    """A source distribution that could not be had, and why."""


def source_distribution(name: str, version: str, cache: Path) -> Path:
    """The unpacked source distribution of a package, downloaded unless `cache` has it.

    Raises:
        DownloadError: the index cannot be reached, has no such file, or its hash differs.
    """
    stem = f"{name.replace('-', '_')}-{version}"
    folder = cache / stem
    if folder.is_dir():
        return folder
    data = _download(name, f"{stem}.tar.gz")
    partial = cache / f"{stem}.partial"
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(partial, filter="data")
    (partial / stem).rename(folder)
    partial.rmdir()
    return folder


def _index() -> str:
    """The index that pip is configured to use."""
    asked = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    # The environment's setting is listed last of those that hold.
    found = re.findall(r"^(?:global|download|install|:env:)\.index-url='(.*)'$", asked.stdout, re.MULTILINE)
    return str(found[-1] if found else _DEFAULT_INDEX).rstrip("/") + "/"


def _download(name: str, file: str) -> bytes:
    page = urljoin(_index(), f"{name}/")
    links = _links(_get(page, name).decode(), page)
    if file not in links:
        raise DownloadError(f"{name}: the package index has no {file}")
    url, fragment = urldefrag(links[file])
    data = _get(url, name)
    algorithm, _, expected = fragment.partition("=")
    if expected and hashlib.new(algorithm, data).hexdigest() != expected:
        raise DownloadError(f"{name}: got {file} with another {algorithm} than the package index names")
    return data


def _get(url: str, name: str) -> bytes:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": "text/html, */*"})) as response:
            return bytes(response.read())
    except (OSError, urllib.error.URLError) as error:
        raise DownloadError(
            f"{name}: the package index could not be read ({error}); name a checkout instead"
        ) from error


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if tag == "a" and href:
            self.hrefs.append(href)


def _links(html: str, page: str) -> dict[str, str]:
    """The address, with its hash, of each file of an index page."""
    parser = _Links()
    parser.feed(html)
    return {urldefrag(href).url.rpartition("/")[2]: urljoin(page, href) for href in parser.hrefs}
