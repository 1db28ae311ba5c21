"""What the tests of the contrastive losses and of the distillation compare with: fp64, and eager PyTorch."""

from __future__ import annotations

import torch
from torch.nn import functional as F

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def eager_clip(image, text, scale, labels=None):
    """As it is written without kernels: logits in the features' dtype, the softmax in fp32 (fp64 of fp64)."""
    logits = scale.to(image.dtype) * (image @ text.T)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    target = torch.arange(len(image))
    if labels is not None:
        same = (labels[:, None] == labels[None, :]).to(logits.dtype)
        target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def eager_siglip(image, text, scale, bias, labels=None):
    logits = scale.to(image.dtype) * (image @ text.T) + bias.to(image.dtype)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    same = torch.eye(len(image), dtype=torch.bool) if labels is None else labels[:, None] == labels[None, :]
    return -F.logsigmoid(torch.where(same, logits, -logits)).sum() / len(image)


def eager_distill(student, head, teacher, teacher_head, temperature=1.0, weight=None, top_k=None):
    """The weighted mean over rows; ties at the k-th logit count."""
    logits, others = student @ head.T, teacher @ teacher_head.T
    wide = torch.promote_types(logits.dtype, torch.float32)
    if top_k is not None:
        others = others.masked_fill(others < others.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    log_p = torch.log_softmax(logits.to(wide) / temperature, dim=1)
    log_q = torch.log_softmax(others.to(wide) / temperature, dim=1)
    rows = torch.where(log_q > -torch.inf, log_q.exp() * (log_q - log_p), 0.0).sum(1)
    return rows.mean() if weight is None else (weight * rows).sum() / weight.sum()


def relative(got, want):
    """|got - want| / |want| over a whole tensor."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def doubled(tensors):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def value_and_gradients(function, tensors, upstream=1.0):
    """[loss, a gradient for each tensor that requires one]."""
    loss = function(*tensors)
    leaves = [x for x in tensors if x.requires_grad]
    return [loss, *torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream))]


def pairs(n, d, dtype, seed, easy=0.0, spread=0):
    """Unit features that require gradients; `easy` draws pairs together; with `spread`, that many labels."""
    torch.manual_seed(seed)
    image = F.normalize(torch.randn(n, d), dim=1)
    text = F.normalize(torch.randn(n, d) + easy * image * d**0.5, dim=1)
    labels = torch.randint(0, spread, (n,)) if spread else None
    return image.to(dtype).requires_grad_(), text.to(dtype).requires_grad_(), labels


def hidden_and_heads(n, vocabulary, dtype, seed, width=16, teacher_width=24, misfit=None):
    """Student and teacher; with `misfit` the teacher is the student with so much noise."""
    torch.manual_seed(seed)
    student, head = torch.randn(n, width), torch.randn(vocabulary, width) / 3
    if misfit is None:
        teacher, teacher_head = torch.randn(n, teacher_width), torch.randn(vocabulary, teacher_width) / 3
    else:
        teacher, teacher_head = student + misfit * torch.randn(n, width), head
    student, head, teacher, teacher_head = (x.to(dtype) for x in (student, head, teacher, teacher_head))
    return student.requires_grad_(), head.clone().requires_grad_(), teacher, teacher_head
