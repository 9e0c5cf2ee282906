"""The page for people, in a real Chromium: what a person sees of a real service with two releases in memory."""

import base64
import shutil
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from docs.browser import BROWSERS, Browser
from docs.screenshots import SETTLED
from notellm2_core.serving import guard
from notellm2_core.serving.embedding import EmbedderBusy
from notellm2_core.serving.embedding_process import EmbeddingProcess
from notellm2_core.serving.keys import Keys, add_key
from notellm2_core.serving.live_index import Answer, LiveIndex
from notellm2_core.serving.log import NoteLog
from notellm2_core.serving.service import Service
from tests.support.page import FAINT, Page
from tests.support.released import png
from tests.support.served import TwoReleases, listening

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason=f"none of {', '.join(BROWSERS)} on PATH"),
]
FIRST, SECOND = "aaaa1111", "bbbb2222"
ACTIVE = "document.activeElement"
MARKUP = "<img src=x onerror=document.title='hacked'>"
# Notes as people write them: of markup, of other scripts, very long, without a picture.
ODD = {
    f"id {MARKUP.replace('/', '')}": MARKUP,
    "chinese": "好看的红色风筝，适合春天在海边放飞，颜色鲜艳。" * 4,
    "arabic": "طائرة ورقية حمراء جميلة",
    "long": "kite" * 200,
    "dollars": "$& and $1",
}


@pytest.fixture(scope="module")
def served(two_releases: TwoReleases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, str]]:
    log = NoteLog.open(f"sqlite:///{tmp_path_factory.mktemp('log') / 'log.db'}")
    service = Service(two_releases.lake, log, FIRST, two_releases.source)
    try:
        for release in (SECOND, FIRST):  # both are in memory then
            service.releases.activate(release)
        with listening(service, Keys()) as address:
            for note_id, title in ODD.items():
                httpx.put(f"{address}/notes/{urllib.parse.quote(note_id)}", json={"title": title}).raise_for_status()
            yield service, address
    finally:
        service.close()
        log.close()


@pytest.fixture
def page(served: tuple[Service, str], browser: Browser) -> Page:
    service, address = served
    browser.open_page()
    browser.look(1280, 900)
    return Page(browser, address, service)


def test_a_search_by_id_by_words_and_by_a_picture(page: Page, tmp_path: Path) -> None:
    page.open()
    assert page.text("#results-title") == "Notes to begin with" and len(page.ids("#columns")) >= 12
    page.search("n01")
    assert page.ids("#columns") == page.ask("/notes/n01/similar?k=12")
    page.browser.wait("document.querySelector('#query img')?.naturalWidth === 20")
    assert page.text("#results-title") == "Notes like “note 1”" and page.text("#query .title") == "note 1"
    page.click("#columns .card:nth-child(3) .title")
    third = page.ask("/notes/n01/similar?k=12")[2]
    assert page.ids("#columns") == page.ask(f"/notes/{third}/similar?k=12")
    page.browser.run("history.back()")
    page.browser.wait("document.querySelector('#results-title').innerText === 'Notes like “note 1”'")
    page.search("red tea")
    assert page.ids("#columns") == page.ask("/similar", title="red tea", k=12)
    (tmp_path / "dropped.png").write_bytes(png(3))
    page.browser.drop(tmp_path / "dropped.png", "#drop")
    page.browser.wait(f"document.querySelector('#results-title').innerText.includes('picture') && {SETTLED}")
    query = {"title": "red tea", "image": base64.b64encode(png(3)).decode(), "k": 12}
    assert page.ids("#columns") == page.ask("/similar", **query)
    assert page.text("#results-title") == "Notes near the picture and “red tea”"
    assert "dropped.png" in page.text("#drop")
    for kind in ("text", "image"):
        page.click(f"#inputs input[value={kind}]")
    assert page.texts("#columns h3") == ["Text and picture", "Text alone", "Picture alone"]
    for n, kind in enumerate(("multimodal", "text", "image"), 1):
        assert page.ids(f"#columns > :nth-child({n})") == page.ask("/similar", inputs=kind, **query)
    page.click("#no-picture")
    assert page.ids("#columns") == page.ask("/similar", title="red tea", k=12)
    hosts = {
        event["params"]["request"]["url"].removeprefix("blob:").partition("/?")[0]
        for event in page.browser.events
        if event.get("method") == "Network.requestWillBeSent"
    }
    assert all(url.startswith(page.address) for url in hosts) and len(hosts) > 20  # nothing from elsewhere


def test_the_same_query_under_two_releases_side_by_side(page: Page) -> None:
    page.open(id="n01", history="n02")
    assert page.texts("#columns h3") == [] and page.text("#results-title") == "Notes like “note 1”"
    page.click(f"#releases input[value={SECOND}]")
    assert page.texts("#columns h3") == [f"Release {FIRST}", f"Release {SECOND}"]
    lists = [page.ids(f"#columns > :nth-child({n})") for n in (1, 2)]
    asked = [page.ask(f"/notes/n01/similar?k=12&release={release}") for release in (FIRST, SECOND)]
    assert lists == asked and lists[0] != lists[1]
    alone = set(lists[0]) ^ set(lists[1])
    marked = "[...document.querySelectorAll('#columns .card')].filter((item) => item.querySelector('.tag'))"
    assert set(page.browser.run(f"{marked}.map((item) => item.dataset.note)")) == alone
    assert set(lists[0]) & set(lists[1])
    page.browser.wait(SETTLED + " && document.querySelectorAll('#feed h3').length === 2")
    feeds = [page.ids(f"#feed > :nth-child({n})") for n in (1, 2)]
    assert feeds == [page.ask("/recall", history=["n02"], k=12, release=release) for release in (FIRST, SECOND)]
    page.browser.reload()  # the address says all of it
    page.browser.wait(SETTLED + " && document.querySelectorAll('#columns h3').length === 2")
    page.open(id="n01", release=[FIRST, "cccc3333"])
    assert "Release 'cccc3333' is not in memory." in page.text("#columns > :nth-child(2)")
    assert page.ids("#columns > :nth-child(1)") == asked[0]


def test_a_history_and_why_its_feed_changes(page: Page) -> None:
    page.open(id="n01")
    assert not page.ids("#history")
    first, second = page.ids("#columns")[:2]
    page.click("#columns .card:nth-child(1) .add")
    assert page.ids("#history") == [first] and page.ids("#feed") == page.ask("/recall", history=[first], k=12)
    before = page.ids("#feed")
    page.click("#columns .card:nth-child(2) .add")
    after = page.ids("#feed")
    assert page.ids("#history") == [first, second] and after == page.ask("/recall", history=[first, second], k=12)
    fresh = set(after) - set(before)
    assert f"{len(fresh)} of {len(after)} notes of the feed are new." in page.text("#change")
    new = "[...document.querySelectorAll('#feed .card')].filter((item) => item.innerText.includes('new'))"
    assert set(page.browser.run(f"{new}.map((item) => item.dataset.note)")) == fresh
    title = httpx.get(f"{page.address}/notes/{first}").json()["title"]
    page.browser.wait(f"document.querySelector('#feed').innerText.includes('because of {title}')")
    page.browser.run("document.querySelector('#add-id').value = 'n08, nobody'")
    page.click("#add button:not([type])")
    assert page.ids("#history") == [first, second, "n08", "nobody"] and "Not there: nobody." in page.text("#change")
    page.click("#history .card:nth-child(4) .remove")
    assert page.ids("#history") == [first, second, "n08"] and "nobody" not in page.browser.run("location.search")
    page.click("#clear")
    assert not page.ids("#history") and not page.ids("#feed") and page.text("#change") == "Removed 3 notes."


def test_the_keyboard_alone(page: Page) -> None:
    page.open()
    press = page.browser.press
    visible = f"""(() => {{
      const ring = (element, pseudo) => getComputedStyle(element, pseudo).outlineStyle !== 'none';
      const element = {ACTIVE};
      return ring(element) || ring(element, '::after') || ring(element.parentElement);
    }})()"""

    def tab_to(selector: str, is_shifted: bool = False) -> list[str]:
        """Press Tab until what matches has the focus. Returns the names of what had it on the way."""
        way: list[str] = []
        while not page.browser.run(f"{ACTIVE}.matches({selector!r})"):
            assert len(way) < 80, way
            press("Tab", is_shifted)
            way.append(page.browser.run(f"{ACTIVE}.id || {ACTIVE}.value || {ACTIVE}.className"))
            assert page.browser.run(visible), f"nothing shows that {way[-1]} has the focus"
        return way

    way = tab_to("#columns .title")
    assert way[1:] == ["words", "picture", "main", "multimodal", "text", "image", FIRST, SECOND, "title"]
    tab_to("#words", is_shifted=True)
    page.browser.type("n01")
    press("Enter")
    page.browser.wait(f"document.querySelector('#results-title').innerText.includes('note 1') && {SETTLED}")
    tab_to("#columns .add")
    press(" ")
    page.settle()
    noted = page.browser.run(f"[{ACTIVE}.ariaPressed, {ACTIVE}.dataset.note, {ACTIVE}.ariaLabel]")
    assert noted[0] == "true" and [noted[1]] == page.ids("#history") and noted[2].endswith("in the history")
    tab_to("#feed .add")
    added = page.browser.run(f"{ACTIVE}.dataset.note")
    press("Enter")
    page.settle()
    assert page.ids("#history")[1] == added and added not in page.ids("#feed")
    assert page.browser.run(f"{ACTIVE}.matches('#feed .card:first-child .add')")  # the next note, not the page's top
    tab_to("#history .remove", is_shifted=True)
    for _ in range(2):
        press("Enter")
        page.settle()
    assert not page.ids("#history") and page.browser.run(f"{ACTIVE}.id") == "add-id"
    tab_to("#columns .title", is_shifted=True)
    press("Enter")
    page.browser.wait(f"{ACTIVE}.id === 'results-title'")


def test_a_late_answer_is_not_shown(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answers, search = threading.Event(), threading.Event(), LiveIndex.similar_to

    def slow(self: LiveIndex, note_id: str, k: int) -> Answer:
        if note_id == "n01":
            asked.set()
            assert answers.wait(60)
        return search(self, note_id, k)

    monkeypatch.setattr(LiveIndex, "similar_to", slow)
    try:
        page.open()
        page.browser.run("(words.value = 'n01', document.querySelector('#search button.main').click())")
        assert asked.wait(60)
        page.search("n02")
        expected = page.ask("/notes/n02/similar?k=12")
        assert page.ids("#columns") == expected
        answers.set()
        page.ask("/notes/n01/similar?k=12")
        assert page.ids("#columns") == expected and page.text("#results-title") == "Notes like “note 2”"
        asked.clear(), answers.clear()
        page.browser.run("(words.value = 'n01', document.querySelector('#search button.main').click())")
        assert asked.wait(60)
        page.browser.press("Escape")
        page.settle()
        assert page.text("#summary") == "Stopped." and page.ids("#columns") == expected
    finally:
        answers.set()


def test_what_users_wrote_is_text(page: Page) -> None:
    bad = next(iter(ODD))
    page.open(id=bad, history=[bad, *ODD], q=MARKUP)
    page.browser.wait("document.querySelector('#query .title').innerText.startsWith('<img src=x')")
    assert page.text("#results-title") == f"Notes like “{MARKUP}”" and bad in page.text("#query .about")
    page.browser.wait("document.querySelector('#history .card:last-child .title').innerText === '$& and $1'")
    label = page.browser.run("document.querySelector('#history .card:last-child .remove').ariaLabel")
    assert label == "Remove “$& and $1” from the history"
    page.search(MARKUP)
    assert MARKUP in page.text("#results-title")
    page.browser.run("document.querySelector('#add-id').value = '<b>nobody</b>'")
    page.click("#add button:not([type])")
    assert "Not there: <b>nobody</b>." in page.text("#change")
    page.open(release=MARKUP, q="tea")
    assert MARKUP in page.text("#problem")
    assert page.browser.run("document.title") == "Similar notes"
    assert page.browser.run("document.querySelectorAll('img[src=x], b').length") == 0
    policy = httpx.get(page.address).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "require-trusted-types-for 'script'" in policy
    with pytest.raises(RuntimeError, match="TrustedHTML"):  # nor may later code make markup of it
        page.browser.run("document.body.innerHTML = '<b>'")


def test_what_goes_wrong_is_told_in_a_sentence(page: Page, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page.open(id="nobody")
    assert page.text("#problem p") == "There is no note 'nobody'."
    page.search("kite")
    assert "No note has the id “kite”, so it is searched for as a word." in page.text("#summary")
    assert page.ids("#columns") and not page.browser.run("document.querySelector('#problem').checkVisibility()")
    page.open(id="n03", inputs=["multimodal", "image"])
    assert "there is no picture" in page.text("#columns > :nth-child(2) .problem") and page.ids("#columns")

    def busy(*_: object) -> None:
        raise EmbedderBusy("256 notes wait to be embedded")

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingProcess, "submit", busy)
        page.search("red tea")
        assert page.text("#problem p") == "The service is busy. 256 notes wait to be embedded. Try again in 1 s."
    with monkeypatch.context() as patch:
        patch.setattr(Service, "is_ready", property(lambda _: False))
        page.open(q="red tea", history="n01")
        assert "cannot answer now. The log of notes is still being read." in page.text("#problem p")
    page.click("#problem button")
    assert page.ids("#columns") and page.ids("#feed")
    assert not page.browser.run("document.querySelector('#problem').checkVisibility()")
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 1 << 20)
    Image.new("RGB", (1200, 1200)).save(tmp_path / "large.bmp")  # the answer comes before all of it has been sent
    page.browser.drop(tmp_path / "large.bmp", "#drop")
    page.browser.wait(f"document.querySelector('#problem').checkVisibility() && {SETTLED}")
    assert "picture is too large" in page.text("#problem p") and not page.ids("#columns")
    (tmp_path / "none.png").write_bytes(b"no picture")
    page.browser.drop(tmp_path / "none.png", "#drop")
    page.browser.wait("document.querySelector('#problem').innerText.includes('picture cannot be used')")


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(page: Page, tmp_path: Path) -> None:
    secret = add_key(tmp_path / "keys.json", "reader", "read")
    with listening(page.service, Keys.load(tmp_path / "keys.json")) as address:
        browser = page.browser
        enter = "document.querySelector('#key').value = '{}', document.querySelector('#key-form button').click()"
        browser.open(f"{address}/?id=n01&history=n02")
        browser.wait("document.querySelector('#problem p')?.innerText === 'The service asks for a key.'")
        assert browser.run(f"{ACTIVE}.id") == "key"
        browser.run(enter.format("wrong"))
        browser.wait("document.querySelector('#problem').innerText.includes('does not know this key')")
        browser.run(enter.format(secret))
        browser.wait("document.querySelector('#query img')?.naturalWidth === 20")  # pictures need it, too
        browser.wait("document.querySelectorAll('#feed .card').length")
        assert not browser.run("document.querySelector('#key-form').checkVisibility()")
        kept = "[localStorage.length, document.cookie, location.href, document.documentElement.outerHTML].join()"
        assert secret not in browser.run(kept) and browser.run(kept).startswith("0,,")
        browser.reload()
        browser.wait("document.querySelectorAll('#feed .card').length")
        browser.run("document.querySelector('#forget-key').click()")
        browser.wait("document.querySelector('#problem')?.innerText.includes('asks for a key')")
        assert browser.run("sessionStorage.length") == 0


@pytest.mark.parametrize("width", [360, 1280])
def test_light_and_dark_narrow_and_wide(page: Page, width: int) -> None:
    """Nothing needs scrolling to the side, every text stands out, and all that can be used has a name."""
    grounds = set()
    for is_dark in (False, True):
        page.browser.look(width, 800, is_dark)
        page.open(id="n01", history=[*ODD, "n02", "nobody"], release=[FIRST, SECOND], inputs=["multimodal", "text"])
        page.browser.wait("document.querySelector('#history').innerText.includes('好看的红色风筝')")
        page.browser.wait("document.querySelector('#history').innerText.includes('not there')")
        assert page.browser.run("document.documentElement.scrollWidth") == width
        num_texts, faint = page.browser.run(FAINT)
        assert num_texts > 100 and not faint
        grounds.add(page.browser.run("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2
    arabic = "document.querySelector('#history .card:nth-child(3) .title')"
    assert page.browser.run(f"getComputedStyle({arabic}).direction") == "rtl"
    heights = page.browser.run("[...document.querySelectorAll('.list .card')].map((item) => item.offsetHeight)")
    assert max(heights) < 180  # also of a title of 800 letters
    nodes = page.browser.call("Accessibility.getFullAXTree")["nodes"]
    named = {"button", "link", "checkbox", "searchbox", "textbox", "list", "heading", "region", "search"}
    roles = [(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes if not node["ignored"]]
    assert {"search", "banner", "main", "region", "status", "heading"} <= {role for role, _ in roles}
    assert [role for role, name in roles if role in named - {"list"} and not name] == []
