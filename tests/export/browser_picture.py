"""The picture of the page that ranks in the browser, in docs/browser.jpg.

    python -m tests.export.browser_picture docs/browser.jpg

It needs Chromium and playwright, as tests/export/test_web.py does.
"""

import sys
import tempfile
from pathlib import Path

from dsgnn.export.web.npm import fetch_runtime
from dsgnn.export.web.site import build_site
from dsgnn.runtime import samples
from dsgnn.runtime.ranker import BUNDLED

from .browser import chromium, opened, placed

SIZE = {"width": 1200, "height": 800}


def main(path: str) -> None:
    (photo,) = (sample for sample in samples() if sample.stem == "cake")
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        site = Path(folder) / "site"
        build_site(BUNDLED, site, fetch_runtime())
        with placed(site, isolated=True) as place, opened(browser, place.address) as page:
            page.set_viewport_size(SIZE)
            page.set_input_files("#file", photo)
            page.wait_for_selector("#result:visible")
            page.screenshot(path=path, type="jpeg", quality=88)


if __name__ == "__main__":
    main(sys.argv[1])
