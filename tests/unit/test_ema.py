"""The teacher is an average in fp32 of the student's parameters and a copy of its buffers."""

import pytest
import torch
from torch import nn

from data2vec_vision.ema import ema_update, frozen_copy


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("position", torch.arange(5))
        self.register_buffer("scale", torch.ones(2))


def test_equals_the_formula_after_several_updates():
    student = Counting()
    teacher = frozen_copy(student)
    expected = student.linear.weight.detach().clone()
    for tau in (0.9, 0.99, 0.5, 0.0, 1.0):
        with torch.no_grad():
            student.linear.weight.add_(torch.randn(2, 3))
        ema_update(teacher, student, tau)
        expected = tau * expected + (1 - tau) * student.linear.weight.detach()
        torch.testing.assert_close(teacher.linear.weight, expected)


def test_buffers_are_copied_and_integers_survive():
    student = Counting()
    teacher = frozen_copy(student)
    student.position += 2
    student.scale *= 3
    ema_update(teacher, student, 0.999)
    assert torch.equal(teacher.position, torch.arange(5) + 2)
    assert torch.equal(teacher.scale, torch.full((2,), 3.0))


def test_a_half_precision_student_has_a_full_precision_teacher_that_moves():
    student = Counting().bfloat16()
    teacher = frozen_copy(student)
    assert teacher.linear.weight.dtype == torch.float32
    before = teacher.linear.weight.clone()
    with torch.no_grad():
        student.linear.weight.add_(1)
    ema_update(teacher, student, 0.9999)  # rounds to 1 in bf16
    torch.testing.assert_close(teacher.linear.weight - before, torch.full((2, 3), 1e-4), rtol=0.05, atol=0)


def test_the_copy_is_frozen_and_of_its_own():
    student = Counting().train()
    teacher = frozen_copy(student)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert student.training and all(p.requires_grad for p in student.parameters())
    assert teacher.linear.weight.data_ptr() != student.linear.weight.data_ptr()


def test_misuse_is_refused():
    student = Counting()
    with pytest.raises(ValueError, match="tau must be in"):
        ema_update(frozen_copy(student), student, 1.5)
    with pytest.raises(ValueError, match="do not have the same parameters"):
        ema_update(frozen_copy(student), nn.Linear(4, 2), 0.9)
