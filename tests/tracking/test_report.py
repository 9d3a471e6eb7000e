"""The page: what it says, that it is safe to open whatever a run contains, and how it looks in a browser."""

import itertools
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.tracking.browser import Browser, find_chromium
from wmtp_worker.storage.layout import RunRecord
from wmtp_worker.tracking.report import chart as charts
from wmtp_worker.tracking.report import read_metrics, verdict
from wmtp_worker.tracking.report.chart import Line, chart, spell, ticks
from wmtp_worker.tracking.report.tokens import level
from wmtp_worker.training.report import read_record, write_report
from wmtp_worker.weighting.bins import EDGES

HOSTILE = "</script></style><img src=x onerror=\"document.title='owned'\">"
SETTINGS = {"weighting.family": "gradient", "weighting.control": "none", "run.seed": 1, "training.max_steps": 40}


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def train_record(step, heads=2, scale=1.0):
    loss = scale * (2 + 5 * math.exp(-step / 20)) + 0.1 * math.sin(step)
    facts = {
        "kind": "train",
        "step": step,
        "loss": loss,
        "head_loss": [loss + k / 10 for k in range(heads)],
        "unweighted_loss": loss * 1.1,
        "unweighted_head_loss": [loss * 1.1] * heads,
        "weight_mean": 1.0,
        "weight_std": 0.4,
        "weight_min": 0.2,
        "weight_max": 4.0,
        "weight_entropy": 0.9,
        "lr": 1e-3,
        "grad_norm": 1.0 + 0.1 * math.cos(step),
        "tokens": 600,
        "packing": 0.9,
        "rows": "0123456789abcdef",
        "seconds": 0.5,
    }
    if step % 10 == 0:
        facts["weight_histogram"] = [3, *[0] * 20, 5, 9, 4, *[0] * (len(EDGES) - 22)]
    return facts


def validation_record(step, scale=1.0, heads=2):
    loss = scale * (2.1 + 5 * math.exp(-step / 20))
    head_loss = [loss - 0.1, loss + 0.1][:heads]
    return {
        "kind": "validation",
        "step": step,
        "loss": loss,
        "head_loss": head_loss,
        "head_accuracy": [0.4, 0.3][:heads],
    }


def probe_records(steps=(10, 20, 40), text="def"):
    tokens = [text, " area", "(", "r", ")", ":", "\n", "    ", "return", " 3", "\n"]
    weights = [[round(0.3 + (i % 4) * 0.6, 3), round(2.2 - (i % 3) * 0.7, 3)] for i in range(len(tokens))]
    sample = {"problem": 0, "prompt": f"Write a function. {text}", "tokens": tokens, "left_out": 2}
    header = {"family": "gradient", "control": "none", "heads": 2, "samples": [sample]}
    return [header, *({"step": step, "weights": [weights]} for step in steps)]


def start(process="a", time=1000.0, **facts):
    return {"event": "start", "process": process, "time": time, "host": "gpu-1", "pid": 1, "gpus": 1, **facts}


def end(how="finished", step=40, time=1100.0, process="a", **facts):
    return {"event": "end", "process": process, "time": time, "how": how, "step": step, **facts}


@pytest.fixture
def run(tmp_path):
    """`run(name, …)`: the logs of a run that took 40 steps, as files."""

    def write(name="r", *, steps=40, scale=1.0, ledger=None, settings=(), text="def", validations=(10, 20, 30, 40)):
        record = RunRecord(tmp_path / "logs" / name)
        trained = [train_record(step, scale=scale) for step in range(1, steps + 1)]
        write_lines(record.metrics, [*trained, *(validation_record(step, scale) for step in validations)])
        write_lines(record.weights, probe_records(text=text))
        save = {"event": "save", "process": "a", "time": 1050.0, "step": 20, "pause": 0.004, "carry": 1.5}
        write_lines(record.ledger, [start(price_per_hour=36.0), save, end()] if ledger is None else ledger)
        record.settings.write_text(json.dumps(SETTINGS | dict(settings)))
        return record

    return write


def page_of(*records):
    path = records[0].folder / "page.html"
    write_report(records, path)
    return path.read_text()


def words(html):
    """What the page says to a reader, without its style and script."""

    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.said, self.inside, self.tags = [], [], []

        def handle_starttag(self, tag, attributes):
            self.inside.append(tag)
            self.tags.append((tag, dict(attributes)))
            self.said.append("" if tag in ("span", "b", "code") else " ")

        def handle_endtag(self, tag):
            while self.inside and self.inside.pop() != tag:
                pass

        def handle_data(self, data):
            if not {"style", "script"} & set(self.inside):
                self.said.append(data)

    reader = Reader()
    reader.feed(html)
    reader.close()
    return " ".join("".join(reader.said).split()), reader.tags


def anchors(html):
    return [tag["id"] for name, tag in words(html)[1] if name == "section" and "id" in tag]


# --- what it says ----------------------------------------------------------------------------------------------


def test_the_page_of_a_run_has_every_section_there_is_something_for(run):
    html = page_of(run())
    assert anchors(html) == ["loss", "weights", "optimiser", "throughput", "saves", "settings"]
    said, _ = words(html)
    assert "Finished after 40 steps. Validation loss fell from" in said
    assert "All 2 heads improved. Nothing interrupted it. It ran for 1.7 min, which cost 1.00 in the curr" in said
    assert "tokens 24,000 in 40 steps tokens/s 1,200" in said
    assert "training.max_steps 40" in said


def test_sections_without_data_are_left_out(tmp_path):
    record = RunRecord(tmp_path / "bare")
    write_lines(record.metrics, [{"kind": "train", "step": 1, "loss": 2.0}, {"kind": "train", "step": 2, "loss": 1.0}])
    html = page_of(record)
    assert anchors(html) == ["loss"]
    assert html.count("<figure") == 1
    assert "No end is on record at step 2" in words(html)[0]


@pytest.mark.parametrize(
    ("ledger", "mark", "says"),
    [
        ([start(), end("notice", 17, detail="SIGTERM")], "warning", "Interrupted at step 40 (SIGTERM)"),
        ([start(), end("failed", 17, detail="the loss is nan")], "bad", "error at step 40: the loss is nan"),
        ([start()], "warning", "it is still running, or was killed"),
    ],
)
def test_the_verdict_is_how_it_ended(ledger, mark, says, run):
    found = verdict.of_run(read_record(run(ledger=ledger)))
    assert found.mark == mark
    assert says in found.headline


def test_an_early_stop_is_said(run):
    found = verdict.of_run(read_record(run(settings={"training.max_steps": 90})))
    assert found.headline.startswith("Finished: stopped early at step 40 of 90")


def test_a_loss_that_rose_is_not_praised(run):
    record = run()
    rising = [
        validation_record(step) | {"loss": loss, "head_loss": [loss, 9 - loss]}
        for step, loss in ((10, 2.0), (20, 1.5), (30, 3.0))
    ]
    write_lines(record.metrics, rising)
    text = " ".join(verdict.of_run(read_record(record)).sentences)
    assert "rose from 2 (step 10) to 3; it was lowest at step 20, with 1.5." in text
    assert "Head 1 did not improve, the others did." in text


def test_interruptions_say_what_they_cost(run):
    ledger = [
        start(price_per_hour=36.0),
        {"event": "running", "process": "a", "time": 1010.0, "phases": {"boot": 5.0}},
        {"event": "save", "process": "a", "time": 1020.0, "step": 20, "pause": 0.01, "seconds_per_step": 2.0},
        start("b", 1200.0, price_per_hour=36.0, reached={"step": 26, "time": 1050.0, "seconds_per_step": 2.0}),
        {"event": "running", "process": "b", "time": 1210.0, "resumed_from": 20, "phases": {"boot": 10.0}},
        end(time=1300.0, process="b"),
    ]
    said, _ = words(page_of(run(ledger=ledger)))
    assert "1 interruption: 6 steps done again." in said
    assert "1970-01-01 00:20:00 gpu-1 killed 26 20 6 12 s 10 s 2.5 min 0.22" in said


@pytest.mark.parametrize(("second", "cost", "says"), [(18.0, "1.75", ", which cost"), (None, "1.00", "as far as")])
def test_each_process_costs_what_its_machine_does(second, cost, says, run):
    prices = {} if second is None else {"price_per_hour": second}
    ledger = [
        start(price_per_hour=36.0),
        end("notice", 20),
        start("b", 2000.0, **prices),
        end(time=2150.0, process="b"),
    ]
    said, _ = words(page_of(run(ledger=ledger)))
    assert f"cost {cost} " in said
    assert says in said


@pytest.mark.parametrize(
    ("first", "last", "says"),
    [
        ({"loss": 2.0}, {"loss": 3.0}, "But the validation loss rose."),
        ({"loss": 2.0}, {"loss": 2.0}, "But the validation loss did not fall."),
        ({"loss": 2.0, "head_loss": [1.0, 1.0]}, {"loss": 1.9, "head_loss": [1.0, 1.1]}, "But no head improved."),
    ],
)
def test_a_finished_run_that_learned_nothing_is_a_warning(first, last, says, run):
    record = run()
    write_lines(
        record.metrics, [{"kind": "validation", "step": 10, **first}, {"kind": "validation", "step": 40, **last}]
    )
    found = verdict.of_run(read_record(record))
    assert (found.mark, found.headline) == ("warning", f"Finished after 40 steps. {says}")


def test_a_comparison_names_the_better_run_and_its_caveats(run):
    runs = [run("one"), run("two", scale=0.9, settings={"run.seed": 2, "weighting.family": "uniform"})]
    html = page_of(*runs)
    said, tags = words(html)
    assert "two has the lowest validation loss, " in said
    assert "below one. One seed: a small difference may be chance." in said
    assert anchors(html)[:3] == ["runs", "loss", "weights"]
    assert [tag["aria-label"] for name, tag in tags if name == "input" and tag["name"] == "run"] == [
        "run one",
        "run two",
    ]
    assert "Those that differ setting one two weighting.family gradient uniform run.seed 1 2" in said


def test_several_seeds_are_a_mean_and_a_spread(run):
    runs = [run(f"seed{k}", scale=scale, settings={"run.seed": k}) for k, scale in ((1, 1.0), (2, 0.9), (3, 1.1))]
    found = verdict.of_comparison([read_record(record) for record in runs])
    assert any(text.startswith("gradient: mean ") and "over 3 runs" in text for text in found.sentences)
    assert not any("One seed" in text for text in found.sentences)


def test_losses_of_different_things_are_not_compared_silently(run):
    runs = [run("one", settings={"data.dataset": "a"}), run("two", settings={"data.dataset": "b"})]
    found = verdict.of_comparison([read_record(record) for record in runs])
    assert found.mark == "warning"
    assert "The losses are not of the same thing: data.dataset differ." in found.sentences


def test_the_value_model_of_a_run_is_shown_with_it(run, tmp_path):
    record = run("critic")
    value = {"value_loss": 0.3, "pairwise_accuracy": 0.8, "explained_variance": 0.4, "calibration": 0.07}
    value["reliability"] = [[0.2, 0.25, 9], [0.8, 0.7, 4]]
    write_lines(
        RunRecord(tmp_path / "logs" / "critic-value").metrics,
        [{"kind": "train", "step": 1, "value_loss": 0.5}, {"kind": "validation", "step": 1, **value}],
    )
    said, _ = words(page_of(record))
    for title in ("Value loss", "Pairwise accuracy", "Explained variance", "Calibration error", "Calibration"):
        assert title in said
    assert "perfect correct in fact" in said
    assert "Stage 1: loss of the value model" in said
    assert "beside the policy" not in said
    own = verdict.of_run(read_record(RunRecord(tmp_path / "logs" / "critic-value")))
    assert "Validation loss 0.3 at step 1, measured once." in own.sentences
    alone = RunRecord(tmp_path / "logs" / "critic-value")
    assert anchors(page_of(alone)) == ["loss", "value"]
    assert "Stage 1: validation loss of the value models" in words(page_of(alone, run("other")))[0]


def test_values_learned_beside_the_policy_are_shown_after_those_of_the_first_stage(run, tmp_path):
    record = run("critic")
    for place in (record, RunRecord(tmp_path / "logs" / "critic-value")):
        write_lines(place.metrics, [{"kind": "train", "step": step, "value_loss": 0.5 / step} for step in (1, 2)])
    said, _ = words(page_of(record))
    assert "beside the policy" in said


# --- that it is safe -------------------------------------------------------------------------------------------


@pytest.fixture
def hostile(run):
    detail = end("failed", 40, detail=HOSTILE)
    return run(
        "evil", text=HOSTILE, settings={"data.dataset": HOSTILE, HOSTILE: "1"}, ledger=[start(host=HOSTILE), detail]
    )


def test_whatever_a_run_contains_is_text(hostile):
    html = page_of(hostile)
    said, tags = words(html)
    names = [name for name, _ in tags]
    assert "img" not in names
    assert names.count("script") == 1
    assert said.count("<img src=x onerror=") >= 4  # token, prompt, setting, detail


def test_secrets_of_the_environment_are_not_in_it(run, monkeypatch):
    secret = "planted<secret>&value"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    said, _ = words(page_of(run(settings={"data.dataset": f"s3://{secret}"}, text=secret)))
    assert "secret" not in said
    assert "s3://***" in said


def test_the_page_asks_for_nothing(run):
    for name, attributes in words(page_of(run()))[1]:
        for key in ("src", "href", "action", "poster", "data"):
            value = attributes.get(key) or "#"
            assert value.startswith("#") or value.startswith("data:"), (name, attributes)


def test_a_hundred_thousand_steps_make_a_small_page(run):
    record = run(validations=())
    made = [json.dumps(train_record(step, heads=4) | {"step": "here"}) for step in range(1, 51)]
    checked = json.dumps(validation_record(1) | {"step": "here"})
    with record.metrics.open("w") as file:
        for step in range(1, 100_001):
            file.write(made[step % 50].replace('"here"', str(step)) + "\n")
            if step % 100 == 0:
                file.write(checked.replace('"here"', str(step)) + "\n")
    html = page_of(record)
    assert len(html.encode()) < 3_000_000
    assert "Finished after 100,000 steps" in html


def test_a_metrics_file_with_holes_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"kind": "train", "step": 1, "loss": NaN}\nnonsense\n[]\n{"kind": "train", "step": 2, "a": [1, 2]}\n{"ki'
    )
    train = read_metrics(path)["train"]
    assert train["step"].tolist() == [1, 2]
    assert [column.tolist()[1] for column in train.each("a")] == [1, 2]
    assert np.isnan(train["a/0"][0])
    assert np.isnan(train["nothing"]).all()


# --- charts ------------------------------------------------------------------------------------------------------


def test_a_long_line_is_reduced_to_means_that_keep_its_ends_and_its_range():
    x = np.arange(10_000.0)
    found = chart("t", [Line("a", x, np.where(x % 2, 1.0, 3.0), style="band")])
    points = found.lines[0].path.removeprefix("M").split("L")
    assert len(points) == charts.BUCKETS
    assert points[0].split()[0] == "0"
    assert points[-1].split()[0] == "1000"
    assert {int(point.split()[1]) for point in points} == {500}  # the mean of 1 and 3
    band = [int(point.split()[1]) for point in found.lines[0].band.removeprefix("M").removesuffix("Z").split("L")]
    assert (min(band), max(band)) == (37, 963)  # 3 and 1, within a margin of 4 %


def test_a_spike_does_not_flatten_the_rest():
    y = np.ones(10_000)
    y[::2] = 2
    y[5000] = 1e9
    found = chart("t", [Line("a", np.arange(10_000), y, style="band")])
    assert found.domain[3] > 1e6  # the mean of its stretch is shown
    y[5000] = math.inf
    assert chart("t", [Line("a", np.arange(10_000), y, style="band")]).domain[3] < 3


def test_nothing_to_draw_is_no_chart():
    assert chart("t", [Line("a", [1, 2], [math.nan, math.inf])]) is None
    assert chart("t", []) is None


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1, 100_000), (4.9, 5.1), (-3, 3), (0, 1e-5), (0.999, 1.0)])
def test_ticks_are_few_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    assert low <= found[0] < found[-1] <= high * (1 + 1e-9)
    assert all(len(spell(tick)) <= 8 for tick in found)


@pytest.mark.parametrize(
    ("ys", "options"),
    [
        ([1.00001, 1.00002], {}),
        ([0.99911, 0.99932], {"share": True}),
        ([12345.1, 12345.2], {}),
        ([0.2, 0.4], {"zero": True, "number": "{:.0f} MB".format}),
        ([5.0, 5.0], {}),
    ],
)
def test_no_two_ticks_say_the_same(ys, options):
    found = chart("t", [Line("a", [1, 2], ys)], **options)
    labels = [tick.text for tick in found.y_ticks]
    assert len(labels) > 1
    assert len(set(labels)) == len(labels)
    assert found.domain[2] <= ys[0] <= ys[1] <= found.domain[3]
    assert found.domain[2] == 0 or "zero" not in options


# --- in a browser ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    binary = find_chromium()
    if binary is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with Browser(binary) as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_complains_of_nothing_asks_for_nothing_and_nothing_overflows(width, dark, run, browser):
    record, other = run("a-run-with-a-rather-long-name-" * 3), run("b", scale=0.9)
    for records in ([record], [record, other]):
        page_of(*records)
        browser.open(record.folder / "page.html", width, dark)
        browser.evaluate("document.querySelectorAll('details').forEach((it) => (it.open = true))")
        assert browser.complaints == []
        assert browser.requests == [(record.folder / "page.html").as_uri()]
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(19, 20, 22)" if dark else "rgb(251, 250, 248)"
        )


def test_the_switches_colour_the_tokens_without_a_script(run, browser):
    record = run()
    page_of(record)
    browser.open(record.folder / "page.html", 1280)
    colour = "getComputedStyle(document.querySelector('.code span')).backgroundColor"
    first = browser.evaluate(colour)
    browser.evaluate("document.querySelector('label[for=head2]').click()")
    assert browser.evaluate(colour) != first
    shown = "[...document.querySelectorAll('.code span')].map((it) => it.textContent).join('')"
    assert browser.evaluate(shown).startswith("def area(r):↵\n    return 3")


def test_the_switch_of_moments_changes_the_curve_and_the_table_with_the_tokens(run, browser):
    record = run()
    page_of(record)
    browser.open(record.folder / "page.html", 1280)
    browser.evaluate("document.querySelectorAll('.sample details').forEach((it) => (it.open = true))")
    for moment, step in ((2, 40), (0, 10)):
        browser.evaluate(f"document.querySelector('label[for=moment{moment}]').click()")
        seen = browser.evaluate("document.querySelector('.sample').innerText")
        assert [at for at in (10, 20, 40) if f"step {at}, by head" in seen] == [step]
        assert [at for at in (10, 20, 40) if f"at step {at}\n" in seen] == [step]


def test_lighter_and_heavier_than_1_are_told_apart(run, browser):
    assert [level(weight, 1.0) for weight in (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)] == [-100, -100, -100, 0, 100, 100]
    record = run()
    page_of(record)
    browser.open(record.folder / "page.html", 1280)
    colour = "getComputedStyle(document.querySelectorAll('.code span')[{}]).backgroundColor"
    red, _, blue = browser.evaluate(f"({colour.format(3)}).match(/[0-9.]+/g).slice(0, 3).map(Number)")  # 2.1
    assert red > blue
    red, _, blue = browser.evaluate(f"({colour.format(0)}).match(/[0-9.]+/g).slice(0, 3).map(Number)")  # 0.3
    assert red < blue


def test_paper_is_white_and_ink_is_dark_whatever_the_screen_likes(run, browser):
    record = run()
    page_of(record)
    browser.open(record.folder / "page.html", 1000, dark=True)
    browser.print()
    style = "(({backgroundColor, color}) => [backgroundColor, color])(getComputedStyle(document.body))"
    assert browser.evaluate(style) == ["rgb(255, 255, 255)", "rgb(28, 27, 25)"]
    assert browser.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"


# of all text that is seen: the least contrast with what is behind it (WCAG 2.2), as [ratio, text]
_CONTRAST = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const paint = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let least = [99, ""];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const it = texts.currentNode.parentElement, text = texts.currentNode.data.trim();
    if (!text || !it.checkVisibility() || it.closest("style, script, .skip, svg")) continue;
    const behind = [];
    for (let at = it; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
    const [a, b] = [paint(behind), paint([...behind, getComputedStyle(it).color])].map(light).sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < least[0]) least = [ratio, text];
  }
  return least;
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_everybody_can_read_it_and_find_their_way(dark, run, browser):
    record, other = run(), run("other", ledger=[start(), end("failed", 17, detail="the loss is nan")])
    for records in ([record], [other], [record, other]):
        page_of(*records)
        browser.open(records[0].folder / "page.html", 1280, dark)
        browser.evaluate("document.querySelectorAll('details').forEach((it) => (it.open = true))")
        ratio, text = browser.evaluate(_CONTRAST)
        assert ratio >= 4.5, text
        headings = browser.evaluate("[...document.querySelectorAll('h1,h2,h3')].map((it) => +it.tagName[1])")
        assert headings[0] == 1
        assert all(below - above <= 1 for above, below in itertools.pairwise(headings))
        nodes = browser.tab("Accessibility.getFullAXTree")["nodes"]
        said = [(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes if not node["ignored"]]
        roles = {role for role, _ in said}
        assert {"main", "navigation", "banner", "contentinfo"} <= roles
        named = ("image", "img", "radio", "region", "table", "link", "navigation")
        assert [item for item in said if item[0] in named and item[0] != "table" and not item[1]] == []


def test_a_keyboard_reaches_the_switches_and_shows_where_it_is(run, browser):
    record = run()
    page_of(record)
    browser.open(record.folder / "page.html", 1280)
    browser.evaluate("document.querySelector('#head1').focus()")
    for kind in ("rawKeyDown", "keyUp"):
        facts = {"key": "ArrowRight", "code": "ArrowRight", "windowsVirtualKeyCode": 39}
        browser.tab("Input.dispatchKeyEvent", {"type": kind, **facts})
    assert browser.evaluate("document.activeElement.id") == "head2"
    assert browser.evaluate("document.querySelector('#head2').checked")
    outline = "getComputedStyle(document.querySelector('label[for=head{}]')).outlineStyle"
    assert [browser.evaluate(outline.format(head)) for head in (1, 2)] == ["none", "solid"]


def test_the_pointer_is_told_the_values(run, browser):
    record = run()
    page_of(record)
    browser.open(record.folder / "page.html", 1280)
    where = "document.querySelector('.plot svg').getBoundingClientRect()"
    x, y = (browser.evaluate(f"{where}.{side}") for side in ("right", "top"))
    browser.tab("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x - 2, "y": y + 50})
    tip = browser.evaluate("document.querySelector('.tip').innerText")
    assert tip.startswith("step 40\n")
    loss = float(tip.rpartition("validation ")[2])
    assert loss == pytest.approx(validation_record(40)["loss"], abs=0.02)


def test_a_hostile_run_does_nothing_in_a_browser(hostile, browser):
    page_of(hostile)
    browser.open(hostile.folder / "page.html", 1280)
    assert browser.evaluate("document.title") == "evil"
    assert browser.requests == [(hostile.folder / "page.html").as_uri()]
    assert browser.complaints == []
    # even if a tag came through, no script but the page's own would run
    browser.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=data:, onerror=document.title=1>')")
    assert browser.evaluate("new Promise((done) => setTimeout(() => done(document.title), 300))") == "evil"
