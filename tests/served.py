"""The MLflow UI as a user opens it, and a real browser on it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from selenium import webdriver
from selenium.common.exceptions import JavascriptException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

from tests.servers import free_port

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
# Without them a browser in a closed network spends its time on connections that are refused.
CHROMIUM_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--window-size=1600,1200"
)
PATIENCE = 120  # seconds for the server to start


@dataclass(frozen=True)
class Served:
    """`python -m pipeline.ui`, ready.

    Attributes:
        process: Of the command.
        pages: Address by the title it was printed with.
    """

    process: subprocess.Popen[str]
    pages: dict[str, str]

    @property
    def address(self) -> str:
        return self.pages["home"].rstrip("/")


@contextlib.contextmanager
def open_ui(*arguments: str, folder: Path) -> Iterator[Served]:
    """Starts the UI, and ends it with Ctrl-C."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.ui", f"port={free_port()}", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    try:
        yield Served(process, dict(_printed(process)))
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=30)
        if process.poll() is None:
            process.kill()


def _printed(process: subprocess.Popen[str]) -> Iterator[tuple[str, str]]:
    assert process.stdout is not None
    watchdog = threading.Timer(PATIENCE, process.kill)
    watchdog.start()
    try:
        for line in process.stdout:
            if line.startswith("Ctrl-C"):
                return
            if found := re.fullmatch(r"(.+?) {2,}(http://127\.0\.0\.1:\d+/.*)\n", line):
                yield found[1], found[2]
    finally:
        watchdog.cancel()
    raise RuntimeError(f"the UI did not start: {process.communicate()[1]}")


def open_browser(profile: Path) -> WebDriver:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in [*CHROMIUM_FLAGS.split(), f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))


def sees(browser: WebDriver, *texts: str) -> bool:
    body = text_of(browser, "body")
    return all(text in body for text in texts)


def text_of(browser: WebDriver, path: str) -> str:
    """What is to be read in an element; WebDriver's own way takes seconds on pages of charts."""
    element = browser.find_element(By.CSS_SELECTOR, path)
    return str(browser.execute_script("return arguments[0].innerText", element))


def wait(browser: WebDriver, holds: Callable[[WebDriver], object]) -> None:
    """Waits until something holds of a page that is still being drawn."""
    meanwhile = (StaleElementReferenceException, JavascriptException)
    WebDriverWait(browser, 60, poll_frequency=0.1, ignored_exceptions=meanwhile).until(holds)


def visit(browser: WebDriver, address: str, *texts: str) -> None:
    """Opens a page and waits until it shows some texts."""
    browser.get("about:blank")  # or another page of the UI stays, until the next is drawn
    browser.get(address)
    wait(browser, lambda driver: sees(driver, *texts))
