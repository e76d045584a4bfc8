"""The page of a report in a real browser: what a person sees, does and must be safe from."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pypdf
import pytest

import membench
from membench.records.record import Record
from membench.records.run_file import Run
from membench.report import files
from membench.report.page import page as page_of
from tests import made_up

from .made_up import MIB, record, run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

_RESULTS = Path(__file__).parent.parent / "results"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser here: none of {', '.join(_BROWSERS)} is installed")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


Opener = Callable[..., "Page"]


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Opener]:
    """Opens a page's text as a file; at the end no error may have been told and nothing but the file asked for."""
    faults: list[str] = []
    asked: list[str] = []
    pages: list[Page] = []

    def open_(text: str, *, width: int = 1280, height: int = 900, colours: Any = "light") -> Page:
        path = tmp_path / f"{len(pages)}.html"
        path.write_text(text, encoding="utf-8")
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=colours)
        page.set_default_timeout(10_000)
        page.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield open_
    urls = [(tmp_path / f"{number}.html").as_uri() for number in range(len(pages))]
    for page in pages:
        page.close()
    assert faults == []
    assert asked == urls


@pytest.fixture(scope="module")
def quickstart() -> str:
    """The page of a real run."""
    return page_of([membench.read_run(_RESULTS / "quickstart@2-cores-epyc.jsonl")])


def _column(page: Page, number: int) -> list[str]:
    cells = f"rows => rows.map(row => row.cells[{number}].textContent.trim())"
    shown: list[str] = page.eval_on_selector_all("#cases tbody tr:not([hidden])", cells)
    return shown


def _drawn(page: Page) -> None:
    """Come past every picture of the choice: it is drawn when it is near the screen."""
    for picture in page.locator("figure .drawing").all():
        picture.scroll_into_view_if_needed()
        picture.locator("svg.main-svg").first.wait_for()
    page.wait_for_selector("html[data-drawn='true']")


def test_a_real_run_opens_with_its_summary_its_pictures_and_its_table(opened: Opener, quickstart: str) -> None:
    page = opened(quickstart)
    _drawn(page)
    assert "bf16 holds 2.0 times less live memory at its peak (134.2 MiB, not 274.7 MiB)" in page.inner_text("#words")
    titles = ["Memory against divergence", "weights", "live peak", "footprint peak", "Converting against running",
              "Memory of llama-60m/none/forward/cpu over time"]  # fmt: skip
    assert page.locator("#pictures figure h3").all_inner_texts() == titles
    assert page.locator("#pictures .drawing svg.main-svg").count() >= len(titles)
    assert page.locator("#cases tbody tr").count() == 13


def test_a_group_and_a_case_are_chosen_by_name_or_in_the_table(opened: Opener, quickstart: str) -> None:
    page = opened(quickstart)
    page.select_option("#group", label="llama-60m · train · cpu")
    _drawn(page)
    assert "What held the memory" in page.inner_text("#pictures")
    page.select_option("#case-choice", label="bf16")
    assert "Memory of llama-60m/bf16/train/cpu over time" in page.inner_text("#timeline")
    page.locator("#cases tbody tr", has_text="large-batch").get_by_role("button", name="fp16").click()
    assert "Memory of trained-tiny/fp16/large-batch/cpu over time" in page.inner_text("#timeline")
    assert "kernel's peak (VmHWM), under the default allocator; exact" in page.inner_text("#whole")


def test_a_column_sorts_both_ways_by_its_figures_and_keeps_what_is_unknown_at_the_end(opened: Opener) -> None:
    sizes = {"none": 2000 * MIB, "large": 900 * MIB, "unknown": None, "small": 9 * MIB, "tiny": 2**10}
    records = [record(name, weights_bytes=size, step_median_s=1.0) for name, size in sizes.items()]
    page = opened(page_of([run(records)]))
    head = page.get_by_role("columnheader", name="weights").first
    assert head.get_attribute("aria-sort") == "none"
    head.get_by_role("button").click()
    assert (_column(page, 0), head.get_attribute("aria-sort")) == (
        ["tiny", "small", "large", "none", "unknown"], "ascending",
    )  # fmt: skip
    # The keyboard does what the mouse does.
    head.get_by_role("button").press("Enter")
    assert (_column(page, 0), head.get_attribute("aria-sort")) == (
        ["none", "large", "small", "tiny", "unknown"], "descending",
    )  # fmt: skip


def test_a_table_is_filtered_by_field_searched_by_words_and_cleared(opened: Opener, quickstart: str) -> None:
    page = opened(quickstart)
    page.get_by_role("combobox", name="Model", exact=True).select_option("trained-tiny")
    assert page.inner_text("#count") == "7 of 13 cases"
    page.get_by_label("Search").fill("FP16 large")
    assert (page.inner_text("#count"), _column(page, 0)) == ("1 of 13 cases", ["fp16"])
    page.get_by_role("button", name="Clear").click()
    page.get_by_text("13 of 13 cases").wait_for()


def test_pointing_at_a_point_tells_its_case(opened: Opener, quickstart: str) -> None:
    page = opened(quickstart)
    _drawn(page)
    page.locator("#pareto .scatterlayer .point").nth(1).hover(force=True)
    told = page.locator("#pareto .hoverlayer").text_content() or ""
    assert "bf16" in told
    assert "live peak 134.2 MiB ×0.49" in told


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_it_follows_the_systems_colours_until_the_button_says_otherwise(
    opened: Opener, quickstart: str, colours: str
) -> None:
    page = opened(quickstart, colours=colours)

    def is_dark() -> bool:
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", paper)[:3])) < 3 * 128

    button = page.get_by_role("button", name="Dark")
    assert (is_dark(), button.get_attribute("aria-pressed")) == (colours == "dark", str(colours == "dark").lower())
    button.click()
    assert (is_dark(), button.get_attribute("aria-pressed")) == (colours != "dark", str(colours != "dark").lower())


def test_on_a_phone_nothing_is_wider_than_the_screen(opened: Opener, quickstart: str) -> None:
    page = opened(quickstart, width=375, height=700)
    _drawn(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 375


def test_what_is_seen_can_be_heard_and_reached_by_keyboard(opened: Opener, quickstart: str) -> None:
    page = opened(quickstart)
    _drawn(page)
    pictures = page.locator("figure .drawing")
    assert all(picture.get_attribute("aria-label") for picture in pictures.all())
    # Each has the same in words and as a table.
    assert page.locator("figure figcaption").count() == page.locator("figure table").count() == pictures.count()
    unlabelled = "fields => fields.filter(field => !field.labels.length).length"
    assert page.eval_on_selector_all("select, input", unlabelled) == 0
    # What can be scrolled by keyboard says what it is.
    unnamed = "all => all.filter(one => !one.getAttribute('aria-label') && !one.getAttribute('aria-labelledby')).length"
    assert page.eval_on_selector_all(".wide[tabindex], pre[tabindex]", unnamed) == 0
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the table"
    levels = page.eval_on_selector_all("h1, h2, h3", "all => all.map(one => Number(one.tagName[1]))")
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))


def test_on_paper_everything_is_open_and_nothing_is_dark(opened: Opener, quickstart: str, tmp_path: Path) -> None:
    page = opened(quickstart, colours="dark")
    # Nothing was scrolled to, yet all pictures are there.
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("figure .drawing svg.main-svg").count() >= page.locator("figure .drawing").count()
    page.emulate_media(media="print")
    assert page.locator("details:not([open])").count() == 0
    # What the pictures are of can be read, and that there are others; what filters the table is not there.
    assert page.locator("#group").is_visible()
    assert page.get_by_text("One of 4: choose another on the screen to print its pictures.").is_visible()
    assert page.locator("#case-choice").is_visible()
    assert page.locator("#search").is_hidden()
    assert page.inner_text("#count") == "13 of 13 cases"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("nav").is_hidden()
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() > 0
    assert page.pdf().startswith(b"%PDF")


def test_a_table_of_all_columns_fits_on_paper_and_its_names_are_not_cut_into_letters(opened: Opener) -> None:
    width = 1047  # of A4 across, less its margins
    page = opened(page_of([membench.read_run(_RESULTS / "everything@2-cores-epyc.jsonl")]), width=width)
    page.emulate_media(media="print")
    # A browser shrinks what it prints by a third at most, and cuts off what is wider.
    assert page.evaluate("document.documentElement.scrollWidth") <= width * 4 / 3
    assert page.evaluate("document.querySelector('#cases tbody th').offsetWidth") > 60
    # Whoever turns the page still sees what the columns are.
    reader = pypdf.PdfReader(io.BytesIO(page.pdf(prefer_css_page_size=True)))
    texts = [sheet.extract_text() for sheet in reader.pages]
    with_cases = [text for text in texts if len(re.findall("✓ ok", text)) > 10]
    assert len(with_cases) > 2
    assert all({"technique", "workload", "together"} <= set(text.split()) for text in with_cases)


def test_a_case_chosen_in_the_table_is_gone_to_and_come_back_from(opened: Opener, quickstart: str) -> None:
    page = opened(quickstart)
    pick = page.locator("#cases tbody tr", has_text="large-batch").get_by_role("button", name="fp16")
    pick.press("Enter")
    focused = "document.activeElement.textContent"
    assert page.evaluate(focused) == "trained-tiny · large-batch · cpu · fp16"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "Back to its row of the table"
    page.keyboard.press("Enter")
    assert page.evaluate(f"[{focused}, document.activeElement.closest('tr').dataset.workload]") == [
        "fp16", "large-batch",
    ]  # fmt: skip


def test_a_choice_above_the_pictures_keeps_the_focus_and_is_said(opened: Opener, quickstart: str) -> None:
    page = opened(quickstart)
    said = page.locator("#told[role='status']")
    assert said.text_content() == ""
    page.locator("#group").focus()
    page.keyboard.press("ArrowDown")
    assert said.text_content() == "Shown: trained-tiny · large-batch · cpu, case none."
    assert page.evaluate("document.activeElement.id") == "group"
    page.locator("#case-choice").focus()
    page.keyboard.press("ArrowDown")
    assert said.text_content() == "Shown: trained-tiny · large-batch · cpu, case bf16."
    assert page.evaluate("document.activeElement.id") == "case-choice"


def _luminance(colour: str) -> float:
    shares = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(first: str, second: str) -> float:
    """As WCAG has it."""
    dark, light = sorted((_luminance(first), _luminance(second)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_text_and_marks_stand_out_from_what_is_behind_them(opened: Opener, quickstart: str, colours: str) -> None:
    page = opened(quickstart, colours=colours)

    def of(name: str) -> list[str]:
        value = page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}')")
        return str(value).split()

    paper, raised = of("paper") + of("raised")
    for name in ("ink", "faint", "accent", "good", "bad"):
        assert min(_contrast(of(name)[0], behind) for behind in (paper, raised)) >= 4.5, name
    assert min(_contrast(mark, paper) for mark in of("marks")) >= 3
    assert min(_contrast(of("edge")[0], behind) for behind in (paper, raised)) >= 3
    # And these are the colours that are drawn with.
    _drawn(page)
    fills = page.eval_on_selector_all("#memory .bars .point path", "bars => bars.map(bar => bar.style.fill)")
    marks = {f"rgb({', '.join(str(int(mark[at : at + 2], 16)) for at in (1, 3, 5))})" for mark in of("marks")}
    assert len(set(fills)) == 2
    assert set(fills) <= marks
    assert {mark.lower() for mark in (files._REFERENCE, *files._COLOURS)} <= set(of("marks")) or colours == "dark"


def test_an_estimate_is_a_line_beside_its_bar_and_in_the_table(opened: Opener) -> None:
    measured = run([record("none", peak_live_bytes=128 * MIB), record("half", peak_live_bytes=64 * MIB)])
    page = opened(page_of([measured], run([record("none", peak_live_bytes=126 * MIB)])))
    _drawn(page)
    at = page.eval_on_selector_all("#memory .drawing", "all => all.map(one => one.data[1].x)")
    assert at == [[126, None]]
    assert page.locator("#memory .drawing .scatterlayer .point").count() == 1
    page.locator("#memory summary").first.click()
    assert "126.0 MiB (-1.6%)" in page.inner_text("#memory table")


@pytest.mark.parametrize(("width", "least"), [(1280, 250), (375, 150)])
def test_long_names_leave_room_for_their_bars(opened: Opener, width: int, least: int) -> None:
    names = ["none", *(f"quantization-aware-training-of-4-bits-{n:02}" for n in range(4)), "x" * 40]
    records = [record(name, weights_bytes=n * MIB, peak_live_bytes=n * MIB, peak_footprint_bytes=n * MIB,
                      step_median_s=1.0)
               for n, name in enumerate(names, 5)]  # fmt: skip
    page = opened(page_of([run(records)]), width=width)
    _drawn(page)
    plots = page.eval_on_selector_all("#memory .drawing", "all => all.map(one => one._fullLayout.xaxis._length)")
    assert len(plots) == 3
    assert min(plots) > least
    # None is cut: two that end alike can be told apart.
    shown = page.locator("#memory .drawing").first.locator(".yaxislayer-above text").all_text_contents()
    assert shown == names


_HOSTILE = (
    "<script>document.title='taken'</script>",
    "</script><script>document.title='taken'</script>",
    '"><img src=x onerror="document.title=`taken`">',
    "'`${document.title='taken'}`",
    "<a href='https://example.invalid'>%{y}</a>",
    "&lt;b&gt; $x^2$ {{ 7 * 7 }}",
    "evil\u202egnp.exe\u2028\x00\x1b[31m",
    "<!--",
    "<b>bold</b>",
    "<a href='x:y'>z</a>",
)


def test_hostile_names_are_shown_as_they_are_written_and_do_nothing(opened: Opener) -> None:
    def spoilt(number: int, name: str, model: str = "m") -> Record:
        made = record(name, model, model=model, weights_bytes=MIB, peak_live_bytes=number * MIB, step_median_s=1.0,
                      kl_nats=0.1, obtained={"weights_bytes": {"source": name}})  # fmt: skip
        phase = {"name": name, "allocator": name, "began_s": 0.0, "ended_s": 1.0, "peak_live_bytes": MIB}
        return dataclasses.replace(
            made, message=name, remarks=(name,), notes=(name,), output_tail=name, reasons={"disk_bytes": name},
            processes=(made_up.process(phases=[phase], breakdown_bytes={name: {name: MIB}}, peak_part=name),),
            timeline={"at_s": [0.0, 1.0], "rss_bytes": [0, MIB]},
        )  # fmt: skip

    records = [spoilt(number, name) for number, name in enumerate(("none", *_HOSTILE), 1)]
    records += [spoilt(1, name, "".join(_HOSTILE)) for name in ("none", _HOSTILE[0])]
    records += [
        dataclasses.replace(spoilt(1, f"{name}2"), status="failed", ended_in=name, message=name) for name in _HOSTILE
    ]
    header: dict[str, Any] = dict.fromkeys(("suite", "suite_text", "run"), "\n".join(_HOSTILE))
    runs = [run(records, **header, machine={name: name for name in _HOSTILE}, started_at=at)
            for at in ("2026-11-24T10:00:00+00:00", "2026-11-25T10:00:00+00:00")]  # fmt: skip
    page = opened(page_of(runs))
    _drawn(page)
    for number in range(page.locator("#group option").count()):
        page.select_option("#group", index=number)
        _drawn(page)
        page.locator("#pareto .scatterlayer .point").first.hover(force=True)
    assert "taken" not in page.title().replace("document.title='taken'", "").replace("document.title=`taken`", "")
    assert page.locator("img").count() == 0
    assert page.locator("main a").count() == 0
    assert page.locator("script").count() == 3
    shown = page.locator("#cases").text_content() or ""
    for name in _HOSTILE[:6]:
        assert name in shown
    page.select_option("#group", index=0)
    _drawn(page)
    drawn = page.locator("#memory .yaxislayer-above text").all_text_contents()
    assert {"<b>bold</b>", "<a href='x:y'>z</a>"} <= set(drawn)
    assert r"evil\u202egnp.exe\u2028\x00\x1b[31m" in shown
    assert "\u202e" not in page.content()


def test_the_pages_own_policy_stops_scripts_and_requests_that_are_not_its_own(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page_of([run([record("none", weights_bytes=1)])]), encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        for attempt in (
            f"fetch('{url}', {{signal: AbortSignal.timeout(2000)}}).catch(() => 0)",
            f"new Promise(done => {{ Object.assign(new Image(), {{src: '{url}', onload: done, onerror: done}});"
            " setTimeout(done, 2000); })",
        ):
            page.evaluate(f"{attempt}.then(() => 0)")
        with pytest.raises(BlockingIOError):
            listening.accept()
    added = "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
    page.evaluate(added)
    assert page.evaluate("window.ran") is None
    page.close()


@pytest.mark.parametrize("groups", [1, 500])
def test_five_hundred_cases_stay_under_fifteen_megabytes_and_still_sort_and_filter(opened: Opener, groups: int) -> None:
    kept = [one for path in sorted(_RESULTS.glob("*@*.jsonl")) for one in membench.read_run(path).records]
    assert len(kept) > 200

    def numbered(number: int, one: Record) -> Record:
        case = {"model": "m", "workload": "w", "device": "cpu", "technique": f"{one.technique}-{number}"}
        if groups > 1:
            case = {**one.case, "model": f"{one.case['model']}-{number}"}
        return dataclasses.replace(one, case=case, id=f"{number}-{one.id}")

    many = [numbered(number, one) for number, one in zip(range(500), itertools.cycle(kept), strict=False)]
    text = page_of([run(many)])
    assert len(text.encode()) < 15e6
    page = opened(text)
    assert page.inner_text("#count") == "500 of 500 cases"
    # What is far from the screen waits.
    page.wait_for_selector("html[data-drawn='true']")
    assert page.locator("#timeline .drawing").count() == 1
    assert page.locator("#timeline svg").count() == 0
    page.get_by_role("columnheader", name="live peak").first.get_by_role("button").click()
    page.get_by_label("Search").fill("int8")
    assert 0 < len(_column(page, 0)) < 500


def _failed(made: Record) -> Record:
    return dataclasses.replace(
        made, status="out-of-memory", ended_in="load", message="it wanted 9 GiB", metrics={"weights_bytes": None},
        reasons={"weights_bytes": "the case ended as out-of-memory"}, output_tail="Killed\n",
    )  # fmt: skip


_GOOD = [
    record("none", peak_live_bytes=100 * MIB, step_median_s=1.0, weights_bytes=64 * MIB),
    record("a", peak_live_bytes=50 * MIB, step_median_s=1.0, weights_bytes=32 * MIB),
]


@pytest.mark.parametrize(
    ("records", "told"),
    [
        ([], ["no case was finished", "No case was finished"]),
        (
            [_failed(one) for one in _GOOD],
            ["2 cases, 2 out-of-memory", "out-of-memory in load: it wanted 9 GiB", "Killed"],
        ),
        ([_GOOD[0], _failed(_GOOD[1])], ["2 cases, 1 ok, 1 out-of-memory", "it wanted 9 GiB"]),
        (
            [_GOOD[0], dataclasses.replace(_GOOD[1], broken_limits=("it took 50.00 MiB, over 40.00 MiB",))],
            ["✗ over limit\nit took 50.00 MiB, over 40.00 MiB"],
        ),
        ([_GOOD[1]], ["1 case, all ok", "nothing to compare with: 'none' was not measured to its end"]),
        ([_GOOD[0]], ["1 case, all ok", "64.00 MiB"]),
    ],
    ids=["empty", "all failed", "partly failed", "over a limit", "without its reference", "one case"],
)
def test_a_run_that_is_not_whole_still_gives_a_page(opened: Opener, records: Sequence[Record], told: list[str]) -> None:
    page = opened(page_of([run(records)]))
    for row in page.locator(".pick").all()[-1:]:
        row.click()
    shown = page.inner_text("main")
    assert [line for line in told if line not in shown] == []


def test_several_runs_of_a_suite_are_drawn_over_time_with_their_commits(opened: Opener) -> None:
    def at(day: int, mib: int) -> Run:
        records = [dataclasses.replace(one, metrics={**one.metrics, "peak_live_bytes": mib * MIB}) for one in _GOOD]
        return run(records, run=f"made-up-{day}", started_at=f"2026-11-{day}T10:00:00+00:00",
                   machine={"commit": f"c0ffee{day}"})  # fmt: skip

    page = opened(page_of([at(24, 120), at(23, 100)]))
    _drawn(page)
    shown = page.inner_text("#history")
    assert "Live peak over 2 runs. The last against the first: none 20% more, a 20% more." in shown
    page.locator("#history summary").first.click()
    head = page.locator("#history thead").first.inner_text()
    assert head.index("2026-11-23 10:00 UTC (membench c0ffee23)") < head.index(
        "2026-11-24 10:00 UTC (membench c0ffee24)"
    )


def test_a_long_timeline_is_thinned_out_and_keeps_every_peak() -> None:
    at, sizes = [number / 100 for number in range(2000)], [MIB] * 2000
    sizes[777] = 50 * MIB
    made = dataclasses.replace(_GOOD[0], timeline={"at_s": at, "rss_bytes": sizes})
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page_of([run([made])]), re.DOTALL)
    assert data
    (case,) = json.loads(data[1])["cases"]
    drawn = dict(zip(case["timeline"]["at_s"], case["timeline"]["columns"]["resident"], strict=True))
    assert len(drawn) < 300
    assert drawn[7.77] == 50
    assert "Of 2000 samples the lowest and the highest of each stretch are drawn." in case["timeline"]["caption"]
