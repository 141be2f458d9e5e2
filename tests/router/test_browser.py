"""The console in a real browser, over real engines behind a scripted model."""

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from policies.control.store import ClusterView
from policies.modes import DecodePlan, Mode
from policies.replica_load import ClusterLoad, ObservedLoad
from router.api import create_app
from router.metrics import Metrics
from tests.replicas.engine.scripted import ScriptedRunner
from tests.router.conftest import over_http
from tests.router.fakes import FakeStore, a_load
from tests.router.stack import a_stack
from tests.router.test_auth import ADMIN, KEY, RING
from tests.router.test_cluster_feed import a_shift

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None or CHROMEDRIVER is None,
        reason="no chromium with its driver on the PATH (Debian: apt-get install chromium chromium-driver)",
    ),
]

selenium = pytest.importorskip("selenium.webdriver", reason="the package selenium is not installed")

from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

WITHIN_S = 20
ALL = ["ar", "self_speculation", "diffusion", "auto"]


class Page:
    """The console in a browser, at most one page at a time."""

    def __init__(self, driver: Any, url: str):
        self.driver, self.url = driver, url

    def open(self, view: str = "") -> None:
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(f"{self.url}/{view}")

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def until(self, probe: Callable[[], Any]) -> Any:
        return WebDriverWait(self.driver, WITHIN_S, 0.05).until(lambda driver: probe())

    def press(self, *keys: str) -> None:
        *held, last = keys
        chain = ActionChains(self.driver)
        for key in held:
            chain.key_down(key)
        chain.send_keys(last)
        for key in reversed(held):
            chain.key_up(key)
        chain.perform()

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def foreign_requests(self) -> list[str]:
        """What the page asked of other hosts than its own."""
        found = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                asked = urlsplit(message["params"]["request"]["url"])
                if (
                    asked.scheme in ("http", "https", "ws", "wss")
                    and asked.netloc != urlsplit(self.url).netloc
                ):
                    found.append(asked.geturl())
        return found

    def wait_for_answers(self, num: int) -> None:
        self.until(lambda: len(self.all('#answers [data-state="done"]')) == num)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-first-run",
        "--window-size=1280,900",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options, selenium.ChromeService(CHROMEDRIVER))
    driver.set_page_load_timeout(WITHIN_S)
    yield driver
    driver.quit()


async def browse(driver: Any, scenario: Callable[[Page], None], **door: Any) -> None:
    """Runs a scenario in a thread against a server in this one."""
    runner = ScriptedRunner(num_pages=512, page_size=16, max_context=1024)
    async with a_stack([runner], **door) as stack, over_http(create_app(stack.door)) as url:
        page = Page(driver, url)
        try:
            await asyncio.to_thread(scenario, page)
        finally:
            await asyncio.to_thread(driver.get, "about:blank")
        await stack.settled()


async def test_an_answer_streams_in_the_colours_of_its_forwards(driver: Any) -> None:
    def scenario(page: Page) -> None:
        page.open()
        page.until(lambda: page.find("#model").text)
        page.until(lambda: len(page.all("#example option")) > 10)
        page.find("#mode").send_keys("diffusion")
        page.find("#prompt").clear()
        page.find("#prompt").send_keys("Once upon a time")
        page.find("#block-length").send_keys("8")
        page.find("#run").click()
        page.wait_for_answers(1)
        runs = page.all("#answers .answer span")
        forwards = [int(run.get_attribute("data-forward")) for run in runs]
        assert len(forwards) > 2
        assert forwards == sorted(forwards)
        assert {run.get_attribute("data-mode") for run in runs} == {"diffusion"}
        colours = {run.value_of_css_property("background-color") for run in runs}
        assert len(colours) == len(set(forwards))
        told = page.find("#answers .figures").text
        assert "tokens a forward" in told
        assert page.errors() == []
        assert page.foreign_requests() == []

    await browse(driver, scenario)


async def test_a_race_by_keyboard_alone(driver: Any) -> None:
    def scenario(page: Page) -> None:
        page.open()
        page.until(lambda: page.find("#prompt").get_attribute("value"))
        page.until(lambda: page.find("#model").text)
        page.driver.execute_script("document.getElementById('tab-playground').focus()")
        page.press(Keys.CONTROL, Keys.SHIFT, Keys.ENTER)
        page.wait_for_answers(4)
        assert [card.get_attribute("data-mode") for card in page.all("#answers .card")] == ALL
        # Self-speculation's answer is ar's, and so it is on the page.
        answers = [pre.get_attribute("textContent") for pre in page.all("#answers .answer")]
        assert answers[0] == answers[1] != ""
        assert len(page.all("#answers .winner")) == 1
        page.press(Keys.ARROW_RIGHT)
        page.until(lambda: page.find("#cluster").is_displayed())
        assert page.driver.switch_to.active_element.get_attribute("id") == "tab-cluster"
        assert not page.find("#playground").is_displayed()
        assert page.errors() == []

    await browse(driver, scenario)


async def test_the_server_s_refusal_is_shown_in_its_words(driver: Any) -> None:
    def scenario(page: Page) -> None:
        page.open()
        page.until(lambda: page.find("#model").text)
        page.until(lambda: page.find("#prompt").get_attribute("value"))
        page.driver.execute_script("document.querySelector('#max-tokens').removeAttribute('min')")
        page.find("#max-tokens").clear()
        page.find("#max-tokens").send_keys("-1")
        page.find("#run").click()
        page.until(lambda: page.all('#answers [data-state="failed"]'))
        assert "max_tokens" in page.find("#answers .wrong").text

    await browse(driver, scenario)


async def test_a_key_is_asked_for_and_kept_for_the_tab(driver: Any) -> None:
    def scenario(page: Page) -> None:
        page.open("#cluster")
        page.until(lambda: page.find("#key-dialog").get_attribute("open"))
        page.find("#key").send_keys(KEY, Keys.ENTER)
        # The team's key may not watch, and the page says so and asks for another.
        page.until(lambda: "admin" in page.find("#key-why").text)
        page.find("#key").send_keys(ADMIN, Keys.ENTER)
        page.until(lambda: page.find("#status").text.startswith("live"))
        page.until(lambda: page.all("#replicas .card"))
        kept = "return JSON.stringify([Object.keys(localStorage), document.cookie, sessionStorage.length])"
        assert json.loads(page.driver.execute_script(kept)) == [[], "", 1]

    store = FakeStore(ClusterView(ClusterLoad((ObservedLoad(a_load("r1"), 0.1),))))
    await browse(driver, scenario, keys=RING, store=store)


async def test_the_cluster_and_a_shift_under_a_burst(driver: Any) -> None:
    plan = DecodePlan(Mode.DIFFUSION, 16)
    load = a_load("r1", num_running=3, running_by_mode={Mode.DIFFUSION: 3}, decode=plan)
    store = FakeStore(ClusterView(ClusterLoad((ObservedLoad(load, 0.1),))))

    def scenario(page: Page) -> None:
        page.open("#cluster")
        card = page.until(lambda: page.all('[data-replica="r1"]'))[0]
        assert "diffusion, blocks of 16, factor 0.1" in card.text
        page.find("#burst-size").clear()
        page.find("#burst-size").send_keys("4")
        page.find("#burst-length").clear()
        page.find("#burst-length").send_keys("1")
        page.find("#burst").click()
        page.until(lambda: "4 requests at once" in page.find("#burst-said").text)
        store.decisions = (a_shift(load, DecodePlan(Mode.AR), time.time()),)
        store.view = ClusterView(
            ClusterLoad((ObservedLoad(a_load("r1", decode=DecodePlan(Mode.AR), num_running=9), 0.1),))
        )
        (button,) = page.until(lambda: page.all("#shifts button"))
        assert "diffusion 16 → ar" in " ".join(button.text.split())
        page.driver.execute_script("document.querySelector('#shifts button').focus()")
        page.press(Keys.ENTER)
        told = page.until(lambda: page.find("#shift").is_displayed() and page.find("#shift").text)
        assert "nine in flight" in told
        assert "forecast, new plan" in told
        page.until(lambda: len({r.get_attribute("class") for r in page.all(".strip rect")}) == 2)
        # The burst went through the door as other requests do, and its latencies are told.
        page.until(lambda: "–" not in page.find("#whole .figures div:nth-of-type(6) dd").text)
        assert page.errors() == []
        assert page.foreign_requests() == []

    metrics = Metrics("m", "i")
    await browse(driver, scenario, store=store, metrics=metrics)
    metrics.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_phone_width_and_both_colour_schemes(driver: Any, scheme: str) -> None:
    def scenario(page: Page) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        try:
            for view in ("#playground", "#cluster"):
                page.open(view)
                page.until(lambda: page.find("#model").text)
                page.until(lambda view=view: page.find(view).is_displayed())
                too_wide = "return document.documentElement.scrollWidth > innerWidth"
                assert not page.driver.execute_script(too_wide), view
            colour = page.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
            assert (int(colour.split("(")[1].split(",")[0]) < 128) == (scheme == "dark")
        finally:
            page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
            page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

    await browse(driver, scenario)
