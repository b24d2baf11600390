"""What an optimizer step does beside its arithmetic: no waiting for the device, and a compiler that may fail."""

import dataclasses

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from data2vec_vision import cpu, train
from data2vec_vision.config import TrainConfig
from data2vec_vision.errors import InputError
from data2vec_vision.plan import made_ready, prepare
from data2vec_vision.train import Compiled, Window, optimizer_and_scaler, training_steps
from data2vec_vision.vit import MaskedVisionTransformer

NAMES = ["data2vec", "data2vec2", "ijepa", "mae", "msn", "swav"]
# Operations whose result the host has to see, so that it waits for the device.
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "_unique2",
    "unique_dim",
    "bincount",
}


class Operations(TorchDispatchMode):
    """The names of all operations within it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """The part of `Waits` for calls that become no operation where tensors are in the host's memory anyway."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy):
            self.waits.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Notes every operation within it that would make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.names, self.calls = [], Calls(self)

    def __enter__(self):
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.calls.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, torch.Tensor)]
        by_mask = name.startswith("index") and any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
        if name in WAITING or by_mask:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def job_of(images, **settings):
    sizes = {"image_size": 16, "patch_size": 4, "hidden_dim": 32, "n_encoders": 2, "n_heads": 2, "batch_size": 4}
    return prepare(TrainConfig(str(images), workers=0, device="cpu", epochs=1, **(sizes | settings)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_no_step_waits_for_the_device_until_a_line_is_logged(images, name, precision, monkeypatch):
    job = job_of(images, method=name, precision=precision, grad_accum=2)
    batches = list(train.loader(job))  # images and masks are made on the host, in a run by the workers
    monkeypatch.setattr(train, "loader", lambda job, cache=None: batches)
    window = Window(job)
    steps = training_steps(job, *optimizer_and_scaler(job))
    window.add(next(steps))
    with Waits() as waits:
        step = next(steps)
        window.add(step)
    assert waits.names == []


def test_waiting_would_be_seen():
    x = torch.arange(3.0)
    for wait in (lambda: x.sum().item(), x.tolist, x.cpu, x.numpy, lambda: bool(x[0] > 0), lambda: x[x > 1], x.nonzero):
        with Waits() as waits:
            wait()
        assert waits.names


def test_where_nothing_compiles_the_run_goes_on_and_says_so_once(images, monkeypatch, capsys):
    def broken(function):
        def run(*args, **kwargs):
            raise torch._dynamo.exc.TorchDynamoException("no compiler\n Set TORCHDYNAMO_VERBOSE=1 for more")

        return run

    monkeypatch.setattr(train.torch, "compile", broken)
    losses = {}
    for compiled in (True, False):
        job = job_of(images, compile=compiled)
        losses[compiled] = [s.logs["loss"].item() for s in training_steps(job, *optimizer_and_scaler(job))]
    assert losses[True] == losses[False]
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "Note     torch.compile does not work here, so the run goes on without it: TorchDynamoException: no compiler"
    ]


def test_a_python_that_torch_does_not_compile_for_is_no_error(images, monkeypatch, capsys):
    def refuse(function):
        raise RuntimeError("torch.compile is not supported on Python 3.99+")

    monkeypatch.setattr(train.torch, "compile", refuse)
    job = job_of(images, compile=True)
    assert next(training_steps(job, *optimizer_and_scaler(job))).logs["loss"].isfinite()
    assert "not supported on Python 3.99+" in capsys.readouterr().out


def test_dropout_that_cannot_be_drawn_again_is_refused(images):
    job = job_of(images, dropout=0.1, grad_checkpointing=True)
    with pytest.raises(InputError, match="--grad-checkpointing cannot draw the same dropout again on mps"):
        made_ready(dataclasses.replace(job, device=torch.device("mps")))


def test_an_error_of_the_method_is_no_error_of_the_compiler(monkeypatch, capsys):
    class Method(torch.nn.Module):
        def forward(self, views, masks):
            raise ValueError("of the method")

    monkeypatch.setattr(train.torch, "compile", lambda function: lambda *args, **kwargs: function(*args, **kwargs))
    with pytest.raises(ValueError, match="of the method"):
        Compiled(Method())([], masks={})
    assert capsys.readouterr().out == ""


def test_only_long_runs_in_bf16_on_a_cpu_with_a_compiler_are_compiled(images):
    from data2vec_vision.config import Facts, resolve

    facts = Facts(n_images=1_000_000, image_size=224, depth=12, recipe={}, device="cpu", native_bf16=True, cores=2,
                  flops=9.2e9, compiler=True)  # fmt: skip
    config = TrainConfig(str(images), epochs=10)
    assert resolve(config, facts)[0].compile is True
    other = [{"n_images": 1000}, {"native_bf16": False}, {"device": "cuda"}, {"compiler": False}, {"cores": 256}]
    for change in other:
        assert resolve(config, dataclasses.replace(facts, **change))[0].compile is False, change
    for typed in (True, False):
        assert resolve(dataclasses.replace(config, compile=typed), facts)[0].compile is typed


# How often a step calls student and teacher, on which sizes of image, and of how many blocks it keeps the state.
CALLS = {
    "data2vec": ([(16, 0)], [(16, 2)]),
    "data2vec2": ([(16, 0)], [(16, 2)]),
    "ijepa": ([(16, 0)], [(16, 2)]),
    "mae": ([(16, 0)], []),
    "msn": ([(16, 0), (8, 0)], [(16, 0)]),
    "swav": ([(16, 0), (8, 0)], []),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_step_calls_each_network_once_a_resolution_and_keeps_the_states_that_it_needs(images, name, monkeypatch):
    job = job_of(images, method=name, precision="bf16")
    job.method.skip_beginning()  # as most steps are
    calls = {True: [], False: []}
    encode = MaskedVisionTransformer.encode

    def counted(self, x, *args, **kwargs):
        encoded = encode(self, x, *args, **kwargs)
        is_student = self is job.method.student
        calls[is_student].append((x.shape[-1], len(encoded.hidden)))
        if not is_student:  # the teacher: in bf16, and nothing is kept for a backward pass
            assert not encoded.tokens.requires_grad and not any(h.requires_grad for h in encoded.hidden)
            assert all(h.dtype == torch.bfloat16 for h in encoded.hidden)
        return encoded

    monkeypatch.setattr(MaskedVisionTransformer, "encode", counted)
    next(training_steps(job, *optimizer_and_scaler(job)))
    student, teacher = CALLS[name]
    assert sorted(calls[True], reverse=True) == student and calls[False] == teacher


@pytest.mark.parametrize("name", ["data2vec", "mae"])
def test_optimizer_and_teacher_move_all_their_tensors_at_once(images, name):
    job = job_of(images, method=name)
    steps = training_steps(job, *optimizer_and_scaler(job))
    next(steps)
    with Operations() as seen:
        next(steps)
    assert seen.names.count("_fused_adamw_") == 2  # a call for the decayed and one for the others
    assert seen.names.count("_foreach_lerp_") == (name == "data2vec")
    assert not {"lerp_", "addcdiv_"} & set(seen.names)


@pytest.mark.parametrize("settings", [{}, {"grad_checkpointing": True}])
def test_linear_maps_are_convolutions_in_a_run_unless_they_are_computed_again(images, monkeypatch, settings):
    """What torch's checkpointing computes again has to be the same operations, or it refuses to go on."""
    monkeypatch.setattr("data2vec_vision.device.mkl_is_slow", lambda: True)
    monkeypatch.setattr(cpu, "LEAST_ROWS", 1)
    monkeypatch.setattr(cpu, "LEAST_MULTIPLICATIONS", 1)
    monkeypatch.setattr(cpu.torch, "get_num_threads", lambda: 2)
    job = job_of(images, precision="fp32", **settings)
    with Operations() as seen:
        next(training_steps(job, *optimizer_and_scaler(job)))
    assert ("convolution" in seen.names) is not bool(settings)
