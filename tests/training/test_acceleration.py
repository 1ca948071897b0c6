"""Autocast and compilation: what is chosen for what was measured, and what is said when nothing can be compiled."""

import pytest
import torch
from small_run import small_model

from looplm.training import acceleration
from looplm.training.acceleration import choose_autocast, compile_layers, compiler_fault

CPU = torch.device("cpu")


def timings(monkeypatch, fp32: float, bf16: float) -> list:
    asked = []

    def seconds(device, width, dtype):
        asked.append((device, width, dtype))
        return {torch.float32: fp32, torch.bfloat16: bf16}[dtype]

    monkeypatch.setattr(acceleration, "_seconds_a_product", seconds)
    return asked


@pytest.mark.parametrize(
    ("fp32", "bf16", "pays"), [(2.0, 1.0, True), (1.5, 1.0, True), (1.4, 1.0, False), (1.0, 30.0, False)]
)
def test_auto_takes_bf16_only_where_it_wins(monkeypatch, fp32, bf16, pays):
    asked = timings(monkeypatch, fp32, bf16)
    assert choose_autocast("auto", CPU, 96) is pays
    assert asked == [(CPU, 96, torch.float32), (CPU, 96, torch.bfloat16)]


def test_a_set_dtype_is_not_measured(monkeypatch):
    asked = timings(monkeypatch, 1.0, 1.0)
    assert choose_autocast("bfloat16", CPU, 96) is True
    assert choose_autocast("none", CPU, 96) is False
    assert asked == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_really_timed(dtype):
    small, large = (acceleration._seconds_a_product(CPU, width, dtype) for width in (8, 128))
    assert 0 < small < large < 5  # 256 times the work


@pytest.fixture
def toolchain(monkeypatch):
    """Makes torch.compile raise what it is given; the remembered verdict is forgotten before and after."""

    def broken(error):
        def compile(*_, **__):
            raise error

        monkeypatch.setattr(torch, "compile", compile)
        compiler_fault.cache_clear()

    yield broken
    compiler_fault.cache_clear()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("\n  no g++ here\nlong trace"), "no g++ here"),
        (RuntimeError(""), "RuntimeError"),
        (ImportError("no backend"), "no backend"),
    ],
)
def test_the_fault_is_one_line(toolchain, error, said):
    toolchain(error)
    assert compiler_fault() == said


def test_auto_goes_on_without_a_compiler_and_says_how_to_get_one(toolchain):
    toolchain(RuntimeError("no g++ here"))
    model = small_model()
    assert compile_layers(model, "auto") == (
        "no working C++ compiler; install g++ for about twice the speed (no g++ here)"
    )
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_on_without_a_compiler_is_an_error(toolchain):
    toolchain(RuntimeError("no g++ here"))
    with pytest.raises(ValueError, match=r"compile is 'on'.*no g\+\+ here.*install g\+\+ or use 'off'"):
        compile_layers(small_model(), "on")


def test_off_does_not_look_for_a_compiler(monkeypatch):
    monkeypatch.setattr(acceleration, "compiler_fault", lambda: pytest.fail("looked"))
    assert compile_layers(small_model(), "off") == "switched off"


@pytest.mark.parametrize("setting", ["auto", "on"])
def test_every_decoder_layer_is_compiled_and_nothing_else(monkeypatch, setting):
    model, compiled = small_model(num_prelude_layers=1, num_coda_layers=1), []
    monkeypatch.setattr(acceleration, "compiler_fault", lambda: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    assert compile_layers(model, setting) is None
    layers = [*model.model.prelude, *model.model.layers, *model.model.coda]
    assert {id(layer) for layer, _ in compiled} == set(map(id, layers)) and len(compiled) == 4
    assert all(options == {"dynamic": False} for _, options in compiled)


@pytest.mark.slow
def test_compiled_layers_compute_what_the_plain_ones_do():
    if compiler_fault() is not None:
        pytest.skip(f"no compiler: {compiler_fault()}")
    torch.manual_seed(0)
    model = small_model()
    ids = torch.randint(0, 40, (2, 16))

    def gradients():
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters()]

    plain_loss, plain = gradients()
    assert compile_layers(model, "on") is None
    loss, compiled = gradients()
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-5)
