"""The picture of the server's page in docs/page.jpg: a sample photo, ranked by the bundled model.

    python tests/runtime/page_picture.py docs/page.jpg

It needs Chromium and playwright, as tests/runtime/test_page.py does.
"""

import sys

from playwright.sync_api import sync_playwright
from serving import serving_model

from dsgnn.runtime import samples
from dsgnn.runtime.ranker import BUNDLED

SIZE = {"width": 1200, "height": 760}


def main(path: str) -> None:
    (photo,) = (sample for sample in samples() if sample.stem == "goats")
    with serving_model(BUNDLED) as (host, port), sync_playwright() as play:
        browser = play.chromium.launch(executable_path="/usr/bin/chromium")
        page = browser.new_page(viewport=SIZE)
        page.goto(f"http://{host}:{port}/")
        page.set_input_files("#file", photo)
        page.wait_for_selector("#result:visible")
        page.screenshot(path=path, type="jpeg", quality=88)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
