"""The page in a real browser."""

import pytest
from serving.http.browser import PROGRAM, Browser
from serving.http.server import Server

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium")

ANSWER = "document.getElementById('answer')"


@pytest.fixture(scope="module")
def server(tiny_model):
    with Server(tiny_model, "-n", "3", "--batch", "3", "--api-key", "secret") as running:
        running.client.headers["Authorization"] = "Bearer secret"
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture
def page(server, browser):
    """The page, freshly loaded and with the key filled in."""
    browser.problems.clear()
    browser.call("Page.navigate", url=server.url)
    browser.wait_for("document.querySelectorAll('.rank').length === 3")
    fill(browser, "key", "secret")
    return browser


def fill(browser, name, text):
    """Put the cursor into a field, empty it, and type."""
    browser.evaluate(f"document.getElementById('{name}').select()")
    browser.call("Input.insertText", text=text)


def click(browser, name):
    """A click of the mouse."""
    x, y = browser.evaluate(
        f"(() => {{ const r = document.getElementById('{name}').getBoundingClientRect();"
        "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


def test_the_answer_is_the_servers_text(server, page, tmp_path):
    for name, text in (("prompt", "abc"), ("seed", "9"), ("max-tokens", "40"), ("temperature", "0.5")):
        fill(page, name, text)
    click(page, "send")
    page.wait_for(f"{ANSWER}.dataset.state === 'ended'")
    expected = server.text("abc", seed=9, max_tokens=40, temperature=0.5)
    assert page.evaluate(f"{ANSWER}.textContent") == "abc" + expected
    assert "first token after" in page.evaluate("document.getElementById('figures').textContent")
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
    assert page.problems == []


def test_stop_frees_the_slot_and_keeps_what_came(server, page):
    fill(page, "max-tokens", "200")
    others = {"model": server.model, "prompt": "x", "n": 100, "max_tokens": 200, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=others):  # so that the answer takes a while
        click(page, "send")
        page.wait_for("!document.getElementById('stop').hidden")
        click(page, "stop")
        page.wait_for(f"{ANSWER}.dataset.state === 'ended'")
    assert page.evaluate(f"{ANSWER}.querySelector('.error')") is None
    server.wait_until_idle()


def test_a_refusal_is_shown(page):
    fill(page, "key", "wrong")
    click(page, "send")
    page.wait_for(f"{ANSWER}.querySelector('.error')")
    assert "wants its key" in page.evaluate(f"{ANSWER}.textContent")


def test_the_ranks_are_those_of_the_server(server, page):
    server.text("abc", max_tokens=20)
    state = server.wait_until_idle()
    page.wait_for(f"document.getElementById('server').textContent.includes('{state['generated']:,}')")
    cards = page.evaluate("[...document.querySelectorAll('.rank')].map((card) => card.textContent)")
    for number, card in enumerate(cards):
        assert card.startswith(f"rank {number}attentionexpertrequests0 of 1")
    cells = page.evaluate("[...document.querySelectorAll('#bytes td')].map((cell) => cell.title)")
    assert len(cells) == 9
    assert cells[1].endswith("from rank 0 to rank 1")
    loads = page.evaluate("[...document.querySelectorAll('.layer i')].map((cell) => cell.title)")
    totals = [int(title.split(": ")[1].split()[0]) for title in loads]
    assert totals == [count for layer in state["expert_load"].values() for count in layer]
    assert page.problems == []


def test_a_server_that_has_gone_is_said(page, tiny_model, tmp_path):
    with Server(tiny_model, "-n", "1") as other:
        page.call("Page.navigate", url=other.url)
        page.wait_for("document.querySelectorAll('.rank').length === 1")
    page.wait_for("document.getElementById('health').className === 'bad'")
