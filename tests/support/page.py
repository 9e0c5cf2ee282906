"""The page of a service in a browser: what a person does there, and sees."""

import urllib.parse
from dataclasses import dataclass

import httpx

from docs.browser import Browser
from docs.screenshots import SETTLED
from notellm2_core.serving.service import Service

# The texts of a page that stand out less than 4.5 to 1 from what is behind them. WCAG 2.2, 1.4.3.
FAINT = """(() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = (rgb) => [0.2126, 0.7152, 0.0722].reduce((sum, part, n) => sum + part * linear(rgb[n]), 0);
  const behind = (element) => {
    const colour = numbers(getComputedStyle(element).backgroundColor);
    return colour[3] === 0 ? behind(element.parentElement) : colour;
  };
  const contrast = (element, pseudo) => {
    const lights = [numbers(getComputedStyle(element, pseudo).color), behind(element)].map(luminance);
    return (Math.max(...lights) + 0.05) / (Math.min(...lights) + 0.05);
  };
  const isText = (element) => element.matches('input:not([type=file], [type=checkbox]), button')
    || [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
  const texts = [...document.body.querySelectorAll('*')].filter((e) => e.checkVisibility() && isText(e));
  const found = texts.map((e) => [contrast(e, e.placeholder ? '::placeholder' : null), e.outerHTML.slice(0, 80)]);
  return [found.length, found.filter(([ratio]) => ratio < 4.5)];
})()"""


@dataclass(frozen=True)
class Page:
    """The page of a service in the browser."""

    browser: Browser
    address: str
    service: Service

    def open(self, **query: object) -> None:
        """Show what this query names; a picture may still be on its way."""
        self.browser.open(f"{self.address}/?{urllib.parse.urlencode(query, doseq=True)}")
        self.settle()

    def settle(self) -> None:
        self.browser.wait(SETTLED)

    def click(self, selector: str) -> None:
        self.browser.run(f"document.querySelector({selector!r}).click()")
        self.settle()

    def search(self, words: str) -> None:
        self.browser.run(f"document.querySelector('#words').value = {words!r}")
        self.click("#search button.main")

    def ids(self, list_selector: str) -> list[str]:
        """The notes of a list, in its order."""
        found: list[str] = self.browser.run(
            f"[...document.querySelectorAll({list_selector + ' .card'!r})].map((item) => item.dataset.note)"
        )
        return found

    def text(self, selector: str) -> str:
        return str(self.browser.run(f"document.querySelector({selector!r}).innerText"))

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.browser.run(
            f"[...document.querySelectorAll({selector!r})].map((element) => element.innerText)"
        )
        return found

    def ask(self, path: str, **body: object) -> list[str]:
        """The notes that the service itself answers with."""
        answer = httpx.post(self.address + path, json=body) if body else httpx.get(self.address + path)
        return [hit["note_id"] for hit in answer.raise_for_status().json()["hits"]]
