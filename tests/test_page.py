"""``report.html``: one file, hostile text, and a real browser where there is one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from a_browser import look, requests
from an_evaluation import evaluation, example, some_examples

from matryoshka_lora.evaluation.report import MOST_EXAMPLES, page
from matryoshka_lora.files import write_text

HOSTILE = (
    "</script><script>document.title='broken'</script><!-- <script> \u2028 {{evaluation}} <img src=x onerror=alert(1)>"
)


def embedded(text: str) -> dict[str, Any]:
    """The data that a browser reads: all up to the first thing that can end a script element."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script', text, re.DOTALL | re.IGNORECASE)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def hostile_page() -> str:
    rows = [
        example(HOSTILE, 0, dict.fromkeys((0, 1, 2, 4, 8), 1.0), prompt=HOSTILE, target=HOSTILE),
        example(
            HOSTILE, 1, {0: 1.0, 1: 0.0, 2: 1.0, 4: 1.0, 8: 1.0}, prompt=HOSTILE, answers={"0": HOSTILE, "1": HOSTILE}
        ),
    ]
    return page(evaluation(rows, model=HOSTILE, adapter={"name": HOSTILE, "path": HOSTILE}), rows)


def test_the_page_holds_the_evaluation_and_its_examples() -> None:
    rows = some_examples()
    data = embedded(page(evaluation(rows), rows))
    assert data["evaluation"] == evaluation(rows)
    shown = data["examples"]["family"]
    assert [row["id"] for row in shown] == [row["doc_id"] for row in rows]
    assert [row["scores"] for row in shown] == [row["metrics"]["acc,none"] for row in rows]


def test_the_page_names_no_other_file() -> None:
    rows = some_examples()
    text = page(evaluation(rows), rows)
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]  # a name, not an address
    assert not re.search(r"\bsrc=|@import|url\(|fetch\(|import\(", text)
    assert "default-src 'none'" in text


def test_hostile_text_does_not_leave_its_place() -> None:
    text = hostile_page()
    data = embedded(text)
    name = next(iter(data["examples"]))
    assert name == data["evaluation"]["model"] == data["examples"][name][0]["prompt"] == HOSTILE
    calm = page(evaluation(some_examples()), some_examples())
    assert text.count("<") == calm.count("<")


def test_long_evaluations_keep_what_ranks_score_differently() -> None:
    same = dict.fromkeys((0, 1, 2, 4, 8), 1.0)
    number = MOST_EXAMPLES + 50
    rows = [example("t", n, same | ({4: 0.0} if n % 10 == 9 else {}), prompt="x" * 5000) for n in range(number)]
    data = embedded(page(evaluation(rows), rows))
    kept = [row["id"] for row in data["examples"]["t"]]
    assert len(kept) == MOST_EXAMPLES
    assert data["all"] == {"t": number}
    assert kept == sorted(kept)
    assert set(range(9, number, 10)) <= set(kept)
    assert max(len(row["prompt"]) for row in data["examples"]["t"]) < 1000


# A browser.


def show(browser: Any, file: Path, width: int = 1280, scheme: str = "light") -> None:
    look(browser, file.as_uri(), width, scheme)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = some_examples() + some_examples("a second task", 9)
    write_text(tmp_path / "report.html", page(evaluation(rows), rows))
    return tmp_path / "report.html"


def test_the_browser_has_nothing_to_complain_of_and_asks_for_nothing(browser: Any, file: Path) -> None:
    show(browser, file)
    assert browser.title == "matryoshka, reordered by svd at every rank"
    assert browser.get_log("browser") == []
    assert [url for url in requests(browser) if not url.startswith("data:")] == [file.as_uri()]


def test_a_rank_is_explained_under_the_pointer_and_with_the_keyboard(browser: Any, file: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    show(browser, file)
    tip = browser.find_element(By.ID, "tip")
    assert not tip.is_displayed()
    texts = [text.text for text in browser.find_elements(By.CSS_SELECTOR, "#chart text")]
    assert texts[:4] == ["0.2", "0.4", "0.6", "0.8"]
    points = browser.find_elements(By.CSS_SELECTOR, ".point")
    assert [point.get_attribute("data-rank") for point in points] == ["1", "2", "4", "8"]
    ActionChains(browser).move_to_element(points[2].find_element(By.TAG_NAME, "circle")).perform()
    assert tip.is_displayed()
    assert tip.text.splitlines() == ["rank 4", "0.933 ± 0.032", "460.8 kB", "34.4 ms per token"]
    ActionChains(browser).move_to_element(browser.find_element(By.ID, "title")).perform()
    assert not tip.is_displayed()
    browser.find_element(By.ID, "task").send_keys(Keys.TAB, Keys.NULL)
    assert tip.text.startswith("rank 1\n")
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert tip.text.startswith("rank 2\n")
    assert browser.get_log("browser") == []


def test_the_rank_filter_the_search_and_the_task(browser: Any, file: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    def shown() -> list[int]:
        found = browser.find_elements(By.CSS_SELECTOR, "#rows tr")
        return [int(row.get_attribute("data-id")) for row in found]

    def click(rank: int) -> None:
        browser.find_element(By.CSS_SELECTOR, f"#filter input[value='{rank}']").click()

    show(browser, file)
    rows = some_examples()
    scores = {row["doc_id"]: row["metrics"]["acc,none"] for row in rows}
    differ = [n for n, by_rank in scores.items() if len({by_rank[str(r)] for r in (1, 2, 4, 8)}) > 1]
    assert shown() == differ[:50]
    click(1)
    click(2)
    assert shown() == [3]  # the only question that ranks 4 and 8 score differently
    assert browser.find_element(By.ID, "count").text == "1 of 60 questions"
    answers = [answer.text.split() for answer in browser.find_elements(By.CSS_SELECTOR, "#rows .answer")]
    assert answers == [["4", "✗", "uncle", "0"], ["8", "✓", "aunt"]]
    Select(browser.find_element(By.ID, "which")).select_by_value("all")
    assert len(shown()) == 50
    browser.find_element(By.ID, "more").click()
    assert len(shown()) == 60
    browser.find_element(By.ID, "search").send_keys("NUMBER 17")
    assert shown() == [17]
    browser.find_element(By.ID, "search").clear()
    Select(browser.find_element(By.ID, "task")).select_by_value("a second task")
    assert shown() == list(range(9))
    assert not browser.find_element(By.CSS_SELECTOR, "#filter input[value='1']").is_selected()
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_a_phone_and_a_desk(browser: Any, file: Path, tmp_path: Path, width: int, scheme: str) -> None:
    show(browser, file, width, scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(15, 20, 25)"}[scheme]
    # To look at: pytest keeps the folders of its last runs.
    browser.save_screenshot(str(tmp_path / f"{width}-{scheme}.png"))


def test_hostile_text_is_only_text_in_the_browser(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    write_text(tmp_path / "report.html", hostile_page())
    show(browser, tmp_path / "report.html")
    assert browser.title.startswith("</script><script>document.title='broken'")
    assert browser.find_elements(By.TAG_NAME, "img") == []
    assert "onerror=alert(1)" in browser.find_element(By.ID, "rows").text
    assert browser.get_log("browser") == []
