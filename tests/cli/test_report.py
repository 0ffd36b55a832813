import re
from html.parser import HTMLParser

import pytest
import records
from commands import call, figures, write

from mergekit_mediator.cli.report_page import report_page
from mergekit_mediator.store.evaluation import Evaluation, loaded_digest, write_evaluation
from mergekit_mediator.store.manifest import BaseEntry, read_manifest
from mergekit_mediator.store.verification import verify_files

EVALUATION = Evaluation.model_validate(records.evaluation())
# Elements without an end.
_VOID = {"meta", "br", "wbr", "link", "img", "input", "hr", "path", "use", "rect"}


class Page(HTMLParser):
    """The elements of a page, its texts and its identifiers; unbalanced elements are an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_router_s_figures_are_said():
    router = {**records.ROUTER, "ood_auroc": 0.9871, "ood_requests": 40}
    texts = " ".join(Page(page(router=router)).texts)
    assert "with an AUROC of 0.987." in texts
    assert "The router gives 93.8% of the examples to the expert of their task." in texts


def page(evaluation=EVALUATION, router=records.ROUTER, name="merged", **changes):
    manifest = records.manifest(router=router, **changes)
    return report_page(name, manifest, records.inspected(router), evaluation)


def test_the_page_loads_nothing_and_runs_nothing():
    text = page()
    parsed = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in parsed.elements}
    names = {name for _, attributes in parsed.elements for name in attributes}
    assert not {name for name in names if name.startswith("on")} | {"src"} & names
    targets = [v for _, a in parsed.elements for k, v in a.items() if k in ("href", "xlink:href")]
    assert targets
    assert all(target.startswith("#") for target in targets)
    assert not re.findall(r"url\((?!#)|@import", text)
    policy = next(m for m in parsed.all("meta") if "http-equiv" in m)
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_every_identifier_is_there_once_and_every_reference_has_its_target():
    text = page()
    ids = [attributes["id"] for _, attributes in Page(text).elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {*re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", text)}
    for pair in re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", text):
        assert "".join(pair) in ids


def test_all_figures_are_drawn_in_the_colors_of_the_page():
    text = page()
    labels = [svg["aria-label"] for svg in Page(text).all("svg")]
    assert labels == [
        "How much the experts' changes conflict",
        "What each expert stores of each layer",
        "Where prompts were sent",
        "How far confidence can be trusted",
        "Quality against bytes",
        "Where prompts were sent",
        "How far confidence can be trusted",
    ]
    pictures = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--text)" in pictures
    assert "#000000" not in pictures
    assert "prefers-color-scheme: dark" in text


def test_the_page_names_experts_sizes_results_and_limits():
    texts = Page(page()).texts
    for text in ("11.0 MB", "95.0%", "93.8%", "math.jsonl", "setting budget", "1.1x"):
        assert any(text in one for one in texts), text
    assert any("Alone it keeps 40%" in one for one in texts)


def test_what_was_not_done_is_said():
    texts = " ".join(Page(page(evaluation=None, router=None)).texts)
    assert "This artifact was not evaluated yet" in texts
    assert "The router is not calibrated" in texts
    assert "It has not been measured what the dense expert is worth alone" in texts


def test_names_are_text_and_no_markup():
    base = BaseEntry(source="/home/ann/<script>x</script>", files={})
    text = page(name="<b>&", base=base)
    assert "<b>" not in text.split("<ul")[0]
    assert "&lt;b&gt;&amp;" in text
    assert "<script>" not in text
    assert "/home/ann" not in text


@pytest.fixture(scope="module")
def out(family, tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    config = write(family.config(route="all"), root / "config.yml")
    assert call("merge", config, root / "out", "--quiet").exit_code == 0
    return root / "out"


def test_the_command_writes_the_page_into_the_artifact_which_still_verifies(out):
    result = call("report", out)
    assert result.exit_code == 0, result.output
    assert result.output == f"{out}/report.html is written\n"
    assert "<h1>out</h1>" in (out / "report.html").read_text()
    verify_files(out, read_manifest(out))
    card = (out / "README.md").read_text()
    assert "](mediator/layers.png)" in card
    assert (out / "mediator/layers.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_tells_of_results_that_it_leaves_out(out, tmp_path):
    experts = read_manifest(out).expert_names
    chosen = {"chosen": dict.fromkeys(experts, 2), "entropy": 0.1}
    record = records.evaluation(routing={"math": chosen, "code": chosen})
    digest = loaded_digest(read_manifest(out))
    write_evaluation(out, Evaluation.model_validate({**record, "artifact": digest}))
    page = tmp_path / "page.html"
    assert figures("report", out, "--out", page) == {"report": str(page)}
    assert "gym:codes" in page.read_text()
    write_evaluation(out, Evaluation.model_validate(record))
    result = call("report", out, "--out", page)
    assert "the artifact has changed since it was evaluated" in result.stderr
    assert "gym:codes" not in page.read_text()
    assert "This model has not been evaluated." in (out / "README.md").read_text()


def test_a_page_that_cannot_be_written_is_refused(out, tmp_path):
    result = call("report", out, "--out", tmp_path / "nowhere/page.html")
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {tmp_path}/nowhere/page.html: cannot be written: ")


def test_without_matplotlib_the_card_keeps_its_text_and_the_page_says_what_it_needs(
    out, monkeypatch
):
    monkeypatch.setattr("mergekit_mediator.cli.publish.has_matplotlib", lambda: False)
    from mergekit_mediator.cli.publish import refresh

    refresh(out)
    assert "](mediator/layers.png)" not in (out / "README.md").read_text()
    assert not (out / "mediator/layers.png").exists()
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    result = call("report", out)
    assert result.exit_code == 1
    assert "report needs matplotlib: pip install mergekit-mediator[plot]" in result.output
