"""The C structures of forward.cpp and penalties.h, field for field."""

from ctypes import POINTER, Structure, c_float, c_int64, c_void_p


class Matrix(Structure):
    _fields_ = (("packed", c_void_p), ("scales", c_void_p), ("n", c_int64), ("k", c_int64))


class LowRankMatrices(Structure):
    _fields_ = (("down", Matrix), ("up", Matrix))


class Layer(Structure):
    _fields_ = (
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("qkv_bias", c_void_p),
        ("qkv", Matrix),
        ("o", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("qkv_adapter", LowRankMatrices),
        ("o_adapter", LowRankMatrices),
        ("gate_up_adapter", LowRankMatrices),
        ("down_adapter", LowRankMatrices),
        ("keys", c_void_p),
        ("values", c_void_p),
    )


class Model(Structure):
    _fields_ = (
        ("is_bfloat16", c_int64),
        ("num_layers", c_int64),
        ("hidden", c_int64),
        ("intermediate", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("page_size", c_int64),
        ("eps", c_float),
        ("embedding", c_void_p),
        ("norm", c_void_p),
        ("phases", c_void_p),
        ("query_scale", c_void_p),
        ("head", Matrix),
        ("layers", POINTER(Layer)),
    )


class Penalty(Structure):
    _fields_ = (
        ("first_row", c_int64),
        ("num_rows", c_int64),
        ("num_shared", c_int64),
        ("shared_ids", c_void_p),
        ("shared_times", c_void_p),
        ("own_starts", c_void_p),
        ("own_ids", c_void_p),
        ("own_times", c_void_p),
        ("taken_off", c_void_p),
        ("scale", c_float),
        ("shared_was", c_void_p),
        ("own_was", c_void_p),
    )
