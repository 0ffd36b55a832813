"""The report in a real browser, which must be there: make test-browser."""

import http.server
import re
import shutil
import subprocess
import threading

import pytest
import records
from PIL import Image

from mergekit_mediator.cli.report_page import report_page
from mergekit_mediator.store.evaluation import Evaluation

LIGHT, DARK = (255, 255, 255), (13, 17, 23)
# Frames the page in a window of a phone, and writes what the browser measured where the test reads it.
WRAPPER = """<!doctype html><title>measuring</title>
<iframe src="report.html" style="border: 0; width: {width}px; height: 800px"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement;
  const svgs = [...page.querySelectorAll("svg")].map(svg => Math.round(svg.getBoundingClientRect().width));
  document.title = "measured";
  document.body.dataset.widths = [root.scrollWidth, root.clientWidth, ...svgs].join(" ");
}};
</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A server of the report's folder on this machine; gives its address, its folder and the paths asked for."""
    folder, asked = tmp_path_factory.mktemp("site"), []
    evaluation = Evaluation.model_validate(records.evaluation())
    manifest = records.manifest(router=records.ROUTER)
    page = report_page("merged", manifest, records.inspected(), evaluation)
    (folder / "report.html").write_text(page)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, form, *arguments):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder, asked
    server.shutdown()


@pytest.fixture
def browse(tmp_path):
    """Runs the browser without a network but this machine; gives what it prints."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "no browser: apt-get install chromium"

    def run(*options):
        settings = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        settings += [f"--user-data-dir={tmp_path}/profile", "--enable-logging=stderr"]
        settings += ["--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
        command = [program, *settings, *options]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)

    return run


def measured(browse, site, width):
    address, folder, _ = site
    (folder / "wrapper.html").write_text(WRAPPER.format(width=width))
    options = ["--virtual-time-budget=5000", "--dump-dom", f"{address}/wrapper.html"]
    text = browse(*options).stdout
    assert "<title>measured</title>" in text
    page, window, *svgs = map(int, re.search(r'data-widths="([\d ]+)"', text)[1].split())
    return page, window, svgs


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_the_page_is_no_wider_than_its_window(browse, site, width):
    page, window, svgs = measured(browse, site, width)
    assert page == window == width
    assert len(svgs) == 7
    assert min(svgs) > 250


@pytest.mark.parametrize(("scheme", "color"), [(1, LIGHT), (0, DARK)])
def test_the_page_follows_the_color_scheme(browse, site, tmp_path, scheme, color):
    address, _, _ = site
    picture = tmp_path / "page.png"
    scheme_option = f"--blink-settings=preferredColorScheme={scheme}"
    browse(
        scheme_option, "--window-size=1000,900", f"--screenshot={picture}", f"{address}/report.html"
    )
    with Image.open(picture) as shot:
        pixels = shot.convert("RGB")
        assert pixels.getpixel((5, 5)) == color
        shown = pixels.getcolors(1 << 24)
    assert max(shown)[1] == color  # the figures have no background of their own
    assert len(shown) > 100


def test_nothing_but_the_page_is_loaded_and_nothing_is_reported(browse, site):
    address, _, asked = site
    asked.clear()
    errors = browse("--dump-dom", f"{address}/report.html").stderr
    assert set(asked) <= {"/report.html", "/favicon.ico"}
    assert "CONSOLE" not in errors.replace("favicon.ico", "")
