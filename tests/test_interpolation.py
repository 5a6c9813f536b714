import pytest
from omegaconf import OmegaConf

from gla_ablate import interpolation
from gla_ablate.config import merge
from gla_ablate.errors import ConfigError
from gla_ablate.interpolation import interpolate, interpolator

VALUES = {
    "model": {"dim": 64, "heads": 2, "gate": {"name": "data_dependent", "rank": 4}},
    "data": {"name": "text", "files": ["a", "b"], "seq_len": 3},
    "optim": {"lr": 1e-3, "warmup_steps": 5},
    "which": "dim",
}


def test_a_reference_takes_the_value_it_names(monkeypatch):
    monkeypatch.setenv("WIDTH", "wide")
    values = {
        "model": {"dim": 64, "heads": 2},
        "optim": {"warmup_steps": "${model.dim}"},
        "data": {"path": "${oc.env:WIDTH}"},
    }
    assert interpolate(values) == {**values, "optim": {"warmup_steps": 64}, "data": {"path": "wide"}}


@pytest.mark.parametrize("text", ["${model.width}", "${", "${oc.env:GLA_ABLATE_NO_SUCH_VARIABLE}", "${optim.lr}"])
def test_a_reference_to_nothing_is_an_error_with_its_key(text):
    with pytest.raises(ConfigError, match=r"^optim\.lr: "):
        interpolate({"model": {"dim": 64}, "optim": {"lr": text}})


@pytest.mark.parametrize(
    "layer",
    [
        {"optim.lr": "${model.dim}"},
        {"optim.lr": "a ${which} of ${model.dim}"},
        {"optim.lr": "${model.${which}}"},
        {"optim.lr": "${${x}.${which}}", "x": "model"},
        {"optim.lr": "${ model.dim }"},
        {"optim.lr": "${model[dim]}"},
        {"optim.lr": "${[model].dim}"},
        {"optim.lr": "${.warmup_steps}"},
        {"optim.lr": "${..model.dim}"},
        {"optim.lr": "${data.files[1]}"},
        {"optim.lr": "${data.files.0}"},
        {"optim.lr": "${model.gate}"},
        {"optim.lr": "${x.dim}", "x": "${model}"},
        {"optim.lr": "${model}", "model.heads": "${model.gate.rank}"},
        {"optim.lr": "${x}", "x": "${y}", "y": "${data.files}"},
        {"optim.lr": "${oc.select:model.dim}"},
        {"optim.lr": "${oc.decode:${which}}", "which": "'${model.dim}'"},
        {"optim.lr": "${oc.dict.keys:model}"},
        {"optim.lr": "${oc.env:GLA_ABLATE_NO_SUCH_VARIABLE,${which}}"},
        {"optim.lr": "\\${model.dim}"},
        {"data.files": ["${model.dim}", "c"]},
        {"data.files": ["${.1}", ["${....which}"], {"a": "${.b}", "b": 2}]},
        {"model.gate": {"name": "x", "rank": "${..dim}"}},
        {"optim.lr": "${a}", "a": "${b}", "b": "${c.d}", "c": "${e}", "e": {"d": "${model.dim}"}},
        {"optim.lr": "${a}", "a": True},
        {"optim.lr": "${a}", "a": None},
        {"optim.lr": "???"},
    ],
    ids=str,
)
def test_what_a_reference_takes_is_what_omegaconf_makes_of_the_whole(layer):
    values = merge(VALUES, layer)
    whole = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    assert interpolate(values) == whole
    assert values == merge(VALUES, layer)  # itself untouched


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"optim.lr": "${optim.x}", "optim.x": "${optim.lr}"}, "optim.lr: Recursive interpolation"),
        ({"optim.lr": "${optim}"}, "optim.lr: Interpolation to parent node"),
        ({"optim.lr": "${model.dim"}, "optim.lr: "),
        ({"optim.lr": "${no.such:3}"}, "optim.lr: Unsupported interpolation type no.such"),
        ({"data.files": ["a", "${no}"]}, r"data.files\[1\]: Interpolation key 'no' not found"),
        ({"optim.lr": "???", "optim.x": "${optim.lr}"}, "optim.x: .*Missing mandatory value"),
    ],
    ids=str,
)
def test_what_names_nothing_is_told_with_its_key(layer, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        interpolate(merge(VALUES, layer))


def test_omegaconf_is_asked_once_for_what_a_grid_has_many_times(monkeypatch):
    asked = []
    resolved = interpolation._resolved
    monkeypatch.setattr(interpolation, "_resolved", lambda *given: asked.append(given) or resolved(*given))
    follow = interpolator()
    values = merge(VALUES, {"optim.warmup_steps": "${model.${which}}", "data.files": ["${oc.env:HOME}"]})
    for lr in (1e-3, 2e-3, 3e-3):  # which nothing refers to
        for dim in (32, 64):
            found = follow(merge(values, {"optim.lr": lr, "model.dim": dim}))
            assert (found["optim"]["warmup_steps"], found["optim"]["lr"]) == (dim, lr)
            found["data"]["files"].append("of one point alone")
            assert len(found["data"]["files"]) == 2
    assert len(asked) == 3  # for the two widths, and for the variable
    assert [set(part) for part, _ in asked] == [{"data"}, {"model", "optim", "which"}, {"model", "optim", "which"}]
    assert set(asked[0][0]["data"]) == {"files"} and set(asked[1][0]["optim"]) == {"warmup_steps"}
