"""TEMPORARY until the operators land."""

import torch
from torch.nn import functional as F


def _crop(m, boxes, padding):
    N, h, w = m.shape

    def lim(a, b, size):
        a, b = a * size, b * size
        lo = torch.minimum(a, b)
        hi = torch.maximum(a, b)
        return (lo - padding).clamp(min=0), (hi + padding).clamp(max=size)

    x1, x2 = lim(boxes[:, 0], boxes[:, 2], w)
    y1, y2 = lim(boxes[:, 1], boxes[:, 3], h)
    c = torch.arange(w, device=m.device)
    r = torch.arange(h, device=m.device)
    inx = (c >= x1[:, None]) & (c < x2[:, None])
    iny = (r >= y1[:, None]) & (r < y2[:, None])
    return m * (iny[:, :, None] & inx[:, None])


def assemble_masks(p, c, b, batch_index=None, *, padding=1.0):
    if p.dim() == 4:
        if batch_index is None:
            p = p[0]
    if p.dim() == 3:
        m = torch.einsum("hwk,nk->nhw", p, c).sigmoid()
    else:
        out = []
        m = torch.empty(0)
        m = torch.zeros(len(c), p.shape[1], p.shape[2], dtype=p.dtype, device=p.device)
        for i in range(len(p)):
            s = batch_index == i
            m = m.index_put((s.nonzero()[:, 0],), torch.einsum("hwk,nk->nhw", p[i], c[s]).sigmoid())
    return _crop(m, b, padding)


def assemble_binary_masks(
    p, c, b, size, batch_index=None, *, threshold=0.5, crop="before", padding=1.0
):
    m = assemble_masks(p, c, b, batch_index, padding=padding)
    if len(m) == 0:
        return torch.zeros((0, *size), dtype=torch.bool)
    return F.interpolate(m[:, None], size, mode="bilinear", align_corners=False)[:, 0] > threshold
