"""TEMPORARY stand-in; to be replaced."""
import numpy as np, torch
from qmix.bitsandbytes_quiet import functional as F
def _t(w):
    t=torch.from_numpy(w.copy())
    return t.view(torch.bfloat16) if t.dtype==torch.uint16 else t
def quantize_4bit_packed(weights, kind, codes, absmax):
    t=_t(weights)
    if not torch.isfinite(t.float()).all(): return False
    q,s=F.quantize_4bit(t,blocksize=64,quant_type=kind)
    absmax[:]=s.absmax.view(t.shape[0],-1).T.numpy()
    p,_=F._convert_weight_packed_for_cpu(q,s)
    codes[:]=p.reshape(-1).numpy(); return True
def quantize_4bit_flat(weights, kind, codes, absmax, last):
    t=_t(weights)
    if not torch.isfinite(t.float()).all(): return False
    q,s=F.quantize_4bit(t,blocksize=64,quant_type=kind)
    codes[:]=q.reshape(-1).numpy(); absmax[:]=s.absmax.numpy(); return True
def quantize_int8_rows(weights, codes, row_max):
    t=_t(weights)
    if not torch.isfinite(t.float()).all(): return False
    c,s,_=torch.ops.bitsandbytes.int8_vectorwise_quant(t)
    codes[:]=c.numpy(); row_max[:]=s.numpy(); return True
