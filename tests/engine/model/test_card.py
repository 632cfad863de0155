"""The model card: what the Hub reads from it, and sizes that are those of the files."""

import re

import pytest
from engine.model.conversions import run
from huggingface_hub import ModelCard

import tq
from tq.engine.model.card import model_card
from tq.engine.model.plan import make_plan
from tq.engine.model.recipe import Recipe
from tq.engine.model.sources import FolderSource

BASE = "someone/Tiny-Llama"


def card_of(folder, *, base_model=BASE, format="tq", **options):
    source = FolderSource(folder, name=base_model or str(folder), base_model=base_model)
    plan = make_plan(source, Recipe.from_options(**options), format=format)
    return plan, model_card(plan)


def rows(card):
    """The cells of every table row."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line.startswith("|")]


def test_the_front_matter_names_the_base_model(source):
    data = ModelCard(card_of(source, bits=3)[1]).data
    assert data.base_model == BASE
    assert data.base_model_relation == "quantized"
    assert data.library_name == "mlx"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["mlx", "tq", "quantized"]


def test_a_local_model_has_no_base_on_the_hub_and_tells_no_paths(source):
    card = card_of(source, base_model=None)[1]
    data = ModelCard(card).data
    assert data.base_model is None and data.get("base_model_relation") is None
    assert str(source.parent) not in card
    assert f"# {source.name}, " in card


def test_sizes_bits_and_the_recipe(source, tmp_path):
    (tmp_path / "mine.toml").write_text("[weights]\nbits = 3")
    plan, card = card_of(source, recipe=tmp_path / "mine.toml", head_bits=8)
    facts = {row[0]: row[1] for row in rows(card) if len(row) == 2}
    assert facts["size"] == f"{plan.size_bytes / 1e9:.3f} GB (source: {plan.source_bytes / 1e9:.3f} GB)"
    assert facts["bits per weight"] == f"{plan.bits_per_weight:.3f} (whole model)"
    assert facts["format"] == "tq, version 1"
    assert facts["activations"] == "bfloat16"
    assert facts["recipe"] == "mine.toml"
    assert f"[{BASE}](https://huggingface.co/{BASE}) quantized with" in card
    assert tq.__version__ in card


def test_the_table_of_roles_is_that_of_the_plan(source):
    plan, card = card_of(source, bits=3, mlp_bits="ternary")
    table = [row for row in rows(card) if len(row) == 6 and row[0] != "role" and not row[0].startswith("-")]
    assert [row[:2] for row in table] == [[r["role"], r["codes"]] for r in plan.by_role()]
    assert sum(int(row[4].replace(",", "")) for row in table) == sum(t.size_bytes for t in plan.tensors)
    attention = next(row for row in table if row[0] == "attention")
    assert attention == ["attention", "lloyd-max 3-bit g64", "6", "81,920", "33,280", "3.250"]


def test_it_says_how_to_run(source):
    assert re.search(r'```sh\ntq run -m \S+ ".+"\n```', card_of(source)[1])


def test_the_other_format_is_named(source):
    assert ["format", "turboquant"] in rows(card_of(source, format="turboquant", bits=3)[1])


def test_what_is_not_quantized_does_not_say_so(source):
    card = card_of(source, bits="none")[1]
    data = ModelCard(card).data
    assert data.tags == ["mlx", "tq"]
    assert data.base_model == BASE and data.get("base_model_relation") is None
    assert ["format", "not quantized"] in rows(card)
    assert f"[{BASE}](https://huggingface.co/{BASE}) converted with" in card


@pytest.mark.parametrize("bits", [2, 4])
def test_it_is_the_readme_of_the_result(source, tmp_path, bits):
    run(source, tmp_path / "out", bits=bits)
    assert f"lloyd-max {bits}-bit g64" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
