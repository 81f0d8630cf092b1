"""The report: a model card, a page and a file of numbers, drawn from results alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

import report_example
from octavo.errors import OctavoError
from octavo.reporting import (
    BaseCard,
    Estimate,
    Evaluation,
    Histogram,
    Record,
    Results,
    check_report_target,
    read_base_card,
    read_record,
    write_report,
)
from octavo.reporting import view as view_module
from octavo.reporting.card import model_card
from octavo.reporting.commands import make_again, serve
from octavo.reporting.html import html_report
from octavo.reporting.layers import arrange, merge_equal
from octavo.reporting.numbers import number, percent_change, plus_minus
from octavo.reporting.record import WeightError
from octavo.scheme import Scheme

HOSTILE = '<script>alert("x")</script> | ``` `--- $(id)'


@pytest.fixture(scope="module")
def results() -> Results:
    return report_example.results()


@pytest.fixture(scope="module")
def small() -> Results:
    """Two layers only: quick to draw."""
    return report_example.results(layers=2)


@pytest.fixture(scope="module")
def card(results: Results) -> str:
    return model_card(results)


@pytest.fixture(scope="module")
def page(results: Results) -> str:
    return html_report(results)


def front_matter(card: str) -> Any:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def edit(results: Results, **changes: Any) -> Results:
    """``results`` with other fields, checked."""
    return Results.model_validate(results.model_dump() | changes)


def changed(results: Results, **changes: Any) -> Results:
    """``results`` with another record."""
    assert results.record
    return edit(results, record=results.record.model_dump() | changes)


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


class TestNumbers:
    @pytest.mark.parametrize(
        ("value", "text"), [(1234.5, "1,234"), (0.0123456, "0.0123"), (-2.5, "−2.50"), (0, "0")]
    )
    def test_significant_digits(self, value: float, text: str) -> None:
        assert number(value) == text

    def test_standard_error_sets_the_decimals(self) -> None:
        assert plus_minus(Estimate(value=0.0073218, standard_error=0.00011)) == "0.00732 ± 0.00011"
        assert plus_minus(Estimate(value=0.25, standard_error=0.004), scale=100, unit="%") == (
            "25.00 ± 0.40 %"
        )

    def test_signs(self) -> None:
        assert plus_minus(Estimate(value=2.0, standard_error=0.5), signed=True) == "+2.00 ± 0.50"
        assert plus_minus(Estimate(value=-2.0, standard_error=0.5)) == "−2.00 ± 0.50"
        assert percent_change(200, 121) == "−39.5 %"

    def test_of_an_unknown_error_nothing_is_said(self) -> None:
        assert plus_minus(Estimate(value=1.0, standard_error=None), decimals=3) == "1.000"

    def test_no_error_no_more_decimals_than_asked(self) -> None:
        assert plus_minus(Estimate(value=1.0, standard_error=0), decimals=1) == "1.0 ± 0.0"


class TestLayers:
    def test_arranged_by_layer_and_projection_in_the_order_they_run(self) -> None:
        names = ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj", "lm_head")
        table = arrange(dict.fromkeys(names, 1.0), worst=max)
        assert table is not None
        assert (table.layers, table.kinds) == (2, ("q", "down"))
        assert set(table.values) == {(1, "down"), (0, "q")}

    def test_the_worst_of_several_experts(self) -> None:
        names = [f"model.layers.0.mlp.experts.{index}.up_proj" for index in range(3)]
        table = arrange(dict(zip(names, (30.0, 25.0, 31.0), strict=True)), worst=min)
        assert table is not None
        assert table.values == {(0, "up"): 25.0}

    def test_projections_of_one_input_are_one_line(self, results: Results) -> None:
        assert results.record
        amax = results.record.amax
        table = arrange({n: v for n, v in amax.items() if n.endswith("_proj")}, worst=max)
        assert table is not None
        assert merge_equal(table).kinds == ("q/k/v", "o", "gate/up", "down")


class TestCard:
    def test_front_matter(self, card: str) -> None:
        assert front_matter(card) == {
            "license": "apache-2.0",
            "language": ["en"],
            "base_model": "smollm2-bf16",
            "base_model_relation": "quantized",
            "pipeline_tag": "text-generation",
            "library_name": "transformers",
            "tags": ["fp8", "e4m3", "octavo", "modelopt", "vllm"],
        }

    def test_the_table_gives_standard_errors(self, card: str) -> None:
        for cells in (
            "269.1 MB | 162.9 MB | −39.5 %",
            "19.283 ± 0.310 | 19.344 ± 0.310 | +0.318 ± 0.064 %",
            "0.00732 ± 0.00011",
            "28.46 ± 0.38 % | 28.25 ± 0.38 % | −0.21 ± 0.18 points",
        ):
            assert cells in card

    def test_how_to_make_it_again(self, card: str) -> None:
        command = re.search(r"octavo quantize(?:.*\\\n)*.*", card)
        assert command is not None
        assert command[0].replace("\\\n ", "").split() == [
            *("octavo", "quantize", "smollm2-bf16", "-o", "smollm2-fp8", "--format", "modelopt"),
            *("--scheme", "fp8", "--kv-cache", "fp8"),
            *("--calib", "notes.jsonl", "--text-field", "body"),
            *("--samples", "128", "--seq-len", "512", "--seed", "7"),
            *("--exclude", "'*.layers.0.mlp.*'"),
        ]

    def test_calibration_and_versions(self, card: str) -> None:
        assert "128 sequences of 512 tokens (65,536 in all) from `notes.jsonl`" in card
        assert "Octavo 0.1.0, PyTorch 2.13.0+cpu, transformers 5.19.0" in card

    def test_deployment(self, card: str) -> None:
        assert "vllm serve smollm2-fp8 --kv-cache-dtype fp8" in card
        assert "trtllm-serve smollm2-fp8" in card

    def test_what_a_budget_kept_and_moved(self, results: Results) -> None:
        moved = [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]
        kept = ["model.layers.9.self_attn.o_proj"]
        scheme = Scheme(exclude=tuple(kept), dynamic=("*.asked", *moved))
        budget = {
            **{"max_kl": 0.02, "max_perplexity_increase": None, "data": "wiki.txt", "windows": 16},
            **{"seq_len": 2048, "kl": 0.019, "kl_standard_error": 0.001, "perplexity_ratio": 1.01},
            **{"kept": kept, "bytes": 331_776, "dynamic": moved, "tries": 3},
        }
        edition = results.edition.model_copy(update={"scheme": scheme}).model_dump()
        record = results.record
        assert record is not None
        found = edit(results, edition=edition, record=record.model_dump() | {"budget": budget})
        for text in (model_card(found), html_report(found)):
            for told in (
                "1 linear layers, 331.8 KB",
                "Dynamic inputs for it",
                "3 linear layers",
                "asked, 3 linear layers, for the budget: FP8",
                "norms, 1 linear layers, for the budget",
            ):
                assert told in text

    def test_without_a_licence_it_says_so(self, results: Results) -> None:
        card = model_card(edit(results, base_card=BaseCard()))
        assert "license" not in front_matter(card)
        assert "names none" in card

    def test_names_cannot_break_out(self) -> None:
        card = model_card(report_example.results(layers=2, name=HOSTILE, base_model=HOSTILE))
        assert front_matter(card)["base_model"] == HOSTILE
        body = re.sub(r"^(`{3,})\w+\n.*?^\1$", "", card.split("---\n", 2)[2], flags=re.M | re.S)
        assert "\\<script\\>" in body
        assert "<script" not in body.replace("\\<script", "")

    def test_every_row_of_a_table_has_its_columns(self) -> None:
        rows = model_card(report_example.results(layers=2, name=HOSTILE)).split("## Evaluation")[1]
        table = [line for line in rows.split("##")[0].splitlines() if line.startswith("|")]
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {5}


class TestCommands:
    def test_without_calibration(self, results: Results) -> None:
        scheme = Scheme(weights="channel", inputs="dynamic", kv_cache="none")
        record = changed(results, scheme=scheme, calibration=None).record
        assert record
        code = make_again(record, "out").code
        assert "--scheme fp8-dynamic" in code
        assert code.splitlines()[-1].strip() == "--kv-cache none"

    def test_dynamic_inputs_beside_static_ones(self, results: Results) -> None:
        scheme = Scheme(dynamic=("*.down_proj", "*.1.self_attn.[qkv]_proj"))
        record = changed(results, scheme=scheme, format="quark").record
        assert record
        code = make_again(record, "out").code
        assert "--dynamic-inputs '*.down_proj'" in code
        assert "--dynamic-inputs '*.1.self_attn.[qkv]_proj'" in code

    def test_without_cache_scales_no_option(self, results: Results) -> None:
        edition = results.edition.model_copy(
            update={"scheme": Scheme(kv_cache="none"), "format": "quark"}
        )
        assert [snippet.code for snippet in serve(edition)] == ["vllm serve smollm2-fp8"]

    def test_only_engines_that_read_the_dialect_are_named(self, results: Results) -> None:
        edition = results.edition.model_copy(update={"format": "tensorrt-llm"})
        (snippet,) = serve(edition)
        assert snippet.title == "TensorRT-LLM"
        assert snippet.code.splitlines() == [
            "trtllm-build --checkpoint_dir smollm2-fp8 --output_dir smollm2-fp8-engine",
            "trtllm-serve smollm2-fp8-engine --backend tensorrt --tokenizer smollm2-fp8",
        ]


class TestPage:
    def test_self_contained(self, page: str) -> None:
        tags = Page(page).tags
        assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object", "base"}
        links = [
            value or ""
            for _, attributes in tags
            for name, value in attributes.items()
            if name in {"src", "href", "xlink:href", "srcset", "data", "action"}
        ]
        assert links
        assert all(link.startswith(("#", "data:")) for link in links)
        assert not re.search(r"url\((?!#)|@import|\bon\w+=", page)
        assert "default-src 'none'" in page

    def test_accessible(self, page: str) -> None:
        tags = Page(page).tags
        pictures = [attributes for tag, attributes in tags if tag == "svg"]
        assert len(pictures) == 10
        assert all(picture["role"] == "img" and picture["aria-label"] for picture in pictures)
        assert all("scope" in attributes for tag, attributes in tags if tag == "th")
        assert ("html", {"lang": "en"}) in tags
        assert sum(tag == "figcaption" for tag, _ in tags) == 5

    def test_ids_are_unique_and_references_meet_them(self, page: str) -> None:
        attributes = [attributes for _, attributes in Page(page).tags]
        ids = [found["id"] for found in attributes if "id" in found]
        assert len(ids) == len(set(ids))
        referred = set(re.findall(r'(?:url\(|href=")#([^)"]+)', page))
        assert referred <= set(ids)

    def test_pictures_take_the_colours_of_the_page(self, page: str) -> None:
        assert "currentColor" in page
        assert "var(--series-1)" in page
        assert "#0101" not in page

    def test_findings_are_told(self, page: str) -> None:
        text = " ".join(Page(page).text)
        assert "Largest: layer 11 down, 3,584." in text
        assert "Lowest: layer 4 o, 29." in text
        assert "Empty places kept their exact values." in text

    def test_cells_have_tooltips(self, page: str) -> None:
        assert len(re.findall(r"<title>layer \d+ \w+: [\d.]+ dB</title>", page)) == 2 * (210 - 3)

    def test_names_are_escaped(self) -> None:
        page = html_report(report_example.results(layers=2, name=HOSTILE, base_model=HOSTILE))
        assert "<script" not in page
        assert HOSTILE in " ".join(Page(page).text)

    def test_without_a_record(self, small: Results) -> None:
        bare = edit(small, record=None)
        assert "carries no <code>octavo.json</code>" in html_report(bare)
        assert html_report(bare).count("<svg") == 2
        assert "carries no `octavo.json`" in model_card(bare)

    def test_without_weight_errors(self, small: Results) -> None:
        assert html_report(changed(small, weights={})).count("<svg") == 6

    def test_without_evaluation(self, small: Results) -> None:
        assert "was not measured" in model_card(edit(small, evaluation=Evaluation()))

    @pytest.mark.parametrize(
        ("amax", "weights"),
        [
            ({}, {}),
            ({"layers.0.k_proj": 0.0, "layers.0.k_proj.weight": 0.0}, {}),
            ({"layers.0.k": 1e-45, "layers.9.k": 3e38}, {}),
            ({"layers.9999.k": 1.0}, {"layers.9999.q_proj": (31.5, 0.0)}),
            ({}, {"layers.0.q_proj": (-300.0, 1.0), "layers.0.<b>_proj": (None, 0.0)}),
            (
                {f"layers.0.a{index}" + end: 1.0 for index in range(9) for end in ("", ".weight")},
                {},
            ),
        ],
        ids=["nothing", "zeros", "extremes", "deep", "far", "many kinds"],
    )
    def test_unusual_records_are_drawn(
        self,
        small: Results,
        amax: dict[str, float],
        weights: dict[str, tuple[float | None, float]],
    ) -> None:
        errors = {
            name: WeightError(sqnr_db=sqnr, underflow=share)
            for name, (sqnr, share) in weights.items()
        }
        page = html_report(changed(small, amax=amax, weights=errors))
        assert "nan" not in re.sub(r"[a-z]+nan|nan[a-z]+", "", page.lower())
        assert "<b>" not in page

    def test_a_histogram_from_zero(self, small: Results) -> None:
        divergence = small.evaluation.divergence
        assert divergence
        histogram = Histogram(edges=(0.0, 1e-6, 1e-4), counts=(7, 0))
        divergence = divergence.model_copy(update={"histogram": histogram})
        assert "<svg" in html_report(edit(small, evaluation=Evaluation(divergence=divergence)))


class TestWriting:
    def test_equal_results_give_equal_bytes(self, small: Results, tmp_path: Path) -> None:
        first = write_report(small, tmp_path / "new" / "first")
        # In another process, which hashes strings differently.
        numbers = tmp_path / "new" / "first" / "results.json"
        code = (
            "import sys, pathlib; from octavo.reporting import Results, write_report;"
            "text = pathlib.Path(sys.argv[1]).read_text();"
            "write_report(Results.model_validate_json(text), pathlib.Path(sys.argv[2]))"
        )
        second = tmp_path / "second"
        subprocess.run([sys.executable, "-c", code, numbers, second], check=True)
        assert [path.name for path in first] == ["README.md", "report.html", "results.json"]
        for path in first:
            assert path.read_bytes() == (second / path.name).read_bytes()
        assert len(list(second.iterdir())) == 3

    def test_results_json_holds_everything(self, small: Results, tmp_path: Path) -> None:
        *_, path = write_report(small, tmp_path)
        assert Results.model_validate_json(path.read_text(encoding="utf-8")) == small

    def test_does_not_replace_unasked(self, small: Results, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text("mine")
        with pytest.raises(OctavoError, match=r"holds README.md already.*--overwrite"):
            write_report(small, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
        write_report(small, tmp_path, overwrite=True)
        assert "mine" not in (tmp_path / "README.md").read_text(encoding="utf-8")

    def test_the_output_is_a_directory(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OctavoError, match="is a file"):
            check_report_target(tmp_path / "file", overwrite=True)

    def test_without_matplotlib(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("octavo.reporting.writing.find_spec", lambda _: None)
        with pytest.raises(OctavoError, match=r"pip install 'octavo\[report\]'"):
            check_report_target(tmp_path, overwrite=False)

    def test_knows_nothing_of_torch(self) -> None:
        code = (
            "import sys, octavo.reporting, octavo.reporting.html; sys.exit('torch' in sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestRecord:
    def written(self, results: Results, directory: Path, **changes: Any) -> Path:
        assert results.record
        content = results.record.model_dump(mode="json") | changes
        (directory / "octavo.json").write_text(json.dumps(content))
        return directory

    def test_round_trip(self, results: Results, tmp_path: Path) -> None:
        assert read_record(self.written(results, tmp_path)) == results.record

    def test_another_tools_edition_has_none(self, tmp_path: Path) -> None:
        assert read_record(tmp_path) is None

    def test_of_an_older_and_of_a_later_octavo(self, results: Results, tmp_path: Path) -> None:
        record = read_record(self.written(results, tmp_path, later="more"))
        assert record is not None
        older = record.model_dump(mode="json", exclude={"weights"})
        assert Record.model_validate(older).weights == {}

    @pytest.mark.parametrize(
        ("changes", "fault"),
        [
            ({"amax": None}, "amax: Input should be"),
            ({"amax": {"layer": -1.0}}, "amax.layer: Input should be greater"),
            ({"amax": {"layer": float("nan")}}, "amax.layer: Input should be"),
            ({"amax": {"layer": 1e39}}, "amax.layer: Input should be less"),
            ({"scheme": {"inputs": "none"}}, "scheme.inputs: Input should be 'static'"),
            ({"calibration": {}}, "calibration.source: Field required"),
            ({"weights": {"layer": {"sqnr_db": 1.0, "underflow": 2}}}, "underflow"),
        ],
    )
    def test_a_bad_record(
        self, results: Results, tmp_path: Path, changes: dict[str, Any], fault: str
    ) -> None:
        with pytest.raises(OctavoError, match=r"octavo\.json is not a record of Octavo") as caught:
            read_record(self.written(results, tmp_path, **changes))
        assert fault in str(caught.value)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
    def test_not_a_json_object(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "octavo.json").write_bytes(content)
        with pytest.raises(OctavoError, match="is not a record of Octavo"):
            read_record(tmp_path)

    def test_far_too_large(self, tmp_path: Path) -> None:
        with (tmp_path / "octavo.json").open("wb") as file:
            file.truncate(1 << 32)
        with pytest.raises(OctavoError, match="is larger than"):
            read_record(tmp_path)

    def test_not_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "octavo.json").mkdir()
        with pytest.raises(OctavoError, match="cannot be read"):
            read_record(tmp_path)


class TestBaseCard:
    def read(self, directory: Path, text: str) -> BaseCard:
        (directory / "README.md").write_text(text, encoding="utf-8")
        return read_base_card(directory)

    def test_licence_and_languages(self, tmp_path: Path) -> None:
        card = self.read(
            tmp_path,
            "---\nlicense: other\nlicense_name: llama3.1\nlicense_link: LICENSE\n"
            "language: [en, 'no']\ntags: [a]\ndate: 2024-99-99\n---\n# Card\n",
        )
        assert card == BaseCard(
            license="other",
            license_name="llama3.1",
            license_link="LICENSE",
            language=("en", "no"),
        )

    def test_tags_make_no_objects(self, tmp_path: Path) -> None:
        text = "---\nlicense: !!python/object/apply:os.system [id]\n---\n"
        assert self.read(tmp_path, text) == BaseCard(license=("id",))

    @pytest.mark.parametrize("text", ["", "# A card\n", "---\n---\n# Card\n", "---\n"])
    def test_nothing_to_carry_over(self, tmp_path: Path, text: str) -> None:
        assert self.read(tmp_path, text) == BaseCard()

    def test_no_card(self, tmp_path: Path) -> None:
        assert read_base_card(tmp_path) == BaseCard()

    @pytest.mark.parametrize(
        "yaml_text",
        [
            "license: [",
            "- license",
            "license: {a: b}",
            "a: &a [x, x]\nb: &b [*a, *a]\nlicense: [*b, *b]",
            "license: " + "[" * 5000,
        ],
    )
    def test_front_matter_that_is_none(self, tmp_path: Path, yaml_text: str) -> None:
        with pytest.raises(OctavoError, match="front matter of"):
            self.read(tmp_path, f"---\n{yaml_text}\n---\n")


@pytest.mark.parametrize(
    ("edges", "counts"),
    [
        ((0.0, 1.0), (1,)),
        ((0.0, 1.0, 1.0), (1, 1)),
        ((0.0, 1.0, 2.0), (0, 0)),
        ((0.0, 1.0), (1, 2)),
    ],
)
def test_histograms_that_are_none(edges: tuple[float, ...], counts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="histogram"):
        Histogram(edges=edges, counts=counts)


def test_every_choice_of_a_scheme_has_words() -> None:
    words = {
        "rounding": view_module._ROUNDING,
        "scales": view_module._RANGES,
        "weights": view_module._WEIGHTS,
        "inputs": view_module._INPUTS,
        "kv_cache": view_module._KV_CACHE,
    }
    for name, known in words.items():
        assert set(known) == set(get_args(Scheme.model_fields[name].annotation)), name
