"""The page, headless: two models side by side, streaming, stop, hover, keyboard, a phone's width, and hostile texts.

Needs Debian's chromium. SCREENSHOTS names a folder to write pictures of the page to.
"""

import hashlib
import os
import re
import shutil
import time
from base64 import b64encode
from pathlib import Path

import httpx
import pytest

from gptjax.files import PROMPTS

CHROMIUM = shutil.which("chromium")
NASTY = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>`'\"\\&amp;"


def test_the_page_may_load_and_run_nothing_but_itself(running):
    response = httpx.get(running.url)
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'" and "unsafe" not in str(policy)
    for tag in ("script", "style"):
        [part] = re.findall(f"<{tag}>(.*?)</{tag}>", response.text, re.S)
        assert policy[f"{tag}-src"] == f"'sha256-{b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
    assert not re.findall(
        r"""(?:src|href|action)=|\burl\(|@import|\son\w+=|innerHTML|outerHTML|insertAdjacent|eval\(""", response.text
    )
    assert set(re.findall(r"https?://[^\"'\s]*", response.text)) == {"http://www.w3.org/2000/svg"}


def test_the_page_gets_the_models_and_the_prompts_of_the_study(running):
    data = httpx.get(f"{running.url}/page.json").json()
    assert [(model["name"], model["chat"]) for model in data["models"]] == [("base", False), ("instruct", True)]
    assert data["models"][0]["card"]["context"] == "160 tokens"
    assert data["models"][0]["loss"] is None and data["models"][1]["loss"]["val"] == [[10, 3.5], [20, 3.0]]
    assert data["prompts"] == PROMPTS.read_text().splitlines() and len(data["prompts"]) == 3


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, running):
    """The page; an error in it, or a request to elsewhere, fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, errors = context.new_page(), []

    def note(message):
        if message.type == "error" and "status of 400" not in message.text:  # an answer that a test asks for
            errors.append(message.text)

    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", note)
    page.on("request", lambda request: errors.append(request.url) if not request.url.startswith(running.url) else None)
    page.set_default_timeout(60_000)
    page.goto(running.url)
    page.wait_for_selector("#columns section")
    yield page
    context.close()
    assert not errors


def picture(page, name):
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def until(page, expression):
    """Wait here: the page's policy forbids to evaluate texts in it later."""
    end = time.monotonic() + 60
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        time.sleep(0.02)


def finished(page):
    until(page, "running === 0 && document.querySelectorAll('.token').length > 0")


@pytest.mark.slow
def test_two_models_answer_side_by_side_and_a_token_tells_its_alternatives(page):
    columns = page.locator("#columns section")
    assert columns.locator("h2").all_inner_texts() == ["base", "instruct"]
    assert columns.nth(1).locator("svg path.val").count() == 1
    page.fill("#seed", "5")
    page.fill("#most", "30")
    page.get_by_role("button", name="Who are you?").click()
    finished(page)
    for i in range(2):
        assert columns.nth(i).locator(".token").count() == 30
        assert "30 tokens" in columns.nth(i).inner_text() and "cut off" in columns.nth(i).inner_text()
    assert columns.nth(0).locator(".answer").inner_text().startswith("Who are you?")
    assert columns.nth(1).locator(".turn.user").inner_text() == "Who are you?"
    left, right = (columns.nth(i).bounding_box() for i in range(2))
    assert left["y"] == right["y"] and right["x"] > left["x"] + left["width"] - 1
    token = columns.nth(1).locator(".token:visible").nth(3)  # one within a character of several is empty
    token.hover()
    rows = page.locator("#tip tr")
    assert page.locator("#tip").is_visible() and 6 <= rows.count() <= 7
    assert page.locator("#tip tr.drawn").count() == 1 and "%" in rows.first.inner_text()
    picture(page, "desktop")
    page.emulate_media(color_scheme="dark")
    picture(page, "dark")


@pytest.mark.slow
def test_the_keyboard_is_enough(page):
    page.focus("#first")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "text":
            break
    page.keyboard.type("abc why")
    page.keyboard.press("Enter")
    finished(page)
    page.locator(".answer").first.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    shown = page.locator(".answer").first.locator(".token").nth(2)
    assert page.locator("#tip").is_visible() and "shown" in shown.get_attribute("class")
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()


@pytest.mark.slow
def test_an_answer_streams_and_stop_ends_it(page, running):
    page.fill("#most", "4096")
    page.fill("#text", "abc")
    page.click("#send")
    until(page, "[...document.querySelectorAll('.answer')].filter(a => a.children.length > 5).length === 2")
    assert running.busy == 2 and page.is_disabled("#send")
    page.click("#halt")
    until(page, "running === 0")
    assert "stopped" in page.locator("#columns section").first.inner_text()
    running.wait_until_idle(20)
    page.fill("#text", "abc")
    page.click("#send")
    until(page, "running === 2")
    page.keyboard.press("Escape")
    until(page, "running === 0")
    running.wait_until_idle(20)


@pytest.mark.slow
def test_a_conversation_goes_on_and_can_begin_anew(page):
    page.select_option("#first", "instruct")
    page.select_option("#second", "")
    page.fill("#most", "8")
    for text in ("abc", "why?"):
        page.fill("#text", text)
        page.keyboard.press("Enter")
        finished(page)
    assert page.locator(".turn.user").all_inner_texts() == ["abc", "why?"]
    assert page.evaluate("columns[0].messages.length") == 4
    page.click("#clear")
    assert page.locator(".turn").count() == 0
    page.select_option("#mode", "text")
    page.fill("#text", "abc")
    page.click("#send")
    finished(page)
    assert page.locator(".given").inner_text() == "abc"


@pytest.mark.slow
def test_nothing_that_is_written_becomes_html(page):
    """Neither in what a user writes, nor in an error that repeats it, nor in what is copied."""
    page.fill("#text", NASTY)
    page.fill("#most", "3")
    page.evaluate("navigator.clipboard.writeText = async text => { window.copied = text; }")
    page.click("#curl")
    curl = page.evaluate("copied")
    page.click("#python")
    python = page.evaluate("copied")
    page.click("#send")
    finished(page)
    assert page.locator(".given").inner_text() == NASTY and page.locator(".turn.user").inner_text() == NASTY
    assert page.title() == "gptjax" and page.locator("img").count() == 0 and page.locator("script").count() == 1
    import ast
    import json
    import shlex

    body = json.loads(shlex.split(curl.replace("\\\n", ""))[-1])
    assert body["prompt"] == NASTY and body["max_tokens"] == 3
    [call] = [node for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Call) and node.keywords][-1:]
    assert {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}["prompt"] == NASTY
    page.fill("#stop", "x" * 1500)
    page.fill("#text", "abc")
    page.evaluate("submit()")
    page.wait_for_selector(".problem")
    assert "stop is not up to 16 texts" in page.locator(".problem").first.inner_text()


@pytest.mark.slow
def test_a_phone_shows_all_without_scrolling_sideways(browser, running):
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(running.url)
    page.wait_for_selector("#columns section")
    page.fill("#most", "40")
    page.get_by_role("button", name="Singapore").tap()
    finished(page)
    boxes = [page.locator("#columns section").nth(i).bounding_box() for i in range(2)]
    assert boxes[1]["y"] > boxes[0]["y"] + boxes[0]["height"] - 1
    page.locator(".token:visible").nth(2).tap()
    tip = page.locator("#tip").bounding_box()
    assert tip["x"] >= 0 and tip["x"] + tip["width"] <= 390
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    picture(page, "phone")
    context.close()


@pytest.mark.slow
def test_a_server_with_a_key_asks_for_it(browser, start):
    running = start(token="secret")
    page = browser.new_context().new_page()
    page.goto(running.url)
    page.wait_for_selector("#key:visible")
    assert "needs a key" in page.locator("#note").inner_text()
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    page.wait_for_selector("#columns section")
    page.fill("#most", "3")
    page.fill("#text", "abc")
    page.click("#send")
    finished(page)
    page.context.close()
