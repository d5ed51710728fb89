"""Headless Chromium, for pages that people look at."""

import contextlib
import os
import shutil
import tempfile

import pytest

FLAGS = ["headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
FLAGS += ["disable-component-update", "disable-sync", "force-device-scale-factor=1"]


@contextlib.contextmanager
def opened(width=1100, height=1000):
    """A browser; where none is installed the test is skipped, but in CI it fails."""
    found = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in found:
        if os.environ.get("CI"):
            pytest.fail("apt-get install chromium chromium-driver")
        pytest.skip("no chromium and chromedriver on the path")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in [*FLAGS, f"user-data-dir={profile}", f"window-size={width},{height}"]:
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options, webdriver.ChromeService(found[1]))
        try:
            yield driver
        finally:
            driver.quit()


def complaints(driver):
    """What pages said on the console since the last call."""
    return [entry["message"] for entry in driver.get_log("browser")]


def broken_images(driver):
    script = "return [...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src.slice(0, 80))"
    return driver.execute_script(script)
