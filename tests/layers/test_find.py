"""Layers by name, by pattern, and the head that a model has for default."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from inputs import expect
from torch import Tensor, nn

from fam_ext import FAMLoss
from fam_ext.layers.attention import Projection
from fam_ext.layers.find import find_layers, select_layers, select_with_strengths


class Model(nn.Module):
    """Modules by name, in the order of registration."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def default(model: nn.Module) -> tuple[str, str | None]:
    selection = select_layers("test", model, None)
    return next(iter(selection.layers)), selection.guess


def encoder() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()))


def test_the_last_layer_registered() -> None:
    assert default(nn.Sequential(nn.Linear(4, 8), nn.Conv1d(8, 2, 1), nn.ReLU())) == (
        "1",
        "the last layer registered",
    )
    assert default(Model(fc=nn.Linear(4, 4), out=nn.Linear(4, 2)))[0] == "out"
    with pytest.raises(ValueError, match="one with a Linear or Conv layer, got 'Tanh'"):
        default(nn.Tanh())


@pytest.mark.parametrize("wrap", ["", "module.", "_orig_mod."])
def test_a_head_registered_before_its_encoder(wrap: str) -> None:
    for name, head, within in (
        ("classifier", nn.Linear(4, 2), "classifier"),
        ("head", nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Dropout()), "head.1"),
    ):
        model: nn.Module = Model(**{name: head, "encoder": encoder()})
        if wrap == "module.":
            model = nn.DataParallel(model)
        elif wrap:
            model = torch.compile(model)  # type: ignore[assignment]
        assert default(model) == (wrap + within, f"the last layer of the model's {name!r}")


def test_the_models_own_accessors_come_first() -> None:
    model: Any = Model(out=nn.Linear(4, 9), encoder=encoder(), head=nn.Linear(4, 4))
    model.get_output_embeddings = lambda: model.out
    assert default(model) == ("out", "the model's get_output_embeddings()")
    model.get_output_embeddings = lambda: None
    model.get_classifier = lambda: nn.Sequential(
        nn.Dropout(), model.out
    )  # as timm's models with several parts
    assert default(model) == ("out", "the model's get_classifier()")

    def refuses() -> None:
        raise NotImplementedError

    model.get_classifier = refuses
    assert default(model) == ("head", "the last layer registered")
    model.get_classifier = nn.Identity  # timm without classes
    assert default(model)[0] == "head"


def test_outside_of_the_base_model() -> None:
    model: Any = Model(dense=nn.Linear(4, 4), proj=nn.Linear(4, 2), roberta=encoder())
    model.base_model_prefix = "roberta"
    assert default(model) == ("proj", "the last layer outside of the base model 'roberta'")
    del model.dense, model.proj
    assert default(model)[0] == "roberta.1.0"


def test_names_and_patterns() -> None:
    model = nn.DataParallel(Model(fc=nn.Linear(4, 4), blocks=nn.ModuleList([encoder(), encoder()])))
    layers = dict(model.module.named_modules())
    assert find_layers("test", model, "fc") == [layers["fc"]]
    assert find_layers("test", model, ["blocks.*.0", "fc"]) == [
        layers[n] for n in ("blocks.0.0", "blocks.0.1.0", "blocks.1.0", "blocks.1.1.0", "fc")
    ]
    assert find_layers("test", model, [layers["fc"], "fc", "*fc"]) == [layers["fc"]]  # once
    with pytest.raises(ValueError, match=r"test: layer must be the name .*near: .*fc.*got 'fx'"):
        find_layers("test", model, "fx")
    with pytest.raises(ValueError, match="a module of the model"):
        find_layers("test", model, nn.Linear(1, 1))
    for wrong in (3, [3]):
        with pytest.raises(TypeError, match="a name, a glob pattern, a module"):
            find_layers("test", model, wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be a module"):
        find_layers("test", "fc", None)  # type: ignore[arg-type]


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(4))
        self.conv1d = nn.Conv1d(4, 4, 3, groups=4)
        self.out_proj = nn.Linear(4, 4)


def test_layers_that_are_never_called() -> None:
    model = Model(
        attention=nn.MultiheadAttention(4, 2), mixer=Mixer(), conv1d=nn.Conv1d(4, 4, 1), fc=nn.Linear(4, 2)
    )
    selection = select_layers("test", model, "*")
    assert list(selection.layers) == ["mixer.out_proj", "conv1d", "fc"]
    bypassed = "nn.MultiheadAttention multiplies with its weight without calling it; method='noise' has it"
    assert selection.left_out == {
        "attention.in_proj": bypassed,
        "attention.out_proj": bypassed,
        "mixer.conv1d": "a Mamba-like mixer convolves with its weight without calling it",
    }
    expect(
        "'attention.out_proj' cannot be regularized: nn.MultiheadAttention",
        lambda: find_layers("test", model, "attention.out_proj"),
    )
    expect("without calling it", lambda: find_layers("test", model, model.attention.out_proj))
    expect("'attention.in_proj' cannot be", lambda: find_layers("test", model, "attention"))
    expect("Mamba-like", lambda: find_layers("test", model, ["fc", "mixer.conv1d"]))
    with pytest.raises(
        ValueError, match=r"a pattern of layers that can be regularized \(attention.in_proj: nn.Multi"
    ):
        find_layers("test", model, "attention.*")
    assert default(nn.TransformerEncoderLayer(4, 2))[0] == "linear2"


def test_projections_of_an_attention_for_noise() -> None:
    """By name, by pattern, as the attention itself; a pattern has them in the model's order."""

    class Own(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = Model(
        first=nn.Linear(4, 4), attention=nn.MultiheadAttention(4, 2), own=Own(4, 2), fc=nn.Linear(4, 2)
    )
    both = ["attention.in_proj", "attention.out_proj"]

    def names(layer: Any, of: nn.Module = model) -> list[str]:
        return list(select_layers("test", of, layer, noise=True).layers)

    assert names("*") == ["first", *both, "fc"] and names("attention") == names(model.attention) == both
    assert names(["fc", "*.in_proj"]) == ["fc", both[0]]
    assert names(model.attention.out_proj) == names("attention.out_proj") == both[1:]
    assert names("*", model.attention) == ["in_proj", "out_proj"]
    assert names("attention.*", Model(_orig_mod=model)) == ["_orig_mod." + name for name in both]
    assert names(None) == ["fc"]
    selection = select_layers("test", model, "*", noise=True)
    assert {id(p.attention) for p in selection.layers.values() if isinstance(p, Projection)} == {
        id(model.attention)
    }
    why = "Own is an nn.MultiheadAttention with a forward of its own"
    assert list(selection.left_out) == ["own.in_proj", "own.out_proj"]
    assert all(reason.startswith(why) for reason in selection.left_out.values())
    expect(
        f"'own.in_proj' cannot be regularized: {why}", lambda: select_layers("test", model, "own", noise=True)
    )
    chosen, numbers = select_with_strengths(
        "test",
        model,
        None,
        {"attention.out_proj": 1.0, "fc": 2.0, "attention.*": 3.0, "first": 4.0},
        noise=True,
    )
    assert list(zip(chosen.layers, numbers, strict=True)) == [
        ("first", 4.0),
        (both[0], 3.0),
        (both[1], 1.0),
        ("fc", 2.0),
    ]


def test_an_adapter_around_an_attention_is_left_out() -> None:
    adapter = Model(base_layer=nn.MultiheadAttention(4, 2), lora_A=nn.ModuleDict(), lora_B=nn.ModuleDict())
    model = Model(attention=adapter, fc=nn.Linear(4, 2))
    for noise in (False, True):
        selection = select_layers("test", model, "*", noise=noise)
        assert list(selection.layers) == ["fc"] and list(selection.left_out) == ["attention"]
        assert "merge it first" in selection.left_out["attention"]


def test_tied_weights_are_left_out_of_patterns() -> None:
    model = Model(embedding=nn.Embedding(9, 4), fc=nn.Linear(4, 4), lm_head=nn.Linear(4, 9, bias=False))
    assert list(select_layers("test", model, "*").layers) == ["fc", "lm_head"]
    model.lm_head.weight = model.embedding.weight
    selection = select_layers("test", model, "*")
    assert list(selection.layers) == ["fc"]
    assert selection.left_out == {
        "lm_head": "its weight is tied to the embedding embedding; name it exactly to have it"
    }
    assert list(select_layers("test", model, ["lm_head", "*"]).layers) == ["lm_head", "fc"]
    assert default(model)[0] == "lm_head"


def test_modules_that_peft_has_copied() -> None:
    """Its wrapper keeps the original beside a copy for each adapter."""
    wrapper: Any = Model(
        original_module=nn.Linear(4, 2),
        modules_to_save=nn.ModuleDict({"default": nn.Linear(4, 2), "other": nn.Linear(4, 2)}),
    )
    wrapper.active_adapters, wrapper.disable_adapters = ["default"], False
    model = Model(encoder=encoder(), classifier=wrapper)
    selection = select_layers("test", model, "*classifier*")
    assert list(selection.layers) == ["classifier.modules_to_save.default"]
    assert selection.left_out == {
        "classifier.original_module": "PEFT uses a copy in its place (modules_to_save)",
        "classifier.modules_to_save.other": "it belongs to an adapter of PEFT that is not active",
    }
    assert default(model)[0] == "classifier.modules_to_save.default"
    wrapper.disable_adapters = True
    assert "classifier.original_module" in select_layers("test", model, "*").layers


def test_a_peft_model_is_looked_into() -> None:
    base: Any = Model(classifier=nn.Linear(4, 2), encoder=encoder())
    model: Any = Model(base_model=Model(model=base))
    model.peft_config, model.get_base_model = SimpleNamespace(), lambda: base
    assert default(model)[0] == "base_model.model.classifier"


def test_a_globbed_mixer_trains() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.fc(self.attention(x, x, x)[0].mean(1))
            return result

    model = Block()
    fam = FAMLoss.for_model(nn.CrossEntropyLoss(), model, "*", strength=0.1)
    loss = fam(model(torch.randn(5, 2, 4)), torch.randint(0, 3, (5,)))
    assert float(fam.last.flatness) > 0 and loss.isfinite()


# heads of transformers that no layer of theirs is, or of other sizes
OTHER_HEADS = {
    "LxmertForQuestionAnswering": "answer_head.logit_fc.3",  # one output for each known answer
    "SplinterForQuestionAnswering": None,  # products of tokens with each other
    "TapasForQuestionAnswering": None,  # plain parameters
    "PerceiverForMaskedLM": None,  # products with the embedding
    "Inkling2LoopForCausalLM": "lm_head",  # a vocabulary without its padding
    "Inkling2ForCausalLM": "lm_head",
}
LABELS = 7  # a size that no other layer has


def _classes() -> Iterator[tuple[str, str]]:
    from transformers.models.auto import modeling_auto

    for kind in (
        "SEQUENCE_CLASSIFICATION",
        "TOKEN_CLASSIFICATION",
        "QUESTION_ANSWERING",
        "CAUSAL_LM",
        "MASKED_LM",
    ):
        for names in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").values():
            yield from ((kind, name) for name in ([names] if isinstance(names, str) else names))


def _shrunk(config: Any) -> Any:
    """The configuration with two blocks."""
    from transformers import PretrainedConfig

    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _shrunk(value)
        elif (
            isinstance(value, int)
            and value > 2
            and ("layer" in name or "blocks" in name)
            and "norm" not in name
        ):
            try:
                setattr(config, name, 2)
            except Exception:  # a configuration that checks itself
                continue
    return config


def _tiny(name: str) -> tuple[nn.Module, Any] | None:
    """A model of this class on the meta device; None where its default configuration makes none."""
    import transformers

    kind = getattr(transformers, name)
    for shrink in (True, False):
        try:
            config = kind.config_class()
            config.num_labels = LABELS
            config = _shrunk(config) if shrink else config
            with torch.device("meta"):
                return kind._from_config(config), config
        except Exception:
            continue
    return None


@pytest.mark.slow
def test_the_head_of_every_class_of_transformers() -> None:
    """Where the loss takes a layer's output it is the default layer: told by its size alone."""
    transformers = pytest.importorskip("transformers", reason="a survey of transformers' classes")
    transformers.logging.set_verbosity_error()
    wrong, seen = [], set()
    for kind, name in sorted(set(_classes())):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = _tiny(name)
        if built is None:
            continue
        seen.add(name)
        model, config = built
        ((own, layer),) = select_layers("test", model, None).layers.items()
        vocabulary = getattr(config.get_text_config(), "vocab_size", None)
        expected = {vocabulary} if "LM" in kind else {LABELS, 2} if kind.startswith("QUESTION") else {LABELS}
        if name in OTHER_HEADS:
            assert OTHER_HEADS[name] in (None, own), (name, own)
        elif getattr(layer, "out_features", None) not in expected:
            wrong.append((name, own, layer))
    assert not wrong
    assert {"XLMRobertaForSequenceClassification", "CamembertForMaskedLM", "GPT2LMHeadModel"} <= seen
    assert len(seen) > 400
